"""The md5 by which DVC knows a file or a folder, really computed.

DVC takes a file for what its own record says as long as inode, time of change and size are the same, and takes what is in
its cache on trust; so a damaged file passes for a sound one. A folder's digest is DVC's: the md5 of the JSON list of
its files, each with its md5 and its path, in the order of their paths.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from workflow.runtime.files import md5, write_text

# What .dvcignore leaves out of a folder.
IGNORED = {"__pycache__", ".snakemake_timestamp", "checkpoints"}
# Bytes. A digest of 1 GiB takes some two seconds; a larger file's is remembered for as long as the file is not written
# and the machine runs. Every write through the file system shows in the time of its last change, which cannot be set.
LARGE = 2**30
MEMORY = Path(".cache") / "digests"
BOOT = Path("/proc/sys/kernel/random/boot_id")
THREADS = 4  # that read at once; hashing lets others run


def files_of(path: Path) -> list[Path]:
    """The file, or the files of a folder that DVC counts; none where there is nothing."""
    if not path.is_dir():
        return [path] if path.is_file() else []
    hidden = path.parts[0] == "results"  # there, what is hidden is what a killed stage had begun to write
    return [
        file
        for file in path.rglob("*")
        if file.is_file() and not any(_is_ignored(part, hidden) for part in file.relative_to(path).parts)
    ]


def _is_ignored(name: str, hidden: bool) -> bool:
    return name in IGNORED or (hidden and name.startswith("."))


def identity(path: Path) -> list[int]:
    """What changes whenever a file is written or replaced, even where its size and time are put back."""
    status = path.stat()
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def digests(files: Iterable[Path]) -> dict[Path, str]:
    """Each file's md5."""
    files = list(files)
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(files, pool.map(digest, files), strict=True))


def digest(path: Path) -> str:
    """A file's md5; that of a large one is computed once while the file is not written and the machine runs."""
    if path.stat().st_size < LARGE or not BOOT.is_file():
        return md5(path)
    mark = "-".join(map(str, identity(path)))
    remembered = MEMORY / hashlib.sha256(f"{BOOT.read_text().strip()} {mark}".encode()).hexdigest()
    with suppress(OSError):
        if len(text := remembered.read_text()) == 32:
            return text
    found = md5(path)
    if mark == "-".join(map(str, identity(path))):  # else it was written meanwhile
        write_text(remembered, found)
    return found


def folder_digest(folder: Path, found: Mapping[Path, str]) -> str:
    """A folder's digest as dvc.lock has it.

    Args:
        found: the md5 of each of its files, perhaps among others.
    """
    return hashlib.md5(listing(folder, found).encode(), usedforsecurity=False).hexdigest() + ".dir"


def listing(folder: Path, found: Mapping[Path, str]) -> str:
    """What DVC's cache holds for a folder: the list of its files."""
    listed = [
        {"md5": value, "relpath": file.relative_to(folder).as_posix()}
        for file, value in found.items()
        if file.is_relative_to(folder)
    ]
    listed.sort(key=lambda entry: entry["relpath"])
    return json.dumps(listed, sort_keys=True)


def known_digest(path: Path, found: Mapping[Path, str]) -> str | None:
    """The digest of a file or folder from those of its files; None where there is nothing."""
    return folder_digest(path, found) if path.is_dir() else found.get(path)


def object_of(md5: str, cache: Path) -> Path:
    """Where DVC's cache holds the content with this digest."""
    return cache / "files" / "md5" / md5[:2] / md5[2:]
