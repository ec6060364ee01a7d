"""Put a verdict into words, for the tables, the claims and the page."""

import math

from scipy import special

from workflow.comparison.inference import Difference, Judgment, Verdict, level_of
from workflow.comparison.model import Rise
from workflow.runtime.errors import CheckError


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
    alpha = level_of(difference)
    margin = f"{equivalence.margin:g}" if equivalence else None
    ends = (
        (equivalence.low, equivalence.high) if verdict == "equivalent" else (difference.low, difference.high)
    )
    digits = _digits(difference.value, *ends, within=equivalence.margin if verdict == "equivalent" else None)
    tested = f"{'adjusted p' if corrected else 'p'} {_p_text(judgment.p_adjusted, alpha)}"
    limit = f"; margin {margin}" if margin else ""
    if verdict == "equivalent":
        low, high = (_number(end, digits) for end in ends)
        text = (
            f"{arm} is equivalent to {other} within {margin} {unit}: the difference is "
            f"{_number(difference.value, digits)} ({_percent(1 - 2 * alpha)} interval {low} to {high})"
        )
    elif verdict == "undecided":
        low, high = (_number(end, digits, signed=True) for end in ends)
        text = (
            f"Whether {arm} differs from {other} is not decided by this much data: the difference is "
            f"{_number(difference.value, digits, signed=True)} {unit} "
            f"({_percent(difference.confidence)} interval {low} to {high}, {tested}{limit})"
        )
        if difference.detectable > 0:
            digits = _digits(difference.detectable, 0, difference.detectable)
            alone = " by a test of its own" if corrected else ""
            chance = f"would have been found with probability {_power(difference)}{alone}"
            text += f"; a difference of {_number(difference.detectable, digits)} {chance}"
    else:
        if (verdict == "better") != ((difference.value > 0) == higher_is_better):
            raise CheckError(f"{arm} is called {verdict} than {other}, which its difference does not say")
        sign = 1 if difference.value > 0 else -1
        low, high = (_number(end, digits) for end in sorted(sign * end for end in ends))
        text = (
            f"{arm} is {verdict} than {other} by {_number(abs(difference.value), digits)} {unit} "
            f"({_percent(difference.confidence)} interval {low} to {high}, {tested}{limit})"
        )
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


def unstated_share_sentence(baseline: str, quantity: str, divisor: Difference, *, unit: str) -> str:
    """State why there is no share of the baseline's gain or score, with its size and interval.

    Args:
        quantity: `gain` or `score`.
    """
    ends = divisor.value, divisor.low, divisor.high
    value, low, high = (_number(end, _digits(*ends), signed=True) for end in ends)
    return (
        f"No share is stated: the {quantity} of {baseline} itself is not clearly above zero, {value} {unit} "
        f"({_percent(divisor.confidence)} interval {low} to {high})."
    )


def rise_sentence(rise: Rise) -> str:
    """State that a verdict rests on the last checkpoint of a variant, with the step and the size of the rise."""
    ahead = "" if rise.ahead_until is None else f", and ahead of the baseline until step {rise.ahead_until}"
    return (
        f"It rests on the last checkpoint (step {rise.last_step}): on the validation rows {rise.variant} was best at step "
        f"{rise.best_step}, by {rise.last - rise.best:.3f} nats per token{ahead}."
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


def _p_text(p: float, level: float) -> str:
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
