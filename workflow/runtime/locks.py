"""Locks between processes. They end with the process that holds them, even if it is killed."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from workflow.runtime.paths import LOCKS

PATIENCE = 0.5  # seconds between two attempts


def file_lock(path: Path) -> BaseFileLock:
    """Return a lock that the kernel holds, and never one that rests on whether a file exists."""
    return FileLock(path, fallback_to_soft=False)


def try_lock(path: Path) -> BaseFileLock | None:
    """Lock a file; return None if another process holds it."""
    lock = file_lock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    return lock


@contextmanager
def exclusive(name: str, *, say: Callable[[str], None], work: str = "this stage") -> Iterator[None]:
    """Hold the lock of a stage while the block runs; first wait until no other process of this repository has it.

    A killed engine leaves its stage behind, which ends a little later: the next run of that stage must not write
    at the same time.

    Args:
        name: the stage's, or that of other work that one process does at a time.
        say: called with a line if it has to wait.
        work: what the other process runs, for that line.
    """
    LOCKS.mkdir(parents=True, exist_ok=True)
    path = LOCKS / name
    lock = try_lock(path)
    if lock is None:
        say(f"waits for process {path.read_text() or 'unknown'}, which is running {work}")
        lock = file_lock(path)
        lock.acquire(poll_interval=PATIENCE)
    try:
        path.write_text(str(os.getpid()))
        yield
    finally:
        lock.release()
