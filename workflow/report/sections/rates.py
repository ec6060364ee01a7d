"""Learning rates: which were tried, what was chosen, and which differences are at one rate."""

import math
from dataclasses import dataclass

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from workflow.report import english
from workflow.report.drawing import PAPER, Panel, color_of, draw_svg, legend, marker_of
from workflow.report.formatting import NARROW, signed, significant
from workflow.report.labels import variant_label
from workflow.report.model import Facts, MeasuredVariant, Variant
from workflow.tuning.records import CandidateResult, Choice

HEIGHT = 230
MOST_NAMED = 3  # variants that a sentence names; the table has all
CLOSE = 0.15  # as a share of the axis; the texts of closer ticks would touch
DIGITS = 4  # of a loss
SAME, OWN, OWN_SAME = "the same rate", "each at its own best", "each at its own best, which is the same rate"
OTHER = "another rate, which params give"


@dataclass(frozen=True)
class RunRow:
    """The rate of a variant's runs.

    Attributes:
        origin: where it comes from.
        to_baseline: how its difference to the baseline is to be read; empty for the baseline.
    """

    label: str
    learning_rate: str
    origin: str
    to_baseline: str


@dataclass(frozen=True)
class TriedRow:
    """A candidate. `note` says whether it was chosen, or what was not finite."""

    label: str
    learning_rate: str
    mean: str
    per_seed: str
    best: str
    note: str


@dataclass(frozen=True)
class RatesSection:
    """The rates of the runs and the candidates; all empty where nothing is tuned."""

    words: str
    warnings: list[str]
    legend: list[tuple[str, Markup]]
    panels: list[Panel]
    runs: list[RunRow]
    tried: list[TriedRow]


def section(facts: Facts) -> RatesSection:
    """The content of this section's template."""
    if not facts.choices:
        return RatesSection("", [], [], [], [], [])
    variants = _tuned_variants(facts)
    return RatesSection(
        words=_words(facts),
        warnings=[f"{choice.warning}." for choice in facts.choices.values() if choice.warning],
        legend=legend(variants, "rates-legend"),
        panels=[rates_panel(facts)],
        runs=[_run_row(facts, variant) for variant in facts.variants],
        tried=[
            _tried_row(variant.label, facts.choices[variant.name], candidate)
            for variant in variants
            for candidate in facts.choices[variant.name].candidates
        ],
    )


def _tuned_variants(facts: Facts) -> list[MeasuredVariant]:
    """The variants that have candidates: those of the experiment as they are everywhere, then the others."""
    known = {variant.name: variant for variant in facts.variants}
    others = [name for name in facts.choices if name not in known]
    return [
        MeasuredVariant(name, known[name].label, known[name].position)
        if name in known
        else MeasuredVariant(
            name, f"{variant_label(facts.params, name)}, {name}", len(known) + others.index(name)
        )
        for name in facts.choices
    ]


def rates_panel(facts: Facts) -> Panel:
    """Validation loss over learning rate: means over the tuning seeds joined, each seed faint, the chosen one ringed."""
    variants = _tuned_variants(facts)

    def draw(axes: Axes) -> None:
        for variant in variants:
            choice, color = facts.choices[variant.name], color_of(variant)
            sound = [candidate for candidate in choice.candidates if not candidate.diverged]
            axes.plot(
                [candidate.learning_rate for candidate in sound],
                [candidate.mean_loss for candidate in sound],
                color=color,
                marker=marker_of(variant),
                markersize=6.5,
                markeredgecolor=PAPER,
                linewidth=1.4,
                zorder=3,
            )
            axes.scatter(
                [candidate.learning_rate for candidate in sound for _ in candidate.runs],
                [run.validation_loss_kept for candidate in sound for run in candidate.runs],
                color=color,
                s=14,
                alpha=0.4,
                linewidths=0,
            )
            chosen = _chosen(choice)
            axes.plot(
                chosen.learning_rate,
                chosen.mean_loss,
                color=color,
                marker="o",
                markersize=13,
                markerfacecolor="none",
                markeredgewidth=1.6,
                linestyle="none",
                zorder=4,
            )
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(_ticks(facts)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel("learning rate")
        axes.set_ylabel("nats per token")

    title = "Validation loss over learning rate, in nats per token (lower is better)"
    alt = f"{title}. " + " ".join(
        f"{variant.label}: "
        + english.listed([_point_words(c) for c in facts.choices[variant.name].candidates])
        + f"; {facts.choices[variant.name].learning_rate:g} is chosen."
        for variant in variants
    )
    return Panel(title, draw_svg("rates", draw, alt, height=HEIGHT))


def _point_words(candidate: CandidateResult) -> str:
    if candidate.diverged:
        return f"diverged at {candidate.learning_rate:g}"
    return (
        f"{significant(candidate.mean_loss, DIGITS)} at {candidate.learning_rate:g} ({_per_seed(candidate)})"
    )


def _per_seed(candidate: CandidateResult) -> str:
    return english.listed(
        [
            f"seed {run.seed} {'diverged' if run.diverged else significant(run.validation_loss_kept, DIGITS)}"
            for run in candidate.runs
        ]
    )


def _chosen(choice: Choice) -> CandidateResult:
    return next(candidate for candidate in choice.candidates if candidate.candidate == choice.chosen)


def _ticks(facts: Facts) -> list[float]:
    """The rates that were tried, without those whose texts would touch a chosen one's or the one's before."""
    rates = {candidate.learning_rate for choice in facts.choices.values() for candidate in choice.candidates}
    chosen = {choice.learning_rate for choice in facts.choices.values()}
    width = math.log10(max(rates) / min(rates))
    ticks: list[float] = []
    for rate in [*sorted(chosen), *sorted(rates - chosen)]:
        if all(abs(math.log10(rate / tick)) >= CLOSE * width for tick in ticks):
            ticks.append(rate)
    return sorted(ticks)


def _words(facts: Facts) -> str:
    """How the rates were chosen, and which differences are at one rate."""
    seeds = facts.params.tuning.seeds
    text = (
        f"Each rate was tried with {'the seed' if len(seeds) == 1 else 'the seeds'} {english.listed(seeds)}, which no compared "
        f"run has, and the one with the lowest mean loss on the {facts.rows['validation']:,} validation rows, at the step "
        "whose weights are kept, was chosen. No test row had a say."
    )
    return f"{text} {differences_words(facts)}".strip()


def differences_words(facts: Facts) -> str:
    """A sentence that says which differences to the baseline are at its rate, and which each at its own best."""
    parts = []
    for kind, words in (
        (SAME, "at the same rate for {}"),
        (OWN, "each at its own best rate for {}"),
        (OWN_SAME, "each at its own best rate, which is the same, for {}"),
        (OTHER, "at another rate, which params give, for {}"),
    ):
        if names := [other.label for other in facts.others if relation(facts, other) == kind]:
            parts.append(
                words.format(
                    english.listed(names) if len(names) <= MOST_NAMED else f"{len(names):,} variants"
                )
            )
    return f"The differences to {facts.baseline.label} are {english.listed(parts)}." if parts else ""


def relation(facts: Facts, other: Variant) -> str:
    """How the rate of a variant relates to the baseline's."""
    same = facts.training_of(other.name).learning_rate == facts.training_of(facts.baseline.name).learning_rate
    ours, theirs = (facts.params.rate_of(name) for name in (other.name, facts.baseline.name))
    if isinstance(ours, str) and isinstance(theirs, str) and ours != theirs:
        return OWN_SAME if same else OWN
    return SAME if same else OTHER


def _run_row(facts: Facts, variant: Variant) -> RunRow:
    named = facts.params.rate_of(variant.name)
    return RunRow(
        label=variant.label,
        learning_rate=f"{facts.training_of(variant.name).learning_rate:g}",
        origin=_origin(facts, facts.choices[named]) if isinstance(named, str) else "given by params",
        to_baseline="" if variant.is_baseline else relation(facts, variant),
    )


def _origin(facts: Facts, choice: Choice) -> str:
    label = next(variant.label for variant in _tuned_variants(facts) if variant.name == choice.variant)
    text = f"the best of {len(choice.candidates)} for {label}"
    if choice.margin is None:
        return f"{text} (all others diverged)"
    second = next(c for c in choice.candidates if c.candidate == choice.runner_up)
    return f"{text} (next: {second.learning_rate:g}, {signed(choice.margin, DIGITS)}{NARROW}nats)"


def _tried_row(label: str, choice: Choice, candidate: CandidateResult) -> TriedRow:
    notes = [f"seed {run.seed}: {run.diverged}" for run in candidate.runs if run.diverged]
    if candidate.candidate == choice.chosen:
        notes.append("chosen")
    best = [run.best_validation_loss for run in candidate.runs if run.best_validation_loss is not None]
    return TriedRow(
        label=label,
        learning_rate=f"{candidate.learning_rate:g}",
        mean="diverged" if candidate.diverged else significant(candidate.mean_loss, DIGITS),
        per_seed=_per_seed(candidate),
        best=significant(sum(best) / len(best), DIGITS) if best and not candidate.diverged else "",
        note="; ".join(notes),
    )
