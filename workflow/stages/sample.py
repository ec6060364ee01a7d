"""Stage sample: draw the rows as the seed recipe does, and split them by instruction."""

from workflow import instructions, params
from workflow.console import run_stage, say
from workflow.files import read_jsonl, write_json, write_jsonl
from workflow.paths import INSTRUCTIONS, MODEL, SAMPLE, split_file


def sample() -> None:
    """Draw the rows, split them, and write each split with the token counts that the metrics need."""
    from transformers import AutoTokenizer

    asked = params.load().sample
    rows = instructions.from_rows(read_jsonl(INSTRUCTIONS))
    drawn = instructions.sample(rows, size=asked.rows, seed=asked.seed)
    splits = instructions.split(
        drawn, validation=asked.validation_rows, test=asked.test_rows, seed=asked.split_seed
    )
    tokenizer = AutoTokenizer.from_pretrained(MODEL, trust_remote_code=False)
    for name in ("train", "validation"):
        write_jsonl(split_file(name), instructions.as_rows(splits[name]))
    write_jsonl(split_file("test"), instructions.scored_rows(splits["test"], tokenizer))
    for name, members in splits.items():
        say(f"  {name}: {len(members)} rows, {len({row.group for row in members})} different instructions")
    write_json(SAMPLE / "metrics.json", {f"{name}_rows": len(members) for name, members in splits.items()})


if __name__ == "__main__":
    run_stage("sample", sample)
