"""Cost: memory and time of each variant, measured in processes of their own."""

import statistics
from dataclasses import dataclass

import seaborn
from matplotlib.axes import Axes

from workflow.comparison.model import Cost
from workflow.report import english
from workflow.report.drawing import (
    BAR_SHARE,
    INK,
    PAPER,
    ROW,
    Panel,
    color_of,
    draw_svg,
    rows_axis,
    write_over_row,
)
from workflow.report.english import (
    cost_name,
    direction,
    gib,
    peak_sentence,
    unmeasured_sentence,
    weights_in_16_bits,
)
from workflow.report.formatting import quantity, ratio, significant, span
from workflow.report.model import Facts, Variant

BUSY = 0.1  # share of the cores, beyond which the work of others is told
SPEEDS_DIFFER = 1.5  # factor between a benchmark's speed and its trainings', beyond which there is a warning
FIRST_COSTS = ("peak_memory", "weights", "training_speed", "step_time")  # in this order, before the others


@dataclass(frozen=True)
class CostCell:
    """A variant's cost: with its interval over processes, or the quartiles over the steps of the only one."""

    value: str
    span: str
    ratio: str
    ratio_span: str  # the ratio's interval over processes


@dataclass(frozen=True)
class CostRow:
    """A measured cost, with a cell per variant."""

    name: str
    unit: str
    direction: str
    definition: str
    cells: list[CostCell | None]


def cost_rows(facts: Facts) -> list[CostRow]:
    """The cost table: a row per measurement and a cell per variant. Cells without a measurement are None."""
    rows = []
    first_metrics = [metric for metric in FIRST_COSTS if metric in facts.cost_metrics]
    for metric in dict.fromkeys([*first_metrics, *facts.cost_metrics]):
        costs = [facts.cost_of(variant.name, metric) for variant in facts.variants]
        first = next(cost for cost in costs if cost)
        cells = [
            CostCell(
                value=facts.cite(quantity(cost.value, cost.unit), cost, "value"),
                span=cost_span(cost),
                ratio=""
                if variant.is_baseline
                else facts.cite(ratio(cost.ratio_to_baseline), cost, "ratio_to_baseline"),
                ratio_span="" if cost.ratio_low is None else span(cost.ratio_low, cost.ratio_high),
            )
            if cost
            else None
            for variant, cost in zip(facts.variants, costs, strict=True)
        ]
        rows.append(
            CostRow(
                name=english.cost_name(metric),
                unit=first.unit,
                direction=english.direction(first.higher_is_better),
                definition=first.definition,
                cells=cells,
            )
        )
    return rows


def cost_ends(cost: Cost) -> tuple[float, float] | None:
    """The interval over processes; of one process, the quartiles over its steps if it has any."""
    low, high = (cost.low, cost.high) if cost.processes == 1 else (cost.mean_low, cost.mean_high)
    return None if low is None or high is None else (low, high)


def cost_span(cost: Cost) -> str:
    """The ends as text; empty if there are none."""
    ends = cost_ends(cost)
    return span(*ends) if ends else ""


def _right(cost: Cost) -> float:
    """The right end of a bar with its line."""
    return max([cost.value, *(cost_ends(cost) or ())])


def cost_panels(facts: Facts) -> list[Panel]:
    """Bar charts of peak memory and of speed, with the lines of `cost_ends`."""
    return [
        _bars(facts, metric) for metric in ("peak_memory", "training_speed") if metric in facts.cost_metrics
    ]


def _bars(facts: Facts, metric: str) -> Panel:
    costs = [(v, c) for v in facts.variants if (c := facts.cost_of(v.name, metric))]
    first = costs[0][1]

    def draw(axes: Axes) -> None:
        seaborn.barplot(
            x=[cost.value for _, cost in costs],
            y=[variant.label for variant, _ in costs],
            hue=[variant.label for variant, _ in costs],
            palette=[color_of(variant) for variant, _ in costs],
            saturation=1,
            width=0.3,
            errorbar=None,
            legend=False,
            ax=axes,
        )
        for row, (variant, cost) in enumerate(costs):
            if metric == "peak_memory":
                _inner_bars(axes, facts, variant, row)
            if ends := cost_ends(cost):
                axes.plot(ends, [row, row], color=INK, linewidth=1.6)
            relative = "" if variant.is_baseline else f" ({ratio(cost.ratio_to_baseline)})"
            write_over_row(axes, row, variant.label)
            axes.annotate(
                quantity(cost.value, cost.unit) + relative,
                xy=(_right(cost), row),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
            )
        rows_axis(axes, len(costs))
        right = max(_right(cost) for _, cost in costs)
        axes.set_xlim(0, right / BAR_SHARE)
        axes.set_xlabel(f"{first.unit} ({direction(first.higher_is_better)})")

    alt = f"{cost_name(metric)} in {first.unit}. " + " ".join(_bar_words(v, c) for v, c in costs)
    title = cost_name(metric)
    return Panel(title, draw_svg(f"cost-{metric.replace('_', '-')}", draw, alt, height=len(costs) * ROW + 52))


def _inner_bars(axes: Axes, facts: Facts, variant: Variant, row: int) -> None:
    """Draw the pale ends of a memory bar: the memory before training, and before the base was loaded."""
    for inner in ("memory_after_load", "memory_before_load"):
        cost = facts.cost_of(variant.name, inner)
        if cost:
            axes.barh(row, cost.value, height=0.3, color=PAPER, alpha=0.4)


def _bar_words(variant: Variant, cost: Cost) -> str:
    words = f"{variant.label}: {quantity(cost.value, cost.unit)}"
    if cost_ends(cost):
        words += f" ({'quartiles' if cost.processes == 1 else 'interval'} {cost_span(cost)})"
    if not variant.is_baseline:
        words += f", {ratio(cost.ratio_to_baseline)} the baseline"
        words += "" if cost.ratio_low is None else f" (interval {span(cost.ratio_low, cost.ratio_high)})"
    return words + "."


def load_sentence(facts: Facts) -> str:
    """A sentence on the work that others did on the machine during the benchmarks. Empty if there was little or no record."""
    busy = [
        (variant.label, load.cores_of_others, load.cores)
        for variant in facts.variants
        if (measured := facts.benchmarks.get(variant.name))
        and (load := measured.load)
        and load.cores_of_others > BUSY * load.cores
    ]
    if not busy:
        return ""
    parts = [f"{significant(others, 2)} of {cores:,} for {label}" for label, others, cores in busy]
    return (
        "The machine was busy with other work during the benchmark, so times may be too long and speeds too low: "
        f"other processes kept cores busy, on average {english.listed(parts)}."
    )


def speed_sentence(facts: Facts) -> str:
    """A sentence that puts the speed of the trainings beside that of the benchmarks. Empty if none was measured."""
    parts = [
        f"{significant(benchmark, 2)} and {significant(training, 2)} for {variant.label}"
        for variant, benchmark, training in _speeds(facts)
    ]
    return (
        f"In tokens without padding per second, the benchmark and the run’s own trainings reached {english.listed(parts)}."
        if parts
        else ""
    )


def speed_warning(facts: Facts) -> str:
    """A sentence on the variants whose trainings and benchmark differ widely in speed. Empty if there are none."""
    apart = [
        variant.label
        for variant, benchmark, training in _speeds(facts)
        if max(benchmark, training) > SPEEDS_DIFFER * min(benchmark, training)
    ]
    if not apart:
        return ""
    return (
        f"The two differ by more than a factor of {SPEEDS_DIFFER} for {english.listed(apart)}: the machine did other work during "
        "one of them, or their batches differ; do not rely on these speeds."
    )


def _speeds(facts: Facts) -> list[tuple[Variant, float, float]]:
    """Each measured variant with the speed of its benchmark and the median of its trainings, in useful tokens/s."""
    speeds = []
    for variant in facts.variants:
        measured = facts.benchmarks.get(variant.name)
        benchmark = measured and measured.value_of("training_speed")
        trainings = [run.tokens_seen / run.seconds for run in variant.trained if run.seconds > 0]
        if benchmark and trainings:
            speeds.append((variant, benchmark, statistics.median(trainings)))
    return speeds


@dataclass(frozen=True)
class CostSection:
    """The cost table and bar charts."""

    rows: list[CostRow]
    panels: list[Panel]
    peak_sentence: str
    unmeasured_sentence: str  # empty if every variant was measured
    weights_in_16_bits: str | None  # GiB, with its unit
    load_sentence: str  # empty if the machine did nothing else, or that was not recorded
    speed_sentence: str
    speed_warning: str  # empty if benchmarks and trainings are about as fast


def section(facts: Facts) -> CostSection | None:
    """The content of this section's template. None if no variant's costs were measured."""
    if not facts.benchmarks:
        return None
    return CostSection(
        rows=cost_rows(facts),
        panels=cost_panels(facts),
        peak_sentence=peak_sentence(facts),
        unmeasured_sentence=unmeasured_sentence(facts),
        weights_in_16_bits=gib(weights_in_16_bits(facts)),
        load_sentence=load_sentence(facts),
        speed_sentence=speed_sentence(facts),
        speed_warning=speed_warning(facts),
    )
