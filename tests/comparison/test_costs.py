"""Costs: intervals over processes, the claims (b) that rest on them, and those at named shapes."""

import json

import numpy as np
import pytest
from made_up_scores import PRECISION, VERSIONS, ask, write_results
from scipy import stats

from workflow import params
from workflow.comparison import compare, export
from workflow.comparison.claims import check_claims
from workflow.comparison.costs import compare_costs, mean_interval, ratio_interval
from workflow.comparison.model import Comparison
from workflow.comparison.records import BenchmarkRecord, GridRecord
from workflow.runtime.errors import UserError
from workflow.runtime.files import write_json
from workflow.runtime.paths import benchmark_file, grid_file

BASELINE, QUANTIZED = "lora_16bit", "qlora_nf4_dq"
GPU = PRECISION | {"device": "cuda", "device_name": "a GPU"}


ONCE = {BASELINE: ([3.0], [2.2]), QUANTIZED: ([2.0], [3.2])}  # GiB and seconds of each process
THRICE = {  # an interval on the seconds themselves would begin below zero
    BASELINE: ([3.0, 3.1, 2.9], [2.0, 2.1, 1.9]),
    QUANTIZED: ([2.0, 2.1, 1.9], [0.1, 9.0, 0.01]),
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> params.Params:
    return ask(tmp_path_factory.mktemp("params"))


def benchmarks(measured: dict, precision: dict = PRECISION) -> dict[str, BenchmarkRecord]:
    """The records of benchmarks whose processes measured these peaks in GiB and seconds per step."""
    return {variant: record(peaks, seconds, precision) for variant, (peaks, seconds) in measured.items()}


def record(peaks: list[float], seconds: list[float], precision: dict) -> BenchmarkRecord:
    def measurements(peak: float, time: float) -> list[dict]:
        about = {"higher_is_better": False, "definition": "made up", "low": None, "high": None}
        quartiles = {"low": 0.9 * time, "high": 1.1 * time} if len(seconds) == 1 else {}
        return [
            about | {"metric": "peak_memory", "value": peak, "unit": "GiB"},
            about | {"metric": "step_time", "value": time, "unit": "s"} | quartiles,
        ]

    return BenchmarkRecord.model_validate(
        {
            "precision": precision, "versions": VERSIONS, "micro_batch_rows": 4, "warmup_steps": 1, "steps": 5,
            "measurements": measurements(stats.gmean(peaks), stats.gmean(seconds)),
            "processes": [
                {"measurements": measurements(*values), "seconds_per_step": [values[1]] * 5}
                for values in zip(peaks, seconds, strict=True)
            ],
        }
    )  # fmt: skip


def claims(
    settings: params.Params, measured: dict, *, precision: dict = PRECISION, grids: dict | None = None
) -> list:
    """The claims (b), about memory and time, first those of the run's own rows."""
    records = benchmarks(measured, precision)
    cost = compare_costs(records, BASELINE, confidence=0.95)
    return [c for c in check_claims([], cost, records, grids or {}, settings) if c.claim == "b"]


def test_the_intervals_are_students_and_welchs_on_the_logarithms():
    ours, theirs = [1.0, 1.3, 1.1, 0.9, 1.05], [2.0, 2.6, 1.5]
    welch = stats.ttest_ind(np.log(ours), np.log(theirs), equal_var=False).confidence_interval(0.9)
    ratio = ratio_interval(ours, theirs, 0.9)
    assert (ratio.low, ratio.high) == pytest.approx((np.exp(welch.low), np.exp(welch.high)))
    student = stats.ttest_1samp(np.log(theirs), 0).confidence_interval(0.9)
    mean = mean_interval(theirs, 0.9)
    assert (mean.low, mean.high) == pytest.approx((np.exp(student.low), np.exp(student.high)))
    assert mean.low < stats.gmean(theirs) < mean.high


def test_two_processes_give_no_interval_and_equal_ones_give_one_without_width():
    assert mean_interval([1.0, 2.0], 0.95) is None
    assert ratio_interval([1.0, 2.0], [1.0, 2.0, 3.0], 0.95) is None
    ratio = ratio_interval([1.5] * 3, [2.0] * 3, 0.95)
    assert (ratio.low, ratio.high) == pytest.approx((0.75, 0.75))


@pytest.mark.parametrize(
    ("processes", "spreads"), [(3, (0.05, 0.05)), (5, (0.05, 0.05)), (3, (0.3, 0.02)), (5, (0.3, 0.02)), (5, (0.5, 0.5))]
)  # fmt: skip
def test_the_ratios_interval_covers_as_often_as_it_says(processes, spreads):
    """Lognormal noise between processes. Steps of one process, which share its noise, would cover far too rarely."""
    random, truth, times = np.random.default_rng(11), 0.7, 3000
    ours = truth * np.exp(random.normal(0, spreads[0], (times, processes)))
    theirs = np.exp(random.normal(0, spreads[1], (times, processes)))
    found = [ratio_interval(a, b, 0.95) for a, b in zip(ours, theirs, strict=True)]
    assert all(0 < interval.low <= interval.high for interval in found)
    covered = np.mean([interval.low <= truth <= interval.high for interval in found])
    assert 0.94 <= covered <= 0.97
    within = 0.02  # the spread of the steps around their process
    steps = [np.exp(random.normal(np.log(rows[:300, :1]), within, (300, 20))) for rows in (ours, theirs)]
    of_steps = [ratio_interval(a, b, 0.95) for a, b in zip(*steps, strict=True)]
    assert np.mean([interval.low <= truth <= interval.high for interval in of_steps]) < 0.4


@pytest.mark.parametrize(
    ("peaks", "holds"),
    [([2.0, 2.02, 1.98], "yes"), ([2.2, 2.3, 2.25], "undecided"), ([2.6, 2.61, 2.59], "no"), ([1.8, 3.0, 2.2], "undecided")],
)  # fmt: skip
@pytest.mark.parametrize("precision", [PRECISION, GPU])
def test_the_whole_interval_decides_whether_a_cost_is_far_less(settings, peaks, holds, precision):
    """Far less is 0.75 times or below, of a baseline of 3 GiB. On a GPU too, the processes decide and not the allocator."""
    measured = {BASELINE: ([3.0, 3.01, 2.99], [2.0] * 3), QUANTIZED: (peaks, [1.0] * 3)}
    memory, time = claims(settings, measured, precision=precision)
    interval = ratio_interval(peaks, [3.0, 3.01, 2.99], 0.95)
    assert (memory.holds, time.holds) == (holds, "yes")
    assert f"95% interval {interval.low:.3g} to {interval.high:.3g}" in memory.sentence
    assert "means over 3 processes each" in memory.sentence and "one process" not in memory.sentence
    assert memory.difference is None and memory.verdict is None


@pytest.mark.parametrize(("precision", "holds"), [(PRECISION, "measured twice"), (GPU, "yes")])
def test_two_processes_decide_nothing_but_a_peak_that_an_allocator_counted(settings, precision, holds):
    measured = {BASELINE: ([3.0, 3.0], [2.0, 2.1]), QUANTIZED: ([2.0, 2.0], [1.0, 1.1])}
    memory, time = claims(settings, measured, precision=precision)
    assert (memory.holds, time.holds) == (holds, "measured twice")
    assert "too few for an interval" in time.sentence and "95%" not in memory.sentence + time.sentence


@pytest.mark.parametrize("measured", [ONCE, THRICE])
def test_a_cost_has_quartiles_of_one_process_or_an_interval_over_several_and_never_both(measured):
    costs = compare_costs(benchmarks(measured), BASELINE, confidence=0.95)
    assert {cost.processes for cost in costs} == {len(measured[BASELINE][0])}
    for cost in costs:
        several = cost.processes > 1
        assert several == (cost.mean_low is not None)
        assert (several and cost.variant != BASELINE) == (cost.ratio_low is not None)
        assert (cost.low is not None) == (not several and cost.metric == "step_time")
        if several:
            assert 0 < cost.mean_low <= cost.value <= cost.mean_high


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_results(tmp_path)
    return tmp_path


def compared() -> Comparison:
    return compare.compare(params.load())[0]


def test_the_stage_compares_processes_and_its_table_has_their_mean_interval_and_number(folder):
    for variant, records in benchmarks(THRICE).items():
        write_json(benchmark_file(variant), records.model_dump())
    table = export.tables(compared())["summary"]
    rows = table[table["task"] == "benchmark"].set_index(["variant", "metric"])
    row = rows.loc[QUANTIZED, "peak_memory"]
    assert row["value"] == pytest.approx(stats.gmean([2.0, 2.1, 1.9])) and row["processes"] == 3
    assert row["low"] < row["value"] < row["high"] and row["confidence"] == 0.95
    assert row["ratio_low"] < row["ratio_to_baseline"] < row["ratio_high"]
    assert np.isnan(rows.loc[BASELINE, "peak_memory"]["ratio_low"])
    assert table[table["task"] != "benchmark"][["low", "processes", "ratio_low"]].isna().all(axis=None)


def test_a_damaged_benchmark_is_named(folder):
    result = json.loads(benchmark_file(QUANTIZED).read_text())
    result["measurements"][0]["value"] = 0.0
    write_json(benchmark_file(QUANTIZED), result)
    with pytest.raises(UserError, match="value: input should be greater than 0"):
        compared()


def point(
    rows: int, length: int, peak: float, seconds: float, *, recomputed: bool = False, **changes
) -> dict:
    return {
        "outcome": "measured", "micro_batch_rows": rows, "length": length, "gradient_checkpointing": recomputed,
        "vocabulary": None, "precision": GPU, "memory_gib": {"peak_allocated": peak, "peak_reserved": peak + 1},
        "step_seconds": {"median": seconds, "low": seconds, "high": seconds},
    } | changes  # fmt: skip


def missing(rows: int, length: int) -> dict:
    about = {"micro_batch_rows": rows, "length": length, "gradient_checkpointing": False}
    return about | {"outcome": "does not fit", "detail": "memory ran out", "requested_gib": 4.0}


def grids(ours: list[dict], theirs: list[dict]) -> dict:
    """By variant and shape, the records of grids with these points."""
    about = {"shape": "llama2_7b", "versions": VERSIONS}
    return {
        (variant, "llama2_7b"): GridRecord.model_validate(about | {"variant": variant, "points": points})
        for variant, points in ((QUANTIZED, ours), (BASELINE, theirs))
    }


def test_claims_about_costs_are_also_made_at_a_named_shape(settings):
    theirs = [point(1, 512, 15.0, 0.2), point(4, 512, 19.0, 0.5), point(4, 1024, 21.0, 1.0), missing(8, 1024)]
    ours = [point(4, 1024, 10.5, 1.2), point(1, 512, 5.0, 0.3), point(8, 1024, 14.0, 2.4)]
    for measured in (ONCE, THRICE):  # no interval is made of repeats in one process
        own_memory, _, memory, time = claims(settings, measured, grids=grids(ours, theirs))
        assert own_memory.text == "far less memory than 16-bit"
        assert memory.text == "far less memory than 16-bit, at llama2_7b"
        assert (memory.holds, time.holds) == ("yes", "measured once")
        assert memory.sentence.startswith(
            "At the shape llama2_7b with random weights, 4 rows of 1,024 tokens, on a GPU: qlora_nf4_dq took 0.50 times the "
            "peak memory of lora_16bit (10.5 against 21 GiB), measured in one process each: "
        )
        assert "1.20 times the time per optimizer step of lora_16bit (1.2 against 1 s)" in time.sentence
        assert memory.metric == "benchmark_grid/llama2_7b/peak_memory"


def test_the_largest_common_pass_counts_and_one_without_recomputation_before_one_with(settings):
    twice = [point(4, 1024, 20.0, 1.0), point(4, 1024, 10.0, 1.4, recomputed=True)]

    def sentence(ours: list[dict]) -> str:
        return claims(settings, ONCE, grids=grids(ours, twice))[2].sentence

    assert "1.00 times the peak memory of lora_16bit (20 against 20 GiB)" in sentence(twice[::-1])
    assert "4 rows of 1,024 tokens, with gradient checkpointing, on a GPU" in sentence(
        [twice[1], missing(4, 1024)]
    )


def test_nothing_is_claimed_at_a_shape_that_has_no_point_in_common(settings):
    assert len(claims(settings, ONCE, grids=grids([point(4, 1024, 10.5, 1.2)], [missing(4, 1024)]))) == 2


def test_the_stage_reads_the_grids_of_named_shapes_and_names_one_that_is_missing_or_from_elsewhere(folder):
    ask(folder, benchmark__grid__shapes=["own", "llama2_7b"])

    def write(points: list[dict]) -> None:
        for (variant, shape), grid in grids(points, [point(4, 1024, 21.0, 1.0)]).items():
            write_json(grid_file(variant, shape), grid.model_dump())

    with pytest.raises(UserError, match="llama2_7b.json"):
        compared()
    write([point(4, 1024, 10.5, 1.2, precision=GPU | {"device_name": "another GPU"})])
    with pytest.raises(
        UserError, match=r"at llama2_7b was measured with device cuda \(another GPU\)"
    ) as error:
        compared()
    assert f"benchmark_grid@{QUANTIZED}-llama2_7b" in str(error.value)
    write([point(4, 1024, 10.5, 1.2)])
    assert [c.holds for c in compared().claims if c.text.endswith("at llama2_7b")] == ["yes", "measured once"]


def test_a_variant_that_is_not_measured_has_no_cost_and_its_claims_are_not_tested(folder):
    ask(folder, benchmark__variants=[BASELINE], benchmark__grid__shapes=["own", "llama2_7b"])
    benchmark_file(QUANTIZED).unlink()
    write_json(
        grid_file(BASELINE, "llama2_7b"),
        grids([], [point(4, 1024, 21.0, 1.0)])[BASELINE, "llama2_7b"].model_dump(),
    )
    found = compared()
    assert {cost.variant for cost in found.cost} == {BASELINE}
    memory, time = (claim for claim in found.claims if claim.claim == "b")
    assert (memory.holds, time.holds) == ("not tested", "not tested")
    assert memory.sentence == (
        "Not tested: the peak memory of qlora_nf4_dq was not measured, as benchmark.variants leaves it out."
    )


def test_a_comparison_whose_costs_were_not_measured_has_quality_alone(folder):
    ask(folder, benchmark__variants=[])
    for variant in (BASELINE, QUANTIZED):
        benchmark_file(variant).unlink()
    found = compared()
    assert found.cost == [] and found.contrasts
    assert {claim.holds for claim in found.claims if claim.claim == "b"} == {"not tested"}
    table = export.tables(found)["summary"]
    assert len(table) and not (table["task"] == "benchmark").any()
    assert all(not any("peak_memory" in key for key in row) for row in export.headline(found).values())
