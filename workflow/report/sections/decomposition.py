"""Decomposition: how much of a difference was there before training, and how much after it."""

from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from workflow.comparison.model import Contrast, Part
from workflow.report import english, formatting
from workflow.report.drawing import INK, MUTED, RULE, Panel, color_of, draw_svg, put_worse_left, write_at_side
from workflow.report.english import (
    Change,
    change,
    decimals_for,
    difference_axis_label,
    form_name,
    quality_name,
)
from workflow.report.model import Facts, Variant


@dataclass(frozen=True)
class PartRow:
    part: str
    form: str
    change: Change


def decomposition(facts: Facts) -> list[tuple[str, list[PartRow]]]:
    """The parts of each quantized variant's difference to the baseline, in the primary metric."""
    rows: dict[str, list[PartRow]] = {}
    least = english.decimals_for(facts, facts.primary)
    for part in facts.compared.decomposition:
        contrast = facts.contrast(part.kind, part.variant, part.form, facts.primary)
        if contrast and (part.task, part.metric) == facts.primary:
            decimals = max(least, formatting.decimals_of(part.low, part.high))
            form = english.form_name(part.form) if part.kind == "form" else ""
            row = PartRow(part.part, form, english.change(facts, contrast, decimals))
            rows.setdefault(part.variant, []).append(row)
    return [(variant.label, rows[variant.name]) for variant in facts.variants if variant.name in rows]


def waterfall_panels(facts: Facts) -> list[Panel]:
    """A waterfall per quantized variant: damage of the base, recovery, the rest, and each other serving form."""
    by_variant: dict[str, list[tuple[Part, Contrast]]] = {}
    for part in facts.compared.decomposition:
        contrast = facts.contrast(part.kind, part.variant, part.form, facts.primary)
        if contrast and (part.task, part.metric) == facts.primary:
            by_variant.setdefault(part.variant, []).append((part, contrast))
    waterfalls = [
        (variant, by_variant[variant.name]) for variant in facts.variants if variant.name in by_variant
    ]
    ends = [
        _starts(parts)[part.kind] + end
        for _, parts in waterfalls
        for part, _ in parts
        for end in (0, part.value, part.low, part.high)
    ]
    return [_waterfall(facts, variant, parts, min(ends), max(ends)) for variant, parts in waterfalls]


def _starts(parts: list[tuple[Part, Contrast]]) -> dict[str, float]:
    """The start of the bar of each kind of part. A step starts at the end of the part that it changes."""
    value = {part.kind: part.value for part, _ in parts if part.kind != "form"}
    left = value.get("to_baseline", 0.0)
    return {"base_to_base": 0.0, "recovery": value.get("base_to_base", 0.0), "to_baseline": 0.0, "form": left}


def _waterfall(
    facts: Facts, variant: Variant, parts: list[tuple[Part, Contrast]], lowest: float, highest: float
) -> Panel:
    first, color = parts[0][1], color_of(variant)
    margin = first.equivalence.margin if first.equivalence else None
    totals = {"base_to_base", "to_baseline"}  # their bars start at zero
    starts = _starts(parts)
    least = decimals_for(facts, facts.primary)
    row = 32
    height = row * len(parts)

    def draw(axes: Axes) -> None:
        if margin:
            axes.axvspan(-margin, margin, color=RULE, alpha=0.7, linewidth=0)
        axes.axvline(0, color=MUTED, linewidth=1.2)
        for index, (part, contrast) in enumerate(parts):
            start, y = starts[part.kind], row * index + 22
            whole = part.kind == "to_baseline"
            axes.barh(y, part.value, left=start, height=9, color=color, alpha=1 if whole else 0.5)
            axes.plot([start + part.low, start + part.high], [y, y], color=INK, linewidth=1.3)
            if part.kind not in totals:
                axes.plot([start] * 2, [y - 7, y + 7], color=color, linewidth=1.2)
            name = f"Served {form_name(part.form)}" if part.kind == "form" else part.part
            write_at_side(axes, y - 7, name, weight="bold" if whole else "normal")
            write_at_side(axes, y - 7, f"{change(facts, contrast, least).value}, {part.verdict}", right=True)
        axes.set_ylim(height + 4, 0)
        axes.set_yticks([])
        axes.grid(False, axis="y")
        gap = 0.06 * (highest - lowest) or 1.0
        axes.set_xlim(lowest - gap, highest + gap)
        put_worse_left(axes, higher_is_better=first.higher_is_better)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(difference_axis_label(first))

    alt = f"{variant.label}: parts of the difference to {facts.baseline.label} in {quality_name(facts.primary)}. "
    for part, contrast in parts:
        difference = change(facts, contrast, least)
        title = f"{part.part}, {form_name(part.form)}" if part.kind == "form" else part.part
        alt += f"{title}: {difference.value}, interval {difference.interval}, {difference.verdict}. "
    return Panel(
        variant.label, draw_svg(f"waterfall-{variant.position}", draw, alt.strip(), height=height + 52)
    )


@dataclass(frozen=True)
class Decomposition:
    """The parts of each variant's difference."""

    parts: list[tuple[str, list[PartRow]]]  # by variant
    panels: list[Panel]


def section(facts: Facts) -> Decomposition:
    """The content of this section's template."""
    return Decomposition(parts=decomposition(facts), panels=waterfall_panels(facts))
