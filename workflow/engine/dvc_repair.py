"""Repair of DVC's own files after a process was killed or a disk was full.

`make report` and Snakemake never leave these files half written (dvc_patch_state); plain `dvc` empties them first.
"""

import json
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from dvc.dvcfile import PROJECT_FILE, ProjectFile, load_file
from dvc.exceptions import DvcException
from dvc.lock import LockError, make_lock
from dvc.repo import Repo
from dvc.rwlock import RWLOCK_FILE, RWLOCK_LOCK
from dvc.schema import COMPILED_LOCKFILE_SCHEMA
from dvc.stage import PipelineStage
from dvc.stage.loader import StageLoader
from dvc.utils.serialize import parse_yaml
from voluptuous import Invalid

from workflow.engine.dvc_patch_state import remove_unfinished_entries, unfinished_entries
from workflow.runtime import dvc_lock_text
from workflow.runtime.dvc_lock_text import COPY, TEMPORARY
from workflow.runtime.errors import UserError
from workflow.runtime.files import write_text
from workflow.runtime.paths import DVC_LOCK

DAMAGED = TEMPORARY / "dvc.lock.damaged"


def repair(repo: Repo) -> None:
    """Repair dvc.lock, DVC's list of running stages and its run cache.

    Each stage gets a block of dvc.lock that DVC once wrote: that of the damaged file, the copy or the last commit.
    DVC still compares it with the files, so nothing stale is called up to date.

    Raises:
        UserError: dvc.lock holds a merge conflict.
    """
    _repair_list_of_running_stages(repo)
    runs = Path(repo.stage_cache.cache_dir)
    if unfinished_entries(runs):
        with repo.lock:
            remove_unfinished_entries(runs)
    path = Path(repo.root_dir, DVC_LOCK)
    if _is_whole(_text(path)):
        return
    with repo.lock:  # its holder is the one who may write the file
        text = _text(path)
        if not _is_whole(text):
            _restore(repo, path, text)


def recorded_stage(project: ProjectFile, name: str, entry: dict[str, Any]) -> PipelineStage:
    """Return the stage that an entry of dvc.lock describes."""
    definition = {
        "cmd": entry["cmd"],
        "deps": [dep["path"] for dep in entry.get("deps", [])],
        "params": [{file: list(keys)} for file, keys in entry.get("params", {}).items()],
        "outs": [out["path"] for out in entry.get("outs", [])],
    }
    return StageLoader.load_stage(project, name, definition, entry)


def _restore(repo: Repo, path: Path, text: str) -> None:
    if conflict := dvc_lock_text.CONFLICT.search(text):
        line = text.count("\n", 0, conflict.start()) + 1
        raise UserError(
            f"dvc.lock holds a merge conflict (line {line}): keep one side with `git checkout --ours dvc.lock` or "
            "`git checkout --theirs dvc.lock`, and run again; what the other side had comes from DVC's cache."
        )
    root = Path(repo.root_dir)
    sources = [
        dvc_lock_text.salvage_blocks(text),
        _whole_blocks(_text(root / COPY) or ""),
        _whole_blocks(_committed(root)),
    ]
    # In the order of the oldest source, so that git shows few changes.
    names = dict.fromkeys(name for blocks in reversed(sources) for name in blocks)
    blocks = {
        name: _best_block(repo, [blocks[name] for blocks in sources if name in blocks]) for name in names
    }
    shutil.copyfile(path, root / DAMAGED)
    if blocks:
        write_text(path, dvc_lock_text.join_blocks(blocks))
    else:
        path.unlink()
    print(
        f"dvc.lock was {'damaged' if text.strip() else 'empty'}, as a process that writes it leaves it when it is "
        f"killed or the disk is full: put back with {len(blocks)} stages from what was left of it, its copy and the "
        "last commit. What was done since comes from DVC's cache.",
        file=sys.stderr,  # Snakemake's stdout may be a graph
        flush=True,
    )


def _best_block(repo: Repo, blocks: list[str]) -> str:
    """Return the block whose outputs are in the workspace, or the newest of them, which comes first."""
    if len(set(blocks)) > 1:
        project = load_file(repo, str(Path(repo.root_dir, PROJECT_FILE)))
        for block in blocks:
            ((name, entry),) = _parsed(dvc_lock_text.HEAD + block)["stages"].items()
            outs = recorded_stage(project, name, entry).outs
            if all(out.exists and not out.changed_checksum() for out in outs):
                return block
    return blocks[0]


def _is_whole(text: str | None) -> bool:
    """Return whether a dvc.lock, of which there may be none, is complete, as far as its last stage shows."""
    if text is None:
        return True
    if "\0" in text or "\ufffd" in text:
        return False
    try:
        blocks = dvc_lock_text.split_blocks(text)
    except ValueError:  # edited by hand; a cut file almost always ends within a line
        return text.endswith("\n") and _is_valid(text)
    last = dvc_lock_text.HEAD + list(blocks.values())[-1] if blocks else ""
    return _is_valid(last) and all(
        "md5" in out for entry in _parsed(last)["stages"].values() for out in entry.get("outs", [{}])
    )


def _is_valid(text: str) -> bool:
    try:
        return bool(_parsed(text).get("stages"))
    except ValueError:
        return False


def _parsed(text: str) -> dict[str, Any]:
    """Return the content of a dvc.lock.

    Raises:
        ValueError: DVC would refuse it.
    """
    try:
        return COMPILED_LOCKFILE_SCHEMA(parse_yaml(text, DVC_LOCK.name))
    except (DvcException, Invalid) as error:
        raise ValueError(str(error)) from None


def _text(path: Path) -> str | None:
    """Return the text of a file, with other bytes replaced; None without a file."""
    try:
        return path.read_bytes().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return None


def _committed(root: Path) -> str:
    """Return the dvc.lock of the last commit; empty without one."""
    with suppress(OSError):  # no git
        command = ["git", "show", f"HEAD:./{DVC_LOCK}"]
        return subprocess.run(command, cwd=root, capture_output=True, text=True).stdout
    return ""


def _whole_blocks(text: str) -> dict[str, str]:
    with suppress(ValueError):
        return dvc_lock_text.split_blocks(text)
    return {}


def _repair_list_of_running_stages(repo: Repo) -> None:
    """Remove DVC's list of who reads and writes what, if `dvc repro` was killed while it wrote that file."""
    file = Path(repo.tmp_dir, RWLOCK_FILE)
    if _is_json(file):
        return
    guard = make_lock(
        str(file.with_name(RWLOCK_LOCK)),
        tmp_dir=repo.tmp_dir,
        hardlink_lock=repo.config["core"].get("hardlink_lock", False),
    )
    with suppress(LockError), guard:  # a process that is about to write it holds the guard
        if not _is_json(file):
            file.unlink()


def _is_json(file: Path) -> bool:
    """Return whether a file is JSON, or missing."""
    with suppress(FileNotFoundError):
        try:
            json.loads(file.read_text())
        except ValueError:
            return False
    return True
