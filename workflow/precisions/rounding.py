"""Rounding of weights to 4-bit floating point with a scale for each block: MXFP4 and NVFP4.

MXFP4 is the OCP Microscaling Formats specification 1.0 (sections 5.2 and 6.3). NVFP4 is NVIDIA's recipe: its blocks of 16
have scales of E4M3, and a tensor has one scale in float32, with which its largest number uses both ranges to the end.
A card of a run shows these functions, so they need torch alone.
"""

import torch


def e2m1(numbers: torch.Tensor) -> torch.Tensor:
    """The nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives; ties go to the even one, and larger numbers to 6."""
    exponent = (torch.frexp(numbers.abs()).exponent - 1).clamp(0, 2)
    step = torch.exp2(exponent - 1.0)
    return ((numbers / step).round() * step).clamp(-6, 6)


def in_blocks(weight: torch.Tensor, size: int) -> torch.Tensor:
    """Float32 blocks [out, blocks, size] of a weight [out, in]; the last of each row is filled up with zeros."""
    missing = -weight.shape[1] % size
    return torch.nn.functional.pad(weight.float(), (0, missing)).unflatten(1, (-1, size))


def mxfp4(weight: torch.Tensor) -> torch.Tensor:
    """A weight [out, in] rounded to E2M1 with a power of two (E8M0) for each 32 numbers of a row."""
    blocks = in_blocks(weight, 32)
    largest = blocks.abs().amax(-1, keepdim=True)
    # The exponent of the largest number less that of the largest E2M1 number, 4 to 6.
    exponent = (torch.frexp(largest).exponent - 1 - 2).clamp(-127, 127)
    rounded = torch.ldexp(e2m1(torch.ldexp(blocks, -exponent)), exponent)
    return rounded.flatten(1)[:, : weight.shape[1]].to(weight.dtype)


def nvfp4(weight: torch.Tensor) -> torch.Tensor:
    """A weight [out, in] rounded to E2M1 with an E4M3 number for each 16 of a row, and a float32 number for all."""
    blocks = in_blocks(weight, 16)
    largest = blocks.abs().amax(-1, keepdim=True)
    tensor_scale = largest.amax() / (6 * 448)
    scale = (largest / 6 / tensor_scale).nan_to_num(0.0).to(torch.float8_e4m3fn).float() * tensor_scale
    rounded = e2m1((blocks / scale).nan_to_num(0.0, 0.0, 0.0)) * scale
    return rounded.flatten(1)[:, : weight.shape[1]].to(weight.dtype)
