"""What the tests share: a tiny random Llama of the real architecture, and rows that need no network."""

import functools
import hashlib
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # the workers share the cores, as workflow/run says

import pytest
from engine_fixture import EVERYTHING, VARIANT, Repository, create_repository
from slow_libraries import compute_once
from stub_hub import REVISION, start_hub, use_hub, without_waiting
from warm_python import WarmPython

from workflow import params
from workflow.data.rows import Instruction, as_rows
from workflow.data.split import split as split_rows
from workflow.fetch import sources
from workflow.runtime import digests
from workflow.runtime.files import sha256, write_jsonl
from workflow.runtime.paths import split_file, train_rows_file
from workflow.runtime.stage import go_offline, quiet_libraries

go_offline()  # a test that would reach a hub fails instead
quiet_libraries()

ROOT = Path(__file__).resolve().parents[1]
PRESETS = params.presets.names()


CPU = params.Hardware(device="cpu", compute_dtype="float32", data_workers=0)


def random_adapter(model_folder: Path, folder: Path, *, seed: int = 0, rank: int = 4, alpha: int = 8) -> Path:
    """An adapter on every linear layer whose weights are random, B's included, so that it changes the model."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
    )
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    get_peft_model(base, config).save_pretrained(folder)
    return folder


def hub_model() -> params.HubModel:
    """A model on the stub of the hub, with its own chat template and end token."""
    return params.HubModel(
        source="hub",
        repository="a/b",
        revision=REVISION,
        chat_template="model",
        chat_date="2024-07-26",
        end_token=None,
        moved=None,
        kept_layers=None,
    )


def file_model(path: Path) -> params.FileModel:
    """A model in a file or a folder of safetensors, with its own chat template and end token."""
    listing = "".join(f"{sha256(file)}  {file.name}\n" for file in sorted(path.glob("*.safetensors")))
    return params.FileModel(
        source="file",
        path=str(path),
        sha256=sha256(path) if path.is_file() else hashlib.sha256(listing.encode()).hexdigest(),
        chat_template="model",
        chat_date="2024-07-26",
        end_token=None,
        moved=None,
        kept_layers=None,
    )


def digest_of(path: Path) -> str | None:
    """The digest of a file or folder as dvc.lock has it; None where there is nothing."""
    return digests.known_digest(path, digests.digests(digests.files_of(path)))


@functools.cache
def warm() -> WarmPython:
    """The process that stages fork from; the first of them starts it."""
    return WarmPython()


def pytest_collection_finish() -> None:
    if "lm_eval" in sys.modules:
        compute_once()


def pytest_sessionfinish() -> None:
    if warm.cache_info().currsize:
        warm().close()


def run_stage_in(
    folder: Path, *arguments: str, python: str | Path | None = None, **environment: str
) -> subprocess.CompletedProcess:
    """Run a stage's command in a folder that holds params.yaml, with the code of this repository.

    Args:
        python: what runs it; a fork of `warm` unless a test names another.
    """
    return subprocess.run(
        [python or warm().python, "-m", f"workflow.stages.{arguments[0]}", *arguments[1:]],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
    )


# The files that take more than half a minute, the longest first: one that began last would run alone at the end.
LONG = (
    "test_end_to_end", "test_your_own", "test_kills", "test_engines", "test_scenarios", "test_bad_input",
    "test_training", "test_aimed_kills", "test_evaluation", "test_made_up_tables", "test_slurm",
    "test_inputs", "test_reference", "test_checkpoints", "test_fsdp", "test_faults",
    "test_stored_precisions", "test_merge_aware", "test_adapters", "test_harness", "test_fused",
    "test_gpus", "test_study", "test_security", "test_precision_variants", "test_serving",
    "test_older_versions", "test_report_browser", "test_grid", "test_sources", "test_divergence",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files."""
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))


@pytest.fixture(scope="session", autouse=True)
def _in_the_repository():
    before = Path.cwd()
    os.chdir(ROOT)
    yield
    os.chdir(before)


@pytest.fixture(scope="session")
def warm_python() -> WarmPython:
    """The process that the stages of a clone can fork from."""
    return warm()


@pytest.fixture(scope="session")
def tiny() -> params.Params:
    return params.preset("tiny")


@pytest.fixture(scope="session")
def tiny_model(tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    sources.fetch_model(tiny.model, folder)
    return folder


def made_up_rows() -> list[Instruction]:
    """Forty rows; one in four has a context, and instructions repeat with other responses."""
    return [
        Instruction(
            id=index,
            instruction=f"Say number {index // 2} in words",
            context="Use small letters." if index % 4 == 0 else "",
            response=f"This is answer {index}, " + "and more " * (index % 7),
            category=("counting", "words")[index % 2],
        )
        for index in range(40)
    ]


@pytest.fixture(scope="session")
def rows() -> list[Instruction]:
    return made_up_rows()


@pytest.fixture(scope="session")
def splits(rows) -> dict[str, list[Instruction]]:
    return split_rows(rows, validation=6, test=8, seed=3, held_out_categories=[])


def write_rows_to_train_on(folder: Path, splits: dict[str, list[Instruction]]) -> None:
    """Write the rows that the runs of seeds 1 to 3 are trained on, and those that all are validated on."""
    for seed in (1, 2, 3):
        write_jsonl(folder / train_rows_file(seed), as_rows(splits["train"]))
    write_jsonl(folder / split_file("validation"), as_rows(splits["validation"]))


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Repository:
    """A committed repository of stubbed stages that Snakemake brought up to date; copied, never changed."""
    repository = create_repository(tmp_path_factory.mktemp("finished"), variants=[VARIANT], seeds=[1])
    assert repository.bring_up_to_date("snakemake") == EVERYTHING
    repository.commit()
    return repository


@pytest.fixture
def repository(finished, tmp_path) -> Repository:
    return finished.copy(tmp_path / "copy")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on loopback, which the libraries ask in place of the real one, with an empty cache."""
    server = start_hub()
    use_hub(server, tmp_path / "hub", monkeypatch)
    without_waiting(monkeypatch)
    yield server
    server.shutdown()
