"""What changed between two commits: params, versions and results, with an interval for each difference."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from made_up_scores import ITEMS, SEEDS, ask, write_results
from ruamel.yaml import YAML

from workflow import params
from workflow.comparison.compare import compare
from workflow.report import changes
from workflow.runtime import environment
from workflow.runtime.files import write_json
from workflow.runtime.paths import COMPARE, evaluate_folder

PIPELINE = {
    "stages": {
        "compare": {
            "cmd": "true",
            "outs": ["results/compare/items.parquet", {"results/compare/comparison.json": {"cache": False}}],
        }
    }
}
QUALITY = "### Quality"
BETTER = 0.3  # nats per token, of qlora_nf4_dq in the second commit


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def compare_and_commit() -> None:
    compare_runs()
    run(sys.executable, "-m", "dvc", "commit", "--force", "--quiet")
    run("git", "add", "--all")
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    run("git", *identity, "commit", "--quiet", "-m", "results")


def compare_runs() -> None:
    """What the stage compare writes and a difference is read from."""
    compared, items = compare(params.load())
    write_json(COMPARE / "comparison.json", compared.as_dict())
    items.to_parquet(COMPARE / "items.parquet", index=False)


@pytest.fixture(scope="module")
def two_commits(tmp_path_factory) -> Path:
    """In the second, a lower learning rate made qlora_nf4_dq better by BETTER on each token."""
    folder = tmp_path_factory.mktemp("repository")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_results(folder)
        for file in (environment.LOCK, environment.PROJECT):
            shutil.copy(ROOT / file, folder / file)
        with (folder / "dvc.yaml").open("w") as file:
            YAML().dump(PIPELINE, file)
        (folder / ".gitignore").write_text("/results/train\n/results/evaluate*\n/results/benchmark\n")
        run("git", "init", "--quiet", "--initial-branch", "main")
        run(sys.executable, "-m", "dvc", "init", "--quiet")
        compare_and_commit()
        run("git", "tag", "before")
        for seed in SEEDS:
            path = evaluate_folder("qlora_nf4_dq", seed) / "items.parquet"
            items = pd.read_parquet(path)
            chosen = items["metric"] == "nats_per_token"
            items.loc[chosen, "numerator"] -= BETTER * items.loc[chosen, "denominator"]
            items.to_parquet(path)
        ask(folder, training__schedule__learning_rate=5e-4)
        compare_and_commit()
    return folder


@pytest.fixture
def repository(two_commits, tmp_path, monkeypatch) -> Path:
    shutil.copytree(two_commits, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def since(revision: str) -> str:
    return changes.diff(changes.at_revision(revision), changes.in_workspace())


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "workflow.diff", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def row(text: str, start: str, *, below: str = "###") -> list[str]:
    """The cells of the first row that begins so below a heading."""
    lines = text[text.index(below) :].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return next(
        row for row in rows if row[: start.count("|") + 1] == [cell.strip() for cell in start.split("|")]
    )


def numbers(cell: str) -> list[float]:
    return [float(number) for number in re.findall(r"[+-]?\d+\.\d+", cell.replace("\N{MINUS SIGN}", "-"))]


def test_params_and_results_are_set_side_by_side(repository):
    text = since("before")
    assert row(text, "`training.schedule.learning_rate`")[1:] == ["`0.001`", "`0.0005`"]
    assert "No locked version changed." in text
    _, before, after, change, verdict = row(text, "qlora_nf4_dq", below=QUALITY)
    assert float(before) - float(after) == pytest.approx(BETTER, abs=2e-3) and verdict == "better"
    # The same was taken off every token of every item: nothing is left to vary.
    assert numbers(change) == [-BETTER] * 3
    assert row(text, "lora_16bit", below=QUALITY)[3:] == ["0.000 (95%: 0.000 to 0.000)", "equivalent"]
    was, now = row(text, "qlora_nf4_dq", below="### Difference")[1:]
    assert was.endswith("worse") and now.endswith("better")
    assert numbers(was)[0] - numbers(now)[0] == pytest.approx(BETTER, abs=2e-3)
    between = command("before", "main").stdout
    assert between.splitlines()[1:] == text.splitlines()[1:] and "to main (" in between.splitlines()[0]


def test_the_interval_of_a_change_is_that_of_paired_items(repository):
    """By numpy: the linearised standard error of a ratio over groups, times 2 for so many groups."""
    random = np.random.default_rng(0)
    path = evaluate_folder("lora_16bit", 1) / "items.parquet"
    items = pd.read_parquet(path).reset_index(drop=True)
    chosen = (items["metric"] == "nats_per_token") & (items["form"] == "as_trained")
    tokens = items.loc[chosen, "denominator"].to_numpy()
    increases = random.normal(0.05, 0.1, ITEMS) * tokens
    items.loc[chosen, "numerator"] += increases
    items.to_parquet(path)
    ask(repository, experiment__seeds=[1])
    compare_runs()
    value, low, high = numbers(row(since("before"), "lora_16bit", below=QUALITY)[3])
    mean = increases.sum() / tokens.sum()
    rest = (increases - mean * tokens).reshape(-1, 2).sum(axis=1)  # two items of a group stand side by side
    error = np.sqrt((rest**2).sum() * len(rest) / (len(rest) - 1)) / tokens.sum()
    assert value == pytest.approx(mean, abs=1e-3)
    assert (high - low) / 2 == pytest.approx(2 * error, rel=0.15)


def test_without_the_items_of_the_commit_a_change_has_no_interval(repository):
    shutil.rmtree(repository / ".dvc/cache")
    text = since("before")
    assert row(text, "qlora_nf4_dq", below=QUALITY)[3:] == ["\N{MINUS SIGN}0.300, no interval", "-"]
    assert "dvc fetch --all-commits" in text


def test_other_items_are_not_paired(repository):
    for path in (repository / "results").glob("evaluate*/**/items.parquet"):
        pd.read_parquet(path).replace({"item": {"5": "500"}}).to_parquet(path)
    compare_runs()
    assert row(since("before"), "lora_16bit", below=QUALITY)[3:] == ["0.000, no interval", "-"]


def test_a_removed_variant_is_there_before_and_not_after(repository):
    ask(
        repository,
        experiment__variants=["lora_16bit"],
        benchmark__variants=["lora_16bit"],
        comparison__repairs={},
    )
    compare_runs()
    text = since("before")
    assert row(text, "qlora_nf4_dq", below=QUALITY)[2:] == ["-", "-", "-"]
    assert row(text, "qlora_nf4_dq", below="### Difference")[2] == "-"
    assert row(text, "qlora_nf4_dq | peak memory", below="### Cost")[3:] == ["-", "-"]


def test_results_that_are_missing_are_said(repository):
    (repository / "results/compare/comparison.json").unlink()
    assert "There are none that can be read in workspace." in since("before")


@pytest.mark.parametrize("revision", ["nowhere", "--help-me", "before:params.yaml"])
def test_an_unknown_revision_is_one_sentence(repository, revision):
    done = command("--", revision)
    assert done.returncode == 1
    assert done.stderr == f"git knows no revision {revision}; give a commit, a tag or a branch.\n"
