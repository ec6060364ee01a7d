"""Faults of the system or the network, explained in one sentence that says what happened and what to do."""

import errno
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from workflow.runtime.errors import UserError
from workflow.runtime.files import WRITING
from workflow.runtime.redaction import redacted

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
REFUSED = {errno.EACCES, errno.EPERM}
FAILING = {errno.EIO, errno.ESTALE}  # a broken disk, or a network file system that is gone
TOO_MANY_FILES = {errno.EMFILE, errno.ENFILE}
# How libraries word these errors if they raise another type, or leave the system's number out.
FULL_WORDS = re.compile(r"No space left on device|Disk quota exceeded|os error (28|122)\b")
SHORT_WRITE = re.compile(r"\d+ requested and \d+ written")  # numpy's
# PyTorch's and SQLite's words for a full disk, among other things.
UNCLEAR_WRITE = re.compile(
    r"PytorchStreamWriter failed|iostream error|unexpected pos \d+ vs \d+|disk I/O error|database or disk is full"
)
READ_ONLY_WORDS = re.compile(r"Read-only file system|os error 30\b|readonly database")
REFUSED_WORDS = re.compile(r"os error 13\b")
GPU_MEMORY = re.compile(r"CUDA( error:)? out of memory|CUBLAS_STATUS_ALLOC_FAILED|HIP out of memory")
HOST_MEMORY = re.compile(r"DefaultCPUAllocator|Cannot allocate memory|killed by signal: Killed")
SHARED_MEMORY = re.compile(r"Bus error.*shared memory|out of shared memory|unable to open shared memory")
# Each may be on a disk of its own.
OUR_PLACES = ("results", "report", "logs", ".cache", ".dvc", ".snakemake")
NEARLY_FULL = 2**20  # bytes; with less free space than this, an unclear error of a write means a full disk

NO_HUB = "what answered is a web page and no hub: see whether the network wants a log-in, and whether HF_ENDPOINT is right"
CUT_OFF = "the connection ended before the whole file had come; run again"
HUB_ERRORS = {  # by name, as the library takes a second to import
    "GatedRepoError": "it is gated: accept its license on its page and set HF_TOKEN",
    "RevisionNotFoundError": "it has no such revision",
    "RepositoryNotFoundError": "there is no such repository, or HF_TOKEN may not see it",
    "DatasetNotFoundError": "there is no such repository, or HF_TOKEN may not see it",
    "RemoteEntryNotFoundError": "it has no such file",
    "OfflineModeIsEnabled": "the local cache does not hold it, and no network may be used (HF_HUB_OFFLINE)",
    "FileMetadataError": NO_HUB,
    "TooManyRedirects": "the hub's answers point at each other without end: check the network's proxy and HF_ENDPOINT",
    "RemoteProtocolError": CUT_OFF,
}
UNREACHABLE = (
    "ConnectError",
    "ConnectTimeout",
    "ReadTimeout",
    "PoolTimeout",
    "ReadError",
    "ProxyError",
    "ConnectionError",
)
_OF_A_TRAINING = (
    "lower training.schedule.micro_batch_rows, set training.step.gradient_checkpointing: true, or train a 4-bit variant such as "
    "qlora_nf4_dq; `python -m workflow.plan` says what fits"
)
LESS_MEMORY = {
    "train": _OF_A_TRAINING,
    "tune": _OF_A_TRAINING,
    "evaluate": "lower evaluation.batch_rows and evaluation.batch_tokens",
    "evaluate_base": "lower evaluation.batch_rows and evaluation.batch_tokens",
    "divergence": "lower evaluation.batch_rows and evaluation.batch_tokens",
    "benchmark": "lower benchmark.micro_batch_rows or set training.step.gradient_checkpointing: true",
}
OTHERWISE = "end what else uses it, or take a machine with more of it"


@contextmanager
def as_user_errors(stage: str = "") -> Iterator[None]:
    """Turn faults of the system in the block into a UserError; other errors pass.

    Args:
        stage: name of the running stage, for advice on how it needs less memory.

    Raises:
        UserError: the system refused something; the sentence says what, and what to do.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        explanation = sentence(error, stage=stage)
        if explanation is None:
            raise
        raise UserError(explanation) from error


@contextmanager
def witnessed(label: str, *, stage: str, last: str) -> Iterator[None]:
    """Have another process print a line if this one is killed inside the block, which it cannot do itself.

    The system kills a process without a message when memory runs out, and an engine reports a signal's number at most.

    Args:
        label: begins the line.
        stage: the stage's name, for advice on how it needs less memory.
        last: ends the line.
    """
    less = LESS_MEMORY.get(stage, OTHERWISE)
    text = (
        f"{label}: the process was killed: if nobody did it, the machine ran out of memory, so {less}. {last}"
    )
    reading, writing = os.pipe()
    # The shell waits for the pipe to close, at the end of the block or of this process.
    wait = 'IFS= read -r text; read -r end; test "$end" = over || printf "%s\\n" "$text" >&2'
    witness = subprocess.Popen(["sh", "-c", wait], stdin=reading, stdout=subprocess.DEVNULL)
    os.write(writing, f"{text}\n".encode())
    os.close(reading)
    try:
        yield
    finally:
        with suppress(BrokenPipeError):  # on Ctrl-C the shell is gone before us
            os.write(writing, b"over\n")
        os.close(writing)
        witness.wait()


def last_words(text: str) -> None:
    """Print the last line of a process, and ignore a full disk under its log."""
    try:
        # In one write, as stage.say does.
        print(f"{redacted(text)}\n", end="", file=sys.stderr, flush=True)
    except OSError:
        devnull = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(devnull, stream)  # otherwise Python would exit with an error and a code of its own


def sentence(error: BaseException, *, stage: str = "") -> str | None:
    """Return what happened and what to do, if the error or one of its causes is a fault of the system; else None."""
    written = None
    for cause in _chain(error):
        written = written or _path_being_written(cause)
        explanation = _memory(cause, stage) or _disk(cause, written)
        if explanation:
            return explanation
    return None


def why_not_fetched(error: BaseException) -> str | None:
    """Return why the hub's library could not fetch something and what to do, as the end of a sentence; else None.

    It has no token in it, and no address, which may contain one.
    """
    chain = list(_chain(error, suppressed=True))
    names = {kind.__name__ for cause in chain for kind in type(cause).__mro__}
    # The datasets library has no type of its own for a gated repository.
    if any("is a gated dataset" in str(cause) for cause in chain):
        names.add("GatedRepoError")
    for name, reason in HUB_ERRORS.items():  # the more specific ones first
        if name in names:
            return reason
    for cause in chain:
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status is not None:
            return why_status(status, who="the hub", retry_after=_retry_after(cause.response))
    for cause in chain:
        if isinstance(cause, json.JSONDecodeError):
            return NO_HUB
        if "Consistency check failed" in str(cause):
            return CUT_OFF
    for cause in reversed(chain):
        if type(cause).__name__ in UNREACHABLE:
            # The datasets library gives no reason.
            is_known = "Couldn't reach" not in str(cause)
            reason = f" ({without_secrets(str(cause))})" if is_known else ""
            return f"the hub could not be reached{reason}, and the local cache does not hold it; check the network"
    return None


def why_status(status: int, *, who: str, retry_after: str | None = None) -> str:
    """Return what a server's status code means and what to do.

    Args:
        status: of HTTP.
        who: the server, for the sentence.
        retry_after: when it may be asked again, in words.
    """
    answered = f"{who} answered {status}"
    if status in (401, 403):
        return f"{answered}: it refuses this user; check the token or password, and what it may see"
    if status == 404:
        return f"{answered}: it has no such file; check the names in params.yaml"
    if status == 429:
        pause = f"after {retry_after}" if retry_after else "in some minutes"
        return f"{answered}: too many requests came from here; run again {pause}"
    return f"{answered}: it fails at the moment; try again later"


def _retry_after(response: object) -> str | None:
    """Return when a server may be asked again, in words."""
    value = response.headers.get("Retry-After", "").strip()
    return f"{value} seconds" if value.isdigit() else value or None


def is_web_page(path: Path) -> bool:
    """Return whether a file is a web page, such as the log-in page of a network."""
    with path.open("rb") as file:
        return file.read(1000).lstrip().lower().startswith((b"<!doctype html", b"<html"))


def without_secrets(text: str) -> str:
    """Return the text without user names, passwords and queries, which may be signatures, in its addresses."""
    return re.sub(r"(\w+://)(?:[^/\s@]+@)?([^\s?'\")]*)(?:\?[^\s'\")]*)?", r"\1\2", text)


def keep_secrets_out_of_logs() -> None:
    """Remove user names, passwords and signatures from the addresses in warnings of the hub's library."""

    def redact(record: logging.LogRecord) -> bool:
        record.msg, record.args = without_secrets(record.getMessage()), ()
        return True

    for handler in logging.getLogger("huggingface_hub").handlers:
        handler.filters[:] = [redact]


def _chain(error: BaseException | None, *, suppressed: bool = False) -> Iterator[BaseException]:
    """Yield the error and its causes; with `suppressed`, also those that `from None` hides."""
    while error is not None:
        yield error
        hidden = error.__suppress_context__ and not suppressed
        error = error.__cause__ or (None if hidden else error.__context__)


def _memory(error: BaseException, stage: str) -> str | None:
    text = str(error)
    less = LESS_MEMORY.get(stage, OTHERWISE)
    # By name, as a stage without a model has not imported torch.
    if type(error).__name__ == "OutOfMemoryError" or GPU_MEMORY.search(text):
        request = re.search(r"Tried to allocate ([\d.]+ [KMG]iB)", text)
        capacity = re.search(r"total capacity of ([\d.]+ [KMG]iB)", text)
        amount = f" ({request[1]} more were asked for" if request else ""
        amount += f", and it has {capacity[1]} in all)" if request and capacity else ")" if request else ""
        return f"the GPU is out of memory{amount}: {less}."
    if SHARED_MEMORY.search(text):
        return "the processes that prepare batches ran out of shared memory (/dev/shm): set hardware.data_workers: 0."
    if isinstance(error, MemoryError) or HOST_MEMORY.search(text) or _number(error) == errno.ENOMEM:
        request = re.search(r"tried to allocate (\d+) bytes", text)
        amount = f" ({_size(int(request[1]))} more were asked for)" if request else ""
        return f"the machine is out of memory{amount}: {less}."
    if text == "can't start new thread":
        return "the system lets this user start no more processes or threads: end some, or raise `ulimit -u`."
    return None


def _disk(error: BaseException, written: Path | None) -> str | None:
    number, text = _number(error), str(error)
    path = _path(error) or written
    if number in FULL or FULL_WORDS.search(text) or SHORT_WRITE.search(text):
        return _full(_path(error) or _fuller(written), number)
    if UNCLEAR_WRITE.search(text) and _room(_fuller(written)) < NEARLY_FULL:
        return _full(_fuller(written), None)
    if number == errno.EROFS or READ_ONLY_WORDS.search(text):
        return f"{_named(path)} cannot be written, as its file system is read-only: mount it writable, or work in another folder."
    if number in REFUSED or REFUSED_WORDS.search(text):
        return (
            f"there is no permission to read or write {_named(path)}: give it to the user that runs this "
            f"({_user()}), or work in another folder."
        )
    if number in TOO_MANY_FILES:
        return "too many files are open at once: raise the limit, as in `ulimit -n 4096`."
    if number in FAILING:
        return f"the disk or network file system of {_named(path)} fails ({os.strerror(number)}): see that it is sound."
    if isinstance(error, FileNotFoundError) and "No usable temporary directory" in text:
        return (
            "no folder for temporary files can be written: set TMPDIR to one that can, on a disk with room."
        )
    return None


def _full(path: Path, number: int | None) -> str:
    if number == errno.EFBIG:
        return f"{_named(path)} would be larger than the system lets a file be: raise `ulimit -f`, or use another disk."
    if number == errno.EDQUOT:
        return f"this user's disk quota is used up, so {_named(path)} could not be written: free some of it."
    folder = _existing(path)
    status = os.statvfs(folder)
    if status.f_files and not status.f_favail:
        return (
            f"the disk of {_named(path)} has no room for another file (no inodes): remove some files from it."
        )
    # The unfinished file is removed by now and counts as free space, which was still too little.
    return (
        f"the disk is full: {_named(path)} could not be written, and the {_size(_room(path))} that are free are too "
        f"little; free some{_elsewhere(folder)}."
    )


def _elsewhere(folder: Path) -> str:
    """Return how to use another disk for the files of a folder, if a variable sets the folder."""
    if folder.is_relative_to(_hub_cache()):
        return ", or set HF_HOME to a folder with more room"
    if folder.is_relative_to(_temporary()) and not folder.is_relative_to(Path.cwd()):
        return ", or set TMPDIR to a folder with more room"
    return ""


def _path(error: BaseException) -> Path | None:
    """Return the file that an error is about, or the folder of a hidden file that was being written."""
    name = getattr(error, "filename2", None) or getattr(error, "filename", None)
    if not isinstance(name, str | bytes | os.PathLike) or not name:
        return None
    path = Path(os.fsdecode(name))
    return path.parent if path.name.startswith(".") and not path.exists() else path


def _number(error: BaseException) -> int | None:
    return error.errno if isinstance(error, OSError) else None


def _path_being_written(error: BaseException) -> Path | None:
    """Return the file or folder that was being written when the error was raised, from the note of runtime/files.py."""
    notes = [note for note in getattr(error, "__notes__", ()) if note.startswith(WRITING)]
    return Path(notes[0].removeprefix(WRITING)) if notes else None


def _fuller(written: Path | None) -> Path:
    """Return what was being written, or another folder in use, such as that of temporary files, whose disk is full."""
    places = [Path(), *map(Path, OUR_PLACES), _temporary(), _hub_cache()]
    fullest = min(places, key=_room)
    return written if written and (_room(written) < NEARLY_FULL or _room(fullest) >= NEARLY_FULL) else fullest


def _room(place: Path) -> int:
    return shutil.disk_usage(_existing(place)).free


def _temporary() -> Path:
    # Unlike tempfile.gettempdir(), this does not touch the disk.
    return Path(tempfile.tempdir or os.environ.get("TMPDIR") or "/tmp")


def _hub_cache() -> Path:
    return Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()


def _existing(path: Path) -> Path:
    """Return the path, or its nearest parent that exists."""
    path = path.absolute()
    with suppress(OSError):
        while not path.exists():
            path = path.parent
    return path


def _named(path: Path | None) -> str:
    """Return the path, relative to the working directory if it is below it."""
    if path is None:
        return "a file"
    path = path.absolute()
    if path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    return str(path) if path != Path() else str(Path.cwd())


def _user() -> str:
    import getpass

    with suppress(OSError, KeyError):  # a container's user may have no name
        return getpass.getuser()
    return f"user {os.getuid()}"


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
