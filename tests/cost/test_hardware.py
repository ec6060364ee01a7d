"""The command that measures a GPU sets what stages are measured with."""

import os
import shutil
import subprocess

from conftest import ROOT

from workflow.cost.hardware import ALLOCATOR, SEGMENTS


def test_memory_is_allocated_as_in_stages(tmp_path):
    """The script calls this interpreter, which says what was set."""
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\nprintenv {ALLOCATOR}\n")
    python.chmod(0o755)
    (tmp_path / "workflow").mkdir()
    shutil.copy(ROOT / "workflow/run", tmp_path / "workflow")
    variables = {name: value for name, value in os.environ.items() if name != ALLOCATOR}
    run = [tmp_path / "workflow/run", "train"]
    assert subprocess.check_output(run, env=variables, text=True) == f"{SEGMENTS}\n"
