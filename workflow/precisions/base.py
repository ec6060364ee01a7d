"""What the pipeline needs to know of a precision: every file of this room fills one `Precision`.

Nothing here imports torch: params ask the table, and so does Snakemake before any work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel

Facts = dict[str, object]


@dataclass(frozen=True)
class Loading:
    """With what a base is loaded."""

    double_quantization: bool
    compute: torch.dtype  # of the matrix products
    weights: torch.dtype  # of the weights that are not quantized
    sharded: bool = False


def dtype_name(dtype: torch.dtype | None) -> str:
    """The name of a type without the library's: `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def plain_facts(layer: nn.Module) -> Facts:
    """How a layer that no quantized precision recognizes is held."""
    return {"quantization": None, "storage": dtype_name(layer.weight.dtype)}


def no_config(loading: Loading) -> None:
    """No configuration: the base is loaded as it is."""


def plain_weight(layer: nn.Linear, dtype: torch.dtype) -> Tensor:
    """The weight [out, in] of a layer that holds it as numbers."""
    return layer.weight.to(dtype)


def plain_parameter(parameter: nn.Parameter, weight: Tensor, layer: nn.Module) -> nn.Parameter:
    """A parameter with other numbers."""
    from torch import nn

    return nn.Parameter(weight, requires_grad=parameter.requires_grad)


def unchanged(model: PreTrainedModel, *_: Any) -> PreTrainedModel:
    """The model as it is."""
    return model


@dataclass(frozen=True)
class Precision:
    """In which numbers the linear layers of a base are held, and what can be done with such a base."""

    name: str  # in params.yaml
    label: Callable[[str, bool], str]  # of a method on such a base, by whether it is double-quantized
    short: Callable[[bool], str]  # the same where there is little room
    in_words: str  # "the base held in ..."

    # What can be done with a base of this precision.
    is_quantized: bool
    is_4_bit: bool  # an adapter on it is called QLoRA
    can_be_double_quantized: bool
    can_be_trained: bool  # every weight, and not an adapter alone
    can_be_sharded: bool  # over processes that share a training
    can_be_packed: bool  # rows of a pass laid end to end
    can_be_fused: bool  # a layer and its adapter in one step
    can_be_captured: bool  # in a CUDA graph: the work is the same for every batch
    can_be_merged: bool  # an adapter folded into its weights
    can_be_requantized: bool  # and these quantized again

    # A layer of such a base.
    recognizes: Callable[[nn.Module], bool]
    expected_facts: Callable[[Loading], Facts]
    facts: Callable[[nn.Module], Facts]  # the same keys, found in a layer
    storage: Callable[[nn.Module], str]
    # (in, out, double quantization) -> bytes of each tensor of weights, and of each of quantization constants.
    tensor_bytes: Callable[[int, int, bool], tuple[list[float], list[float]]]
    dequantized_weight: Callable[[nn.Linear, torch.dtype], Tensor] = plain_weight
    # A float32 weight [out, in], quantized as the layer's own is; what that gives, to a weight of a type. None where a
    # training cannot multiply by such a weight.
    quantized_weight: Callable[[nn.Module, Tensor], Any] | None = None
    stored_weight: Callable[[Any, torch.dtype], Tensor] | None = None
    # The float32 weight [out, in] of a layer, spread evenly over all that is quantized to the layer's numbers.
    spread_weight: Callable[[nn.Module], Tensor] | None = None
    spreading_bytes: Callable[[int], int] | None = (
        None  # that this takes beside its result, by the layer's weights
    )
    # Bytes read and written for each weight to dequantize it before a matrix product.
    dequantization_bytes: float = 0.0

    # A whole base. `config` is for from_pretrained; `quantize` is for what no library does as it loads.
    config: Callable[[Loading], Any] = no_config
    parameter: Callable[[nn.Parameter, Tensor, nn.Module], nn.Parameter] = plain_parameter
    quantize: Callable[[PreTrainedModel], PreTrainedModel] = unchanged
    dequantize: Callable[[PreTrainedModel, torch.dtype], PreTrainedModel] = unchanged
    requantize: Callable[[PreTrainedModel], PreTrainedModel] = unchanged  # after PEFT's merge

    @property
    def can_be_trained_through(self) -> bool:
        """Whether a training can multiply by its weights as they are quantized with the adapter in them."""
        return self.quantized_weight is not None

    # A card of such a run: the Python that loads its base.
    config_code: Callable[[bool, str], str] = lambda double_quantization, compute: ""
    cpu_code: str = ""  # what must stand before, on a CPU
