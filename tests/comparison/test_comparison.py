"""The stage compare on made-up scores whose differences are known."""

import dataclasses
import io
import json
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import run_stage_in
from made_up_scores import CHOICE, ITEMS, LOSS, SEEDS, ask, counted, items_of, write_results, write_validation
from ruamel.yaml import YAML

from workflow import params
from workflow.comparison import compare, export
from workflow.comparison.contrasts import span_of
from workflow.comparison.model import Comparison, Contrast
from workflow.runtime.errors import CheckError, UserError
from workflow.runtime.files import write_json
from workflow.runtime.forms import OWN_FORMS
from workflow.runtime.paths import benchmark_file, evaluate_base_folder, evaluate_folder, train_folder


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_results(tmp_path)
    return tmp_path


@pytest.fixture
def compared(folder) -> Comparison:
    return compare.compare(params.load())[0]


def one(compared, kind, variant, form="as_trained", subset="all", metric=LOSS) -> Contrast:
    (found,) = (
        c
        for c in compared.contrasts
        if (c.kind, c.variant, c.form, c.subset, f"{c.task}/{c.metric}")
        == (kind, variant, form, subset, metric)
    )
    return found


def loss_of(variant: str, form: str, seed: int | None, chosen=slice(None)) -> float:
    frame = items_of(variant, form, seed)
    frame = frame[frame["task"] == "holdout_loss"][chosen]
    return frame["numerator"].sum() / frame["denominator"].sum()


def test_differences_are_those_of_the_means_over_seeds(compared):
    ours = np.mean([loss_of("qlora_nf4_dq", "as_trained", seed) for seed in SEEDS])
    theirs = np.mean([loss_of("lora_16bit", "as_trained", seed) for seed in SEEDS])
    base = loss_of("qlora_nf4_dq", "base", None)
    to_baseline, to_base = (one(compared, kind, "qlora_nf4_dq") for kind in ("to_baseline", "to_base"))
    assert to_baseline.difference.value == pytest.approx(ours - theirs, abs=1e-12)
    assert to_base.difference.value == pytest.approx(ours - base, abs=1e-12)
    assert (to_baseline.verdict, to_base.verdict) == ("worse", "better")
    assert to_baseline.difference.groups == ITEMS / 2 and to_baseline.difference.seeds == 3
    assert one(compared, "base_to_base", "qlora_nf4_dq", "base").difference.seeds is None


def test_verdicts_are_what_was_planted(compared):
    verdicts = {form: one(compared, "form", "qlora_nf4_dq", form).verdict for form in OWN_FORMS[1:]}
    assert verdicts == {"merged_16bit": "better", "merged_dequantized": "equivalent", "requantized": "worse"}
    assert one(compared, "form", "lora_16bit", "merged_16bit").verdict == "equivalent"
    assert one(compared, "to_baseline", "qlora_nf4_dq", "merged_16bit").verdict == "equivalent"
    (repair,) = (c for c in compared.contrasts if c.kind == "repair" and c.metric == "nats_per_token")
    assert (repair.name, repair.verdict) == ("merge", "worse")


def test_the_decomposition_adds_up(compared):
    parts = {
        p.kind: p.value for p in compared.decomposition if p.metric == "nats_per_token" and p.kind != "form"
    }
    assert parts["base_to_base"] == pytest.approx(0.3, abs=0.01)
    assert parts["base_to_base"] + parts["recovery"] == pytest.approx(parts["to_baseline"], abs=1e-12)
    assert {p.variant for p in compared.decomposition} == {"qlora_nf4_dq"}


def test_the_family_is_corrected_together_and_every_other_difference_with_those_of_its_kind(compared):
    family = [c for c in compared.contrasts if c.in_family]
    assert len(family) == 4 + 1 + 3  # forms against the baseline; merges of either variant against as trained
    assert {(c.kind, c.metric, c.subset) for c in family} == {
        ("to_baseline", "nats_per_token", "all"),
        ("form", "nats_per_token", "all"),
    }
    raw = sorted(max(c.difference.p_value, c.p_accuracy or 0) for c in family)
    adjusted = sorted(c.p_adjusted for c in family)
    by_hand = np.minimum(np.maximum.accumulate(np.array(raw) * np.arange(len(raw), 0, -1)), 1)
    assert adjusted == pytest.approx(by_hand.tolist())
    assert all(c.corrected_over == len(family) for c in family)
    to_base = [one(compared, "to_base", v, metric=CHOICE) for v in ("lora_16bit", "qlora_nf4_dq")]
    raw = sorted(max(c.difference.p_value, c.p_accuracy) for c in to_base)
    assert sorted(c.p_adjusted for c in to_base) == pytest.approx(
        [min(1, 2 * raw[0]), max(min(1, 2 * raw[0]), raw[1])]
    )
    assert all(
        ("adjusted p" in c.sentence) == (c.corrected_over > 1)
        for c in compared.contrasts
        if c.verdict != "equivalent"
    )


def test_one_of_many_tests_is_no_finding_by_its_own_p_value(folder):
    """Two variants differ from the base in accuracy by p values between a half of the level and the level."""
    for variant, seed in ((v, s) for v in ("lora_16bit", "qlora_nf4_dq") for s in SEEDS):
        before = np.arange(ITEMS) >= ITEMS / 2
        after = before.copy()
        after[0:28:2], after[ITEMS - 8 :: 2] = True, False  # 14 groups gain an answer and 4 lose one
        for folder_of_run, form, right in (
            (evaluate_base_folder(variant), "base", before),
            (evaluate_folder(variant, seed), "as_trained", after),
        ):
            frame = pd.read_parquet(folder_of_run / "items.parquet")
            frame.loc[(frame["metric"] == "acc") & (frame["form"] == form), "numerator"] = right.astype(float)
            frame.to_parquet(folder_of_run / "items.parquet")
    compared, _ = compare.compare(params.load())
    gains = [one(compared, "to_base", v, metric=CHOICE) for v in ("lora_16bit", "qlora_nf4_dq")]
    for gain in gains:
        alone = max(gain.difference.p_value, gain.p_accuracy)
        assert 0.025 < alone < 0.05 <= gain.p_adjusted and gain.verdict == "undecided"
        assert "is not decided" in gain.sentence and "adjusted p" in gain.sentence


def test_accuracies_must_pass_the_paired_test_too(compared):
    choice = one(compared, "to_baseline", "qlora_nf4_dq", metric=CHOICE)
    assert choice.p_accuracy is not None
    assert choice.p_adjusted == max(choice.p_accuracy, choice.difference.p_value)
    assert one(compared, "to_baseline", "qlora_nf4_dq").p_accuracy is None


@pytest.mark.parametrize(
    ("scores", "denominators", "metric", "span"),
    [
        ([0.0, 1.0, 1.0], [1, 1, 1], "acc", 1.0),
        ([1.0, 1.0, 1.0], [1, 1, 1], "acc", 1.0),  # all right, and yet one could have been wrong
        ([2.0, 0.0, 1.0], [3, 1, 1], "inst_level", 1.0),
        ([0.1, 0.3, 0.2], [1, 1, 1], "rouge_l", 1.0),
        ([0.1, 0.3, 0.2], [1, 1, 1], "of_some_task", 0.2),
        ([3.2, 8.1, 0.4], [2, 5, 1], "nats_per_token", None),
    ],
)
def test_how_far_apart_the_scores_of_an_item_can_be(scores, denominators, metric, span):
    found = span_of(np.array([scores]), np.array(denominators), metric)
    assert found == (span and pytest.approx(span))


def test_equal_answers_on_few_items_are_not_called_equivalent(folder):
    for path in folder.rglob("items.parquet"):
        frame = pd.read_parquet(path)
        frame.loc[frame["metric"] == "acc", "numerator"] = 1.0
        frame.to_parquet(path)
    choice = one(compare.compare(params.load())[0], "to_baseline", "qlora_nf4_dq", metric=CHOICE)
    assert choice.difference.value == 0 and choice.verdict == "undecided"


def test_categories_and_those_held_out(compared):
    far = np.arange(ITEMS) % 4 == 0
    ours = np.mean([loss_of("qlora_nf4_dq", "as_trained", seed, far) for seed in SEEDS])
    base = loss_of("qlora_nf4_dq", "base", None, far)
    held_out = one(compared, "to_base", "qlora_nf4_dq", subset="held_out")
    assert held_out.difference.value == pytest.approx(ours - base, abs=1e-12)
    assert held_out.difference == one(compared, "to_base", "qlora_nf4_dq", subset="category/far").difference
    scores = [
        s for s in compared.scores if (s.variant, s.form, s.metric) == ("lora_16bit", "as_trained", "acc")
    ]
    assert {s.subset: s.items for s in scores} == {
        "all": 120, "held_out": 30, "seen": 90, "category/far": 30, "category/near": 90,
    }  # fmt: skip


def test_the_claims_are_checked(compared):
    assert [(c.claim, c.text, c.form, c.holds) for c in compared.claims] == [
        ("a", "better than before tuning", "as_trained", "in part"),
        ("a", "better than before tuning", "requantized", "in part"),
        ("b", "far less memory than 16-bit", "as_trained", "measured once"),
        ("b", "far less compute than 16-bit", "as_trained", "measured once"),
        ("c", "no quality lost to 4 bits", "as_trained", "no"),
        ("c", "no quality lost to 4 bits", "requantized", "no"),
        ("d", "gains on categories not trained on", "as_trained", "yes"),
        ("d", "gains on categories not trained on", "requantized", "yes"),
    ]
    assert compared.claims[0].difference == one(compared, "to_base", "qlora_nf4_dq").difference
    assert compared.claims[0].sentence.endswith(
        "But holdout_generation/ended and holdout_generation/rouge_l were not measured, so whether the answers got worse is "
        "not known."
    )
    assert compared.claims[3].sentence == (
        "qlora_nf4_dq took 1.45 times the time per optimizer step of lora_16bit (3.2 against 2.2 s), measured in one "
        "process each: steps of one process say nothing of another, so this is no verdict."
    )


@pytest.mark.parametrize(("peak", "holds"), [(2.0, "yes"), (2.25, "yes"), (2.4, "no"), (3.4, "no")])
def test_costs_are_claimed_without_a_test_on_the_steps_of_one_process(folder, peak, holds):
    """By steps the time would be better with a p value far below the level, however little it says of another process."""

    def on_a_gpu(result):
        result["precision"] |= {"device": "cuda", "device_name": "a GPU"}

    def cheaper(result):
        on_a_gpu(result)
        result["measurements"][0]["value"], result["measurements"][1]["value"] = peak, 2.1
        result["seconds_per_step"] = [1.9 + step / 10 for step in range(5)]

    edit(benchmark_file("lora_16bit").parent, on_a_gpu)
    edit(benchmark_file("qlora_nf4_dq").parent, cheaper)
    memory, time = (c for c in compare.compare(params.load())[0].claims if c.claim == "b")
    assert (memory.holds, time.holds) == (holds, "measured once")
    assert f"{peak / 3:.2f} times the peak memory of lora_16bit" in memory.sentence
    assert "0.95 times" in time.sentence and "one process each" in time.sentence
    for claim in (memory, time):
        assert claim.difference is None and claim.verdict is None
        assert " p " not in claim.sentence and "interval" not in claim.sentence


def add_answers(variant: str, *, ended: dict[str, float], rouge: dict[str, float]) -> None:
    """Give every arm of a variant written answers: by form, the share that ends and the mean likeness."""
    folders = [evaluate_base_folder(variant), *(evaluate_folder(variant, seed) for seed in SEEDS)]
    for place, folder in enumerate(folders):
        frame = pd.read_parquet(folder / "items.parquet")
        rows = frame[frame["metric"] == "acc"]
        many = rows.groupby("form").cumcount().to_numpy() / ITEMS
        noise = np.random.default_rng(place).normal(0, 0.02, len(rows))
        shares, means = (
            rows["form"].map(lambda form, by=by: by.get(form, 0.5)).to_numpy() for by in (ended, rouge)
        )
        answers = [
            rows.assign(task="holdout_generation", metric="ended", numerator=(many < shares).astype(float)),
            rows.assign(task="holdout_generation", metric="rouge_l", numerator=means + noise),
        ]
        pd.concat([frame, *answers]).to_parquet(folder / "items.parquet")

        def measured(result):
            for form in result["forms"]:
                form["metrics"] += [
                    {"task": "holdout_generation", "metric": name, "value": 0.5, "unit": "share", "split": "test",
                     "higher_is_better": True, "items": ITEMS, "per_item": True} for name in ("ended", "rouge_l")
                ]  # fmt: skip

        edit(folder, measured)


@pytest.mark.parametrize(
    ("ended", "rouge", "holds", "because"),
    [
        (
            {"as_trained": 0.25},
            {},
            "mixed",
            "But in holdout_generation/ended: qlora_nf4_dq/as_trained is worse than",
        ),
        ({"as_trained": 0.6}, {"as_trained": 0.4}, "mixed", "But in holdout_generation/rouge_l: "),
        (
            {"as_trained": 0.49},
            {},
            "undecided",
            "But in holdout_generation/ended: Whether qlora_nf4_dq/as_trained",
        ),
        ({"as_trained": 0.6}, {"as_trained": 0.6}, "yes", "margin 0.02)."),
    ],
)
def test_a_gain_that_is_paid_for_by_the_answers_is_no_plain_yes(folder, ended, rouge, holds, because):
    for variant in ("lora_16bit", "qlora_nf4_dq"):
        add_answers(variant, ended=ended, rouge=rouge)
    compared, _ = compare.compare(params.load())
    claim = next(c for c in compared.claims if c.claim == "a" and c.form == "as_trained")
    assert claim.verdict == "better" and claim.holds == holds and because in claim.sentence
    assert ("But in" in claim.sentence) == (holds != "yes")


def test_a_verdict_on_a_loss_that_rose_again_says_that_it_rests_on_the_last_checkpoint(folder):
    for seed in SEEDS:
        write_validation("qlora_nf4_dq", seed, [2.6, 2.2, 2.05, 2.1])
    compared, _ = compare.compare(params.load())
    (rise,) = compared.rises
    assert (rise.variant, rise.best_step, rise.last_step, rise.ahead_until) == ("qlora_nf4_dq", 20, 30, 20)
    assert rise.last - rise.best == pytest.approx(0.05)
    worse = one(compared, "to_baseline", "qlora_nf4_dq")
    assert worse.verdict == "worse" and worse.sentence.endswith(
        "It rests on the last checkpoint (step 30): on the validation rows qlora_nf4_dq was best at step 20, by 0.050 nats per "
        "token, and ahead of the baseline until step 20."
    )
    assert worse.caveat in worse.sentence
    assert not one(compared, "to_base", "lora_16bit").caveat


def test_a_rise_is_seen_where_each_seed_takes_as_many_steps_as_its_own_rows_need(folder):
    for number, seed in enumerate(SEEDS):
        write_validation("qlora_nf4_dq", seed, [2.6, 2.2, 2.05, 2.1], every=10 + number)
    (rise,) = compare.compare(params.load())[0].rises
    assert (rise.best_step, rise.last_step) == (20, 30)
    assert rise.last - rise.best == pytest.approx(0.05) and 0 < rise.low <= rise.high < 0.1


def test_a_verdict_on_the_best_weights_does_not_rest_on_the_last_checkpoint(folder):
    for seed in SEEDS:
        write_validation("qlora_nf4_dq", seed, [2.6, 2.2, 2.05, 2.1])
    compared, _ = compare.compare(changing(folder, keep="best"))
    assert compared.rises == [] and not one(compared, "to_baseline", "qlora_nf4_dq").caveat
    assert compared.trained_otherwise == {}  # both saw the same rows


@pytest.mark.parametrize(
    "ends",
    [[2.0, 2.0, 2.0], [2.005, 2.005, 2.005], [2.08, 1.98, 1.97]],
    ids=["none", "small", "in one seed"],
)
def test_a_rise_within_noise_is_none(folder, ends):
    for seed, end in zip(SEEDS, ends, strict=True):
        write_validation("qlora_nf4_dq", seed, [2.6, 2.2, 2.0, end])
    compared, _ = compare.compare(params.load())
    assert compared.rises == [] and not one(compared, "to_baseline", "qlora_nf4_dq").caveat


def test_a_verdict_that_depends_on_the_weighting_says_so(folder):
    """Long rows are worse and short ones better: by tokens it is worse, by rows that is not decided."""
    path = [evaluate_folder("qlora_nf4_dq", seed) / "items.parquet" for seed in SEEDS]
    for file, seed in zip(path, SEEDS, strict=True):
        frame = pd.read_parquet(file)
        theirs = pd.read_parquet(evaluate_folder("lora_16bit", seed) / "items.parquet")
        chosen = [(f["metric"] == "nats_per_token") & (f["form"] == "as_trained") for f in (frame, theirs)]
        tokens = frame.loc[chosen[0], "denominator"].to_numpy()
        other = theirs.loc[chosen[1], "numerator"].to_numpy()
        added = np.where(tokens > 20, 0.2, -0.2) + np.random.default_rng(seed).normal(0, 0.01, ITEMS)
        frame.loc[chosen[0], "numerator"] = other + added * tokens
        frame.to_parquet(file)
    compared, _ = compare.compare(params.load())
    contrast = one(compared, "to_baseline", "qlora_nf4_dq")
    sign = np.where(tokens > 20, 0.2, -0.2)
    assert contrast.difference.value == pytest.approx(np.average(sign, weights=tokens), abs=2e-3)
    assert contrast.by_rows.value == pytest.approx(sign.mean(), abs=2e-3)
    assert (contrast.verdict, contrast.verdict_by_rows) == ("worse", "undecided")
    assert (
        f"It depends on the weighting: by rows, each weighing the same, it is undecided, {contrast.by_rows.value:+.3f}"
        in contrast.sentence
    )
    assert contrast.sentence.endswith(contrast.caveat)
    assert (
        one(compared, "to_baseline", "qlora_nf4_dq", metric=CHOICE).by_rows is None
    )  # every item weighs the same
    table = export.tables(compared)["contrasts"].set_index("sentence").loc[contrast.sentence]
    assert table["by_rows_value"] == contrast.by_rows.value and table["caveat"] == contrast.caveat


def test_a_claim_about_categories_is_not_tested_where_none_was_held_out(folder):
    for path in folder.rglob("items.parquet"):
        frame = pd.read_parquet(path)
        frame["held_out"] = False
        frame.to_parquet(path)
    claims = compare.compare(ask(folder, sample__held_out_categories=[]))[0].claims
    assert [c.holds for c in claims if c.claim == "d"] == ["not tested"] * 2


def test_every_sentence_says_what_the_table_says(compared):
    words = {"equivalent": "is equivalent to", "worse": "is worse than", "better": "is better than",
             "undecided": "is not decided"}  # fmt: skip
    for contrast in compared.contrasts:
        assert words[contrast.verdict] in contrast.sentence and contrast.unit in contrast.sentence
        assert not any(w in contrast.sentence for v, w in words.items() if v != contrast.verdict)
        numbers = [float(n) for n in re.findall(r"(?<![\w/])[-+]?\d+\.\d+(?![\w/])", contrast.sentence)]
        value = abs(contrast.difference.value)
        assert any(abs(abs(number) - value) <= max(0.006 * value, 0.06) for number in numbers), (
            contrast.sentence
        )


def test_scores_without_items_or_direction_are_kept_as_values(compared):
    (length,) = (
        s for s in compared.scores if (s.variant, s.form, s.metric) == ("lora_16bit", "as_trained", "length")
    )
    assert (length.value, length.groups, length.higher_is_better) == (7.0, None, None)
    assert not [c for c in compared.contrasts if c.metric == "length"]


def test_the_stage_writes_tables_that_say_what_each_number_is(folder):
    done = run_stage_in(folder, "compare")
    assert done.returncode == 0, done.stderr
    written = json.loads((folder / "results/compare/comparison.json").read_text())
    again = json.loads(json.dumps(asdict(compare.compare(params.load())[0])))
    assert written == again
    summary = pd.read_csv(folder / "results/compare/summary.csv", dtype=str, keep_default_na=False)
    for key in ("variant", "form", "metric", "unit", "split", "subset", "device_name", "storage", "compute"):
        assert (summary[key] != "").all(), key
    contrasts = pd.read_csv(folder / "results/compare/contrasts.csv", dtype=str, keep_default_na=False)
    assert len(contrasts) == len(written["contrasts"]) and (contrasts["verdict"] != "").all()
    for table, counts in (
        (summary, ("items", "groups", "seed", "seeds")),
        (contrasts, ("items", "groups", "seeds")),
    ):
        for key in counts:
            assert table[key].str.fullmatch(r"\d*").all() and table[key].any(), key  # whole, or empty
        assert set(table["higher_is_better"]) <= {"True", "False", ""}
    loss = (summary["metric"] == "nats_per_token") & (summary["subset"] == "all")
    base, trained = (summary[loss & (summary["form"] == form)] for form in ("base", "as_trained"))
    assert set(zip(base["seed"], base["seeds"], strict=True)) == {("", "0")}
    assert set(zip(trained["seed"], trained["seeds"], strict=True)) == {
        ("", "3"),
        *((seed, "1") for seed in "123"),
    }
    assert len(pd.read_csv(folder / "results/compare/decomposition.csv")) == len(written["decomposition"])
    items = pd.read_parquet(folder / "results/compare/items.parquet")
    keys = ["variant", "seed", "form", "task", "metric", "leaf", "item"]
    assert len(items) == len(items.drop_duplicates(keys)) == 2 * ITEMS * (2 + 3 * 6)
    metrics = json.loads((folder / "results/compare/metrics.json").read_text())
    assert metrics["qlora_nf4_dq"]["verdict"] == "worse"


def test_one_seed_is_allowed_and_said(folder):
    compared = compare.compare(ask(folder, experiment__seeds=[1]))[0]
    contrast = one(compared, "to_baseline", "qlora_nf4_dq")
    assert not contrast.difference.seed_variance_measured
    assert "the variance over seeds was not measured" in contrast.sentence


def test_arms_that_were_not_scored_on_the_same_items_are_refused(folder):
    path = evaluate_folder("qlora_nf4_dq", 2) / "items.parquet"
    pd.read_parquet(path).query("item != '5'").to_parquet(path)
    with pytest.raises(
        CheckError, match="seeds of qlora_nf4_dq/as_trained were not scored on the same items"
    ):
        compare.compare(params.load())
    for seed in SEEDS:
        path = evaluate_folder("qlora_nf4_dq", seed) / "items.parquet"
        pd.read_parquet(path).query("item != '5'").to_parquet(path)
    with pytest.raises(CheckError, match="qlora_nf4_dq/as_trained and .* were not scored on the same items"):
        compare.compare(params.load())


def edit(folder: Path, change) -> None:
    """Change a result.json."""
    path = folder / "result.json"
    content = json.loads(path.read_text())
    change(content)
    write_json(path, content)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", 4),
        ("rows", counted(rows=8, tokens_in_loss=4)),
        ("rows", counted(rows=9, tokens_in_loss=5)),
        ("validation_rows", counted(rows=1, tokens_in_loss=1)),
        ("tokens_seen", 6),
        ("order_sha256", "f" * 64),
    ],
)
def test_variants_that_learned_from_other_rows_are_refused(folder, key, value):
    edit(train_folder("qlora_nf4_dq", 2), lambda result: result.update({key: value}))
    with pytest.raises(
        CheckError, match=f"were not trained on the same rows for the same steps: {key} of seed 2 is "
    ):
        compare.compare(params.load())


def test_the_stage_stops_by_name_and_writes_nothing(folder):
    edit(train_folder("qlora_nf4_dq", 2), lambda result: result.update(order_sha256="f" * 64))
    done = run_stage_in(folder, "compare")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    said = "compare: failed: qlora_nf4_dq and lora_16bit were not trained on the same rows for the same steps: order_sha256"
    assert said in done.stderr
    assert not (folder / "results/compare").exists()


def changing(folder: Path, **training) -> params.Params:
    """Params whose quantized variant changes these keys of `training` for itself."""
    yaml = YAML()
    content = yaml.load((folder / "params.yaml").read_text())
    content["variants"]["qlora_nf4_dq"]["training"] = training
    with (folder / "params.yaml").open("w") as file:
        yaml.dump(content, file)
    return params.load()


@pytest.mark.parametrize("drawn", ["per_seed", "once"])
def test_seeds_may_learn_from_other_rows_only_if_each_draws_its_own(folder, drawn):
    """Both variants of seed 2 have the same rows, which are others than seed 1's."""
    per_seed = drawn == "per_seed"
    yaml = YAML()
    content = yaml.load((folder / "params.yaml").read_text())
    content["sample"]["per_seed"] = per_seed
    with (folder / "params.yaml").open("w") as file:
        yaml.dump(content, file)
    for variant in ("lora_16bit", "qlora_nf4_dq"):
        edit(train_folder(variant, 2), lambda result: result.update(rows=counted(rows=9, tokens_in_loss=5)))
    if per_seed:
        compare.compare(params.load())
        edit(train_folder("qlora_nf4_dq", 2), lambda result: result["rows"].update(rows=8))
        said = "qlora_nf4_dq and lora_16bit were not trained on the same rows .*: rows of seed 2"
    else:
        said = "the seeds of lora_16bit were not trained on the same rows"
    with pytest.raises(CheckError, match=said):
        compare.compare(params.load())
    for variant in ("lora_16bit", "qlora_nf4_dq"):
        for seed in SEEDS:
            validated = counted(rows=seed, tokens_in_loss=1)
            edit(
                train_folder(variant, seed),
                lambda result, rows=validated: result.update(
                    rows=counted(rows=9, tokens_in_loss=5), validation_rows=rows
                ),
            )
    with pytest.raises(CheckError, match="the seeds of lora_16bit were not trained .*: validation_rows of"):
        compare.compare(params.load())


def test_a_variant_whose_own_params_change_what_it_learns_from_is_named(folder):
    for seed in SEEDS:
        edit(
            train_folder("qlora_nf4_dq", seed),
            lambda result: result.update(order_sha256="f" * 64, tokens_seen=9),
        )
    with pytest.raises(CheckError, match="were not trained on the same rows"):
        compare.compare(changing(folder, learning_rate=1e-4, micro_batch_rows=1))
    asked = changing(folder, loss_on="prompt_and_response", use_context=False)
    compared, _ = compare.compare(asked)
    assert compared.trained_otherwise == {"qlora_nf4_dq": ["use_context", "loss_on"]}
    said = run_stage_in(folder, "compare").stdout
    assert (
        "qlora_nf4_dq learned from other rows than lora_16bit, or in another order: it changes use_context, loss_on"
        in said
    )
    edit(train_folder("qlora_nf4_dq", 3), lambda result: result.update(steps=2))
    with pytest.raises(
        CheckError, match="the seeds of qlora_nf4_dq were not trained .*: steps of seed 3 is 2, and 3 of"
    ):
        compare.compare(asked)


def test_arms_that_agree_name_no_variant(compared):
    assert compared.trained_otherwise == {}


def of_a_task(key, value):
    return lambda result: result["forms"][-1]["harness"]["tasks"][1].update({key: value})


def of_the_harness(key, value):
    return lambda result: result["forms"][-1]["harness"].update({key: value})


@pytest.mark.parametrize(
    ("where", "arm"),
    [
        (evaluate_folder("qlora_nf4_dq", 3), "qlora_nf4_dq/requantized seed 3"),
        (evaluate_folder("lora_16bit", 2), "lora_16bit/merged_16bit seed 2"),
        (evaluate_base_folder("qlora_nf4_dq"), "qlora_nf4_dq/base"),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("change", "what"),
    [
        (of_a_task("items_sha256", "b" * 64), "items_sha256 of response_choice is b+ and a+"),
        (of_a_task("few_shot", 5), "few_shot of response_choice is 5 and 0"),
        (of_a_task("bos_per_prompt", 2), "bos_per_prompt of response_choice is 2 and 1"),
        (of_the_harness("batch_rows", 8), "batch_rows is 8 and 16"),
        (of_the_harness("chat_template_sha256", "d" * 64), "chat_template_sha256 is d+ and c+"),
    ],
    ids=["items", "few_shot", "bos", "batch", "template"],
)
def test_forms_that_were_scored_otherwise_are_refused(folder, where, arm, change, what):
    edit(where, change)
    with pytest.raises(CheckError, match=f"^{arm} and lora_16bit/base were not scored .* same way: {what}$"):
        compare.compare(params.load())


def with_version(library, version):
    return lambda result: result["versions"].update({library: version})


def on_another_device(result):
    for part in [result, *result.get("forms", [])]:
        if "precision" in part:
            part["precision"] |= {"device": "cuda", "device_name": "a GPU"}


@pytest.mark.parametrize(
    ("where", "change", "sentence"),
    [
        (train_folder("qlora_nf4_dq", 2), with_version("trl", "1.17.0"),
         "qlora_nf4_dq seed 2 was trained with trl 1.17.0 and lora_16bit seed 1 with 1.16.0, .*`dvc repro --force --single-item "
         "train@qlora_nf4_dq-2` makes it anew"),
        (train_folder("lora_16bit", 3), on_another_device,
         r"lora_16bit seed 3 was trained with device cuda \(a GPU\) and lora_16bit seed 1 with cpu \(a CPU\)"),
        (evaluate_folder("lora_16bit", 2), with_version("lm-eval", "0.4.14"),
         "lora_16bit/as_trained seed 2 was scored with lm-eval 0.4.14 and lora_16bit/base with 0.4.13, .*evaluate@lora_16bit-2`"),
        (evaluate_base_folder("qlora_nf4_dq"), on_another_device, "qlora_nf4_dq/base was scored with device cuda .*evaluate_base@qlora_nf4_dq`"),
        (benchmark_file("qlora_nf4_dq").parent, on_another_device, "qlora_nf4_dq was measured with device cuda .* benchmark@qlora_nf4_dq`"),
    ],
    ids=["trl", "a training on a GPU", "lm-eval", "a base on a GPU", "a benchmark on a GPU"],
)  # fmt: skip
def test_arms_from_other_devices_or_libraries_are_refused(folder, where, change, sentence):
    edit(where, change)
    with pytest.raises(CheckError, match=sentence):
        compare.compare(params.load())


def test_what_moves_no_number_may_differ(folder):
    """Python, libraries that only another stage computes with, and the number of threads."""
    for library in ("Python", "lm-eval", "scipy"):
        edit(train_folder("qlora_nf4_dq", 2), with_version(library, "9.9"))
    edit(
        train_folder("lora_16bit", 2),
        lambda result: result["precision"].update(device_name="a CPU, 64 threads"),
    )
    for variant in ("lora_16bit", "qlora_nf4_dq"):
        edit(benchmark_file(variant).parent, on_another_device)
    compare.compare(params.load())


@pytest.mark.parametrize("key", ["primary", "margins"])
def test_a_metric_that_was_not_measured_is_named(folder, key):
    wrong = "piqa/perplexity"  # params know the metrics of our own tasks alone
    task = {"items": None, "few_shot": 0, "chat_template": True, "files": None}
    asked = ask(
        folder,
        **{f"comparison__{key}": {"primary": wrong, "margins": {LOSS: 0.02, wrong: 1.0}}[key]},
        evaluation__tasks={"holdout_loss": task, "response_choice": task, "piqa": task},
    )
    with pytest.raises(
        UserError, match=f"comparison.{key} names {wrong}; the metrics .* are holdout_loss/nats"
    ):
        compare.compare(asked)


def test_a_missing_run_is_named(folder):
    (evaluate_folder("qlora_nf4_dq", 2) / "items.parquet").unlink()
    with pytest.raises(UserError, match="results/evaluate/qlora_nf4_dq/2/items.parquet is missing"):
        compare.compare(params.load())


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "EOF while parsing an object"),
        (b"[]", "'list' object has no attribute"),
        (b'{"variant": "lora_16bit"}', "precision: field required"),
    ],
)
def test_a_damaged_result_is_named(folder, content, reason):
    path = train_folder("qlora_nf4_dq", 2) / "result.json"
    path.write_bytes(content)
    with pytest.raises(
        UserError, match=f"^{path} is damaged .{reason}.*: delete it, and `dvc repro` makes it again.$"
    ):
        compare.compare(params.load())


def test_what_a_training_recorded_reaches_the_comparison_as_it_was_written(folder):
    edit(
        train_folder("qlora_nf4_dq", 2),
        lambda result: result.update(inputs={"params": {}}, speed_ups={"packing": True}),
    )
    recorded = json.loads((train_folder("qlora_nf4_dq", 2) / "result.json").read_text())
    del recorded["inputs"]
    compared = compare.compare(params.load())[0]
    assert compared.training["qlora_nf4_dq"][1] == recorded


def test_a_table_without_rows_still_has_its_columns(folder):
    compared = compare.compare(params.load())[0]
    empty = export.tables(dataclasses.replace(compared, contrasts=[], decomposition=[]))
    full = export.tables(compared)
    for name in ("contrasts", "decomposition"):
        read = pd.read_csv(io.StringIO(empty[name].to_csv(index=False)))
        assert list(read) == list(full[name]) and read.empty
