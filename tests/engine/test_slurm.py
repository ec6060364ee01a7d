"""The pipeline on a real SLURM of one node and two CPUs, which the test starts on this machine."""

import importlib.util
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import slurm_fixture
from engine_fixture import (
    NOTHING,
    OTHER,
    PROJECT,
    VARIANT,
    Repository,
    assert_clean,
    snakemake_command,
)
from real_pipeline import TINY, clone, run
from slurm_fixture import Slurm, running_slurm, wait_until

PLUGIN = "the SLURM executor is not installed: make slurm"
# Looks for ended jobs every second or so, where the profile waits for trainings of hours.
ON_SLURM = (
    "--workflow-profile",
    str(PROJECT / "profiles/slurm"),
    "--slurm-init-seconds-before-status-checks",
    "1",
)

pytestmark = [
    pytest.mark.skipif(bool(slurm_fixture.missing()), reason=slurm_fixture.missing()),
    pytest.mark.skipif(importlib.util.find_spec("snakemake_executor_plugin_slurm") is None, reason=PLUGIN),
]


def stage_of(job: dict[str, str]) -> str:
    return job["Comment"].removeprefix("rule_")


def one_point(content: dict) -> None:
    content["benchmark"]["grid"] |= {"micro_batch_rows": [1], "gradient_checkpointing": [False]}


def test_the_real_pipeline_trains_two_at_once_and_then_has_nothing_to_do(
    warm_python, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """On a cluster without GPUs, which `device: auto` does not ask for any."""
    folder = clone(tmp_path / "clone", TINY, one_point)
    warm_python.enter(folder)
    trainings = [f"train@{VARIANT}-1", f"train@{OTHER}-1"]
    with running_slurm() as slurm:
        for name, value in slurm.environment.items():
            monkeypatch.setenv(name, value)
        run(folder, "snakemake", *trainings, *ON_SLURM)
        first, second = [job for job in slurm.jobs() if stage_of(job) in trainings]
        assert max(first["StartTime"], second["StartTime"]) < min(first["EndTime"], second["EndTime"])
        run(folder, "snakemake", "report", *ON_SLURM)
        stages = run(folder, "dvc", "stage", "list", "--name-only").split()
        jobs = slurm.jobs()
        assert sorted(map(stage_of, jobs)) == sorted(stages)
        assert {job["JobState"] for job in jobs} == {"COMPLETED"}
        assert NOTHING in run(folder, "snakemake", "report", *ON_SLURM)
        assert len(slurm.jobs()) == len(stages)
    assert (folder / "report/index.html").stat().st_size > 10_000
    assert "up to date" in run(folder, "dvc", "status")


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    with running_slurm(gpus=2) as slurm:
        yield slurm


@pytest.fixture
def repository(finished: Repository, tmp_path: Path) -> Repository:
    """A repository that is up to date, and two seeds that are then added."""
    repository = finished.copy(tmp_path / "copy")
    repository.edit_params(lambda params: params["experiment"].update(seeds=[1, 2, 3]))
    return repository


@contextmanager
def submitted(repository: Repository, slurm: Slurm) -> Iterator[subprocess.Popen]:
    """Yield Snakemake's run, whose two trainings have started and hang; they go on at its end."""
    trainings = {
        f"train@{VARIANT}-{seed}": repository.control / f"hang train@{VARIANT}-{seed}" for seed in (2, 3)
    }
    for hang in trainings.values():
        hang.touch()
    log = repository.control / "ran"
    with subprocess.Popen(
        [str(snakemake_command()), "report", *ON_SLURM],
        cwd=repository.root,
        env=repository.environment() | slurm.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as run:
        try:
            wait_until(
                lambda: log.exists() and set(log.read_text().split()) == {"sample", *trainings},
                "two trainings",
                180,
            )
            yield run
        finally:
            for hang in trainings.values():
                hang.unlink(missing_ok=True)


def on_slurm(repository: Repository, slurm: Slurm, *arguments: str) -> str:
    environment = [f"{name}={value}" for name, value in slurm.environment.items()]
    return repository.run("env", *environment, str(snakemake_command()), *arguments, *ON_SLURM)


def test_a_canceled_job_fails_its_call_and_the_next_call_runs_it_alone(repository: Repository, slurm: Slurm):
    canceled = f"train@{VARIANT}-2"
    with submitted(repository, slurm) as run:
        [job] = [job for job in slurm.jobs() if stage_of(job) == canceled and job["JobState"] == "RUNNING"]
        slurm.call("scancel", job["JobId"])
        output = ""
        for line in run.stdout:
            output += line
            if f"Error in rule {canceled}:" in line:  # the other goes on until then
                (repository.control / f"hang train@{VARIANT}-3").unlink()
        run.wait(timeout=60)
    assert run.returncode == 1
    assert f"SLURM-job '{job['JobId']}' failed, SLURM status is: 'CANCELLED'" in output
    assert f"logs/{canceled}.log" in output
    assert slurm.job(job["JobId"])["JobState"] == "CANCELLED"
    assert repository.ran() == ["sample", canceled, f"train@{VARIANT}-3"]

    on_slurm(repository, slurm, canceled, f"train@{VARIANT}-3")
    assert repository.ran() == [canceled]
    # The other engine goes on from there.
    scored = [
        f"{stage}-{seed}"
        for stage in (f"divergence@{VARIANT}-{VARIANT}", f"evaluate@{VARIANT}")
        for seed in (2, 3)
    ]
    assert repository.bring_up_to_date("dvc") == ["compare", *scored, "report"]
    assert_clean(repository)


def test_jobs_of_an_experiment_on_cpus_ask_for_no_gpu(repository: Repository, slurm: Slurm):
    dry_run = ("--dry-run", f"train@{VARIANT}-2")
    assert "gpu=1" in on_slurm(repository, slurm, *dry_run)
    repository.edit_params(lambda params: params["hardware"].update(device="cpu"))
    assert "gpu=0" in on_slurm(repository, slurm, *dry_run)


def test_a_job_asks_for_what_its_stage_needs_and_ends_with_an_interrupted_call(
    repository: Repository, slurm: Slurm
):
    with submitted(repository, slurm) as run:
        jobs = [job for job in slurm.jobs() if job["JobState"] == "RUNNING"]
        assert len(jobs) == 2
        for job in jobs:  # as dvc.yaml says
            assert job["TresPerJob"] == "gres:gpu:1"
            assert (job["MinMemoryNode"], job["TimeLimit"]) == ("8000M", "10:00:00")
        run.send_signal(signal.SIGINT)
        run.communicate(timeout=120)
        wait_until(lambda: not slurm.call("squeue", "--noheader"), "Ctrl-C")
        assert {slurm.job(job["JobId"])["JobState"] for job in jobs} == {"CANCELLED"}
