"""A variant is measured in one process, or in several that know nothing of each other; every one's numbers are kept."""

import json
import os
from dataclasses import replace

import pytest
from scipy import stats

from workflow.cost import repeated
from workflow.data.rows import as_rows
from workflow.runtime.errors import UserError
from workflow.runtime.files import write_jsonl

SAME = ("precision", "steps", "micro_batch_rows", "peak_pass_tokens", "epoch_longest_pass_tokens")


@pytest.fixture(scope="module")
def job(tiny, tiny_model, splits, tmp_path_factory) -> repeated.Job:
    rows = tmp_path_factory.mktemp("rows") / "train.jsonl"
    write_jsonl(rows, as_rows(splits["train"]))
    return repeated.Job("qlora_nf4_dq", tiny.model_dump(mode="json"), str(tiny_model), str(rows))


def values(result: dict) -> dict[str, float]:
    return {m["metric"]: m["value"] for m in result["measurements"]}


def test_every_process_measures_the_same_steps_and_has_its_own_numbers(job, tiny):
    alone = list(repeated.benchmark(job, count=1))
    several = list(repeated.benchmark(job, count=2))
    assert (len(alone), len(several)) == (1, 2)
    same = json.loads(json.dumps({key: alone[0][key] for key in SAME}))
    for result in several:
        assert {key: result[key] for key in SAME} == same
        assert values(result).keys() == values(alone[0]).keys()
        assert len(result["seconds_per_step"]) == tiny.benchmark.steps
        assert result["load"]["cores"] >= 1 and result["load"]["seconds"] > 0
    times = {tuple(result["seconds_per_step"]) for result in several}
    assert len(times) == 2
    found = repeated.combined(several)
    assert [process["seconds_per_step"] for process in found["processes"]] == [
        result["seconds_per_step"] for result in several
    ]
    for measured in found["measurements"]:
        each = [values(result)[measured["metric"]] for result in several]
        assert measured["value"] == pytest.approx(stats.gmean(each))
        assert (measured["low"], measured["high"]) == (
            None,
            None,
        )  # quartiles over one process' steps are not theirs
    assert found["steps"] == tiny.benchmark.steps and "process_seconds" not in found


def test_one_process_is_this_one_and_keeps_the_quartiles_over_its_steps(job, monkeypatch):
    measured = {"measurements": [{"metric": "step_time", "value": 2.0, "low": 1.0, "high": 3.0}], "load": {},
                "seconds_per_step": [2.0], "peak_gib_per_step": [1.0], "process": None}  # fmt: skip
    monkeypatch.setattr(repeated, "measure", lambda job: measured | {"process": os.getpid()})
    found = repeated.combined(list(repeated.benchmark(job, count=1)))
    assert found["process"] == os.getpid()
    assert found["measurements"] == measured["measurements"] == found["processes"][0]["measurements"]


def test_a_process_that_fails_is_named_with_its_reason(job):
    with pytest.raises(
        UserError, match=r"process 1 of 2 that measure qlora_nf4_dq (failed|died): .*/nowhere"
    ):
        list(repeated.benchmark(replace(job, model_folder="/nowhere"), count=2))
