"""A training that was ended goes on from its last checkpoint, and ends with the same bits as one that was not.

A checkpoint is a folder of safetensors and JSON: nothing in it is code. Each process of a training keeps its own
part: the weights that are trained, the optimizer's state, the state of the random generators, the trainer's and the
history's counts and, where they are to be saved, the best weights so far. A manifest has the digest of each file and its
own: what a disk damaged is never gone on from.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from workflow.runtime.errors import UserError
from workflow.runtime.files import finish_folder, read_json, sha256, sync, write_json

MANIFEST = "manifest.json"
STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Checkpointing:
    """When a training writes checkpoints, and to which training they belong.

    Attributes:
        every: optimizer steps after which a checkpoint is written; the one before it is kept, and older ones go.
        belongs_to: the identity of the training.
    """

    every: int
    belongs_to: str


class Damaged(Exception):
    """What is wrong with a checkpoint, as a clause."""


@dataclass(frozen=True)
class Part:
    """What one process keeps: tensors by name, and the rest as JSON holds it."""

    tensors: dict[str, Tensor]
    rest: dict[str, Any]

    def write(self, folder: Path, rank: int) -> dict[str, str]:
        """Write both files; return the sha256 of each by its name."""
        tensors, rest = folder / f"{rank}.safetensors", folder / f"{rank}.json"
        save_file({name: t.contiguous() for name, t in self.tensors.items()}, tensors)
        # Not write_json: a loss that is not finite is for the check after the training.
        rest.write_text(json.dumps(self.rest), encoding="utf-8")
        return {path.name: sha256(path) for path in (tensors, rest)}

    @classmethod
    def read(cls, folder: Path, rank: int) -> "Part":
        return cls(load_file(folder / f"{rank}.safetensors"), read_json(folder / f"{rank}.json"))


def identity(files: Iterable[Path], **settings: Any) -> str:
    """The sha256 of everything that decides a training: a checkpoint of another one is never continued.

    Args:
        files: or folders; their content counts, and their names.
        settings: params and versions, as JSON holds them.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path in files:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and "__pycache__" not in file.parts:
                digest.update(f"{file.name} {sha256(file)}\n".encode())
    return digest.hexdigest()


def last(folder: Path, *, belongs_to: str, say: Callable[[str], None]) -> Path | None:
    """The last whole checkpoint in `folder` to go on from, or None; for one of the processes that share a training.

    A damaged one is set aside, and the checkpoints of another training are removed.

    Args:
        belongs_to: the identity of the training that is about to run.
        say: called with a line for each that is damaged.

    Raises:
        UserError: `folder` is a file.
    """
    if not folder.exists():
        return None
    if not folder.is_dir():
        raise UserError(f"{folder} is a file, and must be a folder: delete it.")
    for partial in folder.glob(".*.partial"):  # what a kill left
        shutil.rmtree(partial, ignore_errors=True)
    none_is_whole = False
    for checkpoint in reversed(_checkpoints(folder)):
        try:
            owner = read_manifest(checkpoint)["belongs_to"]
        except Damaged as damage:
            place = _set_aside(checkpoint)
            say(f"  the checkpoint {checkpoint} is damaged: {damage}. It is set aside as {place.name}")
            none_is_whole = True
            continue
        if owner == belongs_to:
            return checkpoint
        remove(folder)
        return None
    if none_is_whole:
        say("  no whole checkpoint is left, and the training begins anew")
    return None


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, after each of its files was found to be as it was written.

    Raises:
        Damaged: one is not.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_bytes())
    except OSError as error:
        raise _unreadable(MANIFEST, error) from None
    except (ValueError, RecursionError):
        raise Damaged(f"{MANIFEST} is no JSON") from None
    if not isinstance(manifest, dict) or manifest.pop("sha256", None) != _digest(manifest):
        raise Damaged(f"{MANIFEST} is not as it was written")
    for name, expected in manifest["files"].items():
        try:
            sound = sha256(checkpoint / name) == expected
        except OSError as error:
            raise _unreadable(name, error) from None
        if not sound:
            raise Damaged(f"{name} is not as it was written (its sha256 is another)")
    return manifest


def _unreadable(name: str, error: OSError) -> Damaged:
    missing = isinstance(error, FileNotFoundError)
    return Damaged(f"{name} is missing" if missing else f"{name} cannot be read ({error.strerror})")


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def complete(partial: Path, checkpoint: Path, *, belongs_to: str, files: dict[str, str]) -> None:
    """Let a folder whose files are all written become a checkpoint that the disk holds; keep the one before it too.

    Args:
        files: the sha256 of each by its name.
    """
    manifest = {"belongs_to": belongs_to, "files": files}
    write_json(partial / MANIFEST, manifest | {"sha256": _digest(manifest)})
    finish_folder(partial)
    if checkpoint.exists():
        _discard(checkpoint)
    partial.replace(checkpoint)
    sync(checkpoint.parent)
    others = [path for path in _checkpoints(checkpoint.parent) if path != checkpoint]
    for older in others[:-1]:
        _discard(older)


def remove(folder: Path) -> None:
    """Remove all checkpoints, whole ones first: what is left by a kill is never gone on from."""
    for checkpoint in _checkpoints(folder):
        _discard(checkpoint)
    # What the system does not let go of is in nobody's way: the training is done, or begins anew.
    shutil.rmtree(folder, ignore_errors=True)


def _checkpoints(folder: Path) -> list[Path]:
    """What has the name of a checkpoint, in the order of its steps."""
    named = [path for path in folder.iterdir() if STEP.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(named, key=lambda path: int(path.name.removeprefix("step-")))


def _set_aside(checkpoint: Path) -> Path:
    place = checkpoint.with_name(f"damaged-{checkpoint.name}")
    if place.exists():
        _discard(place)
    return checkpoint.replace(place)


def _discard(path: Path) -> None:
    """Remove a folder that nobody sees half removed."""
    partial = path.replace(path.with_name(f".{path.name}.partial"))
    if partial.is_dir():
        shutil.rmtree(partial, ignore_errors=True)
    else:
        partial.unlink()


def pack_model(model: nn.Module) -> dict[str, Tensor]:
    """This process' part of the weights that are trained."""
    return {f"weights.{name}": _local(p.detach()) for name, p in _trained(model)}


def unpack_model(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    for name, parameter in _trained(model):
        _local(parameter.data).copy_(tensors[f"weights.{name}"])


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def pack_optimizer(optimizer: torch.optim.Optimizer) -> Part:
    """The optimizer's state: its tensors by number of the parameter and name, the rest as JSON."""
    state = optimizer.state_dict()
    tensors, rest = {}, {}
    for number, values in state["state"].items():
        for name, value in values.items():
            (tensors if isinstance(value, Tensor) else rest)[f"optimizer.{number}.{name}"] = value
    return Part(
        {name: _local(tensor) for name, tensor in tensors.items()},
        {"state": rest, "param_groups": state["param_groups"]},
    )


def unpack_optimizer(optimizer: torch.optim.Optimizer, part: Part) -> None:
    """Put a packed state back, sharded as the parameters are where they are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for key, value in (part.tensors | part.rest["state"]).items():
        if key.startswith("optimizer."):
            _, number, name = key.split(".", 2)
            like = parameters[int(number)].data
            if isinstance(like, DTensor) and isinstance(value, Tensor) and value.dim():
                value = DTensor.from_local(value.to(like.device), like.device_mesh, like.placements)
            state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": part.rest["param_groups"]})


def pack_random() -> dict[str, Tensor]:
    """The states of PyTorch's generators, which dropout draws from; no other one is drawn from in a step."""
    states = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["random.cuda"] = torch.cuda.get_rng_state()
    return states


def unpack_random(tensors: dict[str, Tensor]) -> None:
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"])
