"""Whether what stages wrote is still what dvc.lock says, and how to get again what is not.

What comes out of DVC's cache or a remote is trusted by DVC; here the md5 is computed before it is used or shown.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from workflow.runtime import digests
from workflow.runtime.errors import CheckError, UserError
from workflow.runtime.files import write_text

DVC_LOCK = Path("dvc.lock")
MOST_NAMED = 4  # files in one sentence


@dataclass(frozen=True)
class Written:
    """An output of a stage, with the digest that dvc.lock has of it."""

    stage: str
    path: str
    md5: str


def check_read(deps: Iterable[str], found: Mapping[Path, str]) -> None:
    """Raise a UserError if something that a stage reads and another one wrote is not what dvc.lock says.

    Args:
        deps: the files and folders that it reads.
        found: the md5 of every file of them.
    """
    deps, wrong = list(deps), {}
    for path, (stage, md5s) in written().items():
        if any(path == dep or path.startswith(f"{dep}/") for dep in deps):
            digest = digests.known_digest(Path(path), found)
            if digest is not None and digest not in md5s:
                wrong[path] = Written(stage, path, md5s[-1])
    _refuse(wrong)


def check_outputs(*paths: Path) -> None:
    """Raise a UserError if one of these files and folders is not what dvc.lock says that its stage wrote.

    For commands that are no stages and read what stages wrote.
    """
    check_read(
        [path.as_posix() for path in paths],
        digests.digests(file for path in paths for file in digests.files_of(path)),
    )


def check_content(content: bytes, path: Path, lock: str, *, of: str) -> None:
    """Raise a CheckError unless this is what a file's stage wrote.

    Args:
        content: that DVC gave of the file as it was at a commit.
        lock: the text of that commit's dvc.lock.
        of: what the commit is called.
    """
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    _, md5s = written(lock).get(path.as_posix(), ("", [md5]))
    if md5 not in md5s:
        place = digests.object_of(md5s[-1], _cache())
        raise CheckError(
            f"{path} of {of} is damaged: its md5 is not that in the dvc.lock of {of}; remove it from DVC's cache by "
            f"`rm -f {place}`, and it comes from the remote, if there is one."
        )


def mend_listings() -> list[tuple[Path, bool]]:
    """Put right what DVC's cache lists of the folders in dvc.lock, as DVC runs their stages again where it cannot read it.

    A damaged list is written again from a folder that is whole, and removed where none is there.

    Returns:
        The damaged ones, and whether each is whole again.
    """
    mended = []
    folders = [(Path(path), md5) for path, (_, md5s) in written().items() for md5 in md5s if _is_folder(md5)]
    cache = _cache() if folders else Path()
    for folder, md5 in folders:
        place = digests.object_of(md5, cache)
        if not place.is_file() or digests.digest(place) + ".dir" == md5:
            continue
        found = digests.digests(digests.files_of(folder))
        whole = folder.is_dir() and digests.folder_digest(folder, found) == md5
        place.unlink()
        if whole:
            write_text(place, digests.listing(folder, found))
            place.chmod(0o444)  # as DVC has it
        mended.append((place, whole))
    return mended


def _is_folder(md5: str) -> bool:
    return md5.endswith(".dir")


def written(lock: str | None = None) -> dict[str, tuple[str, list[str]]]:
    """By path, the stage of dvc.lock that wrote it and its digest; digests, where a renamed stage wrote it as well.

    Args:
        lock: the text of another dvc.lock than that of the working directory.

    Raises:
        UserError: dvc.lock cannot be read.
    """
    if lock is None and not DVC_LOCK.is_file():
        return {}
    # Of the readers of YAML the fastest, and all values as text: a study's dvc.lock has ten thousand lines.
    loader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
    try:
        text = DVC_LOCK.read_text(encoding="utf-8") if lock is None else lock
        stages = (loader(text).get_single_data() or {}).get("stages", {})
        outs = [(name, out) for name, stage in stages.items() for out in stage.get("outs", [])]
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError) as error:
        raise UserError(f"{DVC_LOCK} is not sound YAML: {' '.join(str(error).split())}") from None
    found: dict[str, tuple[str, list[str]]] = {}
    for name, out in outs:
        if out.get("md5") and out.get("hash", "md5") == "md5":
            found.setdefault(out["path"], (name, []))[1].append(out["md5"])
    return found


def _refuse(wrong: dict[str, Written]) -> None:
    """Raise a CheckError about the first of what is wrong, unless there is nothing."""
    if not wrong:
        return
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    out = next(iter(wrong.values()))
    files, objects = _damage(out, _cache())
    named = ", ".join(files[:MOST_NAMED]) + (
        f" and {len(files) - MOST_NAMED} more" if files[MOST_NAMED:] else ""
    )
    raise CheckError(
        f"{named or out.path}{more} is damaged or was changed: its md5 is not that in dvc.lock, which stage {out.stage} "
        f"wrote; {_way_back(out, files, objects)}."
    )


def _damage(out: Written, cache: Path) -> tuple[list[str], list[Path]]:
    """The files of an output that are not what was written, and the objects in DVC's cache that are not either.

    An object that is missing is none: there is nothing to remove.
    """
    listing = digests.object_of(out.md5, cache)
    if not _is_folder(out.md5):
        return [out.path], _unsound({out.md5}, cache)
    sound = listing.is_file() and digests.digest(listing) + ".dir" == out.md5
    if not sound:  # which of the files are wrong cannot be told
        return [out.path], [listing] if listing.is_file() else []
    expected = {entry["relpath"]: entry["md5"] for entry in json.loads(listing.read_text(encoding="utf-8"))}
    folder = Path(out.path)
    found = digests.digests(digests.files_of(folder))
    there = {file.relative_to(folder).as_posix(): md5 for file, md5 in found.items()}
    wrong = [name for name in sorted(expected | there) if expected.get(name) != there.get(name)]
    objects = _unsound({expected[name] for name in wrong if name in expected}, cache)
    return [f"{out.path}/{name}" for name in wrong], objects


def _unsound(md5s: set[str], cache: Path) -> list[Path]:
    paths = {digests.object_of(md5, cache): md5 for md5 in sorted(md5s)}
    return [path for path, md5 in paths.items() if path.is_file() and digests.digest(path) != md5]


def _way_back(out: Written, files: list[str], objects: list[Path]) -> str:
    """How to get an output again, in commands: from the cache, where that is sound, or a remote, or made again."""
    if not objects:
        place = " ".join(files) if files and len(files) <= MOST_NAMED else out.path
        return f"get it again by `rm -rf {place} && dvc repro {out.stage}`, which takes it from the cache if it is there"
    remove = f"DVC's cache holds it damaged as well, so remove both by `rm -rf {' '.join([out.path, *map(str, objects)])}`"
    if remote := _dvc("config", "core.remote"):
        return (
            f"{remove}, and get it again by `dvc pull {out.path}` (or, if {remote} holds no sound one, "
            f"`dvc repro {out.stage}`)"
        )
    return f"{remove}, and `dvc repro {out.stage}` makes it again"


def _cache() -> Path:
    """DVC's cache, from the working directory."""
    return Path(os.path.relpath(_dvc("cache", "dir") or Path(".dvc") / "cache"))


def _dvc(*words: str) -> str:
    """What a command of DVC prints; nothing where it fails."""
    done = subprocess.run([sys.executable, "-m", "dvc", *words], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""
