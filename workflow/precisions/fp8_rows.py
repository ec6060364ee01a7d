"""Matrices in E4M3 with a scale for each row, and their products: on a GPU that multiplies them, and in float64 elsewhere.

This module imports torch, so the table's files import it inside their functions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST = 448.0  # number of E4M3 (Micikevicius et al. 2022, table 1)
SMALLEST = 2.0**-100  # a row with no larger number is all zeros; the inverse of its scale would be infinite
MULTIPLE = 16  # of which the widths of a product on a GPU must be
# Sums are rounded to 14 bits as they grow, an error that is small beside that of the factors' 4 bits.
FAST_SUMS = True


@dataclass(frozen=True)
class Rows:
    """A matrix whose row i is codes[i] * scales[i]."""

    codes: Tensor  # [rows, width], float8_e4m3fn
    scales: Tensor  # [rows], float32


def quantized_rows(x: Tensor, factor: Tensor | None = None) -> Rows:
    """x [rows, width] with each column times `factor` [width], each row scaled so that its largest number becomes 448."""
    if _computes_fp8(x.device) and x.numel():
        from workflow.precisions import fp8_kernels

        return Rows(*fp8_kernels.quantized_rows(x, factor, SMALLEST))
    return rows_by_pytorch(x, factor)


def rows_by_pytorch(x: Tensor, factor: Tensor | None = None) -> Rows:
    """The same in PyTorch's operations."""
    numbers = x.float() if factor is None else x.float() * factor
    largest = numbers.abs().amax(1)
    scales = torch.where(largest > SMALLEST, largest / LARGEST, 1.0)
    return Rows((numbers * (1 / scales)[:, None]).to(torch.float8_e4m3fn), scales)


def product(rows: Rows, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """rows [tokens, in] times W^T, where row i of W is codes[i] * scales[i] -> [tokens, out] in `dtype`.

    Args:
        codes: [out, in], bytes.
        scales: [out], float32.
    """
    codes = codes.view(torch.float8_e4m3fn)
    if _can_multiply(rows.codes, codes):
        return _scaled(rows, codes.t(), scales, dtype)
    return product_in_float64(rows, codes.t(), scales, dtype)


def product_with_columns(rows: Rows, codes: Tensor, dtype: torch.dtype) -> Tensor:
    """rows [tokens, out] times bytes of codes [out, in] -> [tokens, in] in `dtype`."""
    ones = torch.ones(codes.shape[1], dtype=torch.float32, device=codes.device)
    if _can_multiply(rows.codes, codes):
        from workflow.precisions import fp8_kernels

        # The GPU multiplies rows by rows, and a second copy of the weights would take back the memory that FP8 saves.
        across = fp8_kernels.transposed(codes).view(torch.float8_e4m3fn)
        return _scaled(rows, across.t(), ones, dtype)
    return product_in_float64(rows, codes.view(torch.float8_e4m3fn), ones, dtype)


def product_in_float64(rows: Rows, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """rows [tokens, in] times codes [in, out] times scales [out], rounded once at the end.

    Each product of two codes is a multiple of 2^-18 below 2^18, so the sums of up to 2^17 of them are exact.
    """
    sums = rows.codes.double() @ codes.double()
    return (sums * rows.scales.double()[:, None] * scales.double()).to(dtype)


def _scaled(rows: Rows, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch._scaled_mm(
        rows.codes,
        codes,
        scale_a=rows.scales[:, None],
        scale_b=scales[None],
        out_dtype=torch.bfloat16,  # the only one with a scale for each row
        use_fast_accum=FAST_SUMS,
    )
    return out.to(dtype)


def _computes_fp8(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def _can_multiply(rows: Tensor, codes: Tensor) -> bool:
    """Whether the device multiplies these matrices in FP8."""
    return (
        _computes_fp8(codes.device) and len(rows) > 0 and not any(width % MULTIPLE for width in codes.shape)
    )
