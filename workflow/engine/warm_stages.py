"""Let the stages that DVC runs fork from one process that has imported the libraries (workflow/runtime/warm.py).

Written against DVC 3.67; another version may need another patch. In the block, `stage.run.cmd_run` starts that process with
the first command, so that a run with nothing to do starts none.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from dvc.stage import Stage
from dvc.stage import run as runner

from workflow.engine.dvc_patch_state import replaced
from workflow.runtime.paths import CODE
from workflow.runtime.warm import VARIABLE


@contextmanager
def applied() -> Iterator[None]:
    """Keep a process in the block that stages fork from; on Linux, and unless the variable WORKFLOW_WARM is set."""
    with ExitStack() as stack:
        if VARIABLE not in os.environ and sys.platform == "linux":
            stack.enter_context(replaced(runner, "cmd_run", _start_and_run(runner.cmd_run, stack)))
        yield


def _start_and_run(cmd_run: Any, stack: ExitStack) -> Any:
    """Return a function that starts the process, once, and runs a stage's command."""

    def start_and_run(stage: Stage, dry: bool = False, **options: Any) -> None:
        if not dry and VARIABLE not in os.environ:
            stack.enter_context(_process())
        cmd_run(stage, dry=dry, **options)

    return start_and_run


@contextmanager
def _process() -> Iterator[None]:
    """Run the process while the block runs; stages that start before it is ready, or after it died, start cold."""
    with tempfile.TemporaryDirectory(prefix="warm") as folder:  # a socket's path is at most 107 bytes long
        os.environ[VARIABLE] = str(Path(folder) / "socket")
        process = subprocess.Popen(
            [CODE / "run", "--warm", str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the stages
        )
        try:
            yield
        finally:
            del os.environ[VARIABLE]
            process.kill()
            process.wait()
