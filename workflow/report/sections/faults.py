"""Faults: the cost of each fault of the recipe."""

from dataclasses import dataclass

from matplotlib.axes import Axes

from workflow.comparison.model import ALL
from workflow.report import english, formatting
from workflow.report.drawing import (
    PAPER,
    ROW,
    Panel,
    color_of,
    draw_svg,
    marker_of,
    put_worse_left,
    rows_axis,
    write_over_row,
)
from workflow.report.english import Change, decimals_for, metric_title, quality_name, unit_label
from workflow.report.formatting import number
from workflow.report.model import Facts


@dataclass(frozen=True)
class RepairRow:
    """The difference of a fault in one metric."""

    metric: str
    direction: str
    faulty: str
    repaired: str
    change: Change


@dataclass(frozen=True)
class RepairBlock:
    """A fault that was switched alone, with a row per metric."""

    name: str
    faulty: str
    repaired: str
    rows: list[RepairRow]


def repair_blocks(facts: Facts) -> list[RepairBlock]:
    """A block per fault, with all metrics."""
    blocks: dict[str, RepairBlock] = {}
    for contrast in facts.compared.contrasts:
        if contrast.kind != "repair" or contrast.subset != ALL:
            continue
        metric = (contrast.task, contrast.metric)
        faulty = facts.score(contrast.variant, contrast.form, metric)
        repaired = facts.score(*contrast.other.split("/"), metric)
        decimals = formatting.decimals_of(contrast.difference.low, contrast.difference.high)
        block = blocks.setdefault(
            contrast.name,
            RepairBlock(
                name=contrast.name.replace("_", " ").capitalize(),
                faulty=english.arm_name(facts, f"{contrast.variant}/{contrast.form}"),
                repaired=english.arm_name(facts, contrast.other),
                rows=[],
            ),
        )
        block.rows.append(
            RepairRow(
                metric=metric_title(metric, faulty),
                direction=english.direction(contrast.higher_is_better),
                faulty=facts.cite(number(faulty.value, decimals), faulty, "value"),
                repaired=facts.cite(number(repaired.value, decimals), repaired, "value"),
                change=english.change(facts, contrast, decimals),
            )
        )
    return list(blocks.values())


def repair_panel(facts: Facts) -> Panel | None:
    """Each fault and its repair, in the primary metric. None if no fault was switched."""
    repairs = [
        (c, facts.score(c.variant, c.form, facts.primary), facts.score(*c.other.split("/"), facts.primary))
        for c in facts.compared.contrasts
        if c.kind == "repair" and c.subset == ALL and (c.task, c.metric) == facts.primary
    ]
    if not repairs:
        return None
    variants = {variant.name: variant for variant in facts.variants}
    decimals = decimals_for(facts, facts.primary)

    def draw(axes: Axes) -> None:
        for row, (contrast, faulty, repaired) in enumerate(repairs):
            color, marker = (look(variants[contrast.variant]) for look in (color_of, marker_of))
            difference = contrast.difference
            axes.annotate("", xy=(repaired.value, row), xytext=(faulty.value, row),
                          arrowprops={"arrowstyle": "-|>", "color": color, "linewidth": 1.2, "shrinkA": 5, "shrinkB": 7})  # fmt: skip
            axes.plot(
                [repaired.value + difference.low, repaired.value + difference.high],
                [row] * 2,
                color=color,
                linewidth=3,
                alpha=0.55,
                solid_capstyle="butt",
            )
            axes.plot(faulty.value, row, color=color, marker=marker, markersize=8, markerfacecolor=PAPER)
            axes.plot(repaired.value, row, color=color, marker=marker, markersize=8)
            write_over_row(axes, row, contrast.name.replace("_", " ").capitalize())
            write_over_row(
                axes,
                row,
                f"{number(faulty.value, decimals)} → {number(repaired.value, decimals)}, {contrast.verdict}",
                right=True,
            )
        rows_axis(axes, len(repairs))
        axes.margins(x=0.08)
        put_worse_left(axes, higher_is_better=repairs[0][1].higher_is_better)
        axes.set_xlabel(unit_label(repairs[0][1]))

    alt = f"{quality_name(facts.primary)} with each fault and without it. " + " ".join(
        f"{c.name.replace('_', ' ').capitalize()}: from {number(a.value, decimals)} with the fault to "
        f"{number(b.value, decimals)} without; the fault is {c.verdict}."
        for c, a, b in repairs
    )
    title = f"With the fault, and repaired, {repairs[0][1].unit}"
    return Panel(title, draw_svg("repairs", draw, alt, height=len(repairs) * ROW + 52))


@dataclass(frozen=True)
class Faults:
    """The table and figure of the faults."""

    blocks: list[RepairBlock]
    panel: Panel | None


def section(facts: Facts) -> Faults:
    """The content of this section's template."""
    return Faults(blocks=repair_blocks(facts), panel=repair_panel(facts))
