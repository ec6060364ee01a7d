"""Files that appear whole or not at all, and the hashes that say what they hold."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from workflow.runtime.errors import UserError

WRITING = "while writing "  # how a note on an error begins that says what was being written


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; it takes the name `path` when the block ends well.

    The disk holds it then, and its mode is what the umask asks for: some libraries write files that nobody else may
    read. Beside a path there is one place alone, so that the next attempt takes away what a killed one left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(path)
    try:
        beside.unlink(missing_ok=True)
        beside.touch()
        mode = beside.stat().st_mode
        yield beside
        sync(beside)
        beside.chmod(mode)
        beside.replace(path)
        sync(path.parent)
    except Exception as error:
        _note(error, path)
        raise
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path`; it replaces `path` when the block ends well, as `whole_file` does a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(path)
    if beside.exists():
        shutil.rmtree(beside)
    beside.mkdir()
    try:
        yield beside
        finish_folder(beside)
        if path.exists():
            shutil.rmtree(path)
        beside.replace(path)
        sync(path.parent)
    except Exception as error:
        _note(error, path)
        raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def finish_folder(folder: Path) -> None:
    """Have the disk hold all that a folder holds, with the modes that the umask asks for, as the folder itself has it."""
    mode = folder.stat().st_mode
    for path in folder.rglob("*"):
        if not path.is_symlink():
            sync(path)
            path.chmod(mode & (0o7777 if path.is_dir() else 0o666))
    sync(folder)


def sync(path: Path) -> None:
    """Wait until the disk holds the content of a file, or the names in a folder: a power cut takes what it does not."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of a file system that cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def _beside(path: Path) -> Path:
    """Where a path is written before it is whole. The name is hidden: neither git nor DVC sees it."""
    return path.with_name(f".{path.name}.partial")


def _note(error: Exception, path: Path) -> None:
    """Say with an error what was being written: the system's own, of a write, does not."""
    if not isinstance(error, UserError):
        error.add_note(f"{WRITING}{path}")


def expanded(path: str, *, key: str) -> Path:
    """A path of params.yaml, its `~` expanded.

    Raises:
        UserError: it is the home folder of a user that the system does not know.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{key} is {path}, and the system knows no such home folder.") from None


def write_text(path: Path, text: str) -> None:
    with whole_file(path) as beside:
        beside.write_text(text, encoding="utf-8")


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
        UserError: it is missing, or is not what the stage wrote.
    """
    try:
        # Not splitlines(): it also splits at U+2028 and the like, which JSON strings may hold.
        with path.open(encoding="utf-8") as lines:
            return [json.loads(line) for line in lines if line.strip()]
    except FileNotFoundError:
        raise UserError(f"{path} is missing; `dvc repro` makes it.") from None
    except ValueError as error:  # no JSON, or no UTF-8
        raise UserError(f"{path} is damaged ({error}): delete it, and `dvc repro` makes it again.") from None


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def md5(path: Path) -> str:
    """What DVC calls a file by."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def read_yaml(path: Path) -> Any:
    """Read a YAML file whose author may have erred: nothing but plain data, and no key twice.

    Raises:
        UserError: the file is missing, or is not such YAML; the sentence has the line where there is one.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError
    from ruamel.yaml.reader import ReaderError

    try:
        return YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 ({not_utf8(path)}).") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, and must be a file.") from None
    except YAMLError as error:
        where = getattr(error, "problem_mark", None)
        at = f" (line {where.line + 1})" if where else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        if isinstance(error, ReaderError):
            at = f" (line {path.read_text(encoding='utf-8').count(chr(10), 0, error.position) + 1})"
        raise UserError(f"{path} is not valid YAML{at}: {problem}.") from None
    except RecursionError:
        raise UserError(f"{path} is not valid YAML: it is nested too deeply.") from None
    except (ValueError, TypeError, AttributeError) as error:  # what a date or a number cannot be made of
        raise UserError(f"{path} is not valid YAML: {str(error).split(';')[0].rstrip('.')}.") from None


SIGNATURES = {
    b"\x1f\x8b": "it is compressed by gzip: unpack it",
    b"PK\x03\x04": "it is a zip archive: unpack it",
    b"PAR1": "it is a parquet file",
    b"GGUF": "it is a GGUF file",
    b"\xff\xfe": "it is UTF-16: save it as UTF-8",
    b"\xfe\xff": "it is UTF-16: save it as UTF-8",
}


def not_utf8(path: Path) -> str:
    """What a file that is not UTF-8 is, where its first bytes say so, or else the first line that is not."""
    content = path.read_bytes()
    for signature, what in SIGNATURES.items():
        if content.startswith(signature):
            return what
    whole = content.decode(errors="ignore").encode()
    same = next((at for at, (a, b) in enumerate(zip(content, whole, strict=False)) if a != b), len(whole))
    return f"line {content.count(10, 0, same) + 1}"
