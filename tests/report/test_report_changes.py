"""What params ask of the page beside the results: a commit to compare with, a price; and every locked version."""

import re
import subprocess

import pytest
from made_up_results import BASELINE, write

from workflow import params
from workflow.report.facts import gather
from workflow.report.page import render
from workflow.runtime.environment import LOCK, PROJECT
from workflow.runtime.errors import UserError


def git(*arguments: str) -> None:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    subprocess.run(["git", *identity, *arguments], check=True, capture_output=True)


@pytest.fixture
def committed(tmp_path, monkeypatch):
    """Made-up results of one run, as the first commit of a repository."""
    monkeypatch.chdir(tmp_path)
    write(variants=[BASELINE, "qlora_nf4"], seeds=[1, 2])
    PROJECT.write_text('dependencies = ["torch==2.13.0"]')
    git("init", "--quiet", "--initial-branch", "main")
    git("add", "--all")
    git("commit", "--quiet", "--message", "before")


def page() -> str:
    return render(gather(params.load()))


def test_what_changed_since_a_commit_is_a_section(committed):
    write(variants=[BASELINE, "qlora_nf4_dq"], seeds=[1, 2], title="<b>other</b> runs", compare_to="main")
    shown = page()
    section = shown[shown.index("<h2>What changed since main (") :]
    section = section[: section.index("</section>")]
    assert "<code>report.title</code>" in section and "<code>&lt;b&gt;other&lt;/b&gt; runs</code>" in section
    assert "No locked version changed." in section
    for variant in (BASELINE, "qlora_nf4", "qlora_nf4_dq"):
        assert f'<th scope="row">{variant}</th>' in section
    assert "no interval" in section and "dvc fetch --all-commits" in section  # the items lie in no cache


def test_without_a_commit_there_is_no_such_section(committed):
    assert "What changed since" not in page()


def test_a_commit_that_is_not_there_is_one_sentence(committed):
    write(variants=[BASELINE, "qlora_nf4"], seeds=[1, 2], compare_to="nowhere")
    with pytest.raises(UserError, match="git knows no revision nowhere; give a commit, a tag or a branch."):
        page()


def test_the_cost_is_estimated_from_a_price(committed):
    assert "times its price per hour" in page()
    write(variants=[BASELINE, "qlora_nf4"], seeds=[1, 2], device_hour_price=3600.0)
    facts = gather(params.load())
    total = sum(work.seconds for work in facts.work)  # at 3,600 an hour a second costs 1
    (told,) = re.findall(r"about ([\d,.]+) at 3600 an hour", render(facts))
    assert float(told.replace(",", "")) == pytest.approx(total, rel=0.06)


def test_every_locked_version_is_named(committed):
    LOCK.write_text("torchlike==1.2.3 ; python_version < '3.12'\nother==4.5\n")
    shown = page()
    assert "All 2 locked versions" in shown
    assert "torchlike 1.2.3 (python_version &lt; &#39;3.12&#39;)\n" in shown
