"""The section that says which speed-ups each variant had, and why not."""

import made_up_results
import pytest
import report_reader

from workflow.report.sections.speed_ups import reasons, section
from workflow.runtime.files import read_json, write_json
from workflow.runtime.paths import train_folder

VARIANTS = ("lora_16bit", "qlora_nf4_dq", "lora_int8", "full_16bit")
OUTLIERS = "packing, shared inputs and CUDA graphs: LLM.int8() looks for outliers in each pass as a whole"


@pytest.fixture
def on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made_up_results.write(variants=VARIANTS, device="cuda")
    made_up_results.write_hardware()


def test_each_variant_says_which_speed_ups_it_had_and_why_not(on_a_gpu):
    page = report_reader.read()
    head, *rows = page.tables["the speed-ups"]
    by_label = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    baseline = by_label["16-bit LoRA"]
    assert baseline["Why not"] == "" and baseline["CUDA graphs"] == "yes"
    assert by_label["8-bit LoRA"]["Packing"] == by_label["8-bit LoRA"]["CUDA graphs"] == "no"
    assert by_label["8-bit LoRA"]["Why not"] == OUTLIERS
    full = by_label["16-bit full fine-tuning"]["Why not"]
    assert "fused adapters: it has no adapter" in full
    assert (
        "8-bit LoRA trained without packing, shared inputs and CUDA graphs, which 16-bit LoRA had"
        in page.text
    )


def test_the_plain_loop_stands_beside_the_run_s_own_speed(on_a_gpu):
    facts = report_reader.facts()
    rows = {row.label: row for row in section(facts).rows}
    cost = facts.cost_of("lora_int8", "training_speed")
    assert rows["8-bit LoRA"].speed.value.value == cost.value
    assert rows["16-bit LoRA"].plain.value.value == 1000.0
    assert rows["8-bit LoRA"].plain is None  # hardware_points() has the plain loop of the baseline alone


def test_no_gpu_is_the_reason_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made_up_results.write(variants=VARIANTS)
    facts = report_reader.facts()
    assert reasons(facts, facts.baseline) == {"cuda_graphs": "needs a GPU"}
    assert "was not measured for this run" in report_reader.read().text


def test_a_speed_up_that_an_older_training_did_not_record_is_not_said_to_be_missing(on_a_gpu):
    for seed in (1, 2):
        file = train_folder("qlora_nf4_dq", seed) / "result.json"
        write_json(file, read_json(file) | {"speed_ups": {"packing": True}})
    rows = report_reader.read().tables["the speed-ups"]
    row = next(row for row in rows if "double-quantized" in row[0])
    assert row[1] == "yes" and row[6] == "not recorded" and row[7] == ""


def test_variants_without_a_speed_that_had_the_same_share_a_row(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ("lora_16bit", "qlora_nf4", "qlora_nf4_dq", "qlora_fp4", "full_16bit")
    made_up_results.write(variants=names, device="cuda", measured=())
    head, *rows = report_reader.read().tables["the speed-ups"]
    alike = "16-bit LoRA; 4-bit QLoRA (NF4); 4-bit QLoRA (NF4, double-quantized); 4-bit QLoRA (FP4)"
    assert [row[0] for row in rows] == [alike, "16-bit full fine-tuning"]
    assert head[-1] == "Why not" and {len(row) for row in rows} == {len(head)}
