"""Run one stage as several processes that compute together, and end all of them when one fails.

`torch.distributed.launcher`, the library behind `torchrun`, starts, watches and ends them.
"""

import logging
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from workflow.runtime.errors import UserError
from workflow.runtime.lifetime import PATIENCE
from workflow.runtime.starting import LAUNCHER, is_launched

if TYPE_CHECKING:  # torch is imported only to launch
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

SECONDS_TO_END = 20  # a training that is asked to end finishes its step and writes a checkpoint


def rank() -> int:
    """Return this process' number among those that `launch` started together; 0 for a single process."""
    return int(os.environ["RANK"]) if is_launched() else 0


def count() -> int:
    """Return how many processes compute together; 1 for a single process."""
    return int(os.environ["WORLD_SIZE"]) if is_launched() else 1


def launch(module: str, arguments: list[str], *, processes: int, label: str) -> None:
    """Run `python -m module arguments` in several processes on this machine, and wait for them.

    The output of the first is printed; of the others, only an error is.

    Args:
        module: the name of a module.
        arguments: of its command line.
        processes: how many.
        label: precedes a process' sentence about a UserError.

    Raises:
        UserError: a process failed; the others have been ended.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _silence_launcher()
    _set_environment(processes)
    with tempfile.TemporaryDirectory() as folder:
        redirects = {rank: Std.ALL if rank else Std.ERR for rank in range(processes)}
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id="stage",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",  # any free port
            local_addr="localhost",  # a machine's own name may not resolve
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder, redirects=redirects),
            signals_to_handle="SIGQUIT",  # the stage handles SIGTERM and SIGINT
            shutdown_timeout=SECONDS_TO_END,
        )
        try:
            elastic_launch(config, sys.executable)("-m", module, *arguments)
        except ChildFailedError as error:
            errors = {rank: _stderr(folder, rank) for rank in error.failures}
            raise UserError(_explanation(error.failures, errors, label, processes)) from None
        sys.stderr.write(_stderr(folder, 0))


def end_with_launcher() -> None:
    """End this process when its launcher is gone: it would wait for the other processes forever."""

    def watch() -> None:
        while os.getppid() == int(os.environ[LAUNCHER]):
            time.sleep(PATIENCE)
        os._exit(1)

    if is_launched():
        threading.Thread(target=watch, daemon=True).start()


def _silence_launcher() -> None:
    """Drop the log of torch's launcher: the stage has its own lines."""
    logger = logging.getLogger("torch.distributed.elastic")
    logger.addHandler(logging.NullHandler())
    logger.propagate = False


def _set_environment(processes: int) -> None:
    """Set what the processes inherit from this one."""
    os.environ[LAUNCHER] = str(os.getpid())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a machine's own name may not resolve


def _explanation(
    failures: dict[int, "ProcessFailure"], errors: dict[int, str], label: str, processes: int
) -> str:
    """Return one sentence about the failed process that knows most about the cause.

    Args:
        failures: of the processes that failed or were ended, by rank, the first to fail first.
        errors: what each of them printed to stderr.
        label: as for `launch`.
        processes: how many there were.
    """
    for text in errors.values():
        last = text.strip().rpartition("\n")[2]
        if last.startswith(f"{label}: "):
            return last.removeprefix(f"{label}: ")
    rank, first = next(iter(failures.items()))
    for other, failure in failures.items():
        # One that dies so late was killed by the launcher, because it did not end when it was asked to.
        is_late = failure.timestamp >= first.timestamp + SECONDS_TO_END
        if failure.exitcode == -signal.SIGKILL and not is_late:
            return (
                f"process {other + 1} of {processes} was killed by SIGKILL (out of memory, if nobody killed it), "
                "and the others were ended."
            )
    sys.stderr.write(errors[rank])
    code = first.exitcode
    ended = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    return f"process {rank + 1} of {processes} {ended}, and the others were ended; its own words stand above."


def _stderr(folder: str, rank: int) -> str:
    (path,) = Path(folder).glob(f"*/attempt_0/{rank}/stderr.log")
    return path.read_text(encoding="utf-8", errors="replace")
