"""Files that appear whole or not at all, readers with clear errors, and hashes of content."""

import copy
import errno
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from workflow.runtime.errors import UserError, damaged, missing

WRITING = "while writing "  # begins the note on an error that names what was being written


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, which replaces `path` if the block succeeds.

    The content is on the disk by then, with the mode that the umask gives: some libraries write files that no other user
    can read. The temporary name is always the same, so that the next attempt removes what a killed one left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial_path(path)
    try:
        partial.unlink(missing_ok=True)
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        sync(partial)
        partial.chmod(mode)
        partial.replace(path)
        sync(path.parent)
    except Exception as error:
        _note(error, path)
        raise
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder to write to, which replaces `path` if the block succeeds, as `whole_file` does for a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial_path(path)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()
    try:
        yield partial
        finish_folder(partial)
        if path.exists():
            shutil.rmtree(path)
        partial.replace(path)
        sync(path.parent)
    except Exception as error:
        _note(error, path)
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def finish_folder(folder: Path) -> None:
    """Sync everything in a folder to the disk, with the modes that the umask gives, which the folder itself has."""
    mode = folder.stat().st_mode
    for path in folder.rglob("*"):
        if not path.is_symlink():
            sync(path)
            path.chmod(mode & (0o7777 if path.is_dir() else 0o666))
    sync(folder)


def sync(path: Path) -> None:
    """Wait until the disk holds the content of a file, or the names in a folder, so that a power cut loses neither."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # the file system cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def _partial_path(path: Path) -> Path:
    """Return where a path is written until it is whole. The name is hidden, so git and DVC ignore it."""
    return path.with_name(f".{path.name}.partial")


def _note(error: Exception, path: Path) -> None:
    """Add to an error what was being written, which the system's error of a write does not say."""
    if not isinstance(error, UserError):
        error.add_note(f"{WRITING}{path}")


def expanded(path: str, *, key: str) -> Path:
    """Return a path of params.yaml with `~` expanded.

    Raises:
        UserError: it names the home folder of an unknown user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{key} is {path}, and the system knows no such home folder.") from None


def write_text(path: Path, text: str) -> None:
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write strict JSON: a NaN is an error here and not a surprise for the reader."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_jsonl(path: Path) -> list[dict]:
    """Read a file that an earlier stage wrote.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        # Not splitlines(): it also splits at U+2028 and the like, which JSON strings may hold.
        with path.open(encoding="utf-8") as lines:
            return [json.loads(line) for line in lines if line.strip()]
    except FileNotFoundError:
        raise missing(path) from None
    except ValueError as error:  # not JSON, or not UTF-8
        raise damaged(path, error) from None


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def md5(path: Path) -> str:
    """Return the digest by which DVC identifies a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def read_yaml(path: Path) -> Any:
    """Read a YAML file that a user wrote: plain data only, and no duplicate keys.

    Raises:
        UserError: the file is missing or not such YAML; the sentence names the line if the parser does.
    """
    from ruamel.yaml.error import YAMLError

    from workflow.runtime import yaml_errors

    try:
        return copy.deepcopy(_parsed(path.read_text(encoding="utf-8")))
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 ({not_utf8(path)}).") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, and must be a file.") from None
    except YAMLError as error:
        text = path.read_text(encoding="utf-8")
        raise UserError(f"{path} is not valid YAML{yaml_errors.explain(error, text)}.") from None
    except RecursionError:
        raise UserError(f"{path} is not valid YAML: it is nested too deeply.") from None
    except (ValueError, TypeError, AttributeError) as error:  # an impossible date or number
        raise UserError(f"{path} is not valid YAML: {str(error).split(';')[0].rstrip('.')}.") from None


@functools.lru_cache(maxsize=8)
def _parsed(text: str) -> Any:
    """The content of YAML, kept: a stage reads params.yaml eight times, and parsing it takes 50 ms."""
    from ruamel.yaml import YAML

    return YAML(typ="safe", pure=True).load(text)


SIGNATURES = {
    b"\x1f\x8b": "it is compressed by gzip: unpack it",
    b"PK\x03\x04": "it is a zip archive: unpack it",
    b"PAR1": "it is a parquet file",
    b"GGUF": "it is a GGUF file",
    b"\xff\xfe": "it is UTF-16: save it as UTF-8",
    b"\xfe\xff": "it is UTF-16: save it as UTF-8",
}


def not_utf8(path: Path) -> str:
    """Return what a file that is not UTF-8 is, from its first bytes, or else the first line that is not UTF-8."""
    content = path.read_bytes()
    for signature, description in SIGNATURES.items():
        if content.startswith(signature):
            return description
    valid = content.decode(errors="ignore").encode()
    first = next((at for at, (a, b) in enumerate(zip(content, valid, strict=False)) if a != b), len(valid))
    return f"line {content.count(10, 0, first) + 1}"
