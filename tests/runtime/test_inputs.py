"""What a stage read is what dvc.lock says, and what comes out of DVC's cache is what was written."""

import json
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import made_up_results
import pytest
from conftest import digest_of, run_stage_in
from engine_fixture import (
    ENGINES,
    VARIANT,
    Repository,
    assert_clean,
    change_evaluation,
    damage,
    hanging,
    snakemake_command,
)

from workflow import params
from workflow.comparison import comparable
from workflow.params.training import in_sections
from workflow.runtime import digests, inputs, outputs
from workflow.runtime.errors import CheckError, UserError
from workflow.runtime.files import write_jsonl
from workflow.runtime.paths import evaluate_folder, train_folder, train_rows_file

TRAIN, EVALUATE = f"train@{VARIANT}-1", f"evaluate@{VARIANT}-1"
WEIGHTS = f"results/train/{VARIANT}/1/weights"
DVC = [sys.executable, "-m", "dvc", "repro"]
SNAKEMAKE = [str(snakemake_command()), "--cores", "1"]
COMMANDS = dict(zip(ENGINES, (DVC, SNAKEMAKE), strict=True))
Edit = Callable[[Repository], None]
CODE = "workflow/training"  # a folder that training depends on; the stub has one file in it


def set_rate(value: float) -> Edit:
    return lambda repository: repository.edit_params(
        lambda params: params["training"]["schedule"].update(learning_rate=value)
    )


def before_training(repository: Repository) -> None:
    """Set a rate with which nothing was trained, and run what comes before the training."""
    set_rate(0.002)(repository)
    repository.dvc("repro", "rates")
    repository.ran()


def recorded(repository: Repository) -> list[bytes]:
    """What DVC has on record: dvc.lock, and its run cache."""
    runs = sorted((repository.root / ".dvc/cache/runs").rglob("*"))
    return [(repository.root / "dvc.lock").read_bytes(), *(str(run).encode() for run in runs)]


@pytest.mark.parametrize(
    ("engine", "edit", "named"),
    [
        ("dvc", set_rate(0.005), "training.schedule.learning_rate in params.yaml from 0.002 to 0.005"),
        ("snakemake", set_rate(0.005), "training.schedule.learning_rate in params.yaml from 0.002 to 0.005"),
        ("dvc", lambda r: r.append(f"{CODE}/file.txt", "edited"), CODE),
        ("dvc", lambda r: damage(r.root / "results/sample/train/1.jsonl"), "results/sample/train/1.jsonl"),
    ],
    ids=["params", "params-snakemake", "code", "data"],
)
def test_an_edit_while_a_stage_runs_stops_it_and_records_nothing(repository, engine, edit, named):
    before_training(repository)
    before = recorded(repository)
    with hanging(repository, TRAIN, COMMANDS[engine]) as run:
        edit(repository)
    assert run.wait(timeout=60) != 0
    if engine == "snakemake":  # the stub has no log of its own
        assert f"the next run makes it again: {named}." in (repository.root / f"logs/{TRAIN}.log").read_text()
    assert recorded(repository) == before
    assert TRAIN in repository.ran()
    if "1.jsonl" in named:  # its stage, or the cache, has it still
        (repository.root / "results/sample/train/1.jsonl").unlink()
    repository.run(*COMMANDS[engine], TRAIN)
    assert TRAIN in repository.ran()
    assert_clean(repository, TRAIN)


@pytest.mark.parametrize("undone", [False, True], ids=["of another stage's key", "undone before the end"])
def test_an_edit_that_changes_nothing_of_what_a_stage_read_does_not_stop_it(repository, undone):
    before_training(repository)
    code = repository.root / CODE / "file.txt"
    with hanging(repository, TRAIN, DVC) as run:
        if undone:
            set_rate(0.005)(repository)
            text = code.read_text()
            code.write_text("something else")
            set_rate(0.002)(repository)
            code.write_text(text)
        else:
            repository.edit_params(change_evaluation)
    assert run.wait(timeout=60) == 0
    assert repository.ran() == [TRAIN]
    assert_clean(repository, TRAIN)


def test_params_are_read_as_they_were_when_the_stage_started(repository):
    """The stub reads them when it is let go: what it then reads must be what dvc.lock will say."""
    set_rate(0.002)(repository)
    repository.dvc("repro", TRAIN)
    first = (repository.root / WEIGHTS / "first").read_text()
    repository.ran()
    with hanging(repository, TRAIN, [*DVC, "--force", "--single-item"]) as run:
        set_rate(0.005)(repository)
    assert run.wait(timeout=60) != 0
    assert (repository.root / WEIGHTS / "first").read_text() == first


@pytest.mark.parametrize("what", ["params.yaml", f"{CODE}/file.txt"])
def test_an_edit_between_a_stages_end_and_dvcs_record_is_seen_by_our_own_command(repository, what):
    before_training(repository)
    before = recorded(repository)
    edit = "s/learning_rate: 0.002/learning_rate: 0.005/" if what == "params.yaml" else "$ a edited"
    after = repository.control / "after train"
    after.write_text(f"sed -i {shlex.quote(edit)} {what}\n")
    named = (
        "training.schedule.learning_rate in params.yaml from 0.002 to 0.005"
        if what == "params.yaml"
        else CODE
    )
    said = repository.snakemake("--cores", "1", TRAIN, fails=True)
    assert f"{TRAIN}: failed: what it reads was edited while it ran" in said and f"{named}." in said
    assert recorded(repository) == before
    after.unlink()
    repository.ran()
    repository.snakemake("--cores", "1", TRAIN)
    # The rate is chosen before the training, and the trial depends on the same code.
    assert repository.ran() == (["rates", TRAIN] if what == "params.yaml" else [TRAIN, "try_model"])
    assert_clean(repository, TRAIN)


@pytest.mark.parametrize("content", [b"\xff\xfe", "cut", "another path"])
def test_a_damaged_entry_of_the_run_cache_is_removed_and_its_stage_runs(repository, content):
    (entry,) = (
        path
        for path in (repository.root / ".dvc/cache/runs").rglob("*")
        if path.is_file() and "workflow/run sample" in path.read_text().partition("\n")[0]
    )
    text = entry.read_bytes()
    match content:
        case "cut":
            content = text[: text.index(b"outs:")]
        case "another path":
            content = text.replace(b"results/sample/test.jsonl", b"results/sample/tesu.jsonl")
    entry.write_bytes(content)
    (repository.root / "dvc.lock").unlink()
    said = repository.run(sys.executable, "-m", "workflow.pipeline", "dvc", "repro", "sample")
    assert repository.ran() == ["sample"]
    assert f"removed {entry}: this entry of DVC's run cache was damaged, so its stage runs again" in said
    assert_clean(repository, "sample")


@pytest.mark.parametrize(
    ("engine", "links", "remote", "damaged"),
    [
        ("dvc", "copy", False, "cache"),
        ("snakemake", "symlink", True, "cache"),
        ("dvc", "copy", False, "workspace"),
    ],
)
def test_a_damaged_file_is_not_used_and_comes_back_as_the_sentence_says(
    repository, tmp_path, engine, links, remote, damaged
):
    repository.dvc("config", "cache.type", links)
    if remote:
        repository.dvc("remote", "add", "--default", "store", str(tmp_path / "store"))
        repository.dvc("push", "--quiet")
    if links != "copy":
        repository.dvc("checkout", "--relink", "--quiet")
    folder = repository.root / WEIGHTS
    first, cache = folder / "first", repository.root / ".dvc/cache"
    good = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert_clean(repository)  # and DVC has a record of the files, whose inodes are new
    if damaged == "workspace":
        damage(first)
    else:
        damage(repository.root / digests.object_of(digests.digest(first), cache))
        shutil.rmtree(folder)
    repository.run(*DVC, TRAIN)
    assert repository.ran() == []  # DVC sees nothing
    assert_clean(repository, TRAIN)
    repository.edit_params(change_evaluation)
    lock = (repository.root / "dvc.lock").read_bytes()
    said = repository.run(*COMMANDS[engine], EVALUATE, fails=True)
    assert f"{EVALUATE}: failed: {WEIGHTS}/first is damaged or was changed" in said
    assert (repository.root / "dvc.lock").read_bytes() == lock
    for command in re.findall("`(rm [^`]*|dvc (?:pull|repro) [^`]*)`", said.partition("(or,")[0]):
        repository.run("sh", "-c", command.replace("dvc ", f"{sys.executable} -m dvc "))
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == good
    ran = repository.ran()
    assert (TRAIN in ran) == (damaged == "cache" and not remote)  # nothing else computes again what is there
    repository.run(*COMMANDS[engine], EVALUATE)
    assert EVALUATE in repository.ran()


@pytest.mark.parametrize("damaged", ["another name", "cut"])
@pytest.mark.parametrize("there", [True, False], ids=["folder whole", "folder gone"])
def test_a_damaged_list_of_a_folders_files_is_put_right(repository, damaged, there):
    folder, cache = repository.root / WEIGHTS, repository.root / ".dvc/cache"
    good = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    listing = digests.object_of(str(digest_of(folder)), cache)
    text = listing.read_text()
    listing.chmod(0o644)
    listing.write_text(text.replace('"first"', '"farst"') if damaged == "another name" else text[:40])
    listing.chmod(0o444)
    lock = (repository.root / "dvc.lock").read_bytes()
    if there:
        assert "a list of files in DVC's cache, was damaged: written again" in repository.prune()
    else:
        shutil.rmtree(folder)
    repository.run(sys.executable, "-m", "workflow.pipeline", "dvc", "repro", TRAIN)
    assert repository.ran() == ([] if there else [TRAIN])
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == good
    assert (repository.root / "dvc.lock").read_bytes() == lock and listing.read_text() == text
    assert_clean(repository, TRAIN)


@pytest.fixture
def results(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    made_up_results.write()
    made_up_results.write_lock()
    return tmp_path


@pytest.mark.parametrize("stage", ["compare", "report"])
def test_a_real_stage_refuses_what_is_not_what_was_written(results, stage):
    damage(results / evaluate_folder(VARIANT, 1) / "result.json")
    done = run_stage_in(results, stage)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"{evaluate_folder(VARIANT, 1)}/result.json is damaged or was changed" in done.stdout + done.stderr


def test_a_file_that_is_read_alone_is_checked_by_the_folder_that_was_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in (1, 2):
        write_jsonl(train_rows_file(seed), [{"id": seed}])
    made_up_results.write()
    made_up_results.write_lock()
    outputs.check_outputs(train_rows_file(1))
    damage(train_rows_file(1))
    with pytest.raises(CheckError, match="results/sample/train is damaged or was changed"):
        outputs.check_outputs(train_rows_file(1))


@pytest.mark.parametrize("of", ["dvc.lock", "params.yaml"])
def test_a_comparison_refuses_a_result_that_was_made_with_other_params(results, of):
    """DVC took the params down after they had been edited: of its own records all agree."""
    asked = params.load()
    path = train_folder(VARIANT, 1) / "result.json"
    changed = asked.training.model_dump(mode="json") | {"learning_rate": 0.7}
    record = {"params": {"training": in_sections(changed)}}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"inputs": record}))
    if of == "dvc.lock":
        made_up_results.write_lock()
    else:
        Path("dvc.lock").unlink()
    rate = asked.training.learning_rate
    with pytest.raises(CheckError) as raised:
        comparable.check_inputs(asked)
    assert str(raised.value) == (
        f"{path} was made with training.schedule.learning_rate 0.7, where {of} has {rate}; "
        f"`dvc repro --force --single-item train@{VARIANT}-1` makes it again"
    )


def test_code_that_is_edited_while_a_stage_starts_stops_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("dvc.yaml").write_text("stages: {some: {cmd: x, deps: [code.py], params: [a.b]}}\n")
    Path("params.yaml").write_text("a: {b: 1}\n")
    Path("code.py").write_text("first")
    with pytest.raises(UserError, match=r"^code\.py was edited while this stage was starting"):
        inputs.snapshot("some", {})
    monkeypatch.setattr("workflow.BEGAN", time.time())
    assert inputs.snapshot("some", {}).params == {"a.b": 1}
