"""Triton kernels of fp8_rows.py, which alone imports this module, once a tensor is on a GPU: Triton comes with a CUDA
build of torch. E4M3 needs compute capability 8.9.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 128  # rows and columns of a matrix that one program transposes


@triton.jit
def _quantize_row(
    x, factor, codes, scales, stride, width, smallest, HAS_FACTOR: tl.constexpr, BLOCK: tl.constexpr
):
    """One row of x [rows, width], held in registers: read once, and written as codes with their scale."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    numbers = tl.load(x + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_FACTOR:
        numbers = numbers * tl.load(factor + columns, mask=inside, other=0.0)
    largest = tl.max(tl.abs(numbers), axis=0)
    scale = tl.where(largest > smallest, tl.div_rn(largest, 448.0), 1.0)
    # No number is cut off at 448, so that one that is not a number stays none.
    scaled = numbers * tl.div_rn(1.0, scale)
    tl.store(codes + row * width + columns, scaled.to(tl.float8e4nv), mask=inside)
    tl.store(scales + row, scale)


def quantized_rows(x: Tensor, factor: Tensor | None, smallest: float) -> tuple[Tensor, Tensor]:
    """x [rows, width], each column times `factor` [width] -> codes [rows, width] and scales [rows]."""
    rows, width = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    codes = torch.empty((rows, width), dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    _quantize_row[(rows,)](
        x,
        factor,
        codes,
        scales,
        x.stride(0),
        width,
        smallest,
        HAS_FACTOR=factor is not None,
        BLOCK=block,
        num_warps=min(max(block // 1024, 1), 16),
    )
    return codes, scales


@triton.jit
def _transpose_tile(x, out, rows, columns, SIDE: tl.constexpr):
    """A square of x [rows, columns], written to out [columns, rows]."""
    row = (tl.program_id(0) * SIDE + tl.arange(0, SIDE)).to(tl.int64)
    column = (tl.program_id(1) * SIDE + tl.arange(0, SIDE)).to(tl.int64)
    tile = tl.load(
        x + row[:, None] * columns + column[None, :],
        mask=(row < rows)[:, None] & (column < columns)[None, :],
        other=0,
    )
    tl.store(
        out + column[:, None] * rows + row[None, :],
        tl.trans(tile),
        mask=(column < columns)[:, None] & (row < rows)[None, :],
    )


def transposed(codes: Tensor) -> Tensor:
    """Contiguous bytes [rows, columns] -> [columns, rows], contiguous too: PyTorch's own copy reads across memory."""
    rows, columns = codes.shape
    out = torch.empty((columns, rows), dtype=codes.dtype, device=codes.device)
    grid = (triton.cdiv(rows, TILE), triton.cdiv(columns, TILE))
    _transpose_tile[grid](codes, out, rows, columns, SIDE=TILE, num_warps=8)
    return out
