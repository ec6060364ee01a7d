"""A `python` whose stages begin at once, for this repository and for clones: they fork from a process with all libraries.

A clone's `workflow/run` finds the `python` of this `.venv` and starts a stage with it, as ever. That `python` asks the
one process for a fork, gives it its folder, variables, arguments and streams, and ends as the fork ends. The fork imports
the `workflow` of its folder. So do the processes that measure the points of a grid or save a served model; `lm_eval` is a
fork too. Every other program gets a fresh interpreter.
"""

import importlib
import json
import os
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
NETWORK = ("workflow.stages.fetch_model", "workflow.stages.fetch_dataset", "workflow.stages.fetch_tasks")
# What stages import, and with it all libraries that they need.
IMPORTED = ("workflow.training.train", "workflow.evaluation.score", "workflow.cost.trial", "workflow.cost.benchmark",
            "workflow.data.sample", "workflow.comparison.compare", "workflow.report.page", "workflow.report.cards",
            "workflow.report.summary", "workflow.engine.dvc_repository", "datasets", "datasketch", "gguf", "rouge_score.rouge_scorer",
            "sacrebleu", "pyarrow.parquet", "lm_eval.evaluator", "torch.utils.data",
            "transformers.models.llama.modeling_llama", "transformers.models.auto.tokenization_auto")  # fmt: skip


class WarmPython:
    """The process that stages fork from; it ends with this one."""

    def __init__(self):
        self.folder = tempfile.TemporaryDirectory(prefix="warm")  # a socket's path is at most 107 bytes long
        self.address = Path(self.folder.name) / "socket"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self.address))
        listener.listen(64)
        self.process = subprocess.Popen(
            [sys.executable, __file__, "serve", str(listener.fileno())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[listener.fileno()],
            # Threads that wait actively starve each other; a fork cannot choose this any more.
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"},
        )
        listener.close()
        folder = Path(self.folder.name)
        self.python, self.lm_eval = (folder / name for name in ("python", "lm_eval"))
        self._write_python(self.python)
        self._write(self.lm_eval, f'exec {self._asking()} {shlex.quote(sys.executable)} -m lm_eval "$@"')

    def enter(self, clone: Path) -> None:
        """Give a clone a `.venv` with the programs of this environment, and this `python`."""
        programs = clone / ".venv" / "bin"
        programs.mkdir(parents=True)
        for program in BIN.iterdir():
            if program.name != "python":
                (programs / program.name).symlink_to(program)
        self._write_python(programs / "python")

    def _write_python(self, path: Path) -> None:
        """Write a `python` that forks the programs that load libraries, and runs all else itself."""
        self._write(
            path,
            'case "$1:$2" in\n'
            "-m:workflow.stages.environment) ;;\n"  # it is done before a fork would be
            f'-m:workflow.stages.*|-m:workflow.cost.grid|-m:workflow.cost.repeated|-m:workflow.save_served) exec {self._asking()} "$0" "$@" ;;\n'
            "esac\n"
            f'exec {shlex.quote(sys.executable)} "$@"',
        )

    def _asking(self) -> str:
        return shlex.join([sys.executable, "-IS", __file__, "ask", str(self.address)])

    @staticmethod
    def _write(program: Path, script: str) -> None:
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.folder.cleanup()


def ask(address: str, program: str, arguments: list[str]) -> None:
    """Be the process that was started as `program`: hand all to a fork, and end as it ends."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    request = {
        "process": os.getpid(),
        "program": program,
        "arguments": arguments,
        "folder": os.getcwd(),
        "variables": dict(os.environ),
    }
    socket.send_fds(connection, [b"x"], [0, 1, 2])
    stream = connection.makefile("rw", encoding="utf-8")
    stream.write(json.dumps(request) + "\n")
    stream.flush()
    stage = int(stream.readline())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: os.kill(stage, number))
    code = int(stream.readline())
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


def serve(listener: socket.socket) -> None:
    """Fork for each that asks, until the stream from the tests ends."""
    from slow_libraries import compute_now

    for name in IMPORTED:
        __import__(name)
    compute_now()
    for name in [name for name in sys.modules if name.partition(".")[0] == "workflow"]:
        del sys.modules[name]  # a clone has its own
    sys.path.remove(str(ROOT))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the keepers
    while True:
        ready, _, _ = select.select([listener, 0], [], [])
        if 0 in ready:
            return
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os._exit(keep(connection))
        connection.close()


def keep(connection: socket.socket) -> int:
    """Fork a stage, and say how it ended; kill it if the process that asked for it is gone."""
    _, descriptors, _, _ = socket.recv_fds(connection, 1, 3)
    stream = connection.makefile("rw", encoding="utf-8")
    request = json.loads(stream.readline())
    stage = os.fork()
    if stage == 0:
        connection.detach()
        be_stage(request, descriptors)
    for descriptor in descriptors:
        os.close(descriptor)
    stream.write(f"{stage}\n")
    stream.flush()
    ended = os.pidfd_open(stage)
    ready, _, _ = select.select([ended, connection], [], [])
    if ended not in ready:
        os.kill(stage, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(stage, 0)[1])
    stream.write(f"{code}\n")
    stream.flush()
    return 0


def read_the_hubs_variables() -> None:
    """Let the hub's libraries read its address and their folders, as they do when they are imported."""
    from datasets import config
    from huggingface_hub import constants, hf_api

    for module in (constants, config):
        with suppress(ValueError):  # the stage refuses such a value
            importlib.reload(module)
    hf_api.api.endpoint = constants.ENDPOINT


def be_stage(request: dict, descriptors: list[int]) -> None:
    """Be `python -m MODULE ARGUMENTS`, in the folder and with the variables and streams of the one that asked."""
    import psutil

    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["variables"])
    if threads := os.environ.get("OMP_NUM_THREADS"):  # as a fresh process reads it
        import torch

        torch.set_num_threads(int(threads))
    # A process that computes with others ends when the one that started it is gone.
    os.getppid = lambda: psutil.Process(request["process"]).ppid()
    _, module, *arguments = request["arguments"]
    sys.argv = [module, *arguments]
    sys.executable = request["program"]
    places = os.environ.get("PYTHONPATH")
    sys.path[:0] = [os.getcwd(), *(places.split(os.pathsep) if places else [])]
    if module in NETWORK:
        read_the_hubs_variables()
    sys.modules.pop("sitecustomize", None)
    with suppress(ImportError):
        import sitecustomize  # noqa: F401
    os._exit(exit_code_of(module, alter_sys=True))


def exit_code_of(module: str, *, alter_sys: bool) -> int:
    """Run a module as a program, say what an interpreter would say of its end, and return its exit code."""
    import runpy
    import traceback

    try:
        runpy.run_module(module, run_name="__main__", alter_sys=alter_sys)
        code = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    if sys.argv[1] == "ask":
        ask(sys.argv[2], sys.argv[3], sys.argv[4:])
    else:
        serve(socket.socket(fileno=int(sys.argv[2])))
