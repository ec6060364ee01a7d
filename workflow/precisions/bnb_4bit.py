"""bitsandbytes' 4-bit types, NF4 and FP4, with or without double quantization (Dettmers et al. 2023)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from math import ceil
from typing import TYPE_CHECKING, Any

from workflow.precisions.base import (
    Facts,
    Loading,
    Precision,
    Quantization,
    dtype_name,
    plain_facts,
    plain_parameter,
)
from workflow.precisions.dynamic import HEADS, skipped

if TYPE_CHECKING:
    import torch
    from bitsandbytes.functional import QuantState
    from torch import Tensor, nn
    from transformers import BitsAndBytesConfig, PreTrainedModel

# Weights that share a constant (section 3). The kernels allow more, up to 4096; bitsandbytes takes the default of its own.
BLOCK_SIZES, DEFAULT_BLOCK_SIZE = (32, 64, 128, 256), 64
CONSTANTS_BLOCK_SIZE = 256  # constants that share a constant of their own, with double quantization
SPREAD_AT_ONCE = 2**22  # weights, a multiple of every block size
GOLDEN_RATIO = 2654435769  # its fraction, in units of 2^-32
MARGIN = 1e-4  # of a cell, at each of its ends, for the rounding of float32; a change as small is not kept
EXACT_ON_CPU = (
    "# On some CPUs bitsandbytes multiplies in bfloat16, whatever type is asked for; what was scored did not.\n"
    "bnb.nn.Linear4bit.support_avx512bf16_for_cpu = property(lambda layer: False, lambda layer, value: None)\n"
)


def config(name: str, loading: Loading) -> BitsAndBytesConfig:
    """bitsandbytes' configuration.

    The type is always named: `load_in_4bit=True` alone means fp4. To be sharded, the 4-bit numbers are stored
    as if they were of the compute type: FSDP cuts up floating-point weights alone.
    """
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=name,
        bnb_4bit_use_double_quant=loading.double_quantization,
        bnb_4bit_compute_dtype=loading.compute,
        bnb_4bit_quant_storage=loading.compute if loading.sharded else torch.uint8,
        llm_int8_skip_modules=skipped(loading.layers_in_16_bits),
    )


@contextmanager
def as_asked(loading: Loading) -> Iterator[None]:
    """Quantize what is loaded meanwhile in the blocks, and on the device, that the loading names."""
    with ExitStack() as stack:
        if loading.block_size != DEFAULT_BLOCK_SIZE:
            stack.enter_context(_blocks(loading.block_size))
        if loading.quantized_on is not None:
            stack.enter_context(_quantized_on(loading.quantized_on))
        yield


@contextmanager
def _quantized_on(device: torch.device) -> Iterator[None]:
    """Quantize each weight on a device, and hold its numbers where the loader wants them."""
    import bitsandbytes as bnb

    quantize = bnb.nn.Params4bit._quantize

    def quantize_there(weight: bnb.nn.Params4bit, place: torch.device) -> bnb.nn.Params4bit:
        quantize(weight, device)
        weight.data = weight.data.to(place)
        weight.quant_state.to(place)
        return weight

    bnb.nn.Params4bit._quantize = quantize_there
    try:
        yield
    finally:
        bnb.nn.Params4bit._quantize = quantize


@contextmanager
def _blocks(size: int) -> Iterator[None]:
    """Give the 4-bit layers that are made meanwhile blocks of this size.

    transformers' configuration has no block size. Its loader quantizes with the attributes of the empty weight that
    the layer was made with, so they are set there.
    """
    import bitsandbytes as bnb

    begin = bnb.nn.Linear4bit.__init__

    def begin_with_blocks(layer: nn.Module, *args: Any, **settings: Any) -> None:
        begin(layer, *args, **settings)
        layer.weight.blocksize = size

    bnb.nn.Linear4bit.__init__ = begin_with_blocks
    try:
        yield
    finally:
        bnb.nn.Linear4bit.__init__ = begin


def problem(layer: nn.Linear, loading: Loading, device: str) -> str:
    """On some CPUs, bitsandbytes 0.50 begins every row with a block of its own, also where the quantizer did not."""
    if device != "cpu" or layer.in_features % loading.block_size == 0:
        return ""
    return (
        f"block_size is {loading.block_size}, which does not divide its {layer.in_features} inputs, and on some "
        "CPUs bitsandbytes dequantizes such a layer to other numbers; use a block size that divides them, or a GPU"
    )


def quantization_state(layer: nn.Module):
    """What dequantizes a layer; a sharded weight is an ordinary tensor, and the layer keeps it then."""
    return getattr(layer.weight, "quant_state", None) or getattr(layer, "quant_state", None)


def recognizes(name: str, layer: nn.Module) -> bool:
    """Whether a module is a 4-bit layer of this type."""
    import bitsandbytes as bnb

    if not isinstance(layer, bnb.nn.Linear4bit):
        return False
    state = quantization_state(layer)
    return state is not None and state.quant_type == name


def expected_facts(name: str, loading: Loading) -> Facts:
    """The type, both block sizes, and in which type a product is computed."""
    return {
        "quantization": name,
        "double quantization": loading.double_quantization,
        "block size": loading.block_size,
        "block size of constants": CONSTANTS_BLOCK_SIZE if loading.double_quantization else None,
        "compute type": dtype_name(loading.compute),
        "storage": dtype_name(loading.compute) if loading.sharded else "uint8",
    }


def facts(layer: nn.Module) -> Facts:
    """What `expected_facts` expects, as it is."""
    state = quantization_state(layer)
    return plain_facts(layer) | {
        "quantization": state.quant_type,
        "double quantization": bool(state.nested),
        "block size": state.blocksize,
        "block size of constants": state.state2.blocksize if state.nested else None,
        "compute type": dtype_name(layer.compute_dtype),
    }


def tensor_bytes(inputs: int, outputs: int, quantization: Quantization) -> tuple[list[float], list[float]]:
    """Half a byte a weight, and a float32 a block with a table of the 16 levels.

    With double quantization a byte a block, a float32 for each block of those, their offset, and a table of
    256 levels more.
    """
    count = inputs * outputs
    blocks = ceil(count / quantization.block_size)
    table = 4 * 16
    if not quantization.double_quantization:
        return [count / 2], [4 * blocks, table]
    return [count / 2], [blocks, 4 * ceil(blocks / CONSTANTS_BLOCK_SIZE), table, 4 * 256, 4]


def dequantized_weight(layer: nn.Linear, dtype: torch.dtype) -> Tensor:
    """The weight [out, in], for this call alone."""
    from workflow.precisions import bnb_4bit_fast

    return bnb_4bit_fast.dequantized(layer.weight, quantization_state(layer)).to(dtype)


def replace_layers(model: PreTrainedModel, quantization: BitsAndBytesConfig) -> None:
    """Put bitsandbytes' layers, which have no numbers yet, in the place of a model's ordinary ones."""
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    plain = quantization.llm_int8_skip_modules or HEADS
    replace_with_bnb_linear(model, modules_to_not_convert=plain, quantization_config=quantization)
    model.is_loaded_in_4bit = quantization.load_in_4bit
    model.is_loaded_in_8bit = quantization.load_in_8bit


def quantized_weight(layer: nn.Module, weight: Tensor) -> tuple[Tensor, QuantState]:
    """A weight [out, in], quantized as the layer's own is: the same type, blocks and double quantization."""
    from bitsandbytes.functional import quantize_4bit

    state = quantization_state(layer)
    return quantize_4bit(
        weight, blocksize=state.blocksize, compress_statistics=state.nested, quant_type=state.quant_type
    )


def stored_weight(stored: tuple[Tensor, QuantState], dtype: torch.dtype) -> Tensor:
    """The weight [out, in] that `quantized_weight` stores, rounded once to `dtype`."""
    from bitsandbytes.functional import dequantize_4bit

    packed, state = stored
    state.dtype = dtype
    return dequantize_4bit(packed, state)


def spread_weight(layer: nn.Module) -> Tensor:
    """The float32 weight [out, in], each number moved to a place within the cell that is rounded to its level.

    The places are even and always the same: the i-th weight's is the fraction of i times the golden ratio, so that any
    run of weights fills its cells evenly (Weyl's sequence). A small change to the weights then carries a share of them
    into the next cell that grows with the change: it is kept on average, as by dither (Roberts 1962), where weights on
    their levels would all be rounded back. The largest of a block, which is its constant, stays where it is.
    """
    import torch
    from bitsandbytes.functional import dequantize_blockwise

    state = quantization_state(layer)
    absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    packed, (low, high) = layer.weight.data.view(torch.uint8).flatten(), _cells(state.code)
    spread = torch.empty(state.shape, dtype=torch.float32, device=packed.device)
    flat = spread.view(-1)
    places = torch.arange(min(flat.numel(), SPREAD_AT_ONCE), device=packed.device)
    places = places.mul_(GOLDEN_RATIO).bitwise_and_(0xFFFFFFFF).float().mul_(2**-32)
    for start in range(0, flat.numel(), SPREAD_AT_ONCE):
        part = flat[start : start + SPREAD_AT_ONCE]
        pairs = packed[start // 2 : (start + part.numel() + 1) // 2]
        codes = torch.stack((pairs >> 4, pairs & 15), 1).flatten()[: part.numel()].int()
        constants = absmax[start // state.blocksize : (start + part.numel() - 1) // state.blocksize + 1]
        torch.lerp(low[codes], high[codes], places[: part.numel()], out=part)
        part.mul_(constants.repeat_interleave(state.blocksize)[: part.numel()])
    return spread


def spreading_bytes(weights: int) -> int:
    """Bytes that `spread_weight` takes beside its result: places, numbers of levels, and two bounds in 4 bytes each."""
    return 16 * min(weights, SPREAD_AT_ONCE)


def _cells(levels: Tensor) -> tuple[Tensor, Tensor]:
    """The bounds of what is rounded to each level, a little within them; of the outermost levels, the level itself."""
    import torch

    ordered = levels.float().unique()
    middles = (ordered[1:] + ordered[:-1]) / 2
    low, high = torch.cat([ordered[:1], middles]), torch.cat([middles, ordered[-1:]])
    low, high = torch.lerp(low, high, MARGIN), torch.lerp(high, low, MARGIN)
    low[0] = high[0] = ordered[0]
    low[-1] = high[-1] = ordered[-1]
    index = torch.searchsorted(ordered, levels.float())
    return low[index], high[index]


def parameter(parameter: nn.Parameter, weight: Tensor, layer: nn.Module) -> nn.Parameter:
    """A parameter of a 4-bit layer with these numbers, quantized on their device."""
    import bitsandbytes as bnb

    if not isinstance(parameter, bnb.nn.Params4bit):
        return plain_parameter(parameter, weight, layer)
    # A matrix on the CPU is quantized when it is moved to the device.
    return bnb.nn.Params4bit(
        weight,
        requires_grad=False,
        blocksize=parameter.blocksize,
        compress_statistics=parameter.compress_statistics,
        quant_type=parameter.quant_type,
        module=layer,
    )._quantize(weight.device)


def dequantize(model: PreTrainedModel, compute: torch.dtype) -> PreTrainedModel:
    """The model with ordinary linear layers in the compute type."""
    return model.dequantize(compute)


def use_exact_cpu_kernels() -> None:
    """Keep bitsandbytes from repacking 4-bit weights for its AVX512-BF16 kernel.

    On a CPU with those instructions, one forward pass in eval mode repacks a layer for good: it then
    multiplies in bfloat16 whatever compute type was asked for, and passes no gradient to the layers
    below, so training after a validation pass would go on silently with most gradients missing.
    """
    import bitsandbytes as bnb

    bnb.nn.Linear4bit.support_avx512bf16_for_cpu = property(lambda self: False, lambda self, value: None)


def _label(name: str, method: str, quantization: Quantization) -> str:
    blocks = "" if _has_default_blocks(quantization) else f", blocks of {quantization.block_size}"
    doubly = ", double-quantized" if quantization.double_quantization else ""
    return f"4-bit {method} ({name.upper()}{blocks}{doubly})"


def _short(name: str, quantization: Quantization) -> str:
    blocks = "" if _has_default_blocks(quantization) else f"/{quantization.block_size}"
    return f"{name.upper()}{blocks}{' + DQ' if quantization.double_quantization else ''}"


def _has_default_blocks(quantization: Quantization) -> bool:
    return quantization.block_size == DEFAULT_BLOCK_SIZE


def _config_code(name: str, quantization: Quantization, compute: str) -> str:
    plain = skipped(quantization.layers_in_16_bits)
    layers = f"    llm_int8_skip_modules={json.dumps(plain)},\n" if plain else ""
    return (
        f'\n    load_in_4bit=True,\n    bnb_4bit_quant_type="{name}",\n'
        f"    bnb_4bit_use_double_quant={quantization.double_quantization},\n"
        f"    bnb_4bit_compute_dtype=torch.{compute},\n{layers}"
    )


def _code_before(quantization: Quantization) -> str:
    if _has_default_blocks(quantization):
        return ""
    return (
        "# transformers has no setting for bitsandbytes' block size, so every 4-bit layer gets it as it is made.\n"
        "begin = bnb.nn.Linear4bit.__init__\n\n\n"
        "def begin_with_blocks(layer, *args, **settings):\n"
        "    begin(layer, *args, **settings)\n"
        f"    layer.weight.blocksize = {quantization.block_size}\n\n\n"
        "bnb.nn.Linear4bit.__init__ = begin_with_blocks\n"
    )


def _precision(name: str) -> Precision:
    return Precision(
        name=name,
        label=partial(_label, name),
        short=partial(_short, name),
        in_words=name,
        is_quantized=True,
        is_4_bit=True,
        can_be_double_quantized=True,
        can_be_trained=False,
        can_be_sharded=True,
        can_be_packed=True,
        can_be_fused=True,
        can_be_captured=True,
        can_be_merged=True,
        can_be_requantized=True,
        recognizes=partial(recognizes, name),
        expected_facts=partial(expected_facts, name),
        facts=facts,
        storage=lambda layer: f"{name} (4 bits)",
        tensor_bytes=tensor_bytes,
        dequantized_weight=dequantized_weight,
        quantized_weight=quantized_weight,
        stored_weight=stored_weight,
        spread_weight=spread_weight,
        spreading_bytes=spreading_bytes,
        dequantization_bytes=0.5 + 2,
        block_sizes=BLOCK_SIZES,
        config=partial(config, name),
        while_loading=as_asked,
        problem=problem,
        replace=replace_layers,
        parameter=parameter,
        dequantize=dequantize,
        config_code=partial(_config_code, name),
        code_before=_code_before,
        cpu_code=EXACT_ON_CPU,
    )


NF4, FP4 = _precision("nf4"), _precision("fp4")
