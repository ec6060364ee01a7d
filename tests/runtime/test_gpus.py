"""Stages that run at once take different GPUs, wait for one where all are taken, and leave none behind.

The stages are processes of their own that enter by the door of all stages; the driver is a made-up one.
"""

import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import ROOT
from engine_fixture import (
    OTHER,
    Repository,
    add_variant,
    snakemake_command,
    wait_until,
)

from workflow import params
from workflow.runtime.errors import UserError

# The calls of NVML that say which GPUs there are, from the variable GPUS.
DRIVER = """
import json, os
class NVMLError(Exception): pass
def nvmlInit():
    if "GPUS" not in os.environ: raise NVMLError("Driver Not Loaded")
def nvmlShutdown(): pass
def gpus(): return json.loads(os.environ["GPUS"])
def nvmlDeviceGetCount(): return len(gpus())
def nvmlDeviceGetHandleByIndex(index): return gpus()[index]
def nvmlDeviceGetUUID(handle): return handle
"""
STAGE = """
import os, sys
from workflow.runtime.stage import run_stage
def stage(count: int, run: int) -> None:
    assert "torch" not in sys.modules
    print("sees", os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
    sys.stdin.read()
run_stage(os.environ["STAGE"], stage, arguments={"count": int, "run": int}, gpus_needed=lambda count, run: count)
"""
FOUR = ["GPU-aa11", "GPU-bb22", "GPU-cc33", "GPU-dd44"]

Start = Callable[..., subprocess.Popen]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a stage that computes on `count` GPUs of a machine that has `gpus`; it ends with its stdin."""
    (tmp_path / "pynvml.py").write_text(DRIVER)
    started = []

    def start(
        gpus: list[str] | None,
        visible: str | None = None,
        count: int = 1,
        stage: str = "train",
        places: str | None = None,
    ) -> subprocess.Popen:
        environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": f"{tmp_path}:{ROOT}",
            "TMPDIR": str(tmp_path),
            **({} if gpus is None else {"GPUS": json.dumps(gpus)}),
            **({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}),
            **({} if places is None else {"STAGES_PER_GPU": places}),
            "STAGE": stage,
        }
        command = [sys.executable, "-c", STAGE, "--count", str(count), "--run", str(len(started))]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        started.append(subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def seen(process: subprocess.Popen) -> str:
    """What the stage sees, once it computes; or the line that says what it waits for."""
    for line in process.stdout:
        if line.startswith("sees "):
            return line.removeprefix("sees ").strip()
        if "waits for" in line:
            return line.strip()
    raise AssertionError(process.stderr.read())


def next_to_speak(stages: list[subprocess.Popen]) -> subprocess.Popen:
    with selectors.DefaultSelector() as selector:
        for stage in stages:
            selector.register(stage.stdout, selectors.EVENT_READ, stage)
        return selector.select(timeout=60)[0][0].data


def end(process: subprocess.Popen) -> None:
    process.communicate()
    assert process.returncode == 0


def test_each_of_four_stages_has_a_gpu_of_its_own_and_a_fifth_waits_for_one(start: Start):
    stages = [start(FOUR) for _ in FOUR]
    at = {seen(stage): stage for stage in stages}
    assert sorted(at) == ["GPU-aa11", "GPU-bb22", "GPU-cc33", "GPU-dd44"]
    fifth = start(FOUR)
    told = seen(fifth)
    assert told.startswith("waits for a GPU: ")
    assert f"GPU-cc33 is held by process {at['GPU-cc33'].pid}" in told
    end(at["GPU-cc33"])
    assert seen(fifth) == "GPU-cc33"


def test_a_killed_stage_frees_its_gpu(start: Start):
    first = start(FOUR[:1])
    assert seen(first) == "GPU-aa11"
    second = start(FOUR[:1])
    assert "waits for a GPU" in seen(second)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert seen(second) == "GPU-aa11"


def test_stages_that_follow_one_another_have_the_first_gpu(start: Start):
    for _ in range(2):
        stage = start(FOUR)
        assert seen(stage) == "GPU-aa11"
        end(stage)


def test_stages_share_a_gpu_where_that_is_asked_for(start: Start):
    two = FOUR[:2]
    stages = [start(two, places="2") for _ in range(4)]
    assert sorted(map(seen, stages)) == ["GPU-aa11", "GPU-aa11", "GPU-bb22", "GPU-bb22"]
    fifth = start(two, places="2")
    assert "waits for a GPU" in seen(fifth)
    end(stages[2])
    assert seen(fifth) in ("GPU-aa11", "GPU-bb22")


@pytest.mark.parametrize("stage", ["benchmark", "benchmark_grid"])
def test_what_measures_shares_with_none(start: Start, stage):
    one = FOUR[:1]
    sharing = [start(one, places="3") for _ in range(2)]
    assert [seen(other) for other in sharing] == ["GPU-aa11"] * 2
    measuring = start(one, places="3", stage=stage)
    assert "waits for a GPU" in seen(measuring)  # though a place is free
    for other in sharing:
        end(other)
    assert seen(measuring) == "GPU-aa11"
    assert "waits for a GPU" in seen(start(one, places="3"))


def test_a_sharded_training_shares_with_none(start: Start):
    two = FOUR[:2]
    sharded = start(two, count=2, places="2")
    assert seen(sharded) == "GPU-aa11,GPU-bb22"
    assert "waits for a GPU" in seen(start(two, places="2"))


@pytest.mark.parametrize("places", ["0", "-1", "many", ""])
def test_another_number_of_places_is_one_sentence(start: Start, places):
    _, errors = start(FOUR, places=places).communicate()
    assert f"STAGES_PER_GPU is '{places}'; it must be a whole number from 1 to 999." in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("gpus", "visible", "expected"),
    [
        pytest.param(FOUR, "2,0", ["2", "0"], id="indices"),
        pytest.param(FOUR, " GPU-dd, 1", ["GPU-dd", "1"], id="the beginning of a UUID"),
        pytest.param(FOUR, "3,9,0", ["3"], id="nothing after one that is not there"),
        pytest.param(FOUR, "MIG-a2,1", ["MIG-a2", "1"], id="a MIG instance"),
        pytest.param(FOUR, "MIG-GPU-aa11/1/0", ["MIG-GPU-aa11/1/0"], id="a MIG instance's older name"),
    ],
)
def test_stages_spread_over_what_is_visible_under_the_name_it_has(start: Start, gpus, visible, expected):
    for name in expected:
        assert seen(start(gpus, visible)) == name
    assert "waits for a GPU" in seen(start(gpus, visible))


def test_a_gpu_is_the_same_under_all_its_names(start: Start):
    assert seen(start(FOUR, "1")) == "1"
    for name in ("GPU-bb22", "GPU-b", "1"):
        assert "waits for a GPU" in seen(start(FOUR, name))
    assert seen(start(FOUR)) == "GPU-aa11"


@pytest.mark.parametrize(
    ("gpus", "visible", "expected"),
    [
        pytest.param(None, None, "0", id="no driver"),
        pytest.param(None, "1", "1", id="no driver, but a cluster's word"),
        pytest.param(FOUR, "", "", id="GPUs hidden"),
        pytest.param(FOUR, "-1", "-1", id="GPUs hidden, another way"),
    ],
)
def test_without_a_gpu_nothing_waits(start: Start, gpus, visible, expected):
    assert [seen(start(gpus, visible)) for _ in range(2)] == [expected, expected]


def test_a_stage_that_computes_on_no_gpu_takes_none(start: Start):
    one = FOUR[:1]
    assert [seen(start(one, count=0)) for _ in range(2)] == ["0", "0"]
    assert seen(start(one)) == "GPU-aa11"


def test_two_stages_of_two_gpus_do_not_wait_for_each_other(start: Start):
    three = FOUR[:3]
    one = start(three)
    assert seen(one) == "GPU-aa11"
    two = start(three, count=2)
    assert seen(two) == "GPU-bb22,GPU-cc33"
    waiting = [start(three, count=2) for _ in range(2)]
    assert all("waits for 2 GPUs" in seen(stage) for stage in waiting)
    end(one)
    end(two)
    first = next_to_speak(waiting)
    assert len(set(seen(first).split(","))) == 2  # which two: a stage that ends frees one after the other
    end(first)
    waiting.remove(first)
    assert len(set(seen(waiting[0]).split(","))) == 2


def test_more_gpus_than_there_are_is_one_sentence(start: Start):
    stage = start(FOUR[:1], count=2)
    _, err = stage.communicate()
    assert stage.returncode == 1
    assert "train, count 2, run 0: failed: 2 GPUs are needed, and 1 can be seen: GPU-aa11. Log: " in err


def test_a_variant_needs_a_gpu_unless_params_say_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tiny = params.complete_text("tiny")
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(tiny)
    assert params.gpus_needed(variant="qlora_nf4_dq", seed=1) == 1
    Path("params.yaml").write_text(tiny.replace("device: auto", "device: cpu"))
    assert params.gpus_needed(variant="qlora_nf4_dq") == 0
    with pytest.raises(UserError, match="qlora is not a variant of this experiment"):
        params.gpus_needed(variant="qlora")


MEASURING = {f"benchmark@{OTHER}", f"benchmark_grid@{OTHER}-own"}
LEARNING = {f"evaluate_base@{OTHER}", f"train@{OTHER}-1"}


@contextmanager
def snakemake(
    finished: Repository, folder: Path, gpus: int, stages: set[str]
) -> Iterator[tuple[Repository, subprocess.Popen]]:
    """Run stages that compute, and hang, and one that does not, on four cores and so many GPUs."""
    repository = finished.copy(folder)
    shutil.rmtree(repository.root / ".snakemake")  # where `is_done` looks
    repository.edit_params(add_variant)
    repository.append("workflow/stages/fetch_tasks.py", "# changed")
    for stage in stages:
        (repository.control / f"hang {stage}").touch()
    command = [
        str(snakemake_command()),
        "--cores",
        "4",
        *stages,
        "fetch_tasks",
        "--resources",
        f"gpu={gpus}",
    ]
    with subprocess.Popen(command, cwd=repository.root, env=repository.environment()) as process:
        try:
            yield repository, process
        finally:
            for stage in stages:
                (repository.control / f"hang {stage}").unlink(missing_ok=True)


def started(repository: Repository, stages: set[str]) -> set[str]:
    log = repository.control / "ran"
    return stages & set(log.read_text().split()) if log.exists() else set()


def is_done(repository: Repository, stage: str) -> bool:
    return (repository.root / ".snakemake" / "dvc" / stage).exists()


def run_one_after_the_other(repository: Repository, stages: set[str]) -> None:
    """Let the first of two stages end, and wait for the second."""
    wait_until(lambda: started(repository, stages) and is_done(repository, "fetch_tasks"))
    [first] = started(repository, stages)
    (repository.control / f"hang {first}").unlink()
    wait_until(lambda: started(repository, stages) == stages)
    assert is_done(repository, first)


@pytest.mark.parametrize(
    ("gpus", "stages"),
    [(1, LEARNING), (1, MEASURING), (2, MEASURING), (3, {f"train@{OTHER}-1", f"benchmark@{OTHER}"})],
    ids=["one GPU", "one GPU, measuring", "measuring", "measuring and learning"],
)
def test_stages_that_compute_wait_for_each_other_and_no_others(
    finished: Repository, tmp_path: Path, gpus: int, stages: set[str]
):
    """There is no GPU here, so that on more than one, stages that measure still have the processor alone."""
    with snakemake(finished, tmp_path / "copy", gpus, stages) as (repository, process):
        run_one_after_the_other(repository, stages)
    assert process.returncode == 0


def test_two_gpus_let_two_stages_compute_at_once(finished: Repository, tmp_path: Path):
    with snakemake(finished, tmp_path / "copy", 2, LEARNING) as (repository, process):
        wait_until(lambda: started(repository, LEARNING) == LEARNING)
        assert not any(is_done(repository, stage) for stage in LEARNING)
    assert process.returncode == 0
