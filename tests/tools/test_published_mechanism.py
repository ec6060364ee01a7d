"""The published comparisons of moved and of healed bases can be made again from the studies beside them."""

import shutil
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from workflow.runtime.files import read_json
from workflow.tools import mechanism

PUBLISHED = ROOT / "results/mechanism"
TABLES = (mechanism.GAPS, mechanism.LOSSES, mechanism.TEXT)


@pytest.mark.parametrize(("action", "name"), [("compare", "moved"), ("depths", "depths")])
def test_a_published_comparison_is_that_of_its_studies(action, name, tmp_path, monkeypatch):
    studies = sorted((PUBLISHED / name / "studies").iterdir())
    assert len(studies) == {"moved": 4, "depths": 3}[name]
    monkeypatch.setattr(sys, "argv", ["mechanism", action, *map(str, studies), "--folder", str(tmp_path)])
    mechanism.main()
    for table in TABLES:
        assert (tmp_path / table).read_text() == (PUBLISHED / name / table).read_text(), table


@pytest.mark.parametrize("name", ["moved", "depths"])
def test_its_studies_name_the_machine_and_libraries_of_their_trainings(name):
    for study in sorted((PUBLISHED / name / "studies").iterdir()):
        environment = read_json(study / "environment.json")
        gpus = {gpu["name"] for gpu in environment["gpus"]}
        training = read_json(study / "results/compare/comparison.json")["training"]
        for record in (record for records in training.values() for record in records):
            assert record["precision"]["device_name"] in gpus
            for package in ("torch", "transformers", "peft", "bitsandbytes"):
                assert record["versions"][package] == environment["packages"][package]


def test_inputs_that_are_kept_are_enough_to_compare_again(tmp_path, monkeypatch):
    copies = [tmp_path / "given" / study.name for study in (PUBLISHED / "moved/studies").iterdir()]
    for copy in copies:
        shutil.copytree(PUBLISHED / "moved/studies" / copy.name, copy)
    first, again = tmp_path / "first", tmp_path / "again"

    def compare(folders: list[Path], into: Path) -> None:
        argv = ["mechanism", "compare", *map(str, folders), "--folder", str(into), "--inputs"]
        monkeypatch.setattr(sys, "argv", argv)
        mechanism.main()

    compare(copies, first)
    kept = sorted((first / "studies").iterdir())
    compare(kept, first)  # in place of itself
    compare(kept, again)
    assert [study.name for study in kept] == sorted(copy.name for copy in copies)
    assert (again / mechanism.GAPS).read_text() == (first / mechanism.GAPS).read_text()
