"""FP8 (E4M3) in blocks of 128 x 128 weights, as transformers' `FineGrainedFP8Config` and vLLM hold it.

The numbers are those of transformers' quantizer. The layer is ours. That of transformers multiplies with kernels which
the package kernels downloads from a hub as it trains, rounds activations to 8 bits too, and leaves a layer whose
widths are no multiples of 128 unquantized without a word. Ours computes in 16 bits: it has the memory of FP8, and not
its speed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from workflow.precisions.base import Facts, Loading, Precision, Quantization, dequantized_layers, dtype_name
from workflow.precisions.dynamic import each_layer

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel

BLOCK = 128  # rows and columns that share a scale
LARGEST = 448.0  # number of E4M3 (Micikevicius et al. 2022, table 1)
# The rounding of a layer's weight, for a reader who has PyTorch alone. At a right or lower edge a block is smaller.
CODE = """\
def rounded_to_fp8(weight, block=128, largest=448.0):
    numbers = weight.float()
    for row in range(0, weight.shape[0], block):
        for column in range(0, weight.shape[1], block):
            part = numbers[row : row + block, column : column + block]
            scale = largest / part.abs().max() if part.any() else torch.ones_like(part.abs().max())
            codes = (part * scale).clamp(-largest, largest).to(torch.float8_e4m3fn)
            part.copy_(codes.to(weight.dtype) * (1 / scale))
    return numbers.to(weight.dtype)

"""


def blocks(count: int) -> int:
    """The blocks that hold `count` rows or columns."""
    return -(-count // BLOCK)


def store(layer: nn.Linear) -> nn.Module:
    """A layer in E4M3: each block scaled so that its largest weight becomes 448.

    The codes are held as uint8: a model that is cast to another floating-point type would cast FP8 numbers with it,
    without their scales.
    """
    import torch
    from torch.nn import functional

    from workflow.precisions.stored_linear import StoredLinear

    outputs, inputs = layer.weight.shape
    rows, columns = blocks(outputs), blocks(inputs)
    padded = functional.pad(
        layer.weight.data.float(), (0, columns * BLOCK - inputs, 0, rows * BLOCK - outputs)
    )
    padded = padded.view(rows, BLOCK, columns, BLOCK)
    largest = padded.abs().amax(dim=(1, 3))
    scale = torch.where(largest > 0, LARGEST / largest, 1.0)
    codes = (padded * scale[:, None, :, None]).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    codes = codes.view(rows * BLOCK, columns * BLOCK)[:outputs, :inputs].contiguous()
    return StoredLinear(
        layer,
        precision="fp8",
        codes=codes.view(torch.uint8),
        constants={"weight_scale_inv": 1 / scale},
        dequantized=dequantized_weight,
    )


def dequantized_weight(layer: nn.Linear, dtype: torch.dtype) -> Tensor:
    """The code times its block's inverse scale [out, in], rounded once."""
    import torch

    weight = layer.weight.view(torch.float8_e4m3fn).to(dtype)
    scale = layer.weight_scale_inv
    rows, columns = scale.shape
    scale = scale[:, None, :].expand(rows, BLOCK, columns).reshape(rows * BLOCK, columns)[: len(weight)]
    whole = layer.in_features // BLOCK
    edge = whole * BLOCK
    weight[:, :edge].unflatten(1, (whole, BLOCK)).mul_(scale[:, :whole, None])
    if edge < layer.in_features:
        weight[:, edge:].mul_(scale[:, whole:])
    return weight


def recognizes(layer: nn.Module) -> bool:
    """Whether a module is a layer in FP8."""
    return getattr(layer, "precision", None) == "fp8"


def expected_facts(loading: Loading) -> Facts:
    """Codes of one byte, and a float32 for each block."""
    return {"quantization": "fp8", "storage": "uint8", "block size": BLOCK, "type of scales": "float32"}


def facts(layer: nn.Module) -> Facts:
    """What `expected_facts` expects, as it is."""
    expected = (blocks(layer.out_features), blocks(layer.in_features))
    return {
        "quantization": layer.precision,
        "storage": dtype_name(layer.weight.dtype),
        "block size": BLOCK if layer.weight_scale_inv.shape == expected else None,
        "type of scales": dtype_name(layer.weight_scale_inv.dtype),
    }


def tensor_bytes(inputs: int, outputs: int, quantization: Quantization) -> tuple[list[float], list[float]]:
    """A byte a weight, and a float32 for each block of 128 x 128."""
    return [inputs * outputs], [4 * blocks(inputs) * blocks(outputs)]


def quantize(model: PreTrainedModel, loading: Loading) -> PreTrainedModel:
    """The model with its linear layers in FP8."""
    from workflow.precisions import stored_linear

    return stored_linear.quantize(model, store, loading)


PRECISION = Precision(
    name="fp8",
    label=lambda method, quantization: f"8-bit {method} (FP8)",
    short=lambda quantization: "FP8",
    in_words="FP8 (E4M3, blocks of 128 x 128)",
    compute_capability=(8, 9),
    is_quantized=True,
    is_4_bit=False,
    can_be_double_quantized=False,
    can_be_trained=False,
    can_be_sharded=False,
    can_be_packed=True,
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
    dequantization_bytes=(1 + 2) + 4.0,  # converted, then scaled in place
    quantize=quantize,
    dequantize=dequantized_layers,
    mergeable=dequantized_layers,
    requantize=quantize,
    savable=dequantized_layers,
    code_after=lambda quantization: (
        CODE + each_layer("layer.weight.data = rounded_to_fp8(layer.weight.data)", quantization)
    ),
)
