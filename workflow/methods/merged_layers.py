"""Layers that multiply by the weight that is served: the base with its adapter folded in, quantized again.

This module imports torch, so a method imports it when it has a model.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional

from workflow.methods.base import Quantizer


class MergedWeight:
    """The weight W = dequantize(quantize(D + s B A)) of an adapted layer, where D is its base.

    Args:
        spread: whether D is spread over the cells of its quantizer; else each weight is on its level.
    """

    def __init__(self, layer: LoraLayer, quantizer: Quantizer, *, spread: bool):
        (name,) = layer.active_adapters
        self.spread = spread
        self.base, self.quantizer, self.scaling = layer.base_layer, quantizer, layer.scaling[name]
        self.a, self.b = layer.lora_A[name].weight, layer.lora_B[name].weight
        self.stored: tuple[tuple[int, ...], Any] | None = None  # the state of A and B, and W in 4 bits

    @torch.no_grad()
    def folded(self) -> Tensor:
        """D + s B A [out, in], in float32 and not quantized."""
        if self.spread:
            weight = self.quantizer.spread_weight(self.base)
        else:
            weight = self.quantizer.dequantized_weight(self.base, torch.float32)
        return weight.addmm_(self.b, self.a, alpha=self.scaling)

    def quantized(self) -> Any:
        """W as it is stored."""
        return self.quantizer.quantized_weight(self.base, self.folded())

    def once(self, dtype: torch.dtype) -> Tensor:
        """W [out, in], for this call alone."""
        self.stored = None
        return self.quantizer.stored_weight(self.quantized(), dtype)

    def again(self, dtype: torch.dtype) -> Tensor:
        """W [out, in], kept in 4 bits for the next call with the same adapter."""
        state = (self.a.data_ptr(), self.a._version, self.b.data_ptr(), self.b._version)
        if self.stored is None or self.stored[0] != state:
            self.stored = state, self.quantized()
        return self.quantizer.stored_weight(self.stored[1], dtype)


class MergedLinear(torch.autograd.Function):
    """x W^T with the weight that is served, and the gradients of a W that was never rounded.

    This is the straight-through estimator (Bengio et al. 2013, section 4). With G = dL/dy: dB = s G^T (x A^T) and
    dA = s (G B)^T x, as in LoRA, and dx = G W with the rounded W. W is made twice, so that it is not kept.
    """

    @staticmethod
    def forward(ctx, x: Tensor, a: Tensor, b: Tensor, weight: MergedWeight) -> Tensor:
        """x [..., in] in the compute type; a [r, in] and b [out, r] in float32, those of `weight`."""
        ctx.save_for_backward(x, a, b)
        ctx.weight = weight
        return product(x, weight.once(x.dtype), weight.base.bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, a, b = ctx.saved_tensors
        flat, rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        grad_low, low = flat @ b.to(grad.dtype), rows @ a.to(x.dtype).t()
        grad_a = (grad_low.t() @ rows).to(a.dtype).mul_(ctx.weight.scaling)
        grad_b = (flat.t() @ low).to(b.dtype).mul_(ctx.weight.scaling)
        grad_x = grad @ ctx.weight.once(grad.dtype) if ctx.needs_input_grad[0] else None
        return grad_x, grad_a, grad_b, None


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def merge_in_forward(model: nn.Module, quantizer: Quantizer, *, spread: bool) -> None:
    """Give every adapted layer the forward pass of `MergedLinear`."""
    for layer in adapted_layers(model):
        layer.merged_weight = MergedWeight(layer, quantizer, spread=spread)
        layer.forward = MethodType(_forward, layer)


def fold(model: nn.Module, quantizer: Quantizer, *, spread: bool) -> nn.Module:
    """The base with each adapter folded into its layer, which is quantized again, as `MergedLinear` does."""
    for layer in adapted_layers(model):
        base = layer.base_layer
        weight = MergedWeight(layer, quantizer, spread=spread).folded()
        base.weight = quantizer.parameter(base.weight, weight, base)
    return model.unload()


def adapted_layers(model: nn.Module) -> list[LoraLayer]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def _forward(layer: LoraLayer, x: Tensor) -> Tensor:
    device, weight = x.device.type, layer.merged_weight
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):  # it would fold the adapter in 16 bits
        if torch.is_grad_enabled():
            return MergedLinear.apply(x, weight.a, weight.b, weight)
        return product(x, weight.again(x.dtype), weight.base.bias)
