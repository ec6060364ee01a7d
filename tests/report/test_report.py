"""The page: its numbers, its words, what it refuses, and how it behaves in a browser."""

import contextlib
import json
import random
import re
from dataclasses import replace
from pathlib import Path

import made_up_results
import pytest
from made_up_results import AFTER, BASELINE, BEFORE, HALF_WIDTH, MARGIN, PEAK_GIB, SPEED, Answered, write
from report_reader import Reader, facts, read, spaced

from workflow import params
from workflow.comparison.model import ALL, Comparison, Contrast, RowWeights
from workflow.comparison.sentences import OTHER_CATEGORIES
from workflow.report import drawing, formatting
from workflow.report.answers import marked
from workflow.report.cards import model_card
from workflow.report.facts import inputs
from workflow.report.formatting import clean
from workflow.report.labels import short_labels, variant_labels
from workflow.report.page import render
from workflow.report.planned import shape_of
from workflow.report.sections.answer import headline
from workflow.report.sections.hardware import prediction_sentence
from workflow.report.sections.limits import limits
from workflow.runtime.errors import UserError
from workflow.runtime.files import read_json, write_json
from workflow.runtime.paths import COMPARE, MODEL_SOURCE, PARAMS, benchmark_file, train_folder

PROJECT = Path(__file__).resolve().parents[2]
QLORA = "qlora_nf4_dq"
QLORA_LABEL = "4-bit QLoRA (NF4, double-quantized)"
PRIMARY = ("holdout_loss", "nats_per_token")
REPAIRS = {"merging": {"faulty": f"{QLORA}/merged_16bit", "repaired": QLORA}}
FORMS = {
    "as_trained": "as trained",
    "merged_16bit": "merged, 16-bit",
    "merged_dequantized": "merged, dequantized",
    "requantized": "merged, quantized again",
}
HOSTILE = '<script>alert("x")</script><img src=x onerror=alert(1)>\x00\u202e</style>'


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    """And without drawing, which takes most of a page's time and which test_report_figures.py looks at."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(drawing, "matplotlib_svg", lambda *_, **__: "<svg></svg>")


@pytest.fixture(scope="module")
def comparison(tmp_path_factory) -> Comparison:
    """What the usual run compared: two variants, two seeds, on a CPU."""
    with contextlib.chdir(tmp_path_factory.mktemp("usual")):
        return write()


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    """The usual run's page."""
    with contextlib.chdir(tmp_path_factory.mktemp("usual")):
        write(says={(f"{QLORA}/as_trained", 0): "The capital city of France is Paris, of course."},
              scores={(f"{QLORA}/as_trained", 0): 0.7})  # fmt: skip
        made_up_results.write_lock()
        return render(facts())


def edit_comparison(change) -> None:
    """Change results/compare/comparison.json in place."""
    path = COMPARE / "comparison.json"
    comparison = json.loads(path.read_text())
    change(comparison)
    path.write_text(json.dumps(comparison))


def shown(value: float, sign: str = "", decimals: int = 3) -> str:
    return f"{value:{sign}.{decimals}f}".replace("-", "−")


def of(comparison: Comparison, kind: str, variant: str = QLORA, subset: str = ALL) -> Contrast:
    """A contrast of a run as trained in the primary metric."""
    return next(
        c
        for c in comparison.contrasts
        if (c.kind, c.variant, c.form, c.task, c.metric, c.subset)
        == (kind, variant, "as_trained", *PRIMARY, subset)
    )


def cell(contrast: Contrast) -> str:
    """A difference as a cell shows it, written out by hand."""
    one = contrast.difference
    p = contrast.p_equivalence_adjusted if contrast.verdict == "equivalent" else contrast.p_adjusted
    tested = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
    return (
        f"{shown(one.value, '+')} {shown(one.low, '+')} to {shown(one.high, '+')} {contrast.verdict}, "
        f"{'adjusted ' if contrast.in_family else ''}{tested}"
    )


def test_quality_is_that_of_the_comparison(page, comparison):
    table = Reader(page).tables["Held-out loss, nats per token"]
    for variant, label in ((BASELINE, "16-bit LoRA"), (QLORA, QLORA_LABEL)):
        (row,) = [row for row in table if row[0] == f"{label} as trained"]
        score = next(s for s in comparison.scores if (s.variant, s.form) == (variant, "as_trained"))
        assert row[1:] == [
            shown(BEFORE[variant]),
            f"{shown(score.value)} {', '.join(shown(value) for value in score.per_seed.values())}",
            cell(of(comparison, "to_base", variant)),
            cell(of(comparison, "to_baseline")) if variant == QLORA else "baseline",
        ]


def test_every_difference_in_a_quality_table_has_the_comparisons_verdict():
    comparison = write(variants=tuple(made_up_results.VARIANTS))
    page, labels = read(), variant_labels(params.load())
    tables = {
        "nats_per_token": "Held-out loss, nats per token",
        "bits_per_byte": "Held-out loss, bits per byte",
        "ended": "Written answers, stopped by themselves (share of answers)",
    }
    columns = {"to_base": 3, "to_baseline": 4}
    found = []
    for contrast in comparison.contrasts:
        # The baseline's own other forms stand against it as it was trained.
        own_form = contrast.kind == "form" and contrast.variant == BASELINE
        if contrast.subset != ALL or not (own_form or contrast.kind in columns):
            continue
        label, form = labels[contrast.variant], FORMS[contrast.form]
        name = f"{label} {form}" if contrast.form == "as_trained" else f"{label}, {form}"
        (row,) = [row for row in page.tables[tables[contrast.metric]] if row[0] == name]
        shown_there = row[columns.get(contrast.kind, columns["to_baseline"])]
        assert re.search(rf" {contrast.verdict}, (adjusted )?p ", shown_there), (contrast, row)
        found.append(contrast.verdict)
    assert set(found) == {"equivalent", "worse", "better", "undecided"}
    rows = [row for name in tables.values() for row in page.tables[name]]
    assert len(found) == sum(" p " in text for row in rows for text in row[3:])


def test_a_metric_without_a_direction_has_values_alone(page):
    head, *rows = Reader(page).tables["Written answers, length (tokens)"]
    assert head[1:] == ["Untouched base", "Trained, mean and by seed (1 and 2)"]
    assert len(rows) == 6
    assert all(len(row) == 3 for row in rows)


def test_the_decomposition_is_that_of_the_comparison(page, comparison):
    rows = [row for row in Reader(page).tables["the decomposition"] if len(row) == 4][1:]
    parts = [p for p in comparison.decomposition if (p.task, p.metric) == PRIMARY]
    assert len(rows) == len(parts) == 6
    for row, part in zip(rows, parts, strict=True):
        assert row[0].startswith(part.part)
        assert row[1:3] == [shown(part.value, "+" if part.value >= 0.0005 else ""),
                            f"{shown(part.low, '+')} to {shown(part.high, '+')}"]  # fmt: skip
        assert row[3].startswith(f"{part.verdict}, ")
    assert rows[4][0] == "Serving it in another form merged, dequantized"


def in_words(sentence: str) -> str:
    """The sentence of a claim with the names of its arms as a reader knows them."""
    for key, words in (
        (f"{QLORA}/base", f"the untouched base of {QLORA_LABEL}"),
        (f"{QLORA}/as_trained", f"{QLORA_LABEL} as trained"),
        (f"{QLORA}/requantized", f"{QLORA_LABEL} merged and quantized again"),
        (f"{BASELINE}/as_trained", "16-bit LoRA as trained"),
    ):
        sentence = sentence.replace(key, words)
    return spaced(sentence)


def test_the_claims_are_those_of_the_comparison(page, comparison):
    rows = Reader(page).tables["the claims"][1:]
    claims = sorted(comparison.claims, key=lambda claim: claim.claim)
    assert rows == [
        [f"({c.claim}) {c.text}", c.holds, f"{QLORA_LABEL} {FORMS[c.form]}", in_words(c.sentence)]
        for c in claims
    ]
    assert [row[1] for row in rows] == ["yes", "yes", "no", "no", "yes", "yes"]


def test_repairs_are_shown_where_there_are_some():
    write()
    assert "faults" not in read().tables
    comparison = write(repairs=REPAIRS)
    page = read()
    rows = page.tables["the faults"][1:]
    assert rows[0] == [f"Merging {QLORA_LABEL}, merged, 16-bit, against {QLORA_LABEL}, as trained"]
    repairs = [c for c in comparison.contrasts if c.kind == "repair"]
    assert len(rows) == 1 + len(repairs) == 4
    for row, repair in zip(rows[1:], repairs, strict=True):
        assert row[5].startswith(f"{repair.verdict}, p ")
    assert rows[1][1:4] == [shown(AFTER[QLORA] + 0.0102), shown(AFTER[QLORA]), "+0.010"]


def test_categories_held_out_of_training_are_marked(page, comparison):
    _, *rows = Reader(page).tables["Table by category"]
    assert [row for row in rows if len(row) == 1] == [
        ["Held out of training, together 53 items"],
        ["The others, together 81 items"],
        ["poetry 53 items, held out of training"],
        ["greetings 80 items"],
        ["riddles 1 item"],
    ]
    assert [row[0] for row in rows[1:3]] == ["16-bit LoRA", QLORA_LABEL]
    assert rows[2][3] == cell(of(comparison, "to_base", QLORA, "held_out"))
    assert rows[-2][3] == rows[-1][3] == "not tested"


def test_without_held_out_categories_none_is_marked():
    write(held_out=())
    page = read()
    assert "held out of training" not in " ".join(row[0] for row in page.tables["Table by category"])
    bodies = {limit.head: limit.body for limit in limits(facts())}
    assert "claim (d), was not tested" in bodies["No category was held out of training"]
    assert [row[1] for row in page.tables["the claims"][-2:]] == ["not tested"] * 2


def test_costs_are_those_of_the_comparison_absolute_and_relative(page):
    page = Reader(page)
    memory = page.row("Peak memory")
    assert memory[0].startswith("Peak memory ↓ lower is better resident set of the whole process")
    assert memory[1:] == [f"{PEAK_GIB[BASELINE]:.2f} GiB", "1.87 GiB 0.84×"]
    speed = page.row("Training speed ↑ higher is better")
    assert speed[1:] == ["131 tokens/s 121 to 142", "101 tokens/s 93.1 to 109 0.77×"]
    assert round(SPEED[QLORA] / SPEED[BASELINE], 2) == 0.77


def test_costs_of_several_processes_have_intervals_and_are_nowhere_called_measured_once():
    comparison = write(processes=5)
    page = Reader(render(facts()))
    memory = page.row("Peak memory")
    assert memory[1:] == ["2.21 GiB 2.17 to 2.26", "1.87 GiB 1.83 to 1.91 0.84× (0.827 to 0.861)"]
    assert page.row("Training speed ↑ higher is better")[1] == "131 tokens/s 129 to 134"
    assert "(95 % interval 0.827 to 0.861; Python included: 1.87 GiB against 2.21 GiB)" in page.text
    assert "as the mean over 5 processes each." in page.text
    assert "95 % interval over processes" in page.text and "Memory was measured once" not in page.text
    assert "quartiles" not in page.text and "measured once in" not in page.text
    assert {cost.processes for cost in comparison.cost} == {5}
    assert "the interval over 5 processes each decides" in page.text


def test_two_processes_give_a_mean_without_an_interval():
    write(processes=2)
    page = Reader(render(facts()))
    assert page.row("Peak memory")[1:] == ["2.21 GiB", "1.87 GiB 0.84×"]
    assert page.row("Training speed ↑ higher is better")[1] == "131 tokens/s"
    assert "two processes have measured each, too few for an interval" in page.text
    assert "Memory was measured once" not in page.text


def test_the_answer_is_made_from_the_numbers(page, comparison):
    text = Reader(page).text
    one = of(comparison, "to_baseline").difference
    assert one.value == pytest.approx(AFTER[QLORA] - AFTER[BASELINE])
    assert f"{QLORA_LABEL} is worse than 16-bit LoRA by {one.value:.3f} nats per token" in text
    assert f"in held-out loss on 134 test items (95 % interval +{one.low:.3f} to +{one.high:.3f}; " in text
    assert f"the margin of equivalence is {MARGIN} nats per token)" in text
    assert "On one CPU, it held 0.84× the memory at its peak" in text
    assert (
        "trained at 0.77× the speed (101 tokens/s against 131 tokens/s), measured once in one process each."
        in text
    )
    assert (
        "overlap" not in text
        and "A peak is that over 6 steps: an epoch’s longest forward pass may be longer" in text
    )
    assert f"from {BEFORE[BASELINE]:.3f} to {AFTER[BASELINE]:.3f} nats per token" in text
    assert (
        "In other serving forms, against the same baseline, it is worse by 0.069 nats per token (merged, 16-bit), "
        "worse by 0.059 nats per token (merged, dequantized) and worse by 0.090 nats per token (merged, quantized "
        "again)."
    ) in text


def test_what_a_verdict_rests_on_stands_beside_it():
    write()
    path = Path("results/compare/comparison.json")
    content = read_json(path)
    caveat = "It rests on the last checkpoint (step 12): made up."
    for contrast in content["contrasts"]:
        if (contrast["kind"], contrast["form"], contrast["subset"]) == ("to_baseline", "as_trained", ALL):
            contrast["caveat"] = caveat
            contrast["by_rows"] = contrast["difference"] | {"value": 0.001, "low": -0.02, "high": 0.022}
            contrast["verdict_by_rows"] = "undecided"
    write_json(path, content)
    page = read()
    assert page.text.index(caveat) < page.text.index("The evidence in one table")  # in the answer
    for name in ("the evidence", "Held-out loss, nats per token"):
        (row,) = [
            row for row in page.tables[name] if row[0].startswith(QLORA_LABEL) and "as trained" in row[0]
        ]
        assert any("by rows +0.001 (−0.020 to +0.022), undecided" in cell for cell in row)
        assert any(("note 1" if name == "the evidence" else caveat) in cell for cell in row)
    notes = page.text.partition("The evidence in one table")[2].partition("What was compared")[0]
    assert notes.count(caveat) == 1


def test_a_benchmark_that_ran_the_longest_pass_says_so():
    write()
    for variant in (BASELINE, QLORA):
        content = read_json(benchmark_file(variant))
        write_json(
            benchmark_file(variant), content | {"peak_pass_tokens": 512, "epoch_longest_pass_tokens": 512}
        )
    made_up_results.write_hardware([
        made_up_results.point("every speed-up", BASELINE, peak_pass_tokens=1234, epoch_longest_pass_tokens=1234)
    ])  # fmt: skip
    text = read().text
    assert "A peak is that of an epoch’s longest forward pass (512 tokens), which each variant ran." in text
    assert "longest pass of an epoch, 1,234 tokens" in text and "peak over" not in text


@pytest.mark.parametrize(
    ("half_width", "margin", "verdict", "said"),
    [
        (HALF_WIDTH, MARGIN, "worse", f"{QLORA_LABEL} is worse than 16-bit LoRA by 0.058 nats per token in"),
        (0.09, MARGIN, "undecided", f"Whether {QLORA_LABEL} differs from 16-bit LoRA in held-out loss on 134 test items is"),
        (0.09, None, "undecided", f"Whether {QLORA_LABEL} differs from 16-bit LoRA in held-out loss on 134 test items is"),
        (HALF_WIDTH, 0.08, "equivalent",
         f"{QLORA_LABEL} is equivalent to 16-bit LoRA within the margin of 0.08 nats per token in held-out loss"),
    ],
)  # fmt: skip
def test_the_answer_begins_with_the_contrasts_verdict(half_width, margin, verdict, said):
    margins = {"/".join(PRIMARY): margin} if margin else {}
    contrast = of(write(half_width=half_width, margins=margins), "to_baseline")
    assert contrast.verdict == verdict
    sentence = spaced(Reader(headline(facts()).sentences[0]).text).replace(" ,", ",")
    assert sentence.startswith(said)
    one = contrast.equivalence if verdict == "equivalent" else contrast.difference
    ends = f"{shown(one.low, '+')} to {shown(one.high, '+')}"
    assert f"({'90' if verdict == 'equivalent' else '95'} % interval {ends}" in sentence
    assert ("margin" in sentence) == bool(margin)


def test_rounding_never_moves_an_end_over_what_it_is_held_against():
    assert formatting.separating_decimals((0.0199996, -0.001), (-0.02, 0.02), at_least=3) == 6
    assert formatting.separating_decimals((0.0004, 0.06), (0,), at_least=3) == 4
    assert formatting.separating_decimals((0.0, 0.06), (0,), at_least=3) == 3
    assert formatting.p_value(0.0499, level=0.05) == "=\N{NO-BREAK SPACE}0.0499"
    assert formatting.p_value(0.0499999999, level=0.05) == "=\N{NO-BREAK SPACE}0.0499999999"
    assert formatting.p_value(0.04999, level=0.05) == "=\N{NO-BREAK SPACE}0.04999"
    assert formatting.p_value(0.0004, level=0.05) == "<\N{NO-BREAK SPACE}0.001"


def test_several_variants_each_get_a_line():
    write(variants=tuple(made_up_results.VARIANTS), device="cuda")
    page = read()
    assert (
        "8-bit LoRA: equivalent, keeps 99.9 % of the gain (95 % interval 97.8 % to 102.1 %; perplexity 1.001×, +0.001 nats "
        "per token), 0.88× the peak memory" in page.text
    )
    assert "16-bit full fine-tuning: better, keeps 102.7 % of the gain" in page.text
    assert "(margin of equivalence 0.02 nats per token)" in page.text
    assert len(page.row("Peak memory")) == 1 + len(made_up_results.VARIANTS)


def test_storage_and_what_was_quantized_are_named(page):
    page = Reader(page)
    assert page.row("16-bit LoRA lora_16bit")[1:4] == ["float32 (rounded to 16 bits)", "float32", "0 of 210"]
    assert page.row(f"{QLORA_LABEL} {QLORA}")[1:6] == [
        "nf4 (4 bits), double-quantized", "float32", "210 of 210", "0.001", "4,884,480 (float32)",
    ]  # fmt: skip


def test_limits_on_a_cpu():
    write()
    bodies = {limit.head: limit.body for limit in limits(facts())}
    assert set(bodies) == {
        "2 seeds",
        "One draw of the training rows",
        "Trainings that diverge rarely would not be seen",
        "A small test set",
        "What this design can find",
        "Differences are not corrected for all of their number",
        "Not every item was scored",
        "A short training",
        "The base had been quantized before",
        "16-bit weights are stored as float32",
        "Memory is that of the whole process",
        "Time and memory are of this device",
    }
    assert "allow for the variance over seeds, but 2 trainings" in bodies["2 seeds"]
    assert "134 test items with 100 different instructions" in bodies["A small test set"]
    found = spaced(bodies["What this design can find"])
    assert "with a probability of 80 % from 0.026 nats per token" in found
    assert "margin of equivalence is 0.02 nats per token. That is less, so this design cannot be" in found
    assert "spans 4 differences: of variants to the baseline, in Held-out loss, nats per token" in spaced(
        bodies["Differences are not corrected for all of their number"]
    )
    assert "Written answers (90)" in bodies["Not every item was scored"]
    assert "192 of the 822 training rows" in bodies["A short training"]
    assert "GGUF Q4_1" in bodies["The base had been quantized before"]
    # 134,515,008 parameters x 2 bytes / 2**30
    assert "0.251 GiB" in spaced(bodies["16-bit weights are stored as float32"])
    assert "0.64× of that and not 0.32×" in bodies["16-bit weights are stored as float32"]
    assert "0.516 GiB" in spaced(bodies["Memory is that of the whole process"])


@pytest.mark.parametrize(
    ("near", "said"), [(0, "0 near-duplicates"), (1, "1 near-duplicate"), (3, "3 near-duplicates")]
)
def test_near_duplicates_are_counted_on_the_page(near, said):
    write(near_duplicates=near)
    bodies = {limit.head: limit.body for limit in limits(facts())}
    assert ("Some test rows resemble training rows" in bodies) == (near > 0)
    if near:
        body = bodies["Some test rows resemble training rows"]
        assert (
            body.startswith(f"{near} of {made_up_results.ITEMS} test rows have a near-duplicate")
            and "of 0.7 or more" in body
        )
    assert f"{made_up_results.ITEMS} to test ({said} of the others)" in " ".join(read().text.split())


@pytest.mark.parametrize("own_rows", [None, (700, 702)])
def test_the_page_says_whether_seeds_include_the_draw_of_the_rows(own_rows):
    write(own_rows=own_rows)
    bodies = {limit.head: limit.body for limit in limits(facts())}
    assert ("One draw of the training rows" in bodies) == (own_rows is None)
    assert ("The seeds’ draws share rows" in bodies) == (own_rows is not None)
    text = " ".join(read().text.split())
    included, left_out = (
        f"{seeds} training rows, so the interval {verb} the draw."
        for seeds, verb in (
            ("Each seed has its own", "includes"),
            ("All seeds have the same", "does not include"),
        )
    )
    assert (included in text, left_out in text) == (own_rows is not None, own_rows is None)
    rows = "700 to 702 rows to train on, drawn anew for each seed" if own_rows else "822 rows to train on"
    assert f"{rows}, 44 to validate" in text
    if own_rows:  # 702 of 5,000
        assert "two seeds share 14 % of theirs" in spaced(bodies["The seeds’ draws share rows"])


def test_one_seed_says_nothing_of_draws():
    write(seeds=(1,))
    assert "One draw of the training rows" not in {limit.head for limit in limits(facts())}
    assert "the draw." not in read().text


def test_a_margin_that_the_design_can_decide_is_no_limit():
    write(margins={"/".join(PRIMARY): 0.05})
    found = {limit.head: limit.body for limit in limits(facts())}["What this design can find"]
    assert "cannot be counted on" not in found
    write(margins={})
    found = {limit.head: limit.body for limit in limits(facts())}["What this design can find"]
    assert found.endswith("No margin is set for this metric, so nothing is called equivalent in it.")


def test_a_base_that_was_moved_off_its_grid_is_no_published_model():
    write()
    moved = {"cells": 0.25, "seed": 3, "tensors": 210, "weights": 106_168_320, "relative_size": 0.04122}
    write_json(MODEL_SOURCE, read_json(MODEL_SOURCE) | {"moved": moved})
    body = spaced({limit.head: limit.body for limit in limits(facts())}["The base was moved off its grid"])
    words = (
        "each of the 106,168,320 weights of 210 linear layers at random by up to 0.25 of its own block’s cell, seed 3, "
        "4.1 % of the weights’ size in all"
    )
    assert "come from a GGUF Q4_1 file" in body and words in body
    made_up_results.write_lock()
    assert f"Moved off its grid {words}" in Reader(render(facts())).text


def test_a_base_that_was_cut_and_healed_is_no_family_member_as_released():
    write()
    source = read_json(MODEL_SOURCE)
    cut = {"layers": 18, "of": 30, "dropped": list(range(9, 21))}
    healed = {"rows": 12_345, "steps": 772, "seed": 1}
    was_cut = "12 of 30 decoder layers (number 9 to 20, from 0) were dropped"
    was_healed = "all weights were trained on 12,345 rows that no split of the study uses (772 steps, seed 1)"
    for done, head, words in (
        ({"cut": cut, "healed": None}, "The base was cut", was_cut),
        ({"cut": None, "healed": healed}, "The base was healed", was_healed),
        ({"cut": cut, "healed": healed}, "The base was cut and healed", f"{was_cut}, and then {was_healed}"),
    ):
        write_json(MODEL_SOURCE, source | done)
        found = {limit.head: limit.body for limit in limits(facts())}
        assert f"It is not a family member as released: {words}." in found[head]
    made_up_results.write_lock()
    text = Reader(render(facts())).text
    assert f"Cut {was_cut}" in text and f"Healed {was_healed}" in text
    assert "The base was cut and healed." in model_card(facts(), facts().variants[0], 1)


def test_limits_of_unequal_rows_and_of_intervals_that_may_be_too_narrow():
    write(seeds=(1, 2, 3, 4, 5))
    plain = facts()
    heads = {"Some rows weigh far more than others", "Some intervals may be too narrow"}
    assert not heads & {limit.head for limit in limits(plain)}
    assert {limit.head: limit.body for limit in limits(plain)}[
        "Trainings that diverge rarely would not be seen"
    ] == (
        "Had one training in 8 diverged, half of all studies with 5 seeds would see none, and their intervals would leave it out."
    )
    weights = RowWeights("holdout_loss", "nats_per_token", 134, 31.7, 0.0723, 256, 3, 0.189)
    contrasts = [
        replace(c, warning="too narrow", difference=replace(c.difference, largest_share=0.374))
        if c.kind == "to_baseline"
        else c
        for c in plain.compared.contrasts
    ]
    compared = replace(plain.compared, row_weights=weights, contrasts=contrasts)
    bodies = {limit.head: spaced(limit.body) for limit in limits(replace(plain, compared=compared))}
    assert bodies["Some rows weigh far more than others"] == (
        "By tokens, the 134 test rows weigh like 32 of equal weight (Kish’s number), and the largest holds 7 % of the weight. 3 "
        "rows with a response of more than 256 tokens, where training cuts a row, hold 19 %. The differences by rows stand "
        "beside those by tokens."
    )
    assert "the largest makes: " in bodies["Some intervals may be too narrow"]
    assert "37 %" in bodies["Some intervals may be too narrow"]
    control = read().row("Control")
    assert "seeds 1 and 2 less seeds 3 and 4" in control[0] and "equivalent" in control[-1]


def test_limits_that_do_not_apply_on_a_gpu_are_left_out():
    write(device="cuda", seeds=(1, 2, 3, 4, 5))
    heads = {limit.head for limit in limits(facts())}
    assert not heads & {
        "16-bit weights are stored as float32",
        "Memory is that of the whole process",
        "5 seeds",
    }
    assert "Runs on a GPU do not repeat to the last digit" in heads
    page = read()
    assert page.row("Peak memory, reserved")[1:] == ["0.516 GiB", "0.516 GiB 1.00×"]
    assert "CPU" not in page.text


def test_a_variant_with_other_settings_is_not_said_to_differ_in_precision_alone():
    write(training={QLORA: {"learning_rate": 1e-4}})
    bodies = {limit.head: limit.body for limit in limits(facts())}
    body = bodies["4-bit QLoRA (NF4, double-quantized) differs in more than precision"]
    assert "learning rate (0.0001 instead of 0.001)" in body
    assert "begin with the same adapter" not in read().text


def test_variants_that_differ_alike_from_the_baseline_are_told_together():
    left_out = {"left_out_categories": ["poetry", "riddles"]}
    write(
        variants=tuple(made_up_results.VARIANTS),
        held_out=(),
        training={QLORA: left_out, "qlora_fp4": left_out, "lora_int8": {"learning_rate": 1e-4}},
    )
    bodies = {limit.head: limit.body for limit in limits(facts())}
    assert bodies["3 variants differ in more than precision"] == (
        f"From 16-bit LoRA, {QLORA_LABEL} and 4-bit QLoRA (FP4) differ also in left out categories (poetry and riddles instead "
        "of none); 8-bit LoRA in learning rate (0.0001 instead of 0.001). So no difference of theirs is due to precision alone."
    )


def test_that_two_arms_left_out_other_categories_is_said_once_in_the_answer_and_once_in_the_evidence():
    write(variants=tuple(made_up_results.VARIANTS))
    path = Path("results/compare/comparison.json")
    content = read_json(path)
    for contrast in content["contrasts"]:
        if contrast["kind"] == "to_baseline" and contrast["variant"] in (QLORA, "qlora_fp4"):
            contrast["caveat"] = f"{OTHER_CATEGORIES} It rests on the last checkpoint: {contrast['variant']}."
    write_json(path, content)
    page = read()
    assert page.text.count(OTHER_CATEGORIES) == 1
    said = f"Not trained on the same rows as 16-bit LoRA, as they leave out different categories: {QLORA_LABEL}; 4-bit QLoRA (FP4)."
    assert page.text.count(said) == 1
    rows = {row[0]: row[3] for row in page.tables["the evidence"]}
    assert rows[f"{QLORA_LABEL} as trained"].endswith("note 1 , note 2")
    assert rows["4-bit QLoRA (FP4), merged, 16-bit"].endswith("note 1 , note 3")


@pytest.mark.parametrize(("variants", "shown"), [(3, 8), (6, 5)])
def test_of_many_answers_to_a_row_the_first_are_seen_and_the_others_folded(variants, shown):
    write(variants=tuple(made_up_results.VARIANTS)[:variants])
    page = render(facts())
    article = page.partition("<article")[2].partition("</article>")[0]
    seen, _, folded = article.partition("answers</summary>")
    arms = 1 + len(facts().answers.arms)  # and the reference
    assert seen.count("<dt>") == min(shown, arms) and seen.count("<dt>") + folded.count("<dt>") == arms


def test_a_random_model_gets_no_verdict():
    write(model="random")
    answer = headline(facts())
    assert "random weights, so its quality means nothing" in answer.sentences[0]
    assert "On one CPU, 4-bit QLoRA (NF4, double-quantized) held" in answer.sentences[1]
    assert not any("worse" in said or "nats" in said for said in answer.sentences + answer.notes)
    assert "Random weights" in {limit.head for limit in limits(facts())}


def test_one_variant_has_nothing_to_be_compared_with():
    write(variants=(BASELINE,))
    page = read()
    assert "One variant was run, 16-bit LoRA, so there is nothing to compare it with." in page.text
    assert page.row("16-bit LoRA", "3.071")[-1] == "baseline"
    assert not {"the claims", "the decomposition", "the faults"} & set(page.tables)
    assert page.row("Peak memory")[1:] == ["2.21 GiB"]
    assert "×" not in page.text


def test_one_seed():
    write(seeds=(7,))
    page = read()
    assert "seed 7" in page.text
    assert "One seed The variance over seeds was not measured" in page.text
    assert page.row("16-bit LoRA", "3.071")[2] == "2.203"


def test_a_missing_metric_is_a_gap_and_not_a_failure():
    write()

    def forget(comparison):
        for part in ("scores", "contrasts"):
            comparison[part] = [
                row for row in comparison[part] if (row["variant"], row["metric"]) != (QLORA, PRIMARY[1])
            ]
        comparison["cost"] = [
            c for c in comparison["cost"] if (c["variant"], c["metric"]) != (QLORA, "peak_memory")
        ]

    edit_comparison(forget)
    page = read()
    assert page.row("Peak memory")[1:] == ["2.21 GiB", "not measured"]
    assert f"On one CPU, {QLORA_LABEL} trained at 0.77× the speed" in page.text


def test_no_answers_written():
    write(rows=())
    assert "No row was answered by every model." in read().text


def test_a_sample_is_drawn_by_the_seed_and_the_largest_disagreements_are_added():
    rows = tuple(Answered(f"Question {index}?", "Yes.", "No.") for index in range(40))
    far = {(f"{BASELINE}/as_trained", row): 0.9 - row / 100 for row in (0, 7, 39)}
    says = {(f"{QLORA}/as_trained", 12): "Another answer."}
    write(rows=rows, scores=far, says=says)
    answers = facts().answers
    drawn = random.Random(55).sample(range(40), 12)  # 55 is comparison.seed
    assert [row.id for row in answers.rows if row.sampled] == sorted(drawn)
    assert [row.id for row in answers.rows if row.disagreeing] == [0, 7, 12, 39]
    assert [row.id for row in answers.rows] == sorted({*drawn, 0, 7, 12, 39})
    text = read().text
    assert (
        "Of 40 rows that every model answered, 12 were drawn by the seed 55, whatever the answers; 4 have"
        in text
    )
    missing = next(number for number in range(40) if number not in {*drawn, 0, 7, 12, 39})
    assert f"Question {missing}?" not in text


def test_who_won_is_the_one_whose_score_is_highest(page):
    articles = [a for tag, a in Reader(page).tags if tag == "article"]
    assert [a["data-winner"] for a in articles] == [f"{QLORA}/as_trained", "tie", "tie"]
    assert [a["data-category"] for a in articles] == ["made up", "other", "made up"]
    assert "won by 4-bit QLoRA (NF4, double-quantized), seed 1" in Reader(page).text
    assert "stopped by itself; ROUGE-L 0.70" in Reader(page).text


def test_answers_stand_side_by_side_and_say_where_they_differ(page):
    text = Reader(page).text
    assert (
        text.count("The capital city of France is Paris.") == 1
    )  # of the baseline; that of the base is the same
    assert "The capital city of France is Paris, of course." in text
    assert "city of France is <mark>Paris, of course.</mark>" in page
    assert (
        text.count("word for word that of 16-bit LoRA") == 5
    )  # two rows of the quantized run and of its merged form
    assert text.count("cut at the limit") == 4
    assert text.count("448 characters") == 1  # the same words are not repeated
    assert "16-bit LoRA, seed 1 stopped by itself" in text
    assert "16-bit LoRA, seed 2 stopped by itself" not in text


def test_the_turns_before_a_question_stand_beside_it():
    write(rows=(Answered("And in Spain?", "Madrid.", "Madrid."),))
    earlier = [{"role": "user", "content": "Capital of France?"}, {"role": "assistant", "content": "Paris."}]
    for path in Path("results").rglob("answers.jsonl"):
        rows = [json.loads(line) | {"earlier": earlier} for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "user: Capital of France? assistant: Paris." in read().text


@pytest.mark.parametrize(
    ("before", "after", "pieces"),
    [
        ("the cat sat", "the cat sat", [("the cat sat", False)]),
        ("the cat sat", "the dog sat", [("the ", False), ("dog", True), (" sat", False)]),
        ("", "new", [("new", True)]),
        ("old", "", []),
    ],
)
def test_words_that_another_answer_lacks_are_marked(before, after, pieces):
    assert marked(before, after) == pieces


def test_text_from_models_and_data_is_only_text():
    write(rows=(Answered(HOSTILE, HOSTILE, HOSTILE),), title=f"What? {HOSTILE[:30]}")
    page = render(facts())
    reader = Reader(page)
    assert not {"img", "iframe", "object", "embed", "link", "base"} & {t for t, _ in reader.tags}
    assert [t for t, _ in reader.tags].count("script") == 2  # the page's own, and its data
    assert not [name for _, attributes in reader.tags for name in attributes if name.startswith("on")]
    assert 'alert("x")' in reader.text
    assert "\x00" not in page


def test_a_category_of_the_data_is_only_text():
    write(categories={HOSTILE: 80, "poetry": 54}, held_out=(HOSTILE,), rows=())
    page = render(facts())
    reader = Reader(page)
    tags = [tag for tag, _ in reader.tags]
    assert "img" not in tags and tags.count("script") == 2
    assert "\x00" not in page
    name = clean(HOSTILE)
    assert f"{name} 80 items, held out of training" in [row[0] for row in reader.tables["Table by category"]]


def test_characters_that_html_forbids_are_replaced():
    assert clean("a\x00b\x1bc\ud800d\r\ne\tf") == "a\ufffdb\ufffdc\ufffdd\ne\tf"


def test_every_figure_and_table_says_where_it_is_from(page):
    write()
    made_up_results.write_lock()
    page = Reader(page)
    for command in ("train", "compare", "evaluate_base evaluate", "fetch_model", "fetch_dataset"):
        assert f"Reproduced by dvc repro {command} ." in page.text
    for form in FORMS:
        assert f"--model_args pretrained=results/evaluate/qlora_nf4_dq/2/{form}," in page.text
    assert f"{QLORA_LABEL}, seed 2, merged, quantized again" in page.text
    assert "learning_rate: 0.001" in page.text
    digests = set(re.findall("[0-9a-f]{64} ([^ ]+)", page.text[page.text.index("sha256 of every file") :]))
    assert digests == {path.as_posix() for path in inputs(params.load())}


@pytest.mark.parametrize(
    "path",
    [
        "results/compare/comparison.json",
        "results/evaluate/qlora_nf4_dq/1/answers.jsonl",
        "results/train/lora_16bit/2/history.csv",
        "results/benchmark/qlora_nf4_dq/result.json",
        "results/compare/items.parquet",
        "requirements.lock",
    ],
)
def test_a_missing_file_is_named(path):
    write()
    Path(path).unlink()
    with pytest.raises(UserError, match=re.escape(path)):
        facts()


def test_a_comparison_of_other_runs_is_refused():
    write(seeds=(1, 2))
    kept = (COMPARE / "comparison.json").read_text()
    write(seeds=(1, 2, 3))
    (COMPARE / "comparison.json").write_text(kept)
    with pytest.raises(UserError, match="which is not what params"):
        facts()


def test_a_comparison_by_another_margin_is_refused():
    write(margins={"/".join(PRIMARY): 0.05})
    kept = (COMPARE / "comparison.json").read_text()
    write()
    (COMPARE / "comparison.json").write_text(kept)
    with pytest.raises(UserError, match="another primary metric, margin or confidence"):
        facts()


def test_without_measured_devices_there_is_no_section(page):
    assert 'id="hardware"' not in page
    assert 'href="#hardware"' not in page


def test_a_measured_device_shows_its_numbers():
    write()
    made_up_results.write_hardware()
    page = read()
    assert "What it costs on a GPU" in page.text
    assert "TinyLlama-1.1B shape on Made-up GPU 80GB" in page.text
    assert "a model of this shape with random weights" in page.text
    assert "weights: random; Python 3.12.9, torch 9.8.7." in page.text
    assert "Counted: 30 steps after 2 of warm-up." in page.text
    rows = page.tables["the settings, TinyLlama-1.1B shape on Made-up GPU 80GB"]
    fast = next(row for row in rows if row[0].startswith("every speed-up"))
    assert fast[0] == "every speed-up 4 rows a step, at most 512 tokens each"
    assert fast[1:] == [
        "6,543 5,889 to 7,197 6.54×", "6,674 6.54×", "20.0 GiB peak over 32 steps predicted 20.0 GiB 0.0 %", "21.0 GiB", "43.2 %",
        "77.0 J",
    ]  # fmt: skip
    assert [row[0] for row in rows][1:4] == [
        "16-bit LoRA",
        fast[0],
        "plain loop 4 rows a step, at most 512 tokens each",
    ]
    plain = rows[3]
    assert plain[1] == "1,000 900 to 1,100"
    assert plain[3] == "8.00 GiB peak over 32 steps"  # it has no prediction
    assert rows[5][1] == "5,000 4,500 to 5,500"  # its plain loop was not measured
    assert rows[5][-1] == "not measured"
    assert not ids_used_twice(page)
    more = made_up_results.point("more rows", BASELINE, tokens_per_second=8000.0, batch_rows=32)
    made_up_results.write_hardware([*made_up_results.hardware_points(), more])
    assert read().row("more rows")[1] == "8,000 7,200 to 8,800 8.00× (at 4)"


# 767 of the 989 TFLOP/s of the H100's data sheet.
@pytest.mark.parametrize(
    ("device", "compute", "share"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", "48.0 % (37.2 %)"),
        ("NVIDIA H100 80GB HBM3", "float32", "48.0 %"),
        ("NVIDIA H100 PCIe", "bfloat16", "48.0 %"),  # another card, which is not in the table
    ],
)
def test_the_share_of_the_data_sheets_rate_stands_beside_that_of_the_measured_one(device, compute, share):
    write()
    point = made_up_results.point(
        "every speed-up", BASELINE, model_flop_utilisation=0.48, matmul_tflops=767.0
    )
    point["precision"] |= {"device_name": device, "compute": compute}
    made_up_results.write_hardware([point], device=device)
    assert read().row("every speed-up")[5] == share


def test_settings_on_other_rows_stand_apart_and_are_compared_among_themselves():
    write()
    point, plain = made_up_results.point, {"loop": "plain", "predicted_gib": None}
    made_up_results.write_hardware(
        [
            point("every speed-up", BASELINE, tokens_per_second=6000.0, rows=991),
            point("plain loop", BASELINE, tokens_per_second=1000.0, rows=991, **plain),
            point("every speed-up", BASELINE, tokens_per_second=9000.0, rows=693),
            point("plain loop", BASELINE, tokens_per_second=2000.0, rows=693, **plain),
        ]
    )
    rows = read().tables["the settings, TinyLlama-1.1B shape on Made-up GPU 80GB"][1:]
    assert [row[0] for row in rows[::3]] == ["16-bit LoRA, on 991 rows", "16-bit LoRA, on 693 rows"]
    assert [row[1].rsplit(" ", 1)[-1] for row in (rows[1], rows[4])] == ["6.00×", "4.50×"]


def test_a_variant_without_predictions_leaves_the_others_their_memory_by_component():
    write()
    made_up_results.write_hardware(
        [*made_up_results.hardware_points(), made_up_results.point("grid", "lora_int8", predicted_gib=None)]
    )
    (block,) = facts().hardware
    assert [point.variant for point in block.shared] == [BASELINE, QLORA]


def ids_used_twice(page: Reader) -> list[str]:
    ids = [a["id"] for _, a in page.tags if "id" in a]
    return [name for name in set(ids) if ids.count(name) > 1]


def test_the_page_links_the_license_and_the_repository_that_pyproject_names():
    write()
    links = [a.get("href") for tag, a in read().tags if tag == "a"]
    assert "https://www.apache.org/licenses/LICENSE-2.0" in links
    assert not any("made-up" in link for link in links)
    project = '[project]\nname = "made-up"\n[project.urls]\nRepository = "{}made-up.example/code"\n'
    Path("pyproject.toml").write_text(project.format("https://"))
    page = read()
    assert "https://made-up.example/code" in [a.get("href") for tag, a in page.tags if tag == "a"]
    assert "url = {https://made-up.example/code}," in page.text
    Path("pyproject.toml").write_text(project.format("javascript:"))
    assert "made-up.example" not in read().text


def test_the_grid_of_another_device_is_in_its_file_alone():
    write()
    made_up_results.write_hardware()
    page = read()
    assert not any(name.startswith("the grid") for name in page.tables)
    assert (
        "6 points over rows and length are in results/hardware/made_up_gpu.json , and in no table here"
        in page.text
    )
    write(device="cuda")
    page = read()
    assert len(page.tables["the grid, TinyLlama-1.1B shape on Made-up GPU 80GB"]) == 9
    assert "in no table here" not in page.text


def test_a_point_that_was_not_measured_says_why():
    write(device="cuda")
    made_up_results.write_hardware()
    page = read()
    assert page.row("plain loop", "does not fit")[1] == (
        "does not fit: another 1.25 GiB could not be allocated"
    )
    assert page.row("without fused loss")[1] == "timed out: it was ended after 600 s"
    assert page.row("4 × 512, with checkpointing", "died")[1] == "died: killed by SIGKILL"
    assert "Of 11 points, 3 could not be measured." in page.text


def test_predictions_are_counted_against_the_measured_peaks():
    write()
    made_up_results.write_hardware()
    # 15.0 of 15.8 is 5.06 % too low and 7 of 8 is 12.5 %; the plain loop has no prediction.
    said = spaced(prediction_sentence(facts()))
    assert "at 7 points: 5 of them lie within 5 % of it." in said
    assert (
        "The largest deviation is −12.5 % (16-bit LoRA at the TinyLlama-1.1B shape, 1 × 512 tokens)." in said
    )
    made_up_results.write_hardware(
        [made_up_results.point("grid", BASELINE, **made_up_results.predicted(19, 20))]
    )
    assert "at 1 point: 1 of them lies within 5 % of it." in spaced(prediction_sentence(facts()))
    made_up_results.write_hardware([made_up_results.point("grid", BASELINE, predicted_gib=None)])
    assert prediction_sentence(facts()) is None


def test_what_fits_is_shown_by_size():
    from transformers import AutoConfig

    from workflow.cost import memory

    write()
    made_up_results.write_hardware()
    asked = params.load()
    for config in params.SHAPES.glob("*.json"):
        assert shape_of(config) == memory.Shape.of(AutoConfig.from_pretrained(config))
    shape = shape_of(params.SHAPES / "tinyllama_1b.json")
    training = asked.training.model_copy(update={"rank": 16, "gradient_checkpointing": True})
    most = memory.largest_fit(shape, asked.variants[QLORA], training, gib=memory.usable_gib(24))
    rows = read().tables["what fits"]
    assert rows[0] == ["Variant", "12 GB", "16 GB", "24 GB", "40 GB", "48 GB", "80 GB"]
    assert rows[1] == ["TinyLlama-1.1B shape"]
    assert len(rows) == 6
    assert rows[5][0] == f"{QLORA_LABEL} with checkpointing, rank 16"
    assert rows[5][3] == f"{most:,}"
    fit = facts().fits[0]
    fits = [replace(fit, tokens=dict.fromkeys(fit.tokens, 0))]
    assert '<td class="number muted">does not fit</td>' in render(replace(facts(), fits=fits))


def test_the_runs_own_grid_is_shown_too():
    write()
    point = made_up_results.point
    held = {"memory_gib": {"after_load": 1.0, "peak_resident": 3.21}, "joules_per_1000_tokens": None}
    held["precision"] = {"compute": "float32", "device": "cpu", "device_name": made_up_results.DEVICES["cpu"]}
    for variant in (BASELINE, QLORA):
        made_up_results.write_grid(variant, "own", [point("grid", variant, **held)])
    page = read()
    assert "What it costs over batch and length" in page.text
    assert "What it costs on a GPU" not in page.text
    assert "No GPU: results/hardware holds no measurement of one" in page.text
    assert "Made-Up-135M.Q4_1 on Made-up CPU, 2 threads" in page.text
    assert "trained the run’s own model" in page.text
    assert "3.21 GiB" in page.row("4 × 512")
    assert "Peak, resident" in page.text
    assert prediction_sentence(facts()) is None
    assert "results/benchmark_grid/lora_16bit/own.json" in page.text
    assert not ids_used_twice(page)


def test_a_variant_of_a_device_need_not_be_one_of_the_experiment():
    write(device="cuda")
    points = [made_up_results.point("grid", name) for name in (QLORA, "qlora_fp4", "of_another_project")]
    made_up_results.write_hardware(points)
    (block,) = facts().hardware
    assert [(v.label, v.position) for v in block.variants] == [
        (QLORA_LABEL, 1), ("of another project", 2), ("4-bit QLoRA (FP4)", 3),
    ]  # fmt: skip
    assert [fit.variant.name for fit in facts().fits] == [QLORA, QLORA, "qlora_fp4", "qlora_fp4"]
    assert "of another project" in read().text


def test_text_of_a_measured_device_is_only_text():
    write()
    points = [
        made_up_results.point(HOSTILE, HOSTILE, shape=HOSTILE),
        made_up_results.point("grid", HOSTILE, shape=HOSTILE),
        made_up_results.missing(HOSTILE, HOSTILE, "died", HOSTILE, shape=HOSTILE),
    ]
    made_up_results.write_hardware(points, device=HOSTILE)
    page = render(facts())
    tags = [tag for tag, _ in Reader(page).tags]
    assert "img" not in tags and tags.count("script") == 2
    assert "\x00" not in page
    assert "died: <script>" in Reader(page).text


def test_runs_that_params_do_not_name_are_not_read():
    write()
    left_over = train_folder("qlora_fp4", 1) / "result.json"
    left_over.parent.mkdir(parents=True)
    left_over.write_text("not JSON")
    assert "qlora_fp4/1" not in read().text


def test_labels_differ():
    write(variants=(BASELINE, QLORA))
    text = PARAMS.read_text().replace(
        "lora_int8:\n    method: lora\n    precision: int8",
        "lora_int8:\n    method: lora\n    precision: 16bit",
    )
    PARAMS.write_text(text.replace(f"- {QLORA}", "- lora_int8"))
    assert variant_labels(params.load()) == {
        "lora_16bit": "16-bit LoRA, lora 16bit",
        "lora_int8": "16-bit LoRA, lora int8",
    }


def test_of_two_variants_with_one_label_the_one_with_params_of_its_own_says_its_name():
    labels = variant_labels(params.preset("reference_study"))
    assert labels["qlora_nf4"] == "4-bit QLoRA (NF4)"
    assert labels["seed_recipe"] == "4-bit QLoRA (NF4), seed recipe"


def test_a_variant_is_named_by_what_sets_its_adapter_apart():
    asked = params.preset("tiny")
    own = {"initialization": "pissa", "rank_stabilized": True, "b_rate_factor": 16.0}
    variants = asked.variants | {"mine": asked.variants["dora_16bit"].model_copy(update={"training": own})}
    names = ["lora_16bit", "loftq_nf4_dq", "dora_16bit", "mine"]
    experiment = asked.experiment.model_copy(update={"variants": names})
    settings = asked.model_copy(update={"variants": variants, "experiment": experiment})
    assert list(variant_labels(settings).values()) == [
        "16-bit LoRA",
        "4-bit QLoRA (NF4, double-quantized), LoftQ",
        "16-bit DoRA",
        "16-bit DoRA, PiSSA, rank-stabilized, LoRA+ 16",
    ]


def test_the_page_says_which_adapters_begin_with_their_base():
    write(training={QLORA: {"initialization": "loftq"}})
    text = read().text
    assert "begin with the same adapter" not in text
    assert (
        "With LoftQ, an adapter begins with its base’s own weights (4-bit QLoRA (NF4, double-quantized), LoftQ)"
        in text
    )
    assert "it is the same for every seed, which sets the order of the rows and dropout alone." in text


def test_names_that_are_too_long_for_a_figure_become_letters_with_a_key():
    asked = params.preset("seed_recipe")
    assert list(short_labels(asked).values()) == list("ABCDEFGHI")
    write(variants=(BASELINE, QLORA, "qlora_fp4"))
    found = facts()
    assert [v.short for v in found.variants] == ["16-bit", "NF4 + DQ", "FP4"] and not found.lettered
    lettered = [replace(v, short=letter) for v, letter in zip(found.variants, "ABC", strict=True)]
    page = Reader(render(replace(found, variants=lettered)))
    assert page.text.count("B 4-bit QLoRA (NF4, double-quantized)") > 5
    assert page.row("B 4-bit QLoRA (NF4, double-quantized) as trained")


def test_many_variants_are_told_apart_by_their_markers():
    nine = [replace(facts_of_one(), position=position) for position in range(9)]
    assert len({(drawing.color_of(v), drawing.marker_of(v)) for v in nine}) == 9


def facts_of_one():
    write(variants=(BASELINE,))
    return facts().variants[0]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.000704, "0.000704"),
        (0.0994, "0.0994"),
        (1.8679, "1.87"),
        (131.4, "131"),
        (12345.6, "12,346"),
        (0, "0.00"),
    ],
)
def test_significant_digits(value, shown):
    assert formatting.significant(value) == shown


def test_signs_and_units():
    assert formatting.signed(-0.0312, 3) == "−0.031"
    assert formatting.signed(0.0312, 3) == "+0.031"
    assert formatting.signed(-0.0001, 3) == "0.000"
    assert formatting.ratio(0.786) == "0.79×"
    assert formatting.ratio(12.34) == "12.3×"
    assert formatting.percent(0.95) == "95\u00a0%"
    assert formatting.quantity(101.2, "tokens/s") == "101\u00a0tokens/s"
    assert formatting.decimals_of(0.021, 0.042) == 3
    assert formatting.decimals_of(0.5, 0.5) == 3
