"""A stage depends on the locked versions that can move its numbers, and on no others."""

import json
import re

import pytest
from conftest import ROOT, run_stage_in

from workflow.runtime import environment
from workflow.runtime.errors import UserError

LOCK, PROJECT = ((ROOT / file).read_text() for file in (environment.LOCK, environment.PROJECT))


def chosen(lock: str = LOCK, project: str = PROJECT) -> dict:
    return environment.chosen(environment.locked(lock, project))


def bumped(name: str) -> str:
    """The lock with another version of one package."""
    lock, times = re.subn(rf"^({name}==[\d.]+)", r"\1.1", LOCK, flags=re.MULTILINE)
    assert times
    return lock


@pytest.mark.parametrize(
    ("package", "moved"),
    [
        ("seaborn", set()),
        ("lm-eval", {"evaluation"}),
        ("trl", {"training"}),
        ("scipy", {"statistics"}),
        ("transformers", {"model", "sample", "training", "evaluation"}),
    ],
)
def test_another_version_moves_what_is_computed_with_it(package, moved):
    before, after = chosen(), chosen(bumped(package))
    assert {kind for kind in before if before[kind] != after[kind]} == moved


def test_torchs_version_is_that_of_the_project_file():
    other = chosen(project='dependencies = ["torch==9.9.9"]')
    assert other["training"]["torch"] == "9.9.9" and "torch" not in other["statistics"]
    with pytest.raises(UserError, match="pyproject.toml pins no torch"):
        chosen(project="")


def test_versions_of_other_pythons_are_kept_apart():
    """The file is the same on every machine: a clone under another Python has nothing to do."""
    assert "python_full_version" in chosen()["statistics"]["numpy"]


def test_a_package_that_is_not_locked_is_named():
    with pytest.raises(UserError, match="requirements.lock does not lock peft; `make lock` renews it."):
        chosen(LOCK.replace("\npeft==", "\nfept=="))


def test_the_stage_writes_them_and_says_what_is_not_installed(tmp_path):
    (tmp_path / environment.LOCK).write_text(bumped("peft"))
    (tmp_path / environment.PROJECT).write_text(PROJECT)
    done = run_stage_in(tmp_path, "environment")
    assert done.returncode == 0, done.stderr
    (said,) = (line for line in done.stdout.splitlines() if "installed is" in line)
    assert said.startswith("  peft is locked at ")
    for kind, versions in chosen(bumped("peft")).items():
        assert json.loads((tmp_path / f"results/environment/{kind}.json").read_text()) == versions


def test_changed_versions_are_listed_with_what_they_move():
    before = {"torch": "2.12.0", "jinja2": "3.1.6", "tqdm": "4.1", "gone": "1"}
    after = {"torch": "2.13.0", "jinja2": "3.1.6", "tqdm": "4.2", "new": "2"}
    assert environment.changed(before, after) == [
        ("gone", "1", "-", "no number"),
        ("new", "-", "2", "no number"),
        ("torch", "2.12.0", "2.13.0", "model, training, evaluation"),
        ("tqdm", "4.1", "4.2", "no number"),
    ]
