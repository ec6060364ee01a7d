"""How long a stage lives: one process at a time, no longer than the engine that started it, until a SIGTERM."""

import fcntl
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO

LOCKS = Path(".cache") / "running"
# Seconds between two looks at a lock, and at the engine.
PATIENCE = 0.5
# What starts stages, as the first words of its command line name it.
ENGINES = {"dvc", "snakemake", "workflow.engine.pipeline"}


class Terminated(BaseException):
    """A SIGTERM asked this process to end. Like a KeyboardInterrupt, it is no error that code should survive."""

    def __str__(self) -> str:
        return ": ".join(["ended by SIGTERM", *map(str, self.args)])


@contextmanager
def alone(name: str, *, say: Callable[[str], None], work: str = "this stage") -> Iterator[None]:
    """Hold the lock of a stage while the block runs; wait until no other process of this repository has it.

    An engine that was killed leaves its stage behind, which ends a little later: the next run of that stage must
    not write beside it. The kernel frees the lock of a process that dies, however it dies.

    Args:
        name: the stage's, or that of other work which one process does at a time.
        say: called with a line when it has to wait.
        work: what the other process runs, for that line.
    """
    LOCKS.mkdir(parents=True, exist_ok=True)
    # Opened to append: another process' id in it is not to be lost.
    with (LOCKS / name).open("a+") as file:
        waited = False
        while not locked(file):
            if not waited:
                file.seek(0)
                say(f"waits for process {file.read() or 'unknown'}, which is running {work}")
            waited = True
            time.sleep(PATIENCE)
        file.truncate(0)
        print(os.getpid(), end="", file=file, flush=True)
        yield


def locked(file: IO[str], how: int = fcntl.LOCK_EX) -> bool:
    """Lock an open file, alone or (LOCK_SH) together with others, if that can be done at once; whether it could."""
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def ends_on_sigterm() -> Iterator[None]:
    """Within the block a SIGTERM, which clusters send before they kill, raises `Terminated`: files are left whole."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise Terminated

    with _handled_by(leave):
        yield


@contextmanager
def sigterm_noted() -> Iterator[Callable[[], bool]]:
    """Within the block a SIGTERM is only noted; yields what says whether there was one."""
    came = threading.Event()
    with _handled_by(lambda number, frame: came.set()):
        yield came.is_set


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def end_with_engines() -> None:
    """Send this process a SIGTERM when DVC or Snakemake, if one of them started it, is gone.

    Killed by SIGKILL, they cannot end what they started, and nobody would wait for its results.
    """
    import psutil  # not needed to import the graph

    engines = [process for process in psutil.Process().parents() if is_engine(process)]

    def watch() -> None:
        while all(map(_lives, engines)):
            time.sleep(PATIENCE)
        os.kill(os.getpid(), signal.SIGTERM)

    if engines:
        threading.Thread(target=watch, daemon=True).start()


def is_engine(process) -> bool:
    """Whether a process of psutil's is DVC's or Snakemake's, as far as this user may see."""
    import psutil

    try:
        command = process.cmdline()
    except psutil.Error:
        return False
    return any(Path(word).name in ENGINES for word in command[:4])


def _lives(process) -> bool:
    import psutil

    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
