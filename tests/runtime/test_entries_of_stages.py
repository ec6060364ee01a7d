"""What a starting stage reads from dvc.yaml by itself is what DVC reads there."""

import itertools
import shutil

import pytest
from conftest import ROOT

from workflow import params
from workflow.runtime import dvc_yaml
from workflow.runtime.dvc_lock import value_at
from workflow.runtime.files import read_yaml


@pytest.fixture
def folder(tmp_path, monkeypatch):
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    tuned = "  candidates: {low: {variant: lora_16bit, learning_rate: 1.0e-4}, nf4_high: {variant: qlora_nf4, learning_rate: 3.0e-3}}"
    (tmp_path / "params.yaml").write_text(params.complete_text("tiny").replace("  candidates: {}", tuned))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def items_of(definition: dict, values: dict) -> list[dict]:
    """The items of a stage's matrix, each of whose lists is a reference to params, or the keys of its mapping."""
    if "foreach" in definition:
        return [{"key": key} for key in value_at(values, definition["foreach"][2:-1])]
    lists = {
        name: [value_at(values, one[2:-1]) for one in entry]
        if isinstance(entry, list)
        else value_at(values, entry[2:-1])
        for name, entry in definition.get("matrix", {}).items()
    }
    return [dict(zip(lists, item, strict=True)) for item in itertools.product(*lists.values())]


def test_a_stage_reads_what_dvc_says_that_it_does(folder):
    values = read_yaml(folder / "params.yaml")
    by_dvc = dvc_yaml.definitions()
    own = [
        dvc_yaml.entries_of(name, item)
        for name, definition in read_yaml(folder / "dvc.yaml")["stages"].items()
        for item in items_of(definition, values)
    ]
    assert {entries.stage for entries in own} == by_dvc.keys()
    for entries in own:
        assert len(set(entries.deps)) == len(entries.deps) > 0
        assert set(entries.deps) == by_dvc[entries.stage].deps
        assert set(entries.params) == by_dvc[entries.stage].params


def test_a_stage_that_dvc_yaml_does_not_have_reads_nothing_that_is_known(folder):
    assert dvc_yaml.entries_of("nothing", {}) is None
    (folder / "dvc.yaml").unlink()
    assert dvc_yaml.entries_of("train", {}) is None
