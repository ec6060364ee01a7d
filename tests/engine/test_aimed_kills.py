"""A process that is killed, or a disk that is full, at one write of a file of DVC's: the next run goes on from there."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from engine_fixture import (
    PROJECT,
    VARIANT,
    Repository,
    assert_clean,
    hanging,
    snakemake_command,
    wait_until,
)

from workflow.engine import dvc_patch_state
from workflow.runtime import dvc_lock_text
from workflow.runtime.files import md5

STAGE = f"train@{VARIANT}-1"
MAKE = [sys.executable, "-m", "workflow.pipeline", "dvc", "repro"]
PLAIN = [sys.executable, "-m", "dvc", "repro"]
SNAKEMAKE = [str(snakemake_command()), "--cores", "1"]


def change_training(params: dict) -> None:
    params["training"]["schedule"]["warmup_fraction"] = 0.5


def ends_at(repository: Repository, module: str, how: str, text: str, number: int = 1) -> str:
    """Run the stage under DVC as kill_at.py does, and return what it printed."""
    command = [sys.executable, str(PROJECT / "tests/kill_at.py"), module, how, text, str(number)]
    command += ["dvc", "repro", STAGE] if module == "workflow.engine.pipeline" else ["repro", STAGE]
    done = subprocess.run(
        command, cwd=repository.root, env=repository.environment(), capture_output=True, text=True
    )
    assert done.returncode, done.stdout
    return done.stdout + done.stderr


def damaged_objects(repository: Repository) -> list[Path]:
    cache = repository.root / ".dvc/cache/files/md5"
    return [
        path
        for path in cache.rglob("*")
        if path.is_file()
        and path.suffix != ".tmp"
        and md5(path) != (path.parent.name + path.name).removesuffix(".dir")
    ]


@pytest.mark.parametrize(
    ("how", "text", "number", "runs_again"),
    [
        ("before", "dvc.lock.partial", 1, 0),
        ("within", "dvc.lock.partial", 1, 0),
        ("full", "dvc.lock.partial", 1, 0),
        ("within", "rwlock.partial", 1, 1),
        ("full", "rwlock.partial", 1, 1),
        ("within", "cache/runs", 3, 1),
        ("within", "cache/files/md5/", 4, 1),
    ],
)
def test_a_write_that_ends_half_way_costs_nothing(repository, how, text, number, runs_again):
    repository.edit_params(change_training)
    before = (repository.root / "dvc.lock").read_text()
    said = ends_at(repository, "workflow.engine.pipeline", how, text, number)
    if how == "full":
        assert "would be larger than the system lets a file be" in said and "Traceback" not in said
    assert (repository.root / "dvc.lock").read_text() == before
    first = repository.ran()
    repository.run(*MAKE, STAGE)
    assert len(repository.ran()) <= runs_again and set(first) <= {STAGE}
    assert not damaged_objects(repository)
    assert_clean(repository, STAGE)
    assert "partial" not in repository.run("git", "status", "--short")


@pytest.mark.parametrize("door", ["prune", "snakemake"])
@pytest.mark.parametrize("size", [0, 0.3, 0.8])
def test_an_emptied_or_cut_dvc_lock_is_put_back_and_nothing_runs_again(repository, door, size):
    # What plain `dvc repro` left of it, killed while it recorded a stage that had run.
    repository.edit_params(change_training)
    lock = repository.root / "dvc.lock"
    ends_at(repository, "dvc", "within", "dvc.lock")
    assert repository.ran() == [STAGE] and lock.stat().st_size <= 10
    committed = repository.run("git", "show", "HEAD:dvc.lock")
    lock.write_text(committed[: int(len(committed) * size)])
    if not size:  # DVC takes some cuts for whole
        repository.dvc("status", fails=True)
    said = repository.prune() if door == "prune" else repository.snakemake("--dry-run", "report")
    assert "put back" in said and "Traceback" not in said
    assert dvc_lock_text.split_blocks(lock.read_text()).keys() == dvc_lock_text.split_blocks(committed).keys()
    repository.dvc("repro", STAGE)
    assert repository.ran() == []
    assert_clean(repository, STAGE)


def test_of_two_blocks_that_of_the_results_which_are_here_is_put_back(repository):
    lock, copy = (repository.root / path for path in ("dvc.lock", ".dvc/tmp/dvc.lock.copy"))
    here = lock.read_text()
    repository.edit_params(change_training)
    repository.dvc("repro", STAGE)
    assert copy.read_text() == here  # as it was before that stage
    copy.write_text(lock.read_text())  # as a later stage leaves it
    repository.run("git", "checkout", "--", "params.yaml", "dvc.lock", "results")
    repository.dvc("checkout", "--quiet")
    lock.write_text("")
    repository.prune()
    assert lock.read_text() == here


def test_a_stale_result_is_not_called_up_to_date_by_a_lock_that_was_put_back(repository):
    repository.append(f"results/train/{VARIANT}/1/weights/first", "of nobody")
    (repository.root / "dvc.lock").write_text("")
    repository.prune()
    assert STAGE in json.loads(repository.dvc("status", "--json"))


def test_a_lock_of_which_nothing_is_left_anywhere_goes_and_the_cache_has_all(repository):
    (repository.root / ".dvc/tmp/dvc.lock.copy").unlink(missing_ok=True)
    repository.run("git", "rm", "--quiet", "--cached", "dvc.lock")
    repository.run("git", "commit", "--quiet", "--message", "no lock")
    (repository.root / "dvc.lock").write_text("schema")
    assert "0 stages" in repository.prune()
    repository.run(*MAKE, "evaluate@" + STAGE.removeprefix("train@"))
    assert repository.ran() == []


def test_a_merge_conflict_is_a_sentence_and_the_file_stays(repository):
    lock = repository.root / "dvc.lock"
    text = lock.read_text().replace("stages:\n", "stages:\n<<<<<<< HEAD\n=======\n>>>>>>> theirs\n")
    lock.write_text(text)
    for said in (
        repository.run(sys.executable, "-m", "workflow.pipeline", "prune", fails=True),
        repository.snakemake("--dry-run", "report", fails=True),
    ):
        assert "dvc.lock holds a merge conflict (line 3): keep one side with" in said
        assert "Traceback" not in said
    assert lock.read_text() == text


def test_braces_in_the_path_are_a_sentence(repository, tmp_path):
    (tmp_path / "a{b}").mkdir()
    copy = repository.copy(tmp_path / "a{b}" / "c")
    for said in (
        copy.run(*MAKE, fails=True),
        copy.run(sys.executable, "-m", "workflow.pipeline", "prune", fails=True),
        copy.snakemake("--dry-run", "report", fails=True),
    ):
        assert "DVC cannot work in a folder whose path has braces" in said and "Traceback" not in said


@pytest.mark.parametrize(
    "value",
    [
        0.1,
        "no",
        "1e-3",
        "two\nlines\n\n  and more",
        "ä \u2028 x: #" * 20,
        None,
        [],
        {"a": {"b": [1, "x" * 99]}},
    ],
)
@pytest.mark.parametrize("name", ["a@b-1", "z"])
def test_a_block_of_dvc_lock_is_written_as_dvc_writes_it(tmp_path, monkeypatch, value, name):
    entry = {"cmd": "run it", "params": {"params.yaml": {"key": value, "other": 1}}}
    entry["outs"] = [{"path": "x", "hash": "md5", "md5": "0" * 32, "size": 3}]
    monkeypatch.setattr(dvc_patch_state.serialize, "to_lockfile", lambda stage: {stage.name: stage.entry})
    texts = []
    for patches in (nullcontext, dvc_patch_state.applied):
        lock = dvc_patch_state.dvcfile.Lockfile.__new__(dvc_patch_state.dvcfile.Lockfile)
        lock.path = str(tmp_path / "dvc.lock")
        lock.repo = SimpleNamespace(
            fs=None, root_dir=".", scm_context=SimpleNamespace(track_file=lambda path: None)
        )
        Path(lock.path).unlink(missing_ok=True)
        with patches():
            for old in ("a@b-1", "m", name):
                lock.dump_stages([SimpleNamespace(name=old, entry=entry)])
                entry = entry | {"cmd": f"run {old}"}
        texts.append(Path(lock.path).read_text())
        entry = entry | {"cmd": "run it"}
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (PLAIN, MAKE),
        (PLAIN, SNAKEMAKE),
        (MAKE, MAKE),
        (SNAKEMAKE, MAKE),
        (MAKE, SNAKEMAKE),
        (SNAKEMAKE, SNAKEMAKE),
    ],
    ids=[
        "plain-make",
        "plain-snakemake",
        "make-make",
        "snakemake-make",
        "make-snakemake",
        "snakemake-snakemake",
    ],
)
def test_engines_beside_each_other_wait_and_no_stage_runs_twice(repository, first, second):
    repository.edit_params(change_training)
    said = repository.root / "logs" / "second"
    said.parent.mkdir(exist_ok=True)
    log = repository.root / "logs" / f"{STAGE}.log"
    with hanging(repository, STAGE, first) as one, said.open("w") as file:
        other = subprocess.Popen(
            [*second, STAGE],
            cwd=repository.root,
            env=repository.environment(),
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        # A job of Snakemake's has its words in its log.
        where = log if first is PLAIN and second is SNAKEMAKE else said
        wait_until(lambda: where.exists() and "waits for process" in where.read_text())
    assert one.wait(timeout=60) == 0
    assert other.wait(timeout=60) == 0, said.read_text()
    assert repository.ran() == [STAGE]
    assert_clean(repository, STAGE)


def test_a_process_id_that_another_program_has_got_holds_no_stage(repository):
    repository.edit_params(change_training)
    path = str(repository.root / f"results/train/{VARIANT}/1/weights")
    running = {"write": {path: {"pid": os.getppid(), "cmd": "dvc repro"}}, "read": {}}
    (repository.root / ".dvc/tmp/rwlock").write_text(json.dumps(running))
    repository.run(*MAKE, STAGE)
    assert repository.ran() == [STAGE]
