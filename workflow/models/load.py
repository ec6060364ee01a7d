"""Load a base model in the precision that a variant asks for, and prove that it is what is there."""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from workflow import methods, params, precisions
from workflow.data import model_files
from workflow.precisions.base import Loading, Precision, dtype_name
from workflow.precisions.bnb_4bit import use_exact_cpu_kernels
from workflow.precisions.dynamic import layers_in_16_bits
from workflow.runtime import launch
from workflow.runtime.errors import CheckError, UserError


@dataclass(frozen=True)
class LoadedPrecision:
    """In which numbers a run holds its base and computes.

    `storage` is what the base's linear layers are held in, `compute` the type of the matrix
    products. On a CPU without fast 16-bit products, weights rounded to 16 bits are held and
    multiplied in float32, and `storage` says so.
    """

    base: str  # its name in the table of precisions: the rounding of the weights
    double_quantization: bool
    block_size: int | None
    layers_in_16_bits: tuple[str, ...]  # the whole names of the linear layers that are not quantized
    storage: str
    compute: str
    device: str
    device_name: str
    quantized_modules: int
    linear_modules: int
    weights_gib: float

    def as_dict(self) -> dict:
        return asdict(self)


def choose_device(hardware: params.Hardware) -> torch.device:
    """The device that params ask for.

    Raises:
        UserError: cuda is asked for and there is none.
    """
    if hardware.device == "cuda" and not torch.cuda.is_available():
        raise UserError("hardware.device is cuda, and torch sees no CUDA device; use auto or cpu.")
    if hardware.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(hardware.device)


def choose_compute(hardware: params.Hardware, variant: params.Variant, device: torch.device) -> torch.dtype:
    """The type of the matrix products: the variant's own, or params', or what the device is good at.

    `auto` is bfloat16 on a GPU that has it, float16 on an older one, and float32 on a CPU, where
    every machine then computes alike.
    """
    compute_dtype = variant.compute_dtype or hardware.compute_dtype
    if compute_dtype == "auto":
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if compute_dtype == "float16" and device.type == "cpu":
        raise UserError("compute_dtype is float16, which a CPU does not train in; use float32 or bfloat16.")
    return getattr(torch, compute_dtype)


def loading_of(
    variant: params.Variant, compute: torch.dtype, names: Collection[str], *, sharded: bool = False
) -> Loading:
    """With what a variant's base is loaded; where the base itself is trained, its weights are float32.

    Args:
        names: of the base's linear layers.

    Raises:
        UserError: no layer has a name that the variant keeps in 16 bits.
    """
    weights = torch.float32 if methods.get(variant.method).master_weights else compute
    plain = layers_in_16_bits(names, variant.layers_in_16_bits)
    return Loading(replace(variant.quantization, layers_in_16_bits=plain), compute, weights, sharded)


def linear_names(config: PreTrainedConfig, variant: params.Variant) -> list[str]:
    """The names of the linear layers of a configuration's model; none if the variant does not ask for any."""
    if not variant.layers_in_16_bits:
        return []
    with init_empty_weights():
        return list(base_linears(AutoModelForCausalLM.from_config(config)))


def with_whole_names(variant: params.Variant, folder: Path) -> params.Variant:
    """A variant with the whole names of its layers in 16 bits, of the model in `folder`."""
    names = linear_names(AutoConfig.from_pretrained(folder, trust_remote_code=False), variant)
    return variant.keeping(layers_in_16_bits(names, variant.layers_in_16_bits))


def check_device(precision: precisions.Precision, device: torch.device) -> None:
    """Raise a UserError if a base in this precision cannot be on this device."""
    least = precision.compute_capability
    if least and (device.type != "cuda" or torch.cuda.get_device_capability(device) < least):
        raise UserError(
            f"precision {precision.name} needs a GPU of compute capability {least[0]}.{least[1]} or newer, "
            f"and this device is {device_name(device)}."
        )


def load_base(
    folder: Path,
    variant: params.Variant,
    *,
    hardware: params.Hardware,
    sharded: bool = False,
    on_any_device: bool = False,
) -> tuple[PreTrainedModel, LoadedPrecision]:
    """Load the model in `folder` in the variant's precision and check what was loaded.

    A variant that trains every weight gets float32 master weights; autocast computes in `compute`.

    Args:
        sharded: load into host memory, from where each process' device gets its part. That device quantizes.
        on_any_device: to try a variant on a CPU that will run on a GPU.

    Raises:
        UserError: the device, type or package is not to be had, or the weights are not safetensors or not all of the model.
        CheckError: the model is not in the precision that was asked for.
    """
    use_exact_cpu_kernels()
    device = choose_device(hardware)
    if sharded and device.type == "cuda":
        device = torch.device("cuda", launch.rank())
    compute = choose_compute(hardware, variant, device)
    precision = precisions.get(variant.precision)
    precisions.check_installed(precision)
    if not on_any_device:
        check_device(precision, device)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        loading = loading_of(variant, compute, linear_names(config, variant), sharded=sharded)
        with precision.while_loading(replace(loading, quantized_on=device if sharded else None)):
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=loading.weights,
                quantization_config=precision.config(loading),
                device_map={"": "cpu" if sharded else device},
                use_safetensors=True,
                trust_remote_code=False,
                attn_implementation="sdpa",
                ignore_mismatched_sizes=True,  # check_loaded names them
                output_loading_info=True,
            )
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder} holds no model that can be loaded: {model_files.reason(error)}.") from None
    model_files.check_loaded(report, str(folder))
    check_computable(model, precision, loading, device=device)
    model = precision.quantize(model, loading)
    return model, describe(model, variant, compute=compute, device=device, sharded=sharded)


def shape(name: str) -> PreTrainedConfig:
    """A named model shape's configuration, from workflow/cost/shapes/."""
    return AutoConfig.from_pretrained(params.SHAPES / f"{name}.json", trust_remote_code=False)


def random_base(
    config: PreTrainedConfig, variant: params.Variant, *, hardware: params.Hardware, seed: int
) -> tuple[PreTrainedModel, LoadedPrecision]:
    """A base of this configuration with random weights, made and quantized on the device layer by layer.

    What a training costs does not depend on the values of the weights. Nothing is read from disk, and no
    more memory is taken than the model holds in the end and one layer in 16 bits; in a precision that no
    library makes as it loads, than the model holds in 16 bits.
    """
    use_exact_cpu_kernels()
    device = choose_device(hardware)
    compute = choose_compute(hardware, variant, device)
    precision = precisions.get(variant.precision)
    loading = loading_of(variant, compute, linear_names(config, variant))
    precisions.check_installed(precision)
    check_device(precision, device)
    generator = torch.Generator(device).manual_seed(seed)
    with init_empty_weights(), precision.while_loading(loading):
        model = AutoModelForCausalLM.from_config(config, dtype=loading.weights, attn_implementation="sdpa")
        if quantization := precision.config(loading):
            precision.replace(model, quantization)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            weight = torch.empty(parameter.shape, dtype=loading.weights, device=device)
            weight.fill_(1) if parameter.dim() == 1 else weight.normal_(std=0.02, generator=generator)
            setattr(module, name, precision.parameter(parameter, weight, module))
    model.tie_weights()
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    model = precision.quantize(model, loading)
    return model, describe(model, variant, compute=compute)


def describe(
    model: torch.nn.Module,
    variant: params.Variant,
    *,
    compute: torch.dtype,
    device: torch.device | None = None,
    sharded: bool = False,
) -> LoadedPrecision:
    """Count the quantized modules and check that the model is held and computes as the variant names.

    Args:
        device: on which the model will compute; None for where it is.
        sharded: whether 4-bit numbers are stored as if they were of the compute type.

    Raises:
        CheckError: a layer is not in the precision that was asked for.
    """
    linears = {base_name(name): layer for name, layer in base_linears(model).items()}
    quantized = len(quantized_linears(model))
    plain = check_precision(linears, variant, compute=compute, sharded=sharded)
    precision = precisions.get(variant.precision)
    expected = len(linears) - len(plain) if precision.is_quantized else 0
    if quantized != expected:
        raise CheckError(
            f"{quantized} modules are quantized, and {expected} linear layers are to be, the head not among them"
        )
    first = next(layer for name, layer in linears.items() if name not in plain)
    device = device or first.weight.device
    return LoadedPrecision(
        base=variant.precision,
        double_quantization=variant.double_quantization,
        block_size=variant.block_size,
        layers_in_16_bits=plain,
        storage=precision.storage(first),
        compute=dtype_name(compute),
        device=device.type,
        device_name=device_name(device),
        quantized_modules=quantized,
        linear_modules=len(linears),
        weights_gib=round(weights_bytes(model) / 2**30, 6),
    )


def quantized_linears(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules that are held in a quantized precision, the output head among them if it is."""
    recognized = ((module, precisions.recognize(module)) for module in model.modules())
    return [module for module, precision in recognized if precision is not None and precision.is_quantized]


def base_linears(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The linear layers of the decoder, by name: not the output head, not part of an adapter."""
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "lora_" not in name and module is not head
    }


def check_computable(
    model: torch.nn.Module, precision: Precision, loading: Loading, *, device: torch.device
) -> None:
    """Raise a UserError that names the first quantized layer which this device does not compute."""
    for name, layer in base_linears(model).items():
        problem = precision.problem(layer, loading, device.type)
        if problem and name not in loading.layers_in_16_bits:
            raise UserError(f"{name} is not computed in {precision.name}: {problem}.")


def base_name(name: str) -> str:
    """A linear layer's name in its base, without what PEFT puts around it."""
    return name.removeprefix("base_model.model.").removesuffix(".base_layer")


def check_precision(
    linears: dict[str, torch.nn.Module],
    variant: params.Variant,
    *,
    compute: torch.dtype,
    sharded: bool = False,
) -> tuple[str, ...]:
    """Return the names of the layers that are to be in 16 bits among quantized ones.

    Raises:
        CheckError: a layer, which it names, is not held, or does not compute, as the variant asks.
    """
    if not linears:
        raise CheckError(
            "the model has no linear layer besides its head, so there is nothing to hold in a precision"
        )
    loading = loading_of(variant, compute, linears, sharded=sharded)
    plain = loading.layers_in_16_bits
    for name, layer in linears.items():
        precision = precisions.get(precisions.SIXTEEN_BIT if name in plain else variant.precision)
        facts = precisions.facts(layer)
        for key, value in precision.expected_facts(loading).items():
            if facts.get(key) != value:
                raise CheckError(
                    f"{precision.name} was asked for, and {key} of {name} is {facts.get(key)} instead of {value}"
                )
    return plain


def weights_bytes(model: torch.nn.Module) -> int:
    """Bytes of all weights and quantization constants, each tensor once (tied ones share theirs)."""
    tensors = {}
    for tensor in _plain_tensors((*model.parameters(), *model.buffers())):
        tensors[tensor.data_ptr()] = tensor.nbytes
        state = getattr(tensor, "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            if part is not None:
                tensors[part.absmax.data_ptr()] = part.absmax.nbytes
    return sum(tensors.values())


def _plain_tensors(tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The tensors, and in place of one that only wraps others (torchao's), those that it wraps."""
    for tensor in tensors:
        if is_traceable_wrapper_subclass(tensor):
            names, _ = tensor.__tensor_flatten__()
            yield from _plain_tensors(getattr(tensor, name) for name in names)
        else:
            yield tensor


def device_name(device: torch.device) -> str:
    """The processor's or GPU's own name for itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = models[0] if models else "CPU"
    return f"{name}, {torch.get_num_threads()} threads"
