"""Stages as processes of their own, which begin at once: each forks from one that has imported what stages need."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from slow_libraries import compute_now

ROOT = Path(__file__).resolve().parents[1]
IMPORTED = ("workflow.training.train", "workflow.evaluation.score", "workflow.evaluation.harness", "workflow.fetch.sources",
            "pyarrow.parquet", "transformers.modeling_gguf_pytorch_utils", "transformers.models.llama.modeling_llama")  # fmt: skip


@dataclass(frozen=True)
class Ended:
    """How a stage ended: what it printed, and its exit code."""

    code: int
    out: str
    err: str


class WarmStages:
    """Runs stages of this repository's code in any folder, without the seconds that its imports take.

    Args:
        paths: folders that the stages import from as well; a `sitecustomize.py` there runs before all else.
    """

    def __init__(self, *paths: Path):
        # A pipe for the answers alone: what libraries print as they are imported goes to stdout.
        answers, end = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(end)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=[end],
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [*paths, ROOT]))},
        )
        os.close(end)
        self.answers = os.fdopen(answers, encoding="utf-8")

    def run(self, folder: Path, stage: str, *arguments: str, timeout: int = 300) -> Ended:
        """Run `workflow/run STAGE ARGUMENTS` in `folder`."""
        asked = {"folder": str(folder), "stage": stage, "arguments": arguments, "timeout": timeout}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        answer = self.answers.readline()
        assert answer, f"the process that stages fork from ended with {self.process.wait()}"
        return Ended(**json.loads(answer))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.answers.close()


def serve(answers: int) -> None:
    """Fork for each line of stdin, and write to the file descriptor `answers` how the child ended."""
    for name in IMPORTED:
        __import__(name)
    compute_now()
    for line in sys.stdin:
        asked = json.loads(line)
        captured = [os.memfd_create(name) for name in ("out", "err")]
        child = os.fork()
        if child == 0:
            os._exit(_run(asked, captured))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = []
        for stream in captured:
            os.lseek(stream, 0, os.SEEK_SET)
            with os.fdopen(stream, "rb") as file:
                texts.append(file.read().decode(errors="replace"))
        answer = json.dumps({"code": code, "out": texts[0], "err": texts[1]}) + "\n"
        with os.fdopen(os.dup(answers), "w", encoding="utf-8") as pipe:
            pipe.write(answer)


def _run(asked: dict, captured: list[int]) -> int:
    """Be the stage; return its exit code."""
    import signal

    signal.alarm(asked["timeout"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream, file in zip((1, 2), captured, strict=True):
        os.dup2(file, stream)
    os.chdir(asked["folder"])
    sys.argv = [asked["stage"], *asked["arguments"]]
    return _exit_code_of(f"workflow.stages.{asked['stage']}")


def _exit_code_of(module: str) -> int:
    """Run a module as a program, say what an interpreter would say of its end, and return its exit code."""
    import runpy
    import traceback

    try:
        runpy.run_module(module, run_name="__main__")
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
    serve(int(sys.argv[1]))
