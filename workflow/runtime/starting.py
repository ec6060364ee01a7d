"""How a stage ends while it is still being imported: in its sentence, as it does later, and with the same exit code.

Only what every interpreter has loaded already is imported here, so that the handlers stand before anything slow begins.
"""

import os
import signal
import sys
from types import FrameType

FAILED = "failed"  # Snakemake's jobs show the line of their log that says so
AGAIN = "run the same command again: what is done is kept."
INTERRUPTED = "interrupted"
LAUNCHER = "WORKFLOW_LAUNCHER"  # set to the launcher's process id in the processes that `launch` starts


def is_launched() -> bool:
    """Return whether `launch` started this process. Variables of other launchers, such as a cluster's, do not count."""
    own = str(os.getpid())
    return os.environ.get(LAUNCHER, own) != own


def label(name: str, options: dict[str, object]) -> str:
    """Return how a stage's lines name it: `train, variant lora_16bit, seed 1`."""
    return ", ".join([name, *(f"{option} {value}" for option, value in options.items())])


def end_in_a_sentence() -> None:
    """Let a SIGTERM or Ctrl-C end this process at once, with the stage's last line, until the stage handles them itself.

    Nothing is begun by then, so nothing has to be tidied up; an exception in the middle of an import would come out of it
    as another one.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> None:
    reason = INTERRUPTED if number == signal.SIGINT else "ended by SIGTERM"
    line = f"{_label_of(sys.orig_argv)}: {FAILED}: {reason}. {AGAIN.capitalize()}\n"
    os.write(2, line.encode())
    os._exit(1 if number == signal.SIGINT else 128 + number)


def _label_of(command: list[str]) -> str:
    """The label of `python -m workflow.stages.train --variant lora_16bit --seed 1`."""
    _, module, *words = command[command.index("-m") :]
    return label(module.rpartition(".")[2], dict(zip(words[::2], words[1::2], strict=False))).replace(
        "--", ""
    )
