"""The figures of the hardware section: memory by component, throughput, and throughput against memory."""

import seaborn
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, StrMethodFormatter

from workflow.report.drawing import BAR, HEAD_ROW, PAPER, Panel, color_of, draw_svg, marker_of, write_at_side
from workflow.report.english import listed, rows_by_length, shape_words
from workflow.report.formatting import NARROW, number, quantity, signed, significant
from workflow.report.model import Device, MeasuredVariant, Point

COMPONENTS = {  # of the predicted memory, in the order of allocation
    "weights": "Base weights",
    "quantization_constants": "Quantization constants",
    "adapters": "Adapters",
    "gradients": "Gradients",
    "optimizer": "Optimizer states",
    "activations": "Activations kept for the backward pass",
    "loss": "Logits and their gradients",
    "transient": "The layer being worked on",
    "workspace": "Workspace of matrix products",
}


def hardware_panels(block: Device, key: str) -> list[Panel]:
    """The figures of a device and shape: speed over tokens, speed over memory, and memory by component."""
    panels = []
    if any(point.measured for point in block.grid):
        panels += [_throughput(block, key), _frontier(block, key)]
    if block.shared:
        panels.append(_components(block, key))
    return panels


def _components(block: Device, key: str) -> Panel:
    """The predicted memory as steps. Each component starts at the end of the previous one."""
    points = [(variant, p) for variant in block.variants for p in block.shared if p.variant == variant.name]
    first = points[0][1]
    names = [name for name in COMPONENTS if any(point.predicted.get(name) for _, point in points)]
    row = HEAD_ROW + BAR * len(points)
    height = row * (len(names) + 2)
    right = max(max(point.peak, point.predicted["total"]) for _, point in points)

    def draw(axes: Axes) -> None:
        below = [0.0] * len(points)
        for index, title in enumerate([*(COMPONENTS[n] for n in names), "Sum, predicted", "Peak, measured"]):
            top = index * row + HEAD_ROW
            write_at_side(axes, top - 3, title)
            for place, (variant, point) in enumerate(points):
                y, color = top + BAR * (place + 0.5), color_of(variant)
                if index < len(names):
                    start, value = below[place], point.predicted.get(names[index], 0)
                    below[place] += value
                else:
                    start, value = 0, point.predicted["total"] if index == len(names) else point.peak
                if index > len(names):
                    axes.barh(y, value, height=BAR * 0.6, facecolor="none", edgecolor=color, linewidth=1.4)
                else:
                    axes.barh(y, value, left=start, height=BAR * 0.7, color=color)
                if index >= len(names):
                    ends = [len(names) * row + HEAD_ROW, height]
                    axes.plot([point.peak] * 2, ends, color=color, linewidth=1, linestyle=(0, (2, 2)))
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
    for variant, point in points:
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
    return Panel(title, draw_svg(f"{key}-components", draw, alt.strip(), height=height + 52))


def _lines(block: Device) -> list[tuple[MeasuredVariant, bool, list[Point]]]:
    """The measured grid points by variant and checkpointing, sorted by tokens."""
    lines = []
    for variant in block.variants:
        for checkpointing in (False, True):
            points = [
                point
                for point in block.grid
                if (point.variant, point.checkpointing, point.measured) == (variant.name, checkpointing, True)
            ]
            if points:
                points.sort(key=lambda point: (point.tokens, point.micro_batch_rows))
                lines.append((variant, checkpointing, points))
    return lines


def _mark(axes: Axes, variant: MeasuredVariant, checkpointing: bool, x: float, y: float) -> None:
    """Draw a grid point, hollow if it was measured with checkpointing."""
    color = color_of(variant)
    face, edge = (PAPER, color) if checkpointing else (color, PAPER)
    axes.plot(
        x,
        y,
        color=color,
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
            color = color_of(variant)
            seaborn.lineplot(
                x=[point.tokens for point in points],
                y=[point.speed["median"] for point in points],
                color=color,
                linestyle=(0, (4, 2)) if checkpointing else "-",
                linewidth=1.4,
                errorbar=None,
                legend=False,
                ax=axes,
            )
            for point in points:
                ends = [point.speed["low"], point.speed["high"]]
                axes.plot([point.tokens] * 2, ends, color=color, linewidth=1.2)
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
    return Panel(title, draw_svg(f"{key}-throughput", draw, alt, height=300))


def _line_name(variant: MeasuredVariant, checkpointing: bool) -> str:
    return f"{variant.label}, {'with' if checkpointing else 'without'} checkpointing"


def _speed_axis(axes: Axes) -> None:
    axes.set_ylim(0, None)
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_ylabel("useful tokens/s (higher is better)")


def _frontier(block: Device, key: str) -> Panel:
    """Peak memory and speed of all grid points. A line joins the points that no other beats in both."""
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
                color=color_of(variant),
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
    return Panel(title, draw_svg(f"{key}-frontier", draw, alt, height=300))


def _peak_name(block: Device) -> str:
    return "peak resident memory" if block.on_cpu else "peak allocated memory"


def block_name(block: Device) -> str:
    """The heading of a measured device and shape. It says so if this run measured the shape itself."""
    return (
        f"{shape_words(block)} on {block.device}{', in this run' if block.own_run and not block.own else ''}"
    )


def deviation(point: Point) -> str:
    """The predicted peak minus the measured one, as a percentage of the measured one."""
    return f"{signed(100 * point.deviation, 1)}{NARROW}%"
