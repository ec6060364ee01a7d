"""The base as it was published: 16 bits a weight, nothing quantized."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workflow.precisions.base import Facts, Loading, Precision, Quantization, dtype_name, plain_facts

if TYPE_CHECKING:
    from torch import nn


def recognizes(layer: nn.Module) -> bool:
    """Whether a module is an ordinary linear layer."""
    from torch import nn

    return type(layer) is nn.Linear


def expected_facts(loading: Loading) -> Facts:
    """On a CPU without fast 16-bit products, 16-bit weights are held in float32."""
    return {"quantization": None, "storage": dtype_name(loading.weights)}


def tensor_bytes(inputs: int, outputs: int, quantization: Quantization) -> tuple[list[float], list[float]]:
    """Two bytes a weight."""
    return [2 * inputs * outputs], []


PRECISION = Precision(
    name="16bit",
    label=lambda method, quantization: f"16-bit {method}",
    short=lambda quantization: "16-bit",
    in_words="16 bits",
    is_quantized=False,
    is_4_bit=False,
    can_be_double_quantized=False,
    can_be_trained=True,
    can_be_sharded=True,
    can_be_packed=True,
    can_be_fused=True,
    can_be_captured=True,
    can_be_merged=True,
    can_be_requantized=False,
    recognizes=recognizes,
    expected_facts=expected_facts,
    facts=plain_facts,
    storage=lambda layer: dtype_name(layer.weight.dtype),
    tensor_bytes=tensor_bytes,
)
