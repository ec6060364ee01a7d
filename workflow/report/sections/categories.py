"""Categories: the difference in each category of instructions."""

from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from workflow.comparison.model import ALL, HELD_OUT, SEEN, Contrast
from workflow.report import english
from workflow.report.drawing import INK, MUTED, WIDTH, Panel, color_of, draw_svg
from workflow.report.english import Change, decimals_for, direction, listed, quality_name
from workflow.report.figure_forms import BETTER, WORSE
from workflow.report.formatting import clean, number, signed
from workflow.report.model import CATEGORY, Facts, Variant
from workflow.runtime.forms import AS_TRAINED, BASE

STRONGEST = 0.55  # the most opaque that a cell is, so that its text keeps enough contrast


@dataclass(frozen=True)
class CategoryCell:
    before: str
    after: str
    change: Change | None


@dataclass(frozen=True)
class CategoryRow:
    """A category, or several pooled, with a cell per variant."""

    name: str
    pooled: bool
    held_out: bool
    items: str  # their number; the fewest to the most where it differs between variants
    cells: list[tuple[str, CategoryCell | None]]  # by variant


def category_rows(facts: Facts) -> list[CategoryRow]:
    """The primary metric by category. The pooled held-out and seen categories come first."""
    scores: dict[str, set[int]] = {}
    for score in facts.compared.scores:
        if (score.task, score.metric) == facts.primary:
            scores.setdefault(score.subset, set()).add(score.items)
    categories = sorted(subset for subset in scores if subset.startswith(CATEGORY))
    held_out = {f"{CATEGORY}{name}" for name in facts.compared.held_out_categories}
    names = {HELD_OUT: "Held out of training, together", SEEN: "The others, together"}
    names |= {subset: clean(subset.removeprefix(CATEGORY)) for subset in categories}
    return [
        CategoryRow(
            name=name,
            pooled=subset in (HELD_OUT, SEEN),
            held_out=subset in held_out,
            items=" to ".join(f"{items:,}" for items in sorted({min(scores[subset]), max(scores[subset])})),
            cells=[
                (variant.label, _category_cell(facts, variant.name, subset)) for variant in facts.variants
            ],
        )
        for subset, name in sorted(
            names.items(), key=lambda pair: pair[0] in categories and pair[0] not in held_out
        )
        if subset in scores
    ]


def _category_cell(facts: Facts, variant: str, subset: str) -> CategoryCell | None:
    decimals = english.decimals_for(facts, facts.primary)
    base, trained = (facts.score(variant, form, facts.primary, subset) for form in (BASE, AS_TRAINED))
    if base is None or trained is None:
        return None
    contrast = facts.contrast("to_base", variant, AS_TRAINED, facts.primary, subset)
    return CategoryCell(
        before=facts.cite(number(base.value, decimals), base, "value"),
        after=facts.cite(number(trained.value, decimals), trained, "value"),
        change=contrast and english.change(facts, contrast, decimals),
    )


def category_panels(facts: Facts) -> list[Panel]:
    """Heat maps of the primary metric by category: the change by training and the difference to the baseline."""
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
            panels.append(_heat_map(facts, kind, title, variants, [*rows, (ALL, "All items")], cells))
    return panels


def _cell(
    axes: Axes,
    box: tuple[float, float, float, float],
    contrast: Contrast | None,
    *,
    strongest: float,
    decimals: int,
    size: float,
) -> None:
    """Draw a difference on a color as strong as its share of the strongest one. Draw a dash if there is none.

    Args:
        box: left, top, width and height.
        strongest: the largest absolute difference of the heat map.
        size: of the text, in points.
    """
    x, y, width, height = box
    middle = {"x": x + width / 2, "y": y + height / 2, "ha": "center", "va": "center", "fontsize": size}
    if contrast is None:
        axes.text(**middle, s="–", color=MUTED)
        return
    value = contrast.difference.value
    good = (value > 0) == contrast.higher_is_better
    axes.add_patch(Rectangle((x + 1, y + 1), width - 2, height - 2, facecolor=BETTER if good else WORSE,
                             alpha=STRONGEST * abs(value) / strongest, linewidth=0))  # fmt: skip
    weight = "bold" if contrast.verdict in ("worse", "better") else "normal"
    axes.text(**middle, s=signed(value, decimals), color=INK, weight=weight)


def _heat_map(
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
                contrast = cells.get((subset, variant.name))
                box = (names + column * place, y, column, row)
                _cell(axes, box, contrast, strongest=strongest, decimals=decimals, size=small)
        axes.set_xlim(0, WIDTH)
        axes.set_ylim(height, 0)
        axes.set_axis_off()

    alt = f"{title} in {quality_name(facts.primary)}, by category, in {first.unit}. "
    for subset, name in rows:
        contrasts = [(v, cells[subset, v.name]) for v in variants if (subset, v.name) in cells]
        texts = [f"{v.label} {signed(c.difference.value, decimals)} {c.verdict}" for v, c in contrasts]
        marked = name.replace(" ◆", ", held out of training")
        alt += f"{marked}: {listed(texts) if texts else 'not tested'}. "
    svg = draw_svg(f"heat-{kind.replace('_', '-')}", draw, alt.strip(), height=height, bare=True)
    return Panel(f"{title}, {first.unit} ({direction(first.higher_is_better)})", svg, kind="heat")


@dataclass(frozen=True)
class Categories:
    """The table and heat maps by category."""

    rows: list[CategoryRow]
    panels: list[Panel]
    left_out: str  # a sentence on the categories that single variants leave out; empty if there are none


def section(facts: Facts) -> Categories:
    """The content of this section's template."""
    return Categories(
        rows=category_rows(facts), panels=category_panels(facts), left_out=english.left_out_sentence(facts)
    )
