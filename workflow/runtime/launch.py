"""Run one stage as several processes that compute together, and end all of them when one ends badly."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path

from workflow.runtime.errors import UserError

LAUNCHED = "WORKFLOW_LAUNCHED"  # set in the processes that `launch` starts
SECONDS_TO_END = 20  # a training that is asked to end finishes its step and writes a checkpoint


def rank() -> int:
    """This process' number among those that `launch` started together; 0 in a process that stands alone."""
    return int(os.environ["RANK"]) if is_launched() else 0


def count() -> int:
    """How many processes compute together; 1 for a process that stands alone."""
    return int(os.environ["WORLD_SIZE"]) if is_launched() else 1


def is_launched() -> bool:
    """Whether `launch` started this process. Other launchers' variables, which a cluster may set, do not count."""
    return LAUNCHED in os.environ


def launch(module: str, arguments: list[str], *, processes: int, label: str) -> None:
    """Run `python -m module arguments` so many times at once, as torch.distributed expects it, and wait.

    The first process speaks for all: what it prints is printed, and of the others only an error is.

    Args:
        label: what stands before a process' own sentence about a user's error.

    Raises:
        UserError: a process ended badly; the others have been ended.
    """
    environment = os.environ | {
        LAUNCHED: "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
    }
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a machine's own name may not resolve
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        started: list[subprocess.Popen] = []
        stack.callback(_end, started)
        for number in range(processes):
            started.append(
                subprocess.Popen(
                    [sys.executable, "-m", module, *arguments],
                    env=environment | {"RANK": str(number), "LOCAL_RANK": str(number)},
                    stdin=subprocess.PIPE,  # closed when this process ends, however it does
                    stdout=None if number == 0 else subprocess.DEVNULL,
                    stderr=stack.enter_context((folder / str(number)).open("wb")),
                )
            )
        while True:
            codes = [process.poll() for process in started]
            if any(codes):
                break
            if None not in codes:
                sys.stderr.write(_errors(folder, 0))
                return
            time.sleep(0.1)
        raise UserError(_what_happened(codes, [_errors(folder, n) for n in range(processes)], label))


def end_with_launcher() -> None:
    """End this process when the one that launched it is gone, or it would wait for the others for ever."""

    def wait() -> None:
        os.read(sys.stdin.fileno(), 1)  # nothing is ever written
        os._exit(1)

    if is_launched():
        threading.Thread(target=wait, daemon=True).start()


def _what_happened(codes: list[int | None], errors: list[str], label: str) -> str:
    """One sentence about the process that ended first: of several, the one that knows most about the cause."""
    for text in errors:
        last = text.strip().rpartition("\n")[2]
        if last.startswith(f"{label}: "):
            return last.removeprefix(f"{label}: ")
    failed = [number for number, code in enumerate(codes) if code]
    killed = [number for number in failed if codes[number] < 0]
    number = (killed or failed)[0]
    others = f"process {number + 1} of {len(codes)} {{}}, and the others were ended"
    if codes[number] == -signal.SIGKILL:
        return others.format("was killed by SIGKILL (out of memory, if nobody killed it)") + "."
    sys.stderr.write(errors[number])
    ended = (
        f"was ended by {signal.Signals(-codes[number]).name}"
        if killed
        else f"ended with code {codes[number]}"
    )
    return others.format(ended) + "; its own words stand above."


def _errors(folder: Path, number: int) -> str:
    return (folder / str(number)).read_text(encoding="utf-8", errors="replace")


def _end(started: list[subprocess.Popen]) -> None:
    for process in started:
        process.terminate()
    deadline = time.monotonic() + SECONDS_TO_END
    for process in started:
        try:
            process.wait(max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdin.close()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
