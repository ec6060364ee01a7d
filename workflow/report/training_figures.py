"""The figures of training and cost."""

import pandas as pd
import seaborn
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, MaxNLocator

from workflow.report.drawing import (
    BAR_SHARE,
    INK,
    PAPER,
    ROW,
    Panel,
    color_of,
    draw_svg,
    marker_of,
    over_row,
    rows_axis,
    spread,
)
from workflow.report.english import cost_name, direction, held_as_float32, weights_in_16_bits
from workflow.report.facts import Facts, Variant
from workflow.report.formatting import quantity, ratio, significant

CURVE_HEIGHT = 260
NAME_ROOM = 1.36  # times the last step, for the names at the ends of the lines


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


def _curves(facts: Facts, column: str, validation_column: str, title: str, scale: int) -> Panel:
    palette = {variant.name: color_of(variant) for variant in facts.variants}
    history = facts.history.assign(shown=facts.history[column] * scale)
    validation = facts.validation.assign(shown=facts.validation[validation_column] * scale)
    several = len(facts.asked.experiment.seeds) > 1

    def draw(axes: Axes) -> None:
        seaborn.lineplot(
            history,
            x="step",
            y="shown",
            hue="variant",
            palette=palette,
            legend=False,
            estimator="mean",
            errorbar=("pi", 100) if several else None,  # from the lowest to the highest seed
            err_kws={"alpha": 0.18, "linewidth": 0},
            linewidth=1.3,
            ax=axes,
        )
        for variant in facts.variants:
            points = validation[validation["variant"] == variant.name].groupby("step")["shown"]
            color, middle = color_of(variant), points.mean()
            for step, low, high in zip(middle.index, points.min(), points.max(), strict=True):
                axes.plot([step] * 2, [low, high], color=color, linewidth=1.6)
            axes.plot(
                middle.index,
                middle,
                color=color,
                marker=marker_of(variant),
                markersize=6,
                markeredgecolor=PAPER,
                linestyle="none",
                zorder=3,
            )
        _name_lines(axes, facts, history)
        axes.xaxis.set_major_locator(FixedLocator(_steps(history["step"])))
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
    return Panel(title, draw_svg(f"curve-{column.replace('_', '-')}", draw, alt, height=CURVE_HEIGHT))


def _name_lines(axes: Axes, facts: Facts, history: pd.DataFrame) -> None:
    """Write each variant's name at the end of its line, in its color."""
    last = history["step"].max()
    ends = [
        float(run[run["step"] == run["step"].max()]["shown"].mean())
        for variant in facts.variants
        for run in [history[history["variant"] == variant.name]]
    ]
    low, high = axes.get_ylim()
    places = spread(ends, 14 * (high - low) / CURVE_HEIGHT)
    for variant, y in zip(facts.variants, places, strict=True):
        axes.annotate(
            variant.short,
            (last, y),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=10.5,
            weight="bold",
            color=color_of(variant),
        ).set_in_layout(False)
    axes.set_xlim(None, last * NAME_ROOM)


def _steps(steps: pd.Series) -> list[float]:
    """Ticks at whole steps, none beyond the last one."""
    return [tick for tick in MaxNLocator(5, integer=True).tick_values(0, steps.max()) if tick <= steps.max()]


def _bars(facts: Facts, metric: str) -> Panel:
    shown = [(v, c) for v in facts.variants if (c := facts.cost_of(v.name, metric))]
    first = shown[0][1]
    sixteen = weights_in_16_bits(facts) if metric == "weights" else None

    def draw(axes: Axes) -> None:
        seaborn.barplot(
            x=[cost.value for _, cost in shown],
            y=[variant.label for variant, _ in shown],
            hue=[variant.label for variant, _ in shown],
            palette=[color_of(variant) for variant, _ in shown],
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
            over_row(axes, row, variant.label)
            axes.annotate(
                quantity(cost.value, cost.unit) + relative,
                xy=(max(cost.value, cost.high or 0), row),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
            )
        rows_axis(axes, len(shown))
        right = max(max(cost.value, cost.high or 0) for _, cost in shown)
        axes.set_xlim(0, right / BAR_SHARE)
        axes.set_xlabel(f"{first.unit} ({direction(first.higher_is_better)})")

    alt = f"{cost_name(metric)} in {first.unit}. " + " ".join(_bar_words(v, c) for v, c in shown)
    if sixteen:
        alt += f" A dashed mark shows {quantity(sixteen, 'GiB')}, what the parameters would take in 16 bits."
    title = cost_name(metric)
    return Panel(title, draw_svg(f"cost-{metric.replace('_', '-')}", draw, alt, height=len(shown) * ROW + 52))


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
