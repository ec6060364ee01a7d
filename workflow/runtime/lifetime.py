"""How long a stage lives: until a SIGTERM, and no longer than the engine that started it."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

# Seconds between two looks at the engine.
PATIENCE = 0.5
# What starts stages, as the first words of its command line name it.
ENGINES = {"dvc", "snakemake", "workflow.pipeline"}


class Terminated(BaseException):
    """A SIGTERM asked this process to end. Like a KeyboardInterrupt, it is no error that code should survive."""

    def __str__(self) -> str:
        return ": ".join(["ended by SIGTERM", *map(str, self.args)])


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
