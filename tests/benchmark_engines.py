"""What the engines cost when nothing has changed: `make benchmark-engines`. Stages are stubs.

Seconds of wall clock, and of processor time, which a busy machine moves less.
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from engine_fixture import create_repository, snakemake_command

TIMES = 7
COMMANDS = {
    "dvc repro": ([sys.executable, "-m", "dvc", "repro"], 3.0),
    "dvc status": ([sys.executable, "-m", "dvc", "status"], 3.0),
    "snakemake -n report": ([str(snakemake_command()), "-n", "report"], 4.0),
}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        repository = create_repository(
            Path(folder), variants=["lora_16bit", "qlora_nf4_dq", "qlora_nf4"], seeds=[1]
        )
        repository.dvc("repro")
        print(f"{len(repository.ran())} stages, nothing changed, {TIMES} times")
        for name, (command, goal) in COMMANDS.items():
            seconds, processor = [], []
            for _ in range(TIMES):
                started, before = time.monotonic(), os.times()
                repository.run(*command)
                seconds.append(time.monotonic() - started)
                after = os.times()
                processor.append(
                    after.children_user
                    + after.children_system
                    - before.children_user
                    - before.children_system
                )
            print(
                f"{name:<20} median {statistics.median(seconds):.2f} s, {min(seconds):.2f} to {max(seconds):.2f} "
                f"(goal {goal:.0f} s); processor {statistics.median(processor):.2f} s"
            )
        assert repository.ran() == []


if __name__ == "__main__":
    main()
