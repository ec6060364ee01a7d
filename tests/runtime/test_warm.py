"""A stage that forks from the process with the libraries does what it does as a process of its own."""

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pynvml
import pytest
import torch
from conftest import ROOT
from engine_fixture import wait_until

from workflow.runtime import warm

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="stages fork on Linux alone")

STAGE = "import sys\nWORD = 'first'\nif __name__ == '__main__':\n    exec(sys.argv[1])\n"
IS_WARM = "print('torch' in sys.modules)"
STARTER = """
import os, subprocess, sys, time
process = subprocess.Popen(["workflow/run", "--warm", str(os.getpid())], stderr=subprocess.DEVNULL, start_new_session=True)
print(process.pid, flush=True)
time.sleep(600)
"""
TRAINING = """
import hashlib, torch, transformers
torch.manual_seed(1)
config = transformers.LlamaConfig(vocab_size=300, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4)
model = transformers.LlamaForCausalLM(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step in range(5):
    rows = torch.randint(0, 300, (8, 50))
    model(input_ids=rows, labels=rows).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(hashlib.sha256(b"".join(one.detach().numpy().tobytes() for one in model.parameters())).hexdigest())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A repository of which one stage runs the code that it is given."""
    folder = tmp_path_factory.mktemp("repository")
    for name in ("__init__.py", "run", "runtime", "stages/__init__.py"):
        source, target = ROOT / "workflow" / name, folder / "workflow" / name
        target.parent.mkdir(exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    (folder / ".venv").symlink_to(Path(sys.executable).parents[1])
    (folder / "workflow/stages/train.py").write_text(STAGE)
    return folder


def variables(address: Path) -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return ours | {warm.VARIABLE: str(address), "OMP_WAIT_POLICY": "PASSIVE"}


def start(folder: Path, address: Path) -> tuple[subprocess.Popen, psutil.Process]:
    """A process that starts the warm one, and that."""
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER], cwd=folder, env=variables(address), stdout=subprocess.PIPE, text=True
    )
    process = psutil.Process(int(starter.stdout.readline()))
    wait_until(lambda: address.exists() or not process.is_running())
    assert address.exists()
    return starter, process


@pytest.fixture(scope="module")
def address(folder, tmp_path_factory) -> Iterator[Path]:
    address = tmp_path_factory.mktemp("warm") / "socket"
    starter, _ = start(folder, address)
    yield address
    starter.kill()
    starter.wait()


def run(folder: Path, address: Path | str, code: str, given: str = "", **changed: str):
    return subprocess.run(
        [folder / "workflow/run", "train", code],
        env=variables(address) | changed,
        input=given,
        capture_output=True,
        text=True,
    )


def began(folder: Path, address: Path, code: str) -> tuple[subprocess.Popen, psutil.Process]:
    """A stage that has said its process id, and the process of that id."""
    stage = subprocess.Popen(
        [folder / "workflow/run", "train", f"import os; print(os.getpid(), flush=True); {code}"],
        env=variables(address),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    return stage, psutil.Process(int(stage.stdout.readline()))


def test_a_fork_has_the_folder_arguments_variables_and_streams_of_the_one_that_asked(folder, address):
    code = (
        "import json, os\nprint(json.dumps([os.getcwd(), sys.argv[2:], sys.path[0], sys.executable, os.environ['DVC_ROOT'], "
        "sys.orig_argv[1:3], input()]))\nprint('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [folder / "workflow/run", "train", code, "--seed", "1"],
        env=variables(address) | {"DVC_ROOT": "here"},
        input="given\n",
        capture_output=True,
        text=True,
    )
    assert done.stderr == "True\n"
    place, python = str(folder), str(folder / ".venv/bin/python")
    assert json.loads(done.stdout) == [
        place,
        ["--seed", "1"],
        place,
        python,
        "here",
        ["-m", "workflow.stages.train"],
        "given",
    ]


@pytest.mark.parametrize(
    ("code", "ends_with", "says"),
    [
        ("pass", 0, ""),
        ("sys.exit(3)", 3, ""),
        ("sys.exit('a sentence')", 1, "a sentence\n"),
        ("import os; os.kill(os.getpid(), 9)", -9, ""),
        ("import os; os.abort()", -6, None),
        ("import atexit; atexit.register(print, 'at its end', file=sys.stderr)", 0, "at its end\n"),
    ],
)
def test_a_fork_ends_as_the_stage_does(folder, address, code, ends_with, says):
    done = run(folder, address, code)
    assert done.returncode == ends_with
    assert says is None or done.stderr == says


def test_no_thread_and_no_gpu_is_in_use_before_a_fork(folder, address):
    code = (
        "import os, threading, torch\n"
        "print(len(os.listdir('/proc/self/task')), threading.active_count(), torch.cuda.is_initialized(), "
        "torch.cuda._is_in_bad_fork(), os.environ.get('PYTORCH_NVML_BASED_CUDA_CHECK'))"
    )
    assert run(folder, address, code).stdout == "1 1 False False None\n"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OMP_NUM_THREADS", "1"),
        ("OMP_WAIT_POLICY", "ACTIVE"),
        ("PYTORCH_ALLOC_CONF", "max_split_size_mb:64"),
        ("HF_HOME", "/tmp/elsewhere"),
        ("CUDA_VISIBLE_DEVICES", "0"),
        ("TMPDIR", "/var/tmp"),
    ],
)
def test_a_stage_with_another_variable_starts_cold(folder, address, name, value):
    code = f"import os; {IS_WARM}; print(os.environ[{name!r}])"
    assert run(folder, address, code, **{name: value}).stdout == f"False\n{value}\n"


def test_variables_that_engines_set_for_each_job_change_nothing(folder, address):
    set_anew = {"TMPDIR": "/tmp", "TEMPDIR": "/tmp", "DVC_STAGE": "train", "WORKFLOW_LAUNCHES": "1"}
    assert run(folder, address, IS_WARM, **set_anew).stdout == "True\n"


def test_a_stage_has_the_variables_that_its_libraries_set(folder, address):
    code = "import json, os, torch, datasets, transformers; print(json.dumps(dict(os.environ)))"
    cold, forked = (json.loads(run(folder, place, code).stdout) for place in ("", address))
    for variables in (cold, forked):
        for name in [name for name in variables if name.startswith("WORKFLOW_")]:
            del variables[name]
    assert cold.items() <= forked.items()


def test_forks_run_side_by_side_and_draw_other_random_numbers_until_they_set_a_seed(folder, address):
    code = (
        "import random, numpy, torch\n"
        "print(random.random(), numpy.random.random(), torch.rand(1, dtype=torch.float64).item())\n"
        "random.seed(1), numpy.random.seed(1), torch.manual_seed(1)\n"
        "print(random.random(), numpy.random.random(), torch.rand(1, dtype=torch.float64).item(), flush=True)\n"
        "sys.stdin.readline()"
    )
    stages = [
        subprocess.Popen(
            [folder / "workflow/run", "train", code],
            env=variables(address), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for _ in range(3)
    ]  # fmt: skip
    lines = [(stage.stdout.readline(), stage.stdout.readline()) for stage in stages]  # all run by then
    for stage in stages:
        stage.communicate("\n")
    unseeded, seeded = zip(*lines, strict=True)
    numbers = [number for line in unseeded for number in line.split()]
    assert len(set(numbers)) == 9 and len(set(seeded)) == 1
    cold = run(folder, "", code, given="\n").stdout.splitlines(keepends=True)
    assert cold[1] == seeded[0]


def test_a_package_that_was_installed_meanwhile_is_not_missed(folder, address):
    packages = Path(sysconfig.get_path("purelib"))
    before = packages.stat()
    os.utime(packages, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    try:
        assert run(folder, address, IS_WARM).stdout == "False\n"
    finally:
        os.utime(packages, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert run(folder, address, IS_WARM).stdout == "True\n"


@pytest.mark.parametrize(("file", "still_warm"), [("stages/train.py", "True"), ("runtime/stage.py", "False")])
def test_an_edit_between_two_stages_is_not_missed(folder, address, file, still_warm):
    code = f"{IS_WARM}; from workflow.runtime import stage; print(WORD, getattr(stage, 'WORD', None))"
    assert run(folder, address, code).stdout == "True\nfirst None\n"
    path = folder / "workflow" / file
    before = path.read_text()
    path.write_text(before.replace("'first'", "'other'") if "train" in file else f"{before}\nWORD = 'new'\n")
    try:
        words = "other None" if "train" in file else "first new"
        assert run(folder, address, code).stdout == f"{still_warm}\n{words}\n"
    finally:
        path.write_text(before)


def test_a_sigterm_is_the_stages(folder, address):
    code = "import time; from workflow.runtime import lifetime\nwith lifetime.ends_on_signals():\n    print('ready', flush=True)\n"
    stage, _ = began(
        folder,
        address,
        code
        + "    try:\n        time.sleep(60)\n    except lifetime.Terminated as error:\n        sys.exit(str(error))",
    )
    stage.stdout.readline()
    stage.send_signal(signal.SIGTERM)
    assert stage.communicate()[1] == "ended by SIGTERM\n" and stage.returncode == 1


@pytest.mark.parametrize(
    ("number", "code", "reason"),
    [(signal.SIGTERM, 143, "ended by SIGTERM"), (signal.SIGINT, 1, "interrupted")],
)
def test_a_signal_before_the_stage_handles_it_ends_it_in_its_sentence(folder, address, number, code, reason):
    stage, _ = began(folder, address, "import time; time.sleep(60)")
    stage.send_signal(number)
    assert f"failed: {reason}" in stage.communicate()[1] and stage.returncode == code


def test_a_stage_ends_with_a_killed_caller(folder, address):
    stage, process = began(folder, address, "import time; time.sleep(60)")
    assert process.pid != stage.pid
    stage.kill()
    stage.wait()
    process.wait(timeout=10)


def test_a_stage_ends_with_the_process_that_waits_for_it(folder, address):
    stage, process = began(folder, address, "import time; time.sleep(60)")
    process.parent().kill()
    assert stage.wait(timeout=10) == -signal.SIGKILL
    process.wait(timeout=10)


def test_a_stage_ends_when_the_engine_of_its_caller_is_killed(folder, address):
    code = "import time; from workflow.runtime import lifetime; lifetime.end_with_engines(); print('ready', flush=True); time.sleep(60)"
    engine = subprocess.Popen(
        [sys.executable, "-c", "import subprocess, sys; subprocess.run(sys.argv[2:])", "dvc",
         folder / "workflow/run", "train", f"import os; print(os.getpid(), flush=True); {code}"],
        env=variables(address), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    process = psutil.Process(int(engine.stdout.readline()))
    engine.stdout.readline()
    engine.kill()
    process.wait(timeout=10)


def test_the_numbers_of_a_training_are_the_same_to_the_last_bit(folder, address):
    assert run(folder, address, f"{IS_WARM}\n{TRAINING}").stdout.split() == [
        "True",
        cold := run(folder, "", TRAINING).stdout.strip(),
    ]
    assert len(cold) == 64


def test_the_warm_process_may_hang_or_die_and_ends_with_its_starter(folder, tmp_path):
    address = tmp_path / "socket"
    starter, process = start(folder, address)
    process.suspend()
    began = time.monotonic()
    assert run(folder, address, IS_WARM).stdout == "False\n"
    assert time.monotonic() - began < warm.PATIENCE + 10
    process.resume()
    assert run(folder, address, IS_WARM).stdout == "True\n"
    starter.kill()
    process.wait(timeout=10)
    assert run(folder, address, IS_WARM).stdout == "False\n"
    starter.wait()


def test_libraries_ask_the_driver_what_a_gpu_can_do(monkeypatch):
    """bitsandbytes asks so as it is imported; CUDA would begin to answer, and no fork could use a GPU then."""
    asked = []

    def own(device=None):
        asked.append(device)
        return 5, 0

    monkeypatch.setattr(torch.cuda, "get_device_capability", own)
    monkeypatch.setattr(torch.cuda, "_get_nvml_device_index", {0: 3, 1: None}.get)
    for name in ("nvmlInit", "nvmlShutdown"):
        monkeypatch.setattr(pynvml, name, lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", ["a", "b", "c", "d"].__getitem__)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCudaComputeCapability", {"d": [9, 0]}.__getitem__)
    with warm.capabilities_by_the_driver():
        assert torch.cuda.get_device_capability(0) == (9, 0) and not asked
        assert torch.cuda.get_device_capability(1) == (5, 0) and asked == [1]  # the driver has no answer
    assert torch.cuda.get_device_capability is own
