"""What `make report` shows while it works: which stage of how many runs, and how long the rest takes."""

import re
import shlex
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from dvc.dvcfile import PROJECT_FILE
from dvc.repo import Repo
from dvc.repo.reproduce import collect_stages, get_active_graph, plan_repro

from workflow.engine.dvc_repository import changed_and_following
from workflow.engine.stage_times import StageTimes
from workflow.runtime.paths import LOGS

CLEAR = "\r\x1b[K"  # to the start of the line, and erase to its end
STEP = re.compile(r"^ +(step \d+ of \d+)\b", re.MULTILINE)  # of a stage's own lines of progress
TAIL = 4096  # bytes at the end of a log in which its last step is looked for


@dataclass(frozen=True)
class Plan:
    """The stages that are stale, in DVC's order.

    Attributes:
        labels: a label for each name.
        possible: the names of those that only follow a changed stage: what they read may turn out to be as before.
    """

    labels: dict[str, str]
    possible: frozenset[str] = frozenset()


def plan(repo: Repo) -> Plan:
    """Return the stages that are stale."""
    with repo.lock:
        stages = collect_stages(repo, [PROJECT_FILE])
        order = plan_repro(get_active_graph(repo.index.graph), stages)
    changed, following = changed_and_following(repo)
    return Plan(
        {stage.name: label_of(stage.cmd) for stage in order if stage in changed | following},
        frozenset(stage.name for stage in following),
    )


def label_of(command: str) -> str:
    """Return a stage's command in words: `train qlora_nf4_dq, seed 1`."""
    _, name, *options = shlex.split(command)
    parts = [
        value if flag == "--variant" else f"{flag.removeprefix('--')} {value}"
        for flag, value in zip(options[::2], options[1::2], strict=True)
    ]
    return f"{name} {', '.join(parts)}".rstrip()


@dataclass
class Progress:
    """The lines of one run.

    On a terminal the running stage has a live line, which its end replaces; elsewhere each stage has one line as it
    starts.

    Attributes:
        plan: the stages that may run. One that is passed over, as nothing that it reads is new, is no longer counted.
        times: of earlier runs and of this one.
        stream: where the lines go.
    """

    plan: Plan
    times: StageTimes
    stream: TextIO
    _started: float = field(default=0.0, init=False)
    _begun: list[str] = field(default_factory=list, init=False)

    def introduce(self) -> None:
        """Say how many stages will run, how long they take if that is known, and where their logs are."""
        names = list(self.plan.labels)
        if not names:
            self.say("Every stage is up to date: nothing runs.")
            return
        stages = "1 stage" if len(names) == 1 else f"{len(names)} stages"
        left, at_most = self.times.left(names[0], 0, names[1:]), self._at_most(names)
        said = f"{at_most}{stages} to run{_left_text(left, at_most)}"
        self.say(f"{said[0].upper()}{said[1:]}. What a stage prints is in {LOGS}/STAGE.log.")

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self.stream.write(f"{CLEAR if self.stream.isatty() else ''}{text}\n")
        self.stream.flush()

    def begin(self, name: str) -> None:
        """Say that a stage starts."""
        self._started = time.monotonic()
        self._begun.append(name)
        if self.stream.isatty():
            self.tick(name, None)
        else:
            self.say(self._line(name, ""))

    def tick(self, name: str, log: Path | None) -> None:
        """Renew the live line of the running stage, with the last step that its log has."""
        if self.stream.isatty():
            line = self._line(name, _last_step(log) if log else "")
            self.stream.write(CLEAR + line[: shutil.get_terminal_size().columns - 1])
            self.stream.flush()

    def end(self, name: str) -> None:
        """Note that the running stage is done; on a terminal its line stays, with the time that it took."""
        seconds = time.monotonic() - self._started
        self.times.record(name, seconds)
        if self.stream.isatty():
            self.say(f"{self._place(name)} · {duration(seconds)}")

    def _line(self, name: str, step: str) -> str:
        later = self._later(name)
        left = self.times.left(name, time.monotonic() - self._started, later)
        return f"{self._place(name)}{f' · {step}' if step else ''}{_left_text(left, self._at_most(later))}"

    def _place(self, name: str) -> str:
        if name not in self.plan.labels:  # what it reads changed only after the plan was made
            return f"stage {name}"
        number, later = sum(begun in self.plan.labels for begun in self._begun), self._later(name)
        return f"stage {number} of {self._at_most(later)}{number + len(later)}: {self.plan.labels[name]}"

    def _later(self, name: str) -> list[str]:
        """Return the stages of the plan after one."""
        names = list(self.plan.labels)
        return names[names.index(name) + 1 :] if name in self.plan.labels else []

    def _at_most(self, names: Sequence[str]) -> str:
        """Return the words before an amount of stages if some of them may turn out to be up to date."""
        return "at most " if self.plan.possible.intersection(names) else ""


def duration(seconds: float) -> str:
    """Return a time as people say it: 40 s, 6 min, 2 h 10 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def failure_in(log: Path, failed: str) -> str:
    """Return what a failed stage's log says of the failure: its lines that say so, else its last ones."""
    lines: Sequence[str] = (
        log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else ()
    )
    told = [line for line in lines if f": {failed}: " in line]
    return "\n".join(told or lines[-5:]) or f"its log {log} is empty"


def _left_text(left: tuple[float, bool] | None, at_most: str) -> str:
    """Return the time left as the end of a line; empty without a basis.

    Args:
        at_most: not empty if some of the stages that are left may not run.
    """
    if left is None:
        return ""
    seconds, complete = left
    about = (at_most.strip() or "about") if complete else ("about" if at_most else "at least")
    return f" · {about} {duration(seconds)} left in all"


def _last_step(log: Path) -> str:
    """Return the last step that a stage's log has; empty if it has none."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL))
        steps = STEP.findall(file.read().decode(errors="replace"))
    return steps[-1] if steps else ""
