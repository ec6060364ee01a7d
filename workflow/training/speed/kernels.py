"""Liger's Triton kernels (Hsu et al. 2024) where a GPU can run them, and PyTorch's own operations elsewhere.

Triton comes with a CUDA build of torch, so nothing here imports it before a tensor is on a GPU.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import FunctionType, MethodType, ModuleType

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

ROTATION = "apply_rotary_pos_emb"  # transformers' name for it in the module of each architecture


@dataclass(frozen=True)
class Liger:
    """Liger's operations."""

    rope: ModuleType
    swiglu: ModuleType


@cache
def liger() -> Liger | None:
    """Liger's operations; None where there is no Triton to run them."""
    try:
        from liger_kernel.ops import rope, swiglu
    except ImportError:
        return None
    return Liger(rope, swiglu)


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, in one pass over memory on a GPU."""
    if gate.is_cuda and liger():
        return liger().swiglu.swiglu_forward(gate.contiguous(), up.contiguous())[2]
    return functional.silu(gate).mul_(up)


def gated_silu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up, which may take their memory: neither can be read afterwards."""
    if gate.is_cuda and liger():
        return liger().swiglu.swiglu_backward(gate.contiguous(), up.contiguous(), grad.contiguous())
    grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
    return grad_gate, functional.silu(gate).mul_(grad)


def fuse_rotations(model: PreTrainedModel, device: torch.device) -> int:
    """Rotate queries and keys in place, in one pass over both; return how many layers do so.

    An attention layer is given a copy of its own forward function in which the rotation alone is another. A rotation
    that Liger's does not agree with, such as one of neighboring numbers in place of halves, is left alone.

    Args:
        device: on which the model will compute.
    """
    if device.type != "cuda" or liger() is None:
        return 0
    fused = 0
    for module in model.modules():
        forward = type(module).forward
        own = getattr(forward, "__globals__", {}).get(ROTATION)
        if own is None or ROTATION not in forward.__code__.co_names or not _rotates_alike(model, own, device):
            continue
        module.forward = MethodType(_with_rotation(forward), module)
        fused += 1
    return fused


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q, k [rows, heads, tokens, size] rotated by angles whose cosines and sines are [rows, tokens, size]."""
    return liger().rope.LigerRopeFunction.apply(q, k, cos, sin)


def _rotates_alike(model: PreTrainedModel, own: Callable, device: torch.device) -> bool:
    """Whether a rotation is that of whole heads by halves: tried on random numbers."""
    config = model.config.get_text_config()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if getattr(config, "partial_rotary_factor", None) not in (None, 1.0) or "unsqueeze_dim" not in (
        inspect.signature(own).parameters
    ):
        return False
    generator = torch.Generator(device).manual_seed(0)
    q, k = (torch.randn(1, 3, heads, size, device=device, generator=generator) for heads in (4, 2))
    angles = torch.randn(1, 3, size // 2, device=device, generator=generator).repeat(1, 1, 2)
    rotated = [
        function(q.clone().transpose(1, 2), k.clone().transpose(1, 2), angles.cos(), angles.sin())
        for function in (own, _rotate)
    ]
    return all(torch.allclose(plain, fused, atol=1e-5) for plain, fused in zip(*rotated, strict=True))


def _with_rotation(forward: FunctionType) -> FunctionType:
    """A copy of a layer's forward function that calls our rotation."""
    copy = FunctionType(
        forward.__code__,
        forward.__globals__ | {ROTATION: _rotate},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy
