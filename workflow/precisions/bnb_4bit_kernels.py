"""A Triton kernel that dequantizes a 4-bit weight and its constants in one pass over memory; bitsandbytes takes four launches
with double quantization, and as many passes over the constants. workflow/precisions/bnb_4bit_fast.py alone imports this module.
"""

import torch
import triton
import triton.language as tl
from bitsandbytes.functional import QuantState
from torch import Tensor

PAIRS = 1024  # packed bytes of a program; blocks are no longer than twice as many weights


@triton.jit
def _dequantize(
    packed, absmax, levels, constants, second_absmax, offset, out, count, second_blocksize,
    NESTED: tl.constexpr, BLOCKSIZE: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Bytes of two weights, the first in the upper half, -> out [2 count]."""
    BLOCKS: tl.constexpr = 2 * PAIRS // BLOCKSIZE
    first = tl.program_id(0).to(tl.int64) * PAIRS
    pair = first + tl.arange(0, PAIRS)
    codes = tl.load(packed + pair, mask=pair < count, other=0).to(tl.int32)
    block = 2 * first // BLOCKSIZE + tl.arange(0, BLOCKS)
    inside = block * BLOCKSIZE < 2 * count
    if NESTED:
        code = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
        scale = tl.load(constants + code) * tl.load(
            second_absmax + block // second_blocksize, mask=inside, other=0.0
        )
        scale = scale + tl.load(offset)
    else:
        scale = tl.load(absmax + block, mask=inside, other=0.0)
    upper = tl.reshape(tl.load(levels + (codes >> 4)), (BLOCKS, BLOCKSIZE // 2)) * scale[:, None]
    lower = tl.reshape(tl.load(levels + (codes & 15)), (BLOCKS, BLOCKSIZE // 2)) * scale[:, None]
    numbers = tl.reshape(tl.interleave(upper, lower), (2 * PAIRS,)).to(out.dtype.element_ty)
    both = 2 * first + tl.arange(0, 2 * PAIRS)
    tl.store(out + both, numbers, mask=both < 2 * count)


def dequantized(packed: Tensor, state: QuantState) -> Tensor:
    """The weight of `state`'s shape and type, each product and sum rounded as bitsandbytes rounds it."""
    out = torch.empty(state.shape, dtype=state.dtype, device=packed.device)
    count, second = packed.numel(), state.state2
    _dequantize[(triton.cdiv(count, PAIRS),)](
        packed,
        state.absmax,
        state.code,
        second.code if state.nested else state.code,
        second.absmax if state.nested else state.absmax,
        state.offset if state.nested else state.code,
        out,
        count,
        second.blocksize if state.nested else 1,
        NESTED=state.nested,
        BLOCKSIZE=state.blocksize,
        PAIRS=PAIRS,
        enable_fp_fusion=False,  # a product and a sum in one step would round once
    )
    return out
