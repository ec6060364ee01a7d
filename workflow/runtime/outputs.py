"""Whether the outputs of stages still match dvc.lock, and how to restore those that do not.

DVC trusts what comes from its cache or a remote; here the md5 is computed before a file is used or shown.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from workflow.runtime import digests, dvc_lock
from workflow.runtime.errors import MOST_NAMED, CheckError, first_of
from workflow.runtime.files import write_text


@dataclass(frozen=True)
class Written:
    """An output of a stage, with its digest in dvc.lock."""

    stage: str
    path: str
    md5: str


def check_read(deps: Iterable[str], file_md5s: Mapping[Path, str]) -> None:
    """Check that what a stage reads and another stage wrote matches dvc.lock.

    Args:
        deps: the files and folders that it reads.
        file_md5s: the md5 of every file in them.

    Raises:
        CheckError: something does not match.
    """
    deps, wrong = list(deps), {}
    for path, (stage, md5s) in written().items():
        within = any(
            dep.startswith(f"{path}/") for dep in deps
        )  # one file of a folder, which is read as a whole
        if within or any(path == dep or path.startswith(f"{dep}/") for dep in deps):
            known = digests.digests(digests.files_of(Path(path))) if within else file_md5s
            digest = digests.known_digest(Path(path), known)
            if digest is not None and digest not in md5s:
                wrong[path] = Written(stage, path, md5s[-1])
    _refuse(wrong)


def check_outputs(*paths: Path) -> None:
    """Check that these files and folders match dvc.lock, for commands that are not stages but read their outputs.

    Raises:
        CheckError: one does not match.
    """
    check_read(
        [path.as_posix() for path in paths],
        digests.digests(file for path in paths for file in digests.files_of(path)),
    )


def check_content(content: bytes, path: Path, lock: str, *, of: str) -> None:
    """Check that the content of a file at a commit matches that commit's dvc.lock.

    Args:
        content: what DVC returned for the file.
        path: of the file.
        lock: the text of that commit's dvc.lock.
        of: what the commit is called.

    Raises:
        CheckError: it does not match.
    """
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    _, md5s = written(lock).get(path.as_posix(), ("", [md5]))
    if md5 not in md5s:
        cached = digests.object_of(md5s[-1], _cache())
        raise CheckError(
            f"{path} of {of} is damaged: its md5 is not that in the dvc.lock of {of}; remove it from DVC's cache by "
            f"`rm -f {cached}`, and it comes from the remote, if there is one."
        )


def repair_listings() -> list[tuple[Path, bool]]:
    """Repair the lists of folders' files in DVC's cache: DVC would run a stage again if it cannot read one.

    A damaged list is rebuilt from the folder in the workspace if that is intact, and removed otherwise.

    Returns:
        The paths of the damaged lists, and whether each was rebuilt.
    """
    repaired = []
    folders = [(Path(path), md5) for path, (_, md5s) in written().items() for md5 in md5s if _is_folder(md5)]
    cache = _cache() if folders else Path()
    for folder, md5 in folders:
        listing = digests.object_of(md5, cache)
        if not listing.is_file() or digests.digest(listing) + ".dir" == md5:
            continue
        file_md5s = digests.digests(digests.files_of(folder))
        whole = folder.is_dir() and digests.folder_digest(folder, file_md5s) == md5
        listing.unlink()
        if whole:
            write_text(listing, digests.listing(folder, file_md5s))
            listing.chmod(0o444)  # as DVC writes it
        repaired.append((listing, whole))
    return repaired


def _is_folder(md5: str) -> bool:
    return md5.endswith(".dir")


def written(lock: str | None = None) -> dict[str, tuple[str, list[str]]]:
    """Return the outputs in dvc.lock: by path, the stage that wrote it and its digests.

    There are several digests if a stage of another name wrote the same path before.

    Args:
        lock: the text of a dvc.lock; by default that of the working directory.

    Raises:
        UserError: dvc.lock cannot be read.
    """
    digests_by_path: dict[str, tuple[str, list[str]]] = {}
    for name, stage in (dvc_lock.read() if lock is None else dvc_lock.parse(lock)).items():
        for path, md5 in stage.outs.items():
            if md5:
                digests_by_path.setdefault(path, (name, []))[1].append(md5)
    return digests_by_path


def _refuse(wrong: dict[str, Written]) -> None:
    """Raise a CheckError about the first of these outputs, if there is one."""
    if not wrong:
        return
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    out = next(iter(wrong.values()))
    files, objects = _damage(out, _cache())
    raise CheckError(
        f"{first_of(files) or out.path}{more} is damaged or was changed: its md5 is not that in dvc.lock, which stage {out.stage} "
        f"wrote; {_way_back(out, files, objects)}."
    )


def _damage(out: Written, cache: Path) -> tuple[list[str], list[Path]]:
    """Return the changed files of an output, and the damaged objects in DVC's cache; missing objects do not count."""
    listing = digests.object_of(out.md5, cache)
    if not _is_folder(out.md5):
        return [out.path], _unsound({out.md5}, cache)
    sound = listing.is_file() and digests.digest(listing) + ".dir" == out.md5
    if not sound:  # then nothing says which of the files changed
        return [out.path], [listing] if listing.is_file() else []
    expected = {entry["relpath"]: entry["md5"] for entry in json.loads(listing.read_text(encoding="utf-8"))}
    folder = Path(out.path)
    file_md5s = digests.digests(digests.files_of(folder))
    present = {file.relative_to(folder).as_posix(): md5 for file, md5 in file_md5s.items()}
    wrong = [name for name in sorted(expected | present) if expected.get(name) != present.get(name)]
    objects = _unsound({expected[name] for name in wrong if name in expected}, cache)
    return [f"{out.path}/{name}" for name in wrong], objects


def _unsound(md5s: set[str], cache: Path) -> list[Path]:
    paths = {digests.object_of(md5, cache): md5 for md5 in sorted(md5s)}
    return [path for path, md5 in paths.items() if path.is_file() and digests.digest(path) != md5]


def _way_back(out: Written, files: list[str], objects: list[Path]) -> str:
    """Return the commands that restore an output: from an intact cache, from a remote, or by another run."""
    if not objects:
        paths = " ".join(files) if files and len(files) <= MOST_NAMED else out.path
        return f"get it again by `rm -rf {paths} && dvc repro {out.stage}`, which takes it from the cache if it is there"
    remove = f"DVC's cache holds it damaged as well, so remove both by `rm -rf {' '.join([out.path, *map(str, objects)])}`"
    if remote := _dvc("config", "core.remote"):
        return (
            f"{remove}, and get it again by `dvc pull {out.path}` (or, if {remote} holds no sound one, "
            f"`dvc repro {out.stage}`)"
        )
    return f"{remove}, and `dvc repro {out.stage}` makes it again"


def _cache() -> Path:
    """Return the path of DVC's cache, relative to the working directory."""
    return Path(os.path.relpath(_dvc("cache", "dir") or Path(".dvc") / "cache"))


def _dvc(*arguments: str) -> str:
    """Return what a command of DVC prints; empty if it fails."""
    done = subprocess.run([sys.executable, "-m", "dvc", *arguments], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""
