"""The GPUs that a stage computes on: the first of those visible to it that no other stage has.

A stage locks one file per GPU for as long as its process lives, however the process ends. Torch is not imported: CUDA reads
CUDA_VISIBLE_DEVICES once, when it starts. STAGES_PER_GPU=4 in the environment lets four stages share each GPU, for small
models that take longer to start than to compute; stages that measure time and memory still have theirs alone.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pynvml
from filelock import BaseFileLock

from workflow.runtime.errors import UserError
from workflow.runtime.locks import file_lock, try_lock

VISIBLE = "CUDA_VISIBLE_DEVICES"
STAGES_PER_GPU = "STAGES_PER_GPU"
# Another stage on the same GPU would change what these measure.
MEASURING = ("benchmark", "benchmark_grid")
PATIENCE = 1.0  # seconds between two attempts to get a GPU


@dataclass(frozen=True)
class Gpu:
    """A GPU, or a MIG instance of one.

    Attributes:
        name: an entry of CUDA_VISIBLE_DEVICES, as the user or the cluster wrote it.
        uuid: the same for every name of the GPU; it names the lock file.
    """

    name: str
    uuid: str


@contextmanager
def reserved(count: int, *, sharers: int = 1, say: Callable[[str], None] = print) -> Iterator[list[Gpu]]:
    """Reserve GPUs, or places on them, against other stages of this user on this machine; wait until they are free.

    CUDA_VISIBLE_DEVICES lists only these from then on. Without an NVIDIA driver, or if CUDA_VISIBLE_DEVICES hides every
    GPU, nothing is reserved and nothing waits.

    Args:
        count: number of GPUs; 0 for a stage that computes on none, which does not wait.
        sharers: how many stages may share a GPU with this one, itself included; 1 to have it alone.
        say: called with a line if it has to wait.

    Raises:
        UserError: fewer GPUs are visible than are needed.
    """
    candidates = visible() if count else []
    if not candidates:
        # With several that NVML does not know, the trainer would split every batch among them.
        os.environ.setdefault(VISIBLE, ",".join(map(str, range(max(count, 1)))))
        yield []
        return
    if len(candidates) < count:
        names = ", ".join(gpu.name for gpu in candidates)
        raise UserError(f"{count} GPUs are needed, and {len(candidates)} can be seen: {names}.")
    folder = lock_folder()
    with ExitStack() as locks:
        gpus, holders = _choose(candidates, count, sharers, folder, locks)
        if not gpus:
            busy = "; ".join(f"{gpu.name} is held by process {process}" for gpu, process in holders.items())
            say(f"waits for {'a GPU' if count == 1 else f'{count} GPUs'}: {busy}")
        while not gpus:
            time.sleep(PATIENCE)
            gpus, _ = _choose(candidates, count, sharers, folder, locks)
        os.environ[VISIBLE] = ",".join(gpu.name for gpu in gpus)
        yield gpus


def allowed_sharers(stage: str, *, gpus: int) -> int:
    """Return how many stages may share a GPU with this one, itself included: STAGES_PER_GPU, which is 1 by default.

    Args:
        stage: its name in dvc.yaml; a stage that measures shares with no other.
        gpus: how many it needs. The processes of a sharded training wait for one another, so they share with no stage.

    Raises:
        UserError: STAGES_PER_GPU is not a whole number from 1 to 999.
    """
    value = os.environ.get(STAGES_PER_GPU, "1")
    if not (value.isdecimal() and len(value) < 4 and int(value) > 0):
        raise UserError(f"{STAGES_PER_GPU} is {value!r}; it must be a whole number from 1 to 999.")
    return 1 if stage in MEASURING or gpus > 1 else int(value)


def visible() -> list[Gpu]:
    """Return the GPUs that CUDA would see in this process, in the order of CUDA_VISIBLE_DEVICES; by default all.

    Its entries are indices, UUIDs of GPUs or the beginnings of UUIDs, or names of MIG instances; the first that names
    nothing ends the list, as it does for CUDA. An index counts in NVML's order, which is CUDA's if all GPUs of a machine
    are alike, or with CUDA_DEVICE_ORDER=PCI_BUS_ID.
    """
    uuids = _installed_uuids()
    if VISIBLE not in os.environ:
        return [Gpu(uuid, uuid) for uuid in uuids]
    gpus = []
    for name in os.environ[VISIBLE].split(",") if uuids else []:
        uuid = _uuid_of(name.strip(), uuids)
        if uuid is None:
            break
        gpus.append(Gpu(name.strip(), uuid))
    return gpus


def lock_folder() -> Path:
    """Return the folder of the lock files: one for all repositories of a user on this machine, never on a shared disk.

    Raises:
        UserError: another user made it, which is possible where everybody may write.
    """
    folder = Path(tempfile.gettempdir()) / f"qlora-cost-gpus-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise UserError(f"{folder} is not this user's own folder: remove it, or set TMPDIR to another place.")
    return folder


def _installed_uuids() -> list[str]:
    """Return the UUID of each GPU; empty without NVIDIA's driver."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return [pynvml.nvmlDeviceGetUUID(handle) for handle in handles]
    finally:
        pynvml.nvmlShutdown()


def _uuid_of(name: str, uuids: list[str]) -> str | None:
    """Return the UUID that an entry of CUDA_VISIBLE_DEVICES stands for; None if it stands for nothing."""
    if name.isdecimal():
        return uuids[int(name)] if int(name) < len(uuids) else None
    if name.startswith("MIG-"):
        return name
    return next((uuid for uuid in uuids if name.startswith("GPU-") and uuid.startswith(name)), None)


def _choose(
    candidates: list[Gpu], count: int, sharers: int, folder: Path, locks: ExitStack
) -> tuple[list[Gpu], dict[Gpu, str]]:
    """Lock the first `count` GPUs that are free or have a free place; none if fewer are.

    Args:
        candidates: in order of preference.
        count: how many are needed.
        sharers: as for `reserved`.
        folder: of the lock files.
        locks: gets the locks.

    Returns:
        The GPUs that were locked, and the process that holds each that was not free.
    """
    gpus, holders = [], {}
    # One process chooses at a time: two that need two GPUs each could otherwise take one each and wait forever.
    with file_lock(folder / "choosing"), ExitStack() as attempt:
        for gpu in candidates:
            if len(gpus) == count:
                break
            path = folder / gpu.uuid.replace("/", "_")
            if lock := _lock_gpu(path, sharers):
                attempt.callback(lock.release)
                path.write_text(str(os.getpid()))
                gpus.append(gpu)
            else:
                holders[gpu] = path.read_text()
        if len(gpus) < count:
            return [], holders
        locks.push(attempt.pop_all())
    return gpus, holders


def _lock_gpu(path: Path, sharers: int) -> BaseFileLock | None:
    """Lock a GPU's file to have it alone, or that of a place to share it; None if it is busy. Only the chooser may call."""
    whole = try_lock(path)
    if whole is None:
        return None
    if sharers == 1 and all(_is_free(place) for place in path.parent.glob(f"{path.name}.*")):
        return whole
    whole.release()
    if sharers == 1:
        return None
    places = (try_lock(path.with_name(f"{path.name}.{number}")) for number in range(sharers))
    return next(filter(None, places), None)


def _is_free(path: Path) -> bool:
    lock = try_lock(path)
    if lock:
        lock.release()
    return lock is not None
