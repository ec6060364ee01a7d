"""A run that lacks something: its page is whole, says the truth, and names what is missing."""

import made_up_results
import pytest
from made_up_results import BASELINE, write
from report_reader import Reader, facts

from workflow.report.cards import model_card
from workflow.report.page import render
from workflow.report.sections.limits import missing
from workflow.report.summary import summary_markdown, summary_table

QLORA = "qlora_nf4_dq"
USUAL = {
    "No faults before and after their repair: comparison.repairs is empty.",
    "No memory and speed over batch and length for any variant: the grid was not measured.",
    "No GPU: results/hardware holds no measurement of one, and no grid ran on one.",
    "Energy was not measured: on a CPU there is no counter that this pipeline reads.",
}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def missing_and_page() -> tuple[set[str], Reader]:
    """What is missing, by itself and as the page lists it; the page is drawn, and its summary and card are made."""
    found = facts()
    absent = {" ".join(one.split()) for one in missing(found)}
    page = Reader(render(found))
    assert all(one in page.text for one in absent)
    summary_markdown(found)
    summary_table(found)
    model_card(found, found.variants[-1], found.params.experiment.seeds[0])
    return absent, page


def test_a_usual_run_lacks_little():
    write()
    assert missing_and_page()[0] == USUAL


def test_one_seed():
    write(seeds=(7,))
    absent, page = missing_and_page()
    assert absent - USUAL == {
        "No variance over seeds, and no band in the curves: experiment.seeds names one seed."
    }
    assert "One seed was trained, so every verdict is about this one training." in page.text
    assert "with one seed there is no band" in page.text


def test_one_variant():
    write(variants=(BASELINE,))
    absent, page = missing_and_page()
    assert "No comparison: experiment.variants names one variant alone." in absent
    assert "One variant was run, 16-bit LoRA, so there is nothing to compare it with." in page.text
    assert "best" not in [a.get("class") for _, a in page.tags]
    assert not [
        a for tag, a in page.tags if tag == "a" and a.get("href") in ("#claims", "#decomposition", "#faults")
    ]


def test_no_categories():
    write(categories={}, held_out=())
    absent, page = missing_and_page()
    assert absent - USUAL == {"No categories: the test split names none, or a single one."}
    assert "#categories" not in [a.get("href") for _, a in page.tags]


def test_no_category_held_out():
    write(held_out=())
    absent, page = missing_and_page()
    assert absent - USUAL == {"No held-out categories: sample.held_out_categories is empty."}
    assert "No category was held out of training." in page.text and "◆" not in page.text


def test_no_written_answers():
    write(tasks=("holdout_loss",))
    made_up_results.COMPARE.joinpath("items.parquet").unlink()  # nothing of it is needed
    absent, page = missing_and_page()
    assert absent - USUAL == {"No written answers: holdout_generation is not among evaluation.tasks."}
    assert "No answers were written: holdout_generation is not among evaluation.tasks ." in page.text


def test_no_other_serving_form():
    write(forms=("as_trained",))
    _, page = missing_and_page()
    assert page.text.count("merged, 16-bit") == 0
    assert [row[0] for row in page.tables["the evidence"][1:]] == [
        "16-bit LoRA as trained, the baseline",
        "4-bit QLoRA (NF4, double-quantized) as trained",
    ]


def test_no_margin():
    write(margins={})
    _, page = missing_and_page()
    assert "equivalent" not in {row[-1] for row in page.tables["the evidence"]}
    assert "No margin is set, so nothing is called equivalent." in page.text
    assert "band: the margin" not in page.text


NOT_MEASURED = "not measured"


def test_some_variants_unmeasured():
    write(variants=tuple(made_up_results.VARIANTS), measured=(BASELINE, QLORA), device="cuda")
    absent, page = missing_and_page()
    others = "4-bit QLoRA (NF4), 4-bit QLoRA (FP4), 8-bit LoRA and 16-bit full fine-tuning"
    assert f"No peak memory and no training speed for {others}: it was not measured." in absent
    assert f"Memory and time of {others} were not measured." in page.text
    assert f"Without a row, as their memory was not measured: {others}." in page.text
    assert page.row("8-bit LoRA as trained")[-3:] == [NOT_MEASURED] * 3
    assert NOT_MEASURED not in page.row("4-bit QLoRA (NF4, double-quantized) as trained")
    head, *rows = page.tables["memory and time"]
    assert head[1] == "16-bit LoRA" and head[2] == "4-bit QLoRA (NF4)"
    assert all(row[2] == NOT_MEASURED and row[3] != NOT_MEASURED for row in rows)
    table = summary_table(facts())
    assert set(table[table["task"] == "benchmark"]["variant"]) == {BASELINE, QLORA}
    (row,) = (line for line in summary_markdown(facts()).splitlines() if line.startswith("| 8-bit LoRA") and "as trained" in line)  # fmt: skip
    assert row.count(NOT_MEASURED) == 3


@pytest.mark.parametrize("variants", [(BASELINE, QLORA), tuple(made_up_results.VARIANTS)])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_no_variant_measured(variants, device):
    write(variants=variants, measured=(), device=device)
    found = facts()
    _, page = missing_and_page()
    assert "Memory and time were not measured." in page.text
    assert "#cost" not in [a.get("href") for _, a in page.tags] and "memory and time" not in page.tables
    assert "peak memory" not in summary_markdown(found).lower()
    assert not (summary_table(found)["task"] == "benchmark").any()
    assert "What it cost" not in model_card(found, found.variants[-1], 1)
    assert "answer-figure" in [a.get("class") for _, a in page.tags]  # of quality alone


def test_benchmark_points_that_did_not_fit():
    write(device="cuda")
    made_up_results.write_hardware()
    absent, page = missing_and_page()
    assert "3 benchmark points could not be measured; the tables say why of each." in absent
    assert "Energy was not measured: the driver gave no reading." in absent
    assert "does not fit: another 1.25 GiB could not be allocated" in page.text
    assert not any(one.startswith("No GPU") for one in absent)


def test_a_device_on_which_nothing_fitted():
    write(device="cuda")
    lost = [
        made_up_results.missing("grid", name, "does not fit", "out of memory") for name in (BASELINE, QLORA)
    ]
    made_up_results.write_hardware(lost)
    absent, page = missing_and_page()
    assert "2 benchmark points could not be measured; the tables say why of each." in absent
    assert "Of 2 points, 2 could not be measured." in page.text


def test_energy_is_shown_where_the_runs_own_grid_measured_it():
    write(device="cuda")
    for variant, joules in ((BASELINE, 50.0), (QLORA, 75.0)):
        made_up_results.write_grid(
            variant, "own", [made_up_results.point("grid", variant, joules_per_1000_tokens=joules)]
        )
    absent, page = missing_and_page()
    assert not any("nergy" in one or "the grid was not measured" in one for one in absent)
    head, first, *_ = page.tables["the evidence"]
    assert head[-1].startswith("Energy, J per 1,000 tokens")
    assert first[-1] == "50.0"
    assert page.row("4-bit QLoRA (NF4, double-quantized) as trained", "2.262")[-1] == "75.0 1.50×"
    # 2 seeds: (10,432 + 10,433) tokens x (50 + 75) J / 1000 tokens = 2,608 J
    assert "are about 0.00072 kWh of the GPU alone" in page.text.replace("\N{NO-BREAK SPACE}", " ")


def test_random_weights_get_no_quality_figure():
    write(model="random")
    _, page = missing_and_page()
    assert "answer-figure" not in [a.get("class") for _, a in page.tags]
    assert "so its quality means nothing" in page.text


@pytest.mark.filterwarnings("error")
def test_variants_that_do_not_differ_at_all(monkeypatch):
    for table in ("BEFORE", "AFTER", "WEIGHTS_GIB"):
        monkeypatch.setattr(made_up_results, table, dict.fromkeys(made_up_results.VARIANTS, 2.0))
    monkeypatch.setattr(made_up_results, "BY_FORM", {})
    write(half_width=0.0, margins={}, seeds=(1,))
    _, page = missing_and_page()
    rows = page.tables["the evidence"][2:]
    assert len(rows) == 5 and all(
        row[2].startswith("0.000 0.000 to 0.000") and row[3].startswith("undecided") for row in rows
    )
    assert not any("best" in cell for row in page.tables["the evidence"] for cell in row)
