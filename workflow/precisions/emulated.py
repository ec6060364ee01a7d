"""MXFP4 and NVFP4, emulated: weights that are rounded to the format once, and held and multiplied in 16 bits.

What such a base answers is what a GPU with the format would answer, up to the rounding of the products. What it takes in
memory and time is what 16 bits take.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from workflow.precisions.base import Facts, Loading, Precision, Quantization, dtype_name, plain_facts
from workflow.precisions.dynamic import each_layer

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel


def recognizes(name: str, layer: nn.Module) -> bool:
    """Whether a module is a linear layer with a weight of this format."""
    from workflow.precisions.rounded_linear import RoundedLinear

    return isinstance(layer, RoundedLinear) and layer.format == name


def expected_facts(name: str, loading: Loading) -> Facts:
    """The format, and that the weights are numbers of it."""
    return {"quantization": f"emulated {name}", "storage": dtype_name(loading.weights), "rounded": True}


def facts(layer: nn.Module) -> Facts:
    """What `expected_facts` expects, as it is."""
    return plain_facts(layer) | {"quantization": f"emulated {layer.format}", "rounded": layer.is_rounded()}


def quantize(name: str, model: PreTrainedModel, loading: Loading) -> PreTrainedModel:
    """The model with its linear layers rounded, but the output head and those that stay in 16 bits."""
    from torch import nn

    from workflow.precisions.rounded_linear import RoundedLinear

    head = model.get_output_embeddings()
    for whole, layer in list(model.named_modules()):
        if not isinstance(layer, nn.Linear) or layer is head or whole in loading.layers_in_16_bits:
            continue
        if not isinstance(layer, RoundedLinear):
            layer = RoundedLinear.of(layer, name)
            model.set_submodule(whole, layer)
        layer.round()
    return model


def dequantize(model: PreTrainedModel, compute: torch.dtype) -> PreTrainedModel:
    """The model with ordinary linear layers of the same numbers."""
    from torch import nn

    from workflow.precisions.rounded_linear import RoundedLinear

    for whole, layer in list(model.named_modules()):
        if isinstance(layer, RoundedLinear):
            plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
            plain.weight, plain.bias = layer.weight, layer.bias
            model.set_submodule(whole, plain)
    return model.to(compute)


def tensor_bytes(inputs: int, outputs: int, quantization: Quantization) -> tuple[list[float], list[float]]:
    """Two bytes a weight, as in 16 bits: the format is emulated."""
    return [2 * inputs * outputs], []


def _code_after(name: str, quantization: Quantization) -> str:
    """Python that rounds the layers of `base`: the functions of rounding.py, and a loop."""
    source = Path(__file__).with_name("rounding.py").read_text(encoding="utf-8")
    functions = source.partition("import torch\n")[2].strip()
    if name == "mxfp4":
        functions = functions.partition("\n\n\ndef nvfp4")[0]
    rounded = each_layer(f"layer.weight.data = {name}(layer.weight.data)", quantization)
    return f"\n\n{functions}\n\n\n{rounded}\n"


def _precision(name: str) -> Precision:
    upper = name.upper()
    return Precision(
        name=f"{name}_emulated",
        label=lambda method, quantization: f"4-bit {method} ({upper}, emulated)",
        short=lambda quantization: f"{upper} emulated",
        in_words=f"16 bits, rounded to {upper}",
        is_quantized=True,
        is_4_bit=True,
        is_emulated=True,
        can_be_double_quantized=False,
        can_be_trained=False,
        can_be_sharded=False,
        can_be_packed=True,
        can_be_fused=True,
        can_be_captured=True,
        can_be_merged=True,
        can_be_requantized=True,
        recognizes=partial(recognizes, name),
        expected_facts=partial(expected_facts, name),
        facts=facts,
        storage=lambda layer: f"{dtype_name(layer.weight.dtype)}, rounded to {upper}: emulated",
        tensor_bytes=tensor_bytes,
        quantize=partial(quantize, name),
        dequantize=dequantize,
        requantize=partial(quantize, name),
        code_after=partial(_code_after, name),
    )


MXFP4, NVFP4 = _precision("mxfp4"), _precision("nvfp4")
