"""The last lines of `make report`: the verdict, what differs from the run in git and why, and where the page is.

    python -m workflow.verdict

They are read from the files that the run wrote, so that they cost no time when nothing ran.
"""

import html
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from workflow.runtime import faults
from workflow.runtime.errors import UserError, missing
from workflow.runtime.files import read_json
from workflow.runtime.git import changed_files, parsed_at, read_at, resolved
from workflow.runtime.paths import COMPARISON, DVC_LOCK, PARAMS, REPORT, RESULTS, SUMMARY

MOST_LINES = 3
SCORE = ("variant", "form", "task", "metric", "subset")
CONTRAST = ("kind", "name", "variant", "form", "other", "task", "metric", "subset")


def verdict_lines(summary: str) -> list[str]:
    """Return the verdict in up to three lines: the sentences with which the summary begins.

    Args:
        summary: the text of results/summary.md, whose first sentences are the page's answer.
    """
    before_table = summary.partition("\n| ")[0]
    paragraphs = [" ".join(paragraph.split()) for paragraph in before_table.split("\n\n")]
    sentences = [text for text in paragraphs if text and not text.startswith(("#", "-"))]
    return [_plain(text) for text in sentences[:MOST_LINES]]


def change_lines(before: Mapping[str, Any], after: Mapping[str, Any], *, commit: str) -> list[str]:
    """Return in two lines what two runs of the same params have in common, and what clocks and machines make differ.

    Args:
        before: comparison.json of the run in git.
        after: that of the workspace.
        commit: the name of the run in git.
    """
    machines = [_machines(comparison) for comparison in (before, after)]
    where = "on the same kind of machine" if machines[0] == machines[1] else f"made on {machines[0]}"
    return [
        f"Against the run in git ({commit}, {where}), with the same params: "
        f"{_scores_text(before, after)}; {_verdicts_text(before, after)}.",
        f"Times, speeds and memory are those of this machine ({machines[1]}) today, so the files that hold them differ.",
    ]


def lines_since_commit() -> list[str]:
    """Return what differs between the results here and those in git; nothing where no result differs.

    Raises:
        UserError: results/compare/comparison.json is damaged.
    """
    before = parsed_at("HEAD", COMPARISON)
    files = changed_files([RESULTS, REPORT.parent, DVC_LOCK]) if before is not None else []
    if not files or not COMPARISON.exists():
        return []
    parsed = YAML(typ="safe", pure=True).load
    if parsed(read_at("HEAD", PARAMS)) != parsed(PARAMS.read_text(encoding="utf-8")):
        lines = ["The results in git are of other params; `make diff` compares the two runs."]
    else:
        lines = change_lines(before, read_json(COMPARISON), commit=resolved("HEAD")[:9])
    files_text = "1 changed file" if len(files) == 1 else f"{len(files):,} changed files"
    return [*lines, f"So git lists {files_text} of results; `make diff` has the numbers."]


def closing() -> str:
    """Return the last lines of `make report`.

    Raises:
        UserError: the run has no summary.
    """
    if not SUMMARY.exists():
        raise missing(SUMMARY)
    blocks = [
        verdict_lines(SUMMARY.read_text(encoding="utf-8")),
        lines_since_commit(),
        [f"The report is at {Path.cwd() / REPORT}"],
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def _scores_text(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Return how many scores are equal, and the largest difference of the primary metric if one differs."""
    old, new = ({_key(score, SCORE): score for score in run["scores"]} for run in (before, after))
    shared = old.keys() & new.keys()
    equal = sum(old[key]["value"] == new[key]["value"] for key in shared)
    if equal == len(shared):
        return f"all {equal:,} scores are equal to the last digit"
    text = f"{equal:,} of {len(shared):,} scores are equal to the last digit"
    primary = [key for key in shared if f"{new[key]['task']}/{new[key]['metric']}" == after["primary"]]
    if not primary:
        return text
    largest = max(abs(new[key]["value"] - old[key]["value"]) for key in primary)
    return f"{text}, and {after['primary']} differs by at most {largest:.2g} {new[primary[0]]['unit']}"


def _verdicts_text(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    old, new = (
        {_key(item, CONTRAST): item["verdict"] for item in run["contrasts"]} for run in (before, after)
    )
    shared = old.keys() & new.keys()
    others = sum(old[key] != new[key] for key in shared)
    if not others:
        return "every verdict is the same"
    return f"{others:,} of {len(shared):,} verdicts {'is' if others == 1 else 'are'} different"


def _machines(comparison: Mapping[str, Any]) -> str:
    names = (precision["device_name"] for precision in comparison["precisions"].values())
    return " and ".join(dict.fromkeys(names))


def _key(item: Mapping[str, Any], names: tuple[str, ...]) -> tuple:
    return tuple(item.get(name) for name in names)


def _plain(text: str) -> str:
    """Return a sentence in Markdown as text: the inverse of `runtime.markdown.escaped`."""
    return re.sub(r"\\([\\`\[\]|])", r"\1", html.unescape(text))


def main() -> None:
    """Print the last lines of `make report`. Exit with one sentence and code 1 on a UserError."""
    try:
        with faults.as_user_errors():
            print(closing())
    except UserError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
