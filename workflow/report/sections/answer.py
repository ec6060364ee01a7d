"""Answer: the result of the comparison in a few sentences, and the setting it holds for."""

from dataclasses import dataclass

from markupsafe import Markup, escape

from workflow.comparison.model import Contrast, Cost
from workflow.comparison.sentences import OTHER_CATEGORIES
from workflow.report.english import (
    RANDOM_MODEL,
    VERDICTS,
    caveats_of,
    change,
    count,
    decimals_for,
    form_name,
    listed,
    measured_in,
    unmeasured_sentence,
    weights_in_16_bits,
)
from workflow.report.formatting import NARROW, Number, number, percent, quantity, ratio, span
from workflow.report.labels import dataset_name, model_name
from workflow.report.model import Facts, Variant
from workflow.report.scale import kept_in_words, share_of_gain
from workflow.report.sections.answer_decision import Decision, decision
from workflow.report.sections.answer_figure import AnswerFigure, answer_figure
from workflow.report.sections.answer_verdict import (
    caveat_of,
    difference_with_unit,
    interval_of_verdict,
    item_count,
    margin_with_unit,
    marked_verdict,
    metric_in_sentence,
    verdict_sentence,
)
from workflow.runtime.forms import AS_TRAINED, BASE
from workflow.runtime.paths import COMPARISON, MODEL_SOURCE, SAMPLE_COUNTS


@dataclass(frozen=True)
class Headline:
    """The answer: sentences, a line per variant if there are several, and notes that put it in perspective."""

    sentences: list[Markup]
    lines: list[Markup]
    notes: list[Markup]


def headline(facts: Facts) -> Headline:
    """The answer from the numbers: quality and cost of each variant against the baseline."""
    random_model = facts.params.model.source == "random"
    metric = None if random_model else facts.primary
    sentences = [Markup(RANDOM_MODEL)] if random_model else []
    lines = []
    if not facts.others:
        alone = Markup("One variant was run, {}, so there is nothing to compare it with.")
        sentences.append(alone.format(facts.baseline.label))
    elif len(facts.others) == 1:
        (other,) = facts.others
        quality = verdict_sentence(facts, other, metric)
        kept = _kept_sentence(facts, other, metric)
        cost = _cost_sentence(facts, other, "it" if quality else other.label)
        served = _forms_sentence(facts, other, metric)
        sentences += [sentence for sentence in (quality, kept, cost, served) if sentence]
    else:
        sentences += [sentence for sentence in (_all_quality(facts, metric), _all_costs(facts)) if sentence]
        lines = [_line(facts, other, metric) for other in facts.others]
    notes = [
        _other_rows_sentence(facts, metric) if lines else None,
        _training_sentence(facts, metric),
        _seed_sentence(facts, metric),
        _float32_sentence(facts),
        Markup(escape(unmeasured_sentence(facts))),
    ]
    return Headline(sentences, lines, [note for note in notes if note])


def _kept_sentence(facts: Facts, other: Variant, metric: tuple[str, str] | None) -> Markup | None:
    """What a variant keeps of the gain, as trained. None if no share is stated."""
    contrast = metric and facts.contrast("to_baseline", other.name, AS_TRAINED, metric)
    if not contrast or not share_of_gain(facts, other.name, AS_TRAINED):
        return None
    return Markup("As trained, it {}.").format(kept_in_words(facts, contrast))


def _forms_sentence(facts: Facts, other: Variant, metric: tuple[str, str] | None) -> Markup | None:
    """The verdicts on the run's other serving forms, against the same baseline."""
    contrasts = [
        contrast
        for form in facts.forms_of(other.name)
        if form != AS_TRAINED
        and metric
        and (contrast := facts.contrast("to_baseline", other.name, form, metric))
    ]
    if not contrasts:
        return None
    parts = []
    for contrast in contrasts:
        text = marked_verdict(facts, contrast)
        if contrast.verdict in ("equivalent", "undecided"):
            text += Markup(" at {}").format(difference_with_unit(facts, contrast))
        parts.append(Markup("{} ({})").format(text, form_name(contrast.form)))
    *first, last = parts
    together = Markup(" and ").join([Markup(", ").join(first), last] if first else [last])
    return Markup("In other serving forms, against the same baseline, it is {}.").format(together)


def _cost_sentence(facts: Facts, other: Variant, called: str) -> Markup | None:
    memory, speed = _memory_and_speed(facts, other)
    parts = []
    if memory:
        parts.append(
            Markup("held <strong>{}</strong> the memory at its peak ({}{}{})").format(
                _ratio(facts, memory),
                _interval_of_ratio(facts, memory),
                "Python included: " if facts.on_cpu else "",
                _against(facts, memory),
            )
        )
    if speed:
        parts.append(
            Markup("trained at <strong>{}</strong> the speed ({}{})").format(
                _ratio(facts, speed), _interval_of_ratio(facts, speed), _against(facts, speed)
            )
        )
    if not parts:
        return None
    return Markup("On {}, {} {}, {}.").format(
        _device(facts), called, Markup(" and ").join(parts), measured_in(facts)
    )


def _ratio(facts: Facts, cost: Cost) -> Number:
    return facts.cite(ratio(cost.ratio_to_baseline), cost, "ratio_to_baseline")


def _all_quality(facts: Facts, metric: tuple[str, str] | None) -> Markup | None:
    """A sentence that counts the variants by verdict."""
    contrasts = [
        contrast
        for other in facts.others
        if metric and (contrast := facts.contrast("to_baseline", other.name, AS_TRAINED, metric))
    ]
    if not contrasts:
        return None
    score = facts.score(contrasts[0].variant, AS_TRAINED, metric)
    margin = margin_with_unit(facts, contrasts[0])
    return Markup("Against {}, in {} on {}{}, {}.").format(
        facts.baseline.label,
        metric_in_sentence(score),
        item_count(facts, score),
        Markup(" (margin of equivalence {})").format(margin) if margin else "",
        _tallied(contrasts),
    )


def _tallied(contrasts: list[Contrast]) -> Markup:
    """The number of variants by verdict, as the end of a sentence."""
    verdicts = [contrast.verdict for contrast in contrasts]
    if len(set(verdicts)) == 1:
        return Markup("all {} variants are <strong>{}</strong>").format(len(verdicts), verdicts[0])
    parts = []
    for word in VERDICTS:
        if word in verdicts:
            amount = verdicts.count(word)
            who = f"{amount:,} of the {len(verdicts):,} variants" if not parts else f"{amount:,}"
            parts.append(
                Markup("{} {} <strong>{}</strong>").format(who, "is" if amount == 1 else "are", word)
            )
    *first, last = parts
    return Markup("{} and {}").format(Markup(", ").join(first), last)


def _all_costs(facts: Facts) -> Markup | None:
    """A sentence with the range of memory and speed over the variants, relative to the baseline."""
    parts = []
    for metric, template in (
        ("peak_memory", "held {} the memory at their peak"),
        ("training_speed", "trained at {} the speed"),
    ):
        costs = [cost for other in facts.others if (cost := facts.cost_of(other.name, metric))]
        if costs:
            costs.sort(key=lambda cost: cost.ratio_to_baseline)
            ends = [_ratio(facts, cost) for cost in (costs[0], costs[-1])]
            between = Markup(" to ").join(ends if ends[0] != ends[1] else ends[:1])
            parts.append(Markup(template).format(Markup("<strong>{}</strong>").format(between)))
    if not parts:
        return None
    who = "those that were measured" if facts.unmeasured else "they"
    return Markup("On {}, {} {}, {}.").format(
        _device(facts), who, Markup(" and ").join(parts), measured_in(facts)
    )


def _line(facts: Facts, other: Variant, metric: tuple[str, str] | None) -> Markup:
    """The short answer for a variant."""
    parts = []
    contrast = metric and facts.contrast("to_baseline", other.name, AS_TRAINED, metric)
    if contrast and share_of_gain(facts, other.name, AS_TRAINED):
        kept = kept_in_words(facts, contrast)
        parts.append(Markup("<strong>{}</strong>, {}").format(contrast.verdict, kept))
    elif contrast:
        value = change(facts, contrast, decimals_for(facts, metric)).value
        prefix = "" if contrast.verdict in ("worse", "better") else Markup("{}, ").format(value)
        marked = marked_verdict(facts, contrast)
        parts.append(Markup("{} ({}{})").format(marked, prefix, interval_of_verdict(facts, contrast)))
    for cost, title in zip(_memory_and_speed(facts, other), ("peak memory", "training speed"), strict=True):
        if cost:
            parts.append(Markup("{}\N{NO-BREAK SPACE}the {}").format(_ratio(facts, cost), title))
    text = Markup(", ").join(parts) if parts else "not measured"
    return Markup("{}: {}.{}").format(
        other.label, text, caveat_of(facts, contrast, left_out=[OTHER_CATEGORIES]) if contrast else ""
    )


def _other_rows_sentence(facts: Facts, metric: tuple[str, str] | None) -> Markup | None:
    """The variants that leave out other categories than the baseline, for the lines of all of them."""
    labels = [
        other.label
        for other in facts.others
        if metric
        and (contrast := facts.contrast("to_baseline", other.name, AS_TRAINED, metric))
        and OTHER_CATEGORIES in caveats_of(facts, contrast)
    ]
    if not labels:
        return None
    return Markup("{} did not learn from the same rows as {}: they leave out different categories.").format(
        listed(labels), facts.baseline.label
    )


def _memory_and_speed(facts: Facts, other: Variant) -> tuple[Cost | None, Cost | None]:
    return facts.cost_of(other.name, "peak_memory"), facts.cost_of(other.name, "training_speed")


def _device(facts: Facts) -> str:
    return "one CPU" if facts.on_cpu else "one GPU"


def _training_sentence(facts: Facts, metric: tuple[str, str] | None) -> Markup | None:
    contrast = metric and facts.contrast("to_base", facts.baseline.name, AS_TRAINED, metric)
    if not contrast:
        return None
    decimals = decimals_for(facts, metric)
    template = {
        "better": "For scale, fine-tuning itself improved {label} from {before} to {after}{unit}.",
        "worse": "Fine-tuning itself worsened {label}, from {before} to {after}{unit}.",
        "equivalent": "Fine-tuning itself moved {label} by less than the margin: {before} before, "
        "{after}{unit} after.",
        "undecided": "Whether fine-tuning itself moved {label} is undecided: {before} before, "
        "{after}{unit} after.",
    }[contrast.verdict]
    before, after = (facts.score(facts.baseline.name, form, metric) for form in (BASE, AS_TRAINED))
    return Markup(template).format(
        label=facts.baseline.label,
        before=facts.cite(number(before.value, decimals), before, "value"),
        after=facts.cite(number(after.value, decimals), after, "value"),
        unit=f"{NARROW}{contrast.unit}",
    )


def _seed_sentence(facts: Facts, metric: tuple[str, str] | None) -> Markup | None:
    """The warning that with one seed no verdict is about training in general. None with more seeds."""
    if not metric or not facts.others or len(facts.params.experiment.seeds) > 1:
        return None
    return Markup("One seed was trained, so every verdict is about this one training.")


def _float32_sentence(facts: Facts) -> Markup | None:
    if not facts.others or not facts.benchmarks or weights_in_16_bits(facts) is None:
        return None
    where = "On this CPU, 16-bit" if facts.on_cpu else "16-bit"
    return Markup(
        "{} weights are stored as float32, so the saving against real 16-bit storage is smaller "
        '(see <a href="#limits">Limits</a>).'
    ).format(where)


def _against(facts: Facts, cost: Cost) -> Markup:
    theirs = facts.cost_of(facts.baseline.name, cost.metric)
    ours, other = (facts.cite(quantity(item.value, item.unit), item, "value") for item in (cost, theirs))
    return Markup("{} against {}").format(ours, other)


def _interval_of_ratio(facts: Facts, cost: Cost) -> str:
    """The interval of a cost's ratio over processes, as the begin of a parenthesis; empty if there is none."""
    if cost.ratio_low is None:
        return ""
    return f"{percent(facts.compared.confidence)} interval {span(cost.ratio_low, cost.ratio_high)}; "


def setting(facts: Facts) -> list[Markup]:
    """The setting in parts: model, data, training, seeds and device."""
    trained = facts.baseline.trained[0]
    batch_rows = facts.params.training_of(facts.baseline.name).batch_rows
    seeds = facts.params.experiment.seeds
    size = facts.model["parameters"]
    rows = {
        split: Number(f"{amount:,}", amount, f"{SAMPLE_COUNTS.as_posix()}#{split}_rows")
        for split, amount in facts.rows.items()
    }
    rows["train"] = _training_rows(facts)
    near = Number(f"{facts.near_duplicates:,}", facts.near_duplicates,
                  f"{SAMPLE_COUNTS.as_posix()}#near_duplicate_test_rows")  # fmt: skip
    steps = Number(f"{trained.steps:,}", trained.steps,
                   f"{COMPARISON.as_posix()}#training.{facts.baseline.name}[0].steps")  # fmt: skip
    return [
        Markup("{}, {} parameters").format(
            model_name(facts.params.model),
            Number(_parameters(size), size, f"{MODEL_SOURCE.as_posix()}#parameters"),
        ),
        Markup(
            "{}: {train}, {validation} to validate, {test} to test ({} near-duplicate{} of the others)"
        ).format(dataset_name(facts.params.dataset), near, "" if facts.near_duplicates == 1 else "s", **rows),
        Markup("{} step{} of {}").format(steps, "" if trained.steps == 1 else "s", count(batch_rows, "row")),
        Markup("{} {}").format("seeds" if len(seeds) > 1 else "seed", listed(seeds)),
        *(Markup("{}: {}").format("CPU" if facts.on_cpu else "GPU", device) for device in facts.devices),
    ]


def _training_rows(facts: Facts) -> Markup:
    """How many rows a run is trained on, and whether each seed has its own."""
    by_seed = sorted(facts.train_rows.items(), key=lambda item: item[1])
    fewest, most = (
        Number(f"{amount:,}", amount, f"{SAMPLE_COUNTS.as_posix()}#train_rows_by_seed.{seed}")
        for seed, amount in (by_seed[0], by_seed[-1])
    )
    amounts = fewest if fewest.value == most.value else Markup("{} to {}").format(fewest, most)
    drawn = ", drawn anew for each seed" if facts.params.sample.per_seed else ""
    return Markup("{} rows to train on{}").format(amounts, drawn)


def _parameters(amount: int) -> str:
    for scale, word in ((1e9, "billion"), (1e6, "million")):
        if amount >= scale:
            return quantity(amount / scale, word)
    return f"{amount:,}"


@dataclass(frozen=True)
class Answer:
    """The first screen."""

    decision: Decision
    headline: Headline
    setting: list[Markup]
    figure: AnswerFigure | None


def section(facts: Facts) -> Answer:
    """The content of this section's template."""
    return Answer(
        decision=decision(facts),
        headline=headline(facts),
        setting=setting(facts),
        figure=answer_figure(facts),
    )
