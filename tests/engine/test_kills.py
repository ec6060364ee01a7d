"""The real pipeline, killed at any moment and run again, ends with the results of one that nobody disturbed.

KILLS says how often each engine is killed (`make kills`: 20); SEED, what draws the moments.
"""

import csv
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import psutil
import pytest
from engine_fixture import ENGINES, wait_until
from real_pipeline import TINY, clone, environment, run
from ruamel.yaml import YAML

KILLS = int(os.environ.get("KILLS", "2"))
SEED = os.environ.get("SEED", "55")
# What `make report` runs, and what the README says of Snakemake.
COMMANDS = {
    "dvc": "python -m workflow.pipeline report",
    "snakemake": "snakemake --cores 2 report",
}
# Times and memory, which are others in every run, and what is made of them.
MEASURED_FILES = (
    "results/benchmark",
    "results/hardware",
    "results/summary",
    "results/cards",
    "results/compare/summary.csv",
)
MEASURED_KEYS = {"seconds", "tokens_per_second", "cost", "training_speed_tokens_per_s", "peak_memory_GiB"}


def small_grid(content: dict) -> None:
    content["benchmark"]["grid"] |= {"micro_batch_rows": [1], "gradient_checkpointing": [False], "repeats": 1}


@pytest.fixture(scope="module")
def undisturbed(warm_python, tmp_path_factory) -> Path:
    """A clone in which the pipeline ran from end to end; in its copies stages are processes of their own again."""
    folder = clone(tmp_path_factory.mktemp("undisturbed"), TINY, small_grid)
    warm_python.enter(folder)
    run(folder, "dvc", "repro")
    shutil.rmtree(folder / ".venv")
    return folder


def outcome(folder: Path) -> dict[str, Any]:
    """Every result by its path, without what is measured by the clock."""
    found = {}
    for path in sorted((folder / "results").rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file() or name.startswith(MEASURED_FILES):
            continue
        if path.suffix == ".json":
            found[name] = timeless(json.loads(path.read_text()))
        elif path.suffix == ".csv":
            found[name] = timeless(list(csv.DictReader(io.StringIO(path.read_text()))))
        else:
            found[name] = path.read_bytes()
    return found


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: timeless(kept) for key, kept in value.items() if key not in MEASURED_KEYS}
    if isinstance(value, list):
        return [timeless(one) for one in value if not is_measured(one)]
    return value


def is_measured(one: Any) -> bool:
    """Whether this is a claim about memory or time."""
    return isinstance(one, dict) and str(one.get("metric")).startswith("benchmark/")


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def stages(folder: Path) -> list[str]:
    return sorted(YAML(typ="safe").load((folder / "dvc.lock").read_text())["stages"])


def forget(folder: Path, stage: str) -> None:
    """Leave a workspace as it was before a stage: neither its outputs nor any cache knows of it."""
    yaml = YAML()
    lock = yaml.load((folder / "dvc.lock").read_text())
    for out in lock["stages"].pop(stage)["outs"]:
        path = folder / out["path"]
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with (folder / "dvc.lock").open("w") as file:
        yaml.dump(lock, file)
    shutil.rmtree(folder / ".dvc" / "cache" / "runs")


def started(folder: Path, engine: str) -> subprocess.Popen:
    return subprocess.Popen(
        ["bash", "-c", f"exec 2>&1; {COMMANDS[engine]}"],
        cwd=folder,
        env={name: value for name, value in environment(folder).items() if name != "WORKFLOW_WARM"},
        stdout=(folder / "said").open("w"),
        start_new_session=True,
    )


def kill(process: subprocess.Popen, whom: str) -> str:
    """Send SIGKILL to all processes of a run, to its engine alone, or to the stage alone."""
    if whom == "all":
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return whom
    try:
        family = psutil.Process(process.pid).children(recursive=True)
        target = next(
            one for one in family if whom == "engine" or "workflow.stages." in " ".join(one.cmdline())
        )
        said = " ".join(target.cmdline()[:5])
        target.kill()
    except (psutil.Error, StopIteration):
        said = "it was not there"
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return f"{whom}: {said}"


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_that_is_killed_and_run_again_ends_like_one_that_is_not(undisturbed, engine, tmp_path):
    draw = random.Random(f"{SEED} {engine}")
    expected = outcome(undisturbed)
    names = stages(undisturbed)
    draw.shuffle(names)
    for number in range(KILLS):
        stage, whom = names[number % len(names)], ("all", "engine", "stage")[number % 3]
        folder = tmp_path / str(number)
        shutil.copytree(undisturbed, folder, symlinks=True)
        forget(folder, stage)
        killed = started(folder, engine)
        moment = draw.uniform(0.5, seconds_of(undisturbed, stage))
        try:
            killed.wait(timeout=moment)
            who = "it was done before"
        except subprocess.TimeoutExpired:
            who = kill(killed, whom)
        began = time.monotonic()
        again = started(folder, engine)
        assert again.wait(timeout=300) == 0, (stage, moment, who, (folder / "said").read_text()[-3000:])
        print(
            f"{engine}: {stage} killed at {moment:.1f} s ({who}), done again in {time.monotonic() - began:.0f} s"
        )
        assert differences(outcome(folder), expected) == [], (stage, moment, who)
        assert not leftovers(folder), (stage, moment, who)
        assert "up to date" in run(folder, "dvc", "status")
        shutil.rmtree(folder)


PYTHON = """#!/bin/sh
case "$1" in -m) echo "$2" >> "$(dirname "$0")/started" ;; esac
exec {python} "$@"
"""
STAGES = (
    ("train", "--variant", "lora_16bit", "--seed", "1"),
    ("train", "--variant", "qlora_nf4_dq", "--seed", "1"),
    ("evaluate", "--variant", "qlora_nf4_dq", "--seed", "1"),
    ("divergence", "--variant", "qlora_nf4_dq", "--baseline", "lora_16bit", "--seed", "1"),
)


@pytest.mark.skipif(sys.platform != "linux", reason="stages fork on Linux alone")
def test_stages_that_fork_compute_what_stages_that_start_alone_do(undisturbed, tmp_path):
    started, outcomes = {}, {}
    for address in ("", str(tmp_path / "socket")):
        folder = tmp_path / ("forked" if address else "alone")
        shutil.copytree(undisturbed, folder, symlinks=True)
        programs = folder / ".venv/bin"
        programs.mkdir(parents=True)
        (programs / "python").write_text(PYTHON.format(python=sys.executable))
        (programs / "python").chmod(0o755)
        variables = environment(folder) | {"WORKFLOW_WARM": address}
        with process_to_fork_from(folder, variables) if address else nullcontext():
            for stage in STAGES:
                subprocess.run(
                    ["workflow/run", *stage], cwd=folder, env=variables, check=True, stderr=subprocess.DEVNULL
                )
        started[address] = (programs / "started").read_text().split()
        outcomes[address] = outcome(folder)
    alone, forked = started.values()
    assert alone == [f"workflow.stages.{stage[0]}" for stage in STAGES] and forked == [
        "workflow.runtime.warm"
    ]
    assert differences(*outcomes.values()) == [] and len(outcomes[""]) > 30
    assert any(name.endswith("adapter_model.safetensors") for name in outcomes[""])


@contextmanager
def process_to_fork_from(folder: Path, variables: dict[str, str]) -> Iterator[None]:
    with subprocess.Popen(
        ["workflow/run", "--warm", str(os.getpid())],
        cwd=folder,
        env=variables,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        wait_until(lambda: Path(variables["WORKFLOW_WARM"]).exists(), 120)
        yield
        process.kill()


def leftovers(folder: Path) -> list[str]:
    """Files below the results that are none: half of one, or a checkpoint."""
    return [
        str(path)
        for path in (folder / "results").rglob("*")
        if path.name.startswith(".") or path.name == "checkpoints"
    ]


def seconds_of(folder: Path, stage: str) -> int:
    """How long the stage and what follows it take, about: its imports, the engine's start, the comparison, the report."""
    return int(re.search(r"done in (\d+) s", (folder / "logs" / f"{stage}.log").read_text())[1]) + 11


def test_outcomes_that_differ_are_noticed(undisturbed, tmp_path):
    folder = tmp_path / "changed"
    shutil.copytree(undisturbed, folder, symlinks=True)
    assert differences(outcome(folder), outcome(undisturbed)) == [] and len(outcome(folder)) > 30
    weights = next((folder / "results/train").rglob("adapter_model.safetensors"))
    weights.unlink()
    weights.write_bytes(b"others")
    assert differences(outcome(folder), outcome(undisturbed)) == [str(weights.relative_to(folder))]
    (folder / "results/sample/.train.jsonl.partial").touch()
    assert leftovers(folder)
