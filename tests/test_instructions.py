"""Rows are read whole or refused by name, sampled as the seed recipe does, and split without leakage."""

import itertools
import json
import random
from dataclasses import replace

import datasets
import pandas as pd
import pytest
from transformers import AutoTokenizer

from workflow import instructions, params
from workflow.errors import UserError
from workflow.instructions import Instruction

COLUMNS = {"instruction": "ask", "context": "ctx", "response": "say", "category": None}


def source(kind: str = "jsonl", columns: dict | None = None) -> params.FileDataset:
    return params.FileDataset(
        source="file",
        path="x",
        sha256="0" * 64,
        format=kind,
        columns=None if kind == "chatterbot" else params.Columns(**(columns or COLUMNS)),
    )


def test_columns_are_renamed_and_order_is_kept(tmp_path):
    table = [{"ask": f" q{i} ", "ctx": None, "say": f"a{i} “ü”", "else": 1} for i in range(5)]
    (tmp_path / "rows.jsonl").write_text("\ufeff" + "\r\n".join(map(json.dumps, table)) + "\r\n\r\n")
    pd.DataFrame(table).to_csv(tmp_path / "rows.csv", index=False)
    pd.DataFrame(table).to_parquet(tmp_path / "rows.parquet")
    wanted = [Instruction(i, f"q{i}", "", f"a{i} “ü”", None) for i in range(5)]
    for kind in ("jsonl", "csv", "parquet"):
        assert instructions.read(tmp_path / f"rows.{kind}", source(kind)) == wanted


def test_chatterbot_gives_first_turn_and_second(tmp_path):
    (tmp_path / "b.yml").write_text("categories: [x]\nconversations:\n- - Hi\n  - Hello\n  - Bye\n")
    (tmp_path / "a.yml").write_text("categories: [x]\nconversations:\n- - One\n  - Two\n")
    rows = instructions.read(tmp_path, source("chatterbot"))
    assert [(r.instruction, r.response, r.category) for r in rows] == [
        ("One", "Two", "a"),
        ("Hi", "Hello", "b"),
    ]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            '{"ask": "q", "ctx": "", "say": "a"}\n{"ask": "q", "ctx": ""}',
            "rows.jsonl line 2 has no column say",
        ),
        ('{"ask": "q", "ctx": "", "say": null}', "rows.jsonl line 1 has no response"),
        ('{"ask": "q", "ctx": "", "say": "  "}', "rows.jsonl line 1 has no response"),
        ('{"ask": 3, "ctx": "", "say": "a"}', "rows.jsonl line 1 has no instruction"),
        ('{"ask": "q", "ctx": ["c"], "say": "a"}', "rows.jsonl line 1 has a context that is not text"),
        ("{", "rows.jsonl line 1 is not JSON"),
        ("[1]", "rows.jsonl line 1 is not a JSON object"),
        ("", "the dataset has no rows"),
    ],
)
def test_a_bad_row_is_named(tmp_path, text, sentence):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=sentence):
        instructions.read(path, source())


def test_text_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"ask": "\xff"}')
    with pytest.raises(UserError, match="rows.jsonl is not UTF-8"):
        instructions.read(path, source())


def test_the_sample_is_the_seed_recipes(rows):
    by_the_recipe = datasets.Dataset.from_list(instructions.as_rows(rows)).shuffle(seed=55).select(range(10))
    assert instructions.as_rows(instructions.sample(rows, size=10, seed=55)) == list(by_the_recipe)


def test_fewer_rows_than_asked_for_is_said(rows):
    with pytest.raises(UserError, match="sample.rows asks for 41 rows, and the dataset has 40"):
        instructions.sample(rows, size=41, seed=55)


def test_no_instruction_is_in_two_splits(rows):
    rows = [*rows, *(replace(row, instruction=row.instruction.upper() + "  ") for row in rows[:10])]
    splits = instructions.split(rows, validation=6, test=8, seed=3)
    groups = {name: {row.group for row in members} for name, members in splits.items()}
    assert (
        not groups["train"] & groups["test"]
        | groups["train"] & groups["validation"]
        | groups["validation"] & groups["test"]
    )
    assert sorted(map(repr, itertools.chain(*splits.values()))) == sorted(map(repr, rows))
    assert len(splits["test"]) >= 8 and len(splits["validation"]) >= 6


def test_the_split_depends_on_the_seed_alone_and_not_on_the_order(rows):
    shuffled = random.Random(0).sample(rows, len(rows))
    assert instructions.split(shuffled, validation=6, test=8, seed=3) == instructions.split(
        rows, validation=6, test=8, seed=3
    )
    assert instructions.split(rows, validation=6, test=8, seed=4) != instructions.split(
        rows, validation=6, test=8, seed=3
    )


@pytest.mark.parametrize(("validation", "test"), [(1, 39), (20, 20)])
def test_a_split_that_leaves_nothing_to_train_on_is_refused(rows, validation, test):
    with pytest.raises(UserError, match="leave nothing to train on"):
        instructions.split(rows, validation=validation, test=test, seed=3)


def test_a_test_split_of_one_instruction_is_refused(rows):
    with pytest.raises(UserError, match="at least two different instructions"):
        instructions.split(rows, validation=1, test=1, seed=0)


def test_context_stands_below_the_instruction_unless_it_is_dropped():
    row = Instruction(0, "Add.", "1 and 2", "3", None)
    assert row.user_message() == "Add.\n\n1 and 2"
    assert row.user_message(use_context=False) == "Add."


def test_response_lengths_are_those_of_the_response_alone(rows, tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for row, scored in zip(rows, instructions.scored_rows(rows, tokenizer), strict=True):
        assert (
            scored["response_tokens"] == scored["response_bytes"] == len(row.response.encode())
        )  # bytes are tokens
        assert scored["prompt"] == row.user_message()
    assert instructions.from_scored_rows(instructions.scored_rows(rows, tokenizer)) == rows


def test_one_row_per_instruction_keeps_the_order(rows):
    assert instructions.one_per_instruction(rows) == rows[::2]
