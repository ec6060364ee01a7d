"""A training that is ended, gently or not, goes on from its checkpoint and ends with the bits of an undisturbed one."""

import csv
import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from conftest import CPU, ROOT, run_stage_in, write_rows_to_train_on
from edit_params import set_training
from ruamel.yaml import YAML
from safetensors.torch import load_file

from workflow import params
from workflow.runtime.errors import UserError
from workflow.runtime.files import read_json, write_json
from workflow.runtime.lifetime import Terminated
from workflow.runtime.paths import MODEL, checkpoints_folder, train_folder
from workflow.training import checkpoints, history, train

TIMES = {"seconds"}
STEPS = 5


class Lost(Exception):
    """The process is gone: nothing is written any more."""


def run(asked, tiny_model, splits, folder: Path, *, name="lora_16bit", every=2, **changes):
    training = asked.training.model_copy(update={"learning_rate": 1e-2, "steps": STEPS} | changes)
    return train.train(
        params.Run(name, asked.variants[name], 1, training, CPU),
        model_folder=tiny_model,
        train_rows=splits["train"],
        validation_rows=splits["validation"],
        folder=folder,
        checkpointing=checkpoints.Checkpointing(every, "this") if every else None,
    )


def at_step(step: int, do):
    """Training.History that does something in the middle of a step."""

    class Disturbed(history.History):
        def on_substep_end(self, args, state, control, **kwargs):
            if state.global_step + 1 == step:
                do()

    return Disturbed


def lose():
    raise Lost


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def curves(folder: Path) -> list[list[dict]]:
    found = []
    for name in ("history.csv", "validation.csv"):
        with (folder / name).open() as file:
            found.append(
                [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in csv.DictReader(file)]
            )
    return found


def told(trained: train.Trained) -> dict:
    return {name: value for name, value in asdict(trained).items() if name not in TIMES}


def bits(folder: Path) -> dict[str, bytes]:
    files = sorted((folder / "weights").glob("*"))
    assert files
    return {file.name: file.read_bytes() for file in files}


def kept_steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").iterdir())


UNPACKED = ("packing", "fused_adapters", "shared_inputs", "fused_layers", "fused_loss")
# Keeps the best weights of a curve that turns up before the last interruption.
BEST = {"keep": "best", "validations": 8, "rows": 8, "schedule": "constant"}
# Each way to hold, adapt, step or log stands in one of them.
CASES = {
    "16-bit LoRA": {},
    "NF4, between two lines of the curve": {"name": "qlora_nf4_dq", "log_every_steps": 4},
    "FP4, in the third epoch": {"name": "qlora_fp4", "steps": None, "epochs": 3, "batch_rows": 8, "micro_batch_rows": 4},
    "merge-aware NF4": {"name": "qlora_nf4_dq_merge_aware"},
    "int8": {"name": "lora_int8"},
    "full fine-tuning, fused AdamW, weight decay": {"name": "full_16bit", "optimizer": "adamw_torch_fused", "weight_decay": 0.1},
    "DoRA on NF4 that begins with LoftQ, LoRA+": {"name": "qdora_nf4_dq", "initialization": "loftq", "b_rate_factor": 4.0},
    "PiSSA, rank-stabilized": {"name": "lora_16bit", "initialization": "pissa", "rank_stabilized": True},
    "OLoRA, dropout": {"name": "lora_16bit", "initialization": "olora", "dropout": 0.3},
    "dropout and recomputation": {"dropout": 0.3, "gradient_checkpointing": True},
    "best weights, 16-bit DoRA": BEST | {"name": "dora_16bit"},
    "best weights, PiSSA": BEST | {"initialization": "pissa"},
    "best weights, full fine-tuning": BEST | {"name": "full_16bit", "learning_rate": 0.1},
    "TRL's own step": dict.fromkeys(UNPACKED, False) | {"log_every_steps": 3},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_training_goes_on_with_the_same_bits(case, tiny, tiny_model, splits, tmp_path, monkeypatch):
    changes = CASES[case]
    whole, ended = tmp_path / "whole", tmp_path / "ended"
    for folder in (whole, ended):
        folder.mkdir()
    undisturbed = run(tiny, tiny_model, splits, whole, every=None, **changes)
    step = undisturbed.steps - 1
    kept = undisturbed.kept_step
    assert kept < step if changes.get("keep") == "best" else kept == undisturbed.steps
    # Lost in a step that follows one with no checkpoint; then ended by SIGTERM, which writes one more.
    monkeypatch.setattr(train, "History", at_step(step, lose))
    with pytest.raises(Lost):
        run(tiny, tiny_model, splits, ended, **changes)
    before = (step - 1) // 2 * 2
    assert kept_steps(ended) == [before - 2, before] if before > 2 else [before]
    monkeypatch.setattr(train, "History", at_step(step, terminate))
    with pytest.raises(Terminated, match=f"step {step} of {undisturbed.steps} is done and kept"):
        run(tiny, tiny_model, splits, ended, **changes)
    assert kept_steps(ended) == [before, step]
    monkeypatch.undo()
    resumed = run(tiny, tiny_model, splits, ended, **changes)
    assert told(resumed) == told(undisturbed)
    assert curves(ended) == curves(whole)
    assert bits(ended) == bits(whole)


def test_a_checkpoint_is_safetensors_and_json_alone(tiny, tiny_model, splits, tmp_path):
    run(tiny, tiny_model, splits, tmp_path)
    checkpoint = tmp_path / "checkpoints" / "step-4"
    assert sorted(file.name for file in checkpoint.iterdir()) == [
        "0.json",
        "0.safetensors",
        "manifest.json",
        "trainer_state.json",
    ]
    assert {name.split(".")[0] for name in load_file(checkpoint / "0.safetensors")} == {
        "weights",
        "optimizer",
        "random",
    }


def test_without_checkpoints_a_sigterm_says_that_the_steps_are_lost(
    tiny, tiny_model, splits, tmp_path, monkeypatch
):
    monkeypatch.setattr(train, "History", at_step(2, terminate))
    with pytest.raises(Terminated, match="step 2 of 5 is done and lost, since params ask for no checkpoints"):
        run(tiny, tiny_model, splits, tmp_path, every=None)
    assert not list((tmp_path / "checkpoints").iterdir())


def put_checkpoint(folder: Path, step: int, *, belongs_to: str) -> None:
    partial = folder / f".step-{step}.partial"
    partial.mkdir(parents=True)
    file = partial / "0.json"
    file.write_text("{}")
    files = {file.name: checkpoints.sha256(file)}
    checkpoints.complete(partial, folder / f"step-{step}", belongs_to=belongs_to, files=files)


def test_what_belongs_to_another_training_is_removed(tmp_path):
    folder, said = tmp_path / "checkpoints", []
    mine = checkpoints.identity([], rate=1)
    assert checkpoints.last(folder, belongs_to=mine, say=said.append) is None
    for step in (2, 6, 10):
        put_checkpoint(folder, step, belongs_to=mine)
    (folder / ".step-14.partial").mkdir()  # of a kill
    assert checkpoints.last(folder, belongs_to=mine, say=said.append) == folder / "step-10"
    assert sorted(path.name for path in folder.iterdir()) == ["step-10", "step-6"]
    other = checkpoints.identity([], rate=2)
    assert checkpoints.last(folder, belongs_to=other, say=said.append) is None
    assert not folder.exists() and not said
    folder.write_text("")
    with pytest.raises(UserError, match="is a file, and must be a folder"):
        checkpoints.last(folder, belongs_to=mine, say=said.append)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


DAMAGES = {  # what is done to the checkpoint of step 4, and what is said of it
    "a bit of the tensors": (lambda path: flip(path / "0.safetensors"), "0.safetensors is not as it was written"),
    "a bit of the counts": (lambda path: flip(path / "0.json"), "0.json is not as it was written"),
    "cut": (lambda path: cut(path / "0.safetensors"), "0.safetensors is not as it was written"),
    "empty": (lambda path: (path / "trainer_state.json").write_bytes(b""), "trainer_state.json is not as it was"),
    "missing": (lambda path: (path / "0.safetensors").unlink(), "0.safetensors is missing"),
    "a folder": (
        lambda path: ((path / "0.json").unlink(), (path / "0.json").mkdir()),
        r"0.json cannot be read \(Is a directory\)",
    ),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
    "an empty manifest": (lambda path: (path / "manifest.json").write_bytes(b""), "manifest.json is no JSON"),
    "a nested manifest": (lambda path: (path / "manifest.json").write_text("[" * 10**5), "manifest.json is no JSON"),
    "a manifest of bytes": (lambda path: (path / "manifest.json").write_bytes(b'"\xff"'), "manifest.json is no JSON"),
    "a list": (lambda path: (path / "manifest.json").write_text("[]"), "manifest.json is not as it was written"),
    "no digests": (
        lambda path: write_json(path / "manifest.json", {"belongs_to": "this", "files": {}}),
        "manifest.json is not as it was written",
    ),
    "a bit of the manifest": (lambda path: flip(path / "manifest.json"), "manifest.json is n"),
    "a file in its place": (
        lambda path: (path.rename(path.with_name("gone")), path.write_text("")),
        r"manifest.json cannot be read \(Not a directory\)",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def interrupted(tiny, tiny_model, splits, tmp_path_factory) -> tuple[Path, Path]:
    """An undisturbed training, and one that was lost after the checkpoint of step 4."""
    whole, ended = (tmp_path_factory.mktemp(name) for name in ("whole", "ended"))
    run(tiny, tiny_model, splits, whole, every=None)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Lost):
        patch.setattr(train, "History", at_step(STEPS, lose))
        run(tiny, tiny_model, splits, ended)
    assert kept_steps(ended) == [2, 4]
    return whole, ended


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_is_used(case, interrupted, tmp_path):
    folder, said = tmp_path / "checkpoints", []
    shutil.copytree(interrupted[1] / "checkpoints", folder)
    spoil, words = DAMAGES[case]
    spoil(folder / "step-4")
    assert checkpoints.last(folder, belongs_to="this", say=said.append) == folder / "step-2"
    (line,) = said
    assert re.search(rf"the checkpoint .*step-4 is damaged: {words}", line) and "damaged-step-4" in line
    assert (folder / "damaged-step-4").exists() and not (folder / "step-4").exists()


@pytest.mark.parametrize("name", ["0.safetensors", "manifest.json"])
def test_a_checkpoint_that_may_not_be_read_is_set_aside(name, interrupted, tmp_path, monkeypatch):
    folder, said = tmp_path / "checkpoints", []
    shutil.copytree(interrupted[1] / "checkpoints", folder)
    (folder / "step-4" / name).chmod(0)
    opened = Path.open

    def refusing(path: Path, *arguments, **options):  # root may read every file
        if path.stat().st_mode & 0o777 == 0:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refusing)
    assert checkpoints.last(folder, belongs_to="this", say=said.append) == folder / "step-2"
    assert f"{name} cannot be read (Permission denied)" in said[0]


@pytest.mark.parametrize("damaged", [["step-4"], ["step-4", "step-2"]])
def test_a_training_beside_damaged_checkpoints_ends_with_the_same_bits(
    damaged, interrupted, tiny, tiny_model, splits, tmp_path, capfd
):
    whole, ended = interrupted
    again = tmp_path / "again"
    shutil.copytree(ended, again)
    for name in damaged:
        flip(again / "checkpoints" / name / "0.safetensors")
    run(tiny, tiny_model, splits, again)
    out = capfd.readouterr().out
    assert ("goes on after step 2 of 5" in out) == (len(damaged) == 1)
    assert ("no whole checkpoint is left, and the training begins anew" in out) == (len(damaged) == 2)
    # The lines that the lost process wrote after step 2 are not there twice.
    assert curves(again) == curves(whole)
    assert bits(again) == bits(whole)


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    order: list[str] = []
    fsync, replace = os.fsync, os.rename

    def noted_fsync(descriptor: int) -> None:
        order.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(f"replace {Path(b).name}"), replace(a, b)))
    put_checkpoint(tmp_path / "checkpoints", 2, belongs_to="this")
    named = order.index("replace step-2")
    assert {"0.json", "manifest.json", ".step-2.partial"} <= set(order[:named])
    assert order[named + 1 :] == ["checkpoints"]


def test_the_identity_is_of_content(tmp_path):
    (tmp_path / "model").mkdir()
    rows, weights = tmp_path / "rows", tmp_path / "model" / "weights"
    rows.write_text("a")
    weights.write_text("b")
    files = [rows, tmp_path / "model"]
    first = checkpoints.identity(files, seed=1)
    assert checkpoints.identity(files, seed=1) == first
    assert checkpoints.identity(files, seed=2) != first
    weights.write_text("c")
    assert checkpoints.identity(files, seed=1) != first


@pytest.fixture
def folder(tiny_model, splits, tmp_path) -> Path:
    """Where the train stage finds all it reads; its training takes a while."""
    (tmp_path / MODEL).parent.mkdir(parents=True)
    (tmp_path / MODEL).symlink_to(tiny_model)
    write_rows_to_train_on(tmp_path, splits)
    put_params(tmp_path, steps=60)
    return tmp_path


def put_params(folder: Path, **training_changes) -> None:
    asked = YAML(typ="safe").load(params.complete_text("tiny"))
    set_training(asked, **training_changes)
    with (folder / "params.yaml").open("w") as file:
        YAML().dump(asked, file)


def started(folder: Path, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "workflow.stages.train", "--variant", "lora_16bit", "--seed", "1"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def read_until(stage: subprocess.Popen, words: str) -> str:
    said = ""
    for line in stage.stdout:
        said += line
        if words in line:
            return said
    raise AssertionError(said + stage.stderr.read())


def test_a_stage_keeps_its_step_on_sigterm_and_goes_on(folder):
    stage = started(folder)
    read_until(stage, "step 3 of 60")
    sent = time.monotonic()
    stage.send_signal(signal.SIGTERM)
    _, errors = stage.communicate(timeout=60)
    assert time.monotonic() - sent < 10
    assert stage.returncode == 128 + signal.SIGTERM
    (line,) = errors.splitlines()
    assert line.startswith("train, variant lora_16bit, seed 1: failed: ended by SIGTERM: step ")
    assert (
        line.endswith("Run the same command again: what is done is kept.")
        and "of 60 is done and kept" in line
    )
    kept = folder / checkpoints_folder("lora_16bit", 1)
    step = kept_steps(kept.parent)[-1]
    done = run_stage_in(folder, "train", "--variant", "lora_16bit", "--seed", "1")
    assert done.returncode == 0, done.stderr
    assert f"goes on after step {step} of 60, from its checkpoint" in done.stdout
    assert not kept.exists()
    assert sorted(p.name for p in (folder / train_folder("lora_16bit", 1)).iterdir()) == [
        "history.csv", "result.json", "validation.csv", "weights",
    ]  # fmt: skip


def test_a_stage_begins_anew_when_something_else_is_asked(folder):
    stage = started(folder)
    read_until(stage, "step 2 of 60")
    stage.kill()
    stage.communicate()
    kept = folder / checkpoints_folder("lora_16bit", 1)
    assert list(kept.glob("step-*"))
    put_params(folder, steps=2)
    done = run_stage_in(folder, "train", "--variant", "lora_16bit", "--seed", "1")
    assert done.returncode == 0 and "goes on" not in done.stdout
    assert read_json(folder / train_folder("lora_16bit", 1) / "result.json")["steps"] == 2
    assert not kept.exists()
