"""Run the pipeline over and over in one folder, and say what grew: memory, files, dvc.lock.

`make long-run RUNS=10 PARAMS=params.yaml` does so in a clone of its own.
"""

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from conftest import ROOT
from real_pipeline import clone, environment

from workflow.params import load

# Where files lie that are no result. DVC keeps each version of a result, and those with times in them are new each time.
AREAS = {
    "results and report": ("results", "report", "dvc.lock", "params.yaml"),
    "logs": ("logs",),
    "downloads and locks": (".cache",),
    "DVC's cache": (".dvc/cache",),
    "DVC's own": (".dvc/tmp",),
    "temporary": ("tmp",),
}


@dataclass(frozen=True)
class Run:
    """What one run left and took.

    Attributes:
        seconds: from start to end.
        peak_gib: the most that one process of it held in memory, GiB.
        files: by area, their number and bytes.
        lock_bytes: of dvc.lock.
    """

    seconds: float
    peak_gib: float
    files: dict[str, tuple[int, int]]
    lock_bytes: int


def run_once(folder: Path) -> Run:
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "workflow.pipeline", "dvc", "repro", "--force"],
        cwd=folder,
        env=environment(folder) | {"TMPDIR": str(folder / "tmp")},
        stdout=(folder / "said").open("w"),
        stderr=subprocess.STDOUT,
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit((folder / "said").read_text()[-3000:])
    return Run(
        seconds=time.monotonic() - started,
        peak_gib=usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30,
        files={area: size_of(folder, paths) for area, paths in AREAS.items()},
        lock_bytes=(folder / "dvc.lock").stat().st_size,
    )


def size_of(folder: Path, paths: tuple[str, ...]) -> tuple[int, int]:
    """The number and the bytes of all files below these paths."""
    files = [
        file
        for path in paths
        for file in ([folder / path] if (folder / path).is_file() else (folder / path).rglob("*"))
        if file.is_file()
    ]
    return len(files), sum(file.stat().st_size for file in files)


def line(number: int, run: Run) -> str:
    areas = ", ".join(
        f"{area} {count} files {size / 2**20:.2f} MiB" for area, (count, size) in run.files.items()
    )
    return f"run {number}: {run.seconds:.0f} s, peak {run.peak_gib:.3f} GiB, dvc.lock {run.lock_bytes} bytes, {areas}"


def main(runs: int, params_file: Path) -> None:
    seeds = load(params_file).experiment.seeds
    with tempfile.TemporaryDirectory() as scratch:
        folder = clone(
            Path(scratch), params_file.read_text(), lambda content: content["experiment"].update(seeds=seeds)
        )
        (folder / "tmp").mkdir()
        for number in range(1, runs + 1):
            print(line(number, run_once(folder)), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), ROOT / sys.argv[2])
