"""Let the stages that DVC runs fork from one process that has imported the libraries (workflow/runtime/warm.py).

Written against DVC 3.67; another version may need another patch. In the block, `stage.run.cmd_run` starts that process with
the second command: a run of one stage would only share its cores with it. Snakemake's jobs are processes of their own, which
find it by the variable.
"""

import itertools
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
def applied(*, to_log: bool) -> Iterator[None]:
    """Keep a process in the block that the stages which DVC runs fork from.

    Args:
        to_log: whether they write to a log, and not to this process' own streams.
    """
    with ExitStack() as stack:
        run = runner.cmd_run
        commands = itertools.count(1)

        def start_and_run(stage: Stage, dry: bool = False, **options: Any) -> None:
            if not dry and next(commands) == 2:
                stack.enter_context(running(to_log=to_log))
            run(stage, dry=dry, **options)

        stack.enter_context(replaced(runner, "cmd_run", start_and_run))
        yield


@contextmanager
def running(*, to_log: bool) -> Iterator[None]:
    """Run the process while the block runs, on Linux, and unless the variable WORKFLOW_WARM is set.

    Stages that start before it is ready, or after it died, start cold. It ends with the thread that enters the block.

    Args:
        to_log: as for `applied`.
    """
    if VARIABLE in os.environ or sys.platform != "linux":
        yield
        return
    # Only this user can enter the folder. A socket's path is at most 107 bytes long.
    with tempfile.TemporaryDirectory(prefix="warm") as folder:
        os.environ[VARIABLE] = str(Path(folder) / "socket")
        process = subprocess.Popen(
            [CODE / "run", "--warm", str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL if to_log else None,  # libraries ask whether it is a terminal
            start_new_session=True,  # Ctrl-C is for the stages
        )
        try:
            yield
        finally:
            del os.environ[VARIABLE]
            process.kill()
            process.wait()
