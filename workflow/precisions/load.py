"""Load a base model in the precision that a variant asks for, and prove that it is what is there."""

from dataclasses import asdict, dataclass
from pathlib import Path

import bitsandbytes as bnb
import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.bitsandbytes import replace_with_bnb_linear

from workflow import methods, params
from workflow.data import model_files
from workflow.runtime.errors import CheckError, UserError

# bitsandbytes' defaults, with which memory is predicted (workflow/cost/memory.py): weights that share a constant, with
# double quantization constants that share one of their own, and from where int8 keeps a column in 16 bits.
BLOCK_4BIT, BLOCK_CONSTANTS, OUTLIERS = 64, 256, 6.0


@dataclass(frozen=True)
class Precision:
    """In which numbers a run holds its base and computes.

    `storage` is what the base's linear layers are held in, `compute` the type of the matrix
    products. On a CPU without fast 16-bit products, weights rounded to 16 bits are held and
    multiplied in float32, and `storage` says so.
    """

    base: str  # 16bit, int8, nf4 or fp4: the rounding of the weights
    double_quantization: bool
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
    asked = variant.compute_dtype or hardware.compute_dtype
    if asked == "auto":
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if asked == "float16" and device.type == "cpu":
        raise UserError("compute_dtype is float16, which a CPU does not train in; use float32 or bfloat16.")
    return getattr(torch, asked)


def quantization(
    variant: params.Variant, compute: torch.dtype, *, sharded: bool = False
) -> BitsAndBytesConfig | None:
    """bitsandbytes' configuration of a variant; None where the base stays in 16 bits.

    The type is always named: `load_in_4bit=True` alone means fp4. To be sharded, the 4-bit numbers are stored
    as if they were of the compute type: FSDP cuts up floating-point weights alone.
    """
    match variant.precision:
        case "16bit":
            return None
        case "int8":
            return BitsAndBytesConfig(load_in_8bit=True)
        case four_bit:
            return BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=four_bit,
                bnb_4bit_use_double_quant=variant.double_quantization,
                bnb_4bit_compute_dtype=compute,
                bnb_4bit_quant_storage=compute if sharded else torch.uint8,
            )


def load_base(
    folder: Path, variant: params.Variant, *, hardware: params.Hardware, sharded: bool = False
) -> tuple[PreTrainedModel, Precision]:
    """Load the model in `folder` in the variant's precision and check what was loaded.

    A variant that trains every weight gets float32 master weights; autocast computes in `compute`.

    Args:
        sharded: load (and quantize) in host memory, from where each device gets its part.

    Raises:
        UserError: the device or type is not to be had, or the weights are not safetensors or not all of the model.
        CheckError: the model is not in the precision that was asked for.
    """
    use_exact_cpu_kernels()
    device = choose_device(hardware)
    compute = choose_compute(hardware, variant, device)
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=held_in(variant, compute),
            quantization_config=quantization(variant, compute, sharded=sharded),
            device_map={"": "cpu" if sharded else device},
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation="sdpa",
            ignore_mismatched_sizes=True,  # check_loaded names them
            output_loading_info=True,
        )
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder} holds no model that can be loaded: {model_files.reason(error)}.") from None
    model_files.check_loaded(loading, str(folder))
    return model, describe(model, variant, compute=compute, device=device, sharded=sharded)


def shape(name: str) -> PreTrainedConfig:
    """A named model shape's configuration, from workflow/cost/shapes/."""
    return AutoConfig.from_pretrained(params.SHAPES / f"{name}.json", trust_remote_code=False)


def random_base(
    config: PreTrainedConfig, variant: params.Variant, *, hardware: params.Hardware, seed: int
) -> tuple[PreTrainedModel, Precision]:
    """A base of this configuration with random weights, made and quantized on the device layer by layer.

    What a training costs does not depend on the values of the weights. Nothing is read from disk, and no
    more memory is taken than the model holds in the end and one layer in 16 bits.
    """
    use_exact_cpu_kernels()
    device = choose_device(hardware)
    compute = choose_compute(hardware, variant, device)
    held = held_in(variant, compute)
    generator = torch.Generator(device).manual_seed(seed)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=held, attn_implementation="sdpa")
        asked = quantization(variant, compute)
        if asked is not None:
            replace_with_bnb_linear(model, modules_to_not_convert=["lm_head"], quantization_config=asked)
            model.is_loaded_in_4bit, model.is_loaded_in_8bit = asked.load_in_4bit, asked.load_in_8bit
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            weight = torch.empty(parameter.shape, dtype=held, device=device)
            weight.fill_(1) if parameter.dim() == 1 else weight.normal_(std=0.02, generator=generator)
            match parameter:
                case bnb.nn.Params4bit():
                    # A matrix on the CPU is quantized when it is moved to the device.
                    made = bnb.nn.Params4bit(
                        weight,
                        requires_grad=False,
                        compress_statistics=parameter.compress_statistics,
                        quant_type=parameter.quant_type,
                        module=module,
                    )._quantize(device)
                case bnb.nn.Int8Params():
                    made = bnb.nn.Int8Params(weight, requires_grad=False)._quantize(device)
                case _:
                    made = torch.nn.Parameter(weight, requires_grad=parameter.requires_grad)
            setattr(module, name, made)
    model.tie_weights()
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    return model, describe(model, variant, compute=compute)


def held_in(variant: params.Variant, compute: torch.dtype) -> torch.dtype:
    """The type of the weights that are not quantized: where the base itself is trained, float32."""
    return torch.float32 if methods.get(variant.method).master_weights else compute


def describe(
    model: torch.nn.Module,
    variant: params.Variant,
    *,
    compute: torch.dtype,
    device: torch.device | None = None,
    sharded: bool = False,
) -> Precision:
    """Count the quantized modules and check that the model is held and computes as the variant names.

    Args:
        device: on which the model will compute; None for where it is.
        sharded: whether 4-bit numbers are stored as if they were of the compute type.

    Raises:
        CheckError: a layer is not in the precision that was asked for.
    """
    linears, quantized = base_linears(model), len(quantized_linears(model))
    check_precision(linears, variant, compute=compute, sharded=sharded)
    if quantized not in (0, len(linears)):
        raise CheckError(
            f"{quantized} modules are quantized, and the linear layers besides the head are {len(linears)}"
        )
    some = next(iter(linears.values()))
    storage = {
        "16bit": _name(some.weight.dtype),
        "int8": "int8",
    }.get(variant.precision, f"{variant.precision} (4 bits)")
    device = device or some.weight.device
    return Precision(
        base=variant.precision,
        double_quantization=variant.double_quantization,
        storage=storage,
        compute=_name(compute),
        device=device.type,
        device_name=device_name(device),
        quantized_modules=quantized,
        linear_modules=len(linears),
        weights_gib=round(weights_bytes(model) / 2**30, 6),
    )


def quantized_linears(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt)]


def base_linears(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The linear layers of the decoder, by name: not the output head, not part of an adapter."""
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "lora_" not in name and module is not head
    }


def check_precision(
    linears: dict[str, torch.nn.Module],
    variant: params.Variant,
    *,
    compute: torch.dtype,
    sharded: bool = False,
) -> None:
    """Raise a CheckError that names the first layer which is not held, or does not compute, as the variant asks."""
    if not linears:
        raise CheckError(
            "the model has no linear layer besides its head, so there is nothing to hold in a precision"
        )
    wanted = asked_of_a_layer(variant, compute=compute, sharded=sharded)
    for name, module in linears.items():
        found = found_in_a_layer(module)
        for key, value in wanted.items():
            if found.get(key) != value:
                raise CheckError(
                    f"{variant.precision} was asked for, and {key} of {name} is {found.get(key)} instead of {value}"
                )


def asked_of_a_layer(variant: params.Variant, *, compute: torch.dtype, sharded: bool) -> dict[str, object]:
    """What a linear layer of this variant must be, as `found_in_a_layer` says it."""
    match variant.precision:
        case "16bit":
            return {"quantization": None, "storage": _name(held_in(variant, compute))}
        case "int8":
            return {
                "quantization": "int8",
                "storage": "int8",
                "outlier threshold": OUTLIERS,
                "16-bit copy": False,
            }
        case four_bit:
            return {
                "quantization": four_bit,
                "double quantization": variant.double_quantization,
                "block size": BLOCK_4BIT,
                "block size of constants": BLOCK_CONSTANTS if variant.double_quantization else None,
                "compute type": _name(compute),
                "storage": _name(compute) if sharded else "uint8",
            }


def found_in_a_layer(module: torch.nn.Module) -> dict[str, object]:
    """How a linear layer is held and computes."""
    found = {"quantization": None, "storage": _name(module.weight.dtype)}
    if isinstance(module, bnb.nn.Linear8bitLt):
        return found | {
            "quantization": "int8",
            "outlier threshold": module.state.threshold,
            "16-bit copy": module.state.has_fp16_weights,
        }
    state = getattr(module.weight, "quant_state", None)
    if isinstance(module, bnb.nn.Linear4bit) and state is not None:
        return found | {
            "quantization": state.quant_type,
            "double quantization": bool(state.nested),
            "block size": state.blocksize,
            "block size of constants": state.state2.blocksize if state.nested else None,
            "compute type": _name(module.compute_dtype),
        }
    return found


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def weights_bytes(model: torch.nn.Module) -> int:
    """Bytes of all weights and quantization constants, each tensor once (tied ones share theirs)."""
    tensors = {}
    for tensor in (*model.parameters(), *model.buffers()):
        tensors[tensor.data_ptr()] = tensor.nbytes
        state = getattr(tensor, "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            if part is not None:
                tensors[part.absmax.data_ptr()] = part.absmax.nbytes
    return sum(tensors.values())


def device_name(device: torch.device) -> str:
    """The processor's or GPU's own name for itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = models[0] if models else "CPU"
    return f"{name}, {torch.get_num_threads()} threads"


def use_exact_cpu_kernels() -> None:
    """Keep bitsandbytes from repacking 4-bit weights for its AVX512-BF16 kernel.

    On a CPU with those instructions, one forward pass in eval mode repacks a layer for good: it then
    multiplies in bfloat16 whatever compute type was asked for, and passes no gradient to the layers
    below, so training after a validation pass would go on silently with most gradients missing.
    """
    bnb.nn.Linear4bit.support_avx512bf16_for_cpu = property(lambda self: False, lambda self, value: None)
