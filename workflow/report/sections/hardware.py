"""Hardware: memory and speed by device, model shape, batch and length, and what fits on a GPU."""

from dataclasses import dataclass
from itertools import product

from markupsafe import Markup

from workflow.report import drawing, english, formatting
from workflow.report.english import count, gib, rows_by_length, shape_words
from workflow.report.formatting import Number, number, quantity, ratio
from workflow.report.model import GPU_SIZES, Device, Facts, Point
from workflow.report.names import setting_name, shape_name
from workflow.report.sections.hardware_figure import block_name, deviation, hardware_panels

CLOSE = 0.05  # relative error of a prediction that counts as close


@dataclass(frozen=True)
class PointRow:
    """A point of a device. If it was not measured, `missing` says why and the measurements are empty."""

    setting: str
    batch: str
    point: str
    checkpointing: str
    missing: str
    speed: str
    quartiles: str
    ratio: str
    overall: str
    overall_ratio: str
    peak: str
    peak_note: str
    reserved: str
    predicted: str
    deviation: str
    share: str
    nominal_share: str
    joules: str


@dataclass(frozen=True)
class HardwareBlock:
    """A device at a model shape. The rows of its tables are grouped by sample and variant."""

    name: str
    points: str  # how many there are
    words: str
    settings: list[tuple[str, list[PointRow]]]
    setting_steps: str
    grid: list[tuple[str, list[PointRow]]]
    grid_points: str  # how many have no table, as they are of a device that is not this run's
    panels: list[drawing.Panel]
    legend: list[tuple[str, Markup]]
    shared: bool
    peak_name: str
    device: str
    shape: str
    weights: str
    versions: list[tuple[str, str]]
    files: list[str]
    command: str


@dataclass(frozen=True)
class FitRow:
    label: str
    checkpointing: str
    cells: list[str]


def hardware_blocks(facts: Facts) -> list[HardwareBlock]:
    """The measurements by device and shape. The first with a grid, on the run's own device, has figures.

    The points of a grid on another device are in its file alone: they would be a quarter of the page.
    """
    own = [block for block in facts.hardware if block.own_run or block.device in facts.devices]
    drawn = next((block for block in own if any(point.measured for point in block.grid)), None)
    return [
        _hardware_block(block, f"hardware-{index}", is_drawn=block is drawn, is_own=block in own)
        for index, block in enumerate(facts.hardware)
    ]


def _hardware_block(block: Device, key: str, *, is_drawn: bool, is_own: bool) -> HardwareBlock:
    panels = hardware_panels(block, key) if is_drawn else []
    grid_variants = [v for v in block.variants if any(point.variant == v.name for point in block.grid)]
    steps = dict.fromkeys(
        f"{english.count(p.steps, 'step')} after {p.warmup_steps:,} of warm-up" for p in block.settings
    )
    return HardwareBlock(
        name=block_name(block),
        points=count(len(block.points), "point"),
        words=block_words(block),
        settings=_point_rows(block, block.settings, fastest_first=True),
        setting_steps=english.listed(list(steps)) if steps else "",
        grid=_point_rows(block, block.grid) if is_own else [],
        grid_points="" if is_own or not block.grid else count(len(block.grid), "point"),
        panels=panels,
        legend=drawing.legend(grid_variants, f"{key}-legend") if panels else [],
        shared=bool(block.shared),
        peak_name="Peak, resident" if block.on_cpu else "Peak, allocated",
        device=block.device,
        shape=block.shape,
        weights="the run’s own" if block.own else "random",
        versions=list(block.versions.items()),
        files=block.files,
        command="dvc repro benchmark_grid" if block.own_run else "make benchmark",
    )


def _point_rows(
    block: Device, points: list[Point], *, fastest_first: bool = False
) -> list[tuple[str, list[PointRow]]]:
    """The rows of each sample and variant, sorted by tokens or by speed.

    Args:
        fastest_first: sort by speed, with the points that were not measured last.
    """

    def order(point: Point) -> tuple:
        if fastest_first:
            return (not point.measured, -point.speed.get("median", 0))
        return (point.tokens, point.micro_batch_rows, point.checkpointing)

    tables = []
    for sample, variant in product(dict.fromkeys(p.rows for p in points), block.variants):
        key = (variant.name, sample)
        rows = [_point_row(block, p) for p in sorted(points, key=order) if (p.variant, p.rows) == key]
        if rows:
            tables.append((sample_heading(variant.label, sample), rows))
    return tables


def _point_row(block: Device, point: Point) -> PointRow:
    plain, speed = block.plain(point), point.speed
    compared = point.measured and plain is not None and point is not plain
    other = f" (at {plain.batch_rows:,})" if compared and plain.batch_rows != point.batch_rows else ""
    memory_key = "peak_resident" if block.on_cpu else "peak_allocated"

    def cite(text: str, value: float | None, *names: str) -> str:
        return "" if value is None else Number(text, value, ".".join([point.key, *names]))

    return PointRow(
        setting=setting_name(point.setting),
        batch=batch_text(point),
        point=english.rows_by_length(point),
        checkpointing=f"{'with' if point.checkpointing else 'without'} checkpointing",
        missing="" if point.measured else outcome_text(point),
        speed=cite(
            formatting.significant(speed["median"]), speed["median"], "useful_tokens_per_second", "median"
        )
        if speed
        else "",
        quartiles=f"{formatting.significant(speed['low'])} to {formatting.significant(speed['high'])}"
        if speed
        else "",
        ratio=ratio(speed["median"] / plain.speed["median"]) + other if compared else "",
        overall="" if point.overall is None else formatting.significant(point.overall),
        overall_ratio=ratio(point.overall / plain.overall) + other
        if compared and point.overall and plain.overall
        else "",
        peak=cite(gib(point.peak), point.peak, "memory_gib", memory_key),
        peak_note=peak_note(point),
        reserved=cite(gib(point.reserved), point.reserved, "memory_gib", "peak_reserved"),
        predicted=cite(gib(point.predicted["total"]), point.predicted["total"], "predicted_gib", "total")
        if point.predicted
        else "",
        deviation=deviation(point) if point.deviation is not None else "",
        share=_percent(point.share),
        nominal_share=_percent(point.nominal_share),
        joules=""
        if point.joules is None
        else cite(quantity(point.joules, "J"), point.joules, "joules_per_1000_tokens"),
    )


def _percent(share: float | None) -> str:
    return "" if share is None else f"{number(100 * share, 1)}{formatting.NARROW}%"


def fit_blocks(facts: Facts) -> list[tuple[str, list[FitRow]]]:
    """The most tokens that fit in a forward pass, by shape."""
    blocks: dict[str, list[FitRow]] = {}
    for fit in facts.fits:
        row = FitRow(
            label=fit.variant.label,
            checkpointing=f"{'with' if fit.checkpointing else 'without'} checkpointing, rank {fit.rank}",
            cells=[f"{fit.tokens[size]:,}" if fit.tokens[size] else "" for size in GPU_SIZES],
        )
        blocks.setdefault(f"{shape_name(fit.shape)} shape", []).append(row)
    return list(blocks.items())


def peak_note(point: Point) -> str:
    """The forward passes that a point's peak is from."""
    if point.longest is not None:
        return f"longest pass of an epoch, {point.longest:,} tokens"
    return f"peak over {count(point.warmup_steps + point.steps, 'step')}"


def hardware_short(facts: Facts) -> str:
    """The section's title in the contents."""
    return "On a GPU" if any(not block.on_cpu for block in facts.hardware) else "Batch and length"


def hardware_heading(facts: Facts) -> str:
    """The section's heading."""
    on_gpu = any(not block.on_cpu for block in facts.hardware)
    return "What it costs on a GPU" if on_gpu else "What it costs over batch and length"


def block_words(block: Device) -> str:
    """Sentences on what was measured on a device, and how."""
    model = "the run’s own model" if block.own else "a model of this shape with random weights"
    text = (
        f"{'Each point' if len(block.points) > 1 else 'The point'} is a process of its own that trained {model} "
        f"on {block.device}; speed is the median over the counted steps."
    )
    if not block.own:
        text += " Random weights take the memory and time of trained ones; they say nothing of quality."
    missing = sum(not point.measured for point in block.points)
    if missing:
        text += f" Of {count(len(block.points), 'point')}, {missing:,} could not be measured."
    return text


def sample_heading(label: str, rows: int | None) -> str:
    """A variant and the number of rows of its sample, if that is known."""
    return label if rows is None else f"{label}, on {count(rows, 'row')}"


def batch_text(point: Point) -> str:
    """The batch of a point on rows of a dataset."""
    parts = [f"{count(point.batch_rows, 'row')} a step"]
    if point.micro_batch_rows != point.batch_rows:
        parts.append(f"{point.micro_batch_rows:,} at a time")
    parts.append(f"at most {point.length:,} tokens each")
    return ", ".join(parts) + (", gradient checkpointing" if point.checkpointing else "")


def outcome_text(point: Point) -> str:
    """The reason why a point was not measured."""
    if point.requested is not None:
        return f"{point.outcome}: another {quantity(point.requested, 'GiB')} could not be allocated"
    return f"{point.outcome}: {point.detail}" if point.detail else point.outcome


def prediction_sentence(facts: Facts) -> str | None:
    """Sentences on the deviation of predicted from measured peaks, over all devices. None without a prediction."""
    points = [
        (point, block)
        for block in facts.hardware
        for point in block.points
        if point.measured and point.deviation is not None
    ]
    if not points:
        return None
    close = sum(abs(p.predicted["total"] - p.peak) <= CLOSE * p.peak for p, _ in points)
    point, block = max(points, key=lambda pair: abs(pair[0].deviation))
    label = next(variant.label for variant in block.variants if variant.name == point.variant)
    setting = "" if point in block.grid else f", {setting_name(point.setting)}"
    checkpointing = " with checkpointing" if point.checkpointing else ""
    verb = "lies" if close == 1 else "lie"
    return (
        f"The memory predicted from the model’s shape alone, before anything runs, was compared with the measured "
        f"peak at {count(len(points), 'point')}: {close:,} of them {verb} within {formatting.percent(CLOSE)} of it. "
        f"The largest deviation is {deviation(point)} ({label} at {'' if block.own else 'the '}{shape_words(block)}, {rows_by_length(point)} tokens"
        f"{checkpointing}{setting})."
    )


@dataclass(frozen=True)
class Hardware:
    """The tables and figures by device and model shape."""

    short: str  # title in the contents
    heading: str
    prediction: str | None
    blocks: list[HardwareBlock]
    fits: list[tuple[str, list[FitRow]]]  # by model shape
    gpu_sizes: tuple[int, ...]  # GB of 10^9 bytes


def section(facts: Facts) -> Hardware:
    """The content of this section's template."""
    return Hardware(
        short=hardware_short(facts),
        heading=hardware_heading(facts),
        prediction=prediction_sentence(facts),
        blocks=hardware_blocks(facts),
        fits=fit_blocks(facts),
        gpu_sizes=GPU_SIZES,
    )
