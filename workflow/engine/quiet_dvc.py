"""Run DVC's pipeline with one line for each stage on the terminal.

Written against DVC 3.67; another version may need other patches. While `shown_by` runs

- `stage.run._run` writes what a stage prints to the stage's log alone, as Snakemake's jobs do;
- DVC's messages go to logs/dvc.log. Only an error that no stage explains reaches the terminal.
"""

import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

from dvc.env import DVC_STAGE
from dvc.logger import ColorFormatter, LoggerHandler
from dvc.stage import run as runner
from dvc.stage.exceptions import StageCmdFailedError
from dvc.ui import Console

from workflow.engine.dvc_patch_state import replaced
from workflow.engine.progress import Progress, failure_in
from workflow.runtime import lifetime
from workflow.runtime.paths import LOGS
from workflow.runtime.stage import FAILED, log_file

LOGGERS = ("dvc", "dvc_objects", "dvc_data")
PATIENCE = 0.5  # seconds between two looks at the running stage


@contextmanager
def shown_by(progress: Progress) -> Iterator[None]:
    """Let `progress` show the stages that DVC runs in the block, and keep all else for the logs."""
    LOGS.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        stack.enter_context(_messages_in_log())
        stack.enter_context(replaced(Console, "enable", lambda console: None))
        stack.enter_context(replaced(runner, "_run", _run_shown(progress)))
        yield


def _run_shown(progress: Progress) -> Callable[..., None]:
    """Return a function that runs a stage's command as DVC's own does, and writes its output to its log."""

    def run(executable: str | None, command: str, **options: Any) -> None:
        name = options["env"][DVC_STAGE]
        log = log_file(name)
        progress.begin(name)
        log.write_bytes(b"")
        with log.open("ab") as output:  # what a killed run's stage still writes cannot leave a hole
            arguments = runner._make_cmd(executable, command)
            process = subprocess.Popen(arguments, stdout=output, stderr=subprocess.STDOUT, **options)
            with _interrupt_left_to_stage():
                while process.poll() is None:
                    try:
                        process.wait(PATIENCE)
                    except subprocess.TimeoutExpired:
                        progress.tick(name, log)
        if process.returncode:
            progress.say(failure_in(log, FAILED))
            raise StageCmdFailedError(command, process.returncode)
        progress.end(name)

    return run


def _interrupt_left_to_stage() -> AbstractContextManager[None]:
    """Ignore Ctrl-C in the block: the terminal sends it to the stage as well, which ends with its own line."""
    if threading.current_thread() is not threading.main_thread():
        return nullcontext()
    return lifetime.handled_by(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def _messages_in_log() -> Iterator[None]:
    """Send DVC's messages to its log in place of the terminal, and errors that no stage explains to both."""
    log = logging.FileHandler(LOGS / "dvc.log", mode="w", encoding="utf-8")
    log.setFormatter(ColorFormatter(log_colors=False))
    errors = LoggerHandler(sys.stderr)
    errors.setLevel(logging.ERROR)
    errors.setFormatter(ColorFormatter(log_colors=sys.stderr.isatty()))
    errors.addFilter(lambda record: not _is_explained(record))
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [logger.handlers for logger in loggers]
    bars = logging.getLogger("dvc.progress")  # its level decides whether DVC draws bars
    level = bars.level
    try:
        for logger in loggers:
            logger.handlers = [log, errors]
        bars.setLevel(logging.CRITICAL)
        yield
    finally:
        bars.setLevel(level)
        for logger, handlers in zip(loggers, before, strict=True):
            logger.handlers = handlers
        log.close()


def _is_explained(record: logging.LogRecord) -> bool:
    """Return whether a message is about a stage that failed, whose own words were shown."""
    error = record.exc_info[1] if record.exc_info else None
    while error is not None and not isinstance(error, StageCmdFailedError):
        error = error.__cause__
    return error is not None
