"""A dot table as SVG: rows in the order of their memory, each with a point on an axis of quality and on one of memory.

Without memory, rows are in the order given, on the axis of quality alone.
"""

from dataclasses import dataclass, field

from markupsafe import Markup
from matplotlib.markers import MarkerStyle

WIDTH = 345  # units, about one CSS pixel each
ROW, FOOT = 28, 34  # heights of a row, and of the ticks and labels of the axes
QUALITY, MEMORY = (18.0, 226.0), (250.0, 337.0)  # where the axes begin and end
ALONE = (QUALITY[0], MEMORY[1])  # where an axis of quality alone does
TEXT, POINT = 11, 20  # distances of a row's text and points from its top
LANE = (14, 28)  # where the lines of the axes stand in a row, so that none crosses its text
SIZE = 4.2  # half of a marker's width


@dataclass(frozen=True)
class Axis:
    """A horizontal, linear axis.

    Attributes:
        low, high: its ends.
        ticks: places and their texts.
        is_reversed: whether the higher values are on the left.
        reference: where a line stands; None for none.
        band: the ends of a shaded band.
    """

    low: float
    high: float
    ticks: list[tuple[float, str]]
    label: str
    is_reversed: bool = False
    reference: float | None = None
    band: tuple[float, float] | None = None

    def place(self, value: float, ends: tuple[float, float]) -> float:
        """Where a value stands between two ends, in units of the figure."""
        share = (value - self.low) / (self.high - self.low)
        left, right = ends
        return round(left + (1 - share if self.is_reversed else share) * (right - left), 2)


@dataclass(frozen=True)
class DotRow:
    """A row: its texts, its look, and its values on both axes. `data` becomes data attributes."""

    label: str
    text: str
    color: str
    marker: str
    value: float
    interval: tuple[float, float] | None
    memory: float | None
    data: dict[str, float] = field(default_factory=dict)


def dot_table(key: str, rows: list[DotRow], quality: Axis, memory: Axis | None, alt: str) -> Markup:
    """Draw rows, sorted by memory, with the Pareto line through those that no row with less memory surpasses.

    Args:
        key: a prefix for ids, unique on the page.
        memory: None for rows without memory, which have no such line.
        alt: the figure in words.
    """
    bottom = ROW * len(rows) + 6
    best = pareto([row.value * (-1 if quality.is_reversed else 1) for row in rows]) if memory else []
    parts = [
        *_axis(quality, QUALITY if memory else ALONE, len(rows)),
        *(_axis(memory, MEMORY, len(rows)) if memory else []),
        *_pareto_line([(quality.place(rows[i].value, QUALITY), ROW * i + POINT) for i in best]),
        *(_row(row, ROW * i, quality, memory, is_best=i in best) for i, row in enumerate(rows)),
    ]
    return Markup('<svg role="img" aria-label="{}" viewBox="0 0 {} {}" id="{}">\n{}\n</svg>').format(
        alt, WIDTH, bottom + FOOT, key, Markup("\n").join(parts)
    )


def pareto(values: list[float]) -> list[int]:
    """The places of the values that are higher than all before them."""
    best: list[int] = []
    for index, value in enumerate(values):
        if not best or value > values[best[-1]]:
            best.append(index)
    return best


def _axis(axis: Axis, ends: tuple[float, float], rows: int) -> list[Markup]:
    bottom = ROW * rows + 6
    lanes = [(ROW * row + LANE[0], ROW * row + LANE[1]) for row in range(rows)]

    def lines(x: float) -> str:
        return "".join(f"M{x} {top}V{end}" for top, end in lanes)

    parts = []
    if axis.band:
        left, right = sorted(axis.place(end, ends) for end in axis.band)
        area = "".join(f"M{left} {top}H{right}V{end}H{left}Z" for top, end in lanes)
        parts.append(Markup('<path class="band" d="{}"/>').format(area))
    for tick, text in axis.ticks:
        x = axis.place(tick, ends)
        parts.append(Markup('<path class="grid" d="{}"/>').format(lines(x)))
        parts.append(
            Markup('<text class="tick" x="{}" y="{}" text-anchor="middle">{}</text>').format(
                x, bottom + 12, text
            )
        )
    if axis.reference is not None:
        reference = lines(axis.place(axis.reference, ends))
        parts.append(Markup('<path class="reference" d="{}"/>').format(reference))
    parts.append(
        Markup('<text class="axis" x="{}" y="{}" text-anchor="middle">{}</text>').format(
            sum(ends) / 2, bottom + 28, axis.label
        )
    )
    return parts


def _pareto_line(points: list[tuple[float, float]]) -> list[Markup]:
    """Steps from point to point: down to the row of the next one, and across to it."""
    if not points:
        return []
    (x, y), *rest = points
    steps = "".join(f"V{y}H{x}" for x, y in rest)
    return [Markup('<path class="pareto" d="M{} {}{}"/>').format(x, y, steps)]


def _row(row: DotRow, top: float, quality: Axis, memory: Axis | None, *, is_best: bool) -> Markup:
    y, ends = top + POINT, QUALITY if memory else ALONE
    parts = [
        Markup('<text x="0" y="{}"{}>{}</text>').format(
            top + TEXT, Markup(' class="best-so-far"') if is_best else "", row.label
        ),
        Markup('<text x="{}" y="{}" text-anchor="end">{}</text>').format(WIDTH, top + TEXT, row.text),
    ]
    if row.interval:
        low, high = (quality.place(end, ends) for end in row.interval)
        parts.append(Markup('<path class="interval" d="M{} {}H{}"/>').format(low, y, high))
    places = {"quality": quality.place(row.value, ends)}
    if memory:
        places["memory"] = memory.place(row.memory, MEMORY)
        parts.append(Markup('<path class="interval" d="M{} {}H{}"/>').format(MEMORY[0], y, places["memory"]))
    for name, x in places.items():
        parts.append(
            Markup('<path class="point {}" transform="translate({} {})" d="{}"/>').format(
                name, x, y, _outline(row.marker)
            )
        )
    data = Markup("").join(Markup(' data-{}="{:.4f}"').format(name, gib) for name, gib in row.data.items())
    return Markup('<g class="dots-row" style="color: {}"{}>{}</g>').format(
        row.color, data, Markup("").join(parts)
    )


def _outline(marker: str) -> str:
    """A marker's outline around the origin."""
    if marker == "o":
        return f"M-{SIZE} 0a{SIZE} {SIZE} 0 1 0 {2 * SIZE} 0a{SIZE} {SIZE} 0 1 0 -{2 * SIZE} 0Z"
    style = MarkerStyle(marker)
    (corners, *_) = style.get_path().transformed(style.get_transform()).to_polygons()
    return "M" + "L".join(f"{2 * SIZE * x:.2f} {-2 * SIZE * y:.2f}" for x, y in corners) + "Z"
