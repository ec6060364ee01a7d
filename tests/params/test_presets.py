"""A preset is what differs from the default params, and one command makes a complete params file of it."""

import subprocess
import sys

import pytest
from conftest import PRESETS, ROOT
from ruamel.yaml import YAML

from workflow import params
from workflow.params import commented, presets

CHANGING = [name for name in PRESETS if name != "default"]


def plain(text: str) -> dict:
    return YAML(typ="safe", pure=True).load(text)


def tagged(name: str) -> dict:
    """A preset's own file, with the tags of its mappings."""
    return YAML().load((presets.FOLDER / f"{name}.yaml").read_text())


def replaces(value) -> bool:
    return isinstance(value, dict) and value.tag.value == commented.REPLACE


def merged(default: dict, changes: dict) -> dict:
    """The rule that each preset begins with, on values alone."""
    result = dict(default)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(default.get(key), dict) and not replaces(value)
        result[key] = merged(default[key], value) if both else value
    return result


def in_order(value):
    """A value that equals another only if their keys have the same order."""
    if isinstance(value, dict):
        return [(key, in_order(inner)) for key, inner in value.items()]
    return [in_order(inner) for inner in value] if isinstance(value, list) else value


def repeated(default: dict, changes: dict, path: str = "") -> list[str]:
    """The keys of a preset that change nothing, and the mappings that it replaces where a merge gives the same."""
    keys = []
    for key, value in changes.items():
        if key not in default:
            continue
        if replaces(value):
            if in_order(merged(default[key], dict(value))) == in_order(value):
                keys.append(f"{path}{key}: {commented.REPLACE}")
        elif isinstance(value, dict) and isinstance(default[key], dict):
            keys += repeated(default[key], value, f"{path}{key}.")
        elif value == default[key]:
            keys.append(f"{path}{key}")
    return keys


def test_the_committed_params_are_the_default():
    assert (ROOT / "params.yaml").read_text() == params.complete_text("default")


@pytest.mark.parametrize("name", CHANGING)
def test_a_preset_is_merged_as_its_first_line_says(name):
    expected = merged(plain(params.complete_text("default")), tagged(name))
    assert in_order(plain(params.complete_text(name))) == in_order(expected)
    first_line = (presets.FOLDER / f"{name}.yaml").read_text().splitlines()[0]
    assert commented.REPLACE in first_line and commented.REPLACE not in params.complete_text(name)


@pytest.mark.parametrize("name", CHANGING)
def test_a_preset_repeats_nothing_of_the_default(name):
    assert not repeated(plain(params.complete_text("default")), tagged(name))


def test_comments_are_those_of_the_default_unless_the_preset_has_its_own():
    default = """# schema
# The default.

a:
  # Of x and y.
  x: 1
  y: 2
# Of b.
b: {}

c:
  # Of source.
  source: old
  # Of gone.
  gone: 1
"""
    changes = """# rule
# Preset.

a:
  y: 3
  # Of z.
  z: [1, 2]

b:
  # Of l.
  l: 1

c: !replace
  source: new
  # Of added.
  added: 1
"""
    head, sections = commented.split_head(default)
    assert commented.merge(sections, []) == sections
    text = commented.render(head, commented.merge(sections, commented.split_head(changes)[1]))
    assert (
        text
        == """# schema
# The default.

a:
  # Of x and y.
  x: 1
  y: 3
  # Of z.
  z: [1, 2]

# Of b.
b:
  # Of l.
  l: 1

c:
  # Of source.
  source: new
  # Of added.
  added: 1
"""
    )
    assert dict(commented.comments(sections)) == {
        ("a", "x"): "Of x and y.",
        ("a", "y"): "Of x and y.",
        ("b",): "Of b.",
        ("c", "source"): "Of source.",
        ("c", "gone"): "Of gone.",
    }


def test_a_mapping_on_one_line_is_merged_key_by_key_too():
    default = "# The default.\n\na:\n  b: {x: 1, y: [1, 2], z: {}, w: {m: 1, n: 2}}\n  c: {x: 1}\n"
    changes = "# Preset.\n\na:\n  b: {y: [3, 4], z: {l: 1}, w: {n: 3}, v: {k: 1, l: 2}}\n"
    entries = [commented.split_head(text)[1] for text in (default, changes)]
    text = commented.render(["# The default."], commented.merge(*entries))
    assert text == default.replace(
        "{x: 1, y: [1, 2], z: {}, w: {m: 1, n: 2}}",
        "{x: 1, y: [3, 4], z: {l: 1}, w: {m: 1, n: 3}, v: {k: 1, l: 2}}",
    )


def run(folder, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "workflow.params", *arguments],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def test_a_command_writes_the_complete_file(tmp_path):
    assert run(tmp_path, "preset", "tiny").returncode == 0
    assert run(tmp_path, "preset", "default", "--output", "other.yaml").returncode == 0
    assert (tmp_path / "params.yaml").read_text() == params.complete_text("tiny")
    assert (tmp_path / "other.yaml").read_text() == params.complete_text("default")


def test_an_unknown_preset_is_one_sentence(tmp_path):
    done = run(tmp_path, "preset", "tyny")
    assert done.returncode == 1 and not list(tmp_path.iterdir())
    known = ", ".join(PRESETS)
    assert done.stderr == f"params: tyny is not a preset; known are {known} (did you mean tiny?).\n"
