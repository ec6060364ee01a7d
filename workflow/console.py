"""What every stage does at its door: quiet libraries, no network, one sentence for a user's error."""

import argparse
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable

from workflow.errors import UserError


def run_stage(
    name: str,
    stage: Callable[..., None],
    *,
    arguments: dict[str, type] | None = None,
    network: bool = False,
) -> None:
    """Parse the command line, call the stage, and exit 1 with one sentence on a UserError.

    Args:
        name: the stage's name in dvc.yaml; it stands before every line of progress.
        stage: called with the arguments by keyword; its docstring is the command's `--help`.
        arguments: name of each required option and its type.
        network: whether the stage may reach a hub; only the fetch stages may.
    """
    parser = argparse.ArgumentParser(prog=f"workflow/run {name}", description=stage.__doc__)
    for argument, kind in (arguments or {}).items():
        parser.add_argument(f"--{argument}", type=kind, required=True)
    options = vars(parser.parse_args())
    label = " ".join([name, *(str(value) for value in options.values())])
    if not network:
        go_offline()
    quiet_libraries()
    # One process, one GPU: given several, the trainer would split every batch among them.
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    started = time.monotonic()
    say(f"{label}: started")
    try:
        stage(**options)
    except UserError as error:
        sys.exit(f"{label}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{label}: interrupted")
    say(f"{label}: done in {time.monotonic() - started:.0f} s")


def say(text: str) -> None:
    """Print a plain line at once, so that a log can be followed."""
    print(text, flush=True)


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
