"""Answers: the models' written answers, side by side."""

from dataclasses import dataclass

from workflow.report.answers import TIE, Answers
from workflow.report.english import MEASURES, count
from workflow.report.model import Facts
from workflow.report.names import METRICS

MOST_SHOWN, IN_A_LINE = 8, 5


def answer_words(facts: Facts) -> str:
    """Sentences on the choice of the rows and of the winners."""
    answers = facts.answers
    sampled = sum(row.sampled for row in answers.rows)
    disagreeing = sum(row.disagreeing for row in answers.rows)
    if sampled == answers.answered:
        text = f"All {count(answers.answered, 'row')} that every model answered are shown"
    else:
        text = (
            f"Of {count(answers.answered, 'row')} that every model answered, {sampled:,} were drawn by the seed "
            f"{answers.seed}, whatever the answers"
        )
    if disagreeing:
        measure = MEASURES[answers.metric] if answers.metric else "words"
        text += f"; {disagreeing:,} have the largest disagreement between the trained runs, in {measure}"
    text += ". "
    if answers.metric:
        text += f"The winner is decided by {MEASURES[answers.metric]} ({METRICS[answers.metric]}), which says little about a single answer. "
    return text


def _shown(facts: Facts) -> int:
    """How many answers of a row are seen at once: all, or with many the first that fill a line of a wide window."""
    answered = 1 + len(facts.answers.arms)  # and the reference
    return answered if answered <= MOST_SHOWN else IN_A_LINE


@dataclass(frozen=True)
class AnswersSection:
    """The written answers, side by side."""

    answers: Answers
    metric: str | None  # the name of what decides the winners
    words: str
    tie: str
    shown: int  # answers of a row; the others are folded


def section(facts: Facts) -> AnswersSection:
    """The content of this section's template."""
    return AnswersSection(
        answers=facts.answers,
        metric=METRICS.get(facts.answers.metric),
        words=answer_words(facts),
        tie=TIE,
        shown=_shown(facts),
    )
