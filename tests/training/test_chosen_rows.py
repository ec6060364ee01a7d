"""A run trains on the first rows of the sample, without the categories that it leaves out."""

from pathlib import Path

import pytest
from conftest import CPU
from safetensors.torch import load_file

from workflow import params
from workflow.data.rows import Instruction
from workflow.runtime.errors import UserError
from workflow.training import train
from workflow.training.rows import chosen


def changed(tiny, **changes) -> params.Training:
    return tiny.training.model_copy(update=changes)


def run(tiny, tiny_model, train_rows, validation_rows, folder: Path, **changes) -> train.Trained:
    folder.mkdir()
    return train.train(
        params.Run("lora_16bit", tiny.variants["lora_16bit"], 1, changed(tiny, **changes), CPU),
        model_folder=tiny_model,
        train_rows=train_rows,
        validation_rows=validation_rows,
        folder=folder,
    )


def of(rows: list[Instruction], *categories: str) -> list[Instruction]:
    return [row for row in rows if row.category in categories]


def test_by_default_every_row_is_used(tiny, splits):
    pair = splits["train"], splits["validation"]
    assert chosen(*pair, tiny.training) == pair


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({"rows": 8}, lambda rows, validation: (rows[:8], validation)),
        (
            {"left_out_categories": ["words"]},
            lambda rows, validation: (of(rows, "counting"), of(validation, "counting")),
        ),
        (
            {"rows": 8, "left_out_categories": ["words"]},
            lambda rows, validation: (of(rows, "counting")[:8], of(validation, "counting")),
        ),
    ],
    ids=["rows", "categories", "both"],
)
def test_a_run_is_one_on_these_rows_alone(changes, kept, tiny, tiny_model, splits, tmp_path):
    ours = run(tiny, tiny_model, splits["train"], splits["validation"], tmp_path / "ours", **changes)
    rows, validation = kept(splits["train"], splits["validation"])
    assert 0 < len(rows) < len(splits["train"]) and validation
    alone = run(tiny, tiny_model, rows, validation, tmp_path / "alone")
    assert ours.order_sha256 == alone.order_sha256 and ours.rows == alone.rows
    assert ours.rows.rows == len(rows) and ours.validation_rows.rows == len(validation)
    assert ours.validation_loss_after == alone.validation_loss_after
    files = [tmp_path / name / "weights/adapter_model.safetensors" for name in ("ours", "alone")]
    assert files[0].read_bytes() == files[1].read_bytes() and load_file(files[0])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rows": 27}, r"rows is 27, and the sample has 26 training rows\.$"),
        (
            {"rows": 26, "left_out_categories": ["words"]},
            r"rows is 26, and the sample has \d+ training rows besides those of words\.$",
        ),
        (
            {"left_out_categories": ["word"]},
            r"left_out_categories names word, and no training or validation row is of it; they are of counting, words "
            r"\(did you mean words\?\)\.$",
        ),
        (
            {"left_out_categories": ["words", "counting"]},
            r"left_out_categories \(words, counting\) leaves nothing to train on\.$",
        ),
    ],
    ids=["too many", "too many of a part", "unknown", "nothing left"],
)
def test_rows_that_there_are_not_are_refused_in_one_sentence(changes, sentence, tiny, splits):
    with pytest.raises(UserError, match=f"^training.schedule.{sentence}"):
        chosen(splits["train"], splits["validation"], changed(tiny, **changes))


def test_a_category_cannot_be_left_out_of_rows_without_one(tiny, splits):
    rows = [Instruction(row.id, row.instruction, "", row.response, None) for row in splits["train"]]
    with pytest.raises(UserError, match=r"no training or validation row is of it; they have no category\.$"):
        chosen(rows, rows, changed(tiny, left_out_categories=["words"]))
