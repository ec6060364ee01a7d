"""Serve a run: put its adapter on a base, or fold it in, and prove that this is what is there.

A form is one of
    base                 the untouched base in the variant's precision; no run
    as_trained           the adapter on the base that it was trained on (of a full fine-tuning, its model)
    merged_16bit         the adapter folded into the original 16-bit weights
    merged_dequantized   the adapter folded into the de-quantised weights that it was trained on
    requantized          that, quantised again as the base was: PEFT's merge on a quantised base

Folding is W + (alpha / rank) B A (Hu et al., 2022, section 4.1), by PEFT. The two merged forms are then
rounded to the 16-bit type of the base's checkpoint, which is what one would save and publish.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import AutoConfig

from workflow import params
from workflow.errors import CheckError
from workflow.precision import Precision, describe, load_base

BASE = "base"
SIXTEEN_BIT = {"method": "lora", "precision": "16bit", "double_quantization": False}


@dataclass(frozen=True)
class Served:
    """A form as it was found when it was loaded."""

    form: str
    precision: Precision
    adapters: int  # modules with an adapter on them
    adapter_dtype: str | None

    def as_dict(self) -> dict:
        return asdict(self)


def serve(
    form: str,
    *,
    model_folder: Path,
    weights_folder: Path | None,
    variant: params.Variant,
    hardware: params.Hardware,
) -> tuple[torch.nn.Module, Served]:
    """Load a run, or with `base` the untouched base, in a serving form.

    Args:
        model_folder: the base model, 16-bit safetensors.
        weights_folder: the run's adapter or, of a full fine-tuning, its model; None for `base`.

    Returns:
        The model in eval mode, and what it was found to be.

    Raises:
        CheckError: adapters, their type or the quantised modules are not those of the form.
    """
    # A full fine-tuning is served in 16 bits like any other model: its float32 weights were for training.
    held = variant.model_copy(update={"method": "lora"})
    if form == BASE or variant.method == "full":
        folder = model_folder if form == BASE else weights_folder
        model, precision = load_base(folder, held, hardware=hardware)
        expected = 0
    else:
        make = {
            "as_trained": as_trained,
            "merged_16bit": merged_16bit,
            "merged_dequantized": merged_dequantized,
            "requantized": requantized,
        }[form]
        model, compute = make(model_folder, weights_folder, variant=held, hardware=hardware)
        if form in ("merged_16bit", "merged_dequantized"):
            held = held.model_copy(update=SIXTEEN_BIT)
        precision = describe(model, held, compute=compute)
        expected = adapted_modules(weights_folder) if form == "as_trained" else 0
    return model.eval(), check(Served(form, precision, *adapters_of(model)), variant, adapters=expected)


def as_trained(
    model_folder: Path, weights_folder: Path, *, variant: params.Variant, hardware: params.Hardware
) -> tuple[torch.nn.Module, torch.dtype]:
    """The adapter, in float32, on the base that it was trained on."""
    base, precision = load_base(model_folder, variant, hardware=hardware)
    return PeftModel.from_pretrained(base, weights_folder), getattr(torch, precision.compute)


def merged_16bit(
    model_folder: Path, weights_folder: Path, *, variant: params.Variant, hardware: params.Hardware
) -> tuple[torch.nn.Module, torch.dtype]:
    """The adapter folded into the original 16-bit weights, rounded to their type."""
    base, precision = load_base(model_folder, variant.model_copy(update=SIXTEEN_BIT), hardware=hardware)
    model = PeftModel.from_pretrained(base, weights_folder).merge_and_unload()
    return round_to_16_bits(model, model_folder), getattr(torch, precision.compute)


def merged_dequantized(
    model_folder: Path, weights_folder: Path, *, variant: params.Variant, hardware: params.Hardware
) -> tuple[torch.nn.Module, torch.dtype]:
    """The adapter folded into the base's quantised weights, de-quantised first; rounded to 16 bits."""
    base, precision = load_base(model_folder, variant, hardware=hardware)
    compute = getattr(torch, precision.compute)
    # In the type in which a forward pass de-quantises: what the adapter was trained on, and no larger than 16 bits.
    model = PeftModel.from_pretrained(base.dequantize(compute), weights_folder).merge_and_unload()
    return round_to_16_bits(model, model_folder), compute


def requantized(
    model_folder: Path, weights_folder: Path, *, variant: params.Variant, hardware: params.Hardware
) -> tuple[torch.nn.Module, torch.dtype]:
    """The adapter folded into the de-quantised weights, which are quantised again as the base was."""
    base, precision = load_base(model_folder, variant, hardware=hardware)
    model = PeftModel.from_pretrained(base, weights_folder).merge_and_unload()
    return model, getattr(torch, precision.compute)


def round_to_16_bits(model: torch.nn.Module, model_folder: Path) -> torch.nn.Module:
    """Round every weight to the 16-bit type of the base's checkpoint; the type it is held in stays."""
    dtype = AutoConfig.from_pretrained(model_folder, trust_remote_code=False).dtype or torch.bfloat16
    for parameter in model.parameters():  # and no buffer: the rotary frequencies stay as they are computed
        parameter.data = parameter.data.to(dtype).to(parameter.dtype)
    return model


def adapted_modules(weights_folder: Path) -> int:
    """The number of modules that a saved adapter is for."""
    return sum("lora_A" in name for name in load_file(weights_folder / "adapter_model.safetensors"))


def adapters_of(model: torch.nn.Module) -> tuple[int, str | None]:
    """How many modules have an adapter on them, and in which type."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    types = {
        str(p.dtype).removeprefix("torch.")
        for m in layers
        for p in (*m.lora_A.parameters(), *m.lora_B.parameters())
    }
    return len(layers), " and ".join(sorted(types)) or None


def check(served: Served, variant: params.Variant, *, adapters: int) -> Served:
    """Raise a CheckError unless adapters and quantised modules are those of the form."""
    if served.adapters != adapters:
        raise CheckError(f"{served.form} must have {adapters} adapters, and has {served.adapters}")
    if adapters and served.adapter_dtype != "float32":
        raise CheckError(
            f"{served.form} has adapters in {served.adapter_dtype}, and they were trained in float32"
        )
    whole = served.precision.linear_modules
    quantized = variant.precision != "16bit" and served.form not in ("merged_16bit", "merged_dequantized")
    if served.precision.quantized_modules != (whole if quantized else 0):
        raise CheckError(
            f"{served.form} must have {whole if quantized else 0} quantised modules, "
            f"and has {served.precision.quantized_modules}"
        )
    return served
