"""The page says which learning rates were tried, which were chosen, and which differences are at one rate."""

import re
from itertools import pairwise

import pytest
from made_up_results import BASELINE, write, write_lock, write_rates
from report_reader import Reader, facts, read

from workflow.report.cards import model_card
from workflow.report.page import render
from workflow.report.sections.rates import rates_panel
from workflow.runtime.files import read_json, write_json

QLORA, FP4 = "qlora_nf4_dq", "qlora_fp4"
LABEL, FP4_LABEL = "4-bit QLoRA (NF4, double-quantized)", "4-bit QLoRA (FP4)"
LOSSES = {
    BASELINE: {3e-4: [2.31, 2.33], 1e-3: [2.24, 2.22], 3e-3: [2.29, 2.25]},
    QLORA: {3e-4: [2.41, 2.43], 1e-3: [2.34, 2.32], 3e-3: [2.29, 2.25]},
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(variants=(BASELINE, QLORA, FP4))
    return tmp_path


def test_where_nothing_is_tuned_the_page_has_no_such_section(folder):
    page = render(facts())
    assert "Learning rates" not in page and "the rates that were tried" not in Reader(page).tables


def test_each_run_has_its_rate_and_each_difference_its_kind(folder):
    write_rates(LOSSES, own=(QLORA,))
    page = read()
    rows = {row[0]: row[1:] for row in page.tables["the learning rates"][1:]}
    assert rows["16-bit LoRA"] == [
        "0.001",
        "the best of 3 for 16-bit LoRA (next: 0.003, +0.0400 nats)",
        "baseline",
    ]
    assert [rows[LABEL][0], rows[LABEL][2]] == ["0.003", "each at its own best"]
    assert [rows[FP4_LABEL][0], rows[FP4_LABEL][2]] == ["0.001", "the same rate"]
    assert (
        f"The differences to 16-bit LoRA are at the same rate for 4-bit QLoRA (FP4) and each at its own best rate for {LABEL}."
        in page.text
    )
    assert "which no compared run has" in page.text
    about = {row[0].split(" ")[-1]: row for row in page.tables["the variants"][1:]}
    place = page.tables["the variants"][0].index("Learning rate")
    assert about[QLORA][place] == "0.003" and about[FP4][place] == "0.001"


def test_a_rate_that_params_give_beside_tuned_ones_is_told_apart(folder):
    write_rates(LOSSES)
    text = (folder / "params.yaml").read_text()
    variant = re.search(r"  qlora_fp4:\n(    .*\n)+", text)[0]
    (folder / "params.yaml").write_text(
        text.replace(variant, variant.replace("training: {}", "training: {learning_rate: 0.005}"))
    )
    for file in (folder / "results/train/qlora_fp4").glob("*/result.json"):
        file.write_text(file.read_text().replace('"learning_rate": 0.001', '"learning_rate": 0.005'))
    rows = {row[0]: row[1:] for row in read().tables["the learning rates"][1:]}
    assert rows[FP4_LABEL] == ["0.005", "given by params", "another rate, which params give"]
    assert rows[LABEL][2] == "the same rate"


def test_a_choice_at_an_end_and_a_rate_that_diverged_are_said(folder):
    write_rates(LOSSES | {QLORA: {1e-3: [2.3, 2.4], 3e-3: [2.2, 2.3], 1e-2: [2.1, None]}}, own=(QLORA,))
    page = read()
    assert "is the highest rate" not in page.text
    diverged = next(row for row in page.tables["the rates that were tried"] if row[1] == "0.01")
    assert diverged[2:4] == ["diverged", "seed 11 2.100 and seed 12 diverged"]
    assert diverged[5] == "seed 12: the training loss is not finite"
    write_rates(LOSSES, own=(QLORA,))
    assert (
        "0.003 is the highest rate that was tried for qlora_nf4_dq: a higher one may be better."
        in read().text
    )


def test_the_points_of_the_figure_are_the_losses_of_the_files(folder):
    write_rates(LOSSES)
    panel = rates_panel(facts())
    choices = read_json(folder / "results/rates/choices.json")["choices"]
    alt = re.search('aria-label="([^"]*)"', panel.svg)[1]
    for choice in choices.values():
        for candidate in choice["candidates"]:
            losses = [run["validation_loss_kept"] for run in candidate["runs"]]
            mean = sum(losses) / len(losses)
            seeds = " and ".join(f"seed {s} {x:.3f}" for s, x in zip((11, 12), losses, strict=True))
            assert f"{mean:.3f} at {candidate['learning_rate']:g} ({seeds})" in alt
    # As drawn: the two lines through the means rise and fall as the means do, at the rates' logarithms.
    lines = [
        [tuple(map(float, point.split())) for point in re.findall(r"[ML] ?([\d.]+ [\d.]+)", path)]
        for path in re.findall(r'<path d="([^"]*)"[^>]*stroke-width: 1.4', panel.svg)
    ]
    lines = [line for line in lines if len(line) == 3]
    assert len(lines) == 2
    for variant, line in zip((BASELINE, QLORA), lines, strict=True):
        means = [sum(losses) / 2 for losses in LOSSES[variant].values()]
        drawn = [(y - line[0][1]) / (lines[1][0][1] - lines[0][0][1]) for _, y in line]
        apart = sum(LOSSES[QLORA][3e-4]) / 2 - sum(LOSSES[BASELINE][3e-4]) / 2
        assert drawn == pytest.approx([(mean - means[0]) / apart for mean in means], abs=0.02)
        widths = [b[0] - a[0] for a, b in pairwise(line)]
        assert widths[0] / widths[1] == pytest.approx(0.5229 / 0.4771, abs=0.02)  # log10 of 10/3 and of 3


def test_a_card_has_the_rate_of_its_run(folder):
    write_rates(LOSSES, own=(QLORA,))
    gathered = facts()
    variants = {variant.name: variant for variant in gathered.variants}
    assert "learning rate 0.003 (" in model_card(gathered, variants[QLORA], 1)
    assert "learning rate 0.001 (" in model_card(gathered, variants[BASELINE], 1)


def test_a_missing_record_of_the_choice_is_one_sentence(folder):
    write_rates(LOSSES)
    (folder / "results/rates/choices.json").unlink()
    with pytest.raises(Exception, match=r"results/rates/choices.json is missing"):
        facts()


def test_the_choice_is_held_against_the_lock_down_to_what_it_rests_on(folder):
    write_rates(LOSSES)
    for name in (BASELINE, QLORA, FP4):
        rate = {"variant": name, "learning_rate": 1e-3}
        write_json(folder / f"results/rates/variants/{name}.json", rate)
    write_lock()
    assert facts().lock.mismatches == []
    write_json(folder / "results/rates/variants" / f"{QLORA}.json", {"variant": QLORA, "learning_rate": 3e-3})
    said = " ".join(facts().lock.mismatches)
    assert "results/rates/variants is not what stage rates wrote" in said
    assert f"train@{QLORA}-1" in said and f"results/rates/variants/{QLORA}.json has changed since" in said
    tried = folder / "results/tune/lora_16bit_0/result.json"
    tried.write_text(tried.read_text().replace("2.31", "2.11"))
    assert "results/tune/lora_16bit_0/result.json is not what stage tune@lora_16bit_0 wrote" in " ".join(
        facts().lock.mismatches
    )
