"""What is changed of DVC's private functions, but for dvc_guards: another version of DVC may call for another form of this.

- Its two files of state, dvc.lock and the list of running stages, are replaced at one stroke. DVC empties them
  first: a process that is killed then, or a full disk, would make every later command fail.
- Of dvc.lock only the blocks of the stages that ran are made anew; its text is that which DVC writes.
- Half an entry of the run cache, which a killed process left, is no entry: DVC would fail on it each time.
- A stage that another DVC holds is waited for, where DVC gives up.
- A process id that the system has given to another program holds no stage.
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

from workflow.runtime import faults, lock_text
from workflow.runtime.files import whole_file
from workflow.runtime.lifetime import PATIENCE, is_engine

RUNNING = Path(".dvc") / "tmp" / rwlock.RWLOCK_FILE
# An object that is there twice, which is numbered over the whole file.
_ALIAS = re.compile(r" [&*]id\d{3}")


class Busy(BaseException):
    """Another process holds what a stage reads or writes. No Exception, or DVC would take it for a failed stage.

    Attributes:
        processes: the commands by their process ids.
    """

    def __init__(self, processes: dict[int, str]):
        super().__init__(processes)
        self.processes = processes


class _WholeFiles:
    """What DVC asks of a file system for a file of its state; what it writes appears whole, and lasts."""

    join = staticmethod(os.path.join)
    exists = staticmethod(os.path.exists)

    @staticmethod
    @contextmanager
    def open(path: str, mode: str = "r", *, encoding: str) -> Iterator[IO[str]]:
        if "w" not in mode:
            with open(path, mode, encoding=encoding) as file:
                yield file
            return
        target = Path(path).resolve()  # a link stays one
        with (
            faults.as_user_errors(),
            whole_file(target) as beside,
            beside.open(mode, encoding=encoding) as file,
        ):
            yield file


@contextmanager
def whole_files() -> Iterator[None]:
    """Within the block DVC writes its files of state whole, and fast.

    Raises:
        UserError: the system refused such a write.
    """
    edit, modify, dump = rwlock._edit_rwlock, dvcfile.modify_yaml, dvcfile.dump_yaml
    with ExitStack() as stack:
        for owner, name, new in (
            (rwlock, "_edit_rwlock", lambda folder, _, hardlink: edit(folder, _WholeFiles, hardlink)),
            (rwlock, "psutil", SimpleNamespace(pid_exists=_is_running_engine)),
            (dvcfile, "modify_yaml", lambda path, fs=None: modify(path, fs=_WholeFiles)),
            (dvcfile, "dump_yaml", lambda path, data, fs=None: dump(path, data, fs=_WholeFiles)),
            (dvcfile.Lockfile, "dump_stages", _dump_stages(dvcfile.Lockfile.dump_stages)),
            (StageCache, "_load", _load_whole(StageCache._load)),
        ):
            stack.enter_context(_replaced(owner, name, new))
        yield


def run(arguments: Sequence[str], *, say: Callable[[str], None]) -> int:
    """Run `dvc ARGUMENTS` with whole files; a stage that another process holds is waited for.

    Args:
        say: called with a line when it has to wait.

    Returns:
        DVC's exit code.
    """
    # DVC loads a stage before it asks who holds it, so the whole command begins again: what is done is skipped.
    while True:
        try:
            with whole_files(), _replaced(rwlock, "_check_blockers", _busy_raised(rwlock._check_blockers)):
                return main(["--wait-for-lock", *arguments])
        except Busy as busy:
            for process, command in busy.processes.items():
                say(f"waits for process {process} ({command}), which holds files of this stage")
            while any(map(_holds_files, busy.processes)):
                time.sleep(PATIENCE)


@contextmanager
def _replaced(owner: Any, name: str, new: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, new)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _dump_stages(slowly: Callable[..., None]) -> Callable[..., None]:
    """DVC's method that writes stages into dvc.lock, without a look at the others.

    Args:
        slowly: DVC's own, for a file in another form than it writes.
    """

    def dump(lockfile: dvcfile.Lockfile, stages: Sequence[PipelineStage], **kwargs: Any) -> None:
        path = Path(lockfile.path)
        try:
            text = path.read_text(encoding="utf-8")
            blocks = lock_text.split(text)
            for stage in stages:
                blocks |= _block(serialize.to_lockfile(stage, **kwargs))
            if any(map(_ALIAS.search, blocks.values())):
                raise ValueError("an object is there twice")
        except (FileNotFoundError, ValueError):
            slowly(lockfile, stages, **kwargs)
            return
        new = lock_text.join(blocks)
        if new != text:
            dvcfile.logger.info("Updating lock file '%s'", lockfile.relpath)
            with _WholeFiles.open(str(path), "w", encoding="utf-8") as file:
                file.write(new)
            lockfile.repo.scm_context.track_file(lockfile.relpath)

    return dump


def _load_whole(load: Callable[..., Any]) -> Callable[..., Any]:
    """DVC's method that finds a stage in the run cache, by whoever has the repository's lock and so writes alone."""

    def load_whole(cache: StageCache, stage: PipelineStage) -> Any:
        remove_unfinished_entries(Path(cache.cache_dir))
        return load(cache, stage)

    return load_whole


def unfinished_entries(runs: Path) -> list[Path]:
    """What is being written in DVC's run cache, or was when a process was killed: files, and folders without one."""
    return [*runs.glob("*/*/*.tmp"), *(folder for folder in runs.glob("*/*") if not any(folder.iterdir()))]


def remove_unfinished_entries(runs: Path) -> None:
    """Remove what was being written in DVC's run cache; the caller has the repository's lock."""
    for path in unfinished_entries(runs):
        if not path.is_dir():
            path.unlink()
    for folder in unfinished_entries(runs):
        folder.rmdir()


def _block(entry: dict[str, Any]) -> dict[str, str]:
    return lock_text.split(f"schema: '2.0'\n{dumps_yaml({'stages': entry})}")


def _busy_raised(check: Callable[..., None]) -> Callable[..., None]:
    """DVC's look at who holds some paths, which raises `Busy`."""

    def raising(*arguments: Any, **options: Any) -> None:
        try:
            check(*arguments, **options)
        except LockError as error:
            processes = re.findall(r"^ *\(PID (\d+)\): (.*)$", str(error), re.MULTILINE)
            raise Busy({int(process): command for process, command in processes}) from None

    return raising


def _holds_files(process: int) -> bool:
    with suppress(FileNotFoundError):
        return f'"pid": {process},' in RUNNING.read_text() and _is_running_engine(process)
    return False


def _is_running_engine(process: int) -> bool:
    """Whether a process with this id lives, and could have run a stage."""
    try:
        found = psutil.Process(process)
        found.cmdline()
    except psutil.AccessDenied:  # of another user, who alone may know
        return True
    except psutil.NoSuchProcess:  # or a zombie
        return False
    return is_engine(found)
