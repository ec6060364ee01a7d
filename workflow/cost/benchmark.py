"""Measure the memory and time of a variant's training, on the run's own model and rows."""

import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoConfig

from workflow import params
from workflow.cost import architecture
from workflow.cost import load as machine_load
from workflow.cost.gauge import Gauge, Stopwatch, resident_gib, uncounted
from workflow.cost.load import Load
from workflow.cost.memory import GIB, Shape
from workflow.data.model_files import load_tokenizer
from workflow.data.rows import Instruction
from workflow.models.load import LoadedPrecision, load_base
from workflow.params import Run
from workflow.training.checks import check_possible
from workflow.training.train import build_trainer


@dataclass(frozen=True)
class Measurement:
    """One measured cost with its definition; `low` and `high` are quartiles over the counted steps."""

    metric: str
    value: float
    unit: str
    higher_is_better: bool
    definition: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Measured:
    """What one process measured."""

    precision: LoadedPrecision
    micro_batch_rows: int
    warmup_steps: int
    steps: int
    seed: int
    measurements: list[Measurement]
    peak_pass_tokens: int  # of the largest forward pass of the benchmark, including padding
    epoch_longest_pass_tokens: int  # of the largest forward pass of an epoch, including padding
    # Of each counted step, in the order of the batches, which is the same for every variant.
    seconds_per_step: list[float]
    peak_gib_per_step: list[float]
    load: Load  # of the machine, while the steps were made

    def as_dict(self) -> dict:
        return asdict(self)


def benchmark(
    run: Run,
    *,
    model_folder: Path,
    train_rows: list[Instruction],
    benchmark: params.Benchmark,
    scratch: Path,
) -> Measured:
    """Load the base, attach the adapter and train a few steps, as a run does; measure memory and time of each.

    Every variant sees the same batches. The benchmark needs its own process, because memory is that of the process.

    Args:
        run: the run, whose batch and number of steps `benchmark` replaces.
        scratch: a folder for the trainer, which writes nothing there.
    """
    check_possible(run.training, run.hardware)
    tokenizer = load_tokenizer(model_folder)
    before = resident_gib()
    started = time.perf_counter()
    model, precision = load_base(model_folder, run.variant, hardware=run.hardware)
    gauge = Gauge(precision.device)
    gauge.wait()
    load_seconds = time.perf_counter() - started
    loaded = gauge.now()
    gauge.reset()
    steps = uncounted(benchmark.warmup_steps) + benchmark.steps
    trainer = build_trainer(
        model,
        tokenizer,
        run.alone().with_training(
            initialization="default",  # what a step costs does not depend on how an adapter begins
            steps=steps,
            epochs=None,
            batch_rows=benchmark.micro_batch_rows,
            micro_batch_rows=benchmark.micro_batch_rows,
            log_every_steps=steps,
        ),
        train_rows=train_rows,
        validation_rows=train_rows[:1],
        precision=precision,
        scratch=scratch,
    )
    stopwatch = Stopwatch(
        trainer, warmup_steps=benchmark.warmup_steps, steps=steps, device=precision.device, gauge=gauge
    )
    trainer.add_callback(stopwatch)
    with machine_load.measured() as load:
        trainer.train()
    measurements = [
        *speed(stopwatch),
        *_memory(stopwatch, precision, load_seconds=load_seconds, loaded=loaded, before=before),
        *utilization(
            stopwatch,
            shape=architecture.known_shape(AutoConfig.from_pretrained(model_folder, trust_remote_code=False)),
            run=run,
            compute=getattr(torch, precision.compute),
        ),
    ]
    return Measured(
        precision=precision,
        micro_batch_rows=benchmark.micro_batch_rows,
        warmup_steps=benchmark.warmup_steps,
        steps=benchmark.steps,
        seed=benchmark.seed,
        measurements=measurements,
        peak_pass_tokens=max(stopwatch.pass_tokens),
        epoch_longest_pass_tokens=stopwatch.longest.tokens,
        seconds_per_step=stopwatch.seconds,
        peak_gib_per_step=stopwatch.peaks,
        load=load,
    )


def _memory(
    stopwatch: Stopwatch, precision: LoadedPrecision, *, load_seconds: float, loaded: float, before: float
) -> list[Measurement]:
    """Loading time in seconds, and memory in GiB before loading, after loading, and at the training's peak."""
    peak = f"highest during training, an epoch's longest pass of {stopwatch.longest.tokens:,} tokens included"
    measurements = [
        Measurement("load_time", load_seconds, "s", False, "reading the weights, quantizing included"),
        Measurement("weights", precision.weights_gib, "GiB", False,
                    "the base's weights and quantization constants as they are held"),
        Measurement("memory_after_load", loaded, "GiB", False, _definition(precision, "after the base was loaded")),
        Measurement("peak_memory", stopwatch.peak, "GiB", False, _definition(precision, peak)),
    ]  # fmt: skip
    if precision.device == "cuda":
        reserved = torch.cuda.max_memory_reserved() / GIB
        return [
            *measurements,
            Measurement("peak_reserved", reserved, "GiB", False,
                        "reserved by PyTorch's allocator, highest during training"),
        ]  # fmt: skip
    return [
        *measurements,
        Measurement("memory_before_load", before, "GiB", False,
                    "resident set of the process: Python and the libraries alone"),
    ]  # fmt: skip


def speed(stopwatch: "Stopwatch") -> list[Measurement]:
    """Median and quartiles over the counted steps of step time and tokens per second."""
    useful = [tokens / seconds for tokens, seconds in zip(stopwatch.useful, stopwatch.seconds, strict=True)]
    padded = [tokens / seconds for tokens, seconds in zip(stopwatch.padded, stopwatch.seconds, strict=True)]

    def middle(
        metric: str, values: list[float], unit: str, higher_is_better: bool, definition: str
    ) -> Measurement:
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return Measurement(metric, median, unit, higher_is_better, definition, low, high)

    return [
        middle(
            "training_speed",
            useful,
            "tokens/s",
            True,
            "tokens without padding, per second of an optimizer step",
        ),
        middle(
            "training_speed_padded", padded, "tokens/s", True, "tokens with padding, per second of a step"
        ),
        middle("step_time", stopwatch.seconds, "s", False, "one optimizer step on one micro-batch"),
    ]


def utilization(
    stopwatch: "Stopwatch",
    *,
    shape: Shape | None,
    run: Run,
    compute: torch.dtype,
) -> list[Measurement]:
    """Measure the device's matrix rate, and the share of it that the counted steps reach. This allocates memory.

    Args:
        shape: None for a model whose operations are not counted; the share is then left out.
    """
    rate = matmul_flops(stopwatch.device, compute)
    reached = [
        Measurement("matrix_rate", rate / 1e12, "TFLOP/s", True,
                    "of a large matrix product in the compute type, in the same process"),
    ]  # fmt: skip
    if shape is None:
        return reached
    operations = sum(
        model_operations(shape, run, lengths=lengths) for lengths in stopwatch.lengths[stopwatch.uncounted :]
    )
    share = operations / sum(stopwatch.seconds) / rate
    return [
        *reached,
        Measurement("model_flop_utilisation", share, "of the matrix rate", True,
                    "operations that the model's arithmetic asks for, over the counted steps"),
    ]  # fmt: skip


def _definition(precision: LoadedPrecision, when: str) -> str:
    quantity = (
        "allocated by PyTorch on the GPU"
        if precision.device == "cuda"
        else "resident set of the whole process"
    )
    return f"{quantity}, {when}"


def matmul_flops(device: str, dtype: torch.dtype) -> float:
    """Measure the device's rate in operations per second: the best of several large products of random matrices."""
    size, times = (8192, 20) if device == "cuda" else (2048, 5)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(times):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


def model_operations(shape: Shape, run: Run, *, lengths: list[int]) -> float:
    """Count the floating-point operations that a step requires (Kaplan et al. 2020: 2 per weight and token).

    The count includes the forward pass and the gradient of each product's input, but the gradient of a weight only
    if it is trained. Causal attention counts its lower triangle, once forward and twice backward. Recomputation is
    not counted.

    Args:
        lengths: tokens of each row.
    """
    tokens = sum(lengths)
    base = shape.linear_parameters + shape.vocabulary * shape.hidden
    adapters = 3 * run.method.adapter_parameters(shape, run.training)
    attention = 3 * shape.layers * shape.query * sum(2 * length**2 for length in lengths)
    return 2 * tokens * (run.method.passes * base + adapters) + attention
