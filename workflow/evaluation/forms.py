"""Serve a run: put its adapter on a base, or fold it in, and prove that this is what is there.

A form is one of
    base                 the untouched base in the variant's precision; no run
    as_trained           the adapter on the base that it was trained on (of a full fine-tuning, its model)
    merged_16bit         the adapter folded into the original 16-bit weights
    merged_dequantized   the adapter folded into the dequantized weights that it was trained on
    requantized          that, quantized again as the base was: PEFT's merge on a quantized base, or the method's own
and those of workflow/evaluation/llama_cpp/, which are merged_16bit as a GGUF file.

Folding is W + s B A with s = alpha / rank (Hu et al., 2022, section 4.1), or what the method makes of it, by PEFT. The two merged forms are then
rounded to the 16-bit type of the base's checkpoint, which is what one would save and publish.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import AutoConfig

from workflow import methods, params, precisions
from workflow.data import lineage
from workflow.data.model_files import reason
from workflow.evaluation.llama_cpp.record import GgufRecord
from workflow.methods import Method
from workflow.models.load import LoadedPrecision, base_linears, describe, load_base, loading_of
from workflow.runtime.errors import CheckError, UserError, missing
from workflow.runtime.files import read_json
from workflow.runtime.forms import AS_TRAINED, BASE, MERGED_16BIT, MERGED_DEQUANTIZED, REQUANTIZED

WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"  # PEFT's names
SIXTEEN_BIT = {
    "precision": precisions.SIXTEEN_BIT,
    "double_quantization": False,
    "block_size": None,
    "layers_in_16_bits": [],
}
MERGED = (MERGED_16BIT, MERGED_DEQUANTIZED)  # the forms that are ordinary 16-bit models


@dataclass(frozen=True)
class Served:
    """A form as it was found when it was loaded."""

    form: str
    precision: LoadedPrecision
    adapters: int  # modules with an adapter on them
    adapter_dtype: str | None
    gguf: GgufRecord | None = None  # the file that it was read from


def serve(
    run: params.Run, form: str, *, model_folder: Path, weights_folder: Path | None
) -> tuple[torch.nn.Module, Served]:
    """Load a run, or with `base` the untouched base, in a serving form.

    Args:
        run: with the settings that its adapter must have been trained with.
        model_folder: the base model, 16-bit safetensors.
        weights_folder: the run's adapter or, of a full fine-tuning, its model; None for `base`.

    Returns:
        The model in eval mode, and what it was found to be.

    Raises:
        UserError: the run's files are missing, damaged or of another base or training.
        CheckError: adapters, their type or the precision are not those of the form, or the run's weights do
            not change what the base does.
    """
    if weights_folder is not None and not weights_folder.is_dir():
        raise missing(weights_folder)
    # A model whose own weights were trained is served in 16 bits like any other: its float32 weights were for training.
    method, served_variant = (
        run.method,
        run.variant.model_copy(update={"method": methods.FROZEN}),
    )
    if form == BASE or not method.leaves_adapter:
        folder = model_folder if form == BASE else weights_folder
        model, precision = load_base(folder, served_variant, hardware=run.hardware)
        if form != BASE:
            check_moved(model, model_folder)
        expected = 0
    else:
        make = {
            AS_TRAINED: partial(as_trained, method=method),
            MERGED_16BIT: merged_16bit,
            MERGED_DEQUANTIZED: merged_dequantized,
            REQUANTIZED: partial(requantized, method=method),
        }[form]
        check_adapter(weights_folder, model_folder, method, run.training)
        model, compute = make(model_folder, weights_folder, variant=served_variant, hardware=run.hardware)
        if form in MERGED:
            served_variant = served_variant.model_copy(update=SIXTEEN_BIT)
        precision = describe(model, served_variant, compute=compute)
        expected = method.saved_adapters(load_file(weights_folder / WEIGHTS)) if form == AS_TRAINED else 0
    return model.eval(), check(
        Served(form, precision, *adapters_of(model, method)), run.variant, adapters=expected
    )


def as_trained(
    model_folder: Path,
    weights_folder: Path,
    *,
    variant: params.Variant,
    hardware: params.Hardware,
    method: Method,
) -> tuple[torch.nn.Module, torch.dtype]:
    """The adapter, in float32, on the base that it was trained on, computing as its method trains."""
    base, precision = load_base(model_folder, variant, hardware=hardware)
    model, _ = attached(
        base, weights_folder, partial(method.attach, quantizer=precisions.get(variant.precision))
    )
    return model, getattr(torch, precision.compute)


def merged_16bit(
    model_folder: Path, weights_folder: Path, *, variant: params.Variant, hardware: params.Hardware
) -> tuple[torch.nn.Module, torch.dtype]:
    """The adapter folded into the original 16-bit weights, rounded to their type."""
    base, precision = load_base(model_folder, variant.model_copy(update=SIXTEEN_BIT), hardware=hardware)
    return round_to_16_bits(merged(base, weights_folder), model_folder), getattr(torch, precision.compute)


def merged_dequantized(
    model_folder: Path, weights_folder: Path, *, variant: params.Variant, hardware: params.Hardware
) -> tuple[torch.nn.Module, torch.dtype]:
    """The adapter folded into the base's quantized weights, dequantized first; rounded to 16 bits."""
    base, precision = load_base(model_folder, variant, hardware=hardware)
    compute = getattr(torch, precision.compute)
    # In the type in which a forward pass dequantizes: what the adapter was trained on, and no larger than 16 bits.
    model = merged(precisions.get(variant.precision).dequantize(base, compute), weights_folder)
    return round_to_16_bits(model, model_folder), compute


def requantized(
    model_folder: Path,
    weights_folder: Path,
    *,
    variant: params.Variant,
    hardware: params.Hardware,
    method: Method,
) -> tuple[torch.nn.Module, torch.dtype]:
    """The adapter folded into the dequantized weights, which are quantized again as the base was."""
    base, precision = load_base(model_folder, variant, hardware=hardware)
    compute, entry = getattr(torch, precision.compute), precisions.get(variant.precision)
    fold = partial(method.fold, quantizer=entry)
    model = merged(entry.mergeable(base, compute), weights_folder, fold)
    return entry.requantize(model, loading_of(variant, compute, base_linears(model))), compute


def attached(
    base: torch.nn.Module, weights_folder: Path, attach: Callable[[PeftModel], None] = lambda model: None
) -> tuple[PeftModel, torch.Tensor]:
    """The adapter on a base, and what the base answered to a few tokens before.

    Args:
        attach: lets the model compute as its method does, where PEFT's way is another.

    Raises:
        CheckError: the adapter changes nothing.
    """
    before = probe(base)
    model = with_adapter(base, weights_folder)
    attach(model)
    check_changed(before, probe(model), "attached")
    return model, before


def merged(
    base: torch.nn.Module,
    weights_folder: Path,
    fold: Callable[[PeftModel], torch.nn.Module] = lambda model: model.merge_and_unload(),
) -> torch.nn.Module:
    """The adapter folded into a base, in the precision that this has.

    Args:
        fold: folds it in; PEFT's way where none is given.

    Raises:
        CheckError: it was not folded in.
    """
    model, before = attached(base, weights_folder)
    model = fold(model)
    check_changed(before, probe(model), "folded in")
    return model


def probe(model: torch.nn.Module) -> torch.Tensor:
    """The logits [1, tokens, vocabulary] of a few fixed tokens."""
    ids = torch.arange(3, 19, device=model.device)[None] % model.config.get_text_config().vocab_size
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits


def check_changed(before: torch.Tensor, after: torch.Tensor, state: str) -> None:
    """Raise a CheckError unless the adapter changed the model's answer."""
    if torch.equal(before, after):
        raise CheckError(f"with the adapter {state}, the model answers as its untouched base does")


def check_moved(model: torch.nn.Module, model_folder: Path) -> None:
    """Raise a CheckError if a fully fine-tuned model has the base's weights."""
    weights = dict(model.named_parameters())
    for file in sorted(model_folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as base:
            for name in base.keys():  # noqa: SIM118  (it is no mapping)
                weight = weights.get(name)
                if weight is not None and not torch.equal(
                    weight.cpu(), base.get_tensor(name).to(weight.dtype)
                ):
                    return
    raise CheckError("the model that was trained has the weights of its untouched base")


def check_adapter(folder: Path, model_folder: Path, method: Method, training: params.Training) -> None:
    """Check an adapter's files before the base is loaded for it.

    Raises:
        UserError: a file is missing or damaged, a number in it is not finite, or it was made for another base
            or with other params than `training`.
    """
    file, config_file = folder / WEIGHTS, folder / "adapter_config.json"
    again = "`dvc repro` trains it again"
    for path in (config_file, file):
        if not path.is_file():
            pickle = (
                "; adapter_model.bin is a pickle, which is never read" if (folder / PICKLE).exists() else ""
            )
            raise UserError(f"{path} is missing{pickle}; {again}.")
    try:
        config = read_json(config_file)
    except ValueError as error:
        raise UserError(f"{config_file} is not JSON: {error}; {again}.") from None
    if not isinstance(config, dict) or config.get("peft_type") != method.peft_type:
        raise UserError(f"{config_file} is not that of a {method.label} adapter; {again}.")
    base, origin = config.get("base_model_name_or_path"), lineage.read(model_folder)
    fetched = origin.revision and (base, config.get("revision")) == (origin.base_model, origin.revision)
    if not isinstance(base, str) or not (fetched or Path(base).resolve() == model_folder.resolve()):
        raise UserError(
            f"{config_file} names the base {base}, and the base of this run is {model_folder}; {again}."
        )
    for key, (words, value) in method.recorded(training).items():
        if config.get(key, False) != value:  # a key that says no is left out
            raise UserError(
                f"{folder} has an adapter of {words} {config.get(key, False)}, and params.yaml asks for {value}; "
                f"{again}."
            )
    try:
        weights = load_file(file)
    except SafetensorError as error:
        raise UserError(f"{file} is no whole safetensors file ({reason(error)}); {again}.") from None
    for name, tensor in weights.items():
        if tensor.dtype != torch.float32:
            raise UserError(
                f"{file} holds {name} in {tensor.dtype}, and runs are trained in torch.float32; {again}."
            )
        if not tensor.isfinite().all():
            raise UserError(f"{file} holds a number in {name} that is not finite; {again}.")


def with_adapter(base: torch.nn.Module, folder: Path) -> PeftModel:
    """Put a saved adapter on a base, every weight of it where it was trained.

    Raises:
        UserError: it does not fit this base, or lacks a weight that its configuration names, which PEFT would
            begin anew.
        CheckError: a weight is not as it was saved.
    """
    try:
        model = PeftModel.from_pretrained(base, folder)
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"{folder} has an adapter that does not fit the base: {reason(error)}.") from None
    attached_weights, saved = (
        get_peft_model_state_dict(model, save_embedding_layers=False),
        load_file(folder / WEIGHTS),
    )
    for names, verb in (
        (attached_weights.keys() - saved.keys(), "lacks"),
        (saved.keys() - attached_weights.keys(), "holds, in vain,"),
    ):
        if names:
            first = min(names)
            raise UserError(
                f"{folder / WEIGHTS} {verb} {first}"
                + (f" and {len(names) - 1} more." if len(names) > 1 else ".")
            )
    for name, weight in saved.items():
        if not attached_weights[name].cpu().equal(weight):
            raise CheckError(f"{name} of the adapter that is attached is not as it was saved")
    return model


def round_to_16_bits(model: torch.nn.Module, model_folder: Path) -> torch.nn.Module:
    """Round every weight to the 16-bit type of the base's checkpoint; the type it is held in stays."""
    dtype = AutoConfig.from_pretrained(model_folder, trust_remote_code=False).dtype or torch.bfloat16
    for parameter in model.parameters():  # and no buffer: the rotary frequencies stay as they are computed
        parameter.data = parameter.data.to(dtype).to(parameter.dtype)
    return model


def adapters_of(model: torch.nn.Module, method: Method) -> tuple[int, str | None]:
    """How many modules have an adapter on them, and in which type."""
    layers = method.adapter_layers(model)
    types = {
        str(p.dtype).removeprefix("torch.")
        for layer in layers
        for name in layer.adapter_layer_names
        for p in getattr(layer, name).parameters()
    }
    return len(layers), " and ".join(sorted(types)) or None


def check(served: Served, variant: params.Variant, *, adapters: int) -> Served:
    """Raise a CheckError unless adapters and quantized modules are those of the form."""
    if served.adapters != adapters:
        raise CheckError(f"{served.form} must have {adapters} adapters, and has {served.adapters}")
    if adapters and served.adapter_dtype != "float32":
        raise CheckError(
            f"{served.form} has adapters in {served.adapter_dtype}, and they were trained in float32"
        )
    is_quantized = precisions.get(variant.precision).is_quantized and served.form not in MERGED
    quantized = served.precision.linear_modules - len(served.precision.layers_in_16_bits)
    expected = quantized if is_quantized else 0
    if served.precision.quantized_modules != expected:
        raise CheckError(
            f"{served.form} must have {expected} quantized modules, and has {served.precision.quantized_modules}"
        )
    return served
