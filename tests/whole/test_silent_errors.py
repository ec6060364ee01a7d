"""What would give wrong numbers in silence stops a stage by name, with exit code 1, and leaves no output.

Each check is tested where its code is; here are stages as processes, stopped by what lies in their files.
"""

import shutil
from pathlib import Path

import pytest
from conftest import ROOT, run_stage_in, write_rows_to_train_on
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from workflow import params
from workflow.data.choices import scored_rows
from workflow.runtime.files import read_jsonl, write_jsonl
from workflow.runtime.paths import MODEL, split_file, train_rows_file


@pytest.fixture
def folder(tmp_path, tiny_model, splits) -> Path:
    """A folder in which the stages that compute with the model can run."""
    shutil.copytree(ROOT / "workflow", tmp_path / "workflow", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(tiny_model, tmp_path / MODEL)
    (tmp_path / "params.yaml").write_text(params.complete_text("tiny"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    scored = scored_rows(splits["test"], tokenizer, choice_seed=55, held_out_categories=[])
    write_jsonl(tmp_path / split_file("test"), scored)
    write_rows_to_train_on(tmp_path, splits)
    return tmp_path


def overflowing(folder: Path) -> None:
    weights = load_file(folder / MODEL / "model.safetensors")
    weights["model.norm.weight"] *= 1e38  # finite, and its products are not
    save_file(weights, folder / MODEL / "model.safetensors", metadata={"format": "pt"})


def without_a_weight(folder: Path) -> None:
    weights = load_file(folder / MODEL / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / MODEL / "model.safetensors", metadata={"format": "pt"})


def counted_otherwise(folder: Path) -> None:
    rows = read_jsonl(folder / split_file("test"))
    rows[2]["response_tokens"] += 1
    write_jsonl(folder / split_file("test"), rows)


def with_an_end_token_in_a_response(folder: Path) -> None:
    rows = read_jsonl(folder / train_rows_file(1))
    rows[5]["response"] = "It is </s> over."
    write_jsonl(folder / train_rows_file(1), rows)


TRAIN = ("train", "--variant", "lora_16bit", "--seed", "1")


@pytest.mark.parametrize(
    ("fault", "stage", "said"),
    [
        (overflowing, TRAIN, "the training loss is not finite"),
        (without_a_weight, TRAIN, "lacks model.layers.1.mlp.up_proj.weight, which config.json asks for"),
        (with_an_end_token_in_a_response, TRAIN, "teaches 2 end tokens, so the model would stop in its middle"),
        (counted_otherwise, ("evaluate_base", "--variant", "lora_16bit"), "of the test split are scored, and the sample stage counted"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)  # fmt: skip
def test_the_stage_stops_by_name_and_leaves_no_output(folder, fault, stage, said):
    fault(folder)
    done = run_stage_in(folder, *stage)
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"{stage[0]}, variant {stage[2]}") and ": failed: " in last and said in last
    names = ("result.json", "items.parquet", "adapter_model.safetensors")
    assert not [path for name in names for path in folder.rglob(name)]
