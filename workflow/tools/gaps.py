"""The gap of a quantized base to 16 bits, unmoved and moved off its grid, before and after training (docs/mechanism.md)."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from workflow.comparison.contrasts import bootstrap
from workflow.comparison.crossed import CrossedDifference, crossed_difference
from workflow.comparison.inference import Bootstrap, Difference, difference
from workflow.comparison.ratios import Ratio, ratio
from workflow.runtime.errors import UserError
from workflow.runtime.forms import AS_TRAINED, BASE
from workflow.tools.moved_studies import METRIC, TASK, Study

PART = 1 / 3  # the smallest part of a gap that the rule attributes to the grid
Answer = Literal["not the grid", "the grid", "undecided"]
Interval = Difference | CrossedDifference


@dataclass(frozen=True)
class Gap:
    """A variant's loss less that of the baseline on the same base, in nats per token: less is better.

    Attributes:
        unmoved: on the base as it is.
        moved: on the moved bases, mean over the draws.
        change: moved less unmoved, paired over draws, seeds and items.
    """

    unmoved: Difference
    moved: Interval
    change: Interval


@dataclass(frozen=True)
class VariantGaps:
    """The gaps of one variant, and what they say of the grid.

    Attributes:
        ratio_unmoved, ratio_moved: the gap after training over the gap before; None if the gap before is too uncertain
            to divide by.
        above_third: the moved gap after training less two thirds of the unmoved one.
    """

    variant: str
    before: Gap
    after: Gap
    ratio_unmoved: Ratio | None
    ratio_moved: Ratio | None
    above_third: CrossedDifference
    margin: float
    answer: Answer
    reason: str


@dataclass(frozen=True)
class Loss:
    """The mean loss of a variant on one base, over items and seeds, in nats per token."""

    variant: str
    draw: int | None  # the seed of the move; None for the base as it is
    before: float
    after: float


def losses(unmoved: Study, moved: list[Study]) -> list[Loss]:
    """The losses of each variant on each base, before training and after."""
    found = []
    for variant in unmoved.settings.experiment.variants:
        for study in (unmoved, *moved):
            found.append(Loss(variant, study.moved and study.moved.seed, *mean_losses(study, variant)))
    return found


def mean_losses(study: Study, variant: str) -> list[float]:
    """The mean loss of a variant before training and after, over items and seeds, in nats per token."""
    tables = [study.table(variant, form) for form in (BASE, AS_TRAINED)]
    return [float(table.numerators.mean(axis=0).sum() / table.denominators.sum()) for table in tables]


def measure_gaps(unmoved: Study, moved: list[Study]) -> list[VariantGaps]:
    """Measure the gaps of each variant but the baseline.

    Raises:
        UserError: the params have no margin for the loss.
    """
    margin = margin_of(unmoved)
    return [_variant_gaps(name, unmoved, moved, margin) for name in others_of(unmoved)]


def margin_of(study: Study) -> float:
    """The margin on which the rules rest, in nats per token.

    Raises:
        UserError: the params have none for the loss.
    """
    margin = study.settings.comparison.margins.get(f"{TASK}/{METRIC}")
    if margin is None:
        raise UserError(f"comparison.margins has none for {TASK}/{METRIC}, on which the rule rests.")
    return margin


def others_of(study: Study) -> list[str]:
    """The variants but the baseline."""
    experiment = study.settings.experiment
    return [name for name in experiment.variants if name != experiment.baseline]


def gap_of(study: Study, variant: str, form: str) -> np.ndarray:
    """A variant's loss less that of the baseline, in nats: [seeds, items], one row for bases."""
    baseline = study.settings.experiment.baseline
    return study.table(variant, form).numerators - study.table(baseline, form).numerators


def about_items(study: Study) -> tuple[np.ndarray, np.ndarray, Bootstrap]:
    """The tokens and the group of each item, [items], and the settings of the intervals: what `difference` needs."""
    table = study.table(study.settings.experiment.baseline, BASE)
    return (
        table.denominators,
        table.items["group"].to_numpy(object),
        bootstrap(study.settings.comparison),
    )


def _variant_gaps(variant: str, unmoved: Study, moved: list[Study], margin: float) -> VariantGaps:
    about = about_items(unmoved)
    before, after = gap_of(unmoved, variant, BASE), gap_of(unmoved, variant, AS_TRAINED)
    moved_before = np.stack([gap_of(study, variant, BASE)[0] for study in moved])
    moved_after = np.stack([gap_of(study, variant, AS_TRAINED) for study in moved])
    gap_before = Gap(
        difference(before, *about, trained=False),
        difference(moved_before, *about),
        difference(moved_before - before, *about),
    )
    gap_after = Gap(
        difference(after, *about),
        crossed_difference(moved_after, *about),
        crossed_difference(moved_after - after, *about),
    )
    above_third = crossed_difference(moved_after - (1 - PART) * after, *about)
    answer, reason = judge(gap_after, above_third, margin=margin)
    return VariantGaps(
        variant=variant,
        before=gap_before,
        after=gap_after,
        ratio_unmoved=ratio_of(after, before, about),
        # Its units are the draws, each with the mean over its seeds.
        ratio_moved=ratio_of(moved_after.mean(axis=1), moved_before, about),
        above_third=above_third,
        margin=margin,
        answer=answer,
        reason=reason,
    )


def ratio_of(
    after: np.ndarray, before: np.ndarray, about: tuple[np.ndarray, np.ndarray, Bootstrap]
) -> Ratio | None:
    """The gap after training over the gap before: [seeds or draws, items] each."""
    before = np.broadcast_to(before, after.shape)
    return ratio(after, before, *about, divisor=difference(before, *about))


def judge(after: Gap, above_third: Interval, *, margin: float) -> tuple[Answer, str]:
    """Apply the rule of the preset mechanism to a variant's gap after training.

    Args:
        above_third: the moved gap less two thirds of the unmoved one.
        margin: nats per token.

    Returns:
        The answer, and why it is that one.
    """
    not_smaller = after.change.low > -margin
    much_smaller = above_third.high < 0
    if after.unmoved.low <= 0:
        return "undecided", "the gap on the unmoved base may be zero, so there is nothing to explain"
    if not_smaller and much_smaller:
        return "undecided", "the gap is so small that a third of it lies within the margin"
    if not_smaller:
        return "not the grid", "off the grid the gap is larger, equal, or smaller by less than the margin"
    if much_smaller:
        return "the grid", "off the grid the gap is smaller by more than a third"
    return (
        "undecided",
        "the intervals show neither a change of less than the margin nor one of more than a third",
    )
