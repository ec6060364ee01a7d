"""What is recorded of a candidate, and of the choice among the candidates of a variant."""

from typing import Any

from pydantic import BaseModel, ConfigDict

METRIC, UNIT, SPLIT = "validation_loss", "nats per token", "validation"


class Record(BaseModel):
    """A part of a result; what it holds beside the fields here is left out."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class CandidateRun(Record):
    """One training of a candidate. The losses are in nats per token, over all validation rows; lower is better."""

    seed: int
    diverged: str | None  # what was not finite; the losses after step 0 are then None
    validation_loss_before: float
    validation_loss_after: float | None  # after the last step
    validation_loss_kept: float | None  # after kept_step
    kept_step: int | None  # whose weights a run would keep: the last, or the best scored one
    best_validation_loss: float | None  # the lowest of the curve, step 0 included
    best_step: int | None
    steps: int | None
    tokens_seen: int | None  # without padding
    order_sha256: str | None  # of the rows in the order of the steps
    seconds: float | None  # in training steps


class CandidateResult(Record):
    """A candidate with its runs, one for each of tuning.seeds."""

    candidate: str
    variant: str
    learning_rate: float
    runs: list[CandidateRun]

    @property
    def diverged(self) -> bool:
        return any(run.diverged for run in self.runs)

    @property
    def mean_loss(self) -> float | None:
        """Nats per token of the step that a run would keep, the mean over the seeds; None if a run diverged."""
        losses = [run.validation_loss_kept for run in self.runs]
        return None if None in losses else sum(losses) / len(losses)


class Choice(Record):
    """How the learning rate that a variant names was chosen.

    Attributes:
        variant: whose candidates they are.
        candidates: all of them, from the lowest rate to the highest.
        chosen: the name of the one with the lowest mean validation loss.
        runner_up: the name of the second; None if all others diverged.
        margin: how much higher the runner-up's mean loss is, in nats per token.
        end: lowest or highest, if the chosen rate is the last of the tried ones in that direction, so that a better one
            may lie beyond; None otherwise.
    """

    variant: str
    candidates: list[CandidateResult]
    chosen: str
    learning_rate: float
    runner_up: str | None
    margin: float | None
    end: str | None

    @property
    def warning(self) -> str | None:
        """A sentence on what the choice cannot say."""
        if self.end is None:
            return None
        beyond = "lower" if self.end == "lowest" else "higher"
        return f"{self.learning_rate:g} is the {self.end} rate that was tried for {self.variant}: a {beyond} one may be better"


class VariantRate(Record):
    """The learning rate of a variant's runs.

    Attributes:
        tuned_for: the variant whose candidates it was chosen among; None if params give the number.
    """

    variant: str
    learning_rate: float
    tuned_for: str | None


class Rates(Record):
    """The rates of all variants of the experiment, and the choices, by variant."""

    variants: dict[str, VariantRate]
    choices: dict[str, Choice]


def described(**content: Any) -> dict[str, Any]:
    """Return a result that says what its losses are."""
    about = {"metric": METRIC, "unit": UNIT, "higher_is_better": False, "split": SPLIT}
    return about | content
