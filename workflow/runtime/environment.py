"""The locked versions that can change a stage's numbers, so that the stage depends on those alone.

`python -m workflow.environment diff REV` shows which locked versions changed since a commit, and what that reruns.
"""

import argparse
import re
import sys
import tomllib
from pathlib import Path

from workflow.runtime import markdown
from workflow.runtime.errors import UserError
from workflow.runtime.git import read_at

LOCK = Path("requirements.lock")
PROJECT = Path("pyproject.toml")  # pins torch, whose build the lock leaves to the machine
_MODEL = ("safetensors", "tokenizers", "torch", "transformers")
_QUANTIZED = (*_MODEL, "accelerate", "bitsandbytes", "numpy", "peft")
# By what is computed with them. Other packages rerun nothing: no number depends on them.
PACKAGES = {
    "model": (*_MODEL, "gguf", "numpy"),
    "sample": ("datasets", "datasketch", "jinja2", "numpy", "tokenizers", "transformers"),
    "training": (*_QUANTIZED, "datasets", "jinja2", "liger-kernel", "trl"),
    "evaluation": (
        *_QUANTIZED,
        "datasets",
        "jinja2",
        "langdetect",
        "lm-eval",
        "nltk",
        "rouge-score",
        "sacrebleu",
    ),
    "statistics": ("numpy", "pandas", "scipy"),
}

HEAD = ("package", "before", "after", "can move")
NOTHING_CHANGED = "No locked version changed."


def locked_at(revision: str | None) -> dict[str, str]:
    """Return each locked package's version at a commit, tag or branch; None means the workspace.

    Raises:
        UserError: there is no such revision, it has no lock file, or its pyproject.toml pins no torch.
    """
    texts = (path.read_text() if revision is None else read_at(revision, path) for path in (LOCK, PROJECT))
    return locked(*texts)


def locked(lock: str, project: str) -> dict[str, str]:
    """Return each locked package's version, including torch's.

    Args:
        lock: the text of a requirements.lock.
        project: that of a pyproject.toml, which pins torch.

    Raises:
        UserError: pyproject.toml pins no torch.
    """
    torch = re.search(r'"torch==([^"]+)"', project)
    if torch is None:
        raise UserError(f"{PROJECT} pins no torch: it must name one version, as in torch==2.13.0.")
    return versions(lock) | {"torch": torch[1]}


def versions(lock: str) -> dict[str, str]:
    """Return each package's version in a requirements.lock, with its condition on the Python or the system, if any."""
    versions: dict[str, list[str]] = {}
    for name, version, marker in re.findall(r"^([\w.-]+)==(\S+)(?: ; (.+?))?(?: \\)?$", lock, re.MULTILINE):
        versions.setdefault(name, []).append(version + (f" ({marker})" if marker else ""))
    return {name: ", ".join(entries) for name, entries in versions.items()}


def chosen(versions: dict[str, str]) -> dict[str, dict[str, str]]:
    """Return the versions that each kind of work depends on.

    Raises:
        UserError: the lock lacks one of the packages.
    """
    missing = sorted({name for names in PACKAGES.values() for name in names} - set(versions))
    if missing:
        raise UserError(f"{LOCK} does not lock {', '.join(missing)}; `make lock` renews it.")
    return {kind: {name: versions[name] for name in sorted(names)} for kind, names in PACKAGES.items()}


def changed(before: dict[str, str], after: dict[str, str]) -> list[tuple[str, str, str, str]]:
    """Return what changed, as rows under `HEAD`: package, version before and after, and the work that depends on it."""
    return [
        (
            name,
            before.get(name, "-"),
            after.get(name, "-"),
            ", ".join(kind for kind, names in PACKAGES.items() if name in names) or "no number",
        )
        for name in sorted(before | after)
        if before.get(name) != after.get(name)
    ]


def repository() -> str | None:
    """Return the address of the repository, for links; None if pyproject.toml names none."""
    content = tomllib.loads(PROJECT.read_text(encoding="utf-8")) if PROJECT.is_file() else {}
    address = content.get("project", {}).get("urls", {}).get("Repository", "")
    return address if address.startswith("https://") else None


def main() -> None:
    """Print the difference to a commit; exit 1 with one sentence on a UserError."""
    parser = argparse.ArgumentParser(prog="python -m workflow.environment", description=__doc__)
    parser.add_argument("action", choices=["diff"])
    parser.add_argument("revision", help="a commit, tag or branch")
    options = parser.parse_args()
    try:
        rows = changed(locked_at(options.revision), locked_at(None))
        print(markdown.table(HEAD, rows) if rows else NOTHING_CHANGED)
    except UserError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
