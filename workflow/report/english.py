"""Sentences made from the facts: the answer, how each difference is shown, and what limits both."""

from dataclasses import dataclass

from markupsafe import Markup

from workflow import methods, precisions
from workflow.comparison.model import Contrast, Cost, Score
from workflow.params import OWN_TASKS
from workflow.report import formatting
from workflow.report.facts import (
    AS_TRAINED,
    BASE,
    COMPARISON,
    SAMPLE_COUNTS,
    Device,
    Facts,
    Point,
    Variant,
    dataset_name,
    model_name,
)
from workflow.report.formatting import NARROW, Number, number, quantity, ratio, signed
from workflow.runtime.paths import MODEL_SOURCE

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
    "merged_16bit": "merged, 16-bit",
    "merged_dequantized": "merged, dequantized",
    "requantized": "merged, quantized again",
}
KINDS = {
    "to_baseline": "variants to the baseline",
    "to_base": "runs to their untouched base",
    "base_to_base": "untouched bases to the baseline’s",
    "form": "serving forms to the run as trained",
    "repair": "faults to their repair",
}
COMPONENTS = {  # of the predicted memory, in the order in which it comes to be held
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
CLOSE = 0.05  # of the measured peak: a prediction within it is counted as close
VERDICTS = ("equivalent", "worse", "better", "undecided")
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


@dataclass(frozen=True)
class Change:
    """A difference as a cell or a sentence shows it."""

    value: Number
    low: Number
    high: Number
    verdict: str
    p: Number
    by_rows: Markup | None = None  # the same with every row weighing the same
    caveat: str | None = None  # what the verdict rests on

    @property
    def interval(self) -> str:
        return f"{self.low} to {self.high}"


def cost_name(metric: str) -> str:
    return COSTS.get(metric, metric.replace("_", " ").capitalize())


def quality_name(metric: tuple[str, str]) -> str:
    """A (task, metric) by a readable name, for example `Held-out loss, nats per token`."""
    task, measure = metric
    return f"{TASKS.get(task, task)}, {MEASURES.get(measure, measure.replace('_', ' '))}"


def _in_sentence(score: Score) -> str:
    """As `quality_name`, within a sentence that names the unit already."""
    task, measure = score.task, score.metric
    name = TASKS[task].lower() if task in TASKS else task
    words = MEASURES.get(measure, measure.replace("_", " "))
    return name if words == score.unit else f"{name} ({words})"


def groups(score: Score) -> str:
    """How many groups of items there are, and what the items of a group have in common."""
    return count(score.groups, f"different {'instruction' if score.task in OWN_TASKS else 'prompt'}")


def form_name(form: str) -> str:
    return FORMS.get(form, form.replace("_", " "))


def arm_name(facts: Facts, arm: str) -> str:
    """`variant/form` as the page calls it."""
    variant, _, form = arm.partition("/")
    label = next(v.label for v in facts.variants if v.name == variant)
    return f"{label}, {form_name(form)}"


def direction(higher_is_better: bool) -> str:
    return "higher is better" if higher_is_better else "lower is better"


def decimals_for(facts: Facts, metric: tuple[str, str]) -> int:
    """Decimals that suit a metric: as many as its sharpest difference between runs as trained is known to."""
    found = [
        contrast.difference
        for variant in facts.variants
        for kind in ("to_base", "to_baseline")
        if (contrast := facts.contrast(kind, variant.name, AS_TRAINED, metric))
    ]
    return max((formatting.decimals_of(one.low, one.high) for one in found), default=3)


def change(facts: Facts, contrast: Contrast, decimals: int) -> Change:
    """A difference with its interval, verdict and p value, in at least so many decimals."""
    one = contrast.difference
    decimals = formatting.decimals_that_tell((one.low, one.high), (0,), at_least=decimals)
    return Change(
        value=facts.shown(signed(one.value, decimals), contrast, "difference", "value"),
        low=facts.shown(signed(one.low, decimals), contrast, "difference", "low"),
        high=facts.shown(signed(one.high, decimals), contrast, "difference", "high"),
        verdict=contrast.verdict,
        p=_p_value(facts, contrast),
        by_rows=_by_rows(facts, contrast, decimals),
        caveat=contrast.caveat,
    )


def _by_rows(facts: Facts, contrast: Contrast, decimals: int) -> Markup | None:
    """The difference in which every row weighs the same, with its interval and its verdict."""
    one = contrast.by_rows
    if one is None:
        return None
    decimals = formatting.decimals_that_tell((one.low, one.high), (0,), at_least=decimals)
    value, low, high = (
        facts.shown(signed(getattr(one, name), decimals), contrast, "by_rows", name)
        for name in ("value", "low", "high")
    )
    return Markup("by rows {} ({} to {}), {}").format(value, low, high, contrast.verdict_by_rows)


def _p_value(facts: Facts, contrast: Contrast) -> Number:
    """The p value that the verdict rests on."""
    key = "p_equivalence_adjusted" if contrast.verdict == "equivalent" else "p_adjusted"
    shown = formatting.p_value(getattr(contrast, key), level=1 - contrast.difference.confidence)
    return facts.shown(f"{'adjusted ' if contrast.corrected_over > 1 else ''}p{NARROW}{shown}", contrast, key)


def tally(contrasts: list[Contrast]) -> str:
    """The verdicts in short: the word where there is one, else how many of each."""
    found = [contrast.verdict for contrast in contrasts]
    if len(found) == 1:
        return found[0]
    return ", ".join(f"{found.count(word)} {word}" for word in VERDICTS if word in found)


def headline(facts: Facts) -> Headline:
    """The answer, made from the numbers: quality and cost of every variant against the baseline."""
    random_model = facts.asked.model.source == "random"
    metric = None if random_model else facts.primary
    sentences = [Markup(RANDOM_MODEL)] if random_model else []
    lines = []
    if not facts.others:
        alone = Markup("One variant was run, {}, so there is nothing to compare it with.")
        sentences.append(alone.format(facts.baseline.label))
    elif len(facts.others) == 1:
        (other,) = facts.others
        quality = _quality_sentence(facts, other, metric)
        cost = _cost_sentence(facts, other, "it" if quality else other.label)
        served = _forms_sentence(facts, other, metric)
        sentences += [sentence for sentence in (quality, cost, served) if sentence]
    else:
        sentences += [said for said in (_all_quality(facts, metric), _all_costs(facts)) if said]
        lines = [_line(facts, other, metric) for other in facts.others]
    notes = [_training_sentence(facts, metric), _seed_sentence(facts, metric), _float32_sentence(facts)]
    return Headline(sentences, lines, [note for note in notes if note])


def _quality_sentence(facts: Facts, other: Variant, metric: tuple[str, str] | None) -> Markup | None:
    contrast = metric and facts.contrast("to_baseline", other.name, AS_TRAINED, metric)
    if not contrast:
        return None
    score = facts.score(other.name, AS_TRAINED, metric)
    margin = _margin(facts, contrast)
    parts = {
        "other": other.label,
        "baseline": facts.baseline.label,
        "verdict": _marked_verdict(facts, contrast),
        "value": Markup("{}{}{}").format(
            change(facts, contrast, decimals_for(facts, metric)).value, NARROW, contrast.unit
        ),
        "interval": _interval_of_verdict(facts, contrast),
        "margin": Markup("; the margin of equivalence is {}").format(margin) if margin else "",
        "within": margin or "",
        "items": _items(facts, score),
        "metric": _in_sentence(score),
    }
    if contrast.verdict == "equivalent":
        made = (
            "In {metric}, {other} is {verdict} to {baseline} within the margin of {within}: on {items} it "
            "differs by {value} ({interval})."
        )
    elif contrast.verdict == "undecided":
        made = (
            "Whether {other} differs from {baseline} in {metric} is {verdict}: on {items} it differs by "
            "{value} ({interval}{margin})."
        )
    else:
        made = "{other} is {verdict} than {baseline} in {metric} on {items} ({interval}{margin})."
    return Markup("{}{}").format(Markup(made).format(**parts), _caveat(contrast))


def _caveat(contrast: Contrast) -> str:
    """What the verdict rests on, to stand behind the sentence that gives it."""
    return f" {contrast.caveat}" if contrast.caveat else ""


def _forms_sentence(facts: Facts, other: Variant, metric: tuple[str, str] | None) -> Markup | None:
    """What serving the run in its other forms comes to, against the same baseline."""
    found = [
        contrast
        for form in facts.forms_of(other.name)
        if form != AS_TRAINED
        and metric
        and (contrast := facts.contrast("to_baseline", other.name, form, metric))
    ]
    if not found:
        return None
    decimals, parts = decimals_for(facts, metric), []
    for contrast in found:
        text = _marked_verdict(facts, contrast)
        if contrast.verdict in ("equivalent", "undecided"):
            value = change(facts, contrast, decimals).value
            text += Markup(" at {}{}{}").format(value, NARROW, contrast.unit)
        parts.append(Markup("{} ({})").format(text, form_name(contrast.form)))
    *first, last = parts
    together = Markup(" and ").join([Markup(", ").join(first), last] if first else [last])
    return Markup("In other serving forms, against the same baseline, it is {}.").format(together)


def _margin(facts: Facts, contrast: Contrast) -> Markup | None:
    """The margin of equivalence with its unit, or None where none is set."""
    if not contrast.equivalence:
        return None
    shown = facts.shown(f"{contrast.equivalence.margin:g}", contrast, "equivalence", "margin")
    return Markup("{}{}{}").format(shown, NARROW, contrast.unit)


def _items(facts: Facts, score: Score) -> Markup:
    shown = facts.shown(f"{score.items:,}", score, "items")
    return Markup("{} test item{}").format(shown, "" if score.items == 1 else "s")


def _marked_verdict(facts: Facts, contrast: Contrast) -> Markup:
    if contrast.verdict not in ("worse", "better"):
        return Markup("<strong>{}</strong>").format(contrast.verdict)
    decimals = decimals_for(facts, (contrast.task, contrast.metric))
    value = facts.shown(number(abs(contrast.difference.value), decimals), contrast, "difference", "value")
    return Markup("<strong>{} by {}{}{}</strong>").format(contrast.verdict, value, NARROW, contrast.unit)


def _interval_of_verdict(facts: Facts, contrast: Contrast) -> Markup:
    """The interval that the verdict rests on: of equivalence that of its two one-sided tests."""
    decimals = decimals_for(facts, (contrast.task, contrast.metric))
    if contrast.verdict == "equivalent":
        part, one, confidence = "equivalence", contrast.equivalence, equivalence_confidence(facts)
        limits = (-one.margin, one.margin)
    else:
        part, one, limits = "difference", contrast.difference, (0,)
        confidence = facts.shown(formatting.percent(one.confidence), contrast, part, "confidence")
    decimals = formatting.decimals_that_tell((one.low, one.high), limits, at_least=decimals)
    low, high = (
        facts.shown(signed(getattr(one, end), decimals), contrast, part, end) for end in ("low", "high")
    )
    return Markup("{} interval {} to {}").format(confidence, low, high)


def equivalence_confidence(facts: Facts) -> str:
    """Of the interval that belongs to two one-sided tests at the same level."""
    return formatting.percent(2 * facts.compared.confidence - 1)


def _cost_sentence(facts: Facts, other: Variant, called: str) -> Markup | None:
    memory, speed = _memory_and_speed(facts, other)
    parts = []
    if memory:
        parts.append(
            Markup("held <strong>{}</strong> the memory at its peak ({}{})").format(
                _ratio(facts, memory),
                "Python included: " if facts.on_cpu else "",
                _against(facts, memory),
            )
        )
    if speed:
        parts.append(
            Markup("trained at <strong>{}</strong> the speed ({})").format(
                _ratio(facts, speed), _against(facts, speed)
            )
        )
    if not parts:
        return None
    return Markup("On {}, {} {}, measured once in one process each.").format(
        _device(facts), called, Markup(" and ").join(parts)
    )


def _ratio(facts: Facts, cost: Cost) -> Number:
    return facts.shown(ratio(cost.ratio_to_baseline), cost, "ratio_to_baseline")


def _all_quality(facts: Facts, metric: tuple[str, str] | None) -> Markup | None:
    """How many variants got which verdict, in a sentence."""
    found = [
        contrast
        for other in facts.others
        if metric and (contrast := facts.contrast("to_baseline", other.name, AS_TRAINED, metric))
    ]
    if not found:
        return None
    score = facts.score(found[0].variant, AS_TRAINED, metric)
    margin = _margin(facts, found[0])
    return Markup("Against {}, in {} on {}{}, {}.").format(
        facts.baseline.label,
        _in_sentence(score),
        _items(facts, score),
        Markup(" (margin of equivalence {})").format(margin) if margin else "",
        _tallied(found),
    )


def _tallied(contrasts: list[Contrast]) -> Markup:
    """How many variants got each verdict, as the end of a sentence."""
    found = [contrast.verdict for contrast in contrasts]
    if len(set(found)) == 1:
        return Markup("all {} variants are <strong>{}</strong>").format(len(found), found[0])
    parts = []
    for word in VERDICTS:
        if word in found:
            amount = found.count(word)
            who = f"{amount:,} of the {len(found):,} variants" if not parts else f"{amount:,}"
            parts.append(
                Markup("{} {} <strong>{}</strong>").format(who, "is" if amount == 1 else "are", word)
            )
    *first, last = parts
    return Markup("{} and {}").format(Markup(", ").join(first), last)


def _all_costs(facts: Facts) -> Markup | None:
    """The range of the variants' memory and speed, relative to the baseline, in a sentence."""
    parts = []
    for metric, made in (
        ("peak_memory", "held {} the memory at their peak"),
        ("training_speed", "trained at {} the speed"),
    ):
        costs = [cost for other in facts.others if (cost := facts.cost_of(other.name, metric))]
        if costs:
            costs.sort(key=lambda cost: cost.ratio_to_baseline)
            ends = [_ratio(facts, cost) for cost in (costs[0], costs[-1])]
            between = Markup(" to ").join(ends if ends[0] != ends[1] else ends[:1])
            parts.append(Markup(made).format(Markup("<strong>{}</strong>").format(between)))
    if not parts:
        return None
    return Markup("On {}, they {}, measured once in one process each.").format(
        _device(facts), Markup(" and ").join(parts)
    )


def _line(facts: Facts, other: Variant, metric: tuple[str, str] | None) -> Markup:
    """One variant's answer in short."""
    parts = []
    contrast = metric and facts.contrast("to_baseline", other.name, AS_TRAINED, metric)
    if contrast:
        value = change(facts, contrast, decimals_for(facts, metric)).value
        shown = "" if contrast.verdict in ("worse", "better") else Markup("{}, ").format(value)
        marked = _marked_verdict(facts, contrast)
        parts.append(Markup("{} ({}{})").format(marked, shown, _interval_of_verdict(facts, contrast)))
    for cost, what in zip(_memory_and_speed(facts, other), ("peak memory", "training speed"), strict=True):
        if cost:
            parts.append(Markup("{}\N{NO-BREAK SPACE}the {}").format(_ratio(facts, cost), what))
    said = Markup(", ").join(parts) if parts else "not measured"
    return Markup("{}: {}.{}").format(other.label, said, _caveat(contrast) if contrast else "")


def _memory_and_speed(facts: Facts, other: Variant) -> tuple[Cost | None, Cost | None]:
    return facts.cost_of(other.name, "peak_memory"), facts.cost_of(other.name, "training_speed")


def _device(facts: Facts) -> str:
    return "one CPU" if facts.on_cpu else "one GPU"


def _training_sentence(facts: Facts, metric: tuple[str, str] | None) -> Markup | None:
    contrast = metric and facts.contrast("to_base", facts.baseline.name, AS_TRAINED, metric)
    if not contrast:
        return None
    decimals = decimals_for(facts, metric)
    made = {
        "better": "For scale, fine-tuning itself improved {label} from {before} to {after}{unit}.",
        "worse": "Fine-tuning itself worsened {label}, from {before} to {after}{unit}.",
        "equivalent": "Fine-tuning itself moved {label} by less than the margin: {before} before, "
        "{after}{unit} after.",
        "undecided": "Whether fine-tuning itself moved {label} is undecided: {before} before, "
        "{after}{unit} after.",
    }[contrast.verdict]
    before, after = (facts.score(facts.baseline.name, form, metric) for form in (BASE, AS_TRAINED))
    return Markup(made).format(
        label=facts.baseline.label,
        before=facts.shown(number(before.value, decimals), before, "value"),
        after=facts.shown(number(after.value, decimals), after, "value"),
        unit=f"{NARROW}{contrast.unit}",
    )


def _seed_sentence(facts: Facts, metric: tuple[str, str] | None) -> Markup | None:
    """A warning that belongs into the first screen: with one seed, no verdict is about training in general."""
    if not metric or not facts.others or len(facts.asked.experiment.seeds) > 1:
        return None
    return Markup("One seed was trained, so every verdict is about this one training.")


def _float32_sentence(facts: Facts) -> Markup | None:
    if not facts.others or weights_in_16_bits(facts) is None:
        return None
    where = "On this CPU, 16-bit" if facts.on_cpu else "16-bit"
    return Markup(
        "{} weights are held as float32, so against real 16-bit storage there is less to save "
        '(see <a href="#limits">Limits</a>).'
    ).format(where)


def _against(facts: Facts, cost: Cost) -> Markup:
    theirs = facts.cost_of(facts.baseline.name, cost.metric)
    ours, other = (facts.shown(quantity(one.value, one.unit), one, "value") for one in (cost, theirs))
    return Markup("{} against {}").format(ours, other)


def setting(facts: Facts) -> list[Markup]:
    """The setting in a few parts: model, data, training, seeds, device."""
    trained = facts.baseline.trained[0]
    batch_rows = facts.asked.training_of(facts.baseline.name).batch_rows
    seeds = facts.asked.experiment.seeds
    size = facts.model["parameters"]
    rows = {
        split: Number(f"{amount:,}", amount, f"{SAMPLE_COUNTS.as_posix()}#{split}_rows")
        for split, amount in facts.rows.items()
    }
    near = Number(f"{facts.near_duplicates:,}", facts.near_duplicates,
                  f"{SAMPLE_COUNTS.as_posix()}#near_duplicate_test_rows")  # fmt: skip
    steps = Number(f"{trained['steps']:,}", trained["steps"],
                   f"{COMPARISON.as_posix()}#training.{facts.baseline.name}[0].steps")  # fmt: skip
    return [
        Markup("{}, {} parameters").format(
            model_name(facts.asked.model),
            Number(_parameters(size), size, f"{MODEL_SOURCE.as_posix()}#parameters"),
        ),
        Markup(
            "{}: {train} rows to train on, {validation} to validate, {test} to test ({} near-duplicate{} of the others)"
        ).format(dataset_name(facts.asked.dataset), near, "" if facts.near_duplicates == 1 else "s", **rows),
        Markup("{} step{} of {}").format(
            steps, "" if trained["steps"] == 1 else "s", count(batch_rows, "row")
        ),
        Markup("{} {}").format("seeds" if len(seeds) > 1 else "seed", listed(seeds)),
        *(Markup("{}: {}").format("CPU" if facts.on_cpu else "GPU", device) for device in facts.devices),
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


def limits(facts: Facts) -> list[Limit]:
    """What this run cannot tell, made from its facts; only what applies."""
    found = [
        _random_model(facts),
        _few_seeds(facts),
        _few_instructions(facts),
        _near_duplicates(facts),
        _detectable(facts),
        _not_corrected(facts),
        _no_category_held_out(facts),
        _first_items(facts),
        _short_training(facts),
        *(_not_precision_alone(facts, other) for other in facts.others),
        _quantized_before(facts),
        _not_deterministic(facts),
        _no_real_16_bits(facts),
        _resident_set(facts),
        _random_benchmark(facts),
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
            "One seed",
            "The variance over seeds was not measured, so every interval and verdict holds for this one "
            "training. Another seed would give other numbers, and this run cannot say how different.",
        )
    return Limit(
        f"{seeds} seeds",
        f"The intervals allow for the variance over seeds, but {seeds} trainings tell little of it: that "
        "makes the intervals wide, and their width itself uncertain.",
    )


def _few_instructions(facts: Facts) -> Limit | None:
    score = facts.score(facts.baseline.name, AS_TRAINED, facts.primary)
    if not score or not score.groups or score.groups >= FEW_INSTRUCTIONS:
        return None
    return Limit(
        "A small test set",
        f"The primary metric is over {count(score.items, 'test item')} with "
        f"{groups(score)}. Intervals say what other items of the same kind "
        "could have given, and nothing of other data or other models.",
    )


def _near_duplicates(facts: Facts) -> Limit | None:
    if not facts.near_duplicates:
        return None
    threshold = facts.asked.sample.near_duplicate_threshold
    return Limit(
        "Some test rows resemble training rows",
        f"{facts.near_duplicates:,} of {count(facts.rows['test'], 'test row')} have a near-duplicate among the training "
        f"and validation rows: a prompt whose character 5-grams have a Jaccard similarity of {threshold:g} or more. "
        "There a run may repeat what it saw.",
    )


def _detectable(facts: Facts) -> Limit | None:
    """The smallest difference that would have been found, against the margin."""
    found = [
        (other, contrast)
        for other in facts.others
        if (contrast := facts.contrast("to_baseline", other.name, AS_TRAINED, facts.primary))
    ]
    if not found:
        return None
    unit, power = found[0][1].unit, formatting.percent(facts.compared.power)
    smallest = listed(
        [
            f"{formatting.significant(contrast.difference.detectable, 2)}{NARROW}{unit}"
            + (f" for {other.label}" if len(found) > 1 else "")
            for other, contrast in found
        ]
    )
    body = (
        f"A difference to {facts.baseline.label} in the primary metric is found with a probability of {power} "
        f"from {smallest}, by a test of its own."
    )
    margin = facts.compared.margins.get(facts.compared.primary)
    if margin is None:
        body += " No margin is set for this metric, so nothing is called equivalent in it."
    else:
        body += f" The margin of equivalence is {margin:g}{NARROW}{unit}."
        beyond = [
            other.label
            for other, contrast in found
            if contrast.difference.detectable > margin and contrast.verdict != "equivalent"
        ]
        if beyond:
            where = f" for {listed(beyond)}" if len(found) > 1 else ""
            body += f" That is less, so{where} this design cannot be counted on to decide equivalence at the margin."
    return Limit("What this design can find", body)


def _not_corrected(facts: Facts) -> Limit | None:
    contrasts = facts.compared.contrasts
    family = [contrast for contrast in contrasts if contrast.in_family]
    outside = len(contrasts) - len(family)
    if not outside:
        return None
    spanned = facts.compared.family
    kinds = listed([KINDS[kind] for kind in spanned["kinds"]]) if family else ""
    names = (
        listed([quality_name(tuple(metric.split("/"))) for metric in spanned["metrics"]]) if family else ""
    )
    corrected = (
        f"Holm’s correction spans {count(len(family), 'difference')}: of {kinds}, in {names}. "
        if family
        else ""
    )
    alone = sum(contrast.corrected_over == 1 for contrast in contrasts if not contrast.in_family)
    level = formatting.percent(1 - facts.compared.confidence)
    return Limit(
        "Differences are not corrected for all of their number",
        f"{corrected}The other {outside:,} on this page are corrected over the variants (and the categories) alone, "
        f"for each metric, form and kind of difference by itself{f'; {alone:,} of them have none beside them' if alone else ''}. "
        f"Each such set is tested at {level}, so some of them will be called decided by chance.",
    )


def _no_category_held_out(facts: Facts) -> Limit | None:
    if facts.compared.held_out_categories or not facts.compared.claims:
        return None
    return Limit(
        "No category was held out of training",
        "Whether a run gains on kinds of instruction that it was not trained on, claim (d), was not tested.",
    )


def _first_items(facts: Facts) -> Limit | None:
    some = []
    for recorded in facts.tasks:
        most, leaves = facts.asked.evaluation.tasks[recorded["task"]].items, len(recorded["leaves"])
        if most is not None and recorded["items"] >= most:
            each = f" of each of its {leaves} parts" if leaves > 1 else ""
            some.append(f"{recorded['task']} ({most:,}{each})")
    if not some:
        return None
    return Limit("Not every item was scored", f"Scored on the first items alone: {listed(some)}.")


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
        "The base had been quantized before",
        f"Its weights come from a {before} file, so its 16-bit form had lost precision before any run began. "
        "What 4 bits cost a model that was never rounded may differ, and be more. Tried apart on SmolLM2-135M (50 rows, "
        "untrained): NF4 cost 0.18 nats per token on the Q4_1 grid and about 0.25 off it, so the first grid flattered it.",
    )


def _not_deterministic(facts: Facts) -> Limit | None:
    if all(run["deterministic"] for variant in facts.variants for run in variant.trained):
        return None
    return Limit(
        "Runs on a GPU do not repeat to the last digit",
        "Some of its kernels add up in another order each time, so the same seed can give slightly other "
        "weights and scores. No interval has this in it apart from the variance over seeds.",
    )


def held_as_float32(facts: Facts) -> list[Variant]:
    """The variants that train an adapter on 16-bit weights and hold those as float32."""
    return [
        variant
        for variant in facts.variants
        if methods.get(facts.asked.variants[variant.name].method).leaves_adapter
        and not precisions.get(variant.precision["base"]).is_quantized
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
        + (", although the layers that stay unquantized would then shrink too." if smaller else "."),
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


def _random_benchmark(facts: Facts) -> Limit | None:
    shapes = list(dict.fromkeys(block.shape for block in facts.hardware if not block.own))
    if not shapes:
        return None
    return Limit(
        "Benchmarked shapes have random weights",
        f"The memory and speed at {listed(shapes)} are of models of that shape with random weights: what they cost "
        "is real, and nothing is known of their quality.",
    )


def _one_device(facts: Facts) -> Limit:
    steps = min(result["steps"] for result in facts.benchmarks.values())
    rows = min(result["micro_batch_rows"] for result in facts.benchmarks.values())
    return Limit(
        "Time and memory are of this device",
        f"They were measured on {listed(facts.devices)} over {count(steps, 'step')} of {count(rows, 'row')}, in one process "
        "for each variant. Steps of one process are no independent units, so no interval, p value or verdict is made of "
        f"them. {peak_words(facts)} Another device, batch or length of text has other ratios.",
    )


def peak_words(facts: Facts) -> str:
    """Of which forward pass the peaks of the run's own benchmark are."""
    longest = [result.get("epoch_longest_pass_tokens") for result in facts.benchmarks.values()]
    if None in longest:
        steps = min(result["warmup_steps"] + result["steps"] for result in facts.benchmarks.values())
        return f"A peak is that over {count(steps, 'step')}: an epoch’s longest forward pass may be longer, and need more."
    tokens = " to ".join(dict.fromkeys(f"{n:,}" for n in (min(longest), max(longest))))
    return f"A peak is that of an epoch’s longest forward pass ({tokens} tokens), which each variant ran."


def peak_of(point: Point) -> str:
    """Of which pass a point's peak on a data set's rows is."""
    if point.longest is not None:
        return f"longest pass of an epoch, {point.longest:,} tokens"
    return f"peak over {count(point.warmup_steps + point.steps, 'step')}"


def duration(seconds: float) -> str:
    """A time as a reader says it."""
    if seconds < 90:
        return quantity(seconds, "s", 2)
    if seconds < 90 * 60:
        return quantity(seconds / 60, "min", 2)
    return quantity(seconds / 3600, "h", 2)


def _price(hours: float, an_hour: float | None) -> str:
    if an_hour is None:
        return f"{formatting.significant(hours, 2)} times its price per hour"
    return f"about {formatting.significant(hours * an_hour, 2)} at {an_hour:g} an hour (report.device_hour_price)"


def work_words(facts: Facts) -> str:
    """What the recorded time is, and what it lacks, in a few sentences."""
    total = sum(work.seconds for work in facts.work)
    where = "None of it was on a GPU." if facts.on_cpu else "All of it held the GPU."
    text = (
        "Wall time as the runs recorded it. The stages that fetch, draw rows, measure a grid, compare and render record none, and "
        f"importing libraries is not in it. {where} "
        f"Cost: {duration(total)} of this device, {_price(total / 3600, facts.asked.report.device_hour_price)}. "
    )
    energy = facts.energy
    if not energy:
        return text + energy_words(facts)
    joules = sum(
        run["tokens_seen"] / 1000 * energy[variant.name].joules
        for variant in facts.variants
        for run in variant.trained
    )
    return text + (
        f"Energy: the trainings’ tokens, at the joules per token of the run’s own grid, are about "
        f"{quantity(joules / 3.6e6, 'kWh', 2)} of the GPU alone; scoring is not in it."
    )


def energy_words(facts: Facts) -> str:
    """At which point energy was measured, or that it was not."""
    if not facts.energy:
        why = (
            "on a CPU there is no counter that this pipeline reads"
            if facts.on_cpu
            else "the driver gave no reading"
        )
        return f"Energy was not measured: {why}."
    point = next(iter(facts.energy.values()))
    return f"Energy is that of the GPU at {rows_by_length(point)} tokens in the run’s own grid."


def answer_words(facts: Facts) -> str:
    """Which rows are shown, who won, and how answers are marked."""
    answers = facts.answers
    sampled = sum(row.sampled for row in answers.rows)
    far = sum(row.disagreeing for row in answers.rows)
    if sampled == answers.answered:
        text = f"All {count(answers.answered, 'row')} that every model answered are shown"
    else:
        text = (
            f"Of {count(answers.answered, 'row')} that every model answered, {sampled:,} were drawn by the seed "
            f"{answers.seed}, whatever the answers"
        )
    if far:
        measure = MEASURES[answers.metric] if answers.metric else "words"
        text += f"; {far:,} have the largest disagreement between the trained runs, in {measure}"
    text += ". "
    if answers.metric:
        text += f"Who won is by {MEASURES[answers.metric]} ({answers.metric}), which says little of a single answer. "
    return text


def missing(facts: Facts) -> list[str]:
    """What a full report has and this one lacks, each with the reason, in a sentence."""
    asked, found = facts.asked, []
    if not facts.others:
        found.append("No comparison: experiment.variants names one variant alone.")
    if len(asked.experiment.seeds) == 1:
        found.append("No variance over seeds, and no band in the curves: experiment.seeds names one seed.")
    if not any(score.subset.startswith("category/") for score in facts.compared.scores):
        found.append("No categories: the test split names none, or a single one.")
    elif not facts.compared.held_out_categories:
        found.append("No held-out categories: sample.held_out_categories is empty.")
    if "holdout_generation" not in asked.evaluation.tasks:
        found.append("No written answers: holdout_generation is not among evaluation.tasks.")
    if not asked.comparison.repairs:
        found.append("No faults before and after their repair: comparison.repairs is empty.")
    absent = [
        v.label for v in facts.others if not facts.contrast("to_baseline", v.name, AS_TRAINED, facts.primary)
    ]
    if absent:
        found.append(f"No difference in the primary metric for {listed(absent)}: it was not compared.")
    for metric in ("peak_memory", "training_speed"):
        without = [variant.label for variant in facts.variants if not facts.cost_of(variant.name, metric)]
        if without:
            found.append(f"No {cost_name(metric).lower()} for {listed(without)}: it was not measured.")
    own = [block for block in facts.hardware if block.own_run]
    measured = {variant.name for block in own for variant in block.variants}
    without = [variant.label for variant in facts.variants if variant.name not in measured]
    if without:
        found.append(
            f"No memory and speed over batch and length for {listed(without)}: the grid was not measured."
        )
    if not any(not block.on_cpu for block in facts.hardware):
        found.append("No GPU: results/hardware holds no measurement of one, and no grid ran on one.")
    if not facts.energy:
        found.append(energy_words(facts))
    points = [point for block in facts.hardware for point in block.points if not point.measured]
    if points:
        found.append(
            f"{count(len(points), 'benchmark point')} could not be measured; the tables say why of each."
        )
    return found


def hardware_short(facts: Facts) -> str:
    """The section of measured devices, in the contents."""
    return "On a GPU" if any(not block.on_cpu for block in facts.hardware) else "Batch and length"


def hardware_heading(facts: Facts) -> str:
    on_gpu = any(not block.on_cpu for block in facts.hardware)
    return "What it costs on a GPU" if on_gpu else "What it costs over batch and length"


def block_name(block: Device) -> str:
    """A measured device and shape, as a heading; a run can have measured what results/hardware/ holds too."""
    return f"{block.shape} on {block.device}{', in this run' if block.own_run and not block.own else ''}"


def block_words(block: Device) -> str:
    """What was measured there, and how, in a few sentences."""
    what = "the run’s own model" if block.own else "a model of this shape with random weights"
    text = (
        f"{'Each point' if len(block.points) > 1 else 'The point'} is a process of its own that trained {what} "
        f"on {block.device}; speed is the median over the counted steps."
    )
    if not block.own:
        text += " Random weights take the memory and time of trained ones; they say nothing of quality."
    missing = sum(not point.measured for point in block.points)
    if missing:
        text += f" Of {count(len(block.points), 'point')}, {missing:,} could not be measured."
    return text


def rows_by_length(point: Point) -> str:
    """What a forward pass holds, for example `4 × 512`."""
    return f"{point.micro_batch_rows:,}{NARROW}{formatting.TIMES}{NARROW}{point.length:,}"


def of_sample(label: str, rows: int | None) -> str:
    """A variant, and how many rows it was measured on, where that is known."""
    return label if rows is None else f"{label}, on {count(rows, 'row')}"


def batch(point: Point) -> str:
    """A point's batch, of the run's rows."""
    parts = [f"{count(point.batch_rows, 'row')} a step"]
    if point.micro_batch_rows != point.batch_rows:
        parts.append(f"{point.micro_batch_rows:,} at a time")
    parts.append(f"at most {point.length:,} tokens each")
    return ", ".join(parts) + (", gradient checkpointing" if point.checkpointing else "")


def outcome(point: Point) -> str:
    """Why a point was not measured."""
    if point.requested is not None:
        return f"{point.outcome}: another {quantity(point.requested, 'GiB')} could not be allocated"
    return f"{point.outcome}: {point.detail}" if point.detail else point.outcome


def deviation(point: Point) -> str:
    """Predicted less measured peak, as a percentage of the measured one."""
    return f"{signed(100 * point.deviation, 1)}{NARROW}%"


def prediction_sentence(facts: Facts) -> str | None:
    """How well the predicted memory meets the measured peaks, over all devices; None without a prediction."""
    found = [
        (point, block)
        for block in facts.hardware
        for point in block.points
        if point.measured and point.deviation is not None
    ]
    if not found:
        return None
    close = sum(abs(p.predicted["total"] - p.peak) <= CLOSE * p.peak for p, _ in found)
    point, block = max(found, key=lambda pair: abs(pair[0].deviation))
    label = next(variant.label for variant in block.variants if variant.name == point.variant)
    setting = "" if point in block.grid else f", {point.setting}"
    checkpointing = " with checkpointing" if point.checkpointing else ""
    verb = "lies" if close == 1 else "lie"
    return (
        f"The memory predicted from the model’s shape alone, before anything runs, was compared with the measured "
        f"peak at {count(len(found), 'point')}: {close:,} of them {verb} within {formatting.percent(CLOSE)} of it. "
        f"The largest deviation is {deviation(point)} ({label} at {block.shape}, {rows_by_length(point)} tokens"
        f"{checkpointing}{setting})."
    )
