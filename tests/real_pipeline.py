"""A stranger's clone of this repository, and its commands, nothing stubbed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from ruamel.yaml import YAML

from workflow import params

TINY = params.complete_text("tiny")
BIN = Path(sys.executable).parent
NETWORK = "the Python package index could not be reached, and the default data come from it"


def clone(folder: Path, params_text: str, change=lambda content: None) -> Path:
    """What a stranger's clone holds, with other params: no environment, no cache, no results of ours."""
    git = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(git, capture_output=True, text=True, check=True).stdout.split("\0"):
        ours = name.startswith(("results/", "report/", "dvc.lock")) and not name.startswith(
            "results/hardware/"
        )
        if name and (ROOT / name).is_file() and not ours:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    yaml = YAML()
    content = yaml.load(params_text)
    content["experiment"]["seeds"] = [1]
    change(content)
    with (folder / "params.yaml").open("w") as file:
        yaml.dump(content, file)
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    return folder


def environment(folder: Path) -> dict[str, str]:
    """The variables of a shell with the environment active, no git identity and no hub within reach."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("HF_", "GIT_", "TRANSFORMERS_"))
    }
    return kept | {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(folder / ".huggingface"),
        "GIT_CONFIG_GLOBAL": os.devnull,
        "WORKFLOW_WARM": "",  # stages fork from the process of the tests, or run as by hand
    }


def run(folder: Path, *command: str, fails: bool = False) -> str:
    """Run a program of the environment in a clone, and return what it said."""
    done = subprocess.run(
        [BIN / command[0], *command[1:]],
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
    )
    said = done.stdout + done.stderr
    if "pip could not download" in said and not fails:
        pytest.skip(NETWORK)
    assert (done.returncode != 0) == fails, said[-4000:]
    return said


def comparison(folder: Path) -> dict:
    return json.loads((folder / "results/compare/comparison.json").read_text())
