"""int8 weights with a scale for each row, multiplied in 16 bits: torchao's Int8WeightOnlyConfig.

LLM.int8() looks for outliers in every batch, so no CUDA graph can hold it. Here the work is the same for every batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from workflow.precisions.base import Facts, Loading, Precision, Quantization, dtype_name
from workflow.precisions.dynamic import config_code, skipped

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel, TorchAoConfig


def config(loading: Loading) -> TorchAoConfig:
    """torchao's configuration; the output head stays in 16 bits."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=skipped(loading.layers_in_16_bits))


def recognizes(layer: nn.Module) -> bool:
    """Whether a module has an int8 weight of torchao's, and no rounding of its input."""
    from torch import nn

    if not isinstance(layer, nn.Linear):  # PEFT's layer shows its base's weight as its own
        return False
    weight = layer.weight
    is_int8 = type(weight).__module__.startswith("torchao.") and type(weight).__name__ == "Int8Tensor"
    return is_int8 and weight.act_quant_kwargs is None


def expected_facts(loading: Loading) -> Facts:
    """A scale in float32 for each row."""
    return {
        "quantization": "int8_weight_only",
        "storage": "int8",
        "one scale a row": True,
        "type of scales": "float32",
    }


def facts(layer: nn.Module) -> Facts:
    """What `expected_facts` expects, as it is."""
    weight = layer.weight
    return {
        "quantization": "int8_weight_only",
        "storage": dtype_name(weight.qdata.dtype),
        "one scale a row": tuple(weight.scale.shape) == (weight.shape[0], 1),
        "type of scales": dtype_name(weight.scale.dtype),
    }


def tensor_bytes(inputs: int, outputs: int, quantization: Quantization) -> tuple[list[float], list[float]]:
    """A byte a weight; a float32 scale and an int8 zero point, which is zero, for each row."""
    return [inputs * outputs], [4 * outputs, outputs]


def dequantized_weight(layer: nn.Linear, dtype: torch.dtype) -> Tensor:
    """The weight [out, in]: code times scale in float32, rounded once, in one pass over memory."""
    import torch

    weight = layer.weight
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    return torch.mul(weight.qdata, weight.scale, out=out)


def quantize(model: PreTrainedModel, loading: Loading) -> PreTrainedModel:
    """The model with those linear layers in int8 that are not yet: a base with random weights has none."""
    from torch import nn
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    head = model.get_output_embeddings()
    quantize_(
        model,
        Int8WeightOnlyConfig(),
        filter_fn=lambda layer, name: (
            isinstance(layer, nn.Linear)
            and layer is not head
            and not recognizes(layer)
            and name not in loading.layers_in_16_bits
        ),
    )
    return model


def dequantize(model: PreTrainedModel, compute: torch.dtype) -> PreTrainedModel:
    """The model with ordinary linear layers in the compute type. torchao has no such function."""
    from torch import nn

    for layer in model.modules():
        if recognizes(layer):
            layer.weight = nn.Parameter(dequantized_weight(layer, compute), requires_grad=False)
    model.hf_quantizer.remove_quantization_config(model)
    return model


def _config_code(quantization: Quantization, compute: str) -> str:
    return config_code("Int8WeightOnlyConfig()", "modules_to_not_convert", quantization)


PRECISION = Precision(
    name="int8_weight_only",
    label=lambda method, quantization: f"8-bit {method} (weights alone)",
    short=lambda quantization: "8-bit weights",
    in_words="int8 (weights alone)",
    package="torchao",
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
    storage=lambda layer: "int8",
    tensor_bytes=tensor_bytes,
    dequantized_weight=dequantized_weight,
    dequantization_bytes=1 + 2,
    config=config,
    quantize=quantize,
    dequantize=dequantize,
    config_class="TorchAoConfig",
    config_imports="from torchao.quantization import Int8WeightOnlyConfig\n",
    config_code=_config_code,
)
