"""Stage sample: draw the rows that each seed trains on, and those that all are validated and tested on."""

from workflow import params
from workflow.data.rows import as_rows, from_rows
from workflow.data.sample import make_sample
from workflow.runtime.files import read_jsonl, whole_folder, write_json, write_jsonl
from workflow.runtime.paths import (
    INSTRUCTIONS,
    MODEL,
    SAMPLE_COUNTS,
    TRAIN_ROWS,
    TUNING_ROWS,
    split_file,
    train_rows_file,
)
from workflow.runtime.stage import run_stage, say


def sample() -> None:
    """Draw the rows, split them, and write each split with what the evaluation tasks need."""
    settings = params.load()
    seeds, tuning = settings.experiment.seeds, settings.tuning.seeds
    made = make_sample(from_rows(read_jsonl(INSTRUCTIONS)), settings.sample, [*seeds, *tuning], MODEL)
    drawn = {seed: as_rows(rows) for seed, rows in made.draws.train.items()}
    with whole_folder(TRAIN_ROWS) as folder:
        for seed in seeds:
            write_jsonl(folder / train_rows_file(seed).name, drawn[seed])
    write_jsonl(TUNING_ROWS, [{"seed": seed, "rows": drawn[seed]} for seed in tuning])
    write_jsonl(split_file("validation"), as_rows(made.draws.validation))
    write_jsonl(split_file("test"), made.scored)
    for line in made.summary():
        say(f"  {line}")
    write_json(SAMPLE_COUNTS, made.counts())


if __name__ == "__main__":
    run_stage("sample", sample)
