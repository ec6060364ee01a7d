"""Claims: the claims for 4-bit fine-tuning, and whether they hold."""

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
        ClaimRow(c.claim, c.text, labels[c.variant], english.form_name(c.form), c.holds, c.sentence)
        for c in facts.compared.claims
    ]
    order = list(dict.fromkeys((row.claim, row.text) for row in rows))
    return sorted(rows, key=lambda row: order.index((row.claim, row.text)))


@dataclass(frozen=True)
class Claims:
    """The table of the claims."""

    rows: list[ClaimRow]


def section(facts: Facts) -> Claims:
    """The content of this section's template."""
    return Claims(rows=claim_rows(facts))
