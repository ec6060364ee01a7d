"""What every stage does when it starts and ends: quiet libraries, no network, a log, one sentence for a user's error."""

import argparse
import gc
import logging
import os
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from workflow.runtime import (
    compiler,
    dvc_lock_text,
    faults,
    gpus,
    inputs,
    launch,
    lifetime,
    locks,
    redaction,
    starting,
    variables,
)
from workflow.runtime.errors import UserError, UserErrors
from workflow.runtime.lifetime import Terminated
from workflow.runtime.paths import LOGS
from workflow.runtime.starting import AGAIN, FAILED, INTERRUPTED


def run_stage(
    name: str,
    stage: Callable[..., None],
    *,
    arguments: dict[str, type] | None = None,
    network: bool = False,
    gpus_needed: Callable[..., int] | None = None,
    processes_of: Callable[..., int] = lambda **options: 1,
) -> None:
    """Parse the command line and call the stage, with a copy of what it prints in logs/STAGE.log.

    What the stage reads must match dvc.lock and must not change before it ends. A failure ends with exit code 1 and one
    line: which stage, variant and seed, why, where its log is and what to do. An error in this code has its traceback above
    that line. A SIGTERM, which a stage also gets if its engine was killed, ends with exit code 143, as shells count it.

    Args:
        name: the stage's name in dvc.yaml; it begins every line of progress.
        stage: called with the arguments by keyword; its docstring is the command's `--help`.
        arguments: name of each required option and its type.
        network: whether the stage may reach a hub; only the fetch stages may.
        gpus_needed: called like the stage, returns on how many GPUs it computes; None for a stage without a model.
            The stage waits until so many are free, and sees no others.
        processes_of: called like the stage, returns how many processes run it together.
    """
    parser = argparse.ArgumentParser(prog=f"workflow/run {name}", description=stage.__doc__)
    for argument, kind in (arguments or {}).items():
        parser.add_argument(f"--{argument}", type=kind, required=True)
    options = vars(parser.parse_args())
    label = starting.label(name, options)
    log = log_file("@".join([name, *(["-".join(map(str, options.values()))] if options else [])]))
    if not network:
        go_offline()
    quiet_libraries()
    if launch.is_launched():
        _run_launched(stage, options, label)
        return
    lifetime.end_with_engines()
    started = time.monotonic()
    with lifetime.ends_on_signals() as received, ExitStack() as stack:
        try:
            with faults.as_user_errors(name):
                _begin(name, options, label, log, stack)
                variables.check(os.environ, network=network)
                stack.enter_context(inputs.recording(name, options))
                _reserve_gpus(name, gpus_needed(**options) if gpus_needed else 0, stack)
                inputs.check()  # it may have waited for a GPU for hours
                processes = processes_of(**options)
                if processes == 1:
                    stage(**options)
                else:
                    launch.launch(f"workflow.stages.{name}", sys.argv[1:], processes=processes, label=label)
                inputs.check()
                say(f"{label}: done in {time.monotonic() - started:.0f} s")
                # Else the interpreter would search all that was imported for cycles as it ends, for a second or more.
                gc.freeze()
                return
        except (Exception, KeyboardInterrupt, Terminated) as error:
            reason, advice, code = _end_of(received.error or error, label)
        faults.last_words(f"{label}: {FAILED}: {_sentence(reason)} Log: {log}. {advice}")
    if received.in_import:
        os._exit(code)
    sys.exit(code)


def _sentence(text: str) -> str:
    return text if text.endswith((".", "?")) else f"{text}."


def _end_of(error: BaseException, label: str) -> tuple[str, str, int]:
    """Return why a stage ends, what to do, and its exit code; what the last line has no room for is printed."""
    match error:
        case UserErrors():
            faults.last_words(f"{label}: {error}")
            return f"{error.count}, which stand above", f"Mend them and {AGAIN}", 1
        case UserError():
            return str(error), f"Mend it and {AGAIN}", 1
        case KeyboardInterrupt():
            return INTERRUPTED, AGAIN.capitalize(), 1
        case Terminated():
            return str(error), AGAIN.capitalize(), 128 + signal.SIGTERM
    traceback.print_exception(error)
    return f"unforeseen {type(error).__name__}", "Please report it with the log.", 1


def _begin(name: str, options: dict, label: str, log: Path, stack: ExitStack) -> None:
    """Wait until this stage runs nowhere else, and begin its log; `stack` ends both."""
    stack.enter_context(locks.exclusive(log.stem, say=lambda text: say(f"{label}: {text}")))
    # Not before: a process that still runs this stage writes to the log.
    stack.enter_context(copied_to(log))
    last = f"Log: {log}. {AGAIN.capitalize()}"
    stack.enter_context(faults.witnessed(f"{label}: {FAILED}", stage=name, last=last))
    dvc_lock_text.keep_copy_of_lock()
    say(f"{label}: started")


def _reserve_gpus(name: str, count: int, stack: ExitStack) -> None:
    """Reserve GPUs for a stage until `stack` ends, and say which."""
    sharers = gpus.allowed_sharers(name, gpus=count)
    reserved = stack.enter_context(gpus.reserved(count, sharers=sharers, say=lambda text: say(f"  {text}")))
    if reserved:
        say(f"  on {', '.join(gpu.name for gpu in reserved)}")


def _run_launched(stage: Callable[..., None], options: dict, label: str) -> None:
    """Call the stage as one of several processes; their launcher writes the log and the last line."""
    launch.end_with_launcher()
    try:
        with lifetime.ends_on_signals(), faults.as_user_errors(label.partition(",")[0]):
            stage(**options)
    except UserError as error:
        sys.exit(f"{label}: {error}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Terminated:
        sys.exit(128 + signal.SIGTERM)


@contextmanager
def copied_to(path: Path) -> Iterator[None]:
    """Copy what this process and its children print to a file, unless they already print to that file.

    Secrets are removed from both copies.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_copy = path.exists() and os.path.samestat(os.fstat(1), path.stat())
        if not is_copy:
            path.write_bytes(b"")
    except OSError as error:
        reason = faults.sentence(error) or f"its log {path} cannot be written ({error.strerror})."
        sys.exit(f"{path.stem}: {FAILED}: {reason} Mend it and {AGAIN}")
    terminals, copies = [], []
    for stream in (1, 2):
        # In a session of its own: a signal to the stage's process group must not end it before the stage's last line.
        copy = subprocess.Popen(
            [sys.executable, "-IS", redaction.__file__, *([] if is_copy else [path])],
            stdin=subprocess.PIPE,
            stdout=stream,
            start_new_session=True,
        )
        terminals.append(os.dup(stream))
        os.dup2(copy.stdin.fileno(), stream)
        copy.stdin.close()
        copies.append(copy)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream, terminal in zip((1, 2), terminals, strict=True):
            os.dup2(terminal, stream)
            os.close(terminal)
        for copy in copies:
            copy.wait()


def log_file(stage: str) -> Path:
    """Return the path of the log of a stage, or of an item of its matrix, under either engine."""
    return LOGS / f"{stage}.log"


def say(text: str) -> None:
    """Print a line and flush it, so that a log can be followed."""
    # In one write, even with PYTHONUNBUFFERED: otherwise a line of the other stream could come before its line break.
    print(f"{text}\n", end="", flush=True)


def go_offline() -> None:
    """Keep the Hugging Face libraries from using the network, which only the fetch stages may."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ[name] = "1"


@contextmanager
def offline_command(name: str) -> Iterator[None]:
    """Run a command that is no stage, without a network: a UserError in the block ends the process with one line.

    Args:
        name: begins the line.
    """
    go_offline()
    quiet_libraries()
    try:
        variables.check(os.environ, network=False)
        with faults.as_user_errors(name):
            yield
    except UserError as error:
        sys.exit(f"{name}: {error}")


def quiet_libraries() -> None:
    """Silence telemetry and the libraries' messages, which would bury our own lines in a log; load no compiler."""
    compiler.skip_at_import()
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if not sys.stderr.isatty():
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        os.environ["TQDM_MININTERVAL"] = "30"  # seconds; keeps bars that cannot be disabled short in a log
    for name in (
        "bitsandbytes",
        "transformers",
        "trl",
        "peft",
        "lm_eval",
        "lm-eval",
        "datasets",
        "accelerate",
        "torchao",  # it says which of its kernels it cannot load
        "torch.utils._pytree",  # and torch, what is outdated in it
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    os.environ["LMEVAL_LOG_LEVEL"] = "ERROR"
    warnings.filterwarnings("ignore", category=FutureWarning)


def progress(done: int, total: int, seconds: float, text: str) -> None:
    """Print how far a loop is, and how long the rest takes at the pace so far.

    Args:
        done: steps so far, at least one.
        total: steps in all.
        seconds: that they took.
        text: the end of the line.
    """
    left = seconds / done * (total - done)
    say(f"  step {done} of {total}, {_clock(seconds)} so far, {_clock(left)} left: {text}")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}"
