"""bitsandbytes' LLM.int8(): 8 bits a weight, and columns with outliers in 16 (Dettmers et al. 2022)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workflow.precisions.base import Facts, Loading, Precision, Quantization, plain_facts, plain_parameter
from workflow.precisions.bnb_4bit import replace_layers
from workflow.precisions.dynamic import config_code, skipped

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import BitsAndBytesConfig, PreTrainedModel

OUTLIERS = 6.0  # from where a column is kept in 16 bits; bitsandbytes' default


def config(loading: Loading) -> BitsAndBytesConfig:
    """bitsandbytes' configuration."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped(loading.layers_in_16_bits))


def recognizes(layer: nn.Module) -> bool:
    """Whether a module is an int8 layer."""
    import bitsandbytes as bnb

    return isinstance(layer, bnb.nn.Linear8bitLt)


def expected_facts(loading: Loading) -> Facts:
    """No 16-bit copy of the weight is kept."""
    return {"quantization": "int8", "storage": "int8", "outlier threshold": OUTLIERS, "16-bit copy": False}


def facts(layer: nn.Module) -> Facts:
    """What `expected_facts` expects, as it is."""
    return plain_facts(layer) | {
        "quantization": "int8",
        "outlier threshold": layer.state.threshold,
        "16-bit copy": layer.state.has_fp16_weights,
    }


def tensor_bytes(inputs: int, outputs: int, quantization: Quantization) -> tuple[list[float], list[float]]:
    """A byte a weight, and a float32 for each row of the matrix."""
    return [inputs * outputs], [4 * outputs]


def dequantized_weight(layer: nn.Linear, dtype: torch.dtype) -> Tensor:
    """The weight [out, in], without what a product would keep of its outliers."""
    from bitsandbytes.functional import int8_vectorwise_dequant

    constants = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    return int8_vectorwise_dequant(layer.weight.data, constants).to(dtype)


def parameter(parameter: nn.Parameter, weight: Tensor, layer: nn.Module) -> nn.Parameter:
    """A parameter of an int8 layer with these numbers, quantized on their device."""
    import bitsandbytes as bnb

    if not isinstance(parameter, bnb.nn.Int8Params):
        return plain_parameter(parameter, weight, layer)
    return bnb.nn.Int8Params(weight, requires_grad=False)._quantize(weight.device)


def dequantize(model: PreTrainedModel, compute: torch.dtype) -> PreTrainedModel:
    """The model with ordinary linear layers in the compute type."""
    return model.dequantize(compute)


def _config_code(quantization: Quantization, compute: str) -> str:
    return config_code("load_in_8bit=True", "llm_int8_skip_modules", quantization)


PRECISION = Precision(
    name="int8",
    label=lambda method, quantization: f"8-bit {method}",
    short=lambda quantization: "8-bit",
    in_words="int8",
    is_quantized=True,
    is_4_bit=False,
    can_be_double_quantized=False,
    can_be_trained=False,
    can_be_sharded=False,
    can_be_packed=True,
    can_be_fused=False,
    can_be_captured=False,
    can_be_merged=True,
    can_be_requantized=True,
    recognizes=recognizes,
    expected_facts=expected_facts,
    facts=facts,
    storage=lambda layer: "int8",
    tensor_bytes=tensor_bytes,
    dequantized_weight=dequantized_weight,
    no_speed_ups="LLM.int8() looks for outliers in each pass as a whole",
    config=config,
    replace=replace_layers,
    parameter=parameter,
    dequantize=dequantize,
    config_code=_config_code,
)
