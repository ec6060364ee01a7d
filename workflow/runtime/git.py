"""Files as they stood at a commit of this repository."""

import json
import subprocess
from pathlib import Path
from typing import Any

from workflow.runtime.errors import UserError


def read_at(revision: str, path: Path) -> str:
    """The text of a file that git tracks, as it stood at a commit, tag or branch.

    Raises:
        UserError: git knows no such revision, or it had no such file.
    """
    return _git("show", f"{resolved(revision)}:{path}", f"{revision} has no {path}.")


def parsed_at(revision: str, path: Path) -> Any | None:
    """The content of a JSON file at a revision; None where it had no such file."""
    try:
        return json.loads(read_at(revision, path))
    except UserError:
        return None


def resolved(revision: str) -> str:
    """The commit that a name stands for.

    Raises:
        UserError: git knows none.
    """
    refused = f"git knows no revision {revision}; give a commit, a tag or a branch."
    # --end-of-options: a name that begins with a dash is no option.
    return _git(
        "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}", refused
    ).strip()


def _git(*arguments: str) -> str:
    """Run git; the last argument is the sentence for a user where it fails."""
    *command, refused = arguments
    done = subprocess.run(["git", *command], capture_output=True, text=True)
    if done.returncode:
        raise UserError(refused)
    return done.stdout
