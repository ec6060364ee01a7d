"""How busy a machine was while something was measured on it, and how much of that was the work of others."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil


@dataclass
class Load:
    """The load of this process' cores over a stretch of time.

    Attributes:
        cores: that this process may use.
        load_average_before, load_average_after: of the whole system, over the minute before; None where there is none.
        cores_of_others: that other processes kept busy of `cores`, on average over the time.
        seconds: the time.
    """

    cores: int
    load_average_before: float | None = None
    load_average_after: float | None = None
    cores_of_others: float = 0.0
    seconds: float = 0.0


@contextmanager
def measured() -> Iterator[Load]:
    """Measure the load of a block, of which the yielded object knows when the block has ended.

    Busy time is what the system counts for the cores without idling and waiting for a disk, and the share of others is
    the rest of it beside this process' own and its children's. Where a core is divided among virtual machines, the time
    that it was taken away (`steal`) is the others'.
    """
    cores = _cores()
    load = Load(len(cores), load_average_before=_load_average())
    started, busy, own = time.monotonic(), _busy_seconds(cores), _own_seconds()
    try:
        yield load
    finally:
        load.seconds = time.monotonic() - started
        others = (_busy_seconds(cores) - busy) - (_own_seconds() - own)
        load.cores_of_others = round(min(max(others / load.seconds, 0.0), len(cores)), 3)
        load.load_average_after = _load_average()


def _cores() -> list[int]:
    """The numbers of the cores that this process may use; all of them where the system does not say."""
    process = psutil.Process()
    every = list(range(psutil.cpu_count() or 1))
    return process.cpu_affinity() if hasattr(process, "cpu_affinity") else every


def _load_average() -> float | None:
    try:
        return round(os.getloadavg()[0], 2)
    except OSError:
        return None


def _busy_seconds(cores: list[int]) -> float:
    times = psutil.cpu_times(percpu=True)
    return sum(_busy(times[core]) for core in cores if core < len(times))


def _busy(times: Any) -> float:
    """The busy seconds of a core; a guest's are within those of the user already."""
    return sum(getattr(times, kind, 0.0) for kind in ("user", "nice", "system", "irq", "softirq", "steal"))


def _own_seconds() -> float:
    """The seconds of this process and of those that it started, living and ended."""
    process = psutil.Process()
    own = process.cpu_times()
    seconds = own.user + own.system + own.children_user + own.children_system
    for child in process.children(recursive=True):
        try:
            times = child.cpu_times()
        except psutil.Error:  # it has ended by now
            continue
        seconds += times.user + times.system
    return seconds
