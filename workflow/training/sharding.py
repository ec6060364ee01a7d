"""What a training needs to be spread over several processes, each with a part of every weight (FSDP).

accelerate's FullyShardedDataParallelPlugin does the sharding (PyTorch's FSDP2, `fully_shard`); here is what
makes the numbers those of one process: which rows each process computes, and sums over all of them.
"""

from collections.abc import Iterator, Sized

import torch
from accelerate import Accelerator, ParallelismConfig
from accelerate.data_loader import prepare_data_loader
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Sampler

from workflow.models.load import quantized_linears
from workflow.runtime.errors import CheckError
from workflow.training.speed.fused import IGNORED

# FSDP's settings under transformers' names: every decoder layer is a unit whose weights are gathered when it
# computes and freed after it, forward and backward.
FSDP = {"version": 2, "reshard_after_forward": True, "cpu_ram_efficient_loading": False}
BLANK = {"input_ids": [0], "labels": [IGNORED]}


class RankBatches(Sampler):
    """One process' share of the forward passes of one process that computed all.

    Rows come in the order of `rows`. Every optimizer step holds the same rows as in one process, in the same
    passes; the passes are dealt out in turn. At an epoch's end, where fewer passes are left than processes, the
    others get an empty one: all must take part in each pass, since each holds a part of the weights.

    Args:
        rows: a sampler of row numbers.
        pass_rows: rows per forward pass.
        passes: forward passes of a process in a full optimizer step.
    """

    def __init__(self, rows: Sampler, *, pass_rows: int, passes: int, rank: int, ranks: int):
        self.rows, self.pass_rows, self.passes, self.rank, self.ranks = rows, pass_rows, passes, rank, ranks

    @property
    def step_rows(self) -> int:
        return self.pass_rows * self.passes * self.ranks

    def __len__(self) -> int:
        steps, rest = divmod(len(self.rows), self.step_rows)
        return steps * self.passes + -(-rest // (self.pass_rows * self.ranks))

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self.rows)
        for start in range(0, len(order), self.pass_rows * self.ranks):
            together = order[start : start + self.pass_rows * self.ranks]
            yield together[self.rank * self.pass_rows : (self.rank + 1) * self.pass_rows]


class BlankCollator:
    """Collates as `collate` does; an empty pass becomes one token that nothing is learned from."""

    def __init__(self, collate):
        self.collate = collate

    def __call__(self, rows: list[dict]) -> dict[str, Tensor]:
        return self.collate(rows or [BLANK])


def loader(
    dataset: Sized, batches: RankBatches, *, collate, workers: int, device: torch.device
) -> DataLoader:
    """A data loader of these batches alone, which accelerate does not deal out a second time."""
    return prepare_data_loader(
        DataLoader(dataset, batch_sampler=batches, collate_fn=BlankCollator(collate), num_workers=workers),
        device=device,
        num_processes=1,
        process_index=0,
        put_on_device=True,
    )


def use_fsdp_on_cpu(accelerator: Accelerator, plugin: dict) -> None:
    """Let accelerate shard on a CPU as on GPUs: it takes the plugin's arguments, and does so for GPUs alone."""
    if accelerator.state.distributed_type != DistributedType.MULTI_CPU:
        return
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**plugin)
    # Left alone, PyTorch would take the GPUs where it was built for some.
    ranks = accelerator.num_processes
    accelerator.state.parallelism_config = ParallelismConfig(dp_shard_size=ranks)
    names = tuple(accelerator.state.parallelism_config.fsdp_dim_names)
    accelerator.state.device_mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=names)
    for state in (accelerator.state, PartialState()):
        state.distributed_type = DistributedType.FSDP


def keep_quantization(model: nn.Module, device: torch.device) -> None:
    """Put what dequantizes a 4-bit layer beside its weight, which becomes an ordinary tensor when it is sharded.

    The constants stay whole on every device: with double quantization a 64th of a byte a parameter, without
    it a 16th.
    """
    for layer in quantized_linears(model):
        layer.quant_state = layer.weight.quant_state
        layer.quant_state.to(device)


def check_sharded(model: nn.Module, ranks: int) -> None:
    """Raise a CheckError unless every weight, 4-bit ones included, is cut into as many parts as there are processes."""
    for name, parameter in model.named_parameters():
        rows = -(-parameter.shape[0] // ranks)
        part = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if part.shape[0] > rows:
            raise CheckError(
                f"{name} has {parameter.shape[0]} rows, and this process holds {part.shape[0]} of them"
            )


def held_gib(model: nn.Module) -> float:
    """What this process holds of all weights and quantization constants, a tied weight once."""
    tensors = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    for layer in quantized_linears(model):
        state = getattr(layer, "quant_state", None)
        tensors += [part.absmax for part in (state, getattr(state, "state2", None)) if part is not None]
    return sum(tensor.nbytes for tensor in tensors) / 2**30


def whole(parameter: Tensor) -> Tensor:
    """A parameter as one process would hold it; gathered onto the CPU, for which all processes must ask together."""
    value = parameter.detach()
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value
