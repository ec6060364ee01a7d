"""Put a verdict into words, for the tables, the claims and the page."""

import math

from scipy import special

from workflow.comparison.inference import Difference, Judgment, Verdict, level_of, may_cover_too_little
from workflow.comparison.model import Rise
from workflow.runtime.errors import CheckError

# A verdict as a sentence, without its period. `scope` is empty or begins with a space and says in what was compared;
# `evidence` begins with the interval.
TEMPLATES: dict[Verdict, str] = {
    "equivalent": "{arm} is {verdict} to {other} within {margin}{scope}: the difference is {value} ({evidence})",
    "undecided": "Whether {arm} differs from {other}{scope} is {verdict}: the difference is {value} ({evidence})",
    "better": "{arm} is {verdict} than {other} by {value}{scope} ({evidence})",
    "worse": "{arm} is {verdict} than {other} by {value}{scope} ({evidence})",
}

OTHER_CATEGORIES = "The two did not learn from the same rows: they leave out different categories."


def sentence(
    arm: str,
    other: str,
    difference: Difference,
    judgment: Judgment,
    *,
    unit: str,
    higher_is_better: bool,
    corrected: bool,
) -> str:
    """State the verdict in one sentence, and add a second one if a single seed was trained.

    Args:
        arm: name of the arm.
        other: name of the arm that is subtracted.
        difference: `arm` minus `other`.
        judgment: of the difference.
        unit: of the difference, in the plural.
        higher_is_better: direction of the metric.
        corrected: whether the p value was corrected for other tests.

    Raises:
        CheckError: the verdict does not follow from the difference's sign.
    """
    verdict, equivalence = judgment.verdict, judgment.equivalence
    has_direction = verdict in ("better", "worse")
    if has_direction and (verdict == "better") != ((difference.value > 0) == higher_is_better):
        raise CheckError(f"{arm} is called {verdict} than {other}, which its difference does not say")
    alpha = level_of(difference)
    value, ends, within = difference.value, (difference.low, difference.high), None
    confidence = difference.confidence
    tested = f", {'adjusted p' if corrected else 'p'} {p_text(judgment.p_adjusted, alpha)}"
    tested += f"; margin {equivalence.margin:g}" if equivalence else ""
    if verdict == "equivalent":
        ends, within = (equivalence.low, equivalence.high), equivalence.margin
        confidence, tested = equivalence.confidence or 1 - 2 * alpha, ""
    elif has_direction and value <= 0:
        value, ends = -value, (-difference.high, -difference.low)
    digits = _digits(value, *ends, within=within)
    amount, low, high = (_number(n, digits, signed=verdict == "undecided") for n in (value, *ends))
    text = TEMPLATES[verdict].format(
        arm=arm,
        other=other,
        verdict="not decided by this much data" if verdict == "undecided" else verdict,
        margin=f"{equivalence.margin:g} {unit}" if equivalence else "",
        scope="",
        value=amount if verdict == "equivalent" else f"{amount} {unit}",
        evidence=f"{_percent(confidence)} interval {low} to {high}{tested}",
    )
    if verdict == "undecided" and difference.detectable > 0:
        text += _detectable(difference, corrected=corrected)
    if difference.seeds == 1:
        return f"{text}. With one training seed, the variance over seeds was not measured."
    return f"{text}."


def weighting_sentence(by_rows: Difference, *, verdict: Verdict) -> str:
    """State that a verdict depends on the weighting, with the difference in which every item has the same weight."""
    ends = by_rows.value, by_rows.low, by_rows.high
    value, low, high = (_number(end, _digits(*ends), signed=True) for end in ends)
    return (
        f"It depends on the weighting: by rows, each weighing the same, it is {verdict}, {value} "
        f"({_percent(by_rows.confidence)} interval {low} to {high})."
    )


def inequality_sentence(difference: Difference) -> str | None:
    """State why an interval may be narrower than its confidence promises; None if there is no reason."""
    if not may_cover_too_little(difference):
        return None
    return (
        f"Its interval may be too narrow: its {difference.groups:,} groups of items weigh like "
        f"{difference.effective_groups:,.0f}, one of them makes {100 * difference.largest_share:.0f} % of the variance, "
        f"and the skewness is {difference.skewness:.1f}."
    )


def unstated_share_sentence(baseline: str, quantity: str, divisor: Difference, *, unit: str) -> str:
    """State why there is no share of the baseline's gain or score, with its size and interval.

    Args:
        quantity: `gain` or `score`.
    """
    ends = divisor.value, divisor.low, divisor.high
    value, low, high = (_number(end, _digits(*ends), signed=True) for end in ends)
    return (
        f"No share is stated: the {quantity} of {baseline} itself is too uncertain to divide by, {value} {unit} "
        f"({_percent(divisor.confidence)} interval {low} to {high})."
    )


def rise_sentence(rise: Rise) -> str:
    """State that a verdict rests on the last checkpoint of a variant, with the step and the size of the rise."""
    ahead = "" if rise.ahead_until is None else f", and ahead of the baseline until step {rise.ahead_until}"
    return (
        f"It rests on the last checkpoint (step {rise.last_step}): on the validation rows {rise.variant} was best at step "
        f"{rise.best_step}, by {rise.last - rise.best:.3f} nats per token{ahead}."
    )


def _detectable(difference: Difference, *, corrected: bool) -> str:
    """State which difference this much data would have shown, as the end of a sentence."""
    digits = _digits(difference.detectable, 0, difference.detectable)
    alone = " by a test of its own" if corrected else ""
    return (
        f"; a difference of {_number(difference.detectable, digits)} would have been found with probability "
        f"{_power(difference)}{alone}"
    )


def _digits(*numbers: float, within: float | None = None) -> int:
    """Number of decimals that gives half the numbers' span two significant figures, or more if rounding would mislead.

    Rounding misleads if it turns a nonzero number into zero, or moves a number inside `within` to or past that limit.
    """
    span = (max(numbers) - min(numbers)) / 2 or max(abs(number) for number in numbers)
    digits = max(0, 1 - math.floor(math.log10(span))) if span > 0 else 0
    # A float holds 15 significant figures, so a number closer than that to a limit is on the limit.
    for more in range(digits, digits + 15):
        pairs = [(float(_number(number, more)), number) for number in numbers]
        misleads = any(bool(rounded) != bool(number) for rounded, number in pairs)
        if within is not None:
            misleads |= any(abs(rounded) >= within > abs(number) for rounded, number in pairs)
        if not misleads:
            return more
    return digits


def _number(number: float, digits: int, *, signed: bool = False) -> str:
    """Format a number, without a sign if it rounds to zero."""
    return f"{number:{'+' if signed and number else ''}z.{digits}f}"


def _percent(confidence: float) -> str:
    return f"{100 * confidence:.4g} %"


def p_text(p: float, level: float) -> str:
    """Format a p value so that rounding leaves it on the same side of the level."""
    if p < 0.001 < level:
        return "< 0.001"
    for digits in range(3, 15):
        if (float(f"{p:.{digits}f}") < level) == (p < level):
            return f"= {p:.{digits}f}"
    return f"= {p!r}"


def _power(difference: Difference) -> str:
    """Recover the power of the detectable difference from its noncentral t distribution."""
    freedom = difference.degrees_of_freedom
    critical = float(special.stdtrit(freedom, (1 + difference.confidence) / 2))
    shift = difference.detectable / difference.standard_error
    return f"{1 - float(special.nctdtr(freedom, shift, critical)):.2g}"
