"""What the page, the summary and the cards say of what is kept, of divergences and of forgetting."""

import io
import json
import re

import made_up_results
import pandas as pd
import pytest
from made_up_results import AFTER, BASELINE, BEFORE, BY_FORM, write
from report_reader import facts, read

from workflow.report import drawing
from workflow.report.cards import model_card
from workflow.report.summary import summary_markdown, summary_table
from workflow.runtime.paths import COMPARISON, divergence_folder

QLORA, LABEL = "qlora_nf4_dq", "4-bit QLoRA (NF4, double-quantized)"
GAIN = BEFORE[BASELINE] - AFTER[BASELINE]
PIQA = ("piqa", "acc", "share of items", True, -0.02)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(drawing, "matplotlib_svg", lambda *_, **__: "<svg></svg>")


def kept(form: str) -> float:
    return 100 * (BEFORE[BASELINE] - AFTER[QLORA] - BY_FORM.get(form, 0)) / GAIN


def without_measures() -> None:
    """Leave what a study has that was published before shares and divergences were measured."""
    content = json.loads(COMPARISON.read_text())
    del content["shares"], content["divergences"]
    COMPARISON.write_text(json.dumps(content))
    for variant in (BASELINE, QLORA):
        for seed in (1, 2):
            for path in divergence_folder(variant, seed).iterdir():
                path.unlink()


def test_the_share_of_the_gain_stands_beside_nats_and_the_verdict():
    comparison = write()
    table = read().tables["the evidence"]
    head = [cell.partition(" ↓")[0].partition(" ↑")[0] for cell in table[0]]
    rows = {row[0]: dict(zip(head, row, strict=True)) for row in table[1:]}
    first = rows["16-bit LoRA as trained, the baseline"]
    assert first["Share of the gain kept"] == "all, by definition" and first["Difference"] == "baseline"
    row = rows[f"{LABEL} as trained"]
    value = kept("as_trained")
    half = 100 * made_up_results.HALF_WIDTH / GAIN
    assert row["Share of the gain kept"] == f"{value:.1f} % {value - half:.1f} % to {value + half:.1f} %"
    assert row["Perplexity, times the baseline’s"] == "1.060"
    assert row["Difference"].startswith("+0.058 ") and row["Verdict"].startswith("worse, ")
    forms = len([s for s in comparison.shares if s.measure == "share_of_gain"])
    assert len(table) == 2 + forms


def test_numbers_of_the_section_name_their_place():
    comparison = write()
    page = read()
    values = page.numbers()
    places = {key.partition("#")[2] for key in values}
    for index, share in enumerate(comparison.shares):
        assert {f"shares[{index}].{name}" for name in ("value", "low", "high")} <= places
        assert values[f"{COMPARISON.as_posix()}#shares[{index}].value"] == share.value
    assert {f"divergences[{index}].value" for index in range(len(comparison.divergences))} <= places


def test_divergences_have_intervals_only_where_they_were_computed():
    write()
    page = read()
    table = page.tables["the divergences"]
    assert [row[0] for row in table[1:3]] == ["16-bit LoRA merged, 16-bit", f"{LABEL} as trained"]
    mean = 0.004 + (AFTER[QLORA] - AFTER[BASELINE]) / 2
    row = table[2]
    assert row[1] == f"{mean:.4f} {0.9 * mean:.4f} to {1.1 * mean:.4f}"
    assert re.fullmatch(r"0\.\d+", row[2]) and re.fullmatch(r"0\.\d+", row[3])
    assert re.fullmatch(r"9\d\.\d+ % 9\d\.\d+ % to 9\d\.\d+ %", row[4])
    assert "90 responses, 1,234 tokens" in page.text and "without an interval" in page.text


def test_without_a_clear_gain_the_page_states_no_share_and_the_reason(monkeypatch):
    monkeypatch.setattr(made_up_results, "BEFORE", dict(AFTER))
    write()
    page = read()
    assert "No share is stated: the gain is made up." in page.text
    assert "not stated" in page.tables["the evidence"][2]
    assert "not stated" in summary_markdown(facts())
    assert "it keeps" not in model_card(facts(), facts().variants[1], 1)


def test_what_was_forgotten_is_told_by_verdicts_against_the_untouched_base(monkeypatch):
    monkeypatch.setattr(made_up_results, "METRICS", (*made_up_results.METRICS, PIQA))
    monkeypatch.setattr(made_up_results, "TASKS", made_up_results.TASKS | {"piqa": None})
    comparison = write(tasks=("holdout_loss", "piqa"))
    page = read()
    table = page.tables["forgetting in piqa, accuracy (share of items)"]
    assert [row[0] for row in table[1:]] == ["16-bit LoRA as trained", f"{LABEL} as trained"]
    contrasts = [
        c for c in comparison.contrasts
        if (c.kind, c.form, c.task, c.subset) == ("to_base", "as_trained", "piqa", "all")
    ]  # fmt: skip
    for row, contrast in zip(table[1:], contrasts, strict=True):
        assert f" {contrast.verdict}, " in row[3] and row[1] and row[2]
    others = page.tables["forgetting of other forms in piqa, accuracy (share of items)"]
    assert len(others) == 1 + 1 + 3 and not any(row[0].endswith("as trained") for row in others)
    assert "scored no standard task" not in page.text


def test_a_run_without_a_standard_task_says_so_in_one_line():
    write()
    assert "This run scored no standard task, so it cannot tell what training forgot" in read().text


def test_a_study_from_before_these_measures_still_renders():
    write()
    without_measures()
    page = read()
    assert not {"the divergences", "the shares of scores"} & set(page.tables)
    assert not any("gain" in cell for cell in page.tables["the evidence"][0])
    assert ("section", {"id": "kept"}) not in page.tags and ("section", {"id": "quality"}) in page.tags
    assert "Gain kept" not in summary_markdown(facts())
    assert not summary_table(facts())["metric"].str.contains("share|kl").any()


def test_the_summary_and_the_cards_have_the_measures():
    comparison = write()
    found = facts()
    text = summary_markdown(found)
    assert "Gain kept (95 % interval)" in text.replace("\u00a0", " ")
    assert f"{kept('as_trained'):.1f} % (" in text.replace("\u00a0", " ")
    table = pd.read_csv(io.StringIO(summary_table(found).to_csv(index=False)))
    rows = table[(table["variant"] == QLORA) & (table["form"] == "as_trained")].set_index("metric")
    gain = rows.loc["nats_per_token:share_of_gain"]
    assert (
        gain["value"] == pytest.approx(kept("as_trained") / 100)
        and gain["low"] < gain["value"] < gain["high"]
    )
    mean = next(
        d for d in comparison.divergences if (d.variant, d.form, d.metric) == (QLORA, "as_trained", "kl_mean")
    )
    assert rows.loc["kl_mean", "value"] == pytest.approx(mean.value) and rows.loc["kl_mean", "items"] == 90
    assert set(table["label"]) == {"16-bit LoRA", LABEL} and table["device"].notna().all()
    card = model_card(found, found.variants[1], 1)
    assert f"it keeps {kept('as_trained'):.1f} % (95 % interval " in card


def test_scores_as_shares_of_the_baselines_stand_in_the_order_of_the_other_tables():
    comparison = write()
    table = read().tables["the shares of scores"]
    shares = [s for s in comparison.shares if s.measure == "share_of_score"]
    assert len(table) == 2 + len(shares) and table[1] == ["Written answers, stopped by themselves"]
    assert [row[0] for row in table[2:4]] == ["16-bit LoRA merged, 16-bit", f"{LABEL} as trained"]
    share = next(s for s in shares if (s.variant, s.form) == (QLORA, "as_trained"))
    assert table[3][1].startswith(f"{100 * share.value:.1f} % {100 * share.low:.1f} % to ")
