"""Speed-ups: which of them each variant's training had, why it lacked the others, and its speed without any."""

from dataclasses import dataclass, replace

from workflow import methods, precisions
from workflow.report.english import count, listed, shape_words
from workflow.report.formatting import Number, ratio, significant
from workflow.report.model import Facts, Point, Variant
from workflow.report.names import SPEED_UPS
from workflow.training.speed.obstacles import obstacles

# What only the loaded model told, where nothing in the params and the tables speaks against a speed-up.
BY_MODEL = {
    "packing": "in a trial, the rows of a pass changed each other’s numbers",
    "fused_loss": "the output head is more than one matrix",
    "cuda_graphs": "its passes take longer to compute than to launch",
}
OF_ADAPTERS = ("fused_adapters", "shared_inputs")
SPEED = "training_speed"


@dataclass(frozen=True)
class Speed:
    """Useful tokens/s, and as a ratio to the baseline's; empty for the baseline itself."""

    value: Number
    ratio: str


@dataclass(frozen=True)
class SpeedUpRow:
    """A variant, or several with the same entries: the mark of each speed-up, and the reasons for those that it lacks."""

    label: str
    marks: tuple[str, ...]  # yes, no or not recorded, in the order of SPEED_UPS
    reasons: str
    speed: Speed | None  # as trained
    plain: Speed | None  # of the plain loop


@dataclass(frozen=True)
class SpeedUps:
    """The table of the speed-ups, and sentences on how to read it."""

    names: list[str]
    rows: list[SpeedUpRow]
    has_speed: bool
    has_plain: bool
    warnings: list[str]
    plain_words: str


def section(facts: Facts) -> SpeedUps:
    """The content of this section's template."""
    plain = _plain_points(facts)
    rows = _joined([_row(facts, variant, plain) for variant in facts.variants]) if _recorded(facts) else []
    return SpeedUps(
        names=[_heading(name) for name in SPEED_UPS.values()],
        rows=rows,
        has_speed=any(row.speed for row in rows),
        has_plain=any(row.plain for row in rows),
        warnings=_warnings(facts),
        plain_words=_plain_words(facts, plain),
    )


def in_force(variant: Variant) -> dict[str, bool]:
    """By name, whether the variant's first training had a speed-up; what an older one did not record is left out."""
    return dict(variant.trained[0].speed_ups)


def reasons(facts: Facts, variant: Variant) -> dict[str, str]:
    """By name, why the variant's training lacked a speed-up, as a clause."""
    settings, training = facts.params.variants[variant.name], facts.params.training_of(variant.name)
    base = precisions.get(variant.precision.base)
    known = obstacles(
        settings,
        training,
        method=methods.get(settings.method),
        base=base,
        device=variant.precision.device,
        compute=variant.precision.compute,
    )
    found = in_force(variant)
    by_model = BY_MODEL | ({"packing": base.no_speed_ups} if base.no_speed_ups else {})
    if not found.get("packing", True):
        by_model["cuda_graphs"] = "needs packing"
    return {
        name: known[name] or by_model.get(name, "not recorded why")
        for name in SPEED_UPS
        if found.get(name) is False
    }


def _recorded(facts: Facts) -> bool:
    return any(in_force(variant) for variant in facts.variants)


def _heading(name: str) -> str:
    return name[0].upper() + name[1:]


def _row(facts: Facts, variant: Variant, plain: dict[str, Point]) -> SpeedUpRow:
    found = in_force(variant)
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons(facts, variant).items():
        by_reason.setdefault(reason, []).append(SPEED_UPS[name])
    return SpeedUpRow(
        label=variant.label,
        marks=tuple({True: "yes", False: "no", None: "not recorded"}[found.get(name)] for name in SPEED_UPS),
        reasons="; ".join(f"{listed(names)}: {reason}" for reason, names in by_reason.items()),
        speed=_speed(facts, variant),
        plain=_plain_speed(facts, variant, plain),
    )


def _joined(rows: list[SpeedUpRow]) -> list[SpeedUpRow]:
    """With one row for the variants without a speed that have the same marks and reasons."""
    joined: dict[SpeedUpRow, list[str]] = {}
    for row in rows:
        joined.setdefault(replace(row, label=""), []).append(row.label)
    return [replace(row, label="; ".join(labels)) for row, labels in joined.items()]


def _speed(facts: Facts, variant: Variant) -> Speed | None:
    cost = facts.cost_of(variant.name, SPEED)
    if cost is None:
        return None
    relative = (
        "" if variant.is_baseline else facts.cite(ratio(cost.ratio_to_baseline), cost, "ratio_to_baseline")
    )
    return Speed(facts.cite(significant(cost.value), cost, "value"), relative)


def _plain_speed(facts: Facts, variant: Variant, plain: dict[str, Point]) -> Speed | None:
    if variant.name not in plain:
        return None
    median, first = plain[variant.name].speed["median"], plain[facts.baseline.name].speed["median"]
    key = f"{plain[variant.name].key}.useful_tokens_per_second.median"
    return Speed(
        Number(significant(median), median, key), "" if variant.is_baseline else ratio(median / first)
    )


def _plain_points(facts: Facts) -> dict[str, Point]:
    """The plain loop of the run's variants on one device, model shape and sample, by variant, the baseline's among them.

    Of several, those of the run's own device and model come first, then those with the most variants.
    """
    names = {variant.name for variant in facts.variants}
    groups: dict[tuple, dict[str, Point]] = {}
    for index, block in enumerate(facts.hardware):
        for point in block.settings:
            if point.loop == "plain" and point.measured and point.variant in names:
                key = (block.device in facts.devices, block.own, -index, point.rows)
                groups.setdefault(key, {})[point.variant] = point
    complete = {key: group for key, group in groups.items() if facts.baseline.name in group}
    best = max(complete, key=lambda key: (key[:2], len(complete[key]), key[2]), default=None)
    return {} if best is None else complete[best]


def _plain_words(facts: Facts, plain: dict[str, Point]) -> str:
    """Where the plain loop was measured, or that it was not."""
    what = "The plain loop is that of most tutorials (transformers and PEFT, none of these speed-ups)"
    if not plain:
        return f"{what}; it was not measured for this run. On a GPU, make benchmark measures it."
    point = plain[facts.baseline.name]
    block = next(block for block in facts.hardware if point in block.points)
    model = "this model" if block.own else f"a model of the {shape_words(block)}"
    return f"{what}, on {block.device} with {model}, {count(point.batch_rows, 'row')} a step."


def _warnings(facts: Facts) -> list[str]:
    """A sentence for each variant that lacked speed-ups which the baseline had."""
    theirs = {name for name, had in in_force(facts.baseline).items() if had}
    sentences = []
    for variant in facts.others:
        ours = in_force(variant)
        adapter = methods.get(facts.params.variants[variant.name].method).leaves_adapter
        lacking = [
            SPEED_UPS[name]
            for name in SPEED_UPS
            if name in theirs and ours.get(name) is False and (adapter or name not in OF_ADAPTERS)
        ]
        if lacking:
            sentences.append(
                f"{variant.label} trained without {listed(lacking)}, which {facts.baseline.label} had: its speed is no "
                "property of its precision or method alone."
            )
    return sentences
