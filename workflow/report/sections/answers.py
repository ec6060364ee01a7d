"""Answers: the models' written answers, side by side."""

from dataclasses import dataclass

from workflow.report.answers import TIE, Answers
from workflow.report.english import MEASURES, count
from workflow.report.model import Facts
from workflow.report.names import METRICS


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


@dataclass(frozen=True)
class AnswersSection:
    """The written answers, side by side."""

    answers: Answers
    metric: str | None  # the name of what decides the winners
    words: str
    tie: str


def section(facts: Facts) -> AnswersSection:
    """The content of this section's template."""
    return AnswersSection(
        answers=facts.answers, metric=METRICS.get(facts.answers.metric), words=answer_words(facts), tie=TIE
    )
