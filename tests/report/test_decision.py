"""The decision by memory: made-up verdicts, and the sentences that follow from them."""

from dataclasses import replace

import pytest
from markupsafe import Markup

from workflow.report.decision import Candidate, choice_sentence, decide

BASELINE = "16-bit LoRA"
USABLE = {8: 6.7, 16: 14.1, 24: 21.6}  # GiB by GB


def candidate(variant: str, gib: float, verdict: str | None, **facts) -> Candidate:
    facts = {"form": "as trained", "serving_gib": gib / 2, "most_lost": 0.0} | facts
    kept = Markup(facts.pop("kept", "keeps 97 % of the gain"))
    return Candidate(variant=variant, training_gib=gib, verdict=verdict, kept=kept, **facts)


LORA = candidate(BASELINE, 16.0, None)
NF4 = candidate("NF4", 6.0, "worse", most_lost=0.03)


def sentences(*candidates: Candidate) -> list[str]:
    return [choice_sentence(c, BASELINE, "6.4 GB").striptags().replace("\N{NO-BREAK SPACE}", " ")
            for c in decide(candidates, USABLE)]  # fmt: skip


def test_a_clear_win_is_taken_wherever_it_fits():
    better = candidate("DoRA", 10.0, "better", kept="keeps 120 % of the gain")
    assert sentences(LORA, NF4, better) == [
        "8 GB: train NF4, serve it as trained. It is worse than 16-bit LoRA: it keeps 97 % of the gain.",
        "16 GB or more: train DoRA, serve it as trained. It is better than 16-bit LoRA: it keeps 120 % of the gain.",
    ]


def test_nothing_fits_the_smallest_budget():
    assert sentences(LORA, replace(NF4, training_gib=7.0, serving_gib=15.0)) == [
        "8 to 16 GB: nothing fits; NF4, served as trained, needs the least, 6.4 GB.",
        "24 GB or more: train 16-bit LoRA, serve it as trained: the reference, so nothing is lost.",
    ]


def test_nothing_fits_any_budget():
    (sentence,) = sentences(replace(LORA, training_gib=90.0))
    assert sentence.startswith("8 to 24 GB: nothing fits; 16-bit LoRA")


def test_what_is_undecided_is_said_to_be():
    undecided = replace(NF4, verdict="undecided", kept=Markup("keeps 90 % of the gain"))
    assert sentences(LORA, undecided)[0] == (
        "8 to 16 GB: NF4, served as trained, fits; whether it loses quality is undecided. It keeps 90 % of the gain."
    )


def test_a_form_that_loses_everything_is_never_recommended():
    lost = replace(NF4, form="merged and quantized again", keeps_nothing=True, most_lost=0.01,
                   kept=Markup("keeps nothing of the gain"))  # fmt: skip
    assert "serve it as trained" in sentences(LORA, NF4, lost)[0]
    assert sentences(LORA, lost)[0] == (
        "8 to 16 GB: nothing that fits keeps what fine-tuning gained: NF4, served merged and quantized again, keeps "
        "nothing of the gain."
    )


def test_the_cheapest_equivalent_wins_unless_it_is_slow():
    cheap, cheaper = candidate("8-bit", 12.0, "equivalent"), candidate("8-bit, small", 11.0, "equivalent")
    assert [c.candidate.variant for c in decide([LORA, NF4, cheap, cheaper], USABLE)] == [
        "NF4",
        "8-bit, small",
    ]
    slow = replace(cheaper, slow=True)
    assert [c.candidate.variant for c in decide([LORA, NF4, slow], USABLE)] == [
        "NF4",
        "8-bit, small",
        BASELINE,
    ]


def test_where_all_that_fits_is_worse_the_one_that_can_lose_least_is_taken():
    merged = replace(NF4, form="merged into 16 bits", most_lost=0.02, serving_gib=13.0)
    choices = decide([LORA, NF4, merged], USABLE)
    assert [(c.budgets, c.candidate.form) for c in choices] == [
        ((8,), "as trained"), ((16,), "merged into 16 bits"), ((24,), "as trained"),
    ]  # fmt: skip


@pytest.mark.parametrize("verdict", ["worse", "undecided"])
def test_the_reference_comes_before_what_is_not_decided_to_be_as_good(verdict):
    (*_, last) = decide([LORA, replace(NF4, verdict=verdict, most_lost=-0.01)], USABLE)
    assert last.outcome == "reference"
