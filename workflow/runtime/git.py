"""Files at a commit of this repository."""

import json
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from workflow.runtime.errors import UserError


def read_at(revision: str, path: Path) -> str:
    """Return the text of a file that git tracks, at a commit, tag or branch.

    Raises:
        UserError: there is no such revision, or it has no such file.
    """
    return _git("show", f"{resolved(revision)}:{path}", f"{revision} has no {path}.")


def parsed_at(revision: str, path: Path) -> Any | None:
    """Return the content of a JSON file at a revision; None if there is no such file."""
    try:
        return json.loads(read_at(revision, path))
    except UserError:
        return None


def changed_files(paths: Iterable[Path]) -> list[str]:
    """Return the tracked files below the paths that differ from the last commit."""
    refused = "git cannot compare the files here with a commit."
    return _git("diff", "--name-only", "HEAD", "--", *map(str, paths), refused).splitlines()


def resolved(revision: str) -> str:
    """Return the commit that a name stands for.

    Raises:
        UserError: there is no such commit.
    """
    refused = f"git knows no revision {revision}; give a commit, a tag or a branch."
    # --end-of-options: a name that begins with a dash is not an option.
    return _git(
        "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}", refused
    ).strip()


def _git(*arguments: str) -> str:
    """Run git; the last argument is the error for the user if it fails."""
    *command, refused = arguments
    done = subprocess.run(["git", *command], capture_output=True, text=True)
    if done.returncode:
        raise UserError(refused)
    return done.stdout
