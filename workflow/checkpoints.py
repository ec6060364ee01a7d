"""A training that was ended goes on from its last checkpoint, and ends with the same bits as one that was not.

A checkpoint is a folder of safetensors and JSON: nothing in it is code. Each process of a training keeps its own
part: the weights that are trained, the optimizer's state, the state of the random generators, and the trainer's
and the history's counts.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from workflow.files import read_json, sha256

BELONGS = "belongs_to.json"


@dataclass(frozen=True)
class Kept:
    """What a training keeps of itself while it runs.

    Attributes:
        every: optimizer steps after which a checkpoint replaces the last one.
        belongs_to: the identity of the training.
        last: the checkpoint that it goes on from, one of this very training; None to begin.
    """

    every: int
    belongs_to: str
    last: Path | None = None


@dataclass(frozen=True)
class Part:
    """What one process keeps: tensors by name, and the rest as JSON holds it."""

    tensors: dict[str, Tensor]
    rest: dict[str, Any]

    def write(self, folder: Path, rank: int) -> None:
        save_file({name: t.contiguous() for name, t in self.tensors.items()}, folder / f"{rank}.safetensors")
        # Not write_json: a loss that is not finite is for the check after the training.
        (folder / f"{rank}.json").write_text(json.dumps(self.rest), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path, rank: int) -> "Part":
        return cls(load_file(folder / f"{rank}.safetensors"), read_json(folder / f"{rank}.json"))


def identity(files: Iterable[Path], **asked: Any) -> str:
    """The sha256 of everything that decides a training: a checkpoint of another one is never continued.

    Args:
        files: or folders; their content counts, and their names.
        asked: params and versions, as JSON holds them.
    """
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode())
    for path in files:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                digest.update(f"{file.name} {sha256(file)}\n".encode())
    return digest.hexdigest()


def last(folder: Path, *, belongs_to: str, clean: bool) -> Path | None:
    """The last checkpoint in `folder` to go on from, or None.

    Args:
        belongs_to: the identity of the training that is about to run.
        clean: remove the checkpoints of another training; for one of the processes that share a training.
    """
    marks = folder.glob(f"step-*/{BELONGS}")
    mark = max(marks, key=lambda path: _step(path.parent), default=None)
    if mark is not None and read_json(mark) == belongs_to:
        return mark.parent
    if clean:
        remove(folder)
    return None


def remove(folder: Path) -> None:
    """Remove all checkpoints; the marks first, so that what is left by a kill is never gone on from."""
    for mark in folder.glob(f"step-*/{BELONGS}"):
        mark.unlink()
    if folder.exists():
        shutil.rmtree(folder)


def replace(beside: Path, checkpoint: Path) -> None:
    """Let a checkpoint that is whole take its name, then remove the older ones."""
    if checkpoint.exists():
        shutil.rmtree(checkpoint)
    beside.replace(checkpoint)
    for older in checkpoint.parent.glob("step-*"):
        if older != checkpoint:
            shutil.rmtree(older)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


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
