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
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, StrMethodFormatter

from workflow.comparison import Contrast, Score
from workflow.report.facts import AS_TRAINED, BASE, Device, Facts, MeasuredVariant, Point, Variant
from workflow.report.formatting import number, quantity, ratio, significant
from workflow.report.words import (
    COMPONENTS,
    block_name,
    change,
    cost_name,
    decimals_for,
    deviation,
    direction,
    form_name,
    held_as_float32,
    listed,
    quality_name,
    rows_by_length,
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
FORM_ROW, HEAD_ROW = 36, 24  # of the differences, where a variant has a row per form
BAR = 16  # of the memory by component, a bar of one variant
OVER = 0.27  # of a row: how far from its middle the texts above it stand
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


def colour_of(variant: Variant | MeasuredVariant) -> str:
    return PALETTE[variant.position % len(PALETTE)]


def marker_of(variant: Variant | MeasuredVariant) -> str:
    return MARKERS[variant.position % len(MARKERS)]


def quality_panels(facts: Facts) -> list[Panel]:
    """The primary metric before and after training, and each form's difference to the baseline."""
    panels = []
    if all(facts.score(facts.baseline.name, form, facts.primary) for form in (BASE, AS_TRAINED)):
        panels.append(_before_after(facts))
    if _shown_differences(facts):
        panels.append(_differences(facts))
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


def hardware_panels(block: Device, key: str) -> list[Panel]:
    """Of a device and shape: speed over the tokens of a pass, speed over memory, and memory by component."""
    panels = []
    if any(point.measured for point in block.grid):
        panels += [_throughput(block, key), _frontier(block, key)]
    if block.shared:
        panels.append(_components(block, key))
    return panels


def legend(variants: list[Variant] | list[MeasuredVariant], key: str) -> list[tuple[str, Markup]]:
    """Each variant's label and its line and marker, as a small drawing for the page's own legend."""
    entries = []
    for variant in variants:

        def draw(axes: Axes, variant: Variant | MeasuredVariant = variant) -> None:
            axes.plot([0, 1], [0, 0], color=colour_of(variant), linewidth=1.5)
            axes.plot(0.5, 0, color=colour_of(variant), marker=marker_of(variant), markersize=6)
            axes.set_axis_off()

        entries.append(
            (variant.label, _svg(f"{key}-{variant.position}", draw, "", width=30, height=12, bare=True))
        )
    return entries


def _before_after(facts: Facts) -> Panel:
    metric = facts.primary
    shown: list[tuple[Variant, Score, Score, Contrast | None]] = []
    for variant in facts.variants:
        base, trained = (facts.score(variant.name, form, metric) for form in (BASE, AS_TRAINED))
        if base and trained:
            shown.append(
                (variant, base, trained, facts.contrast("to_base", variant.name, AS_TRAINED, metric))
            )
    first, decimals = shown[0][1], decimals_for(facts, metric)

    def draw(axes: Axes) -> None:
        seaborn.stripplot(
            x=[value for _, _, trained, _ in shown for value in trained.per_seed.values()],
            y=[v.label for v, _, trained, _ in shown for _ in trained.per_seed],
            hue=[v.label for v, _, trained, _ in shown for _ in trained.per_seed],
            palette=[colour_of(v) for v, *_ in shown],
            order=[v.label for v, *_ in shown],
            jitter=False,
            size=5,
            alpha=0.45,
            legend=False,
            ax=axes,
        )
        for row, (variant, base, trained, contrast) in enumerate(shown):
            colour, marker = colour_of(variant), marker_of(variant)
            axes.annotate(
                "",
                xy=(trained.value, row),
                xytext=(base.value, row),
                arrowprops={
                    "arrowstyle": "-|>",
                    "color": colour,
                    "linewidth": 1.2,
                    "shrinkA": 5,
                    "shrinkB": 7,
                },
            )
            if contrast:
                ends = [base.value + contrast.difference.low, base.value + contrast.difference.high]
                axes.plot(ends, [row, row], color=colour, linewidth=3, alpha=0.55, solid_capstyle="butt")
            axes.plot(base.value, row, color=colour, marker=marker, markersize=8, markerfacecolor=PAPER)
            axes.plot(trained.value, row, color=colour, marker=marker, markersize=8)
            _over_row(axes, row, variant.label)
            ends = f"{number(base.value, decimals)} → {number(trained.value, decimals)}"
            _over_row(axes, row, ends, right=True)
        _rows(axes, len(shown))
        axes.margins(x=0.08)
        axes.set_xlabel(_unit(first))

    def seeds(score: Score) -> str:
        return listed([f"seed {seed} {number(value, decimals)}" for seed, value in score.per_seed.items()])

    alt = f"{quality_name(metric)}, before and after training. " + " ".join(
        f"{v.label}: from {number(base.value, decimals)} to {number(trained.value, decimals)}, the mean over "
        f"seeds ({seeds(trained)})."
        for v, base, trained, _ in shown
    )
    title = f"Before and after training, {first.unit}"
    return Panel(title, _svg(f"before-{'-'.join(metric)}", draw, alt, height=len(shown) * ROW + 52))


def _unit(score: Score) -> str:
    if score.higher_is_better is None:
        return score.unit
    return f"{score.unit} ({direction(score.higher_is_better)})"


def _shown_differences(facts: Facts) -> list[tuple[Variant, list[Contrast]]]:
    """Every form's difference to the baseline as trained in the primary metric, by variant."""
    found = [
        (v, [c for form in facts.forms_of(v.name) if (c := facts.to_baseline(v.name, form, facts.primary))])
        for v in facts.variants
    ]
    return [(variant, contrasts) for variant, contrasts in found if contrasts]


def _differences(facts: Facts) -> Panel:
    shown = _shown_differences(facts)
    first, decimals = shown[0][1][0], decimals_for(facts, facts.primary)
    everyone = [contrast for _, contrasts in shown for contrast in contrasts]
    margin = first.equivalence.margin if first.equivalence else None
    baseline = f"{facts.baseline.label}, {form_name(AS_TRAINED)}"
    height = len(shown) * HEAD_ROW + len(everyone) * FORM_ROW

    def draw(axes: Axes) -> None:
        y = 0
        for variant, contrasts in shown:
            y += HEAD_ROW
            _at_side(axes, y - 4, variant.label, weight="bold")
            for contrast in contrasts:
                y += FORM_ROW
                middle = y - 8
                _difference(axes, middle, variant, contrast)
                text = f"{form_name(contrast.form)}: {contrast.verdict}"
                _at_side(axes, middle - 9, text)
                _at_side(axes, middle - 9, change(contrast, decimals).value, right=True)
        axes.set_ylim(height + 4, 0)
        axes.set_yticks([])
        axes.grid(False, axis="y")
        ends = [end for contrast in everyone for end in (contrast.difference.low, contrast.difference.high)]
        reach = max(abs(end) for end in [*ends, margin or 0]) or 1
        axes.set_xlim(-1.15 * reach, 1.15 * reach)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        sides = ("worse", "better") if first.higher_is_better else ("better", "worse")
        gap = "\N{EM SPACE}"
        axes.set_xlabel(f"← {sides[0]}{gap}{gap}{first.unit}{gap}{gap}{sides[1]} →")

    alt = f"Difference to {baseline}, in {first.unit}. "
    if margin:
        alt += f"A band marks the margin of equivalence, {margin:g} either way. "
    for variant, contrasts in shown:
        for contrast in contrasts:
            words = change(contrast, decimals)
            alt += f"{variant.label}, {form_name(contrast.form)}: {words.value}, interval {words.interval}, {words.verdict}. "
    title = f"Difference to {baseline}, {first.unit}"
    return Panel(title, _svg(f"difference-{'-'.join(facts.primary)}", draw, alt.strip(), height=height + 52))


def _difference(axes: Axes, middle: float, variant: Variant, contrast: Contrast) -> None:
    """One interval with its estimate; thick where equivalence is asked of it, over the band of the margin."""
    one, tost, colour = contrast.difference, contrast.equivalence, colour_of(variant)
    if tost:
        axes.barh(middle, 2 * tost.margin, left=-tost.margin, height=15, color=RULE, alpha=0.7)
        axes.plot([tost.low, tost.high], [middle] * 2, color=colour, linewidth=4, solid_capstyle="butt")
    axes.plot([0, 0], [middle - 9, middle + 9], color=MUTED, linewidth=1.2)
    axes.plot([one.low, one.high], [middle] * 2, color=colour, linewidth=1.6)
    axes.plot(one.value, middle, color=colour, marker=marker_of(variant), markersize=7, markeredgecolor=PAPER)


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

    alt = f"{cost_name(metric)} in {first.unit}. " + " ".join(_bar_words(v, c) for v, c in shown)
    if sixteen:
        alt += f" A dashed mark shows {quantity(sixteen, 'GiB')}, what the parameters would take in 16 bits."
    title = cost_name(metric)
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


def _components(block: Device, key: str) -> Panel:
    """The predicted memory as steps, each component beginning where the one before it ends."""
    shown = [(variant, p) for variant in block.variants for p in block.shared if p.variant == variant.name]
    first = shown[0][1]
    names = [name for name in COMPONENTS if any(point.predicted.get(name) for _, point in shown)]
    row = HEAD_ROW + BAR * len(shown)
    height = row * (len(names) + 2)
    right = max(max(point.peak, point.predicted["total"]) for _, point in shown)

    def draw(axes: Axes) -> None:
        below = [0.0] * len(shown)
        for index, title in enumerate([*(COMPONENTS[n] for n in names), "Sum, predicted", "Peak, measured"]):
            top = index * row + HEAD_ROW
            _at_side(axes, top - 3, title)
            for place, (variant, point) in enumerate(shown):
                y, colour = top + BAR * (place + 0.5), colour_of(variant)
                if index < len(names):
                    start, value = below[place], point.predicted.get(names[index], 0)
                    below[place] += value
                else:
                    start, value = 0, point.predicted["total"] if index == len(names) else point.peak
                if index > len(names):
                    axes.barh(y, value, height=BAR * 0.6, facecolor="none", edgecolor=colour, linewidth=1.4)
                else:
                    axes.barh(y, value, left=start, height=BAR * 0.7, color=colour)
                if index >= len(names):
                    ends = [len(names) * row + HEAD_ROW, height]
                    axes.plot([point.peak] * 2, ends, color=colour, linewidth=1, linestyle=(0, (2, 2)))
                axes.annotate(
                    number(value, 2),
                    xy=(start + value, y),
                    xytext=(5, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=10,
                )
        axes.set_ylim(height + 4, 0)
        axes.set_yticks([])
        axes.grid(False, axis="y")
        axes.set_xlim(0, right * 1.18)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel("GiB")

    where = f"{rows_by_length(first)} tokens, {'with' if first.checkpointing else 'without'} checkpointing"
    alt = f"Memory by component, {block_name(block)}, {where}, in GiB. "
    for variant, point in shown:
        parts = [
            f"{COMPONENTS[name].lower()} {significant(point.predicted[name])}"
            for name in names
            if point.predicted.get(name)
        ]
        alt += (
            f"{variant.label}: predicted {listed(parts)}, in all {significant(point.predicted['total'])}; "
            f"measured peak {significant(point.peak)} ({deviation(point)}). "
        )
    title = f"Memory by component at {where}, GiB"
    return Panel(title, _svg(f"{key}-components", draw, alt.strip(), height=height + 52))


def _lines(block: Device) -> list[tuple[MeasuredVariant, bool, list[Point]]]:
    """The measured grid points, by variant and checkpointing, in the order of their tokens."""
    found = []
    for variant in block.variants:
        for checkpointing in (False, True):
            points = [
                point
                for point in block.grid
                if (point.variant, point.checkpointing, point.measured) == (variant.name, checkpointing, True)
            ]
            if points:
                points.sort(key=lambda point: (point.tokens, point.micro_batch_rows))
                found.append((variant, checkpointing, points))
    return found


def _mark(axes: Axes, variant: MeasuredVariant, checkpointing: bool, x: float, y: float) -> None:
    """A grid point; hollow where it was measured with checkpointing."""
    colour = colour_of(variant)
    face, edge = (PAPER, colour) if checkpointing else (colour, PAPER)
    axes.plot(
        x,
        y,
        color=colour,
        marker=marker_of(variant),
        markersize=6.5,
        markerfacecolor=face,
        markeredgecolor=edge,
        zorder=3,
    )


def _throughput(block: Device, key: str) -> Panel:
    lines = _lines(block)

    def draw(axes: Axes) -> None:
        for variant, checkpointing, points in lines:
            colour = colour_of(variant)
            seaborn.lineplot(
                x=[point.tokens for point in points],
                y=[point.speed["median"] for point in points],
                color=colour,
                linestyle=(0, (4, 2)) if checkpointing else "-",
                linewidth=1.4,
                errorbar=None,
                legend=False,
                ax=axes,
            )
            for point in points:
                ends = [point.speed["low"], point.speed["high"]]
                axes.plot([point.tokens] * 2, ends, color=colour, linewidth=1.2)
                _mark(axes, variant, checkpointing, point.tokens, point.speed["median"])
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(
            FixedLocator(sorted({p.tokens for _, _, points in lines for p in points}))
        )
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        _speed_axis(axes)
        axes.set_xlabel("tokens per forward pass (rows × length)")

    title = "Speed over the tokens of a forward pass, useful tokens/s"
    alt = f"{title}, {block_name(block)}. " + " ".join(
        f"{_line_name(variant, checkpointing)}: "
        + listed([f"{significant(p.speed['median'])} at {rows_by_length(p)}" for p in points])
        + "."
        for variant, checkpointing, points in lines
    )
    return Panel(title, _svg(f"{key}-throughput", draw, alt, height=300))


def _line_name(variant: MeasuredVariant, checkpointing: bool) -> str:
    return f"{variant.label}, {'with' if checkpointing else 'without'} checkpointing"


def _speed_axis(axes: Axes) -> None:
    axes.set_ylim(0, None)
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_ylabel("useful tokens/s (higher is better)")


def _frontier(block: Device, key: str) -> Panel:
    """Peak memory and speed of every grid point; a line joins those that no other beats in both."""
    lines = _lines(block)

    def draw(axes: Axes) -> None:
        for variant in block.variants:
            points = [(line[1], point) for line in lines if line[0] == variant for point in line[2]]
            edge, best = [], 0.0
            for _, point in sorted(points, key=lambda pair: (pair[1].peak, -pair[1].speed["median"])):
                if point.speed["median"] > best:
                    best = point.speed["median"]
                    edge.append(point)
            axes.plot(
                [point.peak for point in edge],
                [point.speed["median"] for point in edge],
                color=colour_of(variant),
                linewidth=1.2,
                alpha=0.6,
            )
            for checkpointing, point in points:
                _mark(axes, variant, checkpointing, point.peak, point.speed["median"])
        _speed_axis(axes)
        axes.set_xlim(0, None)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.set_xlabel(f"{_peak_name(block)}, GiB (lower is better)")

    title = f"Speed over {_peak_name(block)}"
    alt = f"{title}, {block_name(block)}. " + " ".join(
        f"{_line_name(variant, checkpointing)}: "
        + listed(
            [
                f"{significant(p.speed['median'])} tokens/s in {quantity(p.peak, 'GiB')} at {rows_by_length(p)}"
                for p in points
            ]
        )
        + "."
        for variant, checkpointing, points in lines
    )
    return Panel(title, _svg(f"{key}-frontier", draw, alt, height=300))


def _peak_name(block: Device) -> str:
    return "peak resident memory" if block.on_cpu else "peak allocated memory"


def _over_row(axes: Axes, row: int, text: str, *, right: bool = False) -> None:
    """Write over a row, at its left end or at its right one."""
    _at_side(axes, row - OVER, text, right=right)


def _at_side(axes: Axes, y: float, text: str, *, right: bool = False, weight: str = "normal") -> None:
    x, align = (1, "right") if right else (0, "left")
    axes.text(x, y, text, ha=align, va="bottom", weight=weight, transform=axes.get_yaxis_transform())


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
