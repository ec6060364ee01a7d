"""Rows are read whole or refused by name, sampled as the seed recipe does, and split without leakage."""

import itertools
import json
import random
from dataclasses import replace

import datasets
import pandas as pd
import pytest
from ruamel.yaml import YAML
from transformers import AutoTokenizer

from workflow import params
from workflow.data.choices import choose_from, scored_rows
from workflow.data.choices import render as render_row
from workflow.data.read import read as read_dataset
from workflow.data.rows import Instruction, as_rows, from_rows, from_scored_rows
from workflow.data.split import draw as draw_rows
from workflow.data.split import split as split_rows
from workflow.runtime.errors import UserError
from workflow.runtime.files import read_jsonl, write_jsonl
from workflow.runtime.paths import INSTRUCTIONS, MODEL, SAMPLE, split_file, train_rows_file
from workflow.stages.sample import sample

COLUMNS = {"instruction": "ask", "context": "ctx", "response": "say", "category": None}


TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Name a fruit."},
    {"role": "assistant", "content": "Apple"},
    {"role": "user", "content": " Another? "},
    {"role": "assistant", "content": "Pear\n"},
]


def source(kind: str = "jsonl", columns: dict | None = None) -> params.FileDataset:
    return params.FileDataset(
        source="file",
        path="x",
        sha256="0" * 64,
        format=kind,
        columns=None if kind == "chatterbot" else params.Columns(**(columns or COLUMNS)),
    )


def chats(kind: str = "jsonl", category: str | None = "topic") -> params.FileDataset:
    columns = params.ChatColumns(messages="talk", category=category)
    return params.FileDataset(source="file", path="x", sha256="0" * 64, format=kind, columns=columns)


def read_chat(tmp_path, turns) -> list[Instruction]:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"talk": turns}))
    return read_dataset(tmp_path / "rows.jsonl", chats(category=None))


def split(rows, **changes):
    asked = {"validation": 6, "test": 8, "seed": 3, "held_out_categories": []}
    return split_rows(rows, **asked | changes)


def scores(rows, tiny_model, *, held_out_categories=()):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    return scored_rows(rows, tokenizer, choice_seed=55, held_out_categories=list(held_out_categories))


def choose(row, rows, *, seed=55):
    return choose_from(row, rows, seed=seed)


def test_columns_are_renamed_and_order_is_kept(tmp_path):
    table = [{"ask": f" q{i} ", "ctx": None, "say": f"a{i} “ü”", "else": 1} for i in range(5)]
    (tmp_path / "rows.jsonl").write_text("\ufeff" + "\r\n".join(map(json.dumps, table)) + "\r\n\r\n")
    pd.DataFrame(table).to_csv(tmp_path / "rows.csv", index=False)
    pd.DataFrame(table).to_parquet(tmp_path / "rows.parquet")
    wanted = [Instruction(i, f"q{i}", "", f"a{i} “ü”", None) for i in range(5)]
    for kind in ("jsonl", "csv", "parquet"):
        assert read_dataset(tmp_path / f"rows.{kind}", source(kind)) == wanted


def test_of_a_conversation_the_last_answer_is_the_response_in_every_format(tmp_path):
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    sharegpt = [{"from": names[turn["role"]], "value": turn["content"]} for turn in TURNS]
    table = [
        {"talk": TURNS, "topic": "fruit"},
        {"talk": TURNS[1:3], "topic": None},
        {"talk": sharegpt, "topic": "x"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, table)))
    pd.DataFrame(table[:2]).to_parquet(tmp_path / "rows.parquet")
    as_text = [row | {"talk": json.dumps(row["talk"])} for row in table]
    pd.DataFrame(as_text).to_csv(tmp_path / "rows.csv", index=False)
    earlier = [dict(turn) for turn in TURNS[:3]]
    wanted = [
        Instruction(0, "Another?", "", "Pear", "fruit", earlier),
        Instruction(1, "Name a fruit.", "", "Apple", None),
        Instruction(2, "Another?", "", "Pear", "x", earlier),
    ]
    assert read_dataset(tmp_path / "rows.jsonl", chats()) == wanted
    assert read_dataset(tmp_path / "rows.parquet", chats("parquet")) == wanted[:2]
    from_csv = read_dataset(tmp_path / "rows.csv", chats("csv"))
    assert [replace(row, category=row.category or None) for row in from_csv] == wanted
    assert from_rows(json.loads(json.dumps(as_rows(wanted)))) == wanted
    assert ["earlier" in row for row in as_rows(wanted)] == [True, False, True]
    assert wanted[0].conversation() == {
        "prompt": [*earlier, {"role": "user", "content": "Another?"}],
        "completion": [{"role": "assistant", "content": "Pear"}],
    }


@pytest.mark.parametrize(
    ("turns", "sentence"),
    [
        ([], "rows.jsonl line 1 has no list of messages"),
        (None, "rows.jsonl line 1 has no list of messages"),
        ("[{", "rows.jsonl line 1 has messages that are text and not JSON"),
        (["Hi"], "message 1 of rows.jsonl line 1 is not an object with a role and a content"),
        (TURNS[:4], "rows.jsonl line 1 ends with a message of the user, and must end with one of the assistant"),
        (TURNS[2:3], "rows.jsonl line 1 has no message of the user right before the assistant's last"),
        ([*TURNS, TURNS[-1]], "rows.jsonl line 1 has no message of the user right before"),
        ([*TURNS[1:3], TURNS[0], *TURNS[1:3]], "message 3 of rows.jsonl line 1 is of the system"),
        ([{"role": "tool", "content": "x"}], "message 1 of rows.jsonl line 1 has the role tool; allowed is one of"),
        ([{"text": "x"}], "message 1 of rows.jsonl line 1 has text, which is not read and would be lost"),
        ([{"content": "x"}], "message 1 of rows.jsonl line 1 has the role None"),
        ([TURNS[1], {"role": "assistant", "content": " "}], "message 2 of rows.jsonl line 1 has no text"),
        ([TURNS[1], {"role": "assistant", "content": [{"text": " "}]}], "message 2 of rows.jsonl line 1 has no text"),
    ],
)  # fmt: skip
def test_a_bad_conversation_is_named(tmp_path, turns, sentence):
    with pytest.raises(UserError, match=sentence):
        read_chat(tmp_path, turns)


def test_a_conversation_and_its_continuation_are_never_in_two_splits(tmp_path):
    def conversation(number: int, turns: int) -> list[dict]:
        said = [{"role": "user", "content": f"Begin {number}"}, {"role": "assistant", "content": "Yes."}]
        for turn in range(turns):
            said += [
                {"role": "user", "content": f"Go on {turn}"},
                {"role": "assistant", "content": f"So {number}."},
            ]
        return said

    table = [{"talk": conversation(number, turns)} for number in range(20) for turns in range(3)]
    table[3]["talk"][0]["content"] = "  begin 1"
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, table)))
    rows = read_dataset(tmp_path / "rows.jsonl", chats(category=None))
    begun = {
        name: {" ".join(row.conversation()["prompt"][0]["content"].lower().split()) for row in members}
        for name, members in split(rows).items()
    }
    assert sum(map(len, begun.values())) == len(set().union(*begun.values())) == 20
    assert split(random.Random(0).sample(rows, len(rows))) == split(rows)


def test_earlier_turns_are_in_the_prompt_whose_tokens_are_not_scored(tmp_path, tiny_model):
    (row,) = read_chat(tmp_path, TURNS)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    prompt, opening = render_row(row, tokenizer)
    assert prompt == (
        "<s>Be brief.\n\n### Instruction:\nName a fruit.\n\n### Response:\nApple</s>"
        "### Instruction:\nAnother?\n\n### Response:\n"
    )
    assert opening == ""
    others = [Instruction(i, f"q{i}", "", f"a{i}", None) for i in range(1, 4)]
    scored, *rest = scores([row, *others], tiny_model)
    assert (scored["prompt"], scored["response_tokens"]) == ("Another?", 4) and "opening" not in scored
    assert scored["earlier"] == TURNS[:3] and not any("earlier" in other for other in rest)
    assert from_scored_rows([scored, *rest]) == [row, *others]


def test_chatterbot_gives_first_turn_and_second(tmp_path, capsys):
    (tmp_path / "b.yml").write_text("categories: [x]\nconversations:\n- - Hi\n  - Hello\n  - Bye\n")
    # In the real corpus a dash is missing once, and YAML makes one text of question and answer.
    (tmp_path / "a.yml").write_text("categories: [x]\nconversations:\n- - One\n  - Two\n- Three?\n  - Four\n")
    rows = read_dataset(tmp_path, source("chatterbot"))
    assert "a.yml conversation 2 lacks the dash before its first turn" in capsys.readouterr().out
    assert [(r.instruction, r.response, r.category) for r in rows] == [
        ("One", "Two", "a"),
        ("Three?", "Four", "a"),
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
        (
            '{"ask": 3, "ctx": "", "say": "a"}',
            "rows.jsonl line 1 has an instruction that is not text but a number",
        ),
        ('{"ask": "q", "ctx": ["c"], "say": "a"}', "rows.jsonl line 1 has a context that is not text"),
        ("{", "rows.jsonl line 1 is not JSON"),
        ("1", "rows.jsonl line 1 is not a JSON object"),
        ("", "rows.jsonl has no rows"),
    ],
)
def test_a_bad_row_is_named(tmp_path, text, sentence):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=sentence):
        read_dataset(path, source())


def test_text_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"ask": "\xff"}')
    with pytest.raises(UserError, match="rows.jsonl is not UTF-8"):
        read_dataset(path, source())


def test_the_sample_is_the_seed_recipes(rows):
    by_the_recipe = datasets.Dataset.from_list(as_rows(rows)).shuffle(seed=55).select(range(10))
    assert as_rows(draw_rows(rows, size=10, seed=55)) == list(by_the_recipe)


def test_fewer_rows_than_asked_for_is_said(rows):
    with pytest.raises(UserError, match="sample.rows asks for 41 rows, and the dataset has 40"):
        draw_rows(rows, size=41, seed=55)


def test_no_instruction_is_in_two_splits(rows):
    rows = [*rows, *(replace(row, instruction=row.instruction.upper() + "  ") for row in rows[:10])]
    splits = split(rows)
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
    assert split(shuffled) == split(rows)
    assert split(rows, seed=4) != split(rows)


@pytest.mark.parametrize(("validation", "test"), [(1, 39), (20, 20)])
def test_a_split_that_leaves_nothing_to_train_on_is_refused(rows, validation, test):
    with pytest.raises(UserError, match="leave nothing to train on"):
        split(rows, validation=validation, test=test)


def test_a_test_split_of_one_instruction_is_refused(rows):
    with pytest.raises(UserError, match="at least two different instructions"):
        split(rows, validation=1, test=1, seed=0)


def test_held_out_categories_are_in_the_test_split_alone(rows):
    whole, held_out = split(rows), split(rows, held_out_categories=["words"])
    assert held_out["test"] == whole["test"]
    assert {row.category for row in held_out["test"]} == {"counting", "words"}
    for name in ("train", "validation"):
        assert held_out[name] == [row for row in whole[name] if row.category == "counting"]


@pytest.mark.parametrize(
    ("change", "held_out", "sentence"),
    [
        ({}, ["rhymes"], "names rhymes, and no drawn row is of it; there are counting, words."),
        ({"category": None}, ["words"], "needs rows with a category, and the drawn rows have none."),
        ({}, ["words", "counting"], r"\(words, counting\) leaves nothing to train on."),
    ],
)
def test_categories_that_cannot_be_held_out_are_named(rows, change, held_out, sentence):
    with pytest.raises(UserError, match=f"sample.held_out_categories {sentence}"):
        split([replace(row, **change) for row in rows], held_out_categories=held_out)


def test_held_out_categories_that_leave_nothing_to_validate_on_are_refused(rows):
    of_validation = {row.group for row in split(rows)["validation"]}
    rows = [replace(row, category="odd" if row.group in of_validation else "even") for row in rows]
    with pytest.raises(UserError, match=r"sample.held_out_categories \(odd\) leaves nothing to validate on"):
        split(rows, held_out_categories=["odd"])


def test_context_stands_below_the_instruction_unless_it_is_dropped():
    row = Instruction(0, "Add.", "1 and 2", "3", None)
    assert row.user_message() == "Add.\n\n1 and 2"
    assert row.user_message(use_context=False) == "Add."


def test_response_lengths_are_those_of_the_response_alone(rows, tiny_model):
    scored = scores(rows, tiny_model)
    for row, made in zip(rows, scored, strict=True):
        assert (
            made["response_tokens"] == made["response_bytes"] == len(row.response.encode())
        )  # bytes are tokens
        assert made["prompt"] == row.user_message()
    assert from_scored_rows(scored) == rows


def test_a_row_says_whether_its_category_is_held_out(rows, tiny_model):
    held_out = [row["held_out"] for row in scores(rows, tiny_model, held_out_categories=["words"])]
    assert held_out == [row.category == "words" for row in rows]
    assert not any(row["held_out"] for row in scores(rows, tiny_model))


def test_scored_rows_are_plain_json(rows, tiny_model):
    scored = scores(rows, tiny_model)
    assert json.loads(json.dumps(scored)) == scored


@pytest.mark.parametrize("category", ["counting", None])
def test_the_right_response_stands_among_three_others_of_its_category(rows, category):
    rows = [replace(row, category=category) if row.category == "counting" else row for row in rows]
    answered = {row.response: row for row in rows}
    places = set()
    for row in rows:
        made = choose(row, rows)
        assert len({" ".join(text.casefold().split()) for text in made["choices"]}) == 4
        assert made["choices"][made["choice"]] == row.response
        others = [answered[text] for text in made["choices"] if text != row.response]
        assert all(other.category == row.category and other.group != row.group for other in others)
        assert made["same_category"]
        places.add(made["choice"])
    assert places == {0, 1, 2, 3}


def test_choices_depend_on_seed_and_texts_alone(rows):
    shuffled = random.Random(0).sample(rows, len(rows))
    renumbered = [replace(row, id=row.id + 7) for row in rows]
    first = [choose(row, rows) for row in rows]
    assert first == [choose(row, shuffled) for row in rows] == [choose(row, renumbered) for row in renumbered]
    assert first != [choose(row, rows, seed=56) for row in rows]


def test_another_row_changes_only_the_choices_that_it_is_drawn_for(rows):
    unrelated = Instruction(40, "Rhyme on blue", "", "Too true.", "rhymes")
    related = replace(unrelated, category="counting")
    before = [choose(row, rows) for row in rows]
    assert before == [choose(row, [unrelated, *rows]) for row in rows]
    after = [choose(row, [related, *rows]) for row in rows]
    changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert 0 < len(changed) < len(rows) / 4
    for old, new in changed:
        assert set(new["choices"]) - set(old["choices"]) == {"Too true."}


def test_the_same_words_are_no_other_response(rows):
    """Neither the right response in other letters, nor one distractor twice."""
    row, *others = rows[::2]
    copies = [replace(other, response=other.response.upper() + " ") for other in others]
    echo = replace(others[0], response=row.response.upper().replace(" ", "  "))
    made = choose(row, [row, echo, *others[:3], *copies[:3]])
    assert made["same_category"]
    assert len({" ".join(text.casefold().split()) for text in made["choices"]}) == 4


def test_a_small_category_is_filled_up_from_the_others(rows):
    few = [replace(row, category="rare") if row.id in (0, 8, 16) else row for row in rows]
    for row in few:
        made = choose(row, few)
        assert made["same_category"] == (row.category != "rare")
        if row.category == "rare":
            assert {few[i].response for i in (0, 8, 16)} < set(made["choices"])


def test_too_few_responses_to_choose_from_are_refused(rows, tiny_model):
    with pytest.raises(UserError, match="has 2 other responses .* of row 0, .* raise sample.test_rows"):
        scores([*rows[:4], replace(rows[3], response=rows[2].response)], tiny_model)


@pytest.mark.parametrize(
    ("held_out", "said"),
    [
        ([], None),
        (["words"], "held out: words: 4 test rows; left out of training are 13 rows, and of validation 3"),
    ],
)
def test_the_stage_says_and_counts_what_is_held_out(
    rows, tiny_model, tmp_path, monkeypatch, capsys, held_out, said
):
    asked = {"rows": 40, "seed": 55, "split_seed": 3, "validation_rows": 6, "test_rows": 8}
    yaml = YAML()
    content = yaml.load(params.complete_text("tiny"))
    content["sample"] |= asked | {"held_out_categories": held_out}
    with (tmp_path / "params.yaml").open("w") as file:
        yaml.dump(content, file)
    (tmp_path / MODEL).parent.mkdir(parents=True)
    (tmp_path / MODEL).symlink_to(tiny_model)
    write_jsonl(tmp_path / INSTRUCTIONS, as_rows(rows))
    monkeypatch.chdir(tmp_path)
    sample()
    metrics = json.loads((SAMPLE / "counts.json").read_text())
    splits = {name: read_jsonl(split_file(name)) for name in ("validation", "test")}
    splits["train"], of_second = (read_jsonl(train_rows_file(seed)) for seed in (1, 2))
    assert of_second == splits["train"]
    assert metrics == {
        "train_rows_by_seed": dict.fromkeys("12", len(splits["train"])),
        "train_rows_of_all_seeds": len(splits["train"]),
        "rows_to_draw_from": None,
        **{f"{name}_rows": len(members) for name, members in splits.items()},
        "held_out_rows": 4 if held_out else 0,
        "left_out_rows": 40 - sum(map(len, splits.values())),
        "choices_from_other_categories": sum(not row["same_category"] for row in splits["test"]),
        "near_duplicate_test_rows": 3,
        "near_duplicates_dropped": 0,
        "longer_than_context": 0,
        "shortened_responses": 0,
    }
    assert not any(row["category"] in held_out for row in splits["train"] + splits["validation"])
    printed = capsys.readouterr().out
    assert (said or "") in printed and ("held out" in printed) == bool(held_out)
    assert f"  {metrics['choices_from_other_categories']} test rows have a response of another" in printed


@pytest.mark.parametrize(
    ("labels", "categories"),
    [
        ([3, 10, -1], ["3", "10", "-1"]),
        ([3.0, 2.5, None], ["3", "2.5", None]),
        ([True, False, None], ["true", "false", None]),
    ],
)
def test_class_labels_that_are_numbers_are_categories_by_their_text(tmp_path, labels, categories):
    rows = [{"q": f"q{place}", "a": "b", "topic": label} for place, label in enumerate(labels)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pd.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    for form in ("jsonl", "parquet"):
        dataset = table_of(tmp_path / f"rows.{form}", form)
        assert [row.category for row in read_dataset(tmp_path / f"rows.{form}", dataset)] == categories
    (tmp_path / "rows.csv").write_text("q,a,topic\nq0,b,3\nq1,b,007\n")
    read = read_dataset(tmp_path / "rows.csv", table_of(tmp_path / "rows.csv", "csv"))
    assert [row.category for row in read] == ["3", "007"]


def test_class_labels_of_the_datasets_library_are_categories_by_their_names(tmp_path):
    features = datasets.Features(
        {
            "q": datasets.Value("string"),
            "a": datasets.Value("string"),
            "topic": datasets.ClassLabel(names=["x", "y"]),
        }
    )
    table = {"q": ["1", "2", "3"], "a": ["b"] * 3, "topic": [1, 0, -1]}
    datasets.Dataset.from_dict(table, features=features).to_parquet(tmp_path / "rows.parquet")
    rows = read_dataset(tmp_path / "rows.parquet", table_of(tmp_path / "rows.parquet", "parquet"))
    assert [row.category for row in rows] == ["y", "x", None]


def table_of(path, form) -> params.FileDataset:
    columns = params.Columns(instruction="q", context=None, response="a", category="topic")
    return params.FileDataset(source="file", path=str(path), sha256="0" * 64, format=form, columns=columns)
