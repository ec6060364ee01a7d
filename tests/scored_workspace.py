"""A folder in which lie what a trained run is scored from, where the stages put it."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from conftest import ROOT, random_adapter
from transformers import AutoTokenizer

from workflow import params
from workflow.data.choices import scored_rows
from workflow.runtime.files import write_jsonl
from workflow.runtime.paths import MODEL, split_file, weights_folder


def write_scored_workspace(
    folder: Path, settings: params.Params, model: Path, test_rows: list, runs: Iterable[tuple[str, int]]
) -> None:
    """Write the code, the model, the test split, and an adapter with random weights for each variant and seed."""
    # The task reads the split beside its own code, links resolved.
    shutil.copytree(ROOT / "workflow", folder / "workflow", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(model, folder / MODEL)
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = scored_rows(test_rows, tokenizer, choice_seed=55, held_out_categories=["words"])
    write_jsonl(folder / split_file("test"), rows)
    for name, seed in runs:
        training = settings.training_of(name)
        adapter = folder / weights_folder(name, seed)
        random_adapter(folder / MODEL, adapter, rank=training.rank, alpha=training.alpha)
