"""The comparison of unmoved and moved bases finds the answers that made-up studies were given."""

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
from ruamel.yaml import YAML

from workflow import params
from workflow.engine import study
from workflow.params import editing
from workflow.report import drawing
from workflow.runtime.errors import CheckError, UserError
from workflow.runtime.paths import PARAMS
from workflow.tools import mechanism, moved_studies
from workflow.tools.gaps import judge, measure_gaps
from workflow.tools.moved_studies import ITEMS

# By variant, in nats per token: the gap before training and after, on the base as it is and on the moved ones.
GAPS = {
    "qlora_nf4_dq": {"unmoved": (0.18, 0.09), "moved": (0.25, 0.10)},
    "qlora_fp4": {"unmoved": (0.30, 0.15), "moved": (0.12, 0.05)},
    "qlora_nf4_blocks_32": {"unmoved": (0.16, 0.09), "moved": (0.16, 0.065)},
}
ANSWERS = {"qlora_nf4_dq": "not the grid", "qlora_fp4": "the grid", "qlora_nf4_blocks_32": "undecided"}
DRAWS = (1, 2, 3)


def params_text(draw: int | None, cells: float = 0.25) -> str:
    text = params.complete_text("mechanism")
    text = editing.with_value(text, "experiment", "variants", [BASELINE, *GAPS])
    text = editing.with_value(text, "comparison", "resamples", 400)
    return editing.with_value(
        text, "model", "moved", None if draw is None else {"cells": cells, "seed": draw}
    )


def items(draw: int | None) -> pd.DataFrame:
    """Scores with common noise of the rows, which pairing takes out, and small noise of draws and seeds."""
    noise = np.random.default_rng(100 if draw is None else draw)

    def loss_of(variant: str, seed: int | None, own: np.ndarray | float) -> tuple[float, np.ndarray | float]:
        base = "unmoved" if draw is None else "moved"
        gap = 0.0 if variant == BASELINE else GAPS[variant][base][seed is not None]
        # The untrained base as it is has no draw and no seed, and so none of their noise.
        of_unit = 0 if draw is None and seed is None else noise.normal(0, 0.002)
        return 0.9 if seed is None else 0, gap and gap + own + of_unit

    return scores(GAPS, noise, loss_of)


def write_study(folder: Path, draw: int | None, cells: float = 0.25) -> Path:
    moved = (
        None
        if draw is None
        else {"cells": cells, "seed": draw, "tensors": 210, "weights": 106168320, "relative_size": 0.041}
    )
    source = {"source": "wheel", "quantized_before": "GGUF Q4_1", "moved": moved, "parameters": 1}
    return write_finished(folder, text=params_text(draw, cells), source=source, gaps=GAPS, table=items(draw))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> list[Path]:
    """Folders of four finished studies: the base as it is, and three draws."""
    place = tmp_path_factory.mktemp("studies")
    return [write_study(place / f"on_{draw}", draw) for draw in (None, *DRAWS)]


@pytest.fixture
def studies(made, tmp_path) -> list[Path]:
    """Copies of them, to be changed."""
    return [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in made]


def ratio_of_sums(folder: Path, variant: str, form: str) -> float:
    frame = pd.read_parquet(folder / ITEMS).query("variant == @variant and form == @form")
    return frame["numerator"].sum() / frame["denominator"].sum()


def gap_of(folder: Path, variant: str, form: str) -> float:
    return ratio_of_sums(folder, variant, form) - ratio_of_sums(folder, BASELINE, form)


def test_each_variant_gets_the_answer_that_it_was_made_with(made):
    gaps = {gap.variant: gap for gap in measure_gaps(*moved_studies.read(made))}
    assert {name: gap.answer for name, gap in gaps.items()} == ANSWERS
    for name, gap in gaps.items():
        for form, found, ratios in (("base", gap.before, 0), ("as_trained", gap.after, 1)):
            unmoved = gap_of(made[0], name, form)
            moved = np.mean([gap_of(folder, name, form) for folder in made[1:]])
            values = (found.unmoved.value, found.moved.value, found.change.value)
            assert values == pytest.approx((unmoved, moved, moved - unmoved))
            truth = GAPS[name]["moved"][ratios] - GAPS[name]["unmoved"][ratios]
            assert found.change.low < truth < found.change.high
            assert found.change.high - found.change.low < 0.03
        for found, folders in ((gap.ratio_unmoved, made[:1]), (gap.ratio_moved, made[1:])):
            means = [
                np.mean([gap_of(folder, name, form) for folder in folders]) for form in ("base", "as_trained")
            ]
            assert found.value == pytest.approx(means[1] / means[0]) and found.low < found.value < found.high
        third = gap.after.moved.value - 2 / 3 * gap.after.unmoved.value
        assert gap.above_third.value == pytest.approx(third)


def test_the_draws_count_as_units(studies):
    """A draw that lies far from the others widens the interval of the change, before training and after."""
    name = "qlora_fp4"
    narrow = {gap.variant: gap for gap in measure_gaps(*moved_studies.read(studies))}[name]
    frame = pd.read_parquet(studies[3] / ITEMS)
    frame.loc[frame["variant"] == name, "numerator"] += 0.2 * frame["denominator"]
    frame.to_parquet(studies[3] / ITEMS, index=False)
    wide = {gap.variant: gap for gap in measure_gaps(*moved_studies.read(studies))}[name]
    for moment in ("before", "after"):
        before, after = getattr(narrow, moment).change, getattr(wide, moment).change
        # Three draws at x, x and x + 0.2: the standard error of their mean is 0.2 / 3.
        assert after.standard_error == pytest.approx(0.2 / 3, rel=0.1) and before.standard_error < 0.01
    assert wide.answer == "undecided"


class Ends:
    def __init__(self, low: float, high: float):
        self.low, self.high = low, high


@pytest.mark.parametrize(
    ("unmoved", "change", "above_third", "answer"),
    [
        ((0.08, 0.10), (-0.01, 0.03), (0.02, 0.06), "not the grid"),
        ((0.08, 0.10), (0.05, 0.09), (0.08, 0.12), "not the grid"),
        ((0.08, 0.10), (-0.07, -0.05), (-0.04, -0.01), "the grid"),
        ((0.08, 0.10), (-0.03, 0.01), (-0.01, 0.03), "undecided"),
        (
            (0.02, 0.03),
            (-0.015, -0.012),
            (-0.006, -0.001),
            "undecided",
        ),  # a third of it lies within the margin
        ((-0.01, 0.03), (-0.01, 0.01), (-0.01, 0.01), "undecided"),  # no gap
    ],
)
def test_the_rule(unmoved, change, above_third, answer):
    class Gap:
        pass

    gap = Gap()
    gap.unmoved, gap.change = Ends(*unmoved), Ends(*change)
    assert judge(gap, Ends(*above_third), margin=0.02)[0] == answer


def drop_an_item(folder: Path) -> None:
    frame = pd.read_parquet(folder / ITEMS)
    frame[frame["item"] != 7].to_parquet(folder / ITEMS, index=False)


def of_two_params(folder: Path) -> None:
    edit_params(folder, "sample", "test_rows", 900)
    edit_params(folder, "evaluation", "batch_rows", 16)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (of_two_params, r"on_None and .*on_2 differ in more than model\.moved: sample\.test_rows is 1000 and 900; evaluation\.batch_rows is 72 and 16\.$"),
        (lambda folder: edit_params(folder, "model", "chat_date", "2020-01-01"), r"model\.chat_date is 2024-07-26 and 2020-01-01"),
        (lambda folder: edit_source(folder, parameters=2), r"source\.json\.parameters is 1 and 2"),
        (lambda folder: edit_source(folder, moved=None), r"says that the base was moved by None, and model\.moved in params\.yaml is .*seed=2"),
        (lambda folder: edit_training(folder, order_sha256="9" * 64), "qlora_fp4 seed 1 of .*on_2 was not trained on the rows of .*order_sha256"),
        (lambda folder: edit_training(folder, versions={"torch": "2.14.0"}), "with torch 2.14.0"),
        (drop_an_item, "lora_16bit/base of .*on_2 was not scored on the items of"),
        (lambda folder: (folder / ITEMS).unlink(), "items.parquet is missing: the study is not finished"),
    ],
    ids=["params", "prompt", "source", "not-moved", "order", "versions", "items", "unfinished"],
)  # fmt: skip
def test_studies_that_differ_in_more_than_the_move_are_refused(studies, change, words):
    change(studies[2])
    with pytest.raises((UserError, CheckError), match=words):
        moved_studies.read(studies)


def test_one_unmoved_base_and_several_draws_of_one_distribution_are_needed(made, tmp_path):
    for folders, words in (
        (made[1:], "0 are unmoved and 3 moved"),
        (made[:2], "1 is unmoved and 1 moved"),
        ([made[0], *made], "2 are unmoved and 3 moved"),
        ([*made, made[1]], "two studies are the same draw: model.moved.seed is 1 in both"),
        ([*made[:3], write_study(tmp_path / "wider", 4, cells=0.5)], r"model.moved.cells is 0.25 .*0.5 "),
    ):
        with pytest.raises(UserError, match=words):
            moved_studies.read(folders)


def run(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["mechanism", *map(str, arguments)])
    mechanism.main()


def test_the_command_writes_tables_and_a_page(made, monkeypatch, tmp_path, capsys):
    run(monkeypatch, "compare", *made, "--folder", tmp_path / "out")
    assert (
        "qlora_fp4: the grid; off the grid the gap is smaller by more than a third" in capsys.readouterr().out
    )
    gaps = pd.read_csv(tmp_path / "out/gaps.csv").set_index(["variant", "training"])
    assert gaps.loc[("qlora_nf4_dq", "after"), "answer"] == "not the grid"
    assert gaps.loc[("qlora_fp4", "after"), "change_value"] == pytest.approx(-0.1, abs=0.01)
    assert (gaps["unit"] == "nats per token").all() and (gaps["items"] == ROWS).all()
    losses = pd.read_csv(tmp_path / "out/losses.csv")
    assert len(losses) == 4 * 4 and losses["draw"].isna().sum() == 4
    row = losses[(losses["variant"] == "qlora_fp4") & (losses["draw"] == 2)].iloc[0]
    assert row["after"] == pytest.approx(ratio_of_sums(made[2], "qlora_fp4", "as_trained"))
    page = Reader((tmp_path / "out/index.html").read_text())
    markdown = (tmp_path / "out/mechanism.md").read_text()
    rows = page.tables["gaps to 16 bits"]
    assert len(rows) == 7 and [row[-1] for row in rows[2::2]] == list(ANSWERS.values())
    assert rows[2][1] == "after" and rows[1][-1] == ""
    for text in (page.text, markdown):
        assert "by up to 0.25 of their own block’s cell" in text and "SmolLM2-135M-Instruct.Q4_1" in text
        assert (
            "4-bit QLoRA (FP4)" in text and "3 seeds; 150 test items with 75 different instructions" in text
        )
    assert "<svg" in (tmp_path / "out/index.html").read_text()


def test_a_refusal_leaves_what_was_there(made, monkeypatch, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/index.html").write_text("before")
    monkeypatch.setattr(drawing, "matplotlib_svg", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        mechanism.write(*moved_studies.read(made), tmp_path / "out")
    assert (tmp_path / "out/index.html").read_text() == "before"
    with pytest.raises(SystemExit, match="^mechanism: .* are unmoved and 3 moved"):
        run(monkeypatch, "compare", *made[1:], "--folder", tmp_path / "out")
    with pytest.raises(SystemExit, match="on_1 has other files, such as .*; --folder names another one"):
        run(monkeypatch, "compare", *made, "--folder", made[1])
    assert (made[1] / ITEMS).is_file()


def test_the_studies_of_the_bases_differ_in_the_move_alone(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, "bases", "mechanism", "--cells", "0.25", "--seeds", 1, 2)
    names = {"unmoved": None, "moved_1": {"cells": 0.25, "seed": 1}, "moved_2": {"cells": 0.25, "seed": 2}}
    for name, moved in names.items():
        folder = tmp_path / "studies" / f"mechanism_on_{name}"
        study.lay_out("mechanism", folder=folder, repository=tmp_path, model=Path(f"studies/{name}.yaml"))
        asked = YAML(typ="safe", pure=True).load(folder / PARAMS)
        expected = YAML(typ="safe", pure=True).load(params.complete_text("mechanism"))
        assert asked == expected | {"model": expected["model"] | {"moved": moved}}


def test_a_base_without_a_grid_gets_no_params(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"^mechanism: .*model\.moved must be null where source is hub"):
        run(monkeypatch, "bases", "llama2_7b_dolly", "--cells", "0.25", "--seeds", 1)
    assert not list(tmp_path.glob("studies/*"))
