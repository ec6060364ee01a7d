"""Names, numbers and sentences that several sections share, in the words of the page."""

import re
from dataclasses import dataclass

from markupsafe import Markup

from workflow import methods, precisions
from workflow.comparison.inference import level_of
from workflow.comparison.model import Contrast, Score
from workflow.comparison.sentences import OTHER_CATEGORIES
from workflow.params import OWN_TASKS, Params
from workflow.report import formatting
from workflow.report.formatting import NARROW, Number, quantity, signed
from workflow.report.model import Device, Facts, Point, Variant
from workflow.report.names import OPTIMIZERS, shape_name
from workflow.runtime.forms import (
    AS_TRAINED,
    BASE,
    GGUF_Q4_0,
    GGUF_Q4_K_M,
    GGUF_Q8_0,
    MERGED_16BIT,
    MERGED_DEQUANTIZED,
    REQUANTIZED,
)

COSTS = {
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
TASKS = {
    "holdout_loss": "Held-out loss",
    "response_choice": "Choice of the response",
    "holdout_generation": "Written answers",
}
MEASURES = {
    "nats_per_token": "nats per token",
    "bits_per_byte": "bits per byte",
    "acc": "accuracy",
    "acc_norm": "accuracy by likelihood per length",
    "rouge_l": "likeness to the reference",
    "chrf": "likeness to the reference in characters",
    "ended": "stopped by themselves",
}
FORMS = {
    BASE: "untouched base",
    AS_TRAINED: "as trained",
    MERGED_16BIT: "merged, 16-bit",
    MERGED_DEQUANTIZED: "merged, dequantized",
    REQUANTIZED: "merged, quantized again",
    GGUF_Q8_0: "GGUF Q8_0",
    GGUF_Q4_K_M: "GGUF Q4_K_M",
    GGUF_Q4_0: "GGUF Q4_0",
}
SERVED = {
    AS_TRAINED: "as trained",
    MERGED_16BIT: "merged into 16 bits",
    MERGED_DEQUANTIZED: "dequantized and merged",
    REQUANTIZED: "merged and quantized again",
}
VERDICTS = ("equivalent", "worse", "better", "undecided")
RANDOM_MODEL = (
    "The model has random weights, so its quality means nothing, before training or after; "
    "only memory and speed can be read from this page."
)


def metric_title(metric: tuple[str, str], score: Score) -> str:
    """A metric's readable name, with its unit unless the name ends with it."""
    name = quality_name(metric)
    return name if name.endswith(score.unit) else f"{name} ({score.unit})"


def gib(value: float | None) -> str | None:
    """An amount of memory with its unit. None stays None."""
    return None if value is None else quantity(value, "GiB")


@dataclass(frozen=True)
class Change:
    """The texts of a difference: its value, interval, verdict and p value."""

    value: Number
    low: Number
    high: Number
    verdict: str
    p: Number
    by_rows: Markup | None = None  # the difference with equal weight for every row
    caveat: str | None = None  # what the verdict rests on, save that the two left out different categories
    warning: str | None = None  # that the interval may be too narrow
    correction: str | None = None  # that the correction for several tests changed the verdict

    @property
    def interval(self) -> str:
        return f"{self.low} to {self.high}"


def cost_name(metric: str) -> str:
    return COSTS.get(metric, metric.replace("_", " ").capitalize())


def quality_name(metric: tuple[str, str]) -> str:
    """The readable name of a (task, metric), for example `Held-out loss, nats per token`."""
    task, measure = metric
    return f"{TASKS.get(task, task)}, {MEASURES.get(measure, measure.replace('_', ' '))}"


def group_count(score: Score) -> str:
    """The number of groups of items, for example `120 different instructions`."""
    return count(score.groups, f"different {'instruction' if score.task in OWN_TASKS else 'prompt'}")


def form_name(form: str) -> str:
    return FORMS.get(form, form.replace("_", " "))


def arm_name(facts: Facts, arm: str) -> str:
    """The readable name of an arm, `variant/form`."""
    variant, _, form = arm.partition("/")
    label = next(v.label for v in facts.variants if v.name == variant)
    return f"{label}, {form_name(form)}"


def served(form: str) -> str:
    """How a form is served, as the end of `served ...`."""
    return SERVED.get(form) or f"as {form_name(form)}"


def in_words(facts: Facts, text: str | None) -> str | None:
    """A sentence with the display names of the variants and arms that it names by their keys. None stays None."""
    labels = {variant.name: variant.label for variant in facts.variants}

    def words(found: re.Match) -> str:
        label, form = labels[found["variant"]], found["form"]
        if form == BASE:
            return f"the untouched base of {label}"
        return f"{label} {served(form)}" if form else label

    longest_first = "|".join(sorted(map(re.escape, labels), key=len, reverse=True))
    return text and re.sub(rf"\b(?P<variant>{longest_first})(?:/(?P<form>\w+))?\b", words, text)


def caveats_of(facts: Facts, contrast: Contrast) -> list[str]:
    """What a verdict rests on, with that the two left out different categories as a text of its own."""
    parts = re.split(f"({re.escape(OTHER_CATEGORIES)})", in_words(facts, contrast.caveat) or "")
    return [part.strip() for part in parts if part.strip()]


def shape_words(block: Device) -> str:
    """The model that was measured: the run's own, or for example `Llama-2-7B shape`."""
    return block.shape if block.own else f"{shape_name(block.shape)} shape"


def direction(higher_is_better: bool) -> str:
    return "higher is better" if higher_is_better else "lower is better"


def decimals_for(facts: Facts, metric: tuple[str, str]) -> int:
    """The number of decimals for a metric's values: that of its narrowest interval among runs as trained."""
    differences = [
        contrast.difference
        for variant in facts.variants
        for kind in ("to_base", "to_baseline")
        if (contrast := facts.contrast(kind, variant.name, AS_TRAINED, metric))
    ]
    return max(
        (formatting.decimals_of(difference.low, difference.high) for difference in differences), default=3
    )


def change(facts: Facts, contrast: Contrast, decimals: int) -> Change:
    """The texts of a contrast, with at least `decimals` decimals."""
    difference = contrast.difference
    decimals = formatting.separating_decimals((difference.low, difference.high), (0,), at_least=decimals)
    return Change(
        value=facts.cite(signed(difference.value, decimals), contrast, "difference", "value"),
        low=facts.cite(signed(difference.low, decimals), contrast, "difference", "low"),
        high=facts.cite(signed(difference.high, decimals), contrast, "difference", "high"),
        verdict=contrast.verdict,
        p=_p_value(facts, contrast),
        by_rows=_by_rows(facts, contrast, decimals),
        caveat=" ".join(text for text in caveats_of(facts, contrast) if text != OTHER_CATEGORIES) or None,
        warning="interval may be too narrow" if contrast.warning else None,
        correction=correction_sentence(contrast),
    )


def correction_sentence(contrast: Contrast) -> str | None:
    """State that a difference is undecided although its interval excludes zero. None if that is not so."""
    difference = contrast.difference
    alone = max(difference.p_value, contrast.p_accuracy or 0.0)
    excludes_zero = not difference.low <= 0 <= difference.high
    if contrast.verdict != "undecided" or not excludes_zero or alone >= level_of(difference):
        return None
    return f"Its interval excludes zero; with {count(contrast.corrected_over, 'test')} together it is not decided."


def _by_rows(facts: Facts, contrast: Contrast, decimals: int) -> Markup | None:
    """The difference with equal weight for every row, its interval and its verdict. None if it was not taken."""
    difference = contrast.by_rows
    if difference is None:
        return None
    decimals = formatting.separating_decimals((difference.low, difference.high), (0,), at_least=decimals)
    value, low, high = (
        facts.cite(signed(getattr(difference, name), decimals), contrast, "by_rows", name)
        for name in ("value", "low", "high")
    )
    return Markup("by rows {} ({} to {}), {}").format(value, low, high, contrast.verdict_by_rows)


def _p_value(facts: Facts, contrast: Contrast) -> Number:
    """The p value of the test that the verdict comes from."""
    key = "p_equivalence_adjusted" if contrast.verdict == "equivalent" else "p_adjusted"
    text = formatting.p_value(getattr(contrast, key), level=1 - contrast.difference.confidence)
    return facts.cite(f"{'adjusted ' if contrast.corrected_over > 1 else ''}p{NARROW}{text}", contrast, key)


def equivalence_confidence(facts: Facts) -> str:
    """The confidence of the interval that corresponds to two one-sided tests at the same level."""
    return formatting.percent(2 * facts.compared.confidence - 1)


def count(amount: int, noun: str) -> str:
    """An amount and its noun, for example `1 row` or `2,000 rows`."""
    return f"{amount:,} {noun}{'' if amount == 1 else 's'}"


def listed(items: list) -> str:
    """The items as a sentence lists them: `a`, `a and b`, `a, b and c`."""
    *first, last = map(str, items)
    return f"{', '.join(first)} and {last}" if first else last


def what_seeds_vary(params: Params) -> str:
    """A sentence on whether the variance over seeds has that of the training rows in it. Empty with one seed."""
    if len(params.experiment.seeds) == 1:
        return ""
    if params.sample.per_seed:
        return "Each seed has its own training rows, so the interval includes the draw."
    return "All seeds have the same training rows, so the interval does not include the draw."


def differing_settings(facts: Facts, other: Variant) -> list[str]:
    """The training settings that differ from the baseline's, apart from the precision of the base."""
    ours, theirs = (facts.training_of(name).model_dump() for name in (other.name, facts.baseline.name))
    changed = [
        f"{key.replace('_', ' ')} ({_setting(ours[key])} instead of {_setting(theirs[key])})"
        for key in ours
        if ours[key] != theirs[key]
    ]
    computes = (other.precision.compute, facts.baseline.precision.compute)
    if computes[0] != computes[1]:
        changed.append(f"compute type ({computes[0]} instead of {computes[1]})")
    return changed


def left_out_sentence(facts: Facts) -> str:
    """A sentence on the categories that single variants leave out of their training. Empty if there are none."""
    parts = [
        f"{variant.label} was not trained on {listed([formatting.clean(name) for name in names])}"
        for variant in facts.variants
        if (names := facts.compared.left_out_categories.get(variant.name))
    ]
    return f"{'; '.join(parts)}." if parts else ""


def _setting(value: object) -> object:
    if isinstance(value, list):
        return listed([formatting.clean(str(item)) for item in value]) if value else "none"
    return OPTIMIZERS.get(value, value) if isinstance(value, str) else value


def float32_variants(facts: Facts) -> list[Variant]:
    """The variants that train an adapter on 16-bit weights stored as float32."""
    return [
        variant
        for variant in facts.variants
        if methods.get(facts.params.variants[variant.name].method).leaves_adapter
        and not precisions.get(variant.precision.base).is_quantized
        and variant.precision.storage == "float32"
    ]


def weights_in_16_bits(facts: Facts) -> float | None:
    """The GiB of the base's parameters in real 16-bit storage. None unless a variant stores them as float32."""
    return facts.model["parameters"] * 2 / 2**30 if float32_variants(facts) else None


def measured_in(facts: Facts) -> str:
    """In how many processes costs were measured, as the end of a sentence, for example `measured once in one process each`."""
    if facts.processes == 1:
        return "measured once in one process each"
    return f"as the mean over {facts.processes:,} processes each"


def unmeasured_sentence(facts: Facts) -> str:
    """A sentence that names the variants whose memory and time were not measured. Empty if there are none."""
    if not facts.benchmarks:
        return "Memory and time were not measured."
    labels = [variant.label for variant in facts.unmeasured]
    return f"Memory and time of {listed(labels)} were not measured." if labels else ""


def peak_sentence(facts: Facts) -> str:
    """A sentence that says which forward pass the peaks of the run's benchmarks are from. There must be one of them."""
    longest = [result.epoch_longest_pass_tokens for result in facts.benchmarks.values()]
    if None in longest:
        steps = min(result.warmup_steps + result.steps for result in facts.benchmarks.values())
        return f"A peak is that over {count(steps, 'step')}: an epoch’s longest forward pass may be longer, and need more."
    tokens = " to ".join(dict.fromkeys(f"{n:,}" for n in (min(longest), max(longest))))
    return f"A peak is that of an epoch’s longest forward pass ({tokens} tokens), which each variant ran."


def duration(seconds: float) -> str:
    """A time in seconds, minutes or hours, with two significant digits."""
    if seconds < 90:
        return quantity(seconds, "s", 2)
    if seconds < 90 * 60:
        return quantity(seconds / 60, "min", 2)
    return quantity(seconds / 3600, "h", 2)


def energy_sentence(facts: Facts) -> str:
    """A sentence that says at which grid point energy was measured, or why it was not."""
    if not facts.energy:
        if not facts.benchmarks:
            return "Energy was not measured: benchmark.variants is empty."
        why = (
            "on a CPU there is no counter that this pipeline reads"
            if facts.on_cpu
            else "the driver gave no reading"
        )
        return f"Energy was not measured: {why}."
    point = next(iter(facts.energy.values()))
    return f"Energy is that of the GPU at {rows_by_length(point)} tokens in the run’s own grid."


def rows_by_length(point: Point) -> str:
    """The rows and length of a forward pass, for example `4 × 512`."""
    return f"{point.micro_batch_rows:,}{NARROW}{formatting.TIMES}{NARROW}{point.length:,}"


def unit_label(score: Score) -> str:
    """A score's unit and, if it has one, its better direction."""
    if score.higher_is_better is None:
        return score.unit
    return f"{score.unit} ({direction(score.higher_is_better)})"


def difference_axis_label(contrast: Contrast) -> str:
    """The label of an axis of differences: the unit, and arrows to the worse side, always the left, and the better."""
    gap = "\N{EM SPACE}"
    return f"← worse{gap}{contrast.unit}{gap}better →"


def move_of(moved: dict) -> str:
    """What source.json says of weights moved off their grid, in words."""
    return (
        f"each of the {moved['weights']:,} weights of {moved['tensors']:,} linear layers at random by up to {moved['cells']:g} "
        f"of its own block’s cell, seed {moved['seed']}, {100 * moved['relative_size']:.1f} % of the weights’ size in all"
    )


def cut_of(cut: dict) -> str:
    """What source.json says of dropped layers, in words."""
    dropped = cut["dropped"]
    which = f"{dropped[0]} to {dropped[-1]}" if len(dropped) > 1 else dropped[0]
    return f"{len(dropped)} of {cut['of']} decoder layers (number {which}, from 0) were dropped"


def healing_of(healed: dict) -> str:
    """What source.json says of the full training after a cut, in words."""
    return (
        f"all weights were trained on {healed['rows']:,} rows that no split of the study uses "
        f"({healed['steps']:,} steps, seed {healed['seed']})"
    )
