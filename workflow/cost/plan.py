"""Predict, before any download, which variants fit on a GPU, at which batch size and length, and how fast they are.

    python -m workflow.plan --model llama2_7b --gpu 24
    python -m workflow.plan --model qwen2_5_7b --gpu rtx4090 --price 0.4
    python -m workflow.plan --model llama2_70b --gpu 24 --gpus 4

Memory is counted from the model's configuration (workflow/cost/memory.py), which is checked against the model itself,
built without its weights (workflow/cost/architecture.py). Time is estimated from a GPU's matrix product rate and
memory rate, both fitted to the measurements in results/hardware/. The ratio to 16 bits depends little on these rates.
Another card than the measured one is estimated: it is taken to reach the same share of its data sheet's rates.
With --gpus, several cards share the weights of each training (docs/sharding.md): what each needs is predicted, and no time.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from workflow import methods, params, precisions
from workflow.cost import architecture, cards
from workflow.cost.memory import (
    Memory,
    Shape,
    describes,
    largest_fit,
    linear_names,
    predict_per_card,
    quantized_parameters,
    usable_gib,
)
from workflow.methods.lora import adapter_parameters
from workflow.precisions import dynamic
from workflow.runtime.errors import UserError, suggestion
from workflow.runtime.files import expanded
from workflow.runtime.paths import MODEL, PARAMS
from workflow.runtime.stage import offline_command

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ROWS, EPOCHS = 1000, 3
GigaBytes = Annotated[float, Field(gt=0, le=10_000, allow_inf_nan=False)]  # of 10^9 bytes
BATCHES = (1, 2, 4, 8, 16, 32)
# The rates that this project's training reaches on an H100, in operations and bytes per second, and the overhead of
# a pass in seconds. `docs/speed.md` says how well they fit.
MATRIX_RATE, MEMORY_RATE, SECONDS_PER_PASS = 3.97e14, 1.74e12, 0.0236
Gpus = Annotated[int, Field(gt=0, le=1024)]  # as many as `processes` of a variant may be
Price = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]


@dataclass(frozen=True)
class Rates:
    """How fast a card trains: operations per second, bytes per second, and the overhead of a pass in seconds."""

    matrix: float = MATRIX_RATE
    memory: float = MEMORY_RATE
    seconds_per_pass: float = SECONDS_PER_PASS

    @classmethod
    def of(cls, card: cards.Card) -> "Rates":
        """The rates of a card that reaches the share of its data sheet that the measured card reaches."""
        measured = cards.CARDS[cards.MEASURED]
        return cls(
            MATRIX_RATE * card.tflops / measured.tflops,
            MEMORY_RATE * card.gb_per_second / measured.gb_per_second,
        )


@dataclass(frozen=True)
class Workload:
    """The GPU and the rows to plan for.

    Attributes:
        gpu_gb: memory of the GPU, in the vendor's GB.
        gpus: of that kind, which share the weights of each training.
        card: the GPU, if it was named; times are else those of the measured one.
        price: of an hour of the GPU, in the user's currency; None to leave costs out.
        length: tokens of the longest row.
        mean_length: mean number of tokens per row.
        rank: rank of the adapters; None for that of params.
    """

    gpu_gb: float
    gpus: int
    card: cards.Card | None
    price: float | None
    length: int
    mean_length: int
    rank: int | None

    @property
    def usable_gib(self) -> float:
        """Memory in GiB that a training can use."""
        return usable_gib(self.gpu_gb)

    @property
    def clock(self) -> cards.Card:
        """The card whose times are estimated."""
        return self.card or cards.CARDS[cards.MEASURED]


def step_seconds(
    shape: Shape,
    variant: params.Variant,
    training: params.Training,
    *,
    tokens: int,
    rates: Rates = Rates(),
) -> float:
    """Seconds of one forward and backward pass of `tokens` tokens, recomputation included.

    A matrix product takes 2 operations per weight and token: in the forward pass, for the gradient of its input, and
    again if activations are recomputed. Before each product, a 4-bit weight is read and written in 16 bits.
    """
    method = methods.get(variant.method)
    passes = method.passes + training.gradient_checkpointing
    work = 2 * tokens * passes * (shape.linear_parameters + adapter_parameters(shape, training))
    work += 2 * tokens * 2 * shape.vocabulary * shape.hidden
    precision = precisions.get(variant.precision)
    moved = tokens * method.moved_bytes(shape, training)
    moved += passes * quantized_parameters(shape, variant) * precision.dequantization_bytes
    moved += passes * shape.linear_parameters * method.merging_bytes
    return rates.seconds_per_pass + work / rates.matrix + moved / rates.memory


def plan(
    config_name: str,
    shape: Shape,
    settings: params.Params,
    workload: Workload,
    *,
    notes: list[str],
) -> str:
    """Write the plan as text: a table of what fits, and the memory of each variant by component."""
    shared = workload.gpus > 1
    many = f"{workload.gpus} GPUs of {workload.gpu_gb:g} GB, of each of which"
    minutes = f"minutes, {workload.clock.label}"
    times = f" {'time / 16-bit':>13} {minutes:>24}" + ("" if workload.price is None else f" {'cost':>8}")
    lines = [
        f"{config_name}: {shape.parameters / 1e9:.4g} billion parameters; "
        f"{many if shared else f'a GPU of {workload.gpu_gb:g} GB, of which'} a training can use {workload.usable_gib:.1f} GiB.",
        f"Rows are cut at {workload.length} tokens and have {workload.mean_length} on average; {ROWS} rows x {EPOCHS} epochs.",
        "A peak is that of the longest pass that an epoch can hold: every row of it at full length.",
        *(
            ["Rows, peaks and tokens are those of each GPU, which computes passes of its own."]
            if shared
            else []
        ),
        "",
        f"{'variant':<14} {'checkpointing':<13} {'rows a pass':>11} {'peak GiB':>9} {'most tokens':>11}"
        + ("" if shared else times),
    ]
    tables = []
    for name in settings.variants:
        if why := why_not_shared(name, settings, workload):
            lines.append(f"{name:<14} {'':<13} {'not shared':>11} ({why})")
            continue
        for checkpointing in (False, True):
            training = settings.training_of(name).model_copy(update={"gradient_checkpointing": checkpointing})
            if workload.rank is not None:
                training = training.model_copy(update={"rank": workload.rank})
            row, need = _row(name, shape, training, settings, workload)
            lines.append(row)
        tables.append((name, need))
    lines += [line for note in notes for line in ("", note)]
    if not tables:
        return "\n".join(lines)
    lines += ["", "By component, GiB, at one row of full length a pass with checkpointing:", ""]
    parts = list(tables[0][1].gib())
    lines.append(f"{'variant':<14} " + " ".join(f"{part.replace('quantization_', ''):>12}" for part in parts))
    for name, need in tables:
        lines.append(f"{name:<14} " + " ".join(f"{value:12.3f}" for value in need.gib().values()))
    return "\n".join(lines)


def _row(
    name: str,
    shape: Shape,
    training: params.Training,
    settings: params.Params,
    workload: Workload,
) -> tuple[str, Memory]:
    """Write the row of a variant with this training, and predict the memory of one row of full length."""
    variant, length = settings.variants[name], workload.length
    training = training.model_copy(update={"micro_batch_rows": 1})
    smallest = predict_per_card(shape, variant, training, tokens=length, processes=workload.gpus)
    most = largest_fit(shape, variant, training, gib=workload.usable_gib, processes=workload.gpus)
    rows = max((rows for rows in BATCHES if rows * length <= most), default=0)
    head = f"{name:<14} {'yes' if training.gradient_checkpointing else 'no':<13} "
    if not rows:
        short = smallest.gib()["total"] - workload.usable_gib
        why = f"{short:.1f} GiB short" if short > 0 else "too tight"
        return f"{head}{'does not fit':>11} {smallest.gib()['total']:9.2f} ({why} for one row)", smallest
    training = training.model_copy(update={"micro_batch_rows": rows})
    need = predict_per_card(shape, variant, training, tokens=rows * length, processes=workload.gpus)
    found = f"{head}{rows:11d} {need.gib()['total']:9.2f} {most:11d}"
    if workload.gpus > 1:
        return found, smallest
    baseline = settings.experiment.baseline
    plain = settings.training_of(baseline).model_copy(
        update={"gradient_checkpointing": False, "rank": training.rank}
    )
    passes = ROWS * EPOCHS / rows
    timing = {"tokens": rows * workload.mean_length, "rates": Rates.of(workload.clock)}
    seconds = passes * step_seconds(shape, variant, training, **timing)
    # The time that 16 bits would take with as many rows per pass, even if they do not fit.
    baseline_seconds = passes * step_seconds(shape, settings.variants[baseline], plain, **timing)
    cost = "" if workload.price is None else f" {seconds / 3600 * workload.price:8.2f}"
    return f"{found} {seconds / baseline_seconds:13.2f} {seconds / 60:24.1f}{cost}", smallest


def why_not_shared(name: str, settings: params.Params, workload: Workload) -> str:
    """Why the GPUs cannot share a variant's training, as a clause; empty where they can, or there is one."""
    if workload.gpus == 1:
        return ""
    variant = settings.variants[name]
    reasons = list(params.why_not_shared(variant, settings.training_of(name)))
    computes = variant.compute_dtype or settings.hardware.compute_dtype
    if computes == "float16" or (computes != "float32" and not workload.clock.bfloat16):
        reasons.append("it computes in float16, whose scaled gradients are not for a sharded training")
    return reasons[0] if reasons else ""


def read_shape(model: str) -> "tuple[str, PreTrainedConfig, Shape]":
    """Read the configuration and shape of a name in workflow/cost/shapes/, of `own`, or of a config.json.

    Raises:
        UserError: there is no such name or file, or it is not the configuration of a countable model.
    """
    path = {"own": MODEL / "config.json"}.get(model, params.SHAPES / f"{model}.json")
    if not path.is_file():
        path = expanded(model, key="--model")
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in params.SHAPES.glob("*.json")))
        raise UserError(
            f"--model is {model}, which is neither a config.json, nor own (after `dvc repro fetch_model`), "
            f"nor one of {known}."
        )
    try:
        return model, *architecture.read(path)
    except UserError as error:
        raise UserError(f"--model is {model}: {error}") from None


def read_gpu(text: str) -> tuple[cards.Card | None, float]:
    """Read a GPU's name, or the size of its memory: the card, if it was named, and the memory in GB.

    Raises:
        argparse.ArgumentTypeError: it is neither.
    """
    if text in cards.CARDS:
        return cards.CARDS[text], cards.CARDS[text].memory_gb
    try:
        return None, number(GigaBytes, float)(text)
    except argparse.ArgumentTypeError as error:
        known = f"allowed is a size in GB, or one of {', '.join(cards.CARDS)}{suggestion(text, cards.CARDS)}"
        raise argparse.ArgumentTypeError(f"{error}; {known}") from None


def clock_notes(workload: Workload) -> list[str]:
    """Say of which card the times are, and whether they were measured."""
    card = workload.clock
    if workload.gpus > 1:
        what = "time" if workload.price is None else "time or cost"
        return [
            f"No {what} is estimated: the rates were fitted to trainings on one GPU with CUDA graphs, which a shared one "
            "does not have. docs/sharding.md has what was measured of some."
        ]
    if workload.card is None:
        return [
            f"Times are those of an {card.label}, measured; name the card (--gpu rtx4090) for an estimate of its own."
        ]
    if card == cards.CARDS[cards.MEASURED]:
        return ["Times are fitted to what was measured on this card (docs/speed.md)."]
    notes = [
        f"Times are estimated: {card.label} is taken to reach the share of its data sheet ({card.tflops:g} TFLOP/s, "
        f"{card.gb_per_second:g} GB/s) that was measured on an {cards.CARDS[cards.MEASURED].label}. The ratio to 16 bits "
        "is the surer figure."
    ]
    if not card.bfloat16:
        notes.append(
            f"{card.label} has no bfloat16: it computes in float16, without CUDA graphs, and packs with a mask. Short "
            "passes are slower than estimated."
        )
    return notes


def check_lengths(config: "PreTrainedConfig", *, length: int, mean_length: int) -> None:
    """Raise a UserError if the mean length exceeds the maximum, or the maximum exceeds the model's context."""
    if mean_length > length:
        raise UserError(f"--mean-length is {mean_length}, and no row is longer than --length, {length}.")
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context and length > context:
        raise UserError(
            f"--length (training.step.max_length where it is not given) is {length} tokens, and the model's context "
            f"(max_position_embeddings) holds {context}."
        )


def check_targets(shape: Shape, settings: params.Params) -> None:
    """Raise a UserError if params put an adapter on a layer that the plan does not count."""
    for name in settings.variants:
        targets = settings.training_of(name).target_modules
        for target in [] if targets == "all-linear" else targets:
            if target not in shape.linears:
                raise UserError(
                    f"training.step.target_modules of {name} names {target}; the plan counts adapters on "
                    f"{', '.join(shape.linears)}, and on all of them as all-linear."
                )


def caveats(config: "PreTrainedConfig", settings: params.Params, *, length: int, gpus: int = 1) -> list[str]:
    """List, one sentence each, the aspects of params and model that the prediction does not cover."""
    notes = []
    planned = {
        name: variant
        for name, variant in settings.variants.items()
        if gpus == 1 or not any(params.why_not_shared(variant, settings.training_of(name)))
    }
    text = config.get_text_config()
    if text.model_type not in architecture.MEASURED or getattr(text, "hidden_act", None) != "silu":
        notes.append(
            f"An estimate: the weights of a {config.model_type} are counted, and what its layers keep for the "
            "backward pass is taken for a Llama's, which can be too little by half."
        )
    window = getattr(text, "sliding_window", None)
    if window and getattr(text, "use_sliding_window", True) and length > window:
        notes.append(
            f"Rows of {length} tokens are longer than the model's attention window ({window}), so they are not packed, "
            "which is not counted: memory and time are lower bounds."
        )
    for name in dict.fromkeys(variant.precision for variant in planned.values()):
        if not precisions.get(name).can_be_fused:
            notes.append(
                f"{name} keeps PEFT's own layers, which are not modeled: its memory and time are lower bounds."
            )
        if precisions.get(name).is_emulated:
            notes.append(
                f"{name} is emulated: its memory and time are those of 16 bits, not those of a GPU with the format."
            )
    names = linear_names(Shape.of(config))
    for name, variant in planned.items():
        for pattern in variant.layers_in_16_bits:
            if not any(dynamic.is_named(whole, pattern) for whole in names):
                notes.append(
                    f"{name} keeps {pattern} in 16 bits, and no linear layer of this model has that name: it is planned "
                    "without."
                )
    if gpus > 1:
        notes.append(
            "Of each GPU, what NCCL holds for itself is not counted, as PyTorch's allocator does not know of it."
        )
    others = [name for name, variant in planned.items() if variant.processes not in (1, gpus)]
    if others:
        notes.append(
            f"Each is planned on {'one GPU' if gpus == 1 else f'{gpus} GPUs'}, as --gpus says: the `processes` of "
            f"{', '.join(others)} (docs/sharding.md) are not used."
        )
    slow = [name for name in planned if not _described(settings, name)]
    if slow:
        notes.append(
            f"Of {', '.join(slow)} a speed-up under training is off: memory and time, predicted with all on, are "
            "lower bounds."
        )
    wide = [
        name
        for name, variant in planned.items()
        if (variant.compute_dtype or settings.hardware.compute_dtype) == "float32"
    ]
    if wide:
        notes.append(f"{', '.join(wide)} computes in float32, and the plan counts 16 bits: lower bounds.")
    return notes


def _described(settings: params.Params, name: str) -> bool:
    """Whether a variant trains with the speed-ups that the prediction counts; full fine-tuning has no adapter to fuse."""
    training, method = settings.training_of(name), methods.get(settings.variants[name].method)
    return describes(training) and not (method.leaves_adapter and method.no_fused_adapters(training))


def number(kind: Any, read: Callable[[str], float]) -> Callable[[str], float]:
    """Make an argparse type that checks a command-line argument against a type of params."""

    def parse(text: str) -> float:
        try:
            return TypeAdapter(kind).validate_python(read(text))
        except ValidationError as error:
            message = error.errors()[0]["msg"]
        except ValueError:
            message = f"Input should be a {'whole number' if read is int else 'number'}"
        excerpt = text if len(text) <= 40 else text[:37] + "..."
        raise argparse.ArgumentTypeError(f"invalid value {excerpt}: {message[0].lower()}{message[1:]}")

    return parse


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m workflow.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model", required=True, help="a name from workflow/cost/shapes/, own, or a path to a config.json"
    )
    parser.add_argument(
        "--gpu",
        type=read_gpu,
        required=True,
        help=f"the GPU's memory in GB, as it is sold, or one of {', '.join(cards.CARDS)}",
    )
    parser.add_argument(
        "--gpus",
        type=number(Gpus, int),
        default=1,
        help="how many such GPUs share the weights of each training, whatever `processes` of a variant is (default 1)",
    )
    parser.add_argument(
        "--price",
        type=number(Price, float),
        help="of an hour of the GPU, in your currency, for a column of costs",
    )
    parser.add_argument(
        "--length",
        type=number(params.Length, int),
        help="tokens of the longest row (default training.step.max_length)",
    )
    parser.add_argument(
        "--mean-length",
        type=number(params.Count, int),
        help="tokens of a row on average (default a quarter of --length)",
    )
    parser.add_argument(
        "--rank", type=number(params.Size, int), help="of the adapters (default training.step.rank)"
    )
    parser.add_argument("--params", type=Path, default=PARAMS, help="whose variants and training")
    options = parser.parse_args()
    with offline_command("plan"):
        settings = params.load(options.params)
        name, config, shape = read_shape(options.model)
        length = options.length or settings.training.max_length
        card, gpu_gb = options.gpu
        workload = Workload(
            gpu_gb=gpu_gb,
            gpus=options.gpus,
            card=card,
            price=options.price,
            length=length,
            mean_length=options.mean_length or max(1, length // 4),
            rank=options.rank,
        )
        check_lengths(config, length=length, mean_length=workload.mean_length)
        check_targets(shape, settings)
    notes = [*clock_notes(workload), *caveats(config, settings, length=length, gpus=workload.gpus)]
    print(plan(name, shape, settings, workload, notes=notes))


if __name__ == "__main__":
    main()
