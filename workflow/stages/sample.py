"""Stage sample: draw the rows as the seed recipe does, and split them by instruction."""

from workflow import params
from workflow.data.rows import as_rows, from_rows
from workflow.data.sample import make_sample
from workflow.runtime.files import read_jsonl, write_json, write_jsonl
from workflow.runtime.paths import INSTRUCTIONS, MODEL, SAMPLE_COUNTS, split_file
from workflow.runtime.stage import run_stage, say


def sample() -> None:
    """Draw the rows, split them, and write each split with what the evaluation tasks need."""
    settings = params.load().sample
    drawn = make_sample(from_rows(read_jsonl(INSTRUCTIONS)), settings, MODEL)
    for name in ("train", "validation"):
        write_jsonl(split_file(name), as_rows(drawn.splits[name]))
    write_jsonl(split_file("test"), drawn.scored)
    for line in drawn.summary():
        say(f"  {line}")
    write_json(SAMPLE_COUNTS, drawn.counts())


if __name__ == "__main__":
    run_stage("sample", sample)
