"""A `python` whose stages begin at once, for this repository and for clones: they fork from a process with all libraries.

A clone's `workflow/run` finds the `python` of this `.venv` and starts a stage with it, as ever. That `python` asks the
one process for a fork, gives it its folder, variables, arguments and streams, and ends as the fork ends. The fork imports
the `workflow` of its folder. So do the processes that measure the points of a grid or save a served model; `lm_eval` is a
fork too. Every other program gets a fresh interpreter.
"""

import importlib
import os
import shlex
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil

from workflow.runtime import warm

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
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            # Threads that wait actively starve each other; a fork cannot choose this any more.
            env=os.environ
            | {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE", warm.VARIABLE: str(self.address)},
        )
        while not self.address.exists():
            assert self.process.poll() is None, "the process that stages fork from has ended"
            time.sleep(0.1)
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
            f"kill -0 {self.process.pid} || exit 1\n"  # it would ask for ever
            'case "$1:$2" in\n'
            "-m:workflow.stages.environment) ;;\n"  # it is done before a fork would be
            f'-m:workflow.stages.*|-m:workflow.cost.grid|-m:workflow.cost.repeated|-m:workflow.save_served) exec {self._asking()} "$0" "$@" ;;\n'
            "esac\n"
            f'exec {shlex.quote(sys.executable)} "$@"',
        )

    def _asking(self) -> str:
        address = f"{warm.VARIABLE}={self.address}"
        return shlex.join(["env", address, sys.executable, "-IS", warm.__file__])

    @staticmethod
    def _write(program: Path, script: str) -> None:
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.folder.cleanup()


def read_the_hubs_variables() -> None:
    """Let the hub's libraries read its address and their folders, as they do when they are imported."""
    from datasets import config
    from huggingface_hub import constants, hf_api

    for module in (constants, config):
        with suppress(ValueError):  # the stage refuses such a value
            importlib.reload(module)
    hf_api.api.endpoint = constants.ENDPOINT


def prepare(request: dict) -> None:
    """Let the libraries read what variables and folders the one that asked has, in place of those of the tests."""
    if threads := os.environ.get("OMP_NUM_THREADS"):  # as a fresh process reads it
        import torch

        torch.set_num_threads(int(threads))
    # A process that computes with others ends when the one that started it is gone.
    os.getppid = lambda: psutil.Process(warm.caller()).ppid()
    places = os.environ.get("PYTHONPATH")
    sys.path[1:1] = places.split(os.pathsep) if places else []
    if request["command"][2] in NETWORK:
        read_the_hubs_variables()
    sys.modules.pop("sitecustomize", None)
    with suppress(ImportError):
        import sitecustomize  # noqa: F401


def main(parent: int) -> None:
    """Fork for each that asks, as long as the tests run."""
    from slow_libraries import compute_now

    warm.end_with(parent)
    for name in IMPORTED:
        __import__(name)
    compute_now()
    for name in [name for name in sys.modules if name.partition(".")[0] == "workflow"]:
        del sys.modules[name]  # a clone has its own
    sys.path.remove(str(ROOT))
    warm.serve([], lambda request: True, prepare)


if __name__ == "__main__":
    main(int(sys.argv[1]))
