"""What the pipeline needs to know of a precision: every file of this room fills one `Precision`.

Nothing here imports torch: params ask the table, and so does Snakemake before any work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel

Facts = dict[str, object]


@dataclass(frozen=True)
class Quantization:
    """What a variant chooses within its precision."""

    double_quantization: bool = False
    block_size: int | None = None  # weights that share a quantization constant; None where there is no choice
    layers_in_16_bits: tuple[str, ...] = ()  # linear layers that are not quantized, by name


@dataclass(frozen=True)
class Loading:
    """With what a base is loaded."""

    quantization: Quantization
    compute: torch.dtype  # of the matrix products
    weights: torch.dtype  # of the weights that are not quantized
    sharded: bool = False
    quantized_on: torch.device | None = None  # None for where the weights are held

    @property
    def double_quantization(self) -> bool:
        return self.quantization.double_quantization

    @property
    def block_size(self) -> int | None:
        return self.quantization.block_size

    @property
    def layers_in_16_bits(self) -> tuple[str, ...]:
        """The whole names of the linear layers that are not quantized."""
        return self.quantization.layers_in_16_bits


def dtype_name(dtype: torch.dtype | None) -> str:
    """The name of a type without the library's: `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def plain_facts(layer: nn.Module) -> Facts:
    """How a layer that no quantized precision recognizes is held."""
    return {"quantization": None, "storage": dtype_name(layer.weight.dtype)}


def nothing_around(loading: Loading) -> AbstractContextManager[None]:
    """A context that changes nothing."""
    return nullcontext()


def no_code(quantization: Quantization) -> str:
    """No Python: the base is loaded by its configuration alone."""
    return ""


def no_problem(layer: nn.Linear, loading: Loading, device: str) -> str:
    """Nothing: every device computes every layer."""
    return ""


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


def dequantized_layers(model: PreTrainedModel, compute: torch.dtype) -> PreTrainedModel:
    """The model with ordinary linear layers in the compute type, where they were each a `StoredLinear`."""
    from workflow.precisions import stored_linear

    return stored_linear.dequantize(model, compute)


@dataclass(frozen=True)
class Products:
    """How the layers of a precision multiply, where it is not by their dequantized weight."""

    # x [tokens, in] -> what all layers that read it multiply.
    prepared: Callable[[Tensor], Any]
    # (layer, prepared x, type) -> [tokens, out] in that type, without the bias.
    product: Callable[[Any, Any, torch.dtype], Tensor]
    # (layer, gradient [tokens, out]) -> [tokens, in] in the gradient's type.
    input_gradient: Callable[[Any, Tensor], Tensor]


_DEQUANTIZED = ContextVar("dequantized", default=False)


@contextmanager
def dequantized_products() -> Iterator[None]:
    """Let every layer multiply by its dequantized weight.

    It is for a comparison of two ways to compute the same. Where inputs are rounded to a few bits, a difference in the
    last of 16 bits becomes one of a whole step, and grows from layer to layer.
    """
    token = _DEQUANTIZED.set(True)
    try:
        yield
    finally:
        _DEQUANTIZED.reset(token)


def in_force(products: Products | None) -> Products | None:
    """A precision's products; None inside `dequantized_products`."""
    return None if _DEQUANTIZED.get() else products


@dataclass(frozen=True)
class Precision:
    """In which numbers the linear layers of a base are held, and what can be done with such a base."""

    name: str  # in params.yaml
    label: Callable[[str, Quantization], str]  # of a method on such a base
    short: Callable[[Quantization], str]  # the same where there is little room
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
    # (in, out, quantization) -> bytes of each tensor of weights, and of each of quantization constants.
    tensor_bytes: Callable[[int, int, Quantization], tuple[list[float], list[float]]]
    dequantized_weight: Callable[[nn.Linear, torch.dtype], Tensor] = plain_weight
    # None: its layers multiply by that weight.
    products: Products | None = None
    # A float32 weight [out, in], quantized as the layer's own is; what that gives, to a weight of a type. None where a
    # training cannot multiply by such a weight.
    quantized_weight: Callable[[nn.Module, Tensor], Any] | None = None
    stored_weight: Callable[[Any, torch.dtype], Tensor] | None = None
    # The float32 weight [out, in] of a layer, spread evenly over all that is quantized to the layer's numbers.
    spread_weight: Callable[[nn.Module], Tensor] | None = None
    # Bytes that this takes beside its result, by the layer's weights.
    spreading_bytes: Callable[[int], int] | None = None
    # Time that a pass takes to launch over time that it takes to compute, as a multiple of a 16-bit base's.
    launch_share: float = 1.0
    # Bytes read and written for each weight to dequantize it before a matrix product.
    dequantization_bytes: float = 0.0
    # Why it cannot be packed, fused or captured where it cannot, as a clause.
    no_speed_ups: str = ""
    # Whether weights that were rounded to the format are held and multiplied in 16 bits: its quality, not its costs.
    is_emulated: bool = False
    # Of which a variant chooses one: weights that share a quantization constant.
    block_sizes: tuple[int, ...] = ()

    # What it needs besides the locked packages and any device.
    package: str = ""  # `make PACKAGE` installs it
    compute_capability: tuple[int, int] | None = None  # of a GPU, at least

    # A whole base. `config` is for from_pretrained; `quantize` is for what no library does as it loads.
    config: Callable[[Loading], Any] = no_config
    while_loading: Callable[[Loading], AbstractContextManager[None]] = nothing_around
    # (layer, loading, device) -> why the device does not compute the layer; empty if it does.
    problem: Callable[[nn.Linear, Loading, str], str] = no_problem
    # What from_pretrained does with `config` to a model that has no numbers yet: (model, config).
    replace: Callable[[PreTrainedModel, Any], Any] = unchanged
    parameter: Callable[[nn.Parameter, Tensor, nn.Module], nn.Parameter] = plain_parameter
    quantize: Callable[[PreTrainedModel, Loading], PreTrainedModel] = unchanged
    dequantize: Callable[[PreTrainedModel, torch.dtype], PreTrainedModel] = unchanged
    # Before PEFT's merge, which dequantizes what it knows: with ordinary layers of this type.
    mergeable: Callable[[PreTrainedModel, torch.dtype], PreTrainedModel] = unchanged
    requantize: Callable[[PreTrainedModel, Loading], PreTrainedModel] = unchanged  # after PEFT's merge
    # Before it is saved, as what transformers loads: where it has no such layer, with the numbers it multiplies with.
    savable: Callable[[PreTrainedModel, torch.dtype], PreTrainedModel] = unchanged

    # A card of such a run: the Python that loads its base, what stands before it, and what is done to `base` then.
    config_code: Callable[[Quantization, str], str] = lambda quantization, compute: ""
    config_class: str = "BitsAndBytesConfig"
    config_imports: str = ""
    base_imports: str = ""
    code_before: Callable[[Quantization], str] = no_code
    cpu_code: str = ""  # before, on a CPU
    code_after: Callable[[Quantization], str] = no_code  # where no library quantizes as it loads

    @property
    def makes_weights(self) -> bool:
        """Whether its layers multiply by a weight that is dequantized for each product."""
        return self.dequantization_bytes > 0 and self.products is None

    @property
    def can_be_trained_through(self) -> bool:
        """Whether a training can multiply by its weights as they are quantized with the adapter in them."""
        return self.quantized_weight is not None
