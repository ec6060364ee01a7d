"""The comparison of bases of several depths as tables in CSV, as Markdown, and as a page with one figure."""

from dataclasses import asdict

import pandas as pd

from workflow.report.english import listed
from workflow.report.formatting import number, percent
from workflow.report.labels import dataset_name, variant_labels
from workflow.runtime import markdown
from workflow.tools.depths import Depth, DepthGap, DepthLoss
from workflow.tools.gaps import margin_of
from workflow.tools.mechanism_page import (
    IN_UNIT,
    LOSS_HEAD,
    Table,
    gap_panel,
    interval,
    ratio_words,
    render_page,
)
from workflow.tools.moved_studies import SAYS, TASK, UNIT

MARK = "Cut and healed, not a family member as released"
BASES_HEAD = ("layers", "dropped", "parameters", "healing: loss before", "healing: loss after")
HEAD = ("variant", "layers", "gap before training", "gap after training", "after / before",
        "before, less the full depth", "after, less the full depth", "answer")  # fmt: skip


def flat_depths(gaps: list[DepthGap]) -> pd.DataFrame:
    """A row for each variant and depth, in nats per token; less is better."""
    rows = []
    for gap in gaps:
        row = {"variant": gap.variant, "layers": gap.depth.layers, "parameters": gap.depth.parameters}
        row |= {"base": MARK if gap.change_after else "healed, not cut", "task": TASK, "unit": UNIT}
        for name in ("before", "after", "ratio", "change_before", "change_after"):
            part = getattr(gap, name)
            row |= {
                f"{name}_{key}": getattr(part, key, None)
                for key in SAYS
                if key != "p_value" or name != "ratio"
            }
        row |= {"p_adjusted": gap.p_adjusted, "answer": gap.answer, "confidence": gap.after.confidence}
        rows.append(row | {"seeds": gap.after.seeds, "items": gap.after.items, "groups": gap.after.groups})
    return pd.DataFrame(rows)


def flat_depth_losses(losses: list[DepthLoss]) -> pd.DataFrame:
    """A row for each variant and depth, in nats per token; less is better."""
    return pd.DataFrame([asdict(loss) for loss in losses]).assign(task=TASK, unit=UNIT)


def answers(gaps: list[DepthGap]) -> list[str]:
    """A sentence on each variant at each depth but the full one."""
    labels = variant_labels(gaps[0].depth.study.settings)
    full = gaps[0].depth.layers
    return [
        f"{labels[gap.variant]}, {gap.depth.layers} layers of {full}: {gap.answer}. After training the gap changes by "
        f"{interval(gap.change_after)} {UNIT}."
        for gap in gaps
        if gap.change_after
    ]


def _method(gaps: list[DepthGap], depths: list[Depth]) -> list[str]:
    """What was compared, and by which rule, as paragraphs."""
    full, one = depths[0], gaps[0].after
    settings, healed = full.study.settings, full.healed
    device = next(iter(full.study.trained.values()))[0].precision.device_name
    return [
        f"{MARK}: from one base a block of layers in the middle was dropped, and every depth, the full one too, was then trained "
        f"in full on {healed['rows']:,} rows of {dataset_name(settings.dataset)} that no split of the study uses "
        f"({healed['steps']:,} steps at {healed['learning_rate']:g}, one healing for each depth). A model that was trained at such a "
        "size from the start is another one.",
        f"{len(settings.experiment.seeds)} seeds; {one.items:,} test items with {one.groups:,} different instructions; {device}. "
        f"A gap is the held-out loss of a variant less that of {settings.experiment.baseline} on the same base, in {UNIT}; less is "
        f"better. Intervals are at {percent(one.confidence)}. Items and seeds are paired across depths. No interval has the "
        "variance over healings in it.",
        f"The rule, set before any run, for the gap after training less that at the full depth: equal, if it is proven to lie within "
        f"{margin_of(full.study):g} of zero; else larger or smaller, if it differs from zero; else undecided. Both tests at "
        f"{percent(1 - one.confidence)}, with Holm’s correction over all variants and depths.",
    ]


def _rows(gaps: list[DepthGap]) -> list[list[str]]:
    labels = variant_labels(gaps[0].depth.study.settings)
    return [
        [
            labels[gap.variant],
            str(gap.depth.layers),
            interval(gap.before),
            interval(gap.after),
            ratio_words(gap.ratio),
            interval(gap.change_before) if gap.change_before else "",
            interval(gap.change_after) if gap.change_after else "",
            gap.answer or "",
        ]
        for gap in gaps
    ]


def _base_rows(depths: list[Depth]) -> list[list[str]]:
    return [
        [
            str(depth.layers),
            str(depths[0].layers - depth.layers),
            f"{depth.parameters:,}",
            number(depth.healed["validation_loss_before"], 4),
            number(depth.healed["validation_loss_after"], 4),
        ]
        for depth in depths
    ]


def _loss_rows(losses: list[DepthLoss], depths: list[Depth]) -> list[list[str]]:
    labels = variant_labels(depths[0].study.settings)
    return [
        [labels[loss.variant], f"{loss.layers} layers", number(loss.before, 4), number(loss.after, 4)]
        for loss in losses
    ]


def tables(gaps: list[DepthGap], losses: list[DepthLoss], depths: list[Depth]) -> list[Table]:
    """The tables of the page."""
    return [
        Table(
            "bases",
            f"{MARK.lower()}; losses of the validation rows, {IN_UNIT}",
            BASES_HEAD,
            _base_rows(depths),
        ),
        Table("gaps to 16 bits", IN_UNIT, HEAD, _rows(gaps)),
        Table("losses on each base", IN_UNIT, LOSS_HEAD, _loss_rows(losses, depths)),
    ]


def title(depths: list[Depth]) -> str:
    return f"How the 4-bit gap changes with depth: {listed([depth.layers for depth in depths])} layers"


def as_markdown(gaps: list[DepthGap], losses: list[DepthLoss], depths: list[Depth]) -> str:
    """Answers, tables, and how they were made."""
    parts = [
        f"# {title(depths)}",
        "\n".join(f"- {markdown.escaped(answer)}" for answer in answers(gaps)),
        *(markdown.escaped(text) for text in _method(gaps, depths)),
    ]
    for table in tables(gaps, losses, depths):
        parts += [f"{table.caption.capitalize()} ({table.note}):", markdown.table(table.head, table.rows)]
    return "\n\n".join(parts) + "\n"


def render(gaps: list[DepthGap], losses: list[DepthLoss], depths: list[Depth]) -> str:
    """The page as HTML. The same studies give the same bytes."""
    labels = variant_labels(depths[0].study.settings)
    rows = [
        (
            f"{labels[variant]}, {moment} training",
            [getattr(gap, moment) for gap in gaps if gap.variant == variant],
        )
        for variant in dict.fromkeys(gap.variant for gap in gaps)
        for moment in ("before", "after")
    ]
    return render_page(
        title(depths),
        answers=answers(gaps),
        method=_method(gaps, depths),
        panel=gap_panel(rows, [f"{depth.layers} layers" for depth in depths]),
        tables=tables(gaps, losses, depths),
        command="depths",
        studies=[depth.study for depth in depths],
    )
