"""How long stages took, and from that how long the rest of a run takes.

A time counts only for a run of the same sizes: the sections of params.yaml that it depends on have one digest. This
machine's times are below .cache; those of the published run, which a fresh clone begins with, are in results/.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from workflow.runtime.files import read_json, read_yaml, write_json
from workflow.runtime.paths import PARAMS, STAGE_SECONDS, STAGE_SECONDS_HERE

# What a stage computes does not get longer or shorter by these.
WITHOUT_TIME = {"experiment", "checkpoints", "comparison", "report"}
MINUTE = 60.0  # seconds


@dataclass
class StageTimes:
    """The seconds that stages took.

    Attributes:
        digest: of the params on which the times depend.
        earlier: seconds by the stage's name, from earlier runs of the same sizes.
        now: those of the stages that this run has finished.
    """

    digest: str
    earlier: dict[str, float]
    now: dict[str, float] = field(default_factory=dict)

    def record(self, stage: str, seconds: float) -> None:
        """Note a finished stage, for this run and for later ones on this machine."""
        self.now[stage] = round(seconds, 1)
        with suppress(OSError):  # a time that cannot be kept must not end a run
            here = _times_in(STAGE_SECONDS_HERE, self.digest)
            write_json(STAGE_SECONDS_HERE, {"digest": self.digest, "seconds": here | self.now})

    def expected(self, stage: str) -> float | None:
        """Return the seconds that a stage will take; None without a basis.

        An earlier time of the stage is scaled by this run's pace. Without one, the basis is the mean of this run's
        finished stages of the same kind, which differ in the variant or the seed.
        """
        if stage in self.earlier:
            return self.earlier[stage] * self._pace()
        kind = stage.partition("@")[0]
        alike = [seconds for name, seconds in self.now.items() if name.partition("@")[0] == kind]
        return sum(alike) / len(alike) if alike else None

    def left(self, stage: str, elapsed: float, later: Sequence[str]) -> tuple[float, bool] | None:
        """Return the seconds that a run still takes, and whether every stage that is left has a basis.

        Args:
            stage: the one that runs.
            elapsed: seconds since it started.
            later: the stages after it.

        Returns:
            None if no stage that is left has a basis.
        """
        times = [self.expected(name) for name in (stage, *later)]
        known = [seconds for seconds in times if seconds is not None]
        if not known:
            return None
        spent = elapsed if times[0] is None else min(elapsed, times[0])
        return max(sum(known) - (0 if times[0] is None else spent), 0), len(known) == len(times)

    def _pace(self) -> float:
        """Return how many times as long as before this run's stages took; 1 before one is finished.

        A minute that took as long as before is added to both: a stage of seconds that had to wait says little.
        """
        both = self.now.keys() & self.earlier.keys()
        now, before = (sum(times[name] for name in both) for times in (self.now, self.earlier))
        return (now + MINUTE) / (before + MINUTE)


def load() -> StageTimes:
    """Return the times of earlier runs that have the sizes of params.yaml: this machine's, else the published ones."""
    digest = digest_of(read_yaml(PARAMS))
    return StageTimes(digest, _times_in(STAGE_SECONDS, digest) | _times_in(STAGE_SECONDS_HERE, digest))


def digest_of(params: Mapping[str, object]) -> str:
    """Return the digest of the sections of params.yaml on which the time of a stage depends."""
    sections = {key: value for key, value in params.items() if key not in WITHOUT_TIME}
    return hashlib.sha256(json.dumps(sections, sort_keys=True, default=str).encode()).hexdigest()


def _times_in(path: Path, digest: str) -> dict[str, float]:
    """Return the times in a file; none if it is missing, damaged or of other params."""
    try:
        content = read_json(path)
        if content["digest"] == digest:
            return {str(stage): float(seconds) for stage, seconds in content["seconds"].items()}
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        pass
    return {}
