"""Sentences made from the facts: the answer, how each difference is called, and what limits both."""

from dataclasses import dataclass

from markupsafe import Markup

from workflow.comparison import Cost, Quality
from workflow.report import formatting
from workflow.report.facts import Facts, Variant, dataset_name, model_name
from workflow.report.formatting import NARROW, number, quantity, ratio, signed
from workflow.statistics import Difference

METRICS = {
    "holdout_loss": "Held-out loss",
    "training_speed": "Training speed",
    "training_speed_padded": "Training speed, padding counted",
    "step_time": "Step time",
    "load_time": "Load time",
    "weights": "Base weights",
    "memory_before_load": "Memory before loading",
    "memory_after_load": "Memory after loading",
    "peak_memory": "Peak memory",
    "peak_reserved": "Peak memory, reserved",
}
FEW_SEEDS = 5
FEW_INSTRUCTIONS = 1000
RANDOM_MODEL = (
    "The model has random weights, so its quality means nothing, before training or after; "
    "only memory and speed can be read from this page."
)


@dataclass(frozen=True)
class Headline:
    """The answer: sentences, a line per variant where there are several, and notes that put it in scale."""

    sentences: list[Markup]
    lines: list[Markup]
    notes: list[Markup]


@dataclass(frozen=True)
class Limit:
    """One thing that this run cannot tell, in a few words and in a sentence or two."""

    head: str
    body: str


def metric_name(metric: str) -> str:
    return METRICS.get(metric, metric.replace("_", " ").capitalize())


def direction(higher_is_better: bool) -> str:
    return "higher is better" if higher_is_better else "lower is better"


def decimals_for(facts: Facts, metric: tuple[str, str]) -> int:
    """Decimals that suit a metric: as many as its sharpest difference is known to."""
    rows = [row for variant in facts.variants if (row := facts.quality_of(variant.name, metric))]
    differences = [d for row in rows for d in (row.to_base, row.to_baseline) if d]
    return max(formatting.decimals_of(d.low, d.high) for d in differences)


def interval(difference: Difference, decimals: int) -> str:
    return f"{signed(difference.low, decimals)} to {signed(difference.high, decimals)}"


def verdict(difference: Difference, higher_is_better: bool) -> str:
    """What the interval allows to say: better, worse, or not distinguishable."""
    if not difference.decided:
        return "not distinguishable"
    return "better" if (difference.value > 0) == higher_is_better else "worse"


def headline(facts: Facts) -> Headline:
    """The answer, made from the numbers: quality and cost of every variant against the baseline."""
    random_model = facts.asked.model.source == "random"
    metric = facts.quality_metrics[0] if facts.quality_metrics and not random_model else None
    sentences = [Markup(RANDOM_MODEL)] if random_model else []
    lines = []
    if not facts.others:
        alone = Markup("One variant was run, {}, so there is nothing to compare it with.")
        sentences.append(alone.format(facts.baseline.label))
    elif len(facts.others) == 1:
        (other,) = facts.others
        quality = _quality_sentence(facts, other, metric)
        cost = _cost_sentence(facts, other, "it" if quality else other.label)
        sentences += [sentence for sentence in (quality, cost) if sentence]
    else:
        sentences.append(_lead(facts, metric))
        lines = [_line(facts, other, metric) for other in facts.others]
    notes = [_training_sentence(facts, metric), _float32_sentence(facts)]
    return Headline(sentences, lines, [note for note in notes if note])


def _quality_sentence(facts: Facts, other: Variant, metric: tuple[str, str] | None) -> Markup | None:
    quality = metric and facts.quality_of(other.name, metric)
    if not (quality and quality.to_baseline):
        return None
    decimals = decimals_for(facts, metric)
    parts = {
        "other": other.label,
        "baseline": facts.baseline.label,
        "verdict": _marked_verdict(quality, decimals),
        "value": f"{signed(quality.to_baseline.value, decimals)}{NARROW}{quality.unit}",
        "confidence": formatting.percent(facts.asked.comparison.confidence),
        "interval": interval(quality.to_baseline, decimals),
        "rows": count(quality.items, "test row"),
        "metric": metric_name(quality.task).lower(),
    }
    if quality.to_baseline.decided:
        return Markup(
            "{other} is {verdict} than {baseline} in {metric} on {rows} ({confidence} interval over the rows "
            "{interval})."
        ).format(**parts)
    return Markup(
        "With this much data, {other} is {verdict} from {baseline}: on {rows} its {metric} differs by "
        "{value} ({confidence} interval over the rows {interval}, which holds zero)."
    ).format(**parts)


def _marked_verdict(quality: Quality, decimals: int) -> Markup:
    difference = quality.to_baseline
    words = verdict(difference, quality.higher_is_better)
    if difference.decided:
        words += f" by {number(abs(difference.value), decimals)}{NARROW}{quality.unit}"
    return Markup("<strong>{}</strong>").format(words)


def _cost_sentence(facts: Facts, other: Variant, called: str) -> Markup | None:
    memory, speed = _memory_and_speed(facts, other)
    parts = []
    if memory:
        parts.append(
            Markup("held <strong>{}</strong> the memory at its peak ({}{})").format(
                ratio(memory.ratio_to_baseline),
                "Python included: " if facts.on_cpu else "",
                _against(facts, memory),
            )
        )
    if speed:
        parts.append(
            Markup("trained at <strong>{}</strong> the speed ({}{})").format(
                ratio(speed.ratio_to_baseline),
                _against(facts, speed),
                "; their quartiles overlap" if _overlap(facts, speed) else "",
            )
        )
    if not parts:
        return None
    return Markup("On {}, {} {}.").format(_device(facts), called, Markup(" and ").join(parts))


def _lead(facts: Facts, metric: tuple[str, str] | None) -> Markup:
    quality = metric and facts.quality_of(facts.baseline.name, metric)
    scored = (
        f" in {metric_name(quality.task).lower()} on {count(quality.items, 'test row')} "
        f"({formatting.percent(facts.asked.comparison.confidence)} intervals over the rows), and"
        if quality
        else ""
    )
    return Markup("Against {},{} in memory and speed on {}:").format(
        facts.baseline.label, scored, _device(facts)
    )


def _line(facts: Facts, other: Variant, metric: tuple[str, str] | None) -> Markup:
    """One variant's answer in short."""
    parts = []
    quality = metric and facts.quality_of(other.name, metric)
    if quality and quality.to_baseline:
        decimals = decimals_for(facts, metric)
        marked = _marked_verdict(quality, decimals)
        parts.append(Markup("{} ({})").format(marked, interval(quality.to_baseline, decimals)))
    for cost, what in zip(_memory_and_speed(facts, other), ("peak memory", "training speed"), strict=True):
        if cost:
            parts.append(Markup("{}\N{NO-BREAK SPACE}the {}").format(ratio(cost.ratio_to_baseline), what))
    return Markup("{}: {}.").format(other.label, Markup(", ").join(parts) if parts else "not measured")


def _memory_and_speed(facts: Facts, other: Variant) -> tuple[Cost | None, Cost | None]:
    return facts.cost_of(other.name, "peak_memory"), facts.cost_of(other.name, "training_speed")


def _device(facts: Facts) -> str:
    return "one CPU" if facts.on_cpu else "one GPU"


def _training_sentence(facts: Facts, metric: tuple[str, str] | None) -> Markup | None:
    quality = metric and facts.quality_of(facts.baseline.name, metric)
    if not quality:
        return None
    decimals = decimals_for(facts, metric)
    made = {
        "better": "For scale, fine-tuning itself improved {label} from {before} to {after}{unit}.",
        "worse": "Fine-tuning itself worsened {label}, from {before} to {after}{unit}.",
        "not distinguishable": "Fine-tuning itself did not clearly move {label}: {before} before, "
        "{after}{unit} after.",
    }[verdict(quality.to_base, quality.higher_is_better)]
    return Markup(made).format(
        label=facts.baseline.label,
        before=number(quality.base_value, decimals),
        after=number(quality.value, decimals),
        unit=f"{NARROW}{quality.unit}",
    )


def _float32_sentence(facts: Facts) -> Markup | None:
    if not facts.others or weights_in_16_bits(facts) is None:
        return None
    where = "On this CPU, 16-bit" if facts.on_cpu else "16-bit"
    return Markup(
        "{} weights are held as float32, so against real 16-bit storage there is less to save "
        '(see <a href="#limits">Limits</a>).'
    ).format(where)


def _against(facts: Facts, cost: Cost) -> str:
    theirs = facts.cost_of(facts.baseline.name, cost.metric)
    return f"{quantity(cost.value, cost.unit)} against {quantity(theirs.value, cost.unit)}"


def _overlap(facts: Facts, cost: Cost) -> bool:
    theirs = facts.cost_of(facts.baseline.name, cost.metric)
    if None in (cost.low, cost.high, theirs.low, theirs.high):
        return False
    return cost.low <= theirs.high and theirs.low <= cost.high


def setting(facts: Facts) -> list[str]:
    """The setting in a few parts: model, data, training, seeds, device."""
    rows, trained = facts.rows, facts.baseline.trained[0]
    batch_rows = facts.asked.training_of(facts.baseline.name).batch_rows
    seeds = facts.asked.experiment.seeds
    size = facts.model["parameters"]
    return [
        f"{model_name(facts.asked.model)}, {_parameters(size)} parameters",
        f"{dataset_name(facts.asked.dataset)}: {sum(rows.values()):,} rows, {rows['train']:,} to train on, "
        f"{rows['validation']:,} to validate, {rows['test']:,} to test",
        f"{count(trained['steps'], 'step')} of {count(batch_rows, 'row')}",
        f"{'seeds' if len(seeds) > 1 else 'seed'} {listed(seeds)}",
        *(f"{'CPU' if facts.on_cpu else 'GPU'}: {device}" for device in facts.devices),
    ]


def _parameters(amount: int) -> str:
    for scale, word in ((1e9, "billion"), (1e6, "million")):
        if amount >= scale:
            return quantity(amount / scale, word)
    return f"{amount:,}"


def count(amount: int, noun: str) -> str:
    return f"{amount:,} {noun}{'' if amount == 1 else 's'}"


def listed(items: list) -> str:
    """The items as in a sentence: `a`, `a and b`, `a, b and c`."""
    *first, last = map(str, items)
    return f"{', '.join(first)} and {last}" if first else last


def before_training(facts: Facts) -> str:
    """How far the untouched bases lie from the baseline's, for the variants with another base."""
    theirs = facts.quality_of(facts.baseline.name, facts.quality_metrics[0])
    lower = [
        f"{signed(ours.base_value - theirs.base_value, decimals_for(facts, facts.quality_metrics[0]))} "
        f"for {other.label}"
        for other in facts.others
        if theirs
        and (ours := facts.quality_of(other.name, facts.quality_metrics[0]))
        and other.precision["base"] != facts.baseline.precision["base"]
    ]
    if not lower:
        return ""
    return (
        f"Before any training, the difference to the base of {facts.baseline.label} in {theirs.unit} was "
        f"{listed(lower)}; no interval was taken of {'it' if len(lower) == 1 else 'these'}."
    )


def limits(facts: Facts) -> list[Limit]:
    """What this run cannot tell, made from its facts; only what applies."""
    found = [
        _random_model(facts),
        _few_seeds(facts),
        _few_instructions(facts),
        _intervals(facts),
        _short_training(facts),
        *(_not_precision_alone(facts, other) for other in facts.others),
        _quantized_before(facts),
        _no_real_16_bits(facts),
        _resident_set(facts),
        _one_device(facts),
    ]
    return [limit for limit in found if limit]


def _random_model(facts: Facts) -> Limit | None:
    return Limit("Random weights", RANDOM_MODEL) if facts.asked.model.source == "random" else None


def _few_seeds(facts: Facts) -> Limit | None:
    seeds = len(facts.asked.experiment.seeds)
    if seeds >= FEW_SEEDS:
        return None
    if seeds == 1:
        return Limit(
            "One seed", "Another seed would give other numbers, and this run cannot say how different."
        )
    return Limit(
        f"{seeds} seeds",
        f"Each seed’s result is shown, but {seeds} are too few to say how much of a difference is chance "
        "in training.",
    )


def _few_instructions(facts: Facts) -> Limit | None:
    if not facts.quality:
        return None
    first = facts.quality[0]
    if first.groups >= FEW_INSTRUCTIONS:
        return None
    body = (
        f"The test set has {count(first.items, 'row')} with {count(first.groups, 'different instruction')}."
    )
    wide = [
        (d.high - d.low) / 2
        for q in facts.quality
        if (q.task, q.metric) == (first.task, first.metric) and (d := q.to_baseline)
    ]
    if wide and max(wide) > 0:
        half = number(max(wide), formatting.decimals_of(0, 2 * max(wide)))
        body += f" Differences below about {half} {first.unit} cannot be seen with it."
    return Limit("A small test set", body)


def _intervals(facts: Facts) -> Limit | None:
    if not facts.quality:
        return None
    return Limit(
        "Intervals are over test rows",
        "They say what other test rows of the same kind could have given (rows with one instruction are "
        "drawn together), for the trainings that were run. They do not cover other seeds, other data or "
        "other models.",
    )


def _short_training(facts: Facts) -> Limit | None:
    trained = facts.baseline.trained[0]
    batch = facts.asked.training_of(facts.baseline.name).batch_rows
    seen, rows = trained["steps"] * batch, trained["rows"]["rows"]
    if seen >= rows:
        return None
    return Limit(
        "A short training",
        f"{count(trained['steps'], 'step')} of {count(batch, 'row')} see {seen:,} of the {rows:,} training "
        "rows: less than one pass. A longer training may widen the gap or close it.",
    )


def other_settings(facts: Facts, other: Variant) -> list[str]:
    """In what a variant's training differs from the baseline's, other than in the precision of the base."""
    ours, theirs = (facts.asked.training_of(name).model_dump() for name in (other.name, facts.baseline.name))
    changed = [f"{key} ({ours[key]} instead of {theirs[key]})" for key in ours if ours[key] != theirs[key]]
    computes = (other.precision["compute"], facts.baseline.precision["compute"])
    if computes[0] != computes[1]:
        changed.append(f"compute type ({computes[0]} instead of {computes[1]})")
    return changed


def _not_precision_alone(facts: Facts, other: Variant) -> Limit | None:
    changed = other_settings(facts, other)
    if not changed:
        return None
    return Limit(
        f"{other.label} differs in more than precision",
        f"From {facts.baseline.label} it also differs in {listed(changed)}, so no difference between "
        "the two is due to precision alone.",
    )


def _quantized_before(facts: Facts) -> Limit | None:
    before = facts.model["quantized_before"]
    if not before:
        return None
    return Limit(
        "The base had been quantised before",
        f"Its weights come from a {before} file, so its 16-bit form had lost precision before any run began. "
        "What 4 bits cost a model that was never rounded may differ.",
    )


def held_as_float32(facts: Facts) -> list[Variant]:
    """The variants that train an adapter on 16-bit weights and hold those as float32."""
    return [
        variant
        for variant in facts.variants
        if facts.asked.variants[variant.name].method == "lora"
        and variant.precision["base"] == "16bit"
        and variant.precision["storage"] == "float32"
    ]


def weights_in_16_bits(facts: Facts) -> float | None:
    """GiB that the base's parameters take in 16 bits, where a 16-bit variant holds them as float32."""
    return facts.model["parameters"] * 2 / 2**30 if held_as_float32(facts) else None


def _no_real_16_bits(facts: Facts) -> Limit | None:
    real = weights_in_16_bits(facts)
    if real is None:
        return None
    held = held_as_float32(facts)
    where = "On this CPU, " if facts.on_cpu else ""
    text = f"{where}{listed([v.label for v in held])} holds weights that were rounded to 16 bits as float32"
    weights = facts.cost_of(held[0].name, "weights")
    text += f", in {quantity(weights.value, weights.unit)}" if weights else ""
    text += f". In real 16-bit storage the {facts.model['parameters']:,} parameters would take "
    text += quantity(real, "GiB")
    smaller = [
        f"the {quantity(cost.value, cost.unit)} of {v.label} are {ratio(cost.value / real)} of that"
        + (f" and not {ratio(cost.value / weights.value)}" if weights else "")
        for v in facts.variants
        if v.precision["quantized_modules"] and (cost := facts.cost_of(v.name, "weights"))
    ]
    text += "".join(f"; {part}" for part in smaller)
    return Limit(
        "16-bit weights are held as float32",
        f"{text}. The saving against real 16-bit storage is smaller than what was measured"
        + (", although the layers that stay unquantised would then shrink too." if smaller else "."),
    )


def _resident_set(facts: Facts) -> Limit | None:
    if not facts.on_cpu:
        return None
    before = facts.cost_of(facts.baseline.name, "memory_before_load")
    share = f", {quantity(before.value, before.unit)} before the model was loaded" if before else ""
    return Limit(
        "Memory is that of the whole process",
        f"On a CPU, peak memory is the resident set: Python and its libraries are in it{share}. "
        "A ratio of two peaks is therefore nearer to 1 than that of the models’ own memory.",
    )


def _one_device(facts: Facts) -> Limit:
    steps = min(result["steps"] for result in facts.benchmarks.values())
    rows = min(result["micro_batch_rows"] for result in facts.benchmarks.values())
    return Limit(
        "Time and memory are of this device",
        f"They were measured on {listed(facts.devices)} over {count(steps, 'step')} of {count(rows, 'row')}. "
        "Another device, batch or length of text has other ratios.",
    )
