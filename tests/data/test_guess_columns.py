"""The columns of a table are guessed by their names, as published data sets have them."""

import pytest

from workflow.data.guess_columns import guess_columns, named_columns
from workflow.runtime.errors import UserError


@pytest.mark.parametrize(
    ("names", "columns"),
    [
        # databricks-dolly-15k, alpaca, and others' shapes.
        (
            ["instruction", "context", "response", "category"],
            ("instruction", "context", "response", "category"),
        ),
        (["instruction", "input", "output", "text"], ("instruction", "input", "output", None)),
        (["prompt", "completion"], ("prompt", None, "completion", None)),
        (["Question", "Answer", "task_type"], ("Question", None, "Answer", "task_type")),
        (["input", "target"], ("input", None, "target", None)),
    ],
)
def test_a_table_of_instructions_is_known_by_its_names(names, columns):
    assert tuple(guess_columns(names).values()) == columns


def test_conversations_come_first():
    assert guess_columns(["prompt", "messages", "source"]) == {"messages": "messages", "category": "source"}
    assert guess_columns(["id", "conversations"]) == {"messages": "conversations", "category": None}


def test_a_name_that_no_one_uses_is_asked_for():
    with pytest.raises(UserError, match="no column is called as a response is"):
        guess_columns(["prompt", "foo"])
    assert named_columns("instruction=prompt,response=foo", ["prompt", "foo"])["response"] == "foo"
    with pytest.raises(UserError, match="response is to be the column bar, and there are prompt, foo"):
        named_columns("response=bar", ["prompt", "foo"])
    with pytest.raises(UserError, match="answer is not one of instruction, context, response, category"):
        named_columns("answer=foo", ["prompt", "foo"])
