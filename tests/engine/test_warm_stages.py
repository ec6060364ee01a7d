"""An engine's process that stages fork from: when it starts, who can reach it, and that nothing outlives the engine."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from conftest import ROOT
from engine_fixture import add_seed, snakemake_command

from workflow.runtime import warm

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="stages fork on Linux alone")

IS_WARM = "print('torch' in sys.modules, flush=True)"
WAITS = "import time; place = os.environ['WORKFLOW_WARM']\nwhile not os.path.exists(place): time.sleep(0.05)\nprint(place, flush=True)"
HANGS = """
import time
from workflow.runtime import lifetime
lifetime.end_with_engines()
print(os.getpid(), flush=True)
time.sleep(600)
"""
# DVC, with stages that run the code they are given.
ENGINE = """
import subprocess, sys
from dvc.stage import run as runner
from workflow.engine import warm_stages
runner.cmd_run = lambda code, dry: subprocess.run(["workflow/run", "train", code], check=True)
with warm_stages.applied(to_log=True):
    for code in sys.argv[2:]:
        runner.cmd_run(code, dry=False)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A repository of which one stage runs the code that it is given."""
    folder = tmp_path_factory.mktemp("repository")
    shutil.copytree(ROOT / "workflow", folder / "workflow", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / ".venv").symlink_to(Path(sys.executable).parents[1])
    (folder / "workflow/stages/train.py").write_text(
        "import os, sys\nif __name__ == '__main__':\n    exec(sys.argv[1])\n"
    )
    return folder


@contextmanager
def engine(folder: Path, *codes: str) -> Iterator[subprocess.Popen]:
    """An engine that runs some stages one after another."""
    variables = {name: value for name, value in os.environ.items() if name != warm.VARIABLE}
    with subprocess.Popen(
        [sys.executable, "-c", ENGINE, "dvc", *codes],
        cwd=folder, env=variables, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    ) as process:  # fmt: skip
        yield process
        process.kill()


def test_the_second_stage_starts_the_process_and_the_end_of_the_run_ends_it(folder):
    """The first, which may be the only one, would share its cores with what it never needs."""
    first = f"{IS_WARM}; print(os.environ.get('WORKFLOW_WARM'), flush=True)"
    with engine(folder, first, WAITS, f"{IS_WARM}; input()") as run:
        assert run.stdout.readline() == "False\n" and run.stdout.readline() == "None\n"
        socket = Path(run.stdout.readline().strip())
        assert run.stdout.readline() == "True\n"
        assert socket.parent.stat().st_mode & 0o777 == 0o700 and socket.is_socket()
        family = psutil.Process(run.pid).children(recursive=True)
        run.communicate(timeout=30)
        assert not socket.parent.exists()
        assert psutil.wait_procs(family, timeout=10)[1] == []


def test_nothing_outlives_an_engine_that_is_killed(folder):
    with engine(folder, "pass", WAITS, HANGS) as run:
        run.stdout.readline()
        stage = psutil.Process(int(run.stdout.readline()))
        family = [stage, *stage.parents()[:1], *psutil.Process(run.pid).children(recursive=True)]
        assert len(family) >= 4  # the fork, what waits for it, what asked for it, and what it was forked from
        run.send_signal(signal.SIGKILL)
        assert psutil.wait_procs(family, timeout=20)[1] == []


def test_a_run_that_is_told_to_stay_cold_does(folder):
    code = "print(repr(os.environ['WORKFLOW_WARM']), flush=True)"
    done = subprocess.run(
        [sys.executable, "-c", ENGINE, "dvc", code, code, code],
        cwd=folder, env=os.environ | {warm.VARIABLE: ""}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "''\n" * 3


def test_snakemakes_jobs_find_the_process_unless_there_is_one_alone(repository):
    report, addresses = "report", repository.control / "addresses"
    (repository.control / f"after {report}").write_text(f'echo "${warm.VARIABLE}" >> {addresses}\n')
    snakemake = ["env", "-u", warm.VARIABLE, str(snakemake_command()), "--cores", "2", report]
    repository.edit_params(lambda params: params["report"].update(title="Another"))
    repository.run(*snakemake)
    assert repository.ran() == [report]
    repository.edit_params(add_seed)
    repository.run(*snakemake)
    alone, with_others = addresses.read_text().splitlines()
    assert alone == "" and with_others and not Path(with_others).parent.exists()
