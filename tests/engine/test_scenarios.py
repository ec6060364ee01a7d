"""A working week on one pipeline with two engines: experiments, interruptions, hands on the outputs, clones."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import run_stage_in
from engine_fixture import (
    AFTER_CHANGING_THE_EVALUATION,
    ENGINES,
    OTHER,
    VARIANT,
    assert_clean,
    assert_nothing_to_do,
    change_evaluation,
    group_exists,
    hanging,
    push_and_clone,
    snakemake_command,
    wait_until,
)
from filelock import ReadWriteLock

DVC = [sys.executable, "-m", "dvc"]
DVC_REPRO = [*DVC, "repro"]
SNAKEMAKE = [str(snakemake_command()), "--cores", "1"]
AFTER_CHANGING_THE_LEARNING_RATE = [
    "compare",
    f"divergence@{VARIANT}-{VARIANT}-1",
    f"evaluate@{VARIANT}-1",
    "rates",
    "report",
    f"train@{VARIANT}-1",
]


@pytest.mark.parametrize("engine", ENGINES)
def test_an_edit_before_the_pull_reruns_what_depends_on_it(repository, tmp_path, engine):
    clone = push_and_clone(repository, tmp_path)
    clone.edit_params(change_evaluation)
    clone.dvc("pull", "--quiet")
    assert clone.bring_up_to_date(engine) == AFTER_CHANGING_THE_EVALUATION
    assert_clean(clone)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_edit_after_the_pull_reruns_what_depends_on_it(repository, tmp_path, engine):
    clone = push_and_clone(repository, tmp_path)
    clone.dvc("pull", "--quiet")
    clone.edit_params(change_evaluation)
    assert clone.bring_up_to_date(engine) == AFTER_CHANGING_THE_EVALUATION
    assert_clean(clone)


def test_a_clone_renders_the_report_again_without_training(repository, tmp_path):
    clone = push_and_clone(repository, tmp_path)
    clone.dvc("pull", "--quiet")
    page = clone.root / "report/index.html"
    before = page.read_text()
    page.unlink()
    assert clone.bring_up_to_date("dvc") == ["report"]
    assert page.read_text() == before


def test_an_experiment_is_a_state_that_snakemake_knows(repository):
    repository.dvc("exp", "run", "-S", "training.schedule.learning_rate=1e-4")
    assert repository.ran() == AFTER_CHANGING_THE_LEARNING_RATE
    assert_clean(repository)
    assert_nothing_to_do(repository, "snakemake")


def test_queued_experiments_run_one_after_the_other_and_leave_the_workspace_alone(repository):
    repository.dvc("exp", "run", "--queue", "-S", "training.schedule.learning_rate=1e-4,2e-4")
    # DVC starts its worker by name, so the environment has to be active.
    active = f"PATH={Path(sys.executable).parent}:{repository.environment()['PATH']}"
    repository.run("env", active, "dvc", "exp", "run", "--run-all", "-j", "1")
    assert repository.ran() == sorted(2 * AFTER_CHANGING_THE_LEARNING_RATE)
    assert repository.run("git", "status", "--short") == ""
    assert_clean(repository)
    shown = json.loads(repository.dvc("exp", "show", "--json"))
    experiments = [one["revs"][0]["data"] for one in shown[-1]["experiments"]]
    rates = {
        one["params"]["params.yaml"]["data"]["training"]["schedule"]["learning_rate"] for one in experiments
    }
    assert rates == {1e-4, 2e-4}
    assert all(list(one["metrics"]) == ["results/compare/metrics.json"] for one in experiments)


def test_snakemake_finishes_what_ctrl_c_ended_under_dvc(repository):
    repository.edit_params(change_evaluation)
    stage = f"evaluate@{VARIANT}-1"
    with hanging(repository, stage, DVC_REPRO) as run:
        os.killpg(run.pid, signal.SIGINT)
        assert run.wait(timeout=60) != 0
    ran = repository.ran()
    assert ran[-1] == stage and set(ran) <= set(AFTER_CHANGING_THE_EVALUATION)
    done = set(ran) - {stage}
    assert repository.bring_up_to_date("snakemake") == sorted(set(AFTER_CHANGING_THE_EVALUATION) - done)
    assert_clean(repository)
    assert_nothing_to_do(repository, "dvc")


@pytest.mark.parametrize("again", ENGINES)
@pytest.mark.parametrize("engine", [DVC_REPRO, SNAKEMAKE], ids=ENGINES)
def test_a_killed_engine_takes_its_stage_with_it_and_leaves_no_lock(repository, engine, again):
    repository.edit_params(change_evaluation)
    stage = f"evaluate@{VARIANT}-1"
    with hanging(repository, stage, engine) as run:
        run.kill()  # it alone: what it started lives on
        run.wait()
        wait_until(lambda: not group_exists(run.pid))
    repository.ran()
    assert stage in repository.bring_up_to_date(again)
    assert_clean(repository)
    assert_nothing_to_do(repository, "snakemake")


def test_a_snakemake_waits_for_the_jobs_of_one_that_was_killed(repository):
    repository.edit_params(change_evaluation)
    # A job that outlives its Snakemake for as long as this test likes.
    with ReadWriteLock(repository.root / ".snakemake" / "jobs.lock").read_lock():
        run = subprocess.Popen(
            [str(snakemake_command()), "--cores", "1", "report"],
            cwd=repository.root,
            env=repository.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        while "waits for the jobs of a Snakemake that was killed" not in run.stdout.readline():
            assert run.poll() is None
        assert repository.ran() == []
    run.communicate(timeout=120)
    assert run.returncode == 0 and repository.ran() == AFTER_CHANGING_THE_EVALUATION


def test_prune_removes_the_checkpoints_of_trainings_that_are_gone(repository):
    kept, gone = (
        repository.root / f"results/train/{name}/checkpoints/step-1"
        for name in (f"{VARIANT}/1", f"{OTHER}/1")
    )
    for folder in (kept, gone):
        folder.mkdir(parents=True)
    repository.prune()
    assert kept.exists() and not (repository.root / "results/train" / OTHER).exists()
    assert_nothing_to_do(repository, "dvc")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("path", "stage", "reruns"),
    [
        (f"results/train/{VARIANT}/1/weights/first", f"train@{VARIANT}-1", []),  # the cache has it
        ("results/compare/summary.csv", "compare", ["compare"]),  # only git has it
    ],
)
def test_an_output_changed_by_hand_is_reported_and_put_right(repository, engine, path, stage, reruns):
    before = (repository.root / path).read_text()
    lock = (repository.root / "dvc.lock").read_bytes()
    repository.append(path, "better numbers")
    assert stage in json.loads(repository.dvc("status", "--json"))
    assert f"rule {stage}:" in repository.snakemake("--dry-run", "report")
    assert repository.bring_up_to_date(engine) == reruns
    assert (repository.root / path).read_text() == before
    assert (repository.root / "dvc.lock").read_bytes() == lock
    assert_clean(repository)


@pytest.mark.parametrize("given", [None, "3"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_stage_has_the_threads_that_the_user_gave_under_either_engine(repository, engine, given):
    """Sums over other threads have other last digits, and Snakemake gives a job one thread."""
    repository.edit_params(lambda params: params["comparison"].update(power=0.81))
    command = [*DVC, "repro"] if engine == "dvc" else [str(snakemake_command()), "--cores", "1", "report"]
    repository.run("env", *([f"OMP_NUM_THREADS={given}"] if given else []), *command)
    assert (repository.control / "threads compare").read_text() == (given or "as many as there are")


@pytest.mark.parametrize("engine", ENGINES)
def test_the_rest_of_a_matrix_goes_on_after_a_failure(repository, engine):
    repository.edit_params(lambda params: params["experiment"].update(seeds=[1, 2, 3]))
    failing = f"train@{VARIANT}-2"
    told = repository.control / f"fail {failing}"
    told.touch()
    command = [*DVC, "repro"] if engine == "dvc" else [str(snakemake_command()), "--cores", "1", "report"]
    said = repository.run(*command, "--keep-going", fails=True)
    assert f"{failing}: failed: told to" in said
    assert repository.ran() == [
        f"divergence@{VARIANT}-{VARIANT}-3",
        f"evaluate@{VARIANT}-3",
        "sample",
        failing,
        f"train@{VARIANT}-3",
    ]
    told.unlink()
    rest = ["compare", f"divergence@{VARIANT}-{VARIANT}-2", f"evaluate@{VARIANT}-2", "report", failing]
    assert repository.bring_up_to_date(engine) == rest
    assert_clean(repository)


@pytest.mark.parametrize("engine", ENGINES)
def test_linked_outputs_are_replaced_and_not_written_through(repository, engine):
    """Links into the cache are read-only, which root overlooks: its right to is taken away where it runs."""
    repository.dvc("config", "cache.type", "hardlink")
    repository.dvc("checkout", "--relink", "--quiet")
    weights = repository.root / f"results/train/{VARIANT}/1/weights/first"
    assert weights.stat().st_nlink == 2 and not weights.stat().st_mode & 0o222
    bare = (
        [] if os.geteuid() else ["setpriv", "--bounding-set", "-dac_override", "--inh-caps", "-dac_override"]
    )
    if bare and not shutil.which("setpriv"):
        pytest.skip("root writes to read-only files, and setpriv, which can take that right away, is missing")
    repository.commit()
    repository.edit_params(change_evaluation)
    command = [*DVC, "repro"] if engine == "dvc" else [str(snakemake_command()), "--cores", "1", "report"]
    repository.run(*bare, *command)
    assert repository.ran() == AFTER_CHANGING_THE_EVALUATION
    assert_clean(repository)
    repository.dvc("checkout", "--quiet")
    assert_nothing_to_do(repository, "snakemake")


def test_the_graph_and_the_params_are_read_without_torch(repository):
    """Both engines import these for every command."""
    code = "import sys, workflow.params, workflow.engine.pipeline; print({'torch', 'transformers'} & set(sys.modules))"
    assert repository.run(sys.executable, "-c", code).strip() == "set()"


@pytest.mark.parametrize(
    ("arguments", "begins", "log"),
    [
        (
            ["train", "--variant", "nowhere", "--seed", "7"],
            "train, variant nowhere, seed 7",
            "train@nowhere-7",
        ),
        (["sample"], "sample", "sample"),
    ],
)
def test_a_failed_stage_says_in_one_line_which_why_and_where_its_log_is(tmp_path, arguments, begins, log):
    done = run_stage_in(tmp_path, *arguments)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    why = "params.yaml is missing: `make params PRESET=default` writes params.yaml"
    assert line.startswith(
        f"{begins}: failed: {why}. Log: logs/{log}.log. Mend it and run the same command again"
    )
    # The two streams are copied side by side, so that lines of the same moment may change places.
    assert set((tmp_path / f"logs/{log}.log").read_text().splitlines()) == {f"{begins}: started", line}
