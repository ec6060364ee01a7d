"""Stage fetch_dataset: get the instructions and store them as JSON lines."""

import tempfile
from pathlib import Path

from workflow import params
from workflow.data.read import read
from workflow.data.rows import as_rows
from workflow.fetch import sources
from workflow.runtime.files import write_json, write_jsonl
from workflow.runtime.paths import DATASET_SOURCE, INSTRUCTIONS
from workflow.runtime.stage import run_stage, say


def fetch_dataset() -> None:
    """Get the dataset that params.yaml names, check every row, and store the rows in their order."""
    dataset = params.load().dataset
    with tempfile.TemporaryDirectory() as scratch:
        path, source = sources.fetch_dataset(dataset, Path(scratch))
        rows = read(path, dataset)
    write_jsonl(INSTRUCTIONS, as_rows(rows))
    write_json(DATASET_SOURCE, source | {"rows": len(rows)})
    say(f"  {len(rows)} rows")


if __name__ == "__main__":
    run_stage("fetch_dataset", fetch_dataset, network=True)
