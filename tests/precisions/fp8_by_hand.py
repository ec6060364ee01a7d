"""FP8 with a scale for each row, by arithmetic in float64: neither PyTorch's type nor the pipeline's code."""

import torch
from torch import Tensor, nn
from torch.nn import functional


def e4m3(numbers: Tensor) -> Tensor:
    """Each number rounded to the nearest of E4M3: four significant bits, and steps of 2^-9 below 2^-6; ties to even."""
    exponent = numbers.abs().clamp(min=2.0**-6).log2().floor()
    step = 2.0 ** (exponent - 3)
    return (numbers / step).round() * step


def rounded_rows(x: Tensor) -> Tensor:
    """x [rows, width] as codes times scales, in float64. Scales, and what is rounded, are numbers of float32."""
    largest = x.float().abs().amax(1, keepdim=True)
    scale = torch.where(largest > 0, largest / 448, torch.ones_like(largest))
    return e4m3((x.float() * (1 / scale)).double()) * scale.double()


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor):
        ctx.save_for_backward(weight)
        out = rounded_rows(x.reshape(-1, x.shape[-1])) @ rounded_rows(weight).t()
        return out.to(x.dtype).view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx, grad: Tensor):
        (weight,) = ctx.saved_tensors
        scale = weight.float().abs().amax(1) / 448
        codes = rounded_rows(weight) / scale.double()[:, None]
        flat = grad.reshape(-1, grad.shape[-1])
        out = rounded_rows(flat.float() * scale) @ codes
        return out.to(grad.dtype).view(*grad.shape[:-1], weight.shape[1]), None


class Fp8Linear(nn.Linear):
    """A linear layer that rounds its weight by rows, its input by tokens, and the gradient of its output by tokens."""

    def forward(self, x: Tensor) -> Tensor:
        out = _Product.apply(x, self.weight)
        return out if self.bias is None else out + self.bias


def with_plain_products(x: Tensor, weight: Tensor) -> Tensor:
    """What 16-bit products of the rounded weight give."""
    return functional.linear(x.double(), rounded_rows(weight))
