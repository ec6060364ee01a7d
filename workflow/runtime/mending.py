"""What a process that was killed, or a full disk, left of DVC's own files, and how it is put right.

Under `make report` and Snakemake these files are whole at any time (dvc_patches). Plain `dvc` empties them first.
"""

import json
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workflow.runtime import lock_text
from workflow.runtime.errors import UserError
from workflow.runtime.files import write_text

if TYPE_CHECKING:  # stages import this module, and DVC takes a second
    from dvc.dvcfile import ProjectFile
    from dvc.repo import Repo
    from dvc.stage import PipelineStage

LOCK = "dvc.lock"
TEMPORARY = Path(".dvc") / "tmp"
COPY, DAMAGED = TEMPORARY / "dvc.lock.copy", TEMPORARY / "dvc.lock.damaged"


def keep_copy_of_lock() -> None:
    """Keep a copy of dvc.lock as a stage begins: plain `dvc repro` empties the file when the stage has ended."""
    with suppress(OSError, ValueError):
        text = Path(LOCK).read_text(encoding="utf-8")
        if TEMPORARY.is_dir() and lock_text.split(text):
            write_text(COPY, text)


def mend(repo: "Repo") -> None:
    """Put right what is left of dvc.lock and of DVC's list of running stages.

    Each stage gets a block of dvc.lock that DVC once wrote: one that the damaged file still has, the copy's or
    the last commit's. DVC compares it with the files as ever, so that nothing stale is called up to date.

    Raises:
        UserError: dvc.lock holds a merge conflict.
    """
    from workflow.runtime.dvc_patches import remove_unfinished_entries, unfinished_entries

    _mend_list_of_running_stages(repo)
    runs = Path(repo.stage_cache.cache_dir)
    if unfinished_entries(runs):
        with repo.lock:
            remove_unfinished_entries(runs)
    path = Path(repo.root_dir, LOCK)
    if _is_whole(_text(path)):
        return
    with repo.lock:  # whoever writes the file has it
        text = _text(path)
        if not _is_whole(text):
            _put_back(repo, path, text)


def recorded_stage(project: "ProjectFile", name: str, entry: dict[str, Any]) -> "PipelineStage":
    """Return the stage that an entry of dvc.lock describes."""
    from dvc.stage.loader import StageLoader

    definition = {
        "cmd": entry["cmd"],
        "deps": [dep["path"] for dep in entry.get("deps", [])],
        "params": [{file: list(keys)} for file, keys in entry.get("params", {}).items()],
        "outs": [out["path"] for out in entry.get("outs", [])],
    }
    return StageLoader.load_stage(project, name, definition, entry)


def _put_back(repo: "Repo", path: Path, text: str) -> None:
    if conflict := lock_text.CONFLICT.search(text):
        line = text.count("\n", 0, conflict.start()) + 1
        raise UserError(
            f"dvc.lock holds a merge conflict (line {line}): keep one side with `git checkout --ours dvc.lock` or "
            "`git checkout --theirs dvc.lock`, and run again; what the other side had comes from DVC's cache."
        )
    root = Path(repo.root_dir)
    sources = [
        lock_text.rescued(text),
        _whole_blocks(_text(root / COPY) or ""),
        _whole_blocks(_committed(root)),
    ]
    # In the order of the oldest, so that git shows few changes.
    names = dict.fromkeys(name for blocks in reversed(sources) for name in blocks)
    blocks = {name: _fitting(repo, [blocks[name] for blocks in sources if name in blocks]) for name in names}
    shutil.copyfile(path, root / DAMAGED)
    if blocks:
        write_text(path, lock_text.join(blocks))
    else:
        path.unlink()
    print(
        f"dvc.lock was {'damaged' if text.strip() else 'empty'}, as a process that writes it leaves it when it is "
        f"killed or the disk is full: put back with {len(blocks)} stages from what was left of it, its copy and the "
        "last commit. What was done since comes from DVC's cache.",
        file=sys.stderr,  # Snakemake's stdout may be a graph
        flush=True,
    )


def _fitting(repo: "Repo", blocks: list[str]) -> str:
    """The block of a stage whose outputs are here; else the newest, which comes first."""
    from dvc.dvcfile import PROJECT_FILE, load_file

    if len(set(blocks)) > 1:
        project = load_file(repo, str(Path(repo.root_dir, PROJECT_FILE)))
        for block in blocks:
            ((name, entry),) = _parsed(lock_text.HEAD + block)["stages"].items()
            outs = recorded_stage(project, name, entry).outs
            if all(out.exists and not out.changed_checksum() for out in outs):
                return block
    return blocks[0]


def _is_whole(text: str | None) -> bool:
    """Whether a dvc.lock, of which there may be none, says all that DVC wrote; of the last stage at least."""
    if text is None:
        return True
    if "\0" in text or "\ufffd" in text:
        return False
    try:
        blocks = lock_text.split(text)
    except (
        ValueError
    ):  # another hand's form of it; what was cut ends within a line, but for one time in forty
        return text.endswith("\n") and _is_sound(text)
    last = lock_text.HEAD + list(blocks.values())[-1] if blocks else ""
    return _is_sound(last) and all(
        "md5" in out for entry in _parsed(last)["stages"].values() for out in entry.get("outs", [{}])
    )


def _is_sound(text: str) -> bool:
    try:
        return bool(_parsed(text).get("stages"))
    except ValueError:
        return False


def _parsed(text: str) -> dict[str, Any]:
    """The content of a dvc.lock.

    Raises:
        ValueError: DVC would refuse it.
    """
    from dvc.exceptions import DvcException
    from dvc.schema import COMPILED_LOCKFILE_SCHEMA
    from dvc.utils.serialize import parse_yaml
    from voluptuous import Invalid

    try:
        return COMPILED_LOCKFILE_SCHEMA(parse_yaml(text, LOCK))
    except (DvcException, Invalid) as error:
        raise ValueError(str(error)) from None


def _text(path: Path) -> str | None:
    """The text of a file, as far as it is one; None where there is no file."""
    try:
        return path.read_bytes().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return None


def _committed(root: Path) -> str:
    """The dvc.lock of the last commit; empty where there is none."""
    with suppress(OSError):  # no git
        command = ["git", "show", f"HEAD:./{LOCK}"]
        return subprocess.run(command, cwd=root, capture_output=True, text=True).stdout
    return ""


def _whole_blocks(text: str) -> dict[str, str]:
    with suppress(ValueError):
        return lock_text.split(text)
    return {}


def _mend_list_of_running_stages(repo: "Repo") -> None:
    """Remove DVC's list of who reads and writes what, if `dvc repro` was killed while it wrote that file."""
    from dvc.lock import LockError, make_lock
    from dvc.rwlock import RWLOCK_FILE, RWLOCK_LOCK

    file = Path(repo.tmp_dir, RWLOCK_FILE)
    if _is_json(file):
        return
    guard = make_lock(
        str(file.with_name(RWLOCK_LOCK)),
        tmp_dir=repo.tmp_dir,
        hardlink_lock=repo.config["core"].get("hardlink_lock", False),
    )
    with suppress(LockError), guard:  # somebody who is about to write it holds the guard
        if not _is_json(file):
            file.unlink()


def _is_json(file: Path) -> bool:
    """Whether a file is JSON, or is not there."""
    with suppress(FileNotFoundError):
        try:
            json.loads(file.read_text())
        except ValueError:
            return False
    return True
