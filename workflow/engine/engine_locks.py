"""Locks that keep the engines of a workspace, DVC and Snakemake, out of each other's way."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import ReadWriteLock, Timeout

from workflow.runtime.locks import exclusive
from workflow.runtime.stage import say

SNAKEMAKE = Path(".snakemake")


@contextmanager
def only_engine() -> Iterator[None]:
    """Be the only engine that runs the pipeline here while the block runs; wait for another, and say so."""
    with exclusive("pipeline", say=say, work="the pipeline here"):
        yield


@contextmanager
def snakemake_running() -> Iterator[None]:
    """Mark the workspace as one in which a Snakemake works, and remove the locks that a killed one left.

    Snakemake's own locks outlive a killed process and have to be removed by hand. This one ends with its process: if
    nobody holds it, no Snakemake is alive, and its locks can go.
    """
    lock = _read_write_lock("running")
    try:
        with lock.write_lock(blocking=False):
            shutil.rmtree(SNAKEMAKE / "locks", ignore_errors=True)
    except Timeout:
        pass
    with lock.read_lock():
        yield


def wait_for_jobs() -> None:
    """Wait until no job of an earlier, killed Snakemake runs here: a stage ends a little after its engine."""
    lock = job_lock()
    try:
        lock.acquire_write(blocking=False)
    except Timeout:
        say("waits for the jobs of a Snakemake that was killed")
        lock.acquire_write()
    lock.release()


def job_lock() -> ReadWriteLock:
    """Return the lock that every job holds for reading, so that `wait_for_jobs` gets it for writing after the last."""
    return _read_write_lock("jobs")


def _read_write_lock(name: str) -> ReadWriteLock:
    SNAKEMAKE.mkdir(exist_ok=True)
    path = SNAKEMAKE / f"{name}.lock"
    path.touch()  # with the mode of the umask: the library would let only this user open it
    return ReadWriteLock(path)
