"""The quicker of two ways to dequantize a 4-bit weight on a GPU: one kernel of our own, where it gives bitsandbytes' numbers to
the last bit in less time, and bitsandbytes' own.

This module imports torch, so the table's files import it inside their functions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from torch import Tensor

TRIED = (4096, 4096)  # of the weight that both are tried on: one of a 7B model
REPEATS = 20

Way = Callable[[Tensor, QuantState], Tensor]


@dataclass(frozen=True)
class Kind:
    """What decides how a weight is dequantized."""

    device: torch.device
    quant_type: str
    nested: bool
    blocksize: int
    dtype: torch.dtype


def dequantized(packed: Tensor, state: QuantState) -> Tensor:
    """The weight [out, in] of a layer, in its state's type."""
    if not (packed.is_cuda and packed.is_contiguous()):
        return dequantize_4bit(packed, state)
    kind = Kind(packed.device, state.quant_type, bool(state.nested), state.blocksize, state.dtype)
    # To be sharded, the numbers are stored as if they were of another type.
    return way_of(kind)(packed.view(torch.uint8).view(-1, 1), state)


@cache
def way_of(kind: Kind) -> Way:
    """The quicker way for weights of a kind, tried once on a made-up one."""
    try:
        from workflow.precisions import bnb_4bit_kernels
    except ImportError:  # a build of torch without Triton
        return dequantize_4bit
    generator = torch.Generator(kind.device).manual_seed(0)
    weight = torch.randn(TRIED, generator=generator, device=kind.device).to(kind.dtype)
    stored = quantize_4bit(
        weight, blocksize=kind.blocksize, compress_statistics=kind.nested, quant_type=kind.quant_type
    )
    return quicker(bnb_4bit_kernels.dequantized, dequantize_4bit, stored, milliseconds)


def quicker(
    ours: Way, own: Way, stored: tuple[Tensor, QuantState], cost: Callable[[Callable[[], Tensor]], float]
) -> Way:
    """`ours` if it works, gives the same bits as the library's `own`, and costs less; else `own`."""
    try:
        if not ours(*stored).equal(own(*stored)):
            return own
    except Exception:  # what a compiler raises on a device that it does not know is of many types
        return own
    return ours if cost(lambda: ours(*stored)) < cost(lambda: own(*stored)) else own


def milliseconds(work: Callable[[], Tensor]) -> float:
    """What some work takes on the GPU, the mean of several runs one after the other."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    work()
    begin.record()
    for _ in range(REPEATS):
        work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / REPEATS
