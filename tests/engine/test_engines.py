"""DVC and Snakemake on one pipeline: whichever runs, the other has nothing left to do.

The stages are stubs; each test asserts which of them really ran.
"""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import IO, Any

import pytest
import yaml
from dvc import rwlock
from engine_fixture import (
    AFTER_ADDING_A_SEED,
    AFTER_ADDING_A_VARIANT,
    AFTER_CHANGING_THE_EVALUATION,
    COLLECTING,
    ENGINES,
    NOTHING,
    OTHER,
    VARIANT,
    Edit,
    Repository,
    add_seed,
    add_variant,
    assert_clean,
    assert_nothing_to_do,
    change_evaluation,
    group_exists,
    hanging,
    push_and_clone,
    snakemake_command,
    wait_until,
)

from workflow.engine.dvc_repository import open_repo

SNAKEMAKE = [str(snakemake_command()), "--cores", "1", "--nolock"]


def test_dvc_has_nothing_to_do_after_snakemake(repository: Repository) -> None:
    assert_clean(repository)
    assert_nothing_to_do(repository, "dvc")


def test_snakemake_has_nothing_to_do_after_dvc(repository: Repository) -> None:
    # Snakemake remembers its own run, of other inputs; that must not count.
    repository.edit_params(add_seed)
    assert repository.bring_up_to_date("dvc") == AFTER_ADDING_A_SEED
    assert_clean(repository)
    assert_nothing_to_do(repository, "snakemake")
    assert NOTHING in repository.snakemake("--cores", "1")


def test_both_engines_know_the_same_stages(repository: Repository) -> None:
    repository.edit_params(add_variant)
    stages = repository.dvc("stage", "list", "--name-only").split()
    rules = repository.snakemake("--list-rules", "--quiet", "all").split()
    assert sorted(rules) == sorted(stages)
    assert f"train@{OTHER}-1" in rules


def test_pulled_clone_has_nothing_to_do(repository: Repository, tmp_path: Path) -> None:
    clone = push_and_clone(repository, tmp_path)
    clone.dvc("pull", "--quiet")
    assert_clean(clone)
    assert_nothing_to_do(clone, "snakemake")
    assert_nothing_to_do(clone, "dvc")


def test_clone_with_default_remote_pulls_by_itself(repository: Repository, tmp_path: Path) -> None:
    clone = push_and_clone(repository, tmp_path)
    clone.snakemake("--cores", "1", "sample")
    assert clone.ran() == []
    # What only git holds cannot be pulled, and `--pull` alone would call the stage done without it.
    (clone.root / "results/compare/metrics.json").unlink()
    clone.snakemake("--cores", "1", "compare")
    assert clone.ran() == ["compare"]
    assert_clean(clone, "compare")


@pytest.mark.parametrize(
    ("engine", "edit", "expected"),
    [
        ("snakemake", add_seed, AFTER_ADDING_A_SEED),
        ("snakemake", add_variant, AFTER_ADDING_A_VARIANT),
        ("dvc", add_variant, AFTER_ADDING_A_VARIANT),
        ("snakemake", change_evaluation, AFTER_CHANGING_THE_EVALUATION),
        ("dvc", change_evaluation, AFTER_CHANGING_THE_EVALUATION),
    ],
)
def test_params_edit_reruns_what_depends_on_it(
    repository: Repository, engine: str, edit: Edit, expected: list[str]
) -> None:
    repository.edit_params(edit)
    assert repository.bring_up_to_date(engine) == expected
    assert_clean(repository)


@pytest.mark.parametrize("engine", ENGINES)
def test_code_edit_reruns_what_follows_only_if_outputs_change(repository: Repository, engine: str) -> None:
    repository.append("workflow/stages/compare.py", "# a comment changes no output")
    assert repository.bring_up_to_date(engine) == ["compare"]
    repository.append("workflow/stages/compare.py", "a statement does")
    assert repository.bring_up_to_date(engine) == ["compare", "report"]
    assert_clean(repository)


def test_touching_every_file_reruns_nothing(repository: Repository) -> None:
    for file in repository.root.rglob("*"):
        if file.is_file() and not {".git", ".dvc"} & set(file.parts):
            file.touch()
    assert_clean(repository)
    assert_nothing_to_do(repository, "snakemake")
    assert_nothing_to_do(repository, "dvc")


@pytest.mark.parametrize("engine", ENGINES)
def test_deleted_outputs_come_back_from_the_cache(repository: Repository, engine: str) -> None:
    folder = repository.root / f"results/train/{VARIANT}/1"
    shutil.rmtree(folder / "weights")
    (folder / "result.json").unlink()
    assert repository.bring_up_to_date(engine) == []
    assert (folder / "weights" / "folder" / "second").is_file()
    assert repository.run("git", "status", "--short", "--", "results") == ""
    assert_clean(repository)


def test_another_branch_has_nothing_to_do(repository: Repository) -> None:
    repository.run("git", "switch", "--quiet", "--create", "experiment")
    repository.edit_params(change_evaluation)
    repository.bring_up_to_date("dvc")
    repository.commit()
    repository.run("git", "switch", "--quiet", "main")
    repository.dvc("checkout", "--quiet")
    assert_clean(repository)
    assert_nothing_to_do(repository, "snakemake")


def test_eight_items_on_four_cores(repository: Repository) -> None:
    seeds = list(range(11, 19))
    items = [f"train@{VARIANT}-{seed}" for seed in seeds]
    repository.edit_params(lambda params: params["experiment"].update(seeds=seeds))
    repository.snakemake("--cores", "4", *items)
    assert repository.ran() == ["sample", *items]
    assert_clean(repository, *items)


def test_failing_stage_names_its_log_and_the_next_run_goes_on(repository: Repository) -> None:
    repository.edit_params(add_seed)
    failing = f"evaluate@{VARIANT}-2"
    told = repository.control / f"fail {failing}"
    told.touch()
    output = repository.snakemake("--cores", "1", "report", fails=True)
    assert f"logs/{failing}.log" in output
    assert f"{failing}: failed: told to" in output
    assert f"{failing}: failed: told to" in (repository.root / f"logs/{failing}.log").read_text()
    ran = repository.ran()  # the divergence may come before or after what fails
    told.unlink()
    assert {failing, f"train@{VARIANT}-2"} <= set(ran)
    assert sorted({*ran, *repository.bring_up_to_date("snakemake")}) == AFTER_ADDING_A_SEED
    assert_clean(repository)


def test_dry_run_beside_a_run_does_not_disturb_it(repository: Repository) -> None:
    repository.edit_params(change_evaluation)
    stage = f"evaluate@{VARIANT}-1"
    with hanging(repository, stage, SNAKEMAKE) as run:
        assert f"rule {stage}:" in repository.snakemake("--dry-run", "report")
    assert run.wait() == 0
    assert repository.ran() == [stage]


def test_a_process_killed_while_dvc_wrote_its_locks_stops_nobody(repository: Repository) -> None:
    repository.edit_params(change_evaluation)
    locks = repository.root / ".dvc" / "tmp" / "rwlock"
    locks.write_text("")
    assert "corrupted" in repository.dvc("status", fails=True)
    repository.snakemake("--cores", "1", f"evaluate@{VARIANT}-1")
    locks.write_text('{"read": {')
    repository.prune()
    assert repository.bring_up_to_date("dvc") == AFTER_CHANGING_THE_EVALUATION


def test_a_job_killed_while_dvc_writes_its_locks_leaves_them_whole(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    locks = repository.root / ".dvc" / "tmp" / "rwlock"
    before = locks.read_bytes()

    class Killed(BaseException):
        pass

    def die(content: Any, file: IO[str]) -> None:
        file.write('{"re')
        file.flush()
        raise Killed

    with open_repo(repository.root) as repo, monkeypatch.context() as patch:
        patch.setattr(rwlock.json, "dump", die)
        with pytest.raises(Killed), rwlock.rwlock(repo.tmp_dir, repo.fs, "job", [], ["/a/file"], False):
            pass
    assert before and locks.read_bytes() == before


def change_comparison(params: dict[str, Any]) -> None:
    params["comparison"]["power"] = 0.81


@pytest.mark.parametrize(
    ("edit", "stage", "engine", "expected"),
    [
        (change_evaluation, f"evaluate@{VARIANT}-1", "dvc", AFTER_CHANGING_THE_EVALUATION),
        # Its outputs are known to Snakemake, which takes them for incomplete.
        (change_comparison, "compare", "snakemake", ["compare", "report"]),
    ],
)
def test_run_goes_on_after_a_kill(
    repository: Repository, edit: Edit, stage: str, engine: str, expected: list[str]
) -> None:
    repository.edit_params(edit)
    with hanging(repository, stage, SNAKEMAKE) as run:
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        wait_until(lambda: not group_exists(run.pid))
    assert repository.ran() == [stage]
    assert repository.bring_up_to_date(engine) == expected
    # Snakemake remembers that it did not finish this stage; DVC did, and that counts.
    assert_clean(repository)
    assert_nothing_to_do(repository, "snakemake")


def test_snakemakes_own_report_shows_figures_and_tables_with_captions(repository: Repository) -> None:
    repository.snakemake("report", "--report", "report.html")
    page = (repository.root / "report.html").read_text()
    for shown in ("Training curves", "Tables", "Report", "history.csv", "summary.csv", "index.html", VARIANT):
        assert shown in page, shown
    assert "every difference with its interval, tests and verdict" in page  # of a caption
    assert repository.run("git", "status", "--short") == "?? report.html\n"
    assert_clean(repository)


def test_a_shared_training_asks_for_a_gpu_for_each_process(repository: Repository) -> None:
    repository.edit_params(lambda params: params["variants"][VARIANT].update(processes=2))
    planned = repository.snakemake("--dry-run", "report", "--resources", "gpu=4")
    rule = planned[planned.index(f"rule train@{VARIANT}-1:") :].split("\n\n")[0]
    assert "gpu=2" in rule
    rule = planned[planned.index(f"rule evaluate@{VARIANT}-1:") :].split("\n\n")[0]
    assert "gpu=1" in rule


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--touch"], "it would call no stage up to date"),
        (["--forceall"], "`dvc repro --force` runs all stages again"),
        (["-f"], "--force is refused here"),
        (["--forcerun", "compare"], "--forcerun is refused here"),
        (["--list-changes", "params"], "`dvc params diff`"),
        (["--delete-all-output"], "leave the models"),
        (["--directory", "elsewhere"], "is not the folder of the Snakefile"),
        (["--config", "sample=1"], "DVC reads params.yaml alone"),
    ],
)
def test_an_option_that_would_say_something_untrue_is_refused(repository, options, sentence) -> None:
    repository.edit_params(change_evaluation)
    before = {path: (repository.root / path).read_bytes() for path in ("dvc.lock", "report/index.html")}
    output = repository.snakemake("report", "--cores", "1", *options, fails=True)
    assert sentence in output and "Traceback" not in output
    assert len(output.strip().splitlines()) <= 4, output
    assert before == {path: (repository.root / path).read_bytes() for path in before}
    assert f"evaluate@{VARIANT}-1" in json.loads(repository.dvc("status", "--json"))
    assert repository.ran() == []


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (lambda params: params.update(modle={}), "modle is not a key; did you mean model?"),
        (lambda params: params["experiment"].update(baseline=OTHER), f"experiment.baseline is {OTHER}"),
    ],
    ids=["a schema can say it", "only the model can"],
)
def test_bad_params_are_one_sentence(repository: Repository, edit: Edit, sentence: str) -> None:
    repository.edit_params(edit)
    output = repository.snakemake("--cores", "1", "report", fails=True)
    assert f"params.yaml: {sentence}" in output
    assert "Traceback" not in output
    assert len(output.strip().splitlines()) <= 3, output


def test_numbers_mean_the_same_to_both_engines(repository: Repository) -> None:
    file = repository.root / "params.yaml"
    file.write_text(file.read_text().replace("learning_rate: 0.001", "learning_rate: 1e-3"))
    assert "learning_rate: 1e-3" in file.read_text()
    # The report depends on the file as a whole; the training sees the same number.
    assert repository.bring_up_to_date("snakemake") == ["report"]


@pytest.mark.parametrize("engine", ENGINES)
def test_removed_seed_leaves_nothing_and_comes_back_from_the_cache(
    repository: Repository, engine: str
) -> None:
    lock = repository.root / "dvc.lock"
    before = yaml.safe_load(lock.read_text())
    repository.edit_params(add_seed)
    assert repository.bring_up_to_date("dvc") == AFTER_ADDING_A_SEED
    repository.edit_params(lambda params: params["experiment"].update(seeds=[1]))
    if engine == "dvc":
        assert f"train@{VARIANT}-2 is no longer in dvc.yaml" in repository.prune()
    assert repository.bring_up_to_date(engine) == COLLECTING
    assert yaml.safe_load(lock.read_text()) == before
    assert repository.run("git", "status", "--short", "--", "results", "report") == ""
    repository.edit_params(add_seed)
    assert repository.bring_up_to_date("dvc") == COLLECTING


def test_pruning_leaves_what_is_not_in_the_cache(repository: Repository) -> None:
    weights = f"results/train/{VARIANT}/1/weights"
    repository.append(f"{weights}/first", "edited by hand")
    repository.edit_params(lambda params: params["experiment"].update(seeds=[2]))
    output = repository.prune()
    assert f"{weights} was left in place" in output
    assert (repository.root / weights).is_dir()
    assert not (repository.root / f"results/evaluate/{VARIANT}/1/items.parquet").exists()
    assert "-1" not in "".join(yaml.safe_load((repository.root / "dvc.lock").read_text())["stages"])
    assert repository.prune() == ""
