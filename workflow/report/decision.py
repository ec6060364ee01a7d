"""The decision: which variant to train, and in which form to serve it, with so much memory. It follows from verdicts."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from markupsafe import Markup

from workflow.comparison.inference import Verdict

Outcome = Literal["reference", "better", "equivalent", "worse", "undecided", "lost", "nothing"]

# What to do with so much memory, as the end of a sentence.
TEMPLATES: dict[Outcome, str] = {
    "reference": "train {variant}, serve it {form}: the reference, so nothing is lost.",
    "better": "train {variant}, serve it {form}. It is better than {baseline}: it {kept}.",
    "equivalent": "train {variant}, serve it {form}. It is equivalent to {baseline}: it {kept}.",
    "worse": "train {variant}, serve it {form}. It is worse than {baseline}: it {kept}.",
    "undecided": "{variant}, served {form}, fits; whether it loses quality is undecided. It {kept}.",
    "lost": "nothing that fits keeps what fine-tuning gained: {variant}, served {form}, {kept}.",
    "nothing": "nothing fits; {variant}, served {form}, needs the least, {least}.",
}


@dataclass(frozen=True)
class Candidate:
    """A variant in a serving form: what it needs, and the verdict on it.

    Attributes:
        variant, form: in words, for example `4-bit QLoRA (NF4)` and `as trained`.
        training_gib, serving_gib: memory that training and serving need, in GiB.
        verdict: against the baseline as trained; None for that baseline itself.
        most_lost: the interval's worse end, in the metric's unit and above zero where it is worse than the baseline.
        keeps_nothing: whether nothing of what training gained is left in this form.
        slow: whether its training is too slow to be preferred to one of the same quality.
        kept: what it keeps, as the part of a sentence after `it`.
        trained_as: equal for two variants whose trainings have the same settings; None for one like no other.
        own_settings: how many training settings its params give it in place of the shared ones.
    """

    variant: str
    form: str
    training_gib: float
    serving_gib: float
    verdict: Verdict | None
    most_lost: float
    keeps_nothing: bool = False
    slow: bool = False
    kept: Markup = field(default=Markup(), compare=False)
    trained_as: Hashable = None
    own_settings: int = 0

    @property
    def gib(self) -> float:
        """The memory that both training and serving fit into."""
        return max(self.training_gib, self.serving_gib)


@dataclass(frozen=True)
class Choice:
    """What to take with each of these budgets.

    Attributes:
        budgets: consecutive ones, in GB of 10^9 bytes.
        is_open: whether it holds above the last of them too.
        candidate: the choice; of the outcome `nothing`, what needs least.
    """

    budgets: tuple[int, ...]
    is_open: bool
    outcome: Outcome
    candidate: Candidate


def decide(candidates: Sequence[Candidate], usable: Mapping[int, float]) -> list[Choice]:
    """Choose a candidate for each budget, and join neighboring budgets with the same choice.

    Of those that fit, one that is better than the baseline comes first. Then come the baseline and what is equivalent
    to it, the one with the least memory first. Otherwise it is the one that can lose least: the one whose interval
    ends nearest to the baseline on its worse side. Of variants that were trained alike, the plainest stands for all, as
    what tells them apart is chance.

    Args:
        candidates: not empty.
        usable: GiB that a training or a served model can use, by budget in GB, in ascending order.
    """
    candidates = _plainest(candidates)
    choices: list[Choice] = []
    last = max(usable)
    for budget, gib in usable.items():
        outcome, candidate = _choose([c for c in candidates if c.gib <= gib], candidates)
        if choices and (choices[-1].outcome, choices[-1].candidate) == (outcome, candidate):
            budgets = (*choices.pop().budgets, budget)
        else:
            budgets = (budget,)
        choices.append(Choice(budgets, budget == last and outcome != "nothing", outcome, candidate))
    return choices


def _plainest(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Without the candidates of which another one was trained alike, is served alike, and has fewer settings of its own."""
    return [
        candidate
        for candidate in candidates
        if candidate.trained_as is None
        or not any(
            (other.trained_as, other.form) == (candidate.trained_as, candidate.form)
            and other.own_settings < candidate.own_settings
            for other in candidates
        )
    ]


def _choose(fitting: list[Candidate], candidates: Sequence[Candidate]) -> tuple[Outcome, Candidate]:
    if not fitting:
        return "nothing", min(candidates, key=lambda c: c.gib)
    better = [c for c in fitting if c.verdict == "better"]
    if better:
        return "better", min(better, key=lambda c: (c.slow, c.most_lost))
    alike = [c for c in fitting if c.verdict in (None, "equivalent")]
    if alike:
        chosen = min(alike, key=lambda c: (c.slow, c.training_gib, c.verdict is not None, c.serving_gib))
        return ("equivalent" if chosen.verdict else "reference"), chosen
    keeping = [c for c in fitting if not c.keeps_nothing]
    if keeping:
        chosen = min(keeping, key=lambda c: (c.most_lost, c.gib))
        return ("undecided" if chosen.verdict == "undecided" else "worse"), chosen
    return "lost", min(fitting, key=lambda c: (c.most_lost, c.gib))


def choice_sentence(choice: Choice, baseline: str, least: str) -> Markup:
    """A choice as a sentence, for example `16 GB or more: train 16-bit LoRA, serve it as trained: ...`.

    Args:
        baseline: its name.
        least: the memory that the candidate needs, with its unit.
    """
    text = Markup(TEMPLATES[choice.outcome]).format(
        variant=Markup("<strong>{}</strong>").format(choice.candidate.variant),
        form=Markup("<strong>{}</strong>").format(choice.candidate.form),
        baseline=baseline,
        kept=choice.candidate.kept,
        least=least,
    )
    return Markup("<strong>{}</strong>: {}").format(budget_text(choice), text)


def budget_text(choice: Choice) -> str:
    """The budgets of a choice: `8 GB`, `8 to 16 GB`, `24 GB or more`."""
    first, last = choice.budgets[0], choice.budgets[-1]
    if choice.is_open:
        return f"{first}\N{NO-BREAK SPACE}GB or more"
    return f"{first}\N{NO-BREAK SPACE}GB" if first == last else f"{first} to {last}\N{NO-BREAK SPACE}GB"
