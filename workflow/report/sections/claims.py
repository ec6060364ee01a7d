"""Claims: the claims for 4-bit fine-tuning, and whether they hold."""

from collections import Counter
from dataclasses import dataclass

from workflow.report import english
from workflow.report.model import Facts


@dataclass(frozen=True)
class ClaimRow:
    claim: str
    text: str
    label: str
    form: str
    holds: str
    sentence: str


def claim_rows(facts: Facts) -> list[ClaimRow]:
    """A row for each claim, variant and serving form, sorted by claim."""
    labels = {variant.name: variant.label for variant in facts.variants}
    rows = [
        ClaimRow(
            c.claim,
            c.text,
            labels[c.variant],
            english.form_name(c.form),
            c.holds,
            english.in_words(facts, c.sentence),
        )
        for c in facts.compared.claims
    ]
    order = list(dict.fromkeys((row.claim, row.text) for row in rows))
    return sorted(rows, key=lambda row: order.index((row.claim, row.text)))


@dataclass(frozen=True)
class ClaimTally:
    """A claim, and of how many variants and forms it holds."""

    claim: str
    text: str
    words: str


def claim_tallies(rows: list[ClaimRow]) -> list[ClaimTally]:
    """For each claim, how often it holds, with the verdicts in the order in which they occur first."""
    tallies = []
    for claim, text in dict.fromkeys((row.claim, row.text) for row in rows):
        counts = Counter(row.holds for row in rows if (row.claim, row.text) == (claim, text))
        tallies.append(ClaimTally(claim, text, ", ".join(f"{word} {n}" for word, n in counts.items())))
    return tallies


@dataclass(frozen=True)
class Claims:
    """The claims in short, and the table of them."""

    tallies: list[ClaimTally]
    rows: list[ClaimRow]


def section(facts: Facts) -> Claims:
    """The content of this section's template."""
    rows = claim_rows(facts)
    return Claims(tallies=claim_tallies(rows), rows=rows)
