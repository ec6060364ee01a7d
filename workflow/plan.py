"""Say before anything is downloaded which variants fit on a GPU, at which batch and length, and how fast.

    python -m workflow.plan --model llama2_7b --gpu 24

Memory is counted from the model's configuration (workflow/memory.py). Time is estimated from two rates of a
GPU, its matrix products' and its memory's, fitted to what results/hardware/ measured; the ratio to 16 bits
depends on them little.
"""

import argparse
import sys
from pathlib import Path

from workflow import faults, params
from workflow.console import go_offline, quiet_libraries
from workflow.errors import UserError
from workflow.memory import (
    Memory,
    Shape,
    adapter_parameters,
    largest_fit,
    predict,
    usable_gib,
)
from workflow.model_files import read_config
from workflow.paths import MODEL

ROWS, EPOCHS = 1000, 3
BATCHES = (1, 2, 4, 8, 16, 32)
# An H100's, at what this project's training reaches of them: operations and bytes per second, and the seconds
# a step takes however few its tokens are. `docs/speed.md` says how well they fit.
MATRIX_RATE, MEMORY_RATE, SECONDS_PER_PASS = 3.97e14, 1.74e12, 0.0236


def step_seconds(shape: Shape, variant: params.Variant, training: params.Training, *, tokens: int) -> float:
    """Seconds of one forward and backward pass of `tokens` tokens, recomputation included.

    Products take 2 operations a weight and token, forward, for the input's gradient, and again if
    activations are recomputed; a 4-bit weight is read and written in 16 bits before each of them.
    """
    passes = (3 if variant.method == "full" else 2) + training.gradient_checkpointing
    work = 2 * tokens * passes * (shape.linear_parameters + adapter_parameters(shape, training))
    work += 2 * tokens * 2 * shape.vocabulary * shape.hidden
    four_bits = variant.precision in ("nf4", "fp4")
    moved = passes * shape.linear_parameters * 2.5 if four_bits else 0
    return SECONDS_PER_PASS + work / MATRIX_RATE + moved / MEMORY_RATE


def plan(
    config_name: str,
    shape: Shape,
    asked: params.Params,
    *,
    gpu_gb: float,
    length: int,
    mean_length: int,
    rank: int | None,
) -> str:
    """The plan as text: a table of what fits, and the memory of each variant by component."""
    usable = usable_gib(gpu_gb)
    lines = [
        f"{config_name}: {(shape.linear_parameters + shape.embedding_parameters + shape.norm_parameters) / 1e9:.2f} "
        f"billion parameters; a GPU of {gpu_gb:g} GB, of which a training can use {usable:.1f} GiB.",
        f"Rows are cut at {length} tokens and have {mean_length} on average; {ROWS} rows x {EPOCHS} epochs.",
        "A peak is that of the longest pass that an epoch can hold: every row of it at full length.",
        "",
        f"{'variant':<14} {'checkpointing':<13} {'rows a pass':>11} {'peak GiB':>9} {'most tokens':>11} "
        f"{'time / 16-bit':>13} {'minutes on an H100':>18}",
    ]
    tables = []
    for name, variant in asked.variants.items():
        for checkpointing in (False, True):
            training = asked.training_of(name).model_copy(update={"gradient_checkpointing": checkpointing})
            if rank is not None:
                training = training.model_copy(update={"rank": rank})
            row, need = _row(name, shape, variant, training, asked, usable, length, mean_length)
            lines.append(row)
        tables.append((name, need))
    lines += [
        "",
        "int8 keeps PEFT's own layers, which are not modelled: its memory and time are lower bounds.",
    ] * any(variant.precision == "int8" for variant in asked.variants.values())
    lines += [
        "",
        "Each is on one GPU: what several processes that share a training (docs/sharding.md) need is not predicted.",
    ] * any(variant.processes > 1 for variant in asked.variants.values())
    lines += ["", "By component, GiB, at one row of full length a pass with checkpointing:", ""]
    parts = list(tables[0][1].gib())
    lines.append(f"{'variant':<14} " + " ".join(f"{part.replace('quantization_', ''):>12}" for part in parts))
    for name, need in tables:
        lines.append(f"{name:<14} " + " ".join(f"{value:12.3f}" for value in need.gib().values()))
    return "\n".join(lines)


def _row(
    name: str,
    shape: Shape,
    variant: params.Variant,
    training: params.Training,
    asked: params.Params,
    usable: float,
    length: int,
    mean_length: int,
) -> tuple[str, Memory]:
    one = predict(shape, variant, training, tokens=length)
    most = largest_fit(shape, variant, training, gib=usable)
    rows = max((rows for rows in BATCHES if rows * length <= most), default=0)
    head = f"{name:<14} {'yes' if training.gradient_checkpointing else 'no':<13} "
    if not rows:
        short = one.gib()["total"] - usable
        why = f"{short:.1f} GiB short" if short > 0 else "too tight"
        return f"{head}{'does not fit':>11} {one.gib()['total']:9.2f} ({why} for one row)", one
    need = predict(shape, variant, training, tokens=rows * length)
    baseline = asked.experiment.baseline
    plain = asked.training_of(baseline).model_copy(
        update={"gradient_checkpointing": False, "rank": training.rank}
    )
    passes = ROWS * EPOCHS / rows
    seconds = passes * step_seconds(shape, variant, training, tokens=rows * mean_length)
    # What 16 bits would take for the same rows a pass, wherever it fitted.
    against = passes * step_seconds(shape, asked.variants[baseline], plain, tokens=rows * mean_length)
    return (
        f"{head}{rows:11d} {need.gib()['total']:9.2f} {most:11d} {seconds / against:13.2f} {seconds / 60:18.1f}",
        one,
    )


def read_shape(model: str) -> tuple[str, Shape]:
    """The shape of a name from workflow/shapes/, of `own`, or of a config.json.

    Raises:
        UserError: there is no such name or file, or it is not the configuration of such a model.
    """
    path = {"own": MODEL / "config.json"}.get(model, params.SHAPES / f"{model}.json")
    if not path.is_file():
        path = Path(model)
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in params.SHAPES.glob("*.json")))
        raise UserError(
            f"--model is {model}, which is neither a config.json, nor own (after `dvc repro fetch_model`), "
            f"nor one of {known}."
        )
    config = read_config(path)
    try:
        return model, Shape.of(config)
    except AttributeError as error:
        raise UserError(
            f"--model is {model}, a {config.model_type}, whose memory is not counted here: {error}."
        ) from None


def positive(text: str) -> float:
    """A number above zero, for argparse."""
    number = float(text)
    if not 0 < number < float("inf"):
        raise ValueError(text)
    return number


def whole(text: str) -> int:
    """A whole number above zero, for argparse."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m workflow.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model", required=True, help="a name from workflow/shapes/, own, or a path to a config.json"
    )
    parser.add_argument("--gpu", type=positive, required=True, help="the GPU's memory in GB, as it is sold")
    parser.add_argument(
        "--length", type=whole, help="tokens of the longest row (default training.max_length)"
    )
    parser.add_argument(
        "--mean-length", type=whole, help="tokens of a row on average (default a quarter of --length)"
    )
    parser.add_argument("--rank", type=whole, help="of the adapters (default training.rank)")
    parser.add_argument("--params", type=Path, default=params.PARAMS_FILE, help="whose variants and training")
    options = parser.parse_args()
    go_offline()
    quiet_libraries()
    try:
        with faults.as_user_errors():
            asked = params.load(options.params)
            name, shape = read_shape(options.model)
    except UserError as error:
        sys.exit(f"plan: {error}")
    length = options.length or asked.training.max_length
    print(
        plan(
            name,
            shape,
            asked,
            gpu_gb=options.gpu,
            length=length,
            mean_length=options.mean_length or max(1, length // 4),
            rank=options.rank,
        )
    )


if __name__ == "__main__":
    main()
