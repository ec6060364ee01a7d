"""The GPUs that a stage computes on: the first that no other stage has, of those that are visible to it.

A stage locks one file per GPU for as long as its process lives. The kernel frees the locks of a process that
dies, however it dies, so none is ever left over. Torch is not imported: CUDA reads CUDA_VISIBLE_DEVICES once,
when it starts. STAGES_PER_GPU=4 in the environment lets four stages share each GPU, for small models, whose start-up
takes longer than what they compute; the stages that measure time and memory still have theirs alone.
"""

import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pynvml

from workflow.runtime.errors import UserError
from workflow.runtime.lifetime import locked

VISIBLE = "CUDA_VISIBLE_DEVICES"
PLACES = "STAGES_PER_GPU"
# A neighbor on the GPU would be in their numbers.
MEASURING = ("benchmark", "benchmark_grid")
# Seconds between two looks for a free GPU.
PATIENCE = 1.0


@dataclass(frozen=True)
class Gpu:
    """A GPU, or an instance of one that MIG splits.

    Attributes:
        name: what CUDA_VISIBLE_DEVICES calls it: the user's or the cluster's own word where there is one.
        uuid: what it is, whatever it is called: what is locked.
    """

    name: str
    uuid: str


@contextmanager
def taken(count: int, *, places: int = 1, say: Callable[[str], None] = print) -> Iterator[list[Gpu]]:
    """Hold `count` GPUs, or places on them, that no other stage of this user on this machine holds; wait for them.

    CUDA_VISIBLE_DEVICES names these alone from then on. On a machine without an NVIDIA driver, or with
    CUDA_VISIBLE_DEVICES set to none, nothing is held and nothing waits.

    Args:
        count: 0 for a stage that computes on no GPU: it holds none, and does not wait.
        places: how many stages may share a GPU with this one, itself included; 1 to have it alone.
        say: called with a line when it has to wait.

    Raises:
        UserError: fewer are visible than are needed.
    """
    seen = visible() if count else []
    if not seen:
        # Given several that NVML does not know, the trainer would split every batch among them.
        os.environ.setdefault(VISIBLE, ",".join(map(str, range(max(count, 1)))))
        yield []
        return
    if len(seen) < count:
        names = ", ".join(gpu.name for gpu in seen)
        raise UserError(f"{count} GPUs are needed, and {len(seen)} can be seen: {names}.")
    folder = lock_folder()
    with ExitStack() as held:
        chosen, busy = _choose(seen, count, folder, held, places)
        if busy and not chosen:
            holders = "; ".join(f"{gpu.name} is held by process {process}" for gpu, process in busy.items())
            say(f"waits for {'a GPU' if count == 1 else f'{count} GPUs'}: {holders}")
        while not chosen:
            time.sleep(PATIENCE)
            chosen, _ = _choose(seen, count, folder, held, places)
        os.environ[VISIBLE] = ",".join(gpu.name for gpu in chosen)
        yield chosen


def places(stage: str, *, gpus: int) -> int:
    """How many stages may share a GPU with this one, itself included: what STAGES_PER_GPU says, 1 without it.

    Args:
        stage: its name in dvc.yaml; one that measures shares with none.
        gpus: how many it needs; the processes of a sharded training wait for one another, so they share with none.

    Raises:
        UserError: STAGES_PER_GPU is not a whole number from 1 to 999.
    """
    asked = os.environ.get(PLACES, "1")
    if not (asked.isdecimal() and len(asked) < 4 and int(asked) > 0):
        raise UserError(f"{PLACES} is {asked!r}; it must be a whole number from 1 to 999.")
    return 1 if stage in MEASURING or gpus > 1 else int(asked)


def visible() -> list[Gpu]:
    """The GPUs that CUDA would see in this process, in CUDA_VISIBLE_DEVICES' order; all where it is not set.

    Entries are indices, UUIDs or beginnings of one, of GPUs or MIG instances; the first that names nothing
    ends the list, as it does for CUDA. An index counts in NVML's order, which is CUDA's where all GPUs of a
    machine are alike, or with CUDA_DEVICE_ORDER=PCI_BUS_ID.
    """
    installed = _installed()
    if VISIBLE not in os.environ:
        return [Gpu(uuid, uuid) for gpu in installed for uuid in gpu[1:] or gpu]
    found = []
    for name in os.environ[VISIBLE].split(",") if installed else []:
        uuid = _uuid(name.strip(), installed)
        if uuid is None:
            break
        found.append(Gpu(name.strip(), uuid))
    return found


def lock_folder() -> Path:
    """Where the lock files lie: one place for all repositories of a user on this machine, never a shared disk.

    Raises:
        UserError: somebody else made it, where everybody may.
    """
    folder = Path(tempfile.gettempdir()) / f"qlora-cost-gpus-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise UserError(f"{folder} is not this user's own folder: remove it, or set TMPDIR to another place.")
    return folder


def _installed() -> list[list[str]]:
    """The UUID of each GPU, followed by those of its MIG instances; empty without NVIDIA's driver."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return [[pynvml.nvmlDeviceGetUUID(handle), *_instances(handle)] for handle in handles]
    finally:
        pynvml.nvmlShutdown()


def _instances(handle: object) -> list[str]:
    try:
        if pynvml.nvmlDeviceGetMigMode(handle)[0] != pynvml.NVML_DEVICE_MIG_ENABLE:
            return []
    except pynvml.NVMLError:  # a GPU that knows no MIG
        return []
    found = []
    for index in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        with suppress(pynvml.NVMLError):  # a place that no instance fills
            found.append(pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index)))
    return found


def _uuid(name: str, installed: list[list[str]]) -> str | None:
    """What a word of CUDA_VISIBLE_DEVICES stands for; None where it stands for nothing."""
    if name.isdecimal():
        named = installed[int(name) : int(name) + 1]
    elif name.startswith("MIG-"):
        # The older form, MIG-GPU-<uuid>/<instance>/<instance>, is in no list and is its own name.
        instances = [uuid for gpu in installed for uuid in gpu[1:] if uuid.startswith(name)]
        return instances[0] if instances else name
    else:
        named = [gpu for gpu in installed if name.startswith("GPU-") and gpu[0].startswith(name)]
    # Of a GPU that MIG splits, CUDA sees the first instance.
    return (named[0][1:2] or named[0])[0] if named else None


def _choose(
    seen: list[Gpu], count: int, folder: Path, held: ExitStack, places: int
) -> tuple[list[Gpu], dict[Gpu, str]]:
    """Lock the first `count` GPUs that are free, or have a place, which `held` then holds; none where fewer are.

    Returns:
        The GPUs that were locked, and those that were not free with the id of a process that holds each.
    """
    chosen, busy = [], {}
    # One process looks at a time: two that need two GPUs each would else take one each, for ever.
    with open(folder / "choosing", "w") as turn, ExitStack() as mine:
        fcntl.flock(turn, fcntl.LOCK_EX)
        for gpu in seen:
            if len(chosen) == count:
                break
            path = folder / gpu.uuid.replace("/", "_")
            if _lock(path, places, mine):
                chosen.append(gpu)
            else:
                busy[gpu] = path.read_text()
        if len(chosen) < count:
            return [], busy
        held.push(mine.pop_all())
    return chosen, busy


def _lock(path: Path, places: int, held: ExitStack) -> bool:
    """Lock a GPU's file: alone, or together with those that share it, who have a file for each place as well."""
    with ExitStack() as mine:
        # Opened to append: another process' id in it is not to be lost.
        file = mine.enter_context(open(path, "a+"))
        if not locked(file, fcntl.LOCK_EX if places == 1 else fcntl.LOCK_SH):
            return False
        if places > 1 and not any(
            locked(mine.enter_context(open(f"{path}.{place}", "a")), fcntl.LOCK_EX) for place in range(places)
        ):
            return False
        file.truncate(0)
        print(os.getpid(), end="", file=file, flush=True)
        held.push(mine.pop_all())
    return True
