"""The page as it is drawn: its figures, its HTML as a whole, its bytes."""

import base64
import contextlib
import hashlib
import re
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from made_up_results import BY_FORM, write, write_hardware, write_lock
from report_reader import Reader, facts

from workflow.report.drawing import Panel
from workflow.report.model import Facts
from workflow.report.page import render
from workflow.report.sections.answer_figure import answer_figure
from workflow.report.sections.categories import category_panels
from workflow.report.sections.cost import cost_panels
from workflow.report.sections.decomposition import waterfall_panels
from workflow.report.sections.faults import repair_panel
from workflow.report.sections.hardware_figure import hardware_panels
from workflow.report.sections.quality import forest_panel, quality_blocks, quality_panels
from workflow.report.sections.training import curve_panels
from workflow.runtime.paths import CARDS, REPORT, SUMMARY, SUMMARY_TABLE

PROJECT = Path(__file__).resolve().parents[2]
LICENSE = "https://www.apache.org/licenses/LICENSE-2.0"
QLORA = "qlora_nf4_dq"
QLORA_LABEL = "4-bit QLoRA (NF4, double-quantized)"
REPAIRS = {"merging": {"faulty": f"{QLORA}/merged_16bit", "repaired": QLORA}}


@pytest.fixture(scope="module")
def usual(tmp_path_factory) -> Facts:
    """Two variants, two seeds, on a CPU, with a fault and its repair."""
    with contextlib.chdir(tmp_path_factory.mktemp("usual")):
        write(repairs=REPAIRS)
        write_lock()
        return facts()


@pytest.fixture(scope="module")
def page(usual) -> str:
    return render(usual)


def alt_of(panel: Panel) -> str:
    text = re.search('aria-label="([^"]*)"', panel.svg)[1]
    return text.replace("\N{NO-BREAK SPACE}", " ")


def test_figures_say_their_numbers_and_take_the_pages_colors(usual):
    panels = [
        *quality_panels(usual),
        *curve_panels(usual),
        *cost_panels(usual),
        *answer_figure(usual).panels,
        *filter(None, (forest_panel(usual, metric) for metric in usual.compared_metrics)),
        *waterfall_panels(usual),
        *category_panels(usual),
        repair_panel(usual),
    ]
    assert len(panels) == 16
    for panel in panels:
        assert not re.search(r"#[0-9a-f]{6}\b", panel.svg)  # no color that dark mode could not change
        assert 'role="img" aria-label="' in panel.svg
        assert "<text" in panel.svg
    alt = re.search('aria-label="([^"]*)"', panels[0].svg)[1]
    assert "4-bit QLoRA (NF4, double-quantized): from 3.222 to 2.262" in alt
    assert "seed 1 2.256 and seed 2 2.267" in alt
    alt = re.search('aria-label="([^"]*)"', panels[1].svg)[1]
    assert "A band marks the margin of equivalence, 0.02 either way." in alt
    assert f"{QLORA_LABEL}, as trained: +0.058, interval +0.040 to +0.077, worse." in alt
    assert "merged" not in alt  # the other forms are in the answer's figure


def test_the_waterfall_adds_up(usual):
    (panel,) = waterfall_panels(usual)
    values = [float(v.replace("−", "-")) for v in re.findall(r": ([+−]?\d\.\d+), interval", alt_of(panel))]
    base, change, left, *forms = values
    assert left == pytest.approx(base + change, abs=0.0015)
    assert forms == pytest.approx(
        [BY_FORM[form] for form in ("merged_16bit", "merged_dequantized", "requantized")], abs=0.0006
    )


def test_the_heat_maps_mark_what_was_held_out_and_what_was_not_tested(usual):
    training, against = (alt_of(panel) for panel in category_panels(usual))
    assert (
        f"poetry, held out of training: 16-bit LoRA −0.868 better and {QLORA_LABEL} −0.960 better."
        in training
    )
    assert "riddles: not tested." in training
    assert f"greetings: {QLORA_LABEL} +0.058 worse." in against
    assert "poetry ◆" in category_panels(usual)[0].svg


def test_a_fault_is_shown_before_and_after_its_repair(usual):
    alt = alt_of(repair_panel(usual))
    assert "Merging: from 2.272 with the fault to 2.262 without; the fault is undecided." in alt


def test_curves_have_a_band_over_the_seeds_and_with_one_seed_none(usual):
    several = loss_curve(usual)
    one = loss_curve(replace(usual, params=usual.params.model_copy(
        update={"experiment": usual.params.experiment.model_copy(update={"seeds": [1]})})))  # fmt: skip
    assert several.count("fill-opacity: 0.18") > one.count("fill-opacity: 0.18") == 0


def test_curves_go_over_the_tokens_seen(usual):
    baseline = usual.variants[0]
    tokens = sum(run.tokens_seen for run in baseline.trained) / len(baseline.trained)
    assert f"over the first {tokens:,.0f} tokens" in alt_of(curve_panels(usual)[0])


def test_a_metric_in_which_nothing_was_decided_is_told_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(half_width=9.0)
    undecided = facts()
    for metric in undecided.compared_metrics[1:]:
        assert forest_panel(undecided, metric) is None
    (block, *_) = quality_blocks(undecided)[1:]
    assert re.fullmatch(r"undecided, with intervals from −\d+\.\d to \+\d+\.\d", block.tally), block.tally
    assert {row.as_trained for row in block.rows} == {True} and block.omitted > 0


def loss_curve(found) -> str:
    return curve_panels(found)[0].svg


def test_names_in_a_figure_are_only_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(categories={"$x_{": 60, "<b>&": 74}, held_out=(), rows=())
    first, _ = category_panels(facts())
    assert "$x_{" in first.svg and "&lt;b&gt;&amp;" in first.svg
    assert "<b>" not in first.svg


def test_figures_of_a_device_say_their_numbers_and_take_the_pages_colors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write()
    write_hardware()
    (block,) = facts().hardware
    panels = hardware_panels(block, "hardware-0")
    alts = [re.search('aria-label="([^"]*)"', panel.svg)[1].replace("\u00a0", " ") for panel in panels]
    alts = [alts[-1], *alts[:-1]]
    assert "4 × 512 tokens, without checkpointing" in alts[0]
    assert "activations kept for the backward pass 10.5" in alts[0]
    assert "in all 15.0; measured peak 15.8 (−5.1 %)." in alts[0]
    assert f"{QLORA_LABEL}: predicted base weights 2.00" in alts[0]
    assert "16-bit LoRA, with checkpointing: 3,000 at 4 × 512." in alts[1]
    assert "16-bit LoRA, without checkpointing: 2,000 at 1 × 512 and 4,000 at 4 × 512." in alts[1]
    assert f"{QLORA_LABEL}, without checkpointing: 1,500 tokens/s in 8.00 GiB at 1 × 512" in alts[2]
    assert f"{QLORA_LABEL}, with checkpointing" not in alts[1] + alts[2]
    for panel in panels:
        assert not re.search(r"#[0-9a-f]{6}\b", panel.svg)


def test_the_page_is_sound_html(page):
    tags = Reader(page).tags
    ids = [a["id"] for _, a in tags if "id" in a]
    assert len(ids) == len(set(ids))
    within = {a["href"][1:] for _, a in tags if a.get("href", "").startswith("#")}
    assert within | set(re.findall(r"url\(#([^)]*)\)", page)) <= set(ids)
    levels = [int(tag[1]) for tag, _ in tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert all(a.get("scope") for tag, a in tags if tag == "th")
    assert dict(tags)["html"] == {"lang": "en"}
    assert page.count("<table") == page.count('<caption id="table-')
    assert len(page.encode()) < 5_000_000


def test_the_same_inputs_give_the_same_bytes_without_torch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(repairs=REPAIRS)
    write_hardware()  # whose shape is read from a configuration file
    environment = {"PYTHONPATH": str(PROJECT), "HOME": str(tmp_path), "MPLCONFIGDIR": str(tmp_path / "mpl")}
    code = "import sys; from workflow.stages.report import report; report(); sys.exit('torch' in sys.modules)"
    made = []
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        files = [REPORT, SUMMARY, SUMMARY_TABLE, *sorted(CARDS.rglob("*.md"))]
        made.append([path.read_bytes() for path in files])
    assert made[0] == made[1] and len(made[0]) == 7


def test_nothing_is_loaded_from_anywhere(page):
    tags = Reader(page).tags
    loading = {"src", "srcset", "data", "poster", "action", "formaction", "background"}
    assert not [(tag, attributes) for tag, attributes in tags if loading & set(attributes)]
    outside = [(tag, a["href"]) for tag, a in tags if not a.get("href", "#").startswith("#")]
    assert outside == [("a", LICENSE)]  # a link, which loads nothing unless it is followed
    assert all(reference.startswith("#") for reference in re.findall(r"url\(([^)]*)\)", page))
    assert "@import" not in page
    policy = next(a["content"] for tag, a in tags if tag == "meta" and "http-equiv" in a)
    digest = base64.b64encode(
        hashlib.sha256(re.search("<script>(.*?)</script>", page, re.S)[1].encode()).digest()
    )
    assert (
        policy
        == f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest.decode()}'"
    )
