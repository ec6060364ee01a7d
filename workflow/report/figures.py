"""The page's figures: seaborn and matplotlib draw, and the SVG takes its colours from the page's style.

Text stays text, in the page's own font. Every colour of a drawing is one of a few stand-ins, which
become CSS variables, so that one drawing suits light, dark and print.
"""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass

import matplotlib
import seaborn
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from workflow.report.facts import Facts, Variant
from workflow.report.formatting import number, quantity, ratio, signed, significant
from workflow.report.words import (
    decimals_for,
    direction,
    held_as_float32,
    interval,
    listed,
    metric_name,
    verdict,
    weights_in_16_bits,
)

INK, MUTED, RULE, PAPER = "#1a1a1b", "#6a6a6b", "#d8d8d9", "#fefefd"
# The colours of seaborn's colour-blind palette that keep enough contrast, in light and dark.
PALETTE = [seaborn.color_palette("colorblind").as_hex()[index] for index in (0, 1, 2, 3, 4, 5, 9, 7)]
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "h")
STYLE = {INK: "currentColor", MUTED: "var(--muted)", RULE: "var(--rule)", PAPER: "var(--paper)"} | {
    colour: f"var(--variant-{index})" for index, colour in enumerate(PALETTE)
}
WIDTH = 345  # units, about one CSS pixel each
ROW = 54
OVER, UNDER = 0.27, 0.17  # of a row: how far from its middle the texts above and below it stand
BAR_SHARE = 0.64  # of the width, for the longest bar; the rest is for its number
SETTINGS = {
    "svg.fonttype": "none",
    "font.size": 11.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": RULE,
    "axes.facecolor": "none",
    "axes.labelpad": 6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "xtick.color": RULE,
    "xtick.labelcolor": INK,
    "xtick.labelsize": 11,
    "ytick.color": RULE,
    "ytick.labelcolor": INK,
    "ytick.labelsize": 11,
    "ytick.left": False,
}


@dataclass(frozen=True)
class Panel:
    """One drawing with the heading that stands over it."""

    title: str
    svg: Markup


def colour_of(variant: Variant) -> str:
    return PALETTE[variant.position % len(PALETTE)]


def marker_of(variant: Variant) -> str:
    return MARKERS[variant.position % len(MARKERS)]


def quality_panels(facts: Facts) -> list[Panel]:
    """For each metric, before and after training and, with other variants, the difference to the baseline."""
    panels = []
    for metric in facts.quality_metrics:
        panels.append(_before_after(facts, metric))
        if any(facts.quality_of(other.name, metric) for other in facts.others):
            panels.append(_differences(facts, metric))
    return panels


def curve_panels(facts: Facts) -> list[Panel]:
    """Loss and token accuracy over the optimizer steps, a line per run; points are the validation rows."""
    return [
        _curves(facts, "loss", "validation_loss", "Loss, in nats per token (lower is better)", 1),
        _curves(facts, "token_accuracy", "validation_token_accuracy",
                "Token accuracy, as a percentage (higher is better)", 100),
    ]  # fmt: skip


def cost_panels(facts: Facts) -> list[Panel]:
    """Bars of the costs that were measured: memory, and speed with its quartiles."""
    return [
        _bars(facts, metric)
        for metric in ("peak_memory", "weights", "training_speed", "step_time")
        if metric in facts.cost_metrics
    ]


def legend(facts: Facts) -> list[tuple[str, Markup]]:
    """Each variant's label and its line and marker, as a small drawing for the page's own legend."""
    entries = []
    for variant in facts.variants:

        def draw(axes: Axes, variant: Variant = variant) -> None:
            axes.plot([0, 1], [0, 0], color=colour_of(variant), linewidth=1.5)
            axes.plot(0.5, 0, color=colour_of(variant), marker=marker_of(variant), markersize=6)
            axes.set_axis_off()

        entries.append(
            (variant.label, _svg(f"legend-{variant.position}", draw, "", width=30, height=12, bare=True))
        )
    return entries


def _before_after(facts: Facts, metric: tuple[str, str]) -> Panel:
    shown = [(v, q) for v in facts.variants if (q := facts.quality_of(v.name, metric))]
    first, decimals = shown[0][1], decimals_for(facts, metric)

    def draw(axes: Axes) -> None:
        seaborn.stripplot(
            x=[value for _, q in shown for value in q.per_seed.values()],
            y=[v.label for v, q in shown for _ in q.per_seed],
            hue=[v.label for v, q in shown for _ in q.per_seed],
            palette=[colour_of(v) for v, _ in shown],
            order=[v.label for v, _ in shown],
            jitter=False,
            size=5,
            alpha=0.45,
            legend=False,
            ax=axes,
        )
        for row, (variant, quality) in enumerate(shown):
            colour, marker = colour_of(variant), marker_of(variant)
            axes.annotate(
                "",
                xy=(quality.value, row),
                xytext=(quality.base_value, row),
                arrowprops={
                    "arrowstyle": "-|>",
                    "color": colour,
                    "linewidth": 1.2,
                    "shrinkA": 5,
                    "shrinkB": 7,
                },
            )
            low, high = quality.base_value + quality.to_base.low, quality.base_value + quality.to_base.high
            axes.plot([low, high], [row, row], color=colour, linewidth=3, alpha=0.55, solid_capstyle="butt")
            axes.plot(
                quality.base_value, row, color=colour, marker=marker, markersize=8, markerfacecolor=PAPER
            )
            axes.plot(quality.value, row, color=colour, marker=marker, markersize=8)
            _over_row(axes, row, variant.label)
            ends = f"{number(quality.base_value, decimals)} → {number(quality.value, decimals)}"
            _over_row(axes, row, ends, right=True)
        _rows(axes, len(shown))
        axes.margins(x=0.08)
        axes.set_xlabel(f"{first.unit} ({direction(first.higher_is_better)})")

    alt = f"{metric_name(first.task)} in {first.unit}, before and after training. " + " ".join(
        f"{v.label}: from {number(q.base_value, decimals)} to {number(q.value, decimals)}, the mean over "
        f"seeds ({listed([f'seed {seed} {number(value, decimals)}' for seed, value in q.per_seed.items()])})."
        for v, q in shown
    )
    title = f"Before and after training, {first.unit}"
    return Panel(title, _svg(f"before-{'-'.join(metric)}", draw, alt, height=len(shown) * ROW + 52))


def _differences(facts: Facts, metric: tuple[str, str]) -> Panel:
    shown = [
        (v, q, q.to_baseline)
        for v in facts.others
        if (q := facts.quality_of(v.name, metric)) and q.to_baseline
    ]
    first, decimals = shown[0][1], decimals_for(facts, metric)
    baseline = facts.baseline.label

    def draw(axes: Axes) -> None:
        for row, (variant, _, difference) in enumerate(shown):
            colour = colour_of(variant)
            axes.plot([0, 0], [row - 0.2, row + 0.15], color=MUTED, linewidth=1.4)
            axes.plot([difference.low, difference.high], [row, row], color=colour, linewidth=2)
            axes.plot(difference.value, row, color=colour, marker=marker_of(variant), markersize=8)
            _over_row(axes, row, variant.label)
            shown_difference = f"{signed(difference.value, decimals)} ({interval(difference, decimals)})"
            axes.text(
                1, row + UNDER, shown_difference, ha="right", va="top", transform=axes.get_yaxis_transform()
            )
        _rows(axes, len(shown))
        reach = max(abs(end) for _, _, d in shown for end in (d.low, d.high)) or 1
        axes.set_xlim(-1.15 * reach, 1.15 * reach)
        sides = ("worse", "better") if first.higher_is_better else ("better", "worse")
        gap = "\N{EM SPACE}"
        axes.set_xlabel(f"← {sides[0]}{gap}{gap}{first.unit}{gap}{gap}{sides[1]} →")

    alt = f"Difference to {baseline} in {first.unit}. " + " ".join(
        f"{v.label}: interval {interval(d, decimals)}, {verdict(d, first.higher_is_better)}."
        for v, _, d in shown
    )
    title = f"Difference to {baseline}, {first.unit}"
    return Panel(title, _svg(f"difference-{'-'.join(metric)}", draw, alt, height=len(shown) * ROW + 52))


def _curves(facts: Facts, column: str, validation_column: str, title: str, scale: int) -> Panel:
    palette = {variant.name: colour_of(variant) for variant in facts.variants}
    markers = {variant.name: marker_of(variant) for variant in facts.variants}
    history = facts.history.assign(shown=facts.history[column] * scale)
    validation = facts.validation.assign(shown=facts.validation[validation_column] * scale)

    def draw(axes: Axes) -> None:
        common = {
            "x": "step",
            "y": "shown",
            "hue": "variant",
            "palette": palette,
            "legend": False,
            "ax": axes,
        }
        seaborn.lineplot(history, units="seed", estimator=None, linewidth=1.1, alpha=0.85, **common)
        seaborn.scatterplot(
            validation,
            style="variant",
            markers=markers,
            s=34,
            edgecolor=PAPER,
            linewidth=0.6,
            zorder=3,
            **common,
        )
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.set_ylabel("%" if scale == 100 else "nats per token")
        axes.set_xlabel("optimizer step")

    first, last = history["step"].min(), history["step"].max()
    parts = []
    for variant in facts.variants:
        for seed, run in validation[validation["variant"] == variant.name].groupby("seed"):
            ends = significant(run["shown"].iloc[0]), significant(run["shown"].iloc[-1])
            parts.append(f"{variant.label}, seed {seed}: validation rows from {ends[0]} to {ends[1]}.")
    alt = f"{title}, over the optimizer steps {first} to {last}. " + " ".join(parts)
    return Panel(title, _svg(f"curve-{column.replace('_', '-')}", draw, alt, height=260))


def _bars(facts: Facts, metric: str) -> Panel:
    shown = [(v, c) for v in facts.variants if (c := facts.cost_of(v.name, metric))]
    first = shown[0][1]
    sixteen = weights_in_16_bits(facts) if metric == "weights" else None

    def draw(axes: Axes) -> None:
        seaborn.barplot(
            x=[cost.value for _, cost in shown],
            y=[variant.label for variant, _ in shown],
            hue=[variant.label for variant, _ in shown],
            palette=[colour_of(variant) for variant, _ in shown],
            saturation=1,
            width=0.3,
            errorbar=None,
            legend=False,
            ax=axes,
        )
        for row, (variant, cost) in enumerate(shown):
            if metric == "peak_memory":
                _inner_bars(axes, facts, variant, row)
            if sixteen and variant in held_as_float32(facts):
                axes.plot(
                    [sixteen] * 2, [row - 0.22, row + 0.22], color=INK, linewidth=1.6, linestyle=(0, (2, 2))
                )
            if cost.low is not None and cost.high is not None:
                axes.plot([cost.low, cost.high], [row, row], color=INK, linewidth=1.6)
            relative = "" if variant.is_baseline else f" ({ratio(cost.ratio_to_baseline)})"
            _over_row(axes, row, variant.label)
            axes.annotate(
                quantity(cost.value, cost.unit) + relative,
                xy=(max(cost.value, cost.high or 0), row),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
            )
        _rows(axes, len(shown))
        right = max(max(cost.value, cost.high or 0) for _, cost in shown)
        axes.set_xlim(0, right / BAR_SHARE)
        axes.set_xlabel(f"{first.unit} ({direction(first.higher_is_better)})")

    alt = f"{metric_name(metric)} in {first.unit}. " + " ".join(_bar_words(v, c) for v, c in shown)
    if sixteen:
        alt += f" A dashed mark shows {quantity(sixteen, 'GiB')}, what the parameters would take in 16 bits."
    title = metric_name(metric)
    return Panel(title, _svg(f"cost-{metric.replace('_', '-')}", draw, alt, height=len(shown) * ROW + 52))


def _inner_bars(axes: Axes, facts: Facts, variant: Variant, row: int) -> None:
    """Pale ends of a memory bar: what was held before training, and before the base was loaded."""
    for inner in ("memory_after_load", "memory_before_load"):
        cost = facts.cost_of(variant.name, inner)
        if cost:
            axes.barh(row, cost.value, height=0.3, color=PAPER, alpha=0.4)


def _bar_words(variant: Variant, cost) -> str:
    words = f"{variant.label}: {quantity(cost.value, cost.unit)}"
    if cost.low is not None and cost.high is not None:
        words += f" (quartiles {significant(cost.low)} to {significant(cost.high)})"
    if not variant.is_baseline:
        words += f", {ratio(cost.ratio_to_baseline)} the baseline"
    return words + "."


def _over_row(axes: Axes, row: int, text: str, *, right: bool = False) -> None:
    """Write over a row, at its left end or at its right one."""
    x, align = (1, "right") if right else (0, "left")
    axes.text(x, row - OVER, text, ha=align, va="bottom", transform=axes.get_yaxis_transform())


def _rows(axes: Axes, rows: int) -> None:
    axes.set_ylim(rows - 0.55, -0.75)
    axes.set_yticks([])
    axes.grid(False, axis="y")
    axes.set_ylabel("")
    axes.xaxis.set_major_locator(MaxNLocator(5))


def _svg(
    key: str,
    draw: Callable[[Axes], None],
    alt: str,
    *,
    height: float,
    width: float = WIDTH,
    bare: bool = False,
) -> Markup:
    """Draw, and return an `<svg>` to stand inside the page; `key` keeps its ids apart from others'."""
    with matplotlib.rc_context(SETTINGS | {"svg.hashsalt": key}):
        figure = Figure(figsize=(width / 72, height / 72), layout=None if bare else "constrained")
        figure.patch.set_visible(False)
        axes = figure.add_axes((0, 0, 1, 1)) if bare else figure.add_subplot()
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = (
        re.sub(r'\s+(xmlns(:\w+)?|version|width|height)="[^"]*"', "", svg[: svg.index(">")])
        + svg[svg.index(">") :]
    )
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{key}-", svg)
    svg = re.sub(r" font-family: [^;]*;", "", svg)
    svg = re.sub(r"\s*\n\s*", "\n", svg)
    for colour, style in STYLE.items():
        svg = svg.replace(colour, style)
    role = Markup('role="img" aria-label="{}"').format(alt) if alt else 'aria-hidden="true"'
    return Markup(svg.strip().replace("<svg", f"<svg {role}", 1))
