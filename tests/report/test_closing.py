"""`make report` ends with the verdict, with what differs from the run in git and why, and with the page's path."""

import copy
import json
import subprocess
from pathlib import Path

import pytest
from made_up_results import BASELINE, write

from workflow import params
from workflow.report import closing
from workflow.report.facts import gather
from workflow.report.sections.answer import headline
from workflow.report.summary import summary_markdown
from workflow.runtime.errors import UserError
from workflow.runtime.files import write_text
from workflow.runtime.paths import COMPARISON, SUMMARY


def git(*arguments: str) -> None:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    subprocess.run(["git", *identity, *arguments], check=True, capture_output=True)


@pytest.fixture
def committed(tmp_path, monkeypatch) -> dict:
    """The comparison of a made-up run, which is the first commit of a repository."""
    monkeypatch.chdir(tmp_path)
    write(variants=[BASELINE, "qlora_nf4"], seeds=[1, 2])
    write_text(SUMMARY, summary_markdown(gather(params.load())))
    git("init", "--quiet", "--initial-branch", "main")
    git("add", "--all")
    git("commit", "--quiet", "--message", "published")
    return json.loads(COMPARISON.read_text())


def rewrite(content: dict) -> None:
    COMPARISON.write_text(json.dumps(content))


def test_the_verdict_is_told_in_the_pages_own_sentences(committed):
    *lines, empty, last = closing.closing().splitlines()
    sentences = headline(gather(params.load())).sentences
    assert lines == [" ".join(sentence.striptags().split()) for sentence in sentences][:3] and lines
    assert empty == "" and last == f"The report is at {Path.cwd()}/report/index.html"


def test_at_most_three_lines_and_neither_a_table_nor_a_list_are_told():
    summary = "## Title\n\nOne \\[a\\] &lt;b> &amp; c.\n\nTwo.\n\n- item\n\nThree.\n\nFour.\n\n| a | b |\n| --- | --- |\n\nAfter.\n"
    assert closing.verdict_lines(summary) == ["One [a] <b> & c.", "Two.", "Three."]


def test_the_same_scores_at_other_speeds_are_told_as_such(committed):
    content = copy.deepcopy(committed)
    content["cost"][0]["value"] *= 2
    rewrite(content)
    first, second, third = closing.lines_since_commit()
    count = len(committed["scores"])
    assert f"all {count:,} scores are equal to the last digit; every verdict is the same." in first
    assert "on the same kind of machine" in first
    assert second.startswith("Times, speeds and memory are those of this machine (")
    assert third == "So git lists 1 changed file of results; `make diff` has the numbers."


def test_other_scores_and_verdicts_on_another_machine_are_counted(committed):
    content = copy.deepcopy(committed)
    task, metric = content["primary"].split("/")
    score = next(s for s in content["scores"] if (s["task"], s["metric"]) == (task, metric))
    score["value"] += 0.0625
    verdict = content["contrasts"][0]["verdict"]
    content["contrasts"][0]["verdict"] = "worse" if verdict != "worse" else "better"
    for precision in content["precisions"].values():
        precision["device_name"] = "Another CPU"
    rewrite(content)
    first, second, _ = closing.lines_since_commit()
    count = len(committed["scores"])
    assert f"{count - 1:,} of {count:,} scores are equal to the last digit" in first
    assert f"{content['primary']} differs by at most 0.062 {score['unit']}" in first
    assert f"1 of {len(committed['contrasts']):,} verdicts is different." in first
    assert "made on" in first and "(Another CPU)" in second


def test_results_of_other_params_are_not_compared(committed):
    rewrite(committed | {"power": 0.9})
    text = Path("params.yaml").read_text()
    Path("params.yaml").write_text(f"# A comment changes nothing.\n{text}")
    assert len(closing.lines_since_commit()) == 3
    write(variants=[BASELINE, "qlora_nf4"], seeds=[1, 2, 3])
    assert (
        closing.lines_since_commit()[0]
        == "The results in git are of other params; `make diff` compares the two runs."
    )


def test_where_nothing_differs_or_nothing_is_in_git_no_line_is_said(committed, tmp_path, monkeypatch):
    assert closing.lines_since_commit() == []
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path / "elsewhere"))
    subprocess.run(["git", "init", "--quiet"], check=True)
    assert closing.lines_since_commit() == []
    with pytest.raises(UserError, match="results/summary.md is missing"):
        closing.closing()
