"""What holds for any params file and any text: hypothesis looks for one for which it does not.

In CI the examples are the same each time; elsewhere they are others each time.
"""

import copy
import csv
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from conftest import CPU, PRESETS
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from workflow import params
from workflow.data import chat, texts
from workflow.data.choices import choose_from, scored_rows
from workflow.data.choices import render as render_row
from workflow.data.read import read as read_dataset
from workflow.data.rows import Instruction, as_rows, from_rows, plain
from workflow.data.sample import check_special_tokens
from workflow.data.split import draw as draw_rows
from workflow.data.split import split as split_rows
from workflow.models.load import load_base
from workflow.runtime.errors import UserError
from workflow.runtime.files import read_jsonl, write_jsonl
from workflow.training import train
from workflow.training.rows import check_rows
from workflow.training.speed.fused import IGNORED


def examples(most: int) -> settings:
    return settings(
        max_examples=most,
        deadline=None,
        database=None,
        derandomize="RANDOM_EXAMPLES"
        not in os.environ,  # the same ones in every run, unless others are asked for
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )


# Params

FILES = {name: params.complete_text(name) for name in PRESETS}
CONTENTS = {name: YAML(typ="safe", pure=True).load(text) for name, text in FILES.items()}
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([10**9 + 1, 2**32, 2**70, -(10**30), 10**400]),
    st.floats(),
    st.sampled_from(["", "auto", "cpu", "16bit", "hub", "holdout_loss/nats_per_token", "a/b", "../x", "yes", "1e-3"]),
    st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), max_size=9),
    st.sampled_from(["a\nb", "\x1b[2J", "\0"]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abcz_-/.", max_size=5), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def places(content: Any, above: tuple = ()) -> list[tuple]:
    """The way to every value of a params file, sections and items of lists among them."""
    inner = (
        content.items()
        if isinstance(content, dict)
        else enumerate(content)
        if isinstance(content, list)
        else ()
    )
    return [place for key, value in inner for place in ((*above, key), *places(value, (*above, key)))]


@st.composite
def mutations(draw) -> tuple[dict, tuple]:
    """The content of a valid file after one change, and where that was."""
    content = copy.deepcopy(CONTENTS[draw(st.sampled_from(sorted(CONTENTS)))])
    place = draw(st.sampled_from(places(content)))
    holder = content
    for key in place[:-1]:
        holder = holder[key]
    change = draw(st.sampled_from(["drop", "replace", "replace", "replace", "add"]))
    if change == "drop":
        del holder[place[-1]]
    elif change == "replace":
        holder[place[-1]] = draw(VALUES)
    elif isinstance(holder, dict):
        new = draw(st.text("abcdefz_", min_size=1, max_size=8).filter(lambda key: key not in holder))
        holder[new], place = draw(VALUES), (*place[:-1], new)
    else:
        holder.append(draw(VALUES))
    return content, place


@examples(120)
@given(mutations())
def test_a_changed_params_file_is_taken_whole_or_refused_by_its_key(tmp_path, mutation):
    content, place = mutation
    path = tmp_path / "params.yaml"
    with path.open("w", encoding="utf-8") as file:
        YAML(typ="safe", pure=True).dump(content, file)
    try:
        loaded = params.load(path)
    except UserError as refused:
        sentence = str(refused)
        lines = sentence.splitlines()
        assert all(line.isprintable() and len(line) < 1200 for line in lines) and sentence.endswith(
            (".", "?")
        )
        named = any(str(key) in sentence for key in place if not isinstance(key, int))
        assert named or "is not valid YAML" in sentence  # some texts are written so that they are no YAML
        return
    with path.open("w", encoding="utf-8") as file:
        YAML(typ="safe", pure=True).dump(loaded.model_dump(mode="json"), file)
    assert params.load(path) == loaded


@examples(60)
@given(st.sampled_from(sorted(FILES)), st.data())
def test_a_params_file_with_other_characters_is_taken_or_refused(tmp_path, name, data):
    text = FILES[name]
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 30)))
    put = data.draw(
        st.text(st.characters(codec="utf-8"), max_size=4) | st.text("[]{}:,#&*!|>'\"%@`-? \n\t0", max_size=8)
    )
    (tmp_path / "params.yaml").write_text(text[:start] + put + text[end:], encoding="utf-8", newline="")
    try:
        params.load(tmp_path / "params.yaml")
    except UserError as refused:
        assert all(line.isprintable() for line in str(refused).splitlines()) and str(refused).endswith(
            (".", "?")
        )


# Rows

# What templates, tokenizers and files give a meaning to, among any other characters.
PIECES = st.sampled_from(
    ["<s>", "</s>", "<pad>", "<|im_end|>", "<|im_start|>user\n", "[INST]", "### Response:\n", "{{ messages }}", "{% raw %}",
     '"', ",", "\r\n", "\n", "\r", "\0", "\u2028", "\ufeff", "\u202e", "שלום", "e\u0301", "👩‍👩‍👧", "\\ud800", "None"]
)  # fmt: skip
TEXTS = st.lists(PIECES | st.text(max_size=6), max_size=5).map("".join)
SEEN = TEXTS.filter(texts.says_something)
COLUMNS = {"instruction": "q", "context": "c", "response": "a", "category": "k"}


def source(form: str) -> params.FileDataset:
    return params.FileDataset(
        source="file", path="x", sha256="0" * 64, format=form, columns=params.Columns(**COLUMNS)
    )


@st.composite
def tables(draw, texts=SEEN, most: int = 12) -> list[Instruction]:
    """Rows that often share an instruction, or all of their text."""
    few = draw(st.lists(texts, min_size=1, max_size=6))
    return [
        Instruction(
            id=number,
            instruction=draw(st.sampled_from(few)).strip(),
            context=draw(TEXTS if texts is SEEN else texts).strip(),
            response=draw(texts).strip(),
            category=draw(st.sampled_from([None, "a", "b"])),
        )
        for number in range(draw(st.integers(1, most)))
    ]


def write(path: Path, form: str, rows: list[dict]) -> None:
    match form:
        case "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        case "csv":
            with path.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, list(COLUMNS.values()))
                writer.writeheader()
                writer.writerows(rows)
        case "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
@examples(60)
@given(
    table=st.lists(
        st.fixed_dictionaries({"q": TEXTS, "c": TEXTS, "a": TEXTS, "k": TEXTS}), min_size=1, max_size=6
    )
)
def test_texts_come_out_of_a_file_as_they_went_in_or_are_refused(tmp_path, form, table):
    path = tmp_path / f"rows.{form}"
    write(path, form, table)
    silent = [n for n, row in enumerate(table, 1) if not all(map(texts.says_something, (row["q"], row["a"])))]
    try:
        rows = read_dataset(path, source(form))
    except UserError as refused:
        assert silent and f" {silent[0]} has no " in str(refused)
        return
    assert not silent
    assert [(row.instruction, row.context, row.response, row.category) for row in rows] == [
        (row["q"].strip(), row["c"].strip(), row["a"].strip(), row["k"]) for row in table
    ]
    write_jsonl(tmp_path / "stored.jsonl", as_rows(rows))
    assert from_rows(read_jsonl(tmp_path / "stored.jsonl")) == rows


@examples(60)
@given(
    content=st.binary(max_size=80) | st.text('{}[]":,\\nqa 0u', max_size=40).map(str.encode), data=st.data()
)
def test_a_file_of_any_bytes_is_read_or_refused(tmp_path, content, data):
    form = data.draw(st.sampled_from(["jsonl", "csv", "parquet", "chatterbot"]))
    path = tmp_path / f"rows.{form}"
    path.write_bytes(content)
    asked = source("jsonl").model_copy(update={"format": form})
    try:
        read_dataset(path, asked)
    except UserError as refused:
        assert path.name in str(refused) and str(refused).isprintable()


@examples(25)
@given(tables(most=30), st.integers(0, 2**32 - 1), st.data())
def test_a_sample_is_that_of_shuffle_and_select(rows, seed, data):
    size = data.draw(st.integers(1, len(rows)))
    table = datasets.Dataset.from_list([{"id": row.id, "response": row.response} for row in rows])
    wanted = table.shuffle(seed=seed).select(range(size))
    drawn = draw_rows(rows, size=size, seed=seed)
    assert [(row.id, row.response) for row in drawn] == [(row["id"], row["response"]) for row in wanted]
    assert len({row.id for row in drawn}) == size


@examples(120)
@given(tables(most=24), st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**32 - 1), st.data())
def test_a_split_parts_the_rows_by_what_is_said_first(rows, validation, test, seed, data):
    how = {"validation": validation, "test": test, "seed": seed, "held_out_categories": []}
    groups = Counter(row.group for row in rows)
    try:
        splits = split_rows(rows, **how)
    except UserError as refused:
        # Whole groups fill the splits in turn: only where they are few or large is nothing left.
        assert "nothing to train on" in str(refused) or "two different instructions" in str(refused)
        most = max(groups.values())
        assert len(rows) <= validation + test + 2 * (most - 1) or test <= most
        return
    assert sorted(row.id for members in splits.values() for row in members) == list(range(len(rows)))
    found = {name: {row.group for row in members} for name, members in splits.items()}
    assert sum(map(len, found.values())) == len(groups)
    for name, wanted in (("test", test), ("validation", validation)):
        # As many as asked for, and the last group whole.
        assert wanted <= len(splits[name]) < wanted + max(groups[group] for group in found[name])
    again = split_rows(data.draw(st.permutations(rows)), **how)
    assert {name: [row.texts() for row in members] for name, members in again.items()} == {
        name: [row.texts() for row in members] for name, members in splits.items()
    }


@examples(60)
@given(tables(most=16), st.integers(0, 2**32 - 1))
def test_choices_are_four_different_responses_with_the_right_one_among_them(rows, seed):
    for row in rows:
        others = {plain(other.response) for other in rows if other.group != row.group}
        enough = len(others - {plain(row.response)}) >= 3
        try:
            made = choose_from(row, rows, seed=seed)
        except UserError:
            assert not enough
            continue
        assert enough and made["choices"][made["choice"]] == row.response
        assert len({plain(choice) for choice in made["choices"]}) == 4


# Formatting

SPECIAL = ["<s>", "</s>", "<pad>"]


@pytest.fixture(scope="module")
def tokenizers(tiny_model) -> dict[str, PreTrainedTokenizerFast]:
    """One of single bytes, and one that merges them, across the end of the prompt as well."""
    merging = Tokenizer(models.BPE())
    merging.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    merging.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    merging.train_from_iterator(
        ["### Response:\nIt is.", "Response:\nThe", "[/INST] It", "[/INST] The ", "e e e"] * 9, trainer
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return {
        "bytes": AutoTokenizer.from_pretrained(tiny_model),
        "merges": PreTrainedTokenizerFast(tokenizer_object=merging, **names),
    }


@examples(100)
@given(rows=tables(most=4), kind=st.sampled_from(["bytes", "merges"]))
def test_a_text_with_the_models_own_token_is_refused_and_no_other(tokenizers, rows, kind):
    own = [row.id for row in rows if any(token in text for token in SPECIAL for text in row.texts())]
    try:
        check_special_tokens(rows, tokenizers[kind])
    except UserError as refused:
        more = f"(and {len(own) - 1} more rows)" if len(own) > 1 else "in its"
        assert own and f"row {own[0]} of the dataset" in str(refused) and more in str(refused)
    else:
        assert not own


PLAIN = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12) | st.sampled_from(
    ["### Response:\nIt", "[/INST] The", "<|im_end|>", "{{ bos_token }}", "\u202eשלום", "The e\u0301", "😀", "It is", "a\r\nb"]
)  # fmt: skip
LEARNED = PLAIN.filter(
    lambda text: texts.says_something(text) and not any(token in text for token in SPECIAL)
)


@pytest.mark.parametrize("template", ["instruction", "llama2_inst"])
@pytest.mark.parametrize("kind", ["bytes", "merges"])
@examples(6)
@given(rows=st.data())
def test_any_response_is_learned_whole_with_one_first_and_one_end_token(
    tiny, tiny_model, tokenizers, tmp_path_factory, kind, template, rows
):
    drawn = rows.draw(tables(texts=LEARNED, most=12))
    tokenizer = copy.deepcopy(tokenizers[kind])
    tokenizer.chat_template = (
        (chat.CHAT_TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8").rstrip("\n")
    )
    variant = tiny.variants["lora_16bit"]
    asked = tiny.training.model_copy(update={"max_length": 2048})
    model, precision = load_base(tiny_model, variant, hardware=CPU)
    trainer = train.build_trainer(
        model, tokenizer, params.Run("drawn", variant, 1, asked, CPU), train_rows=drawn, validation_rows=drawn[:1],
        precision=precision, scratch=tmp_path_factory.mktemp("scratch"),
    )  # fmt: skip
    assert len(trainer.train_dataset) == len(drawn)
    for row, made in zip(drawn, trainer.train_dataset, strict=True):
        prompt, opening = render_row(row, tokenizer)
        ids, labels = made["input_ids"], made["labels"]
        start = next(place for place, label in enumerate(labels) if label != IGNORED)
        assert all(label == IGNORED for label in labels[:start]) and labels[start:] == ids[start:]
        learned = tokenizer.decode(labels[start:])
        assert row.response in learned and learned.endswith("</s>")
        assert (
            tokenizer.decode(ids)
            == prompt
            + opening
            + row.response
            + learned[learned.index(opening + row.response) + len(opening + row.response) :]
        )
        assert ids.count(tokenizer.bos_token_id) == 1 == labels.count(tokenizer.eos_token_id)
        assert ids[0] == tokenizer.bos_token_id and labels[-1] == tokenizer.eos_token_id
    check_rows(trainer.train_dataset, tokenizer, drawn=len(drawn), training=asked)


@examples(60)
@given(row=tables(texts=LEARNED, most=1), template=st.sampled_from(["instruction", "llama2_inst"]))
def test_a_scored_response_has_the_tokens_that_follow_its_prompt(tokenizers, row, template):
    (one,) = row
    assume(not one.earlier)
    others = [Instruction(number, f"other {number}", "", f"say {number}", None) for number in range(1, 5)]
    tokenizer = copy.deepcopy(tokenizers["bytes"])
    tokenizer.chat_template = (
        (chat.CHAT_TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8").rstrip("\n")
    )
    scored, *_ = scored_rows([one, *others], tokenizer, choice_seed=1, held_out_categories=[])
    assert scored["response_tokens"] == scored["response_bytes"] == len(one.response.encode())
