"""How a gap between two variants changes from one pair of them to another, in a finished study (docs/study.md, Curves)."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from workflow.comparison.inference import Difference, difference
from workflow.params.model import Repair
from workflow.runtime.errors import UserError, suggestion
from workflow.runtime.forms import variant_and_form
from workflow.tools.gaps import about_items, margin_of
from workflow.tools.moved_studies import SAYS, TASK, UNIT, Study

Answer = Literal["larger", "smaller", "none that matters", "undecided"]


@dataclass(frozen=True)
class Change:
    """The gap of one pair of `comparison.repairs` less that of another, in nats per token.

    Attributes:
        first, last: the names of the two pairs.
        gaps: the gap of each: the loss of its faulty variant less that of its repaired one.
        change: the last less the first, paired over seeds and items.
    """

    first: str
    last: str
    gaps: tuple[Difference, Difference]
    change: Difference
    answer: Answer


def measure_changes(study: Study, asked: list[tuple[str, str]]) -> list[Change]:
    """Measure how the gap changes from the first to the last of each two pairs.

    Raises:
        UserError: the study's params have no such pair, or no margin for the loss.
    """
    margin, about = margin_of(study), about_items(study)
    changes = []
    for names in asked:
        first, last = (_gap(study, _pair(study, name)) for name in names)
        change = difference(last - first, *about)
        gaps = (difference(first, *about), difference(last, *about))
        changes.append(Change(*names, gaps, change, answer(change, margin=margin)))
    return changes


def answer(change: Difference, *, margin: float) -> Answer:
    """Apply the rule of the preset curves.

    Args:
        margin: nats per token.
    """
    if -margin < change.low and change.high < margin:
        return "none that matters"
    if change.low > 0:
        return "larger"
    if change.high < 0:
        return "smaller"
    return "undecided"


def flat_changes(changes: list[Change]) -> pd.DataFrame:
    """A row for each change, in nats per token; less is better."""
    rows = []
    for one in changes:
        row = {"first": one.first, "last": one.last, "task": TASK, "unit": UNIT}
        for name, part in zip(("gap_first", "gap_last", "change"), (*one.gaps, one.change), strict=True):
            row |= {f"{name}_{key}": getattr(part, key) for key in SAYS}
        row |= {"answer": one.answer, "confidence": one.change.confidence}
        rows.append(row | {"seeds": one.change.seeds, "items": one.change.items, "groups": one.change.groups})
    return pd.DataFrame(rows)


def _pair(study: Study, name: str) -> Repair:
    pairs = study.settings.comparison.repairs
    if name not in pairs:
        raise UserError(f"comparison.repairs of {study.folder} has no {name}{suggestion(name, pairs)}.")
    return pairs[name]


def _gap(study: Study, pair: Repair) -> np.ndarray:
    """The faulty arm's loss less the repaired one's, in nats: [seeds, items]."""
    faulty, repaired = (study.table(*variant_and_form(served)) for served in (pair.faulty, pair.repaired))
    return faulty.numerators - repaired.numerators
