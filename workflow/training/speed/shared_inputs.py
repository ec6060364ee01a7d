"""Adapted layers that read the same input, computed in one step, and a perceptron that keeps two tensors less.

A query, a key and a value read one input; a gate and its `up` read another. PyTorch would read that input for each
of them, forward and backward, and add up the gradients that come back in passes of their own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import MethodType

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional

from workflow.training.speed import fused
from workflow.training.speed.fused import (
    NormOf,
    add_base_input_gradient,
    base_input_gradient,
    base_product,
)
from workflow.training.speed.kernels import gated_silu, gated_silu_backward

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class Adapted:
    """A base layer and what its adapter's product is multiplied by."""

    base: nn.Linear
    scaling: float


class AdaptedLinears(torch.autograd.Function):
    """base(x) + scaling * x A^T B^T of several layers (Hu et al. 2021, equation 3).

    The products with each A are one product, and the matrix products sum the gradients of x. If x is the output of a
    norm, the norm's input is kept in its place, which the norm itself and the residual stream keep anyway.
    """

    @staticmethod
    def forward(ctx, x: Tensor, norm_of: NormOf | None, layers: tuple[Adapted, ...], *weights: Tensor):
        """x [..., in] in the compute type; weights: A [rank, in] of each layer, then B [out, rank] of each."""
        flat = x.reshape(-1, x.shape[-1])
        a, b = weights[: len(layers)], weights[len(layers) :]
        lows = functional.linear(flat, _stacked(a, x.dtype)).split(list(map(len, a)), dim=1)
        outs, prepared = [], {}
        for layer, low, weight in zip(layers, lows, b, strict=True):
            out = base_product(layer.base, flat, prepared=prepared)
            outs.append(out.addmm_(low, weight.to(x.dtype).t(), alpha=layer.scaling))
        ctx.save_for_backward(x if norm_of is None else norm_of.source, *lows, *weights)
        ctx.layers, ctx.norm = layers, None if norm_of is None else norm_of.norm
        return tuple(out.view(*x.shape[:-1], out.shape[-1]) for out in outs)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        x, *saved = ctx.saved_tensors
        if ctx.norm is not None:
            x = fused.rms_norm(ctx.norm, x)
        count = len(ctx.layers)
        lows, a, b = saved[:count], saved[count : 2 * count], saved[2 * count :]
        flats = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        grad_lows, grad_b = [], []
        for layer, flat, low, weight in zip(ctx.layers, flats, lows, b, strict=True):
            grad_lows.append((flat @ weight.to(flat.dtype)).mul_(layer.scaling))
            grad_b.append((flat.t() @ low).to(weight.dtype).mul_(layer.scaling))
        grad_low = torch.cat(grad_lows, dim=1)
        grad_a = (grad_low.t() @ x.reshape(-1, x.shape[-1])).to(a[0].dtype).split(list(map(len, a)))
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_low @ _stacked(a, x.dtype)
            for layer, flat in zip(ctx.layers, flats, strict=True):
                add_base_input_gradient(grad_x, layer.base, flat)
            grad_x = grad_x.view(x.shape)
        return grad_x, None, None, *grad_a, *grad_b


def _stacked(a: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The A of several layers [rank, in] as one matrix [sum of ranks, in]."""
    return torch.cat([weight.to(dtype) for weight in a])


class AdaptedGatedSilu(torch.autograd.Function):
    """An adapted layer of silu(gate) * up, whose product is computed again in the backward pass."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, a: Tensor, b: Tensor, layer: Adapted):
        """gate, up [..., in] in the compute type; a [rank, in], b [out, rank]."""
        product = gated_silu(gate, up)
        flat = product.view(-1, product.shape[-1])
        low = functional.linear(flat, a.to(flat.dtype))
        out = base_product(layer.base, flat)
        out.addmm_(low, b.to(flat.dtype).t(), alpha=layer.scaling)
        ctx.save_for_backward(gate, up, low, a, b)
        ctx.layer = layer
        return out.view(*gate.shape[:-1], out.shape[-1])

    @staticmethod
    def backward(ctx, grad: Tensor):
        gate, up, low, a, b = ctx.saved_tensors
        scaling, flat = ctx.layer.scaling, grad.reshape(-1, grad.shape[-1])
        grad_low = (flat @ b.to(flat.dtype)).mul_(scaling)
        grad_b = (flat.t() @ low).to(b.dtype).mul_(scaling)
        product = gated_silu(gate, up)
        grad_a = (grad_low.t() @ product.view(-1, product.shape[-1])).to(a.dtype)
        del product  # before the gradient of the same size is made
        grad_product = base_input_gradient(ctx.layer.base, flat)
        grad_product.addmm_(grad_low, a.to(flat.dtype))
        return *gated_silu_backward(grad_product.view(gate.shape), gate, up), grad_a, grad_b, None


class Siblings:
    """Layers that read one input: the first that is called computes all of them, and each takes its own part."""

    def __init__(self, modules: list[LoraLayer]):
        self.modules = modules
        self.source: Tensor | None = None  # of the parts that are still to be taken
        self.parts: dict[int, Tensor] = {}
        self.share = True
        for index, module in enumerate(modules):
            module.forward = MethodType(self._forward(index), module)

    def _forward(self, index: int):
        def forward(module: LoraLayer, x: Tensor) -> Tensor:
            if x is not self.source:
                # Parts that nobody took: these layers do not read the same tensor.
                self.share = self.share and not self.parts
                self.parts = dict(enumerate(adapted_linears(self.modules, x))) if self.share else {}
                self.source = x if self.share else None
            if index not in self.parts:
                return fused.adapted_forward(module, x)
            part = self.parts.pop(index)
            if not self.parts:
                self.source = None
            return part

        return forward


def adapted_linears(modules: list[LoraLayer], x: Tensor) -> tuple[Tensor, ...]:
    """What adapted layers without dropout make of one input."""
    a, b, layers = zip(*map(_parts, modules), strict=True)
    return AdaptedLinears.apply(x, getattr(x, "norm_of", None), layers, *a, *b)


def share_inputs(model: nn.Module) -> int:
    """Compute adapted layers that read the same input together; return how many are so computed.

    Only layers that `fuse_adapters` and `fuse_layers` gave their fused form are touched, and none with dropout, which
    gives each layer an input of its own.
    """
    shared = 0
    for module in model.modules():
        for names in SIBLINGS:
            siblings = [getattr(module, name, None) for name in names]
            if all(map(_can_share, siblings)):
                Siblings(siblings)
                shared += len(siblings)
        down = getattr(module, "down_proj", None)
        if getattr(module.forward, "__func__", None) is fused.gated_silu_forward and _can_share(down):
            module.forward = MethodType(_perceptron_forward, module)
            shared += 1
    return shared


def _can_share(module: nn.Module | None) -> bool:
    if getattr(getattr(module, "forward", None), "__func__", None) is not fused.adapted_forward:
        return False
    (name,) = module.active_adapters
    return not isinstance(module.lora_dropout[name], nn.Dropout)


def _parts(module: LoraLayer) -> tuple[Tensor, Tensor, Adapted]:
    (name,) = module.active_adapters
    layer = Adapted(module.base_layer, module.scaling[name])
    return module.lora_A[name].weight, module.lora_B[name].weight, layer


def _perceptron_forward(module: nn.Module, x: Tensor) -> Tensor:
    return AdaptedGatedSilu.apply(module.gate_proj(x), module.up_proj(x), *_parts(module.down_proj))
