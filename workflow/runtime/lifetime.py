"""How long a stage lives: until a SIGTERM, and no longer than the engine that started it."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

PATIENCE = 0.5  # seconds between two checks of another process
# Programs that start stages, as the first words of their command line name them.
ENGINES = {"dvc", "snakemake", "workflow.pipeline"}


class Terminated(BaseException):
    """A SIGTERM asked this process to end. Like KeyboardInterrupt, it is not an Exception that code may swallow."""

    def __str__(self) -> str:
        return ": ".join(["ended by SIGTERM", *map(str, self.args)])


@contextmanager
def ends_on_sigterm() -> Iterator[None]:
    """Let a SIGTERM in the block, which clusters send before they kill, raise `Terminated`, so that files stay whole."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise Terminated

    with _handled_by(leave):
        yield


@contextmanager
def sigterm_noted() -> Iterator[Callable[[], bool]]:
    """Only note a SIGTERM in the block; yields a function that returns whether there was one."""
    received = threading.Event()
    with _handled_by(lambda number, frame: received.set()):
        yield received.is_set


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def end_with_engines() -> None:
    """Send this process a SIGTERM when the DVC or Snakemake that started it is gone.

    If they are killed by SIGKILL, they cannot end what they started, and nobody would wait for its results.
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
    """Return whether a `psutil.Process` is DVC or Snakemake, as far as this user may see."""
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
