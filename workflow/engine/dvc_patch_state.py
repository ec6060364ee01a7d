"""Patches of DVC's private functions that write its state: dvc.lock, the list of running stages and the run cache.

Written against DVC 3.67; another version may need other patches. In `python -m workflow.pipeline dvc` and for the Snakefile

- `rwlock._edit_rwlock`, `dvcfile.modify_yaml` and `dvcfile.dump_yaml` replace a file in one step. DVC empties it first, so
  a process that is killed then, or a full disk, would make every later command fail;
- `dvcfile.Lockfile.dump_stages` writes the blocks of the stages that ran. DVC parses and writes all of them, which takes
  seconds for a study; the text is the same;
- `StageCache._load` ignores half an entry of the run cache, which a killed process left. DVC would fail on it each time;
- `rwlock._check_blockers` waits for a stage that another DVC runs. DVC gives up;
- `rwlock.psutil.pid_exists` is false for a process id that the system has since given to another program. DVC would wait
  for that program.

`dvc_patch_recording` holds the patches of what DVC records and what it trusts.
"""

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import psutil
from dvc import dvcfile, rwlock
from dvc.cli import main
from dvc.lock import LockError
from dvc.stage import PipelineStage, serialize
from dvc.stage.cache import StageCache
from dvc.utils.serialize import dumps_yaml

from workflow.runtime import dvc_lock_text, faults
from workflow.runtime.files import whole_file
from workflow.runtime.lifetime import PATIENCE, is_engine

RUNNING = Path(".dvc") / "tmp" / rwlock.RWLOCK_FILE
# YAML's anchor or alias of a repeated object; their numbers count through the whole file.
_ALIAS = re.compile(r" [&*]id\d{3}")


class Busy(BaseException):
    """Another process holds what a stage reads or writes. No Exception, or DVC would take it for a failed stage.

    Attributes:
        processes: the commands by their process ids.
    """

    def __init__(self, processes: dict[int, str]):
        super().__init__(processes)
        self.processes = processes


class _AtomicFiles:
    """The part of a file system that DVC uses for its state; what it writes here appears whole and is on the disk."""

    join = staticmethod(os.path.join)
    exists = staticmethod(os.path.exists)

    @staticmethod
    @contextmanager
    def open(path: str, mode: str = "r", *, encoding: str) -> Iterator[IO[str]]:
        if "w" not in mode:
            with open(path, mode, encoding=encoding) as file:
                yield file
            return
        target = Path(path).resolve()  # keeps a link a link
        with (
            faults.as_user_errors(),
            whole_file(target) as partial,
            partial.open(mode, encoding=encoding) as file,
        ):
            yield file


@contextmanager
def applied() -> Iterator[None]:
    """Patch how DVC writes its files of state while the block runs.

    Raises:
        UserError: the system refused such a write.
    """
    edit, modify, dump = rwlock._edit_rwlock, dvcfile.modify_yaml, dvcfile.dump_yaml
    with ExitStack() as stack:
        for owner, name, replacement in (
            (rwlock, "_edit_rwlock", lambda folder, _, hardlink: edit(folder, _AtomicFiles, hardlink)),
            (rwlock, "psutil", SimpleNamespace(pid_exists=_is_running_engine)),
            (dvcfile, "modify_yaml", lambda path, fs=None: modify(path, fs=_AtomicFiles)),
            (dvcfile, "dump_yaml", lambda path, data, fs=None: dump(path, data, fs=_AtomicFiles)),
            (dvcfile.Lockfile, "dump_stages", _dump_stages(dvcfile.Lockfile.dump_stages)),
            (StageCache, "_load", _load_without_unfinished(StageCache._load)),
        ):
            stack.enter_context(replaced(owner, name, replacement))
        yield


def run(arguments: Sequence[str], *, say: Callable[[str], None]) -> int:
    """Run `dvc ARGUMENTS` with these patches; wait for a stage that another process runs.

    Args:
        arguments: of DVC's command line.
        say: called with a line if it has to wait.

    Returns:
        DVC's exit code.
    """
    # DVC loads a stage before it looks who holds it, so the whole command starts over: what is done is skipped.
    while True:
        try:
            with applied(), replaced(rwlock, "_check_blockers", _raise_busy(rwlock._check_blockers)):
                return main(["--wait-for-lock", *arguments])
        except Busy as busy:
            for process, command in busy.processes.items():
                say(f"waits for process {process} ({command}), which holds files of this stage")
            while any(map(_holds_files, busy.processes)):
                time.sleep(PATIENCE)


@contextmanager
def replaced(owner: Any, name: str, replacement: Any) -> Iterator[None]:
    """Replace an attribute of a module or class while the block runs."""
    original = vars(owner)[name]
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        setattr(owner, name, original)


def unfinished_entries(runs: Path) -> list[Path]:
    """Return what is being written in DVC's run cache, or was when a process was killed: files and empty folders."""
    return [*runs.glob("*/*/*.tmp"), *(folder for folder in runs.glob("*/*") if not any(folder.iterdir()))]


def remove_unfinished_entries(runs: Path) -> None:
    """Remove what was being written in DVC's run cache; the caller holds the repository's lock."""
    for path in unfinished_entries(runs):
        if not path.is_dir():
            path.unlink()
    for folder in unfinished_entries(runs):
        folder.rmdir()


def _dump_stages(dump_all: Callable[..., None]) -> Callable[..., None]:
    """Return a method that writes the blocks of some stages into dvc.lock without parsing the others.

    Args:
        dump_all: DVC's own, for a file that is not in the form that it writes.
    """

    def dump(lockfile: dvcfile.Lockfile, stages: Sequence[PipelineStage], **kwargs: Any) -> None:
        path = Path(lockfile.path)
        try:
            before = path.read_text(encoding="utf-8")
            blocks = dvc_lock_text.split_blocks(before)
            for stage in stages:
                blocks |= _block(serialize.to_lockfile(stage, **kwargs))
            if any(map(_ALIAS.search, blocks.values())):
                raise ValueError("an object is there twice")
        except (FileNotFoundError, ValueError):
            dump_all(lockfile, stages, **kwargs)
            return
        after = dvc_lock_text.join_blocks(blocks)
        if after != before:
            dvcfile.logger.info("Updating lock file '%s'", lockfile.relpath)
            with _AtomicFiles.open(str(path), "w", encoding="utf-8") as file:
                file.write(after)
            lockfile.repo.scm_context.track_file(lockfile.relpath)

    return dump


def _block(entry: dict[str, Any]) -> dict[str, str]:
    return dvc_lock_text.split_blocks(f"schema: '2.0'\n{dumps_yaml({'stages': entry})}")


def _load_without_unfinished(load: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method that looks a stage up in the run cache; its caller holds the repository's lock."""

    def load_without_unfinished(cache: StageCache, stage: PipelineStage) -> Any:
        remove_unfinished_entries(Path(cache.cache_dir))
        return load(cache, stage)

    return load_without_unfinished


def _raise_busy(check: Callable[..., None]) -> Callable[..., None]:
    """Return DVC's check of who holds some paths, raising `Busy` in place of a LockError."""

    def check_or_raise(*arguments: Any, **options: Any) -> None:
        try:
            check(*arguments, **options)
        except LockError as error:
            processes = re.findall(r"^ *\(PID (\d+)\): (.*)$", str(error), re.MULTILINE)
            raise Busy({int(process): command for process, command in processes}) from None

    return check_or_raise


def _holds_files(process: int) -> bool:
    with suppress(FileNotFoundError):
        return f'"pid": {process},' in RUNNING.read_text() and _is_running_engine(process)
    return False


def _is_running_engine(process_id: int) -> bool:
    """Return whether a process with this id is alive and could have run a stage."""
    try:
        process = psutil.Process(process_id)
        process.cmdline()
    except psutil.AccessDenied:  # another user's, which only that user can inspect
        return True
    except psutil.NoSuchProcess:  # or a zombie
        return False
    return is_engine(process)
