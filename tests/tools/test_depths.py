"""The comparison of bases of several depths finds the gaps that made-up studies were given."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from made_up_studies import (
    BASELINE,
    ROWS,
    edit_params,
    edit_source,
    edit_training,
    scores,
    write_finished,
)
from report_reader import Reader
from scipy import stats

from workflow import params
from workflow.params import editing
from workflow.runtime.errors import CheckError, UserError
from workflow.tools import mechanism
from workflow.tools.depths import measure_depths, measure_losses, read_depths
from workflow.tools.moved_studies import ITEMS

# By variant and depth, in nats per token: the gap before training and after.
GAPS = {
    "qlora_nf4_dq": {30: (0.18, 0.09), 24: (0.20, 0.13), 18: (0.25, 0.20)},
    "qlora_fp4": {30: (0.30, 0.15), 24: (0.20, 0.151), 18: (0.10, 0.05)},
    "qlora_nf4_blocks_32": {30: (0.15, 0.08), 24: (0.15, 0.10), 18: (0.15, 0.08)},
}
ANSWERS = {
    ("qlora_nf4_dq", 24): "larger", ("qlora_nf4_dq", 18): "larger", ("qlora_fp4", 24): "equal", ("qlora_fp4", 18): "smaller",
    ("qlora_nf4_blocks_32", 24): "undecided", ("qlora_nf4_blocks_32", 18): "equal",
}  # fmt: skip
# Its noise of seeds and rows leaves this one undecided: its gap is off by the margin itself.
NOISE = {"qlora_nf4_blocks_32": 0.02}
DEPTHS = (30, 24, 18)


def items(layers: int) -> pd.DataFrame:
    """Scores with common noise of the rows, which pairing takes out, and small noise of bases and seeds."""
    noise = np.random.default_rng(layers)

    def loss_of(variant: str, seed: int | None, own: np.ndarray | float) -> tuple[float, np.ndarray | float]:
        gap = 0.0 if variant == BASELINE else GAPS[variant][layers][seed is not None]
        wide = NOISE.get(variant, 0.002) if layers == 24 else 0.002
        return (30 - layers) / 10, gap and gap + own + noise.normal(0, wide if seed else 0)

    return scores(GAPS, noise, loss_of)


def source_of(layers: int) -> dict:
    cut = {"layers": layers, "of": 30, "dropped": list(range((layers + 1) // 2, 30 - layers // 2))}
    healed = {"variant": "healing", "rows": 12_914, "tokens_in_loss": 2_000_000, "steps": 808, "seed": 1, "learning_rate": 2e-4,
              "validation_loss_before": 40.0 - layers, "validation_loss_after": 3.0 - layers / 30}  # fmt: skip
    return {"source": "file", "path": f"studies/{layers}_layers", "sha256": f"{layers:064}", "quantized_before": None,
            "moved": None, "parameters": 4_000_000 * layers, "cut": None if layers == 30 else cut, "healed": healed}  # fmt: skip


def write_study(folder: Path, layers: int) -> Path:
    text = editing.with_value(params.complete_text("mechanism"), "experiment", "variants", [BASELINE, *GAPS])
    text = editing.with_value(text, "comparison", "resamples", 400)
    prompt = {"chat_template": "model", "chat_date": "2024-07-26", "end_token": None}
    place = {"source": "file", "path": f"studies/{layers}_layers", "sha256": f"{layers:064}"}
    text = editing.with_section(text, "model", place | prompt | {"moved": None, "kept_layers": None})
    return write_finished(folder, text=text, source=source_of(layers), gaps=GAPS, table=items(layers))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> list[Path]:
    """Folders of three finished studies, not in the order of their depths."""
    place = tmp_path_factory.mktemp("studies")
    return [write_study(place / f"healed_{layers}", layers) for layers in (18, 30, 24)]


@pytest.fixture
def studies(made, tmp_path) -> dict[int, Path]:
    """Copies of them by depth, to be changed."""
    folders = (Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in made)
    return {int(folder.name.rpartition("_")[2]): folder for folder in folders}


def of_seeds(folder: Path, variant: str, form: str) -> np.ndarray:
    """Nats per token of each seed."""
    frame = pd.read_parquet(folder / ITEMS).query("variant == @variant and form == @form").fillna({"seed": 0})
    sums = frame.groupby("seed")[["numerator", "denominator"]].sum()
    return (sums["numerator"] / sums["denominator"]).to_numpy()


def test_gaps_and_their_changes_are_those_of_a_second_computation(made):
    by_depth = {int(folder.name.rpartition("_")[2]): folder for folder in made}
    depths = read_depths(made)
    assert [depth.layers for depth in depths] == list(DEPTHS)
    assert [depth.parameters for depth in depths] == [120_000_000, 96_000_000, 72_000_000]
    gaps = {(gap.variant, gap.depth.layers): gap for gap in measure_depths(depths)}
    assert list(gaps) == [(name, layers) for name in GAPS for layers in DEPTHS]
    for (name, layers), gap in gaps.items():
        here = {
            form: of_seeds(by_depth[layers], name, form) - of_seeds(by_depth[layers], BASELINE, form)
            for form in ("base", "as_trained")
        }
        full = {
            form: of_seeds(by_depth[30], name, form) - of_seeds(by_depth[30], BASELINE, form) for form in here
        }
        assert gap.before.value == pytest.approx(here["base"].mean())
        assert gap.after.value == pytest.approx(here["as_trained"].mean())
        assert gap.ratio.value == pytest.approx(here["as_trained"].mean() / here["base"].mean())
        if layers == 30:
            assert gap.change_before is gap.change_after is gap.answer is None
            continue
        changes = here["as_trained"] - full["as_trained"]  # paired: a seed has the same number at both depths
        assert gap.change_before.value == pytest.approx((here["base"] - full["base"]).mean())
        assert gap.change_after.value == pytest.approx(changes.mean())
        truth = GAPS[name][layers][1] - GAPS[name][30][1]
        assert gap.change_after.low < truth < gap.change_after.high
        # The seeds' part alone: the interval is no narrower than Student's over the three differences of a seed.
        of_seeds_alone = stats.t.ppf(0.975, 2) * stats.sem(changes)
        assert gap.change_after.high - gap.change_after.value > 0.8 * of_seeds_alone


def test_each_depth_gets_the_answer_that_it_was_made_with(made):
    gaps = measure_depths(read_depths(made))
    assert {(gap.variant, gap.depth.layers): gap.answer for gap in gaps if gap.answer} == ANSWERS
    # Holm's correction spans the six changes.
    compared = [gap for gap in gaps if gap.change_after]
    order = sorted(compared, key=lambda gap: gap.change_after.p_value)
    corrected, largest = [], 0.0
    for place, gap in enumerate(order):
        largest = max(largest, min(1.0, gap.change_after.p_value * (len(order) - place)))
        corrected.append(largest)
    assert [gap.p_adjusted for gap in order] == pytest.approx(corrected)


def test_the_losses_of_each_depth_are_means_over_seeds(made):
    losses = {(loss.variant, loss.layers): loss for loss in measure_losses(read_depths(made))}
    assert len(losses) == 4 * 3
    for folder in made:
        layers = int(folder.name.rpartition("_")[2])
        loss = losses["qlora_fp4", layers]
        assert loss.before == pytest.approx(of_seeds(folder, "qlora_fp4", "base").mean())
        assert loss.after == pytest.approx(of_seeds(folder, "qlora_fp4", "as_trained").mean())


def test_the_command_writes_tables_and_a_page_that_say_what_the_bases_are(
    made, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(
        sys, "argv", ["mechanism", "depths", *map(str, made), "--folder", str(tmp_path / "out")]
    )
    mechanism.main()
    assert "4-bit QLoRA (FP4), 18 layers of 30: smaller. After training the gap changes by −0.09" in (
        capsys.readouterr().out
    )
    gaps = pd.read_csv(tmp_path / "out/gaps.csv").set_index(["variant", "layers"])
    assert gaps.loc[("qlora_fp4", 18), "answer"] == "smaller" and pd.isna(
        gaps.loc[("qlora_fp4", 30), "answer"]
    )
    assert gaps.loc[("qlora_nf4_dq", 18), "change_after_value"] == pytest.approx(0.11, abs=0.01)
    assert (
        gaps["base"].tolist()
        == ["healed, not cut", *2 * ["Cut and healed, not a family member as released"]] * 3
    )
    assert (
        (gaps["unit"] == "nats per token").all()
        and (gaps["items"] == ROWS).all()
        and (gaps["seeds"] == 3).all()
    )
    losses = pd.read_csv(tmp_path / "out/losses.csv")
    assert len(losses) == 4 * 3 and (losses["task"] == "holdout_loss").all()
    html = (tmp_path / "out/index.html").read_text()
    page, markdown = Reader(html), (tmp_path / "out/mechanism.md").read_text()
    bases = page.tables["bases"]
    assert bases[1:] == [
        ["30", "0", "120,000,000", "10.0000", "2.0000"],
        ["24", "6", "96,000,000", "16.0000", "2.2000"],
        ["18", "12", "72,000,000", "22.0000", "2.4000"],
    ]
    rows = page.tables["gaps to 16 bits"]
    assert len(rows) == 10 and [row[-1] for row in rows[1:4]] == ["", "larger", "larger"]
    for text in (page.text, markdown):
        assert "Cut and healed, not a family member as released" in text
        assert "12,914 rows of databricks/databricks-dolly-15k that no split of the study uses" in text
    assert "<svg" in html and "before training: 30 layers +0.1" in html


def test_studies_that_are_not_of_one_full_depth_and_its_cuts_are_refused(studies):
    folders = list(studies.values())
    for given, words in (
        ([studies[24], studies[18]], "0 are of the full depth and 2 of fewer layers"),
        ([studies[30]], "1 is of the full depth and 0 of fewer layers"),
        ([*folders, studies[18]], "two studies are of 18 layers"),
    ):
        with pytest.raises(UserError, match=words):
            read_depths(given)
    edit_source(studies[18], cut={"layers": 18, "of": 32, "dropped": list(range(17, 31))})
    with pytest.raises(UserError, match=r"cut from models of 30 and 32 layers\.$"):
        read_depths(folders)
    edit_source(studies[18], healed=None)
    with pytest.raises(UserError, match=r"healed_18 was not healed: `python -m workflow\.mechanism heal`"):
        read_depths(folders)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: edit_params(folder, "sample", "test_rows", 900), r"differ in more than the depth of their bases: sample\.test_rows is 1000 and 900\.$"),
        (lambda folder: edit_source(folder, healed=source_of(18)["healed"] | {"steps": 7}), r"source\.json\.healed\.steps is 808 and 7"),
        (lambda folder: edit_source(folder, quantized_before="GGUF Q4_0"), r"source\.json\.quantized_before is None and GGUF Q4_0"),
        (lambda folder: edit_training(folder, order_sha256="9" * 64), "was not trained on the rows of .*order_sha256"),
    ],
    ids=["params", "healing", "source", "order"],
)  # fmt: skip
def test_studies_that_differ_in_more_than_the_depth_are_refused(studies, change, words):
    change(studies[18])
    with pytest.raises((UserError, CheckError), match=words):
        read_depths(list(studies.values()))
