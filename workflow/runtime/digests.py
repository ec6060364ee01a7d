"""The md5 by which DVC identifies a file or a folder, computed from the content.

DVC relies on its own record while a file's inode, size and modification time stay the same, and it trusts its cache, so a
damaged file can go unnoticed. A folder's digest is the md5 of the JSON list of its files, each with its md5 and path,
sorted by path.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from workflow.runtime.files import md5, write_text
from workflow.runtime.paths import DIGESTS, RESULTS

# What .dvcignore leaves out of a folder.
IGNORED = {"__pycache__", ".snakemake_timestamp", "checkpoints"}
# Bytes. Hashing 1 GiB takes about two seconds; the digest of a larger file is kept until the file is written or the
# machine restarts. Every write changes the inode's change time, which no program can set.
LARGE = 2**30
BOOT = Path("/proc/sys/kernel/random/boot_id")
THREADS = 4  # that read files; hashing releases the interpreter lock


def files_of(path: Path) -> list[Path]:
    """Return the file, or the files of a folder that DVC counts; empty if nothing is there."""
    if not path.is_dir():
        return [path] if path.is_file() else []
    hidden = path.parts[0] == RESULTS.name  # where a killed stage leaves hidden files that it was writing
    return [
        file
        for file in path.rglob("*")
        if file.is_file() and not any(_is_ignored(part, hidden) for part in file.relative_to(path).parts)
    ]


def _is_ignored(name: str, hidden: bool) -> bool:
    return name in IGNORED or (hidden and name.startswith("."))


def identity(path: Path) -> list[int]:
    """Return values that change whenever a file is written or replaced, even if its size and time are restored."""
    status = path.stat()
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def digests(files: Iterable[Path]) -> dict[Path, str]:
    """Return each file's md5."""
    files = list(files)
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(files, pool.map(digest, files), strict=True))


def digest(path: Path) -> str:
    """Return a file's md5; that of a large file is computed once until the file is written or the machine restarts."""
    if path.stat().st_size < LARGE or not BOOT.is_file():
        return md5(path)
    mark = "-".join(map(str, identity(path)))
    stored = DIGESTS / hashlib.sha256(f"{BOOT.read_text().strip()} {mark}".encode()).hexdigest()
    with suppress(OSError):
        if len(text := stored.read_text()) == 32:
            return text
    computed = md5(path)
    if mark == "-".join(map(str, identity(path))):  # else it was written meanwhile
        write_text(stored, computed)
    return computed


def folder_digest(folder: Path, file_md5s: Mapping[Path, str]) -> str:
    """Return a folder's digest in the form of dvc.lock.

    Args:
        folder: its path.
        file_md5s: the md5 of each of its files; may have others as well.
    """
    return hashlib.md5(listing(folder, file_md5s).encode(), usedforsecurity=False).hexdigest() + ".dir"


def listing(folder: Path, file_md5s: Mapping[Path, str]) -> str:
    """Return the list of a folder's files as DVC's cache holds it."""
    entries = [
        {"md5": value, "relpath": file.relative_to(folder).as_posix()}
        for file, value in file_md5s.items()
        if file.is_relative_to(folder)
    ]
    entries.sort(key=lambda entry: entry["relpath"])
    return json.dumps(entries, sort_keys=True)


def known_digest(path: Path, file_md5s: Mapping[Path, str]) -> str | None:
    """Return the digest of a file or folder from those of its files; None if nothing is there."""
    return folder_digest(path, file_md5s) if path.is_dir() else file_md5s.get(path)


def object_of(md5: str, cache: Path) -> Path:
    """Return where DVC's cache holds the content with this digest."""
    return cache / "files" / "md5" / md5[:2] / md5[2:]
