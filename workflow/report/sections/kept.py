"""How close to the baseline: each arm's share of its gain, its scores as shares of the baseline's, and its predictions."""

from dataclasses import dataclass

from workflow.comparison.divergences import KL_MEAN, QUANTILES, SAME_TOP
from workflow.comparison.model import Divergence, Share
from workflow.comparison.shares import GAIN, SCORE
from workflow.report import english, formatting
from workflow.report.formatting import NARROW, Number, number
from workflow.report.model import Facts, Variant

HUNDRED = 100  # a share as a percentage


@dataclass(frozen=True)
class Interval:
    """A value with the ends of its interval as texts; without ends it has no interval."""

    value: Number
    low: Number | None
    high: Number | None


@dataclass(frozen=True)
class Gain:
    """What the baseline's training gained, and what each arm keeps of it.

    Attributes:
        words: the gain with its interval.
        reason: why no share of it is stated; None if they are.
        shares: by variant and form; None where it is not stated.
    """

    words: str
    reason: str | None
    shares: dict[tuple[str, str], Interval | None]


@dataclass(frozen=True)
class ScoreBlock:
    """Scores in one metric as shares of the baseline's."""

    name: str
    rows: list[tuple[str, str, Interval | None]]  # label, form, share


@dataclass(frozen=True)
class DivergenceRow:
    label: str
    form: str
    first: bool  # of the variant's rows
    mean: Interval
    quantiles: list[Interval]
    same_top: Interval


@dataclass(frozen=True)
class Kept:
    """The tables of this section; one without rows is not shown."""

    scores: list[ScoreBlock]
    divergences: list[DivergenceRow]
    compared: str  # the responses and tokens at which predictions were compared

    def __bool__(self) -> bool:
        return bool(self.scores or self.divergences)


def section(facts: Facts) -> Kept:
    """The content of this section's template."""
    divergences = {(d.variant, d.form, d.metric): d for d in facts.compared.divergences}
    compared = next(iter(divergences.values()), None)
    return Kept(
        scores=_score_blocks(facts),
        divergences=[
            _divergence_row(facts, variant, form, divergences)
            for variant, form in _arms(facts)
            if (variant.name, form, KL_MEAN) in divergences
        ],
        compared=f"{english.count(compared.items, 'response')}, {english.count(compared.tokens, 'token')}"
        if compared
        else "",
    )


def _arms(facts: Facts) -> list[tuple[Variant, str]]:
    return [(variant, form) for variant in facts.variants for form in facts.forms_of(variant.name)]


def gain(facts: Facts) -> Gain | None:
    """The baseline's gain and the shares of it. None in a comparison from before they were taken."""
    shares = [share for share in facts.compared.shares if share.measure == GAIN]
    if not shares:
        return None
    return Gain(
        words=_gain_words(shares[0]),
        reason=english.in_words(facts, shares[0].reason),
        shares={(share.variant, share.form): percentage(facts, share) for share in shares},
    )


def percentage(facts: Facts, item: Share | Divergence) -> Interval | None:
    """A share as a percentage with its interval. None if it is not stated."""
    if item.value is None:
        return None
    decimals = formatting.decimals_of(HUNDRED * item.low, HUNDRED * item.high)
    value, low, high = (
        facts.cite(f"{number(HUNDRED * getattr(item, name), decimals)}{NARROW}%", item, name)
        for name in ("value", "low", "high")
    )
    return Interval(value, low, high)


def _gain_words(share: Share) -> str:
    divisor = share.divisor
    decimals = formatting.decimals_of(divisor.low, divisor.high)
    value, low, high = (number(getattr(divisor, name), decimals) for name in ("value", "low", "high"))
    return f"{value} {share.unit} ({formatting.percent(share.confidence)} interval {low} to {high})"


def _score_blocks(facts: Facts) -> list[ScoreBlock]:
    """A block per metric in which more is better, with its rows in the order of the other tables."""
    shares = {(s.variant, s.form, s.task, s.metric): s for s in facts.compared.shares if s.measure == SCORE}
    return [
        ScoreBlock(
            english.quality_name(metric),
            [
                (
                    variant.label,
                    english.form_name(form),
                    percentage(facts, shares[variant.name, form, *metric]),
                )
                for variant, form in _arms(facts)
                if (variant.name, form, *metric) in shares
            ],
        )
        for metric in dict.fromkeys((task, name) for _, _, task, name in shares)
    ]


def _divergence_row(
    facts: Facts, variant: Variant, form: str, divergences: dict[tuple[str, str, str], Divergence]
) -> DivergenceRow:
    mean, same_top, *quantiles = (
        divergences[variant.name, form, metric] for metric in (KL_MEAN, SAME_TOP, *QUANTILES)
    )
    return DivergenceRow(
        label=variant.label,
        form=english.form_name(form),
        first=form
        == next(f for f in facts.forms_of(variant.name) if (variant.name, f, KL_MEAN) in divergences),
        mean=_nats(facts, mean),
        quantiles=[
            Interval(facts.cite(formatting.significant(each.value, 2), each, "value"), None, None)
            for each in quantiles
        ],
        same_top=percentage(facts, same_top),
    )


def _nats(facts: Facts, item: Divergence) -> Interval:
    decimals = formatting.decimals_of(item.low, item.high)
    return Interval(
        *(facts.cite(number(getattr(item, name), decimals), item, name) for name in ("value", "low", "high"))
    )
