"""What every stage does at its door: quiet libraries, no network, a log, one sentence for a user's error."""

import argparse
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

from workflow.runtime import faults, inputs, launch, lifetime, mending, redaction, variables
from workflow.runtime.errors import UserError
from workflow.runtime.lifetime import Terminated

LOGS = Path("logs")
FAILED = "failed"  # the Snakefile's jobs show the line of their log that says so
AGAIN = "run the same command again: what is done is kept."


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

    What it reads must be what dvc.lock says that other stages wrote, and must not change before it ends.
    A failure ends with exit code 1 and one line: which stage, variant and seed, why, where its log is and what
    to do. An error that is nobody's mistake but ours has its traceback above that line. A SIGTERM, which is also
    what a stage gets whose engine was killed, ends with exit code 143 as shells count it.

    Args:
        name: the stage's name in dvc.yaml; it stands before every line of progress.
        stage: called with the arguments by keyword; its docstring is the command's `--help`.
        arguments: name of each required option and its type.
        network: whether the stage may reach a hub; only the fetch stages may.
        gpus_needed: called like the stage, says on how many GPUs it computes; None for a stage that has no model.
            It waits until so many are free, and sees no others.
        processes_of: called like the stage; how many processes run it together.
    """
    from workflow.runtime import gpus

    parser = argparse.ArgumentParser(prog=f"workflow/run {name}", description=stage.__doc__)
    for argument, kind in (arguments or {}).items():
        parser.add_argument(f"--{argument}", type=kind, required=True)
    options = vars(parser.parse_args())
    label = ", ".join([name, *(f"{option} {value}" for option, value in options.items())])
    log = log_file("@".join([name, *(["-".join(map(str, options.values()))] if options else [])]))
    if not network:
        go_offline()
    quiet_libraries()
    if launch.is_launched():
        _run_launched(stage, options, label)
        return
    lifetime.end_with_engines()
    started, code = time.monotonic(), 1
    last = f"Log: {log}. {AGAIN.capitalize()}"
    with lifetime.ends_on_sigterm(), ExitStack() as held:
        try:
            with faults.as_user_errors(name):
                held.enter_context(lifetime.alone(log.stem, say=lambda text: say(f"{label}: {text}")))
                # Not before: a process that still runs this stage writes to the log.
                held.enter_context(copied_to(log))
                held.enter_context(faults.witnessed(f"{label}: {FAILED}", stage=name, last=last))
                mending.keep_copy_of_lock()
                say(f"{label}: started")
                variables.check(os.environ, network=network)
                held.enter_context(inputs.taken_down(name, options))
                count, wanted = gpus_needed(**options) if gpus_needed else 0, processes_of(**options)
                places = gpus.places(name, gpus=count)
                taken = held.enter_context(
                    gpus.taken(count, places=places, say=lambda text: say(f"  {text}"))
                )
                if taken:
                    say(f"  on {', '.join(gpu.name for gpu in taken)}")
                inputs.check()  # it may have waited for a GPU for hours
                if wanted == 1:
                    stage(**options)
                else:
                    launch.launch(f"workflow.stages.{name}", sys.argv[1:], processes=wanted, label=label)
                inputs.check()
                say(f"{label}: done in {time.monotonic() - started:.0f} s")
                return
        except UserError as error:
            why, advice = str(error), f"Mend it and {AGAIN}"
        except KeyboardInterrupt:
            why, advice = "interrupted", AGAIN.capitalize()
        except Terminated as ended:
            why, advice, code = str(ended), AGAIN.capitalize(), 128 + signal.SIGTERM
        except Exception as error:
            traceback.print_exc()
            why, advice = f"unforeseen {type(error).__name__}", "Please report it with the log."
        faults.last_words(f"{label}: {FAILED}: {why.removesuffix('.')}. Log: {log}. {advice}")
        sys.exit(code)


def _run_launched(stage: Callable[..., None], options: dict, label: str) -> None:
    """Call the stage as one of several processes: their launcher has the log and the last word."""
    launch.end_with_launcher()
    try:
        with lifetime.ends_on_sigterm(), faults.as_user_errors(label.partition(",")[0]):
            stage(**options)
    except UserError as error:
        sys.exit(f"{label}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{label}: interrupted")
    except Terminated as ended:
        sys.exit(f"{label}: {ended}")


@contextmanager
def copied_to(path: Path) -> Iterator[None]:
    """Copy what this process and its children print to a file, unless they print to that file already.

    No secret is in what comes out of it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_copy = path.exists() and os.path.samestat(os.fstat(1), path.stat())
        if not is_copy:
            path.write_bytes(b"")
    except OSError as error:
        why = faults.sentence(error) or f"its log {path} cannot be written ({error.strerror})."
        sys.exit(f"{path.stem}: {FAILED}: {why} Mend it and {AGAIN}")
    kept, copies = [], []
    for stream in (1, 2):
        # Out of reach of what ends the stage's process group: the stage still has its last line to say.
        copy = subprocess.Popen(
            [sys.executable, "-IS", redaction.__file__, *([] if is_copy else [path])],
            stdin=subprocess.PIPE,
            stdout=stream,
            start_new_session=True,
        )
        kept.append(os.dup(stream))
        os.dup2(copy.stdin.fileno(), stream)
        copy.stdin.close()
        copies.append(copy)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream, terminal in zip((1, 2), kept, strict=True):
            os.dup2(terminal, stream)
            os.close(terminal)
        for copy in copies:
            copy.wait()


def log_file(stage: str) -> Path:
    """Where the log of a stage, or of an item of its matrix, lies under either engine."""
    return LOGS / f"{stage}.log"


def say(text: str) -> None:
    """Print a plain line at once, so that a log can be followed."""
    # In one write, under PYTHONUNBUFFERED too: the other stream's line could come before the end of this one.
    print(f"{text}\n", end="", flush=True)


def go_offline() -> None:
    """Tell the Hugging Face libraries that no stage but the fetch stages may use the network."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ[name] = "1"


def quiet_libraries() -> None:
    """Silence telemetry and the libraries' chatter, which would bury our own lines in a log."""
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if not sys.stderr.isatty():
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        os.environ["TQDM_MININTERVAL"] = "30"  # seconds: bars that cannot be switched off stay short in a log
    for name in (
        "bitsandbytes",
        "transformers",
        "trl",
        "peft",
        "lm_eval",
        "lm-eval",
        "datasets",
        "accelerate",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    os.environ["LMEVAL_LOG_LEVEL"] = "ERROR"
    warnings.filterwarnings("ignore", category=FutureWarning)


def progress(done: int, total: int, seconds: float, text: str) -> None:
    """Say how far a loop is, and how long it still needs at the pace so far."""
    left = seconds / done * (total - done)
    say(f"  step {done} of {total}, {_clock(seconds)} so far, {_clock(left)} left: {text}")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}"
