"""Draw figures with seaborn and matplotlib, as SVG that takes its colors from the page's style.

Text stays text, in the page's font. A drawing uses a few placeholder colors, which are replaced by CSS variables.
So the same drawing suits light, dark and print.
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

from workflow.report.model import MeasuredVariant, Variant
from workflow.report.svg import compact

INK, MUTED, RULE, PAPER = "#1a1a1b", "#6a6a6b", "#d8d8d9", "#fefefd"
# Placeholders: the page's style has their true colors, for light and for dark.
PALETTE = [seaborn.color_palette("colorblind").as_hex()[index] for index in (0, 1, 2, 3, 4, 5, 9, 7)]
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "h")
STYLE = {INK: "currentColor", MUTED: "var(--muted)", RULE: "var(--rule)", PAPER: "var(--paper)"} | {
    color: f"var(--variant-{index})" for index, color in enumerate(PALETTE)
}
WIDTH = 345  # units, about one CSS pixel each
ROW = 40  # height of a row with text above it
FORM_ROW, HEAD_ROW = 32, 24  # heights of a serving form's row, and of a heading
BAR = 16  # height of a bar of memory by component
OVER = 0.24  # distance of the text above a row from its middle, as a share of the row
BAR_SHARE = 0.64  # share of the width for the longest bar; the rest is for its number
SETTINGS = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a category may be called `$x`
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
    "xtick.bottom": False,
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
    """A drawing with its heading."""

    title: str
    svg: Markup
    kind: str = ""  # a CSS class


def color_of(variant: Variant | MeasuredVariant) -> str:
    return PALETTE[variant.position % len(PALETTE)]


def marker_of(variant: Variant | MeasuredVariant) -> str:
    # Each reuse of the palette has other markers.
    return MARKERS[(variant.position + variant.position // len(PALETTE)) % len(MARKERS)]


def legend(variants: list[Variant] | list[MeasuredVariant], key: str) -> list[tuple[str, Markup]]:
    """Each variant's label, and a small drawing of its line and marker."""
    entries = []
    for variant in variants:

        def draw(axes: Axes, variant: Variant | MeasuredVariant = variant) -> None:
            axes.plot([0, 1], [0, 0], color=color_of(variant), linewidth=1.5)
            axes.plot(0.5, 0, color=color_of(variant), marker=marker_of(variant), markersize=6)
            axes.set_axis_off()

        entries.append(
            (variant.label, draw_svg(f"{key}-{variant.position}", draw, "", width=30, height=12, bare=True))
        )
    return entries


def spread(positions: list[float], gap: float) -> list[float]:
    """Positions near the given ones that are at least `gap` apart."""
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    placed: list[float] = []
    for index in order:
        placed.append(max(positions[index], placed[-1] + gap) if placed else positions[index])
    shift = sum(place - positions[index] for place, index in zip(placed, order, strict=True)) / max(
        1, len(order)
    )
    shifted = [0.0] * len(positions)
    for place, index in zip(placed, order, strict=True):
        shifted[index] = place - shift
    return shifted


def write_over_row(axes: Axes, row: int, text: str, *, right: bool = False) -> None:
    """Write above a row, at the left or right end."""
    write_at_side(axes, row - OVER, text, right=right)


def write_at_side(axes: Axes, y: float, text: str, *, right: bool = False, weight: str = "normal") -> None:
    """Write at a height, at the left or right side of the axes."""
    x, align = (1, "right") if right else (0, "left")
    axes.text(x, y, text, ha=align, va="bottom", weight=weight, transform=axes.get_yaxis_transform())


def rows_axis(axes: Axes, rows: int) -> None:
    """Set up the axes for rows, the first one at the top."""
    axes.set_ylim(rows - 0.55, -0.75)
    axes.set_yticks([])
    axes.grid(False, axis="y")
    axes.set_ylabel("")
    axes.xaxis.set_major_locator(MaxNLocator(5))


def put_worse_left(axes: Axes, *, higher_is_better: bool | None) -> None:
    """Turn the horizontal axis, if lower is better, so that worse is on the left in every figure."""
    if higher_is_better is False:
        axes.invert_xaxis()


def draw_svg(
    key: str,
    draw: Callable[[Axes], None],
    alt: str,
    *,
    height: float,
    width: float = WIDTH,
    bare: bool = False,
) -> Markup:
    """Draw a figure as an `<svg>` element for the page.

    Args:
        key: a prefix for the ids, unique on the page.
        draw: draws on the axes.
        alt: the figure in words; empty for a decoration.
        height: in units of about one CSS pixel, as `width`.
        bare: leave no room for axes.
    """
    svg = compact(matplotlib_svg(key, draw, height=height, width=width, bare=bare))
    svg = svg[svg.index("<svg") :]
    svg = (
        re.sub(r'\s+(xmlns(:\w+)?|version|width|height)="[^"]*"', "", svg[: svg.index(">")])
        + svg[svg.index(">") :]
    )
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{key}-", svg)
    svg = re.sub(r" font-family: [^;]*;", "", svg)
    svg = re.sub(r"\s*\n\s*", "\n", svg)
    for color, style in STYLE.items():
        svg = svg.replace(color, style)
    role = Markup('role="img" aria-label="{}"').format(alt) if alt else 'aria-hidden="true"'
    return Markup(svg.strip().replace("<svg", f"<svg {role}", 1))


def matplotlib_svg(key: str, draw: Callable[[Axes], None], *, height: float, width: float, bare: bool) -> str:
    """The SVG document that matplotlib writes."""
    with matplotlib.rc_context(SETTINGS | {"svg.hashsalt": key}):
        figure = Figure(figsize=(width / 72, height / 72), layout=None if bare else "constrained")
        figure.patch.set_visible(False)
        axes = figure.add_axes((0, 0, 1, 1)) if bare else figure.add_subplot()
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return buffer.getvalue()
