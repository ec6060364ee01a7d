"""The decision by memory: made-up verdicts, and the sentences that follow from them."""

import contextlib
from dataclasses import replace

import made_up_results
import pytest
from made_up_results import further_variants, write
from markupsafe import Markup
from report_reader import facts

from workflow import params
from workflow.cost import memory
from workflow.report.decision import Candidate, choice_sentence, decide
from workflow.report.english import correction_sentence
from workflow.report.sections.answer_decision import decision, open_question, planned_needs
from workflow.runtime.forms import AS_TRAINED, MERGED_16BIT

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


def test_of_variants_that_were_trained_alike_the_plain_one_is_taken_whatever_chance_gave_the_other():
    plain = replace(NF4, trained_as="NF4 at 5e-4", most_lost=0.031)
    tuned = replace(plain, variant="NF4, own rate", own_settings=1, most_lost=0.030)
    for other in (tuned, replace(tuned, verdict="better"), replace(tuned, training_gib=5.0)):
        assert {c.candidate.variant for c in decide([other, plain, LORA], USABLE)} == {"NF4", BASELINE}
    merged = replace(tuned, form="merged into 16 bits", most_lost=0.01)  # the plain one was not served so
    assert decide([merged, plain, LORA], USABLE)[0].candidate == merged
    apart = replace(tuned, trained_as="NF4 at 1e-3")
    assert decide([apart, plain, LORA], USABLE)[0].candidate == apart


@pytest.mark.parametrize("factor", [1, 3])
def test_the_page_names_the_arm_at_its_own_rate_only_if_that_rate_is_another_one(
    tmp_path, monkeypatch, factor
):
    monkeypatch.chdir(tmp_path)
    own, plain = "qlora_nf4_dq_own_rate", "qlora_nf4_dq"
    with further_variants({own: plain}):
        monkeypatch.setitem(made_up_results.AFTER, own, made_up_results.AFTER[plain] - 1e-3)
        rate = params.preset("default").training.learning_rate * factor
        write(variants=("lora_16bit", own, plain), training={own: {"learning_rate": rate}})
        first = decision(facts()).advices[1].sentences[0][1].striptags()
    assert "train 4-bit QLoRA (NF4, double-quantized)" in first
    assert ("own rate" in first) == (factor != 1)


@pytest.mark.parametrize("verdict", ["worse", "undecided"])
def test_the_reference_comes_before_what_is_not_decided_to_be_as_good(verdict):
    (*_, last) = decide([LORA, replace(NF4, verdict=verdict, most_lost=-0.01)], USABLE)
    assert last.outcome == "reference"


@pytest.fixture(scope="module")
def undecided(tmp_path_factory):
    """Two variants whose difference is undecided, with what the run's own difference needs."""
    with contextlib.chdir(tmp_path_factory.mktemp("undecided")):
        write(half_width=0.09)
        return facts()


def test_the_page_says_what_it_cannot_say_and_what_would_let_it(undecided):
    (question,) = decision(undecided).open_questions.sentences
    text = question.striptags().replace("\N{NO-BREAK SPACE}", " ")
    assert text.startswith(
        "Whether 4-bit QLoRA (NF4, double-quantized) loses anything against 16-bit LoRA this run"
    )
    assert (
        "and the margin is 0.02 nats per token. To find one as large as the one it measured (0.058), " in text
    )
    assert text.endswith(("would do.", "alone would do."))
    first = decision(undecided).advices[1].sentences[0][1].striptags()
    assert "fits; whether it loses quality is undecided. It keeps 93 " in first.replace(
        "\N{NO-BREAK SPACE}", " "
    )


def test_several_open_questions_are_one_list_that_asks_for_no_more_data_where_there_are_enough(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write(variants=tuple(made_up_results.VARIANTS), half_width=0.09)
    found = facts()
    contrasts = [found.to_baseline(v.name, AS_TRAINED, found.primary) for v in found.others]
    assert {contrast.verdict for contrast in contrasts} == {"undecided", "worse"}
    open_ones = [contrast for contrast in contrasts if contrast.verdict == "undecided"]
    (head,), lines = (part for part in vars(decision(found).open_questions).values())
    assert head.startswith("Whether these lose anything against 16-bit LoRA this run cannot say")
    assert len(lines) == len(open_ones)
    for line, contrast in zip(lines, open_ones, strict=True):
        can = contrast.difference.detectable <= max(abs(contrast.difference.value), made_up_results.MARGIN)
        assert ("small enough by itself" in line) == can and ("more seed" in line or "alone" in line) != can
    (first, *_), variant = open_ones, found.others[contrasts.index(open_ones[0])]
    object.__setattr__(first.difference, "detectable", 0.015)
    assert "0.015, small enough by itself; it measured" in decision(found).open_questions.lines[0].striptags()
    assert open_question(found, variant, first).endswith(
        "would be enough, but neither a difference nor equivalence was shown."
    )


def test_memory_at_7b_is_that_of_the_planner(undecided):
    settings, name = undecided.params, "qlora_nf4_dq"
    planned = undecided.planned
    training = settings.training_of(name).model_copy(update={"gradient_checkpointing": True})
    sizes = memory.Shape(32, 4096, 11008, 4096, 4096, 32, 32000, tied=False)
    variant = settings.variants[name]
    peak = memory.predict(sizes, variant, training, tokens=training.max_length)
    assert planned.training[name] == pytest.approx(peak.total * memory.FRAGMENTS / memory.GIB)
    needs = planned_needs(undecided, name, MERGED_16BIT)
    assert needs.serving == pytest.approx(
        6_738_415_616 * 2 / 2**30
    )  # Llama-2-7B's parameters, from its model card
    assert planned_needs(undecided, name, AS_TRAINED).serving < needs.serving / 3


def test_a_verdict_that_the_correction_changed_says_so(undecided):
    contrast = next(c for c in undecided.compared.contrasts if c.verdict == "undecided")
    clear = replace(contrast.difference, value=0.05, low=0.01, high=0.09, p_value=0.02)
    changed = replace(contrast, difference=clear, p_adjusted=0.3, corrected_over=24)
    assert correction_sentence(changed) == (
        "Its interval excludes zero; with 24 tests together it is not decided."
    )
    assert correction_sentence(replace(changed, difference=replace(clear, low=-0.01))) is None
    assert correction_sentence(replace(changed, verdict="worse")) is None
    assert correction_sentence(replace(changed, p_accuracy=0.2)) is None  # another test alone decides it
