"""docs/findings.md says what the published study found: its numbers are those of the results."""

import re
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

from workflow.runtime.files import read_json
from workflow.tools.changes import measure_changes
from workflow.tools.moved_studies import read_study

PUBLISHED = ROOT / "results/studies/reference_study"
NF4, DQ, RECIPE = "qlora_nf4", "qlora_nf4_dq", "seed_recipe"


@pytest.fixture(scope="module")
def said() -> str:
    return " ".join((ROOT / "docs/findings.md").read_text(encoding="utf-8").split())


@pytest.fixture(scope="module")
def contrasts() -> pd.DataFrame:
    return pd.read_csv(PUBLISHED / "compare/contrasts.csv")


def one(contrasts: pd.DataFrame, **wanted: str) -> pd.Series:
    """The one difference that has these values; in held-out loss where nothing else is said."""
    for key, value in ({"task": "holdout_loss", "metric": "nats_per_token"} | wanted).items():
        contrasts = contrasts[contrasts[key] == value]
    (found,) = contrasts.to_dict("records")
    return found


def quoted(found: dict, digits: int) -> str:
    value, low, high = (f"{found[key]:+.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


@pytest.mark.parametrize(
    ("kind", "variant", "form"),
    [
        ("to_baseline", NF4, "as_trained"),
        ("to_baseline", "qlora_fp4", "as_trained"),
        ("to_baseline", "lora_int8", "as_trained"),
        ("to_baseline", "full_16bit", "as_trained"),
        ("to_baseline", DQ, "merged_16bit"),
        ("to_baseline", DQ, "merged_dequantized"),
        ("to_baseline", DQ, "requantized"),
        ("to_baseline", RECIPE, "as_trained"),
        ("to_baseline", RECIPE, "requantized"),
        ("repair", RECIPE, "requantized"),
    ],
)
def test_a_difference_is_that_of_the_results(said, contrasts, kind, variant, form):
    assert quoted(one(contrasts, kind=kind, variant=variant, form=form), 3) in said


def test_what_a_merge_into_4_bits_leaves_of_the_training(said, contrasts):
    for variant in (DQ, RECIPE):
        found = one(contrasts, kind="to_base", variant=variant, form="requantized")
        assert f"({found['value']:+.4f}, {found['low']:+.4f} to {found['high']:+.4f})" in said
        assert found["verdict"] == "equivalent"


def test_what_4_bits_break_and_training_mends(said, contrasts):
    assert quoted(one(contrasts, kind="repair", name="no_double_quantization"), 4) in said
    recovered = one(contrasts, kind="recovery", variant=DQ)
    assert quoted(recovered, 3) in said
    for variant, called in ((DQ, "NF4 + double quantization"), (NF4, "NF4 alone")):
        broken = one(contrasts, kind="base_to_base", variant=variant)
        assert f"loses {broken['value']:+.3f} by {called}" in said
    assert 0.4 < -recovered["value"] / one(contrasts, kind="base_to_base", variant=DQ)["value"] < 0.6  # half


def test_what_the_verdict_on_full_fine_tuning_rests_on(said, contrasts):
    found = one(contrasts, kind="to_baseline", variant="full_16bit", form="as_trained")
    value, low, high = (f"{found[f'by_rows_{key}']:+.3f}" for key in ("value", "low", "high"))
    assert f"{value} ({low} to {high}), {found['verdict_by_rows']}" in said
    (rise,) = read_json(PUBLISHED / "compare/comparison.json")["rises"]
    step = f"best at step {rise['best_step']} of {rise['last_step']}, by {rise['last'] - rise['best']:.3f}"
    assert (
        rise["variant"] == "full_16bit"
        and f"{step}, and ahead of LoRA until step {rise['ahead_until']}" in said
    )


def test_claims_of_the_published_study():
    claims = read_json(PUBLISHED / "compare/comparison.json")["claims"]
    holds = {(c["text"], c["variant"], c["form"]): c["holds"] for c in claims}
    assert holds["better than before tuning", RECIPE, "as_trained"] == "mixed"
    for variant in (NF4, DQ, "qlora_fp4"):  # they run the same kernels
        assert holds["less memory than 16-bit", variant, "as_trained"] == "yes"
        assert holds["less compute than 16-bit", variant, "as_trained"] == "measured once"
    assert not any(c["difference"] for c in claims if c["claim"] == "b")


@pytest.mark.parametrize("variant", [NF4, DQ])
def test_piqa_in_points(said, contrasts, variant):
    found = one(contrasts, kind="to_baseline", variant=variant, form="as_trained", task="piqa", metric="acc")
    value, low, high = (f"{100 * found[key]:+.1f}" for key in ("value", "low", "high"))
    assert f"({low} to {high})" in said and value in said and found["verdict"] == "undecided"
    alone, corrected = (f"{found[key]:.2f}" for key in ("p_value", "p_adjusted"))
    assert (
        "without correction p is 0.03 and 0.015, with correction for the six variants 0.09 and 0.06" in said
    )
    assert (alone, corrected) == {DQ: ("0.03", "0.09"), NF4: ("0.01", "0.06")}[variant]


def test_the_7b_shape(said):
    at_7b = {}
    for variant in ("lora_16bit", NF4, DQ, "qlora_fp4", "lora_int8", RECIPE):
        (point,) = read_json(PUBLISHED / f"benchmark_grid/{variant}/llama2_7b.json")["points"]
        peak, speed = point["memory_gib"]["peak_allocated"], point["useful_tokens_per_second"]["median"]
        assert f"{peak:.1f} GiB and {speed:,.0f}" in said
        at_7b[variant] = peak, point["step_seconds"]["median"], speed
    double, single = (
        [f"{mine / theirs:.2f}" for mine, theirs in zip(at_7b[variant], at_7b["lora_16bit"], strict=True)]
        for variant in (DQ, NF4)
    )
    assert f"| {double[0]} (with double quantization), {single[0]} in the study;" in said
    assert f"| {double[1]} (with double quantization), {single[1]} in the study, each measured once;" in said
    more = f"{at_7b[DQ][0] - at_7b[RECIPE][0]:.1f} GiB and {1 - at_7b[DQ][2] / at_7b[RECIPE][2]:.0%}"
    assert f"There the repaired recipe costs {more.replace('%', ' %')} of the speed" in said
    (full,) = read_json(PUBLISHED / "benchmark_grid/full_16bit/llama2_7b.json")["points"]
    assert full["outcome"] == "does not fit"


def on_the_h100(**wanted: str | int) -> dict:
    """The one point that was measured on the published H100 and has these values."""
    points = read_json(ROOT / "results/hardware/nvidia_h100_80gb_hbm3.json")["points"]
    (found,) = (point for point in points if wanted.items() <= point.items())
    return found


def at_the_shape(
    shape: str, variant: str, *, rows: int = 4, checkpointing: bool = False
) -> tuple[float, float, float]:
    """Peak allocated in GiB, useful tokens/s and seconds a step, of rows of 1,024 tokens, four unless told."""
    found = on_the_h100(
        setting="grid",
        shape=shape,
        variant=variant,
        micro_batch_rows=rows,
        length=1024,
        gradient_checkpointing=checkpointing,
    )
    return (
        found["memory_gib"]["peak_allocated"],
        found["useful_tokens_per_second"]["median"],
        found["step_seconds"]["median"],
    )


def test_what_4_bits_save_at_three_shapes(said):
    shapes = {"llama2_7b": "7B", "llama2_13b": "13B", "llama3_8b": "8B"}
    table = (ROOT / "docs/speed.md").read_text(encoding="utf-8")
    for variant in ("lora_16bit", NF4, DQ, "qlora_fp4", "lora_int8"):
        cells = [f"{peak:.1f}, {speed:,.0f}" for peak, speed, _ in (at_the_shape(s, variant) for s in shapes)]
        assert f"`{variant}` | {' | '.join(cells)} |" in table
    for variant in ("lora_16bit", DQ):
        lean = (at_the_shape(s, variant, rows=1, checkpointing=True) for s in shapes)
        assert (
            f"`{variant}` | {' | '.join(f'{peak:.1f}, {speed:,.0f}' for peak, speed, _ in lean)} |" in table
        )
    ratios = {}
    for shape, name in shapes.items():
        ours, theirs = at_the_shape(shape, DQ), at_the_shape(shape, "lora_16bit")
        assert f"{ours[0]:.1f} GiB of {theirs[0]:.1f} and {ours[1]:,.0f}" in said
        assert re.search(rf"{ours[1]:,.0f}( tokens/s)? of {theirs[1]:,.0f}", said)
        ratios[name] = f"{ours[0] / theirs[0]:.2f}", f"{ours[2] / theirs[2]:.2f}"
    for place in (0, 1):
        seven, thirteen, eight = (ratios[name][place] for name in ("7B", "13B", "8B"))
        assert f"{seven} with graphs, {thirteen} at 13B, {eight} at 8B |" in said
    (recipe,) = read_json(PUBLISHED / f"benchmark_grid/{RECIPE}/llama2_7b.json")["points"]
    more = at_the_shape("llama2_7b", DQ)[0] - recipe["memory_gib"]["peak_allocated"]
    less = 1 - at_the_shape("llama2_7b", DQ)[1] / recipe["useful_tokens_per_second"]["median"]
    assert f"{more:.1f} GiB and {less:.0%}".replace("%", " %") in said


def test_the_recipe_beside_our_default():
    said = " ".join((ROOT / "docs/speed.md").read_text(encoding="utf-8").split())
    for setting, row, digits in (
        ("plain loop", "plain loop (transformers + PEFT, autocast)", 1),
        ("without cuda_graphs", "all but CUDA graphs", 1),
        ("every speed-up", "every speed-up that applies", 1),
        ("32 rows a step", "32 rows a step", 1),
        ("lean", "lean: checkpointing, one row a pass", 2),
    ):
        cells = []
        for variant in (RECIPE, DQ):
            found = on_the_h100(setting=setting, variant=variant, rows=693)
            speed, peak = found["useful_tokens_per_second_overall"], found["memory_gib"]["peak_allocated"]
            cells += [f"{speed:,.0f}", f"{peak:.{digits}f}"]
        assert f"| {row} | {' | '.join(cells)} |" in said


def test_everything_undecided_is_counted_and_named(said, contrasts):
    undecided = contrasts[contrasts["verdict"] == "undecided"]
    assert f"Of all {len(contrasts)} differences, {len(undecided)} did." in said
    family = contrasts[contrasts["in_family"]]
    assert f"None of the {len(family)} differences that decide" in said
    assert "undecided" not in set(family["verdict"])
    as_trained = undecided[(undecided["kind"] == "to_baseline") & (undecided["form"] == "as_trained")]
    everyone = set(contrasts[contrasts["kind"] == "to_baseline"]["variant"]) - {"lora_16bit"}
    rows = dict(re.findall(r"\| `(\w+/\w+)` \| ([^|]+) \|", said[said.index("## What came out undecided") :]))
    for (task, metric), found in as_trained.groupby(["task", "metric"]):
        cell = rows.pop(f"{task}/{metric}")
        named = set(re.findall(r"`(\w+)`", cell))
        assert set(found["variant"]) == (everyone - named if cell.startswith("all") else named)
    assert not rows


SECOND = ROOT / "results/studies/study"


@pytest.mark.parametrize(
    ("kind", "variant", "form", "subset"),
    [
        ("to_baseline", DQ, "as_trained", "all"),
        ("to_baseline", "qlora_nf4_dq_own_rate", "as_trained", "all"),
        ("to_baseline", DQ, "merged_16bit", "all"),
        ("to_baseline", DQ, "requantized", "all"),
        ("to_baseline", "qlora_nf4_dq_merge_aware", "requantized", "all"),
        ("to_baseline", "full_16bit", "as_trained", "all"),
        ("to_baseline", RECIPE, "as_trained", "all"),
        ("to_baseline", RECIPE, "requantized", "all"),
        ("to_baseline", "qlora_fp4", "as_trained", "all"),
        ("to_baseline", DQ, "as_trained", "category/closed_qa"),
        ("to_baseline", DQ, "as_trained", "category/summarization"),
        ("to_base", "lora_16bit_without_reading", "as_trained", "held_out"),
        ("to_base", "qlora_nf4_dq_without_reading", "as_trained", "held_out"),
        ("to_base", "lora_16bit_without_writing", "as_trained", "held_out"),
        ("to_base", "qlora_nf4_dq_without_writing", "as_trained", "held_out"),
    ],
)
def test_a_difference_of_the_second_study_is_that_of_its_results(said, kind, variant, form, subset):
    found = pd.read_csv(SECOND / "compare/contrasts.csv")
    assert quoted(one(found, kind=kind, variant=variant, form=form, subset=subset), 3) in said


def test_the_pairs_of_the_second_study(said):
    found = pd.read_csv(SECOND / "compare/contrasts.csv")
    loftq = one(found, kind="repair", name="without_loftq", subset="all")
    assert f"NF4 less LoftQ is {quoted(loftq, 3)}" in said and loftq["verdict"] == "equivalent"
    by_rows = {key: loftq[f"by_rows_{key}"] for key in ("value", "low", "high")}
    assert f"By rows LoftQ gains {quoted(by_rows, 3)}" in said and loftq["verdict_by_rows"] != "equivalent"
    rates = one(found, kind="repair", name="rate_of_16_bits", subset="all")
    turned = {"value": -rates["value"], "low": -rates["high"], "high": -rates["low"]}
    assert f"it differs by {quoted(turned, 4)}, equivalent" in said and rates["verdict"] == "equivalent"
    for variant, words in (
        ("dora_16bit", "DoRA less LoRA is"),
        ("lora_int8_wo", "8 bits are equivalent,"),
    ):
        plain = one(found, kind="to_baseline", variant=variant, form="as_trained", subset="all")
        assert f"{words} {quoted(plain, 4)}" in said and plain["verdict"] == "equivalent"
    full = one(found, kind="to_baseline", variant="full_16bit", form="as_trained", subset="all")
    assert (full["verdict"], full["verdict_by_rows"]) == ("equivalent", "undecided")
    itself = one(found, kind="control", subset="all")
    assert f"two seeds less two others, is {itself['value']:+.4f}" in said
    assert f"({itself['low']:+.3f} to {itself['high']:+.3f})" in said and itself["verdict"] == "undecided"


@pytest.mark.parametrize(
    ("variant", "verdict", "alone", "corrected"),
    [(DQ, "undecided", "0.06", "0.64"), ("qlora_fp4", "worse", "0.00", "0.02")],
)
def test_what_piqa_tells_in_the_second_study(said, variant, verdict, alone, corrected):
    found = pd.read_csv(SECOND / "compare/contrasts.csv")
    piqa = {"kind": "to_baseline", "form": "as_trained", "task": "piqa", "metric": "acc", "subset": "all"}
    difference = one(found, variant=variant, **piqa)
    value, low, high = (f"{100 * difference[key]:+.1f}" for key in ("value", "low", "high"))
    assert f"{value} points ({low} to {high})" in said
    assert difference["verdict"] == verdict
    assert [f"{difference[key]:.2f}" for key in ("p_value", "p_adjusted")] == [alone, corrected]


def test_where_the_answer_stands_in_the_context_4_bits_cost_less(said):
    """Hypothesis 3, computed from the items: both kinds of rows and the seeds are drawn again."""
    items = pd.read_parquet(SECOND / "compare/items.parquet").query(
        "task == 'holdout_loss' and metric == 'nats_per_token' and form == 'as_trained'"
    )
    losses = items[items["variant"].isin([DQ, "lora_16bit"])].pivot_table(
        index=["item", "group", "category", "denominator"], columns=["variant", "seed"], values="numerator"
    )
    rows = losses.index.to_frame(index=False)
    gaps = (losses[DQ] - losses["lora_16bit"]).to_numpy()
    tokens = rows["denominator"].to_numpy()
    reading = rows["category"].isin(["closed_qa", "summarization"]).to_numpy()
    groups = pd.factorize(rows["group"])[0]

    def difference(weights: np.ndarray, seeds: np.ndarray) -> float:
        nats, parts = weights * gaps[:, seeds].mean(1), (reading, ~reading)
        inside, outside = (nats[part].sum() / (weights * tokens)[part].sum() for part in parts)
        return inside - outside

    generator, count = np.random.default_rng(0), groups.max() + 1
    drawn = [
        difference(
            np.bincount(generator.integers(0, count, count), minlength=count)[groups],
            generator.integers(0, gaps.shape[1], gaps.shape[1]),
        )
        for _ in range(2000)
    ]
    low, high = np.quantile(drawn, [0.025, 0.975])
    value = difference(np.ones(len(rows)), np.arange(gaps.shape[1]))
    said_value, said_low, said_high = map(
        float,
        re.search(r"together less the six together: (-[\d.]+) \((-[\d.]+) to (-[\d.]+)\)", said).groups(),
    )
    assert value == pytest.approx(said_value, abs=0.0005)
    assert (low, high) == pytest.approx((said_low, said_high), abs=0.0015)


def test_how_many_answers_end_in_the_second_study(said):
    ended = (
        pd.read_csv(SECOND / "summary.csv").query("metric == 'ended'").set_index(["variant", "form"])["value"]
    )
    recipe, base, repaired = (
        100 * ended[cell] for cell in ((RECIPE, "as_trained"), (RECIPE, "base"), (DQ, "as_trained"))
    )
    assert f"It ends {recipe:.0f} of 100 answers by itself, where its untouched base ends {base:.0f}" in said
    assert f"NF4 trained without faults {repaired:.0f}." in said


def test_the_rates_of_the_second_study_were_chosen_within_what_was_tried():
    choices = read_json(SECOND / "rates/choices.json")["choices"]
    for choice in choices.values():
        mean = {
            candidate["learning_rate"]: sum(run["validation_loss_kept"] for run in candidate["runs"])
            for candidate in choice["candidates"]
        }
        assert choice["learning_rate"] == min(mean, key=mean.get)
        assert min(mean) < choice["learning_rate"] < max(mean)


def test_what_is_kept_of_the_gain_in_the_second_study(said):
    shares = pd.read_csv(SECOND / "compare/shares.csv").query(
        "measure == 'share_of_gain' and metric == 'nats_per_token' and subset == 'all'"
    )
    kept = {(row["variant"], row["form"]): row for row in shares.to_dict("records")}
    nf4 = kept[DQ, "as_trained"]
    value, low, high = (100 * nf4[key] for key in ("value", "low", "high"))
    assert f"It keeps {value:.0f} % ({low:.0f} to {high:.0f}) of what 16-bit LoRA gains" in said
    percent = {cell: f"{100 * row['value']:.0f} %" for cell, row in kept.items()}
    assert f"{percent['qlora_nf4_dq_merge_aware', 'requantized']} of LoRA's gain" in said
    eight_bits = percent["lora_int8_wo", "as_trained"], percent["lora_int8_wo", "requantized"]
    assert "they keep {} of the gain, and {} when merged and quantized again".format(*eight_bits) in said
    assert f"and keeps {percent['qlora_fp4', 'as_trained']}." in said


def test_how_sure_the_second_study_is(said):
    found = pd.read_csv(SECOND / "compare/contrasts.csv")
    gained, again = (
        one(found, kind="to_base", variant=DQ, form=form, subset="all")
        for form in ("as_trained", "requantized")
    )
    better = (
        f"is {-again['value']:.3f} better than the untouched 4-bit base, of {-gained['value']:.3f} that were"
    )
    assert better in said
    nf4 = one(found, kind="to_baseline", variant=DQ, form="as_trained", subset="all")
    by_rows = {key: nf4[f"by_rows_{key}"] for key in ("value", "low", "high")}
    assert f"By rows, NF4 is {quoted(by_rows, 3)}" in said
    assert f"The 2,000 rows weigh like {nf4['effective_groups']:.0f}." in said
    assert 0.15 < nf4["seed_share"] < 0.25  # a fifth
    answers = {"task": "holdout_generation", "metric": "ended", "subset": "all"}
    ended = one(found, kind="to_baseline", variant=DQ, form="as_trained", **answers)
    value, low, high = (100 * ended[key] for key in ("value", "low", "high"))
    assert f"of NF4's, {-value:.1f} points fewer end ({low:+.1f} to {high:+.1f})" in said
    family = found[found["in_family"]]
    undecided = family[family["verdict"] == "undecided"]
    assert f"Of the {len(family)} differences that decide, four are undecided" in said
    assert set(zip(undecided["variant"], undecided["form"], strict=True)) == {
        (f"lora_16bit_without_{kind}", form)
        for kind in ("reading", "writing")
        for form in ("as_trained", "merged_16bit")
    }


CURVES = ROOT / "results/studies/curves"


@pytest.mark.parametrize(
    "pair",
    [
        "at_the_center",
        "at_700_rows",
        "at_11200_rows",
        "at_rank_4",
        "at_rank_256",
        "at_1_epoch",
        "at_10_epochs",
    ],
)
def test_a_gap_of_the_curves_is_that_of_the_results(said, pair):
    found = pd.read_csv(CURVES / "compare/contrasts.csv")
    assert quoted(one(found, kind="repair", name=pair), 4) in said


def test_what_the_curves_compare_and_answer(said):
    """From the scores of every item."""
    ends = [("at_700_rows", "at_11200_rows"), ("at_rank_4", "at_rank_256"), ("at_1_epoch", "at_10_epochs")]
    rows, rank, epochs = measure_changes(read_study(CURVES), ends)
    assert f"from 700 rows: {quoted(asdict(rows.change), 3)} | **{rows.answer}**" in said
    assert f"from rank 4: {quoted(asdict(rank.change), 3)} | **{rank.answer}**" in said
    assert f"from 1 epoch: {quoted(asdict(epochs.change), 4)} | **{epochs.answer}**" in said
    assert f"take {-rows.change.value / rows.gaps[0].value:.0%} of it".replace("%", " %") in said
    losses = pd.read_csv(CURVES / "summary.csv").query("form == 'as_trained' and metric == 'nats_per_token'")
    losses = losses.set_index("variant")["value"]
    assert f"NF4 on 2,800 rows ({losses[DQ]:.3f}) does not reach 16 bits on 700" in said
    assert f"({losses['lora_700_rows']:.3f}), and NF4 on 11,200 ({losses['nf4_11200_rows']:.3f})" in said


def test_what_the_first_grid_and_the_depth_do(said):
    page = " ".join((ROOT / "docs/mechanism.md").read_text(encoding="utf-8").split())
    moved = pd.read_csv(ROOT / "results/mechanism/moved/gaps.csv")
    for row in moved.to_dict("records"):
        digits = 3 if row["variant"] == "qlora_fp4" or row["training"] == "before" else 4
        change = {key: row[f"change_{key}"] for key in ("value", "low", "high")}
        assert quoted(change, 4 if row["training"] == "after" else 3) in page
        if row["training"] == "after":
            assert row["answer"] == "not the grid"
            for base in ("unmoved", "moved"):
                gap = {key: row[f"{base}_{key}"] for key in ("value", "low", "high")}
                assert quoted(gap, digits) in page
            if row["variant"] in (DQ, "qlora_fp4"):
                assert quoted(change, 4) in said
    for row in pd.read_csv(ROOT / "results/mechanism/depths/gaps.csv").to_dict("records"):
        for moment in ("before", "after"):
            assert quoted({key: row[f"{moment}_{key}"] for key in ("value", "low", "high")}, 4) in page
        if row["layers"] < 30:
            change = {key: row[f"change_after_{key}"] for key in ("value", "low", "high")}
            assert f"| {quoted(change, 4)} | {row['answer']} |" in page
    assert quoted(change, 4) in said  # of the fewest layers
