"""What keys are called on the page: every table of names is complete, and no key is left to a reader."""

import re
from typing import get_args

import made_up_results
import pytest
from made_up_results import VARIANTS, further_variants, write
from report_reader import Reader, facts

from workflow import params
from workflow.cost import hardware
from workflow.params.training import TrainingStep
from workflow.report import answers
from workflow.report.labels import compact_labels, variant_labels
from workflow.report.names import METRICS, OPTIMIZERS, SHAPES, SPEED_UPS
from workflow.report.page import render

DQ = "qlora_nf4_dq"
TUNED = {"qlora_nf4_dq_own_rate": DQ, "qlora_fp4_own_rate": "qlora_fp4", "qlora_nf4_dq_rank_64": DQ}
OWN = {name: {"rank": 64} if "rank" in name else {"learning_rate": 3e-3} for name in TUNED}
KEY = re.compile(r"\b[a-z0-9]+(?:_[a-z0-9]+)+\b")
REPAIRS = {"merging": {"faulty": f"{DQ}/requantized", "repaired": DQ}}


class Prose(Reader):
    """Reads what stands outside of code."""

    def handle_data(self, data):
        if not {"code", "pre"} & set(self.inside):
            super().handle_data(data)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_no_key_stands_on_the_page_outside_of_code():
    with further_variants(TUNED):
        write(variants=tuple(VARIANTS), training=OWN, repairs=REPAIRS, near_duplicates=2)
        made_up_results.write_hardware()
        page = Prose(render(facts()))
    assert (
        "ROUGE-L" in page.text and "TinyLlama-1.1B shape" in page.text and "without fused loss" in page.text
    )
    assert KEY.findall(page.text) == []
    said = [attributes.get(name) or "" for _, attributes in page.tags for name in ("aria-label", "title")]
    assert KEY.findall(" ".join(said)) == []


def test_every_shape_optimizer_metric_and_speed_up_has_a_name():
    assert {file.stem for file in params.SHAPES.glob("*.json")} == SHAPES.keys()
    assert set(get_args(TrainingStep.model_fields["optimizer"].annotation)) == OPTIMIZERS.keys()
    assert set(answers.METRICS) == METRICS.keys()
    assert set(hardware.SWITCHES) == SPEED_UPS.keys()
    for names in (SHAPES, OPTIMIZERS, METRICS, SPEED_UPS):
        assert len(set(names.values())) == len(names)


def test_a_variant_whose_name_adds_to_another_s_is_labeled_by_what_it_adds():
    with further_variants(TUNED):
        write(variants=tuple(VARIANTS), training=OWN)
        labels, compact = variant_labels(params.load()), compact_labels(params.load())
    assert labels["qlora_nf4_dq_own_rate"] == "4-bit QLoRA (NF4, double-quantized), own rate"
    assert labels["qlora_fp4_own_rate"] == "4-bit QLoRA (FP4), own rate"
    assert (compact[DQ], compact["qlora_nf4_dq_rank_64"]) == ("NF4 + DQ", "NF4 + DQ, rank 64")
    assert len(set(labels.values())) == len(set(compact.values())) == 9
