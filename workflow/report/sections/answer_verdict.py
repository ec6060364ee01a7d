"""The answer's sentence on a verdict, and its parts."""

from collections.abc import Collection

from markupsafe import Markup

from workflow.comparison.model import Contrast, Score
from workflow.comparison.sentences import TEMPLATES
from workflow.report import formatting
from workflow.report.english import (
    MEASURES,
    TASKS,
    caveats_of,
    change,
    correction_sentence,
    decimals_for,
    equivalence_confidence,
)
from workflow.report.formatting import NARROW, number, signed
from workflow.report.model import Facts, Variant
from workflow.runtime.forms import AS_TRAINED


def verdict_sentence(facts: Facts, other: Variant, metric: tuple[str, str] | None) -> Markup | None:
    """The verdict on a variant as trained against the baseline. None if the two were not compared."""
    contrast = metric and facts.contrast("to_baseline", other.name, AS_TRAINED, metric)
    if not contrast:
        return None
    score = facts.score(other.name, AS_TRAINED, metric)
    margin = margin_with_unit(facts, contrast)
    limit = Markup("; the margin of equivalence is {}").format(margin) if margin else ""
    if contrast.verdict in ("worse", "better"):
        value = Markup("<strong>{}</strong>").format(size(facts, contrast))
    else:
        value = difference_with_unit(facts, contrast)
    text = Markup(TEMPLATES[contrast.verdict]).format(
        arm=other.label,
        other=facts.baseline.label,
        verdict=Markup("<strong>{}</strong>").format(contrast.verdict),
        margin=Markup("the margin of {}").format(margin),
        scope=Markup(" in {} on {}").format(metric_in_sentence(score), item_count(facts, score)),
        value=value,
        evidence=Markup("{}{}").format(
            interval_of_verdict(facts, contrast), "" if contrast.verdict == "equivalent" else limit
        ),
    )
    return Markup("{}.{}").format(text, caveat_of(facts, contrast))


def difference_with_unit(facts: Facts, contrast: Contrast) -> Markup:
    """The signed difference with its unit."""
    value = change(facts, contrast, decimals_for(facts, (contrast.task, contrast.metric))).value
    return Markup("{}{}{}").format(value, NARROW, contrast.unit)


def marked_verdict(facts: Facts, contrast: Contrast) -> Markup:
    """The verdict in bold. `worse` and `better` include the size of the difference."""
    if contrast.verdict not in ("worse", "better"):
        return Markup("<strong>{}</strong>").format(contrast.verdict)
    return Markup("<strong>{} by {}</strong>").format(contrast.verdict, size(facts, contrast))


def size(facts: Facts, contrast: Contrast) -> Markup:
    """A difference without its sign, with its unit."""
    decimals = decimals_for(facts, (contrast.task, contrast.metric))
    value = facts.cite(number(abs(contrast.difference.value), decimals), contrast, "difference", "value")
    return Markup("{}{}{}").format(value, NARROW, contrast.unit)


def interval_of_verdict(facts: Facts, contrast: Contrast) -> Markup:
    """The interval that the verdict comes from. For `equivalent`, it is that of the two one-sided tests."""
    decimals = decimals_for(facts, (contrast.task, contrast.metric))
    if contrast.verdict == "equivalent":
        part, interval, confidence = "equivalence", contrast.equivalence, equivalence_confidence(facts)
        limits = (-interval.margin, interval.margin)
    else:
        part, interval, limits = "difference", contrast.difference, (0,)
        confidence = facts.cite(formatting.percent(interval.confidence), contrast, part, "confidence")
    decimals = formatting.separating_decimals((interval.low, interval.high), limits, at_least=decimals)
    low, high = (
        facts.cite(signed(getattr(interval, end), decimals), contrast, part, end) for end in ("low", "high")
    )
    return Markup("{} interval {} to {}").format(confidence, low, high)


def metric_in_sentence(score: Score) -> str:
    """The readable name of a score's metric, for a sentence that gives the unit elsewhere."""
    task, measure = score.task, score.metric
    name = TASKS[task].lower() if task in TASKS else task
    words = MEASURES.get(measure, measure.replace("_", " "))
    return name if words == score.unit else f"{name} ({words})"


def margin_with_unit(facts: Facts, contrast: Contrast) -> Markup | None:
    """The margin of equivalence with its unit. None if none is set."""
    if not contrast.equivalence:
        return None
    margin = facts.cite(f"{contrast.equivalence.margin:g}", contrast, "equivalence", "margin")
    return Markup("{}{}{}").format(margin, NARROW, contrast.unit)


def item_count(facts: Facts, score: Score) -> Markup:
    items = facts.cite(f"{score.items:,}", score, "items")
    return Markup("{} test item{}").format(items, "" if score.items == 1 else "s")


def caveat_of(facts: Facts, contrast: Contrast, left_out: Collection[str] = ()) -> str:
    """The caveats of a verdict, to follow its sentence, without those that are told elsewhere."""
    caveats = [correction_sentence(contrast), *caveats_of(facts, contrast)]
    return "".join(f" {text}" for text in caveats if text and text not in left_out)
