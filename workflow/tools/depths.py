"""How a quantized base's gap to 16 bits changes with the layers that are left of one base (docs/mechanism.md)."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from workflow.comparison.inference import (
    Bootstrap,
    Difference,
    Verdict,
    difference,
    equivalence,
    holm,
    verdict,
)
from workflow.comparison.ratios import Ratio
from workflow.runtime.errors import UserError
from workflow.runtime.forms import AS_TRAINED, BASE
from workflow.tools.gaps import about_items, gap_of, margin_of, mean_losses, others_of, ratio_of
from workflow.tools.moved_studies import Study, check_alike, read_study

# In these, studies of healed bases differ: what was cut away, and what the healing came to.
ALLOWED = (
    "model.path",
    "model.sha256",
    "source.json.path",
    "source.json.sha256",
    "source.json.parameters",
    "source.json.cut",
    "source.json.healed.validation_loss",
)
ANSWERS: dict[Verdict, str] = {
    "worse": "larger",
    "better": "smaller",
    "equivalent": "equal",
    "undecided": "undecided",
}


@dataclass(frozen=True)
class Depth:
    """A study of a base that was healed, cut before or not.

    Attributes:
        layers: that the base has.
        healed: what source.json says of the healing, with its losses in nats per token.
    """

    study: Study
    layers: int
    healed: dict[str, Any]

    @property
    def parameters(self) -> int:
        return self.study.source["parameters"]


@dataclass(frozen=True)
class DepthGap:
    """A variant's loss less that of the baseline on the base of one depth, in nats per token: less is better.

    Attributes:
        before, after: the gap before training and after.
        ratio: the gap after training over the gap before; None if the gap before is too uncertain to divide by.
        change_before, change_after: less the gap at the full depth, paired over seeds and items; None for the full depth.
        p_adjusted: of `change_after`, by Holm's procedure over all variants and depths; None for the full depth.
        answer: what became of the gap after training: larger, smaller, equal (within the margin) or undecided; None for the
            full depth.
    """

    variant: str
    depth: Depth
    before: Difference
    after: Difference
    ratio: Ratio | None
    change_before: Difference | None = None
    change_after: Difference | None = None
    p_adjusted: float | None = None
    answer: str | None = None


@dataclass(frozen=True)
class DepthLoss:
    """The mean loss of a variant on the base of one depth, over items and seeds, in nats per token."""

    variant: str
    layers: int
    before: float
    after: float


def read_depths(folders: list[Path]) -> list[Depth]:
    """Read finished studies of healed bases; return them from the full depth to the fewest layers.

    Raises:
        UserError: a file is missing, a base was not healed, they are not one full depth and others cut from it, or they differ
            in more than the depth.
        CheckError: they were not trained with the same libraries on the same kind of device and the same rows, or not
            scored on the same items.
    """
    studies = [read_study(folder) for folder in folders]
    for study in studies:
        if not study.source.get("healed"):
            raise UserError(
                f"the base of {study.folder} was not healed: `python -m workflow.mechanism heal` makes such bases."
            )
    cut = [study for study in studies if study.source["cut"]]
    full = [study for study in studies if not study.source["cut"]]
    if len(full) != 1 or not cut:
        raise UserError(
            f"one study of the full depth and one or more of fewer layers are compared; of the folders given, {len(full)} "
            f"{'is' if len(full) == 1 else 'are'} of the full depth and {len(cut)} of fewer layers."
        )
    if len(of := {study.source["cut"]["of"] for study in cut}) > 1:
        raise UserError(f"the bases were cut from models of {' and '.join(map(str, sorted(of)))} layers.")
    depths = [Depth(full[0], of.pop(), full[0].source["healed"])]
    depths += [Depth(study, study.source["cut"]["layers"], study.source["healed"]) for study in cut]
    layers = [depth.layers for depth in depths]
    if twice := [number for number in layers if layers.count(number) > 1]:
        raise UserError(f"two studies are of {twice[0]} layers.")
    for depth in depths[1:]:
        check_alike(full[0], depth.study, but_for="the depth of their bases", allowed=ALLOWED)
    return sorted(depths, key=lambda depth: -depth.layers)


def measure_depths(depths: list[Depth]) -> list[DepthGap]:
    """Measure the gaps of each variant but the baseline at each depth, the full one first, and apply the rule.

    Raises:
        UserError: the params have no margin for the loss.
    """
    full = depths[0]
    margin, about = margin_of(full.study), about_items(full.study)
    gaps = [_gap(variant, depth, full, about) for variant in others_of(full.study) for depth in depths]
    return judged(gaps, margin=margin)


def judged(gaps: list[DepthGap], *, margin: float) -> list[DepthGap]:
    """Put the answers to gaps: the verdicts of `comparison`, with one correction over all that are compared.

    Args:
        margin: nats per token.
    """
    changes = [gap.change_after for gap in gaps if gap.change_after]
    p_values = holm([change.p_value for change in changes])
    p_equivalences = holm([equivalence(change, margin=margin).p_value for change in changes])
    judgments = iter(zip(p_values, p_equivalences, strict=True))
    answered = []
    for gap in gaps:
        if gap.change_after:
            p, p_equivalence = next(judgments)
            word = verdict(
                gap.change_after, p_adjusted=p, p_equivalence=p_equivalence, higher_is_better=False
            )
            gap = replace(gap, p_adjusted=p, answer=ANSWERS[word])
        answered.append(gap)
    return answered


def measure_losses(depths: list[Depth]) -> list[DepthLoss]:
    """The losses of each variant at each depth, before training and after."""
    return [
        DepthLoss(variant, depth.layers, *mean_losses(depth.study, variant))
        for variant in depths[0].study.settings.experiment.variants
        for depth in depths
    ]


def _gap(
    variant: str, depth: Depth, full: Depth, about: tuple[np.ndarray, np.ndarray, Bootstrap]
) -> DepthGap:
    before, after = (gap_of(depth.study, variant, form) for form in (BASE, AS_TRAINED))
    gap = DepthGap(
        variant,
        depth,
        before=difference(before, *about, trained=False),
        after=difference(after, *about),
        ratio=ratio_of(after, before, about),
    )
    if depth is full:
        return gap
    return replace(
        gap,
        change_before=difference(before - gap_of(full.study, variant, BASE), *about, trained=False),
        change_after=difference(after - gap_of(full.study, variant, AS_TRAINED), *about),
    )
