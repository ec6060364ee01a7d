"""Of a conversation nothing is left out in silence: what is not read stops the run by its name."""

import json

import pandas as pd
import pytest

from workflow import params
from workflow.data import conversations
from workflow.data.read import read as read_dataset
from workflow.data.rows import Instruction, as_rows, from_rows
from workflow.runtime.errors import UserError

ASKED = {"role": "user", "content": "Which?"}
SAID = {"role": "assistant", "content": "That."}
CALL = {"id": "c1", "type": "function", "function": {"name": "look_up", "arguments": "{}"}}
PICTURE = {"type": "image_url", "image_url": {"url": "a.png"}}


def read(path, rows: list[dict], kind: str = "jsonl") -> list[Instruction]:
    """The rows as the pipeline reads them from a file."""
    columns = params.ChatColumns(messages="messages", category=None)
    source = params.FileDataset(source="file", path="x", sha256="0" * 64, format=kind, columns=columns)
    file = path / f"rows.{kind}"
    match kind:
        case "jsonl":
            file.write_text("\n".join(map(json.dumps, rows)))
        case "parquet":
            pd.DataFrame(rows).to_parquet(file)
        case "csv":
            as_text = [{key: json.dumps(value) for key, value in row.items()} for row in rows]
            pd.DataFrame(as_text).to_csv(file, index=False)
    return read_dataset(file, source)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
@pytest.mark.parametrize(
    ("more", "name"),
    [
        ({"tool_calls": [CALL]}, "tool_calls"),
        ({"content": None, "tool_calls": [CALL]}, "tool_calls"),
        ({"function_call": {"name": "look_up", "arguments": "{}"}}, "function_call"),
        ({"tool_call_id": "c1"}, "tool_call_id"),
        ({"reasoning_content": "I think"}, "reasoning_content"),
        ({"thinking": "I think"}, "thinking"),
        ({"reasoning": "I think"}, "reasoning"),
        ({"name": "Ada"}, "name"),
        ({"prefix": True}, "prefix"),
        ({"train": False}, "train"),
        ({"images": ["a.png"]}, "images"),
        ({"refusal": "No."}, "refusal"),
    ],
)
def test_what_would_be_lost_of_a_message_is_refused_by_name(tmp_path, kind, more, name):
    rows = [{"messages": [ASKED, SAID]}, {"messages": [ASKED, SAID | more]}]
    with pytest.raises(UserError, match=rf"^message 2 of rows\.{kind} .* 2 has {name}, which is not read"):
        read(tmp_path, rows, kind)


@pytest.mark.parametrize(
    "name", ["tools", "functions", "documents", "system", "images", "chat_template_kwargs"]
)
def test_a_column_that_would_change_the_prompt_is_refused_by_name(tmp_path, name):
    rows = [{"messages": [ASKED, SAID], name: []}, {"messages": [ASKED, SAID], name: ["Be brief."]}]
    assert len(read(tmp_path, rows[:1])) == 1
    with pytest.raises(
        UserError, match=f"^rows.jsonl line 2 has {name} beside its messages, which would be lost"
    ):
        read(tmp_path, rows)
    assert conversations.check_row(rows[1], {name}, "a row") is None  # params name it: a category, say


def test_what_says_nothing_is_not_missed(tmp_path):
    nothing = {"tool_calls": [], "name": "", "reasoning_content": None, "id": "m1", "timestamp": 3, "weight": None,
               "function_call": {"name": None, "arguments": None}}  # fmt: skip
    rows = [{"messages": [ASKED, SAID | nothing], "tools": "[]", "source": "me"}]
    (row,) = read(tmp_path, rows)
    assert (row.instruction, row.response, row.earlier) == ("Which?", "That.", [])


def test_the_last_answer_with_a_weight_is_the_response(tmp_path):
    def answer(text, weight):
        return {"role": "assistant", "content": text, "weight": weight}

    talk = [ASKED, answer("One.", 0), ASKED, answer("Two.", 1), ASKED, answer("Three.", 0)]
    rows = [{"messages": talk}, {"messages": [ASKED, answer("Four.", 1.0)]}]
    first, second = read(tmp_path, rows)
    assert (first.response, len(first.earlier), first.not_learned) == ("Two.", 2, [1])
    assert (second.response, second.not_learned) == ("Four.", [])
    assert set(first.earlier[1]) == {"role", "content"}
    assert from_rows(json.loads(json.dumps(as_rows([first, second])))) == [
        first,
        second,
    ]
    for weight, sentence in ((0, "has no answer to learn"), (0.5, "the weight 0.5; allowed is 0"),
                             (True, "the weight True; allowed"), ("0", "the weight 0; allowed"), (-1, "the weight -1;")):  # fmt: skip
        with pytest.raises(UserError, match=sentence):
            read(tmp_path, [{"messages": [ASKED, answer("No.", weight)]}])


def test_text_parts_are_read_one_after_the_other_and_others_refused(tmp_path):
    parts = [
        {"type": "text", "text": "Which "},
        {"type": "text", "text": "grain?", "cache_control": {"a": 1}},
    ]
    for kind in ("jsonl", "parquet", "csv"):
        row = {
            "messages": [ASKED | {"content": parts}, SAID | {"content": [{"type": "text", "text": "Rye."}]}]
        }
        (found,) = read(tmp_path, [row], kind)
        assert (found.instruction, found.response) == ("Which grain?", "Rye.")
    for part, sentence in (
        (PICTURE, "part 2 of message 1 of rows.jsonl line 1 is of type image_url; parts of type text"),
        ({"type": "text", "text": None}, "part 2 of message 1 .* is of type text; parts of type text alone"),
        (
            {"type": "text", "text": "a", "citations": ["b"]},
            "part 2 of message 1 .* has citations, which is not",
        ),
        (7, "part 2 of message 1 .* is neither text nor an object"),
    ):
        with pytest.raises(UserError, match=sentence):
            read(tmp_path, [{"messages": [ASKED | {"content": [parts[0], part]}, SAID]}])
    with pytest.raises(
        UserError, match="message 1 of .* has a content that is neither text nor a list of parts"
    ):
        read(tmp_path, [{"messages": [ASKED | {"content": {"text": "a"}}, SAID]}])


@pytest.mark.parametrize(
    ("user", "assistant"),
    [("User", "ASSISTANT"), ("Human", "Bot"), ("HUMAN", "GPT"), ("user ", "Ai"), ("prompter", "model")],
)
def test_roles_are_read_in_any_letters(tmp_path, user, assistant):
    (row,) = read(tmp_path, [{"messages": [ASKED | {"role": user}, SAID, ASKED, SAID | {"role": assistant}]}])
    assert [turn["role"] for turn in row.earlier] == ["user", "assistant"]
    (row,) = read(tmp_path, [{"messages": [{"from": user, "value": "a"}, {"from": assistant, "value": "b"}]}])
    assert (row.instruction, row.response) == ("a", "b")
    with pytest.raises(UserError, match="message 1 .* has both role and from, which differ"):
        read(tmp_path, [{"messages": [ASKED | {"from": "gpt"}, SAID]}])


@pytest.mark.parametrize("content", ["", "  \n", None])
def test_an_empty_system_message_is_one_that_says_nothing(tmp_path, content):
    (row,) = read(tmp_path, [{"messages": [{"role": "System", "content": content}, ASKED, SAID]}])
    assert row.conversation()["prompt"] == [{"role": "system", "content": ""}, ASKED]
