"""Forgetting: what training changed on standard tasks, which are not about the data that was trained on."""

from dataclasses import dataclass

from workflow.params import OWN_TASKS
from workflow.report import english
from workflow.report.english import Change
from workflow.report.formatting import Number, number
from workflow.report.model import Facts
from workflow.report.sections.quality import tally
from workflow.runtime.forms import AS_TRAINED, BASE


@dataclass(frozen=True)
class ForgettingRow:
    """A variant in a serving form, before and after training."""

    label: str
    form: str
    as_trained: bool
    before: Number
    after: Number
    change: Change


@dataclass(frozen=True)
class ForgettingBlock:
    """One metric of a standard task."""

    name: str
    direction: str
    items: str
    tally: str  # the verdicts on the variants as trained, in short
    rows: list[ForgettingRow]


@dataclass(frozen=True)
class Forgetting:
    """A block for each metric of a standard task."""

    blocks: list[ForgettingBlock]


def section(facts: Facts) -> Forgetting:
    """The content of this section's template."""
    metrics = [metric for metric in facts.compared_metrics if metric[0] not in OWN_TASKS]
    return Forgetting([_block(facts, metric) for metric in metrics])


def _block(facts: Facts, metric: tuple[str, str]) -> ForgettingBlock:
    """The changes in one metric against the untouched base in each variant's own precision."""
    rows, contrasts, decimals = [], [], english.decimals_for(facts, metric)
    score = None
    for variant in facts.variants:
        for form in facts.forms_of(variant.name):
            contrast = facts.contrast("to_base", variant.name, form, metric)
            base = facts.score(variant.name, BASE, metric)
            score = facts.score(variant.name, form, metric)
            if contrast is None:
                continue
            if form == AS_TRAINED:
                contrasts.append(contrast)
            rows.append(
                ForgettingRow(
                    label=variant.label,
                    form=english.form_name(form),
                    as_trained=form == AS_TRAINED,
                    before=facts.cite(number(base.value, decimals), base, "value"),
                    after=facts.cite(number(score.value, decimals), score, "value"),
                    change=english.change(facts, contrast, decimals),
                )
            )
    return ForgettingBlock(
        name=english.metric_title(metric, score),
        direction=english.direction(score.higher_is_better),
        items=english.count(score.items, "item"),
        tally=tally(contrasts),
        rows=rows,
    )
