"""Measure in processes of their own, one after the other: what one has loaded or allocated, the next does not have."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

ANSWER = "ANSWER "  # begins the line of a process' output that has its result


class Worker:
    """A process that has imported the libraries and waits for a job; it uses no GPU before it has one.

    It runs a module that calls `answer`.
    """

    def __init__(self, module: str):
        self.process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def ask(self, job: dict, *, time_limit: float | None) -> dict:
        """Give the process its job, and wait for its end.

        Args:
            time_limit: seconds from now, after which the process is killed; None for no limit.

        Returns:
            What it measured, and its seconds as `process_seconds`; or without an answer, `outcome` (timed out, or died)
            and `detail`.
        """
        started = time.monotonic()
        try:
            out, err = self.process.communicate(json.dumps(job), timeout=time_limit)
        except subprocess.TimeoutExpired:
            self.stop()
            return missing("timed out", f"it was ended after {time_limit:g} s")
        except BaseException:  # a signal: the process must not go on measuring
            self.stop()
            raise
        answers = [line for line in out.splitlines() if line.startswith(ANSWER)]
        if not answers:
            return missing("died", _cause_of_death(self.process.returncode, err))
        seconds = {"process_seconds": round(time.monotonic() - started, 1)}
        return json.loads(answers[-1].removeprefix(ANSWER)) | seconds

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()


def answers(
    module: str, waiting: list[dict], *, time_limit: float | None = None, ahead: int = 0
) -> Iterator[dict]:
    """Give jobs to processes of a module one after the other, a process for each; yield what `Worker.ask` returns.

    Args:
        waiting: the jobs, in order.
        time_limit: seconds per job, after which its process is killed; None for no limit.
        ahead: number of processes to start while another one measures, so that their imports cost no time. Use this
            only on a GPU; on a CPU the imports would slow the measurement.
    """
    workers: list[Worker] = []
    try:
        for index, job in enumerate(waiting):
            while len(workers) < min(1 + ahead, len(waiting) - index):
                workers.append(Worker(module))
            yield workers.pop(0).ask(job, time_limit=time_limit)
    finally:
        for worker in workers:
            worker.stop()


def answer(measure: Callable[[dict], dict]) -> None:
    """Measure the job that stands on standard input, and print the result for the `Worker` that waits for it."""
    print(ANSWER + json.dumps(measure(json.load(sys.stdin))), flush=True)


def missing(outcome: str, detail: str) -> dict:
    """The result of a job that was not measured."""
    return {"outcome": outcome, "detail": detail}


def _cause_of_death(code: int, errors: str) -> str:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    last = [line for line in errors.splitlines() if line.strip()][-1:] or ["it said nothing"]
    return f"exit code {code}: {last[0][:300]}"
