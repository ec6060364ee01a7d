"""The figure of the answer: the quality of each variant and serving form against its memory."""

from dataclasses import dataclass

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from workflow.comparison.model import Contrast
from workflow.report.drawing import MUTED, PAPER, RULE, Panel, color_of, draw_svg, spread
from workflow.report.english import TASKS, change, decimals_for, form_name, quality_name, weights_in_16_bits
from workflow.report.figure_forms import FORM_MARKERS, SHORT_FORMS
from workflow.report.formatting import quantity, signed
from workflow.report.model import Facts, Variant
from workflow.runtime.forms import AS_TRAINED

MOST_LABELS = 8  # with more points, only those as trained are labeled
# All three are shares of the largest memory.
CLUSTER = 0.2  # the most that a cluster of points is wide
MEETING = 0.2  # points nearer than this have their names spread together
SAME = 0.03  # points nearer than this form a cluster, drawn side by side


@dataclass(frozen=True)
class _Served:
    """A point of the figure: a variant in a serving form, with the GiB of its weights and its difference."""

    variant: Variant
    form: str
    gib: float
    contrast: Contrast | None  # None for the baseline as trained

    @property
    def value(self) -> float:
        return self.contrast.difference.value if self.contrast else 0.0


def answer_panel(facts: Facts) -> Panel | None:
    """Each form's difference in quality over the memory of its weights. None if there is no difference."""
    points = _served_points(facts)
    contrasts = [point.contrast for point in points if point.contrast]
    if not contrasts or facts.params.model.source == "random":
        return None
    first = contrasts[0]
    margin = first.equivalence.margin if first.equivalence else None
    lowest = min([c.difference.low for c in contrasts] + [-(margin or 0)])
    highest = max([c.difference.high for c in contrasts] + [margin or 0])
    reach = highest - lowest or 1.0
    widest = max(point.gib for point in points)
    sixteen = weights_in_16_bits(facts)
    height, right = 300, widest / 0.6

    def draw(axes: Axes) -> None:
        if margin:
            axes.axhspan(-margin, margin, color=RULE, alpha=0.7, linewidth=0)
        axes.axhline(0, color=MUTED, linewidth=1)
        if sixteen:
            axes.axvline(sixteen, color=MUTED, linewidth=1, linestyle=(0, (2, 2)))
            axes.annotate(
                "in real 16 bits",
                (sixteen, 0.02),
                xycoords=("data", "axes fraction"),
                xytext=(3, 0),
                textcoords="offset points",
                fontsize=10,
                color=MUTED,
            ).set_in_layout(False)
        named = _draw_points(axes, points, widest)
        _draw_names(axes, named, gap=19 * reach / height)
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
    alt = _alt(facts, points, margin=margin, sixteen=sixteen)
    return Panel(
        f"{TASKS.get(facts.primary[0], facts.primary[0])}: difference to {baseline}, over memory",
        draw_svg("answer", draw, alt.strip(), height=height),
    )


def _draw_points(
    axes: Axes, points: list[_Served], widest: float
) -> list[list[tuple[float, float, _Served]]]:
    """Draw the points, and return those to be named, in groups whose names would overlap.

    Returns:
        For each point, the right edge of its cluster in GiB, its x in GiB, and the point.
    """
    few = len(points) <= MOST_LABELS
    named: list[list[tuple[float, float, _Served]]] = []
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
    return named


def _draw_names(axes: Axes, named: list[list[tuple[float, float, _Served]]], *, gap: float) -> None:
    """Write the names of the points, at least `gap` apart in the units of the y axis."""
    for labels in named:
        at = max(end for end, _, _ in labels)
        places = spread([point.value for _, _, point in labels], gap)
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


def _alt(facts: Facts, points: list[_Served], *, margin: float | None, sixteen: float | None) -> str:
    """The alternative text of the figure."""
    decimals = decimals_for(facts, facts.primary)
    baseline = f"{facts.baseline.label}, {form_name(AS_TRAINED)}"
    alt = f"Difference to {baseline} in {quality_name(facts.primary)} over the memory of the weights as served. "
    if margin:
        alt += f"A band marks the margin of equivalence, {margin:g} either way. "
    if sixteen:
        alt += f"A dashed line marks {quantity(sixteen, 'GiB')}, the size of the parameters in real 16-bit storage. "
    for point in points:
        where = f"{point.variant.label}, {form_name(point.form)}, {quantity(point.gib, 'GiB')}: "
        if point.contrast:
            difference = change(facts, point.contrast, decimals)
            alt += f"{where}{difference.value}, interval {difference.interval}, {difference.verdict}. "
        else:
            alt += f"{where}the baseline. "
    return alt


def _served_point(axes: Axes, x: float, point: _Served) -> None:
    """Draw a point with its intervals."""
    color = color_of(point.variant)
    if point.contrast:
        difference, tost = point.contrast.difference, point.contrast.equivalence
        axes.plot([x, x], [difference.low, difference.high], color=color, linewidth=1.4)
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
    """The fewest decimals that show the ticks of the y axis exactly."""
    ticks = axes.get_yticks()
    return next((n for n in range(6) if all(abs(round(tick, n) - tick) < 1e-9 for tick in ticks)), 6)


def answer_legend(facts: Facts) -> list[tuple[str, Markup]]:
    """The markers of the serving forms, if the figure has too many points to label each."""
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
    points = []
    for variant in facts.variants:
        for form in facts.forms_of(variant.name):
            gib = facts.weights_of(variant.name, form)
            is_baseline = variant.is_baseline and form == AS_TRAINED
            contrast = None if is_baseline else facts.to_baseline(variant.name, form, facts.primary)
            if gib is not None and (contrast or is_baseline):
                points.append(_Served(variant, form, gib, contrast))
    return points


def _clusters(points: list[_Served], widest: float) -> list[list[_Served]]:
    """The points in clusters of nearly the same memory."""
    clusters: list[list[_Served]] = []
    for point in sorted(points, key=lambda p: p.gib):
        if clusters and point.gib - clusters[-1][0].gib <= SAME * widest:
            clusters[-1].append(point)
        else:
            clusters.append([point])
    return clusters
