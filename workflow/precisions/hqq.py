"""HQQ, half-quadratic quantization (Badri and Shaji 2023): 8, 4, 3 or 2 bits, by the package hqq.

Its functions quantize, pack and unpack. The layer is ours: transformers 5.23 does not load HQQ, and PEFT's
`all-linear` does not see the layer of hqq, which is not one of PyTorch's.
"""

from __future__ import annotations

from functools import partial
from math import ceil
from typing import TYPE_CHECKING

from workflow.precisions.base import Facts, Loading, Precision, Quantization, dequantized_layers, dtype_name
from workflow.precisions.dynamic import each_layer
from workflow.runtime.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel

GROUP = 64  # weights of a row that share a scale and a zero point
TOGETHER = {8: 1, 4: 2, 3: 1, 2: 4}  # groups that are packed together; ten with 3 bits, which fills up
# Bytes read and written for each weight: those of `unpacked`, then the zero point (1 + 2) and the scale (2 + 2).
DEQUANTIZATION_BYTES = {8: 7.0, 4: 3 + 7.0, 3: 12 + 7.0, 2: 3.5 + 7.0}


def store(bits: int, layer: nn.Linear) -> nn.Module:
    """A layer in HQQ, with the package's own settings for these bits, in groups along its inputs.

    The scales and zero points are held in the layer's type, as hqq's own layer holds them.

    Raises:
        UserError: the weights are no whole number of groups.
    """
    import torch
    from hqq.core.quantize import BaseQuantizeConfig, Quantizer

    from workflow.precisions.stored_linear import StoredLinear

    outputs, inputs = layer.weight.shape
    if outputs * inputs % (GROUP * TOGETHER[bits]):
        raise UserError(
            f"hqq{bits} packs {GROUP * TOGETHER[bits]} weights together, and a linear layer of this model has "
            f"{outputs} x {inputs}, which is not a multiple."
        )
    options = BaseQuantizeConfig(nbits=bits, group_size=GROUP, axis=1)["weight_quant_params"]
    codes, meta = Quantizer.quantize(
        layer.weight.data, device=layer.weight.device, compute_dtype=layer.weight.dtype, **options
    )
    with torch.inference_mode(False):  # hqq makes them in inference mode, of which autograd takes none
        constants = {name: meta[name].clone().to(layer.weight.dtype) for name in ("scale", "zero")}
        return StoredLinear(
            layer,
            precision=f"hqq{bits}",
            codes=codes.clone(),
            constants=constants,
            dequantized=partial(dequantized, bits),
        )


def unpacked(bits: int, codes: Tensor, groups: int) -> Tensor:
    """The codes [groups, 64], a byte each. hqq's BitPack packs the same, and unpacks with twice the passes over memory.

    A packed number holds a code of each part of the groups, that of the first part in its highest bits.
    """
    import torch

    if bits == 8:
        return codes
    parts = 10 if bits == 3 else 8 // bits
    out = torch.empty((parts, *codes.shape), dtype=torch.uint8, device=codes.device)
    for index, part in enumerate(out):
        shift = bits * (parts - 1 - index)
        shifted = codes.bitwise_right_shift(shift) if shift else codes
        torch.bitwise_and(shifted, 2**bits - 1, out=part)
    return out.view(-1, GROUP)[:groups]


def dequantized(bits: int, layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """(code - zero) scale of each weight [out, in], rounded as hqq's Quantizer.dequantize rounds it."""
    weight = unpacked(bits, layer.weight, len(layer.scale)).sub(layer.zero).mul_(layer.scale)
    return weight.view(layer.out_features, layer.in_features).to(dtype)


def dequantized_weight(layer: nn.Linear, dtype: torch.dtype) -> Tensor:
    """The weight [out, in], for this call alone."""
    return layer.dequantized(layer, dtype)


def recognizes(bits: int, layer: nn.Module) -> bool:
    """Whether a module is a layer in HQQ of this many bits."""
    return getattr(layer, "precision", None) == f"hqq{bits}"


def expected_facts(bits: int, loading: Loading) -> Facts:
    """The bits, the size of a group, and the types of codes and constants."""
    return {
        "quantization": f"hqq{bits}",
        "storage": "int32" if bits == 3 else "uint8",
        "group size": GROUP,
        "type of constants": dtype_name(loading.compute),
    }


def facts(layer: nn.Module) -> Facts:
    """What `expected_facts` expects, as it is."""
    return {
        "quantization": layer.precision,
        "storage": dtype_name(layer.weight.dtype),
        "group size": layer.in_features * layer.out_features // layer.scale.numel(),
        "type of constants": dtype_name(layer.scale.dtype),
    }


def tensor_bytes(
    bits: int, inputs: int, outputs: int, quantization: Quantization
) -> tuple[list[float], list[float]]:
    """The codes, and two 16-bit constants for each group of 64. With 3 bits an int32 holds ten codes."""
    groups = ceil(inputs * outputs / GROUP)
    codes = 4 * GROUP * ceil(groups / 10) if bits == 3 else inputs * outputs * bits / 8
    return [codes], [2 * groups, 2 * groups]


def quantize(bits: int, model: PreTrainedModel, loading: Loading) -> PreTrainedModel:
    """The model with its linear layers in HQQ."""
    from workflow.precisions import stored_linear

    return stored_linear.quantize(model, partial(store, bits), loading)


def _code_after(bits: int, quantization: Quantization) -> str:
    stored = (
        "stored = HQQLinear(\n"
        "    layer, options, compute_dtype=layer.weight.dtype, device=str(layer.weight.device), del_orig=False\n"
        ")\n"
        "layer.weight.data = stored.dequantize().clone()"
    )
    return (
        "# Each linear layer is rounded as hqq does it; what was scored holds the codes.\n"
        f"options = BaseQuantizeConfig(nbits={bits}, group_size={GROUP}, axis=1)\n"
        f"{each_layer(stored, quantization)}"
    )


def _precision(bits: int) -> Precision:
    return Precision(
        name=f"hqq{bits}",
        label=lambda method, quantization: f"{bits}-bit {method} (HQQ)",
        short=lambda quantization: f"HQQ {bits}-bit",
        in_words=f"{bits} bits (HQQ)",
        package="hqq",
        is_quantized=True,
        is_4_bit=bits == 4,
        can_be_double_quantized=False,
        can_be_trained=False,
        can_be_sharded=False,
        can_be_packed=True,
        can_be_fused=True,
        can_be_captured=True,
        can_be_merged=True,
        can_be_requantized=True,
        recognizes=partial(recognizes, bits),
        expected_facts=partial(expected_facts, bits),
        facts=facts,
        storage=lambda layer: f"hqq ({bits} bits)",
        tensor_bytes=partial(tensor_bytes, bits),
        dequantized_weight=dequantized_weight,
        dequantization_bytes=DEQUANTIZATION_BYTES[bits],
        quantize=partial(quantize, bits),
        dequantize=dequantized_layers,
        mergeable=dequantized_layers,
        requantize=partial(quantize, bits),
        savable=dequantized_layers,
        base_imports="from hqq.core.quantize import BaseQuantizeConfig, HQQLinear\n",
        code_after=partial(_code_after, bits),
    )


PRECISIONS = tuple(_precision(bits) for bits in (8, 4, 3, 2))
