"""Categories that a variant leaves out of its training are its own held-out ones."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from made_up_scores import SEEDS, ask, items_of, write_results

from workflow import params
from workflow.comparison import compare
from workflow.comparison.model import Comparison
from workflow.comparison.sentences import OTHER_CATEGORIES

QLORA, BASELINE = "qlora_nf4_dq", "lora_16bit"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Results of an experiment in which no category is held out of every variant."""
    monkeypatch.chdir(tmp_path)
    write_results(tmp_path)
    for path in tmp_path.rglob("items.parquet"):
        pd.read_parquet(path).assign(held_out=False).to_parquet(path)
    return tmp_path


def compared(folder: Path, **left_out: list[str]) -> tuple[Comparison, pd.DataFrame]:
    """The comparison of variants that leave out these categories, by name, and its items."""
    changes = {f"variants__{name}__training": {"left_out_categories": c} for name, c in left_out.items()}
    return compare.compare(ask(folder, sample__held_out_categories=[], **changes))


def contrasts(found: Comparison, kind: str, subset: str) -> dict[str, float]:
    """The differences as trained in the primary metric, by variant."""
    return {
        c.variant: c.difference.value
        for c in found.contrasts
        if (c.kind, c.form, c.subset, c.metric) == (kind, "as_trained", subset, "nats_per_token")
    }


def gain(variant: str, category: str) -> float:
    """The change by training on the items of a category, from the made-up scores."""
    losses = []
    for form, seeds in (("as_trained", SEEDS), ("base", [None])):
        frames = [items_of(variant, form, seed) for seed in seeds]
        frames = [f[(f["task"] == "holdout_loss") & (f["category"] == category)] for f in frames]
        losses.append(np.mean([f["numerator"].sum() / f["denominator"].sum() for f in frames]))
    return losses[0] - losses[1]


def test_each_variant_is_tested_on_what_it_left_out(folder):
    found, items = compared(folder, qlora_nf4_dq=["far"], lora_16bit=["near"])
    assert found.left_out_categories == {QLORA: ["far"], BASELINE: ["near"]}
    assert contrasts(found, "to_base", "held_out") == pytest.approx(
        {QLORA: gain(QLORA, "far"), BASELINE: gain(BASELINE, "near")}, abs=1e-12
    )
    assert contrasts(found, "to_base", "seen") == pytest.approx(
        {QLORA: gain(QLORA, "near"), BASELINE: gain(BASELINE, "far")}, abs=1e-12
    )
    held_out = {(s.variant, s.items) for s in found.scores if (s.subset, s.metric) == ("held_out", "acc")}
    assert held_out == {(QLORA, 30), (BASELINE, 90)}
    own = {QLORA: "far", BASELINE: "near"}
    assert (items["held_out"] == (items["category"] == items["variant"].map(own))).all()
    assert {c.holds for c in found.claims if c.claim == "d"} == {"yes"}


def test_variants_that_left_out_different_categories_are_compared_on_all_items_with_a_caveat(folder):
    found, _ = compared(folder, qlora_nf4_dq=["far"])
    assert not contrasts(found, "to_baseline", "held_out") and not contrasts(found, "to_baseline", "seen")
    assert contrasts(found, "to_baseline", "category/far") and contrasts(
        found, "to_baseline", "category/near"
    )
    (on_all,) = (
        c
        for c in found.contrasts
        if (c.kind, c.form, c.subset, c.metric) == ("to_baseline", "as_trained", "all", "nats_per_token")
    )
    assert on_all.caveat == OTHER_CATEGORIES and on_all.sentence.endswith(OTHER_CATEGORIES)
    assert found.trained_otherwise == {QLORA: ["left_out_categories"]}
    # Alone with its base, and before any training, there is no such caveat.
    assert not any(c.caveat for c in found.contrasts if c.kind in ("to_base", "base_to_base"))


def test_variants_that_left_out_the_same_categories_are_compared_on_them(folder):
    ours, _ = compared(folder, qlora_nf4_dq=["far"], lora_16bit=["far"])
    assert ours.trained_otherwise == {} and not any(c.caveat for c in ours.contrasts)
    write_results_again(folder)
    of_the_sample, _ = compare.compare(params.load())
    for kind in ("to_base", "to_baseline"):
        for subset in ("held_out", "seen", "all"):
            expected = contrasts(of_the_sample, kind, subset)
            assert expected and contrasts(ours, kind, subset) == expected


def write_results_again(folder: Path) -> None:
    """The same results of an experiment whose sample holds out the category far."""
    ask(folder)
    for path in folder.rglob("items.parquet"):
        frame = pd.read_parquet(path)
        frame.assign(held_out=frame["category"] == "far").to_parquet(path)
