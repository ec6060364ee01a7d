"""How a gap changes between two pairs of variants: against arithmetic by hand, the rule of the preset, and the command."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from made_up_studies import BASELINE, scores, write_finished

from workflow import params
from workflow.params import editing
from workflow.runtime.errors import UserError
from workflow.tools import mechanism
from workflow.tools.changes import measure_changes
from workflow.tools.moved_studies import ITEMS, read_study

GAPS = {"qlora_nf4": 0.1, "qlora_nf4_dq": 0.04, "qlora_fp4": 0.101, "lora_int8": 0.2}
PAIRS = {name: {"faulty": name, "repaired": BASELINE} for name in GAPS}


def text() -> str:
    """Params of a study with all these variants and a pair for each."""
    text = params.complete_text("reference_study")
    text = editing.with_value(text, "experiment", "variants", [BASELINE, *GAPS])
    text = editing.with_value(text, "experiment", "seeds", [1, 2, 3])
    text = editing.with_value(text, "benchmark", "variants", [])
    return editing.with_value(text, "comparison", "repairs", PAIRS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    table = scores(
        GAPS,
        np.random.default_rng(5),
        # lora_int8's gap depends on the seed.
        lambda variant, seed, own: (
            0.0,
            GAPS.get(variant, 0) * (seed or 1 if variant == "lora_int8" else 1) + own,
        ),
    )
    return write_finished(tmp_path / "made_up", text=text(), source={"moved": None}, gaps=GAPS, table=table)


def publish(folder: Path) -> None:
    """Lay a finished study out as it is published."""
    for path in (folder / "results").iterdir():
        path.rename(folder / path.name)
    (folder / "results").rmdir()


def test_a_change_is_the_last_gap_less_the_first_and_answers_by_the_rule(folder):
    found = measure_changes(
        read_study(folder),
        [
            ("qlora_nf4", "qlora_nf4_dq"),
            ("qlora_nf4_dq", "qlora_nf4"),
            ("qlora_nf4", "qlora_fp4"),
            ("qlora_nf4", "lora_int8"),
        ],
    )
    assert [one.answer for one in found] == ["smaller", "larger", "none that matters", "undecided"]
    items = pd.read_parquet(folder / "results/compare/items.parquet")
    trained = items[items["form"] == "as_trained"]
    sums = trained.groupby("variant")["numerator"].sum() / trained.groupby("variant")["denominator"].sum()
    for one in found:
        by_hand = sums[one.last] - sums[one.first]  # the baseline is in both
        assert one.change.value == pytest.approx(by_hand, abs=1e-12)
        assert one.gaps[1].value - one.gaps[0].value == pytest.approx(one.change.value, abs=1e-12)
        assert one.change.low < one.change.value < one.change.high
    # Pairing takes out what the two gaps share.
    assert found[2].change.standard_error < found[2].gaps[0].standard_error + found[2].gaps[1].standard_error


def test_the_command_says_each_answer_and_writes_the_table(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mechanism", "changes", str(folder), "qlora_nf4:qlora_nf4_dq"])
    mechanism.main()
    said = capsys.readouterr().out
    assert said.startswith("qlora_nf4 to qlora_nf4_dq: smaller. The gap is +0.09")
    (row,) = pd.read_csv(folder / "changes.csv").to_dict("records")
    assert (row["first"], row["last"], row["answer"], row["unit"]) == (
        "qlora_nf4",
        "qlora_nf4_dq",
        "smaller",
        "nats per token",
    )
    assert row["change_high"] < 0 and row["seeds"] == 3


def test_a_published_study_is_read_the_same_and_stays_as_it_is(folder, monkeypatch, capsys):
    pairs = [("qlora_nf4", "qlora_nf4_dq")]
    ran = measure_changes(read_study(folder), pairs)
    publish(folder)
    study = read_study(folder)
    assert measure_changes(study, pairs) == ran
    assert study.file(ITEMS) == folder / "compare/items.parquet" and study.file(ITEMS).is_file()
    files = set(folder.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["mechanism", "changes", str(folder), "qlora_nf4:qlora_nf4_dq"])
    mechanism.main()
    said = capsys.readouterr().out
    assert said.startswith("qlora_nf4 to qlora_nf4_dq: smaller.") and "is written" not in said
    assert set(folder.rglob("*")) == files
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--csv", str(folder.parent / "changes.csv")])
    mechanism.main()
    assert len(pd.read_csv(folder.parent / "changes.csv")) == 1


def test_a_published_study_without_its_items_is_refused(folder):
    publish(folder)
    (folder / "compare/items.parquet").unlink()
    with pytest.raises(UserError, match=r"made_up/compare/items.parquet is missing: it is not published\.$"):
        read_study(folder)


def test_what_is_no_pair_is_refused(folder, monkeypatch, capsys):
    with pytest.raises(UserError, match=r"has no qlora_nf5 \(did you mean qlora_nf4\?\)"):
        measure_changes(read_study(folder), [("qlora_nf4", "qlora_nf5")])
    monkeypatch.setattr(sys, "argv", ["mechanism", "changes", str(folder), "qlora_nf4"])
    with pytest.raises(SystemExit):
        mechanism.main()
    assert "qlora_nf4 is not FIRST:LAST" in capsys.readouterr().err
