"""How long a stage lives: until a SIGTERM, and no longer than the engine that started it."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from workflow.runtime import warm

PATIENCE = 0.5  # seconds between two checks of another process
PATIENCE_WITH_IMPORTS = 0.1  # seconds until a signal that came in an import is looked at again
LONGEST_WAIT = 4.0  # seconds for an import to end; clusters give about 30 until they kill
IMPORT = "<frozen importlib._bootstrap>"  # the file of Python's own import, as frames name it
Handler = Callable[[int, FrameType | None], None]
# Programs that start stages, as the first words of their command line name them.
ENGINES = {"dvc", "snakemake", "workflow.pipeline"}


class Terminated(BaseException):
    """A SIGTERM asked this process to end. Like KeyboardInterrupt, it is not an Exception that code may swallow."""

    def __str__(self) -> str:
        return ": ".join(["ended by SIGTERM", *map(str, self.args)])


@dataclass
class Signal:
    """What a signal raised.

    Attributes:
        error: None as long as there was no signal.
        in_import: whether a module is left half imported, which Python cannot end in good order.
    """

    error: BaseException | None = None
    in_import: bool = False


@contextmanager
def ends_on_signals() -> Iterator[Signal]:
    """Let a SIGTERM in the block, which clusters send before they kill, raise `Terminated`, so that files stay whole.

    Ctrl-C raises KeyboardInterrupt, as ever. In the middle of an import, which may turn either into another error, they
    wait for some seconds; so the block yields what was raised.
    """
    received = Signal()
    with (
        handled_by(signal.SIGTERM, _raising(Terminated, received)),
        handled_by(signal.SIGINT, _raising(KeyboardInterrupt, received)),
    ):
        yield received


@contextmanager
def sigterm_noted() -> Iterator[Callable[[], bool]]:
    """Only note a SIGTERM in the block; yields a function that returns whether there was one."""
    received = threading.Event()
    with handled_by(signal.SIGTERM, lambda number, frame: received.set()):
        yield received.is_set


@contextmanager
def handled_by(number: int, handler: Handler | signal.Handlers) -> Iterator[None]:
    """Let `handler` take a signal in the block, which must be in the main thread; then the one before takes it again."""
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def _raising(kind: type[BaseException], received: Signal) -> Handler:
    """A handler that raises an exception, and says so in `received`, when nothing is being imported or that takes long."""
    first = 0.0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal first
        first = first or time.monotonic()
        in_import = _imports(frame)
        if in_import and time.monotonic() - first < LONGEST_WAIT:
            later = threading.Timer(PATIENCE_WITH_IMPORTS, os.kill, (os.getpid(), number))
            later.daemon = True
            later.start()
            return
        received.error, received.in_import = kind(), in_import
        raise received.error

    return handle


def _imports(frame: FrameType | None) -> bool:
    """Whether a frame, or one that called it, is Python's import."""
    while frame is not None and frame.f_code.co_filename != IMPORT:
        frame = frame.f_back
    return frame is not None


def end_with_engines() -> None:
    """Send this process a SIGTERM when the DVC or Snakemake that started it is gone.

    If they are killed by SIGKILL, they cannot end what they started, and nobody would wait for its results.
    """
    import psutil  # not needed to import the graph

    engines = [process for process in psutil.Process(warm.caller()).parents() if is_engine(process)]

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
