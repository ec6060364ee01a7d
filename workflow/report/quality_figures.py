"""The figures of quality: the answer, each task's differences, the decomposition, the categories, the faults."""

from dataclasses import dataclass

import seaborn
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from workflow.comparison.model import ALL, HELD_OUT, SEEN, Contrast, Part, Score
from workflow.report.drawing import (
    FORM_ROW,
    HEAD_ROW,
    INK,
    MUTED,
    PALETTE,
    PAPER,
    ROW,
    RULE,
    WIDTH,
    Panel,
    at_side,
    color_of,
    draw_svg,
    marker_of,
    over_row,
    rows_axis,
    spread,
)
from workflow.report.english import (
    TASKS,
    change,
    decimals_for,
    direction,
    form_name,
    listed,
    quality_name,
    weights_in_16_bits,
)
from workflow.report.facts import AS_TRAINED, BASE, CATEGORY, Facts, Variant
from workflow.report.formatting import clean, number, quantity, signed

FORM_MARKERS = {AS_TRAINED: "o", "merged_16bit": "s", "merged_dequantized": "D", "requantized": "^"}
SHORT_FORMS = {
    AS_TRAINED: "as trained",
    "merged_16bit": "merged 16-bit",
    "merged_dequantized": "dequantized",
    "requantized": "requantized",
}
MOST_LABELS = 8  # points that are labeled each; of more, those as trained alone
CLUSTER = 0.2  # of the widest memory: how wide points of one memory stand side by side
MEETING = 0.2  # of the widest memory: the names of points nearer than this are spread together
SAME = 0.03  # of the widest memory: points nearer than this stand side by side
BETTER, WORSE = PALETTE[0], PALETTE[3]
STRONGEST = 0.55  # of a cell's color: the text on it keeps its contrast


@dataclass(frozen=True)
class _Served:
    """A point of the answer: a variant in a form, with the memory of its weights and its difference."""

    variant: Variant
    form: str
    gib: float
    contrast: Contrast | None  # None of the baseline as trained, against which the others stand

    @property
    def value(self) -> float:
        return self.contrast.difference.value if self.contrast else 0.0


def answer_panel(facts: Facts) -> Panel | None:
    """Every form's difference in quality over the memory of its weights; None where there is no difference."""
    points = _served_points(facts)
    contrasts = [point.contrast for point in points if point.contrast]
    if not contrasts or facts.asked.model.source == "random":
        return None
    first, decimals = contrasts[0], decimals_for(facts, facts.primary)
    margin = first.equivalence.margin if first.equivalence else None
    lowest = min([c.difference.low for c in contrasts] + [-(margin or 0)])
    highest = max([c.difference.high for c in contrasts] + [margin or 0])
    reach = highest - lowest or 1.0
    widest = max(point.gib for point in points)
    few = len(points) <= MOST_LABELS
    sixteen = weights_in_16_bits(facts)
    height, right = 300, widest / 0.6

    def draw(axes: Axes) -> None:
        if margin:
            axes.axhspan(-margin, margin, color=RULE, alpha=0.7, linewidth=0)
        axes.axhline(0, color=MUTED, linewidth=1)
        if sixteen:
            axes.axvline(sixteen, color=MUTED, linewidth=1, linestyle=(0, (2, 2)))
            axes.annotate(
                "really in 16 bits",
                (sixteen, 0.02),
                xycoords=("data", "axes fraction"),
                xytext=(3, 0),
                textcoords="offset points",
                fontsize=10,
                color=MUTED,
            ).set_in_layout(False)
        named: list[list[tuple[float, float, _Served]]] = []  # labels that would meet: left, x, point
        for cluster in _clusters(points, widest):
            step = min(0.05, CLUSTER / len(cluster)) * widest
            left = max(0.0, cluster[0].gib - step * (len(cluster) - 1) / 2)
            labels = []
            for place, point in enumerate(sorted(cluster, key=lambda p: (p.form != AS_TRAINED, p.value))):
                x = left + step * place
                _served_point(axes, x, point)
                if few or point.form == AS_TRAINED:
                    labels.append((left + step * len(cluster), x, point))
            if named and labels and labels[0][0] - named[-1][-1][0] < MEETING * widest:
                named[-1] += labels
            elif labels:
                named.append(labels)
        for labels in named:
            at = max(end for end, _, _ in labels)
            places = spread([point.value for _, _, point in labels], 19 * reach / height)
            for (_, x, point), y in zip(labels, places, strict=True):
                color = color_of(point.variant)
                axes.plot([x, at], [point.value, y], color=color, linewidth=0.6, alpha=0.7)
                axes.annotate(
                    point.variant.short if point.form == AS_TRAINED else SHORT_FORMS[point.form],
                    (at, y),
                    xytext=(3, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=10.5,
                    weight="bold" if point.form == AS_TRAINED else "normal",
                    color=color,
                ).set_in_layout(False)
        axes.set_xlim(0, right)
        low, high = lowest - 0.1 * reach, highest + 0.1 * reach
        axes.set_ylim(*((low, high) if first.higher_is_better else (high, low)))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        for y, va, text in ((0.985, "top", "↑ better"), (0.015, "bottom", "↓ worse")):
            axes.text(0.015, y, text, transform=axes.transAxes, va=va, fontsize=10.5)
        if margin:
            axes.text(0.015 * right, 0, "margin", va="center", fontsize=10, color=MUTED)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: signed(value, _decimals(axes))))
        axes.set_ylabel(first.unit)
        axes.set_xlabel("GiB of weights, as served (← less)")

    baseline = f"{facts.baseline.label}, {form_name(AS_TRAINED)}"
    alt = f"Difference to {baseline} in {quality_name(facts.primary)} over the memory of the weights as served. "
    if margin:
        alt += f"A band marks the margin of equivalence, {margin:g} either way. "
    if sixteen:
        alt += f"A dashed line marks {quantity(sixteen, 'GiB')}, what the parameters would take if really held in 16 bits. "
    for point in points:
        where = f"{point.variant.label}, {form_name(point.form)}, {quantity(point.gib, 'GiB')}: "
        if point.contrast:
            words = change(facts, point.contrast, decimals)
            alt += f"{where}{words.value}, interval {words.interval}, {words.verdict}. "
        else:
            alt += f"{where}the baseline. "
    return Panel(
        f"{TASKS.get(facts.primary[0], facts.primary[0])}: difference to {baseline}, over memory",
        draw_svg("answer", draw, alt.strip(), height=height),
    )


def _served_point(axes: Axes, x: float, point: _Served) -> None:
    """A point with its intervals."""
    color = color_of(point.variant)
    if point.contrast:
        one, tost = point.contrast.difference, point.contrast.equivalence
        axes.plot([x, x], [one.low, one.high], color=color, linewidth=1.4)
        if tost:
            axes.plot([x, x], [tost.low, tost.high], color=color, linewidth=3.2, solid_capstyle="butt")
    axes.plot(
        x,
        point.value,
        color=color,
        marker=FORM_MARKERS[point.form],
        markersize=7.5,
        markeredgecolor=PAPER,
        zorder=3,
    )


def _decimals(axes: Axes) -> int:
    """Decimals that show the ticks of the vertical axis as they are."""
    ticks = axes.get_yticks()
    return next((n for n in range(6) if all(abs(round(tick, n) - tick) < 1e-9 for tick in ticks)), 6)


def answer_legend(facts: Facts) -> list[tuple[str, Markup]]:
    """The markers of the forms, where the answer's points are too many to be labeled each."""
    points = _served_points(facts)
    if len(points) <= MOST_LABELS:
        return []
    entries = []
    for form in dict.fromkeys(point.form for point in points):

        def draw(axes: Axes, form: str = form) -> None:
            axes.plot(0.5, 0, color=MUTED, marker=FORM_MARKERS[form], markersize=7)
            axes.set_axis_off()

        entries.append((form_name(form), draw_svg(f"form-{form}", draw, "", width=14, height=12, bare=True)))
    return entries


def _served_points(facts: Facts) -> list[_Served]:
    found = []
    for variant in facts.variants:
        for form in facts.forms_of(variant.name):
            gib = facts.weights_of(variant.name, form)
            is_baseline = variant.is_baseline and form == AS_TRAINED
            contrast = None if is_baseline else facts.to_baseline(variant.name, form, facts.primary)
            if gib is not None and (contrast or is_baseline):
                found.append(_Served(variant, form, gib, contrast))
    return found


def _clusters(points: list[_Served], widest: float) -> list[list[_Served]]:
    """The points, those of nearly the same memory together."""
    found: list[list[_Served]] = []
    for point in sorted(points, key=lambda p: p.gib):
        if found and point.gib - found[-1][0].gib <= SAME * widest:
            found[-1].append(point)
        else:
            found.append([point])
    return found


def quality_panels(facts: Facts) -> list[Panel]:
    """The primary metric before and after training, and each form's difference to the baseline."""
    panels = []
    if all(facts.score(facts.baseline.name, form, facts.primary) for form in (BASE, AS_TRAINED)):
        panels.append(_before_after(facts))
    if _shown_differences(facts, facts.primary):
        panels.append(_differences(facts, facts.primary))
    return panels


def forest_panels(facts: Facts) -> list[Panel]:
    """Each variant's difference to the baseline as trained, in every metric but the primary one."""
    return [
        _differences(facts, metric)
        for metric in facts.compared_metrics
        if metric != facts.primary and _shown_differences(facts, metric)
    ]


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
            palette=[color_of(v) for v, *_ in shown],
            order=[v.label for v, *_ in shown],
            jitter=False,
            size=5,
            alpha=0.45,
            legend=False,
            ax=axes,
        )
        for row, (variant, base, trained, contrast) in enumerate(shown):
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
                ends = [base.value + contrast.difference.low, base.value + contrast.difference.high]
                axes.plot(ends, [row, row], color=color, linewidth=3, alpha=0.55, solid_capstyle="butt")
            axes.plot(base.value, row, color=color, marker=marker, markersize=8, markerfacecolor=PAPER)
            axes.plot(trained.value, row, color=color, marker=marker, markersize=8)
            over_row(axes, row, variant.label)
            ends = f"{number(base.value, decimals)} → {number(trained.value, decimals)}"
            over_row(axes, row, ends, right=True)
        rows_axis(axes, len(shown))
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
    return Panel(title, draw_svg(f"before-{'-'.join(metric)}", draw, alt, height=len(shown) * ROW + 52))


def _unit(score: Score) -> str:
    if score.higher_is_better is None:
        return score.unit
    return f"{score.unit} ({direction(score.higher_is_better)})"


def _shown_differences(facts: Facts, metric: tuple[str, str]) -> list[tuple[Variant, list[Contrast]]]:
    """Every form's difference to the baseline as trained, by variant; in other metrics than the primary, as trained alone."""
    found = []
    for variant in facts.variants:
        forms = facts.forms_of(variant.name) if metric == facts.primary else [AS_TRAINED]
        taken = [facts.to_baseline(variant.name, form, metric) for form in forms]
        found.append((variant, [contrast for contrast in taken if contrast]))
    return [(variant, contrasts) for variant, contrasts in found if contrasts]


def _differences(facts: Facts, metric: tuple[str, str]) -> Panel:
    shown = _shown_differences(facts, metric)
    first, decimals = shown[0][1][0], decimals_for(facts, metric)
    everyone = [contrast for _, contrasts in shown for contrast in contrasts]
    margin = first.equivalence.margin if first.equivalence else None
    baseline = f"{facts.baseline.label}, {form_name(AS_TRAINED)}"
    forms = {contrast.form for contrast in everyone} != {AS_TRAINED}
    height = len(shown) * HEAD_ROW + len(everyone) * FORM_ROW

    def draw(axes: Axes) -> None:
        y = 0
        for variant, contrasts in shown:
            y += HEAD_ROW
            at_side(axes, y - 4, variant.label, weight="bold")
            for contrast in contrasts:
                y += FORM_ROW
                middle = y - 8
                _difference(axes, middle, variant, contrast)
                text = f"{form_name(contrast.form)}: {contrast.verdict}" if forms else contrast.verdict
                at_side(axes, middle - 9, text)
                at_side(axes, middle - 9, change(facts, contrast, decimals).value, right=True)
        axes.set_ylim(height + 4, 0)
        axes.set_yticks([])
        axes.grid(False, axis="y")
        ends = [end for contrast in everyone for end in (contrast.difference.low, contrast.difference.high)]
        reach = max(abs(end) for end in [*ends, margin or 0]) or 1
        axes.set_xlim(-1.15 * reach, 1.15 * reach)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(_sides(first))

    alt = f"{quality_name(metric)}: difference to {baseline}, in {first.unit}. "
    if margin:
        alt += f"A band marks the margin of equivalence, {margin:g} either way. "
    for variant, contrasts in shown:
        for contrast in contrasts:
            words = change(facts, contrast, decimals)
            alt += f"{variant.label}, {form_name(contrast.form)}: {words.value}, interval {words.interval}, {words.verdict}. "
    title = f"Difference to {baseline}, {first.unit}" if metric == facts.primary else quality_name(metric)
    return Panel(title, draw_svg(f"difference-{'-'.join(metric)}", draw, alt.strip(), height=height + 52))


def _difference(axes: Axes, middle: float, variant: Variant, contrast: Contrast) -> None:
    """One interval with its estimate; thick where equivalence is asked of it, over the band of the margin."""
    one, tost, color = contrast.difference, contrast.equivalence, color_of(variant)
    if tost:
        axes.barh(middle, 2 * tost.margin, left=-tost.margin, height=15, color=RULE, alpha=0.7)
        axes.plot([tost.low, tost.high], [middle] * 2, color=color, linewidth=4, solid_capstyle="butt")
    axes.plot([0, 0], [middle - 9, middle + 9], color=MUTED, linewidth=1.2)
    axes.plot([one.low, one.high], [middle] * 2, color=color, linewidth=1.6)
    axes.plot(one.value, middle, color=color, marker=marker_of(variant), markersize=7, markeredgecolor=PAPER)


def waterfall_panels(facts: Facts) -> list[Panel]:
    """Of each quantized variant: its base's damage, what training changed of it, what is left, and each other form."""
    found: dict[str, list[tuple[Part, Contrast]]] = {}
    for part in facts.compared.decomposition:
        contrast = facts.contrast(part.kind, part.variant, part.form, facts.primary)
        if contrast and (part.task, part.metric) == facts.primary:
            found.setdefault(part.variant, []).append((part, contrast))
    shown = [(variant, found[variant.name]) for variant in facts.variants if variant.name in found]
    ends = [
        _starts(parts)[part.kind] + end
        for _, parts in shown
        for part, _ in parts
        for end in (0, part.value, part.low, part.high)
    ]
    return [_waterfall(facts, variant, parts, min(ends), max(ends)) for variant, parts in shown]


def _starts(parts: list[tuple[Part, Contrast]]) -> dict[str, float]:
    """Where the bar of each kind of part begins: the steps begin where what they change ends."""
    value = {part.kind: part.value for part, _ in parts if part.kind != "form"}
    left = value.get("to_baseline", 0.0)
    return {"base_to_base": 0.0, "recovery": value.get("base_to_base", 0.0), "to_baseline": 0.0, "form": left}


def _waterfall(
    facts: Facts, variant: Variant, parts: list[tuple[Part, Contrast]], lowest: float, highest: float
) -> Panel:
    first, color = parts[0][1], color_of(variant)
    margin = first.equivalence.margin if first.equivalence else None
    totals = {"base_to_base", "to_baseline"}  # they begin at zero
    starts = _starts(parts)
    least = decimals_for(facts, facts.primary)
    row = 40
    height = row * len(parts)

    def draw(axes: Axes) -> None:
        if margin:
            axes.axvspan(-margin, margin, color=RULE, alpha=0.7, linewidth=0)
        axes.axvline(0, color=MUTED, linewidth=1.2)
        for index, (part, contrast) in enumerate(parts):
            start, y = starts[part.kind], row * index + 28
            whole = part.kind == "to_baseline"
            axes.barh(y, part.value, left=start, height=11, color=color, alpha=1 if whole else 0.5)
            axes.plot([start + part.low, start + part.high], [y, y], color=INK, linewidth=1.3)
            if part.kind not in totals:
                axes.plot([start] * 2, [y - 8, y + 8], color=color, linewidth=1.2)
            name = f"Served {form_name(part.form)}" if part.kind == "form" else part.part
            at_side(axes, y - 9, name, weight="bold" if whole else "normal")
            at_side(axes, y - 9, f"{change(facts, contrast, least).value}, {part.verdict}", right=True)
        axes.set_ylim(height + 4, 0)
        axes.set_yticks([])
        axes.grid(False, axis="y")
        gap = 0.06 * (highest - lowest) or 1.0
        axes.set_xlim(lowest - gap, highest + gap)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(_sides(first))

    alt = f"{variant.label}: parts of the difference to {facts.baseline.label} in {quality_name(facts.primary)}. "
    for part, contrast in parts:
        words = change(facts, contrast, least)
        what = f"{part.part}, {form_name(part.form)}" if part.kind == "form" else part.part
        alt += f"{what}: {words.value}, interval {words.interval}, {words.verdict}. "
    return Panel(
        variant.label, draw_svg(f"waterfall-{variant.position}", draw, alt.strip(), height=height + 52)
    )


def _sides(contrast: Contrast) -> str:
    """The label of an axis of differences: the unit, and which way is better."""
    sides = ("worse", "better") if contrast.higher_is_better else ("better", "worse")
    gap = "\N{EM SPACE}"
    return f"← {sides[0]}{gap}{contrast.unit}{gap}{sides[1]} →"


def category_panels(facts: Facts) -> list[Panel]:
    """Heat maps of the primary metric by category: the change by training, and the difference to the baseline."""
    subsets = [s.subset for s in facts.compared.scores if (s.task, s.metric) == facts.primary]
    held_out = {f"{CATEGORY}{name}" for name in facts.compared.held_out_categories}
    categories = sorted({s for s in subsets if s.startswith(CATEGORY)}, key=lambda s: (s not in held_out, s))
    if not categories:
        return []
    rows = [
        (s, name)
        for s, name in ((HELD_OUT, "Held out, together"), (SEEN, "The others, together"))
        if s in subsets
    ]
    rows += [(s, clean(s.removeprefix(CATEGORY)) + (" ◆" if s in held_out else "")) for s in categories]
    panels = []
    for kind, variants, title in (
        ("to_base", facts.variants, "Change by training"),
        ("to_baseline", facts.others, f"Difference to {facts.baseline.label}"),
    ):
        cells = {
            (subset, v.name): c
            for subset, _ in [*rows, (ALL, "")]
            for v in variants
            if (c := facts.contrast(kind, v.name, AS_TRAINED, facts.primary, subset))
        }
        if any(subset != ALL for subset, _ in cells):
            panels.append(_heat(facts, kind, title, variants, [*rows, (ALL, "All items")], cells))
    return panels


def _heat(
    facts: Facts,
    kind: str,
    title: str,
    variants: list[Variant],
    rows: list[tuple[str, str]],
    cells: dict[tuple[str, str], Contrast],
) -> Panel:
    first = next(iter(cells.values()))
    strongest = max(abs(c.difference.value) for c in cells.values()) or 1
    names, head, row = 130 if len(variants) < 8 else 112, 24, 22
    column = (WIDTH - names) / len(variants)
    height = head + row * len(rows)
    small = 10.5 if column >= 44 else 8.5 if column >= 30 else 7.5
    decimals = 2 if column < 52 else min(3, decimals_for(facts, facts.primary))

    def draw(axes: Axes) -> None:
        for place, variant in enumerate(variants):
            x = names + column * (place + 0.5)
            axes.text(x, head - 8, variant.short, ha="center", va="bottom", fontsize=small, color=INK)
            axes.plot(
                [x - column / 2 + 3, x + column / 2 - 3],
                [head - 3] * 2,
                color=color_of(variant),
                linewidth=2,
            )
        for index, (subset, name) in enumerate(rows):
            y = head + row * index
            axes.text(
                0,
                y + row / 2,
                name if len(name) <= 22 else name[:21] + "…",
                va="center",
                fontsize=10.5,
                color=INK,
                weight="bold" if subset in (ALL, HELD_OUT, SEEN) else "normal",
            )
            for place, variant in enumerate(variants):
                x, contrast = names + column * place, cells.get((subset, variant.name))
                if contrast is None:
                    axes.text(
                        x + column / 2,
                        y + row / 2,
                        "–",
                        ha="center",
                        va="center",
                        fontsize=small,
                        color=MUTED,
                    )
                    continue
                value = contrast.difference.value
                good = (value > 0) == contrast.higher_is_better
                axes.add_patch(Rectangle((x + 1, y + 1), column - 2, row - 2, facecolor=BETTER if good else WORSE,
                                         alpha=STRONGEST * abs(value) / strongest, linewidth=0))  # fmt: skip
                decided = contrast.verdict in ("worse", "better")
                axes.text(
                    x + column / 2,
                    y + row / 2,
                    signed(value, decimals),
                    ha="center",
                    va="center",
                    fontsize=small,
                    color=INK,
                    weight="bold" if decided else "normal",
                )
        axes.set_xlim(0, WIDTH)
        axes.set_ylim(height, 0)
        axes.set_axis_off()

    alt = f"{title} in {quality_name(facts.primary)}, by category, in {first.unit}. "
    for subset, name in rows:
        found = [(v, cells[subset, v.name]) for v in variants if (subset, v.name) in cells]
        said = [f"{v.label} {signed(c.difference.value, decimals)} {c.verdict}" for v, c in found]
        marked = name.replace(" ◆", ", held out of training")
        alt += f"{marked}: {listed(said) if said else 'not tested'}. "
    svg = draw_svg(f"heat-{kind.replace('_', '-')}", draw, alt.strip(), height=height, bare=True)
    return Panel(f"{title}, {first.unit} ({direction(first.higher_is_better)})", svg, kind="heat")


def repair_panel(facts: Facts) -> Panel | None:
    """Each fault before and after its repair, in the primary metric; None where none was switched."""
    shown = [
        (c, facts.score(c.variant, c.form, facts.primary), facts.score(*c.other.split("/"), facts.primary))
        for c in facts.compared.contrasts
        if c.kind == "repair" and c.subset == ALL and (c.task, c.metric) == facts.primary
    ]
    if not shown:
        return None
    variants = {variant.name: variant for variant in facts.variants}
    decimals = decimals_for(facts, facts.primary)

    def draw(axes: Axes) -> None:
        for row, (contrast, faulty, repaired) in enumerate(shown):
            color = color_of(variants[contrast.variant])
            one = contrast.difference
            axes.annotate("", xy=(repaired.value, row), xytext=(faulty.value, row),
                          arrowprops={"arrowstyle": "-|>", "color": color, "linewidth": 1.2, "shrinkA": 5, "shrinkB": 7})  # fmt: skip
            axes.plot(
                [repaired.value + one.low, repaired.value + one.high],
                [row] * 2,
                color=color,
                linewidth=3,
                alpha=0.55,
                solid_capstyle="butt",
            )
            axes.plot(faulty.value, row, color=color, marker="o", markersize=8, markerfacecolor=PAPER)
            axes.plot(repaired.value, row, color=color, marker="o", markersize=8)
            over_row(axes, row, contrast.name.replace("_", " ").capitalize())
            over_row(
                axes,
                row,
                f"{number(faulty.value, decimals)} → {number(repaired.value, decimals)}, {contrast.verdict}",
                right=True,
            )
        rows_axis(axes, len(shown))
        axes.margins(x=0.08)
        axes.set_xlabel(_unit(shown[0][1]))

    alt = f"{quality_name(facts.primary)} with each fault and without it. " + " ".join(
        f"{c.name.replace('_', ' ').capitalize()}: from {number(a.value, decimals)} with the fault to "
        f"{number(b.value, decimals)} without; the fault is {c.verdict}."
        for c, a, b in shown
    )
    title = f"With the fault, and repaired, {shown[0][1].unit}"
    return Panel(title, draw_svg("repairs", draw, alt, height=len(shown) * ROW + 52))
