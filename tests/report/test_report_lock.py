"""What the page says of dvc.lock, held against what DVC itself says."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import made_up_results
import pytest
from conftest import digest_of
from engine_fixture import damage
from report_reader import Reader, facts

from workflow.report import drawing, lock
from workflow.report.page import render
from workflow.runtime import digests
from workflow.runtime.errors import UserError
from workflow.runtime.paths import train_folder

PIPELINE = """
stages:
  make:
    matrix:
      name: ${names}
    cmd: mkdir -p results/made/${item.name}/weights && cat code.txt > results/made/${item.name}/weights/w &&
      echo ${item.name} > results/made/${item.name}/result.json
    deps: [code.txt]
    params: [make.value, "kinds.${item.name}"]
    outs:
      - results/made/${item.name}/weights
      - results/made/${item.name}/result.json
  collect:
    cmd: mkdir -p results/all && cat results/made/*/result.json > results/all/all.json
    deps: [results/made]
    params: [names]
    outs:
      - results/all/all.json: {cache: false}
  report:
    cmd: mkdir -p report && date +%N > report/index.html
    deps: [results/all]
    outs: [report/index.html]
"""
PARAMS = "names: [one, two]\nmake: {value: 1.0e-3}\nkinds: {one: {a: 1}, two: {a: 2}}\n"
NEEDED = [
    Path("results/made/one/result.json"),
    Path("results/made/two/result.json"),
    Path("results/all/all.json"),
]


def dvc(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments],
        cwd=folder,
        env=os.environ | {"DVC_NO_ANALYTICS": "1", "DVC_SITE_CACHE_DIR": str(folder / ".site")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A small pipeline that DVC ran."""
    folder = tmp_path_factory.mktemp("pipeline")
    (folder / "dvc.yaml").write_text(PIPELINE)
    (folder / "params.yaml").write_text(PARAMS)
    (folder / "code.txt").write_text("first\n")
    dvc(folder, "init", "--no-scm", "--quiet")
    dvc(folder, "repro", "--quiet")
    return folder


@pytest.fixture
def _there(finished, monkeypatch):
    monkeypatch.chdir(finished)


@pytest.mark.usefixtures("_there")
def test_what_dvc_just_made_matches(finished):
    assert "up to date" in dvc(finished, "status")
    found = lock.read(NEEDED)
    assert found.exists and found.mismatches == [] and found.absent == []
    origin = found.origins["results/made/two/result.json"]
    assert (origin.stage, origin.params) == ("make@two", {"make.value": 0.001, "kinds.two": {"a": 2}})
    assert origin.command == "dvc repro make@two"


def md5(path: Path) -> str:
    return str(digest_of(path))


def edit(path: str, old: str, new: str) -> Callable[[], None]:
    return lambda: Path(path).write_text(Path(path).read_text().replace(old, new))


@pytest.mark.usefixtures("_there")
@pytest.mark.parametrize(
    ("path", "old", "new", "said"),
    [
        ("code.txt", "first", "second", "Stages make@one, make@two would run again: code.txt has changed since."),
        ("params.yaml", "a: 2", "a: 3", "Stage make@two would run again: params.yaml has another value of kinds.two."),
        ("dvc.yaml", "echo ${item.name}", "echo 1", "Stages make@one, make@two would run again: dvc.yaml describes it"),
        ("dvc.yaml", "deps: [code.txt]", "deps: [code.txt, params.yaml]", "dvc.yaml describes it otherwise"),
        ("results/all/all.json", "one", "won", "results/all/all.json is not what stage collect wrote"),
        ("results/made/one/weights/w", "first", "fist", "results/made/one/weights is not what stage make@one wrote"),
    ],
)  # fmt: skip
def test_a_difference_is_named_wherever_dvc_sees_one(finished, path, old, new, said):
    before = (finished / path).read_bytes()
    (finished / path).unlink()  # DVC may have made a link to its cache of it
    (finished / path).write_bytes(before.replace(old.encode(), new.encode()))
    try:
        assert "changed" in dvc(finished, "status")
        assert any(sentence.startswith(said) or said in sentence for sentence in lock.read(NEEDED).mismatches)
    finally:
        (finished / path).write_bytes(before)
    assert lock.read(NEEDED).mismatches == []


@pytest.mark.usefixtures("_there")
def test_a_variant_that_was_not_run_through_dvc_is_named(finished):
    stray = finished / "results/made/three/result.json"
    found = lock.read([*NEEDED, stray.relative_to(finished)]).mismatches
    assert found == ["results/made/three/result.json is in no stage of dvc.lock."]


@pytest.mark.usefixtures("_there")
@pytest.mark.parametrize("large", [5, 2**30])
def test_a_bit_that_dvc_does_not_see_is_seen_in_large_files_too(finished, monkeypatch, large):
    monkeypatch.setattr(digests, "LARGE", large)
    weights = Path("results/made/one/weights/w")
    before = weights.read_bytes()
    assert "up to date" in dvc(finished, "status") and lock.read(NEEDED).mismatches == []
    try:
        damage(weights)
        assert "up to date" in dvc(finished, "status")
        assert lock.read(NEEDED).mismatches[0] == (
            "results/made/one/weights is not what stage make@one wrote: its md5 is not that in dvc.lock."
        )
    finally:
        weights.unlink()
        weights.write_bytes(before)
    assert lock.read(NEEDED).mismatches == []


@pytest.mark.usefixtures("_there")
def test_a_result_that_was_made_with_something_else_than_dvc_lock_says_is_named():
    """DVC took the params down after they had been edited: of its own records all agree."""
    path = Path("results/made/two/result.json")
    text = Path("dvc.lock").read_text()
    record = {"params": {"make.value": 0.001, "kinds.two": {"a": 3, "b": 1}}, "deps": {"code.txt": "0" * 32}}
    before = path.read_bytes()
    old, all_old = md5(path), md5(path.parent)
    path.unlink()
    try:
        path.write_text(json.dumps({"inputs": record}))
        Path("dvc.lock").write_text(text.replace(old, md5(path)).replace(all_old, md5(path.parent)))
        sentences = lock.read(NEEDED).mismatches
        assert f"{path} was made with kinds.two.a 3, where dvc.lock has 2." in sentences
        assert f"{path} was made with kinds.two.b 1, where dvc.lock has nothing." in sentences
        assert f"{path} was made with another code.txt than dvc.lock has." in sentences
    finally:
        path.unlink()
        path.write_bytes(before)
        Path("dvc.lock").write_text(text)


def test_without_a_lock_the_page_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(drawing, "matplotlib_svg", lambda *_, **__: "<svg></svg>")
    made_up_results.write()
    text = Reader(render(facts())).text
    assert "This page does not match dvc.lock." in text
    assert "There is no dvc.lock, so no file could be held against it." in text


def test_the_page_has_a_banner_where_the_workspace_differs_and_none_where_it_does_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(drawing, "matplotlib_svg", lambda *_, **__: "<svg></svg>")
    made_up_results.write()
    made_up_results.write_lock()
    assert "banner" not in [a.get("class") for _, a in Reader(render(facts())).tags]
    history = train_folder("lora_16bit", 1) / "history.csv"
    history.write_text(history.read_text().replace("0.001,", "0.002,", 1))
    page = Reader(render(facts()))
    assert "banner" in [a.get("class") for _, a in page.tags]
    assert f"{history} is not what stage train@lora_16bit-1 wrote" in page.text
    assert "Stage compare would run again: results/train has changed since." in page.text


def test_every_file_is_shown_with_the_stage_and_the_digest_of_dvc_lock(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(drawing, "matplotlib_svg", lambda *_, **__: "<svg></svg>")
    made_up_results.write()
    made_up_results.write_lock()
    found = facts()
    page = Reader(render(found))
    shown = {path: [stage, md5] for path, stage, md5 in page.origins["files"]}
    for path in ("results/compare/comparison.json", "results/evaluate/qlora_nf4_dq/2/result.json"):
        assert shown[path] == [found.lock.origins[path].stage, found.lock.origins[path].md5]
        assert len(shown[path][1]) == 32
        assert " ".join([path, *shown[path]]) in page.text  # without script too
    keys = page.numbers()
    assert len(keys) > 100
    assert {key.partition("#")[0] for key in keys} <= set(shown)


def test_a_lock_that_cannot_be_read_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("dvc.lock").write_text("<<<<<<< HEAD\nstages: [\n")
    with pytest.raises(UserError, match="^dvc.lock is not sound YAML: "):
        lock.read(NEEDED)
    Path("dvc.lock").write_text("schema: '2.0'\n")
    Path("params.yaml").write_text(PARAMS)
    assert lock.read(NEEDED[:1]).mismatches == ["results/made/one/result.json is in no stage of dvc.lock."]
