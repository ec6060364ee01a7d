"""Quality: all metrics of each variant and serving form, with their differences."""

from dataclasses import dataclass

import seaborn
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from workflow.comparison.model import Contrast, Score
from workflow.report import english, formatting
from workflow.report.drawing import (
    FORM_ROW,
    MUTED,
    PAPER,
    ROW,
    RULE,
    Panel,
    color_of,
    draw_svg,
    marker_of,
    put_worse_left,
    rows_axis,
    write_at_side,
    write_over_row,
)
from workflow.report.english import (
    VERDICTS,
    Change,
    change,
    decimals_for,
    difference_axis_label,
    form_name,
    listed,
    metric_title,
    quality_name,
    unit_label,
)
from workflow.report.figure_forms import fitting_labels
from workflow.report.formatting import number, signed
from workflow.report.model import Facts, Variant
from workflow.runtime.forms import AS_TRAINED, BASE

LONGEST_ROW = 50  # characters of the texts above a row that have room in one line


@dataclass(frozen=True)
class QualityRow:
    """A variant in a serving form. A change is None if the difference was not taken."""

    label: str
    form: str
    as_trained: bool
    is_baseline: bool
    before: str
    after: str
    per_seed: list[str]
    by_training: Change | None
    to_baseline: Change | None


@dataclass(frozen=True)
class QualityBlock:
    """The table of a metric."""

    name: str
    direction: str
    margin: str
    test_set: str
    tally: str
    rows: list[QualityRow]
    control: Change | None  # the baseline against itself with other seeds
    control_name: str
    omitted: int  # forms of which nothing was decided, in a metric that decided nothing as trained
    forest: Panel | None  # of the differences; None for the primary metric, and where nothing was decided


def quality_blocks(facts: Facts) -> list[QualityBlock]:
    """The tables of the metrics with differences, the primary one first."""
    return [_block(facts, metric) for metric in facts.compared_metrics]


def value_blocks(facts: Facts) -> list[QualityBlock]:
    """The tables of the metrics with values but no differences."""
    return [_block(facts, metric) for metric in facts.other_metrics]


def _block(facts: Facts, metric: tuple[str, str]) -> QualityBlock:
    """The table of a metric, with a row per variant and form that was scored in it."""
    decimals = english.decimals_for(facts, metric)
    rows, first = [], None
    for variant in facts.variants:
        base = facts.score(variant.name, BASE, metric)
        for form in facts.forms_of(variant.name):
            score = facts.score(variant.name, form, metric)
            if score is None:
                continue
            first = first or score
            to_base = facts.contrast("to_base", variant.name, form, metric)
            to_baseline = facts.to_baseline(variant.name, form, metric)
            rows.append(
                QualityRow(
                    label=variant.label,
                    form=english.form_name(form),
                    as_trained=form == AS_TRAINED,
                    is_baseline=variant.is_baseline and form == AS_TRAINED,
                    before=facts.cite(number(base.value, decimals), base, "value")
                    if base and form == AS_TRAINED
                    else "",
                    after=facts.cite(number(score.value, decimals), score, "value"),
                    per_seed=[
                        facts.cite(number(value, decimals), score, "per_seed", seed)
                        for seed, value in score.per_seed.items()
                    ],
                    by_training=to_base and english.change(facts, to_base, decimals),
                    to_baseline=to_baseline and english.change(facts, to_baseline, decimals),
                )
            )
    contrasts = _as_trained(facts, metric)
    control = facts.contrast("control", facts.baseline.name, AS_TRAINED, metric)
    telling = rows if metric == facts.primary or not contrasts or _decided(contrasts) else _telling(rows)
    margin = facts.compared.margins.get("/".join(metric))
    return QualityBlock(
        name=metric_title(metric, first),
        direction="" if first.higher_is_better is None else english.direction(first.higher_is_better),
        margin="" if margin is None else f"{margin:g}{formatting.NARROW}{first.unit}",
        test_set=_test_set(first),
        tally=_in_short(contrasts, decimals),
        rows=telling,
        control=control and english.change(facts, control, decimals),
        control_name=f"{facts.baseline.label} against itself: {control.name}" if control else "",
        omitted=len(rows) - len(telling),
        forest=forest_panel(facts, metric),
    )


def _decided(contrasts: list[Contrast]) -> bool:
    return any(contrast.verdict != "undecided" for contrast in contrasts)


def _telling(rows: list[QualityRow]) -> list[QualityRow]:
    """Without the other forms of which nothing was decided."""
    return [
        row
        for row in rows
        if row.as_trained or any(c and c.verdict != "undecided" for c in (row.by_training, row.to_baseline))
    ]


def _in_short(contrasts: list[Contrast], decimals: int) -> str:
    """The verdicts, and where none was decided how far the intervals reach."""
    words = tally(contrasts)
    if not contrasts or _decided(contrasts):
        return words
    low = min(contrast.difference.low for contrast in contrasts)
    high = max(contrast.difference.high for contrast in contrasts)
    return f"{words}, with intervals from {signed(low, decimals)} to {signed(high, decimals)}"


def _test_set(score: Score) -> str:
    items = english.count(score.items, "test item")
    return items if score.groups is None else f"{items}, {english.group_count(score)}"


def tally(contrasts: list[Contrast]) -> str:
    """The verdicts in short: the word if there is one, otherwise the number of each."""
    verdicts = [contrast.verdict for contrast in contrasts]
    if len(verdicts) == 1:
        return verdicts[0]
    return ", ".join(f"{verdicts.count(word)} {word}" for word in VERDICTS if word in verdicts)


def quality_panels(facts: Facts) -> list[Panel]:
    """The primary metric before and after training, and the difference to the baseline as trained.

    The answer's figure has the other serving forms.
    """
    panels = []
    if all(facts.score(facts.baseline.name, form, facts.primary) for form in (BASE, AS_TRAINED)):
        panels.append(_before_after(facts))
    if _as_trained(facts, facts.primary):
        panels.append(_differences(facts, facts.primary))
    return panels


def forest_panel(facts: Facts, metric: tuple[str, str]) -> Panel | None:
    """Each variant's difference to the baseline as trained in a metric other than the primary one.

    None where no difference was decided: the verdicts are told in one line then.
    """
    contrasts = [] if metric == facts.primary else _as_trained(facts, metric)
    if not _decided(contrasts):
        return None
    return _differences(facts, metric)


def _as_trained(facts: Facts, metric: tuple[str, str]) -> list[Contrast]:
    differences = [facts.to_baseline(variant.name, AS_TRAINED, metric) for variant in facts.others]
    return [contrast for contrast in differences if contrast]


def _before_after(facts: Facts) -> Panel:
    metric = facts.primary
    results: list[tuple[Variant, Score, Score, Contrast | None]] = []
    for variant in facts.variants:
        base, trained = (facts.score(variant.name, form, metric) for form in (BASE, AS_TRAINED))
        if base and trained:
            results.append(
                (variant, base, trained, facts.contrast("to_base", variant.name, AS_TRAINED, metric))
            )
    first, decimals = results[0][1], decimals_for(facts, metric)
    ends = [
        f"{number(base.value, decimals)} → {number(trained.value, decimals)}"
        for _, base, trained, _ in results
    ]
    labels = fitting_labels(facts, LONGEST_ROW - max(map(len, ends)))

    def draw(axes: Axes) -> None:
        seaborn.stripplot(
            x=[value for _, _, trained, _ in results for value in trained.per_seed.values()],
            y=[v.label for v, _, trained, _ in results for _ in trained.per_seed],
            hue=[v.label for v, _, trained, _ in results for _ in trained.per_seed],
            palette=[color_of(v) for v, *_ in results],
            order=[v.label for v, *_ in results],
            jitter=False,
            size=5,
            alpha=0.45,
            legend=False,
            ax=axes,
        )
        for row, (variant, base, trained, contrast) in enumerate(results):
            color, marker = color_of(variant), marker_of(variant)
            axes.annotate(
                "",
                xy=(trained.value, row),
                xytext=(base.value, row),
                arrowprops={
                    "arrowstyle": "-|>",
                    "color": color,
                    "linewidth": 1.2,
                    "shrinkA": 5,
                    "shrinkB": 7,
                },
            )
            if contrast:
                change_by_training = [
                    base.value + contrast.difference.low,
                    base.value + contrast.difference.high,
                ]
                axes.plot(
                    change_by_training,
                    [row, row],
                    color=color,
                    linewidth=3,
                    alpha=0.55,
                    solid_capstyle="butt",
                )
            axes.plot(base.value, row, color=color, marker=marker, markersize=8, markerfacecolor=PAPER)
            axes.plot(trained.value, row, color=color, marker=marker, markersize=8)
            write_over_row(axes, row, labels[variant.name])
            write_over_row(axes, row, ends[row], right=True)
        rows_axis(axes, len(results))
        axes.margins(x=0.08)
        put_worse_left(axes, higher_is_better=first.higher_is_better)
        axes.set_xlabel(unit_label(first))

    def seeds(score: Score) -> str:
        return listed([f"seed {seed} {number(value, decimals)}" for seed, value in score.per_seed.items()])

    alt = f"{quality_name(metric)}, before and after training. " + " ".join(
        f"{v.label}: from {number(base.value, decimals)} to {number(trained.value, decimals)}, the mean over "
        f"seeds ({seeds(trained)})."
        for v, base, trained, _ in results
    )
    title = f"Before and after training, {first.unit}"
    return Panel(title, draw_svg(f"before-{'-'.join(metric)}", draw, alt, height=len(results) * ROW + 52))


def _differences(facts: Facts, metric: tuple[str, str]) -> Panel:
    contrasts, decimals = _as_trained(facts, metric), decimals_for(facts, metric)
    first, variants = contrasts[0], {variant.name: variant for variant in facts.variants}
    margin = first.equivalence.margin if first.equivalence else None
    baseline = f"{facts.baseline.label}, {form_name(AS_TRAINED)}"
    values = [change(facts, contrast, decimals).value for contrast in contrasts]
    verdicts = [f", {contrast.verdict}" for contrast in contrasts]
    labels = fitting_labels(facts, LONGEST_ROW - max(map(len, values)) - max(map(len, verdicts)))
    height = len(contrasts) * FORM_ROW

    middles = [row * FORM_ROW - 8 for row in range(1, len(contrasts) + 1)]

    def draw(axes: Axes) -> None:
        # What looks the same is drawn in a row, so that it becomes one path of the page.
        if margin:
            for middle in middles:
                axes.plot([-margin, margin], [middle] * 2, color=RULE, linewidth=15, solid_capstyle="butt")
        for middle in middles:
            axes.plot([0, 0], [middle - 9, middle + 9], color=MUTED, linewidth=1.2)
        for middle, contrast, value, verdict in zip(middles, contrasts, values, verdicts, strict=True):
            _difference(axes, middle, variants[contrast.variant], contrast)
            write_at_side(axes, middle - 9, labels[contrast.variant] + verdict)
            write_at_side(axes, middle - 9, value, right=True)
        axes.set_ylim(height + 4, 0)
        axes.set_yticks([])
        axes.grid(False, axis="y")
        ends = [end for contrast in contrasts for end in (contrast.difference.low, contrast.difference.high)]
        reach = max(abs(end) for end in [*ends, margin or 0]) or 1
        axes.set_xlim(-1.15 * reach, 1.15 * reach)
        put_worse_left(axes, higher_is_better=first.higher_is_better)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(difference_axis_label(first))

    alt = f"{quality_name(metric)}: difference to {baseline}, in {first.unit}. "
    if margin:
        alt += f"A band marks the margin of equivalence, {margin:g} either way. "
    for contrast in contrasts:
        difference, label = change(facts, contrast, decimals), variants[contrast.variant].label
        alt += f"{label}, {form_name(AS_TRAINED)}: {difference.value}, interval {difference.interval}, {difference.verdict}. "
    title = f"Difference to {baseline}, {first.unit}" if metric == facts.primary else quality_name(metric)
    return Panel(title, draw_svg(f"difference-{'-'.join(metric)}", draw, alt.strip(), height=height + 52))


def _difference(axes: Axes, middle: float, variant: Variant, contrast: Contrast) -> None:
    """Draw an estimate with its interval and, with a margin, the equivalence interval."""
    difference, tost, color = contrast.difference, contrast.equivalence, color_of(variant)
    if tost:
        axes.plot([tost.low, tost.high], [middle] * 2, color=color, linewidth=4, solid_capstyle="butt")
    axes.plot([difference.low, difference.high], [middle] * 2, color=color, linewidth=1.6)
    axes.plot(
        difference.value, middle, color=color, marker=marker_of(variant), markersize=7, markeredgecolor=PAPER
    )


@dataclass(frozen=True)
class Quality:
    """The tables and figures of all metrics."""

    blocks: list[QualityBlock]  # of metrics with differences
    values: list[QualityBlock]  # of metrics without
    panels: list[Panel]


def section(facts: Facts) -> Quality:
    """The content of this section's template."""
    return Quality(
        blocks=quality_blocks(facts),
        values=value_blocks(facts),
        panels=quality_panels(facts),
    )
