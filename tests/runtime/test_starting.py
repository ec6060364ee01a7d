"""A signal while a stage is still being loaded ends it in its sentence, with its exit code, and without a traceback."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from conftest import ROOT
from engine_fixture import wait_until

AGAIN = "Run the same command again: what is done is kept."
# Ends the process as a slow import would be ended: the signal comes while the module `slow` is being executed.
SLOW = "import os, signal, time\nos.kill(os.getpid(), signal.{name})\ntime.sleep(0.3)\nprint('imported', flush=True)\n"


def run(tmp_path, code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("number", "reason", "code"),
    [(signal.SIGTERM, "ended by SIGTERM", 143), (signal.SIGINT, "interrupted", 1)],
)
def test_a_signal_while_a_stage_is_imported_ends_it_in_its_sentence(tmp_path, number, reason, code):
    """The interpreter says that it begins to look for the stage's module, as `-v` does, and gets the signal then."""
    stage = subprocess.Popen(
        [sys.executable, "-v", "-m", "workflow.stages.train", "--variant", "lora_16bit", "--seed", "1"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in stage.stderr:
        if "import 'workflow.stages'" in line:
            stage.send_signal(number)
            break
    rest = stage.stderr.read()
    assert stage.wait() == code
    assert f"train, variant lora_16bit, seed 1: failed: {reason}. {AGAIN}" in rest.splitlines()[-1]
    assert "Traceback" not in rest


@pytest.mark.parametrize("delay", [0.0, 0.02, 0.06])
def test_a_signal_before_python_has_begun_ends_the_shell_script_with_its_code_and_leaves_nothing(delay):
    """Neither sh nor an interpreter that starts can say a sentence, so nothing is said before."""
    stage = subprocess.Popen(
        [ROOT / "workflow" / "run", "train", "--variant", "none", "--seed", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    time.sleep(delay)
    stage.terminate()
    said, _ = stage.communicate(timeout=60)
    assert stage.returncode in (-signal.SIGTERM, 143)  # a shell calls both 143
    assert (said == "") == (stage.returncode == -signal.SIGTERM), said
    assert said in ("", f"train, variant none, seed 1: failed: ended by SIGTERM. {AGAIN}\n")
    # The shell's own child, which found the script's folder, may take a moment longer than the shell.
    wait_until(lambda: not any(runs_in(process, stage.pid) for process in psutil.process_iter()), seconds=10)


def runs_in(process: psutil.Process, group: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
        return process.status() != psutil.STATUS_ZOMBIE and os.getpgid(process.pid) == group
    return False


@pytest.mark.parametrize(
    ("name", "reason", "code"), [("SIGTERM", "ended by SIGTERM", 143), ("SIGINT", "interrupted", 1)]
)
def test_a_signal_in_an_import_of_a_stage_waits_until_the_import_is_over(tmp_path, name, reason, code):
    (tmp_path / "slow.py").write_text(SLOW.format(name=name))
    done = run(
        tmp_path,
        "from workflow.runtime.stage import run_stage\n"
        "def stage():\n    import slow\n    import time\n    time.sleep(60)\n"
        "run_stage('stage', stage)",
    )
    assert done.returncode == code, done.stderr
    assert "imported" in done.stdout.splitlines()
    assert done.stderr == f"stage: failed: {reason}. Log: logs/stage.log. {AGAIN}\n"


def test_an_import_that_takes_long_is_ended_and_what_it_raises_is_the_signals(tmp_path):
    (tmp_path / "slow.py").write_text(
        "import os, signal, time\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "try:\n    time.sleep(60)\n"
        "except BaseException:\n    raise ImportError('half of it')\n"
    )
    done = run(
        tmp_path,
        "from workflow.runtime import lifetime\nlifetime.LONGEST_WAIT = 0.2\n"
        "from workflow.runtime.stage import run_stage\n"
        "def stage():\n    import slow\n"
        "run_stage('stage', stage)",
    )
    assert done.returncode == 143, done.stderr
    assert done.stderr == f"stage: failed: ended by SIGTERM. Log: logs/stage.log. {AGAIN}\n"
