"""FP8 (E4M3) with a scale for each output channel, multiplied in FP8: inputs and gradients are rounded token by token.

It is the form in which vLLM serves FP8: weights per channel, activations per token and rounded as they come. Other
than `fp8`, it multiplies the codes themselves. Its products are therefore not those of its dequantized
weights: both factors of each are rounded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from workflow.precisions.base import (
    Facts,
    Loading,
    Precision,
    Products,
    Quantization,
    dequantized_layers,
    dtype_name,
)
from workflow.precisions.dynamic import each_layer

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from workflow.precisions.fp8_rows import Rows

NAME = "fp8_products"
# How far a product may be from that of the dequantized weight, relative: rounding to 4 bits changes inputs by 3 %.
TOLERANCE = 0.06
# The rounding of a layer's weight, and of its inputs, for a reader who has PyTorch alone.
CODE = """\
def rounded_to_fp8(rows, largest=448.0):
    numbers = rows.float()
    scale = numbers.abs().amax(dim=-1, keepdim=True) / largest
    scale[scale == 0] = 1
    codes = (numbers * (1 / scale)).to(torch.float8_e4m3fn)
    return (codes.float() * scale).to(rows.dtype)

"""
EACH_LAYER = """\
layer.weight.data = rounded_to_fp8(layer.weight.data)
# A GPU multiplies the codes themselves; here 16 bits hold the same numbers, as closely as they can.
layer.register_forward_pre_hook(lambda layer, inputs: (rounded_to_fp8(inputs[0]),))"""


def store(layer: nn.Linear) -> nn.Module:
    """A layer in E4M3: each output's weights scaled so that the largest becomes 448.

    The codes are held as uint8: a model that is cast to another floating-point type would cast FP8 numbers with it,
    without their scales.
    """
    import torch

    from workflow.precisions.fp8_rows import quantized_rows
    from workflow.precisions.stored_linear import StoredLinear

    rows = quantized_rows(layer.weight.data)
    return StoredLinear(
        layer,
        precision=NAME,
        codes=rows.codes.view(torch.uint8),
        constants={"weight_scale": rows.scales},
        dequantized=dequantized_weight,
        products=PRODUCTS,
    )


def dequantized_weight(layer: nn.Linear, dtype: torch.dtype) -> Tensor:
    """The code times its output's scale [out, in], rounded once."""
    import torch

    codes = layer.weight.view(torch.float8_e4m3fn)
    return torch.mul(codes.float(), layer.weight_scale[:, None]).to(dtype)


def prepared(x: Tensor) -> Rows:
    """x [tokens, in], each token in E4M3 with a scale of its own."""
    from workflow.precisions.fp8_rows import quantized_rows

    return quantized_rows(x)


def product(layer: nn.Linear, x: Rows, dtype: torch.dtype) -> Tensor:
    """Prepared x [tokens, in] -> [tokens, out], without the bias."""
    from workflow.precisions import fp8_rows

    return fp8_rows.product(x, layer.weight, layer.weight_scale, dtype)


def input_gradient(layer: nn.Linear, grad: Tensor) -> Tensor:
    """grad [tokens, out] -> [tokens, in].

    The scales of the outputs are multiplied into the gradient before each of its tokens is rounded: no product could
    apply them, as it sums over the outputs.
    """
    from workflow.precisions import fp8_rows

    rows = fp8_rows.quantized_rows(grad, layer.weight_scale)
    return fp8_rows.product_with_columns(rows, layer.weight, grad.dtype)


PRODUCTS = Products(prepared, product, input_gradient)


def recognizes(layer: nn.Module) -> bool:
    """Whether a module is a layer of this precision."""
    return getattr(layer, "precision", None) == NAME


def expected_facts(loading: Loading) -> Facts:
    """Codes of one byte, and a float32 for each output."""
    return {
        "quantization": NAME,
        "storage": "uint8",
        "scales": "one for each output",
        "type of scales": "float32",
    }


def facts(layer: nn.Module) -> Facts:
    """What `expected_facts` expects, as it is."""
    return {
        "quantization": layer.precision,
        "storage": dtype_name(layer.weight.dtype),
        "scales": "one for each output" if layer.weight_scale.shape == (layer.out_features,) else None,
        "type of scales": dtype_name(layer.weight_scale.dtype),
    }


def tensor_bytes(inputs: int, outputs: int, quantization: Quantization) -> tuple[list[float], list[float]]:
    """A byte a weight, and a float32 for each output."""
    return [inputs * outputs], [4 * outputs]


def quantize(model: PreTrainedModel, loading: Loading) -> PreTrainedModel:
    """The model with its linear layers in FP8."""
    from workflow.precisions import stored_linear

    return stored_linear.quantize(model, store, loading, tolerance=TOLERANCE)


PRECISION = Precision(
    name=NAME,
    label=lambda method, quantization: f"8-bit {method} (FP8 products)",
    short=lambda quantization: "FP8 products",
    in_words="FP8 (E4M3, a scale for each output) and multiplied in FP8",
    compute_capability=(8, 9),
    is_quantized=True,
    is_4_bit=False,
    can_be_double_quantized=False,
    can_be_trained=False,
    can_be_sharded=False,
    can_be_packed=True,  # a token is rounded by a scale of its own, whatever lies beside it
    can_be_fused=True,
    can_be_captured=True,
    can_be_merged=True,
    can_be_requantized=True,
    recognizes=recognizes,
    expected_facts=expected_facts,
    facts=facts,
    storage=lambda layer: "float8_e4m3fn",
    tensor_bytes=tensor_bytes,
    dequantized_weight=dequantized_weight,
    products=PRODUCTS,
    launch_share=3.0,  # it computes in less time than 16 bits, with more kernels
    dequantization_bytes=(0 + 2) / 2,  # the codes transposed, in the backward pass alone
    quantize=quantize,
    dequantize=dequantized_layers,
    mergeable=dequantized_layers,
    requantize=quantize,
    savable=dequantized_layers,
    code_after=lambda quantization: CODE + each_layer(EACH_LAYER, quantization),
)
