"""The page's tables: the facts as rows of text."""

from dataclasses import dataclass
from itertools import product

from markupsafe import Markup

from workflow import methods, precisions
from workflow.comparison.model import ALL, HELD_OUT, SEEN, Score
from workflow.report import drawing, formatting, hardware_figures
from workflow.report import english as words
from workflow.report.english import Change
from workflow.report.facts import AS_TRAINED, BASE, CATEGORY, GPU_SIZES, Device, Facts, Point, Variant
from workflow.report.formatting import Number, clean, number, quantity, ratio

FIRST_COSTS = ("peak_memory", "weights", "training_speed", "step_time")  # the others follow
RECORD_NAMES = {"sha256": "sha256", "quantized_before": "Quantized before", "storage_dtype": "Stored as"}


@dataclass(frozen=True)
class VariantRow:
    label: str
    short: str
    name: str
    is_baseline: bool
    color: str
    held_as: str
    computes_in: str
    quantized: str
    trainable: str
    steps: str
    tokens_seen: str


@dataclass(frozen=True)
class QualityRow:
    """One variant in one form; its changes are None where no difference was taken."""

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
    """One metric's rows."""

    name: str
    direction: str
    margin: str
    test_set: str
    tally: str
    rows: list[QualityRow]


@dataclass(frozen=True)
class PartRow:
    part: str
    form: str
    change: Change


@dataclass(frozen=True)
class ClaimRow:
    claim: str
    text: str
    label: str
    form: str
    holds: str
    sentence: str


@dataclass(frozen=True)
class RepairRow:
    """A fault's difference in one metric."""

    metric: str
    direction: str
    faulty: str
    repaired: str
    change: Change


@dataclass(frozen=True)
class RepairBlock:
    """One fault, switched alone."""

    name: str
    faulty: str
    repaired: str
    rows: list[RepairRow]


@dataclass(frozen=True)
class CategoryCell:
    before: str
    after: str
    change: Change | None


@dataclass(frozen=True)
class CategoryRow:
    """One category, or several together, with a cell per variant."""

    name: str
    pooled: bool
    held_out: bool
    items: int
    cells: list[CategoryCell | None]


@dataclass(frozen=True)
class FormRow:
    """A form as it was found when it was loaded."""

    label: str
    form: str
    held_as: str
    quantized: str
    adapters: str


@dataclass(frozen=True)
class CostCell:
    value: str
    quartiles: str
    ratio: str


@dataclass(frozen=True)
class CostRow:
    """One measured cost, with a cell per variant."""

    name: str
    unit: str
    direction: str
    definition: str
    cells: list[CostCell | None]


@dataclass(frozen=True)
class PointRow:
    """One point of a measured device; where it was not measured, `missing` says why and the rest is empty."""

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
    peak_of: str
    reserved: str
    predicted: str
    deviation: str
    share: str
    joules: str


@dataclass(frozen=True)
class HardwareBlock:
    """One device at one shape; the rows of a table are by variant."""

    name: str
    words: str
    settings: list[tuple[str, list[PointRow]]]
    setting_steps: str
    grid: list[tuple[str, list[PointRow]]]
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


@dataclass(frozen=True)
class EvidenceCell:
    """A number of the evidence table; `best` where it is decided that no other row's is as good."""

    number: Number
    note: str
    ratio: str | None
    best: bool


@dataclass(frozen=True)
class EvidenceRow:
    """A variant in a form; the costs of training are those of the variant, so they stand in its first row alone."""

    label: str
    short: str
    form: str
    color: str
    is_baseline: bool
    quality: EvidenceCell | None
    change: Change | None
    weights: EvidenceCell | None
    costs: list[EvidenceCell | None]


@dataclass(frozen=True)
class Evidence:
    """The table of everything that was compared; `costs` are (name, unit, direction) of its last columns."""

    rows: list[EvidenceRow]
    costs: list[tuple[str, str, str]]
    energy: str  # of what, or why there is none


EVIDENCE_COSTS = ("peak_memory", "training_speed", "step_time")


def evidence(facts: Facts) -> Evidence:
    """Quality, memory, time and energy of every variant and form, absolute and relative to the baseline."""
    decimals = words.decimals_for(facts, facts.primary)
    arms = [(variant, form) for variant in facts.variants for form in facts.forms_of(variant.name)]
    best = _decided_best(facts, arms)
    weights = {(v.name, form): facts.weights_of(v.name, form) for v, form in arms}
    lightest = min((gib for gib in weights.values() if gib is not None), default=None)
    metrics = [metric for metric in EVIDENCE_COSTS if metric in facts.cost_metrics]
    energy = facts.energy
    rows = []
    for variant, form in arms:
        score = facts.score(variant.name, form, facts.primary)
        against = facts.to_baseline(variant.name, form, facts.primary)
        served = facts.served_as(variant.name, form)
        costs = [_cost_cell(facts, variant, metric) if form == AS_TRAINED else None for metric in metrics]
        if energy:
            costs.append(_energy_cell(facts, variant) if form == AS_TRAINED else None)
        rows.append(
            EvidenceRow(
                label=variant.label,
                short=variant.short,
                form=words.form_name(form),
                color=drawing.STYLE[drawing.color_of(variant)],
                is_baseline=variant.is_baseline and form == AS_TRAINED,
                quality=score
                and EvidenceCell(
                    facts.shown(number(score.value, decimals), score, "value"),
                    "",
                    None,
                    (variant.name, form) == best,
                ),
                change=against and words.change(facts, against, decimals),
                weights=served
                and EvidenceCell(
                    Number(
                        formatting.significant(served.precision["weights_gib"]),
                        served.precision["weights_gib"],
                        f"{served.key}.weights_gib",
                    ),
                    "",
                    None,
                    weights[variant.name, form] == lightest and list(weights.values()).count(lightest) == 1,
                ),
                costs=costs,
            )
        )
    named = []
    for metric in metrics:
        first = next(cost for v in facts.variants if (cost := facts.cost_of(v.name, metric)))
        named.append((words.cost_name(metric), first.unit, words.direction(first.higher_is_better)))
    if energy:
        named.append(("Energy", "J per 1,000 tokens", words.direction(False)))
    return Evidence(rows, named, words.energy_words(facts))


def _decided_best(facts: Facts, arms: list[tuple[Variant, str]]) -> tuple[str, str] | None:
    """The arm whose interval of the difference to the baseline lies apart from, and better than, all others'."""
    spans = {}
    for variant, form in arms:
        contrast = facts.to_baseline(variant.name, form, facts.primary)
        if contrast:
            sign = 1 if contrast.higher_is_better else -1
            spans[variant.name, form] = sorted(
                (sign * contrast.difference.low, sign * contrast.difference.high)
            )
        elif variant.is_baseline and form == AS_TRAINED:
            spans[variant.name, form] = [0.0, 0.0]
    for arm, (low, _) in spans.items():
        if len(spans) > 1 and all(low > high for other, (_, high) in spans.items() if other != arm):
            return arm
    return None


def _cost_cell(facts: Facts, variant: Variant, metric: str) -> EvidenceCell | None:
    """A cost; none is the best, as each was measured in one process."""
    cost = facts.cost_of(variant.name, metric)
    if cost is None:
        return None
    return EvidenceCell(
        number=facts.shown(formatting.significant(cost.value), cost, "value"),
        note=""
        if cost.low is None
        else f"{formatting.significant(cost.low)} to {formatting.significant(cost.high)}",
        ratio=None
        if variant.is_baseline
        else facts.shown(ratio(cost.ratio_to_baseline), cost, "ratio_to_baseline"),
        best=False,
    )


def _energy_cell(facts: Facts, variant: Variant) -> EvidenceCell | None:
    energy = facts.energy
    if variant.name not in energy:
        return None
    point, first = energy[variant.name], energy.get(facts.baseline.name)
    relative = None
    if first and not variant.is_baseline:
        relative = ratio(point.joules / first.joules)
    shown = Number(formatting.significant(point.joules), point.joules, f"{point.key}.joules_per_1000_tokens")
    return EvidenceCell(shown, "", relative, False)


@dataclass(frozen=True)
class WorkRow:
    """The time that a stage's runs recorded."""

    stage: str
    runs: str
    time: str
    measured: str


def work_rows(facts: Facts) -> list[WorkRow]:
    """The recorded time by stage, and all of it."""
    rows = [WorkRow(w.stage, f"{w.runs:,}", words.duration(w.seconds), w.measured) for w in facts.work]
    total = words.duration(sum(work.seconds for work in facts.work))
    return [*rows, WorkRow("together", f"{sum(work.runs for work in facts.work):,}", total, "")]


def variant_rows(facts: Facts) -> list[VariantRow]:
    """What each variant is: storage, compute type, what was quantized and what was trained."""
    rows = []
    for variant in facts.variants:
        precision, trained = variant.precision, variant.trained[0]
        rows.append(
            VariantRow(
                label=variant.label,
                short=variant.short,
                name=variant.name,
                is_baseline=variant.is_baseline,
                color=drawing.STYLE[drawing.color_of(variant)],
                held_as=_held_as(precision),
                computes_in=precision["compute"],
                quantized=f"{precision['quantized_modules']:,} of {precision['linear_modules']:,}",
                trainable=f"{trained['trainable_parameters']:,} ({trained['trainable_dtype']})",
                steps=words.listed(list(dict.fromkeys(f"{run['steps']:,}" for run in variant.trained))),
                tokens_seen=words.listed(
                    list(dict.fromkeys(f"{run['tokens_seen']:,}" for run in variant.trained))
                ),
            )
        )
    return rows


def _held_as(precision: dict) -> str:
    if not precisions.get(precision["base"]).is_quantized and precision["storage"] == "float32":
        return "float32 (rounded to 16 bits)"
    return precision["storage"] + (", double-quantized" if precision["double_quantization"] else "")


def form_rows(facts: Facts) -> list[FormRow]:
    """Every form of every variant, by variant."""
    rows = []
    for variant in facts.variants:
        for served in facts.served:
            if served.variant == variant.name:
                found = served.precision
                rows.append(
                    FormRow(
                        label=variant.label,
                        form=words.form_name(served.form),
                        held_as=_held_as(found),
                        quantized=f"{found['quantized_modules']:,} of {found['linear_modules']:,}",
                        adapters=f"{served.adapters:,} ({served.adapter_dtype})" if served.adapters else "0",
                    )
                )
    return rows


def quality_blocks(facts: Facts) -> list[QualityBlock]:
    """The quality tables of the metrics in which differences were taken, the primary one first."""
    return [_block(facts, metric) for metric in facts.compared_metrics]


def value_blocks(facts: Facts) -> list[QualityBlock]:
    """The tables of the metrics that have values alone."""
    return [_block(facts, metric) for metric in facts.other_metrics]


def _block(facts: Facts, metric: tuple[str, str]) -> QualityBlock:
    """One metric: a row per variant and form that was scored in it."""
    decimals = words.decimals_for(facts, metric)
    rows, first = [], None
    for variant in facts.variants:
        base = facts.score(variant.name, BASE, metric)
        for form in facts.forms_of(variant.name):
            score = facts.score(variant.name, form, metric)
            if score is None:
                continue
            first = first or score
            to_base = facts.contrast("to_base", variant.name, form, metric)
            against = facts.to_baseline(variant.name, form, metric)
            rows.append(
                QualityRow(
                    label=variant.label,
                    form=words.form_name(form),
                    as_trained=form == AS_TRAINED,
                    is_baseline=variant.is_baseline and form == AS_TRAINED,
                    before=facts.shown(number(base.value, decimals), base, "value")
                    if base and form == AS_TRAINED
                    else "",
                    after=facts.shown(number(score.value, decimals), score, "value"),
                    per_seed=[
                        facts.shown(number(value, decimals), score, "per_seed", seed)
                        for seed, value in score.per_seed.items()
                    ],
                    by_training=to_base and words.change(facts, to_base, decimals),
                    to_baseline=against and words.change(facts, against, decimals),
                )
            )
    differences = [facts.contrast("to_baseline", v.name, AS_TRAINED, metric) for v in facts.others]
    margin = facts.compared.margins.get("/".join(metric))
    return QualityBlock(
        name=_name(metric, first),
        direction="" if first.higher_is_better is None else words.direction(first.higher_is_better),
        margin="" if margin is None else f"{margin:g}{formatting.NARROW}{first.unit}",
        test_set=_test_set(first),
        tally=words.tally([one for one in differences if one]),
        rows=rows,
    )


def _name(metric: tuple[str, str], score: Score) -> str:
    name = words.quality_name(metric)
    return name if name.endswith(score.unit) else f"{name} ({score.unit})"


def _test_set(score: Score) -> str:
    items = words.count(score.items, "test item")
    return items if score.groups is None else f"{items}, {words.groups(score)}"


def decomposition(facts: Facts) -> list[tuple[str, list[PartRow]]]:
    """Of each quantized variant, the parts of its difference to the baseline in the primary metric."""
    found: dict[str, list[PartRow]] = {}
    least = words.decimals_for(facts, facts.primary)
    for part in facts.compared.decomposition:
        contrast = facts.contrast(part.kind, part.variant, part.form, facts.primary)
        if contrast and (part.task, part.metric) == facts.primary:
            decimals = max(least, formatting.decimals_of(part.low, part.high))
            form = words.form_name(part.form) if part.kind == "form" else ""
            row = PartRow(part.part, form, words.change(facts, contrast, decimals))
            found.setdefault(part.variant, []).append(row)
    return [(variant.label, found[variant.name]) for variant in facts.variants if variant.name in found]


def claim_rows(facts: Facts) -> list[ClaimRow]:
    """The claims, each with a row per variant and form that it was checked in."""
    labels = {variant.name: variant.label for variant in facts.variants}
    rows = [
        ClaimRow(c.claim, c.text, labels[c.variant], words.form_name(c.form), c.holds, c.sentence)
        for c in facts.compared.claims
    ]
    order = list(dict.fromkeys((row.claim, row.text) for row in rows))
    return sorted(rows, key=lambda row: order.index((row.claim, row.text)))


def repair_blocks(facts: Facts) -> list[RepairBlock]:
    """The faults that were switched alone, each in every metric."""
    found: dict[str, RepairBlock] = {}
    for contrast in facts.compared.contrasts:
        if contrast.kind != "repair" or contrast.subset != ALL:
            continue
        metric = (contrast.task, contrast.metric)
        faulty = facts.score(contrast.variant, contrast.form, metric)
        repaired = facts.score(*contrast.other.split("/"), metric)
        decimals = formatting.decimals_of(contrast.difference.low, contrast.difference.high)
        block = found.setdefault(
            contrast.name,
            RepairBlock(
                name=contrast.name.replace("_", " ").capitalize(),
                faulty=words.arm_name(facts, f"{contrast.variant}/{contrast.form}"),
                repaired=words.arm_name(facts, contrast.other),
                rows=[],
            ),
        )
        block.rows.append(
            RepairRow(
                metric=_name(metric, faulty),
                direction=words.direction(contrast.higher_is_better),
                faulty=facts.shown(number(faulty.value, decimals), faulty, "value"),
                repaired=facts.shown(number(repaired.value, decimals), repaired, "value"),
                change=words.change(facts, contrast, decimals),
            )
        )
    return list(found.values())


def category_rows(facts: Facts) -> list[CategoryRow]:
    """The primary metric by category: those held out of training and the others together, then each."""
    found = {s.subset: s for s in facts.compared.scores if (s.task, s.metric) == facts.primary}
    categories = sorted(subset for subset in found if subset.startswith(CATEGORY))
    held_out = {f"{CATEGORY}{name}" for name in facts.compared.held_out_categories}
    names = {HELD_OUT: "Held out of training, together", SEEN: "The others, together"}
    names |= {subset: clean(subset.removeprefix(CATEGORY)) for subset in categories}
    return [
        CategoryRow(
            name=name,
            pooled=subset in (HELD_OUT, SEEN),
            held_out=subset in held_out,
            items=found[subset].items,
            cells=[_category_cell(facts, variant.name, subset) for variant in facts.variants],
        )
        for subset, name in sorted(
            names.items(), key=lambda pair: pair[0] in categories and pair[0] not in held_out
        )
        if subset in found
    ]


def _category_cell(facts: Facts, variant: str, subset: str) -> CategoryCell | None:
    decimals = words.decimals_for(facts, facts.primary)
    base, trained = (facts.score(variant, form, facts.primary, subset) for form in (BASE, AS_TRAINED))
    if base is None or trained is None:
        return None
    contrast = facts.contrast("to_base", variant, AS_TRAINED, facts.primary, subset)
    return CategoryCell(
        before=facts.shown(number(base.value, decimals), base, "value"),
        after=facts.shown(number(trained.value, decimals), trained, "value"),
        change=contrast and words.change(facts, contrast, decimals),
    )


def commands(facts: Facts) -> list[tuple[str, list[str]]]:
    """What each list of commands scores, and the list."""
    labels = {variant.name: variant.label for variant in facts.variants}
    return [
        (
            f"{labels[one.variant]}, {'' if one.seed is None else f'seed {one.seed}, '}{words.form_name(one.form)}",
            one.commands,
        )
        for one in facts.commands
    ]


def cost_rows(facts: Facts) -> list[CostRow]:
    """The cost table: a row per measurement, a cell per variant, None where it was not measured."""
    rows = []
    first_ones = [metric for metric in FIRST_COSTS if metric in facts.cost_metrics]
    for metric in dict.fromkeys([*first_ones, *facts.cost_metrics]):
        costs = [facts.cost_of(variant.name, metric) for variant in facts.variants]
        first = next(cost for cost in costs if cost)
        cells = [
            CostCell(
                value=facts.shown(quantity(cost.value, cost.unit), cost, "value"),
                quartiles=""
                if cost.low is None or cost.high is None
                else f"{formatting.significant(cost.low)} to {formatting.significant(cost.high)}",
                ratio=""
                if variant.is_baseline
                else facts.shown(ratio(cost.ratio_to_baseline), cost, "ratio_to_baseline"),
            )
            if cost
            else None
            for variant, cost in zip(facts.variants, costs, strict=True)
        ]
        rows.append(
            CostRow(
                name=words.cost_name(metric),
                unit=first.unit,
                direction=words.direction(first.higher_is_better),
                definition=first.definition,
                cells=cells,
            )
        )
    return rows


def hardware_blocks(facts: Facts) -> list[HardwareBlock]:
    """What was measured on devices, by device and shape."""
    return [_hardware_block(block, f"hardware-{index}") for index, block in enumerate(facts.hardware)]


def _hardware_block(block: Device, key: str) -> HardwareBlock:
    panels = hardware_figures.hardware_panels(block, key)
    drawn = [v for v in block.variants if any(point.variant == v.name for point in block.grid)]
    steps = dict.fromkeys(
        f"{words.count(p.steps, 'step')} after {p.warmup_steps:,} of warm-up" for p in block.settings
    )
    return HardwareBlock(
        name=words.block_name(block),
        words=words.block_words(block),
        settings=_point_rows(block, block.settings, fastest_first=True),
        setting_steps=words.listed(list(steps)) if steps else "",
        grid=_point_rows(block, block.grid),
        panels=panels,
        legend=drawing.legend(drawn, f"{key}-legend") if panels else [],
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
    """Rows by sample and variant, by tokens or the fastest first; what was not measured is last."""

    def order(point: Point) -> tuple:
        if fastest_first:
            return (not point.measured, -point.speed.get("median", 0))
        return (point.tokens, point.micro_batch_rows, point.checkpointing)

    found = []
    for sample, variant in product(dict.fromkeys(p.rows for p in points), block.variants):
        wanted = (variant.name, sample)
        rows = [_point_row(block, p) for p in sorted(points, key=order) if (p.variant, p.rows) == wanted]
        if rows:
            found.append((words.of_sample(variant.label, sample), rows))
    return found


def _point_row(block: Device, point: Point) -> PointRow:
    plain, speed = block.plain(point), point.speed
    compared = point.measured and plain is not None and point is not plain
    other = f" (at {plain.batch_rows:,})" if compared and plain.batch_rows != point.batch_rows else ""
    held = "peak_resident" if block.on_cpu else "peak_allocated"

    def shown(text: str, value: float | None, *names: str) -> str:
        return "" if value is None else Number(text, value, ".".join([point.key, *names]))

    return PointRow(
        setting=point.setting,
        batch=words.batch(point),
        point=words.rows_by_length(point),
        checkpointing=f"{'with' if point.checkpointing else 'without'} checkpointing",
        missing="" if point.measured else words.outcome(point),
        speed=shown(
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
        peak=shown(gib(point.peak), point.peak, "memory_gib", held),
        peak_of=words.peak_of(point),
        reserved=shown(gib(point.reserved), point.reserved, "memory_gib", "peak_reserved"),
        predicted=shown(gib(point.predicted["total"]), point.predicted["total"], "predicted_gib", "total")
        if point.predicted
        else "",
        deviation=words.deviation(point) if point.deviation is not None else "",
        share="" if point.share is None else f"{number(100 * point.share, 1)}{formatting.NARROW}%",
        joules=""
        if point.joules is None
        else shown(quantity(point.joules, "J"), point.joules, "joules_per_1000_tokens"),
    )


def fit_blocks(facts: Facts) -> list[tuple[str, list[FitRow]]]:
    """The most tokens that fit into a forward pass, by shape."""
    found: dict[str, list[FitRow]] = {}
    for fit in facts.fits:
        row = FitRow(
            label=fit.variant.label,
            checkpointing=f"{'with' if fit.checkpointing else 'without'} checkpointing, rank {fit.rank}",
            cells=[f"{fit.tokens[size]:,}" if fit.tokens[size] else "" for size in GPU_SIZES],
        )
        found.setdefault(fit.shape, []).append(row)
    return list(found.items())


def record(source: dict) -> list[tuple[str, str]]:
    """A source record as pairs of a readable name and its value."""
    pairs = []
    for key, value in source.items():
        name = RECORD_NAMES.get(key, key.replace("_", " ").capitalize())
        if value is None:
            value = "no"
        pairs.append((name, f"{value:,}" if isinstance(value, int) and key != "seed" else str(value)))
    return pairs


def training_words(facts: Facts) -> str:
    """How the baseline was trained, in a sentence or two."""
    asked = facts.asked.training_of(facts.baseline.name)
    trained = facts.baseline.trained[0]
    modules = (
        "all linear layers" if asked.target_modules == "all-linear" else words.listed(asked.target_modules)
    )
    method = methods.get(facts.asked.variants[facts.baseline.name].method)
    adapter = (
        f"{method.product} of rank {asked.rank} (alpha {asked.alpha}, dropout {asked.dropout:g}) on {modules} "
        f"({trained['adapted_modules']:,} of them)"
        if method.leaves_adapter
        else method.trains.capitalize()
    )
    part = "the response alone" if asked.loss_on == "response" else "prompt and response"
    return (
        f"{adapter} was trained for {words.count(trained['steps'], 'step')} of "
        f"{words.count(asked.batch_rows, 'row')} with {asked.optimizer}, learning rate "
        f"{asked.learning_rate:g} ({asked.schedule} schedule), with the loss on {part}. "
        f"{_rows(trained['rows'], asked.max_length)}{_shared(facts)}"
    )


def _rows(rows: dict, max_length: int) -> str:
    text = (
        f"Of {words.count(rows['rows'], 'training row')}, {rows['rows_cut']:,} end at {max_length:,} tokens"
    )
    if rows["rows_dropped"]:
        text += f"; {rows['rows_dropped']:,} more had no response within that length and were left out"
    return f"{text}."


def _shared(facts: Facts) -> str:
    """What the variants have in common, where nothing but the precision of the base sets them apart."""
    methods = {facts.asked.variants[variant.name].method for variant in facts.variants}
    if (
        not facts.others
        or len(methods) > 1
        or any(words.other_settings(facts, other) for other in facts.others)
    ):
        return ""
    return " With one seed, all variants begin with the same adapter and see the same rows in the same order."


def gib(value: float | None) -> str | None:
    return None if value is None else quantity(value, "GiB")
