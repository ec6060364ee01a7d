"""A difference in the order in which it can be felt: the share of the gain, the factor of perplexity, the metric's unit."""

import math

from markupsafe import Markup

from workflow.comparison.model import Contrast, Share
from workflow.comparison.shares import GAIN
from workflow.report.formatting import NARROW, TIMES, Number, decimals_of, number, percent, signed
from workflow.report.model import Facts

PERCENT = f"{NARROW}%"
NATS = "nats per token"


def share_of_gain(facts: Facts, variant: str, form: str) -> Share | None:
    """What an arm keeps of the baseline's gain. None if it is not stated."""
    shares = (s for s in facts.compared.shares if (s.measure, s.variant, s.form) == (GAIN, variant, form))
    share = next(shares, None)
    return share if share and share.value is not None else None


def kept_share(facts: Facts, share: Share) -> tuple[Number, Number, Number]:
    """A share as percentages: value, low, high. The half-width has two significant digits."""
    decimals = decimals_of(100 * share.low, 100 * share.high)
    value, low, high = (
        facts.cite(f"{number(100 * getattr(share, name), decimals)}{PERCENT}", share, name)
        for name in ("value", "low", "high")
    )
    return value, low, high


def perplexity_factor(contrast: Contrast) -> str | None:
    """The factor of perplexity, exp(difference), for example `1.108×`. None for a metric that is no loss in nats."""
    if contrast.unit != NATS:
        return None
    low, value, high = (math.exp(getattr(contrast.difference, name)) for name in ("low", "value", "high"))
    return f"{number(value, decimals_of(low, high))}{TIMES}"


def kept_in_words(facts: Facts, contrast: Contrast) -> Markup:
    """What an arm keeps, as the part of a sentence after `it`, for example `keeps 97 % of the gain (...)`.

    Where no share is stated, it begins with the factor of perplexity, and for other metrics with the difference.
    """
    difference = contrast.difference
    decimals = decimals_of(difference.low, difference.high)
    value, low, high = (
        facts.cite(signed(getattr(difference, name), decimals), contrast, "difference", name)
        for name in ("value", "low", "high")
    )
    unit = f"{NARROW}{contrast.unit.replace(' ', NARROW)}"
    share = share_of_gain(facts, contrast.variant, contrast.form)
    factor = perplexity_factor(contrast)
    confidence = facts.cite(percent(difference.confidence), contrast, "difference", "confidence")
    if share:
        kept, share_low, share_high = kept_share(facts, share)
        perplexity = f"perplexity {factor}, " if factor else ""
        nothing = "nothing of the gain: " if share.value <= 0 else ""
        of_the_gain = "" if share.value <= 0 else " of the gain"
        text = "keeps {}<strong>{}</strong>{} ({} interval {} to {}; {}{}{})"
        return Markup(text).format(
            nothing, kept, of_the_gain, confidence, share_low, share_high, perplexity, value, unit
        )
    if factor:
        text = "has <strong>{}</strong> the perplexity ({}{}, {} interval {} to {})"
        return Markup(text).format(factor, value, unit, confidence, low, high)
    return Markup("differs by <strong>{}</strong>{} ({} interval {} to {})").format(
        value, unit, confidence, low, high
    )
