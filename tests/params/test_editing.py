"""One section of a params file is edited, and every other character stays."""

import pytest
from ruamel.yaml import YAML

from workflow import params
from workflow.params import editing
from workflow.runtime.errors import UserError

DEFAULT = params.complete_text("default")
TEXT = """\
# Head.

first:   {a: 1}   # odd   spacing

# Of the section.
model:
  # Of the source.
  source: wheel
  package: p   # of the package
  # Of the date, in two
  # lines.
  chat_date: "2024-07-26"

# Of the last.
last: 1e-3
# The end.
"""
EDITED = """\
# Head.

first:   {a: 1}   # odd   spacing

# Of the section.
model:
  # Of the source.
  source: hub
  repository: a/b
  columns: {x: 'a: b', y: null}
  # Of the date, in two
  # lines.
  chat_date: "2024-07-26"

# Of the last.
last: 1e-3
# The end.
"""


def test_a_section_is_replaced_and_the_comments_of_its_keys_stay():
    columns = {"x": "a: b", "y": None}
    content = {"source": "hub", "repository": "a/b", "columns": columns, "chat_date": "2024-07-26"}
    assert editing.with_section(TEXT, "model", content) == EDITED


@pytest.mark.parametrize("name", ["model", "dataset"])
@pytest.mark.parametrize("preset", ["default", "smollm2_dolly", "tiny"])
def test_a_section_of_every_preset_can_be_replaced_by_another_presets(name, preset):
    text = params.complete_text(preset)
    content = YAML(typ="safe").load(DEFAULT)[name]
    edited = editing.with_section(text, name, content)
    assert YAML(typ="safe").load(edited) == YAML(typ="safe").load(text) | {name: content}
    outside = [line for line in text.splitlines() if line.startswith("#")]
    assert [line for line in edited.splitlines() if line.startswith("#")] == outside


def test_one_value_of_a_section_is_replaced():
    edited = editing.with_value(DEFAULT, "sample", "held_out_categories", [])
    before, after = DEFAULT.splitlines(), edited.splitlines()
    assert len(before) == len(after)
    assert [line for old, line in zip(before, after, strict=True) if old != line] == [
        "  held_out_categories: []"
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: {source: hub}\n", "no section model of its own lines"),
        ("other:\n  a: 1\n", "no section model of its own lines"),
        ("model:\n    source: wheel\n    path: a\n    keep: 1\n", "laid out in another way"),
    ],
)
def test_a_file_of_another_layout_is_left_alone(text, words):
    with pytest.raises(UserError, match=words):
        editing.with_section(text, "model", {"source": "hub", "keep": 1})
