"""Measure the cost of training over a grid of micro-batch size, length and checkpointing, in one process per point.

Rows consist of random tokens, all of one length and all in the loss, unless a file of rows is set. A point that does
not fit, crashes or takes too long is recorded with that outcome, and the grid continues.
"""

from __future__ import annotations

import re
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from workflow import params
from workflow.cost import cards, processes
from workflow.runtime.files import read_jsonl

if TYPE_CHECKING:  # a worker imports them when it has a job
    from transformers import PreTrainedConfig, PreTrainedModel

    from workflow.cost.gauge import Gauge, Stopwatch
    from workflow.cost.plain_loop import PlainLoop
    from workflow.models.load import LoadedPrecision
    from workflow.training.speed.choice import SpeedUps
    from workflow.training.trainer import RunTrainer

GIB = 2**30
POINT = (
    "variant",
    "shape",
    "vocabulary",
    "loop",
    "batch_rows",
    "micro_batch_rows",
    "length",
    "gradient_checkpointing",
    "warmup_steps",
    "steps",
    "repeats",
    "seed",
)


@dataclass(frozen=True)
class Job:
    """The settings that a process needs to measure one point."""

    variant: str
    shape: str  # own, or a file of workflow/cost/shapes/
    model_folder: str | None  # of the own model
    vocabulary: int | None  # tokens, in place of the shape's own
    loop: str  # ours, or plain: transformers and PEFT without a trainer
    rows_file: str | None  # JSON lines with input_ids and labels; None for random rows of `length`
    batch_rows: int
    micro_batch_rows: int
    length: int  # tokens of each row, at most
    gradient_checkpointing: bool
    variant_params: dict
    training: dict
    hardware: dict
    warmup_steps: int
    steps: int
    repeats: int
    memory_limit_gib: float | None
    seed: int

    def as_dict(self) -> dict:
        return asdict(self)


def jobs(settings: params.Params, variant: str, shape: str, *, model_folder: Path | None) -> Iterator[Job]:
    """List the points of a variant's grid at one shape."""
    grid = settings.benchmark.grid
    for rows, length, checkpointing in product(
        grid.micro_batch_rows, grid.lengths, grid.gradient_checkpointing
    ):
        yield Job(
            variant=variant,
            shape=shape,
            model_folder=None if model_folder is None else str(model_folder),
            vocabulary=grid.vocabulary,
            loop="ours",
            rows_file=None,
            batch_rows=rows,
            micro_batch_rows=rows,
            length=length,
            gradient_checkpointing=checkpointing,
            variant_params=settings.variants[variant].model_dump(),
            training=settings.training_of(variant).model_dump(),
            hardware=settings.hardware.model_dump(),
            warmup_steps=grid.warmup_steps,
            steps=grid.steps,
            repeats=grid.repeats,
            memory_limit_gib=grid.memory_limit_gib,
            seed=settings.benchmark.seed,
        )


def run(waiting: list[Job], *, time_limit: float, ahead: int = 0) -> Iterator[dict]:
    """Measure points one after the other, each in its own process.

    Args:
        waiting: the points to measure, in order.
        time_limit, ahead: as for `processes.answers`.

    Yields:
        The job's settings, its number of rows (null if they are random), and the result of `measure`; `outcome` says
        whether the point was measured, or why not.
    """
    results = processes.answers(
        "workflow.cost.grid", [job.as_dict() for job in waiting], time_limit=time_limit, ahead=ahead
    )
    for job, result in zip(waiting, results, strict=True):
        point = {key: value for key, value in job.as_dict().items() if key in POINT}
        point["rank"] = job.training["rank"]
        point["rows"] = None if job.rows_file is None else len(read_jsonl(Path(job.rows_file)))
        yield point | result


def measure(job: Job) -> dict:
    """Measure one point in this process.

    Returns:
        `outcome`, and for a measured point: precision; speed-ups; memory in GiB at each stage (on a CPU the
        process' resident set size); seconds per step and tokens per second (useful and padded), each as the median
        with quartiles over all counted steps, and the medians of the repeats; seconds to load (and quantize) and to
        capture graphs; whether these dequantize weights ahead; the predicted memory (null if a speed-up that the
        prediction assumes is off); the matrix rate of this device, and the share of it that the model's operations reach
        (null, like the prediction, for a model without a Llama's layers); joules per 1,000 useful tokens (null without
        NVML); and the tokens of the largest forward pass of the measurement and of an epoch. The peak is that of an
        epoch's largest pass.
    """
    import torch

    if job.memory_limit_gib is not None:
        limit_memory(job.memory_limit_gib)
    try:
        return _measure(job)
    except torch.OutOfMemoryError as error:
        return _no_room(str(error))
    except (RuntimeError, MemoryError) as error:
        # PyTorch's allocator on a CPU raises a RuntimeError that names the bytes.
        if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
            return _no_room(str(error))
        raise


def limit_memory(gib: float) -> None:
    """Limit the memory of the device (on a CPU, of this process)."""
    import torch

    if torch.cuda.is_available():
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * GIB / whole))
        return
    import resource

    resource.setrlimit(resource.RLIMIT_DATA, (int(gib * GIB), int(gib * GIB)))


def _no_room(message: str) -> dict:
    """`requested_gib`: the size of the allocation that failed."""
    on_gpu = re.search(r"Tried to allocate ([\d.]+) ([KMG]iB)", message)
    on_cpu = re.search(r"tried to allocate (\d+) bytes", message)
    requested = None
    if on_gpu:
        requested = float(on_gpu[1]) / {"KiB": 2**20, "MiB": 2**10, "GiB": 1}[on_gpu[2]]
    elif on_cpu:
        requested = int(on_cpu[1]) / GIB
    return processes.missing("does not fit", (message.splitlines() or ["memory ran out"])[0][:300]) | {
        "requested_gib": requested
    }


def _measure(job: Job) -> dict:
    from workflow.cost import gauge as gauges
    from workflow.models import load
    from workflow.training.checks import check_possible

    run = _run(job)
    check_possible(run.training, run.hardware)
    gauge = gauges.Gauge(load.choose_device(run.hardware).type)
    started = time.perf_counter()
    config, model, precision = _base(job, run)
    gauge.wait()
    load_seconds = time.perf_counter() - started
    memory_gib = {"after_load": gauge.now()}
    gauge.reset()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = _trainer(job, run, model, config, precision, scratch=Path(scratch))
        memory_gib["after_adapters"] = gauge.now()
        stopwatch = gauges.Stopwatch(
            trainer,
            warmup_steps=job.warmup_steps,
            steps=run.training.steps,
            device=precision.device,
            gauge=gauge,
        )
        trainer.add_callback(stopwatch)
        trainer.train()
    memory_gib |= {"after_optimizer": stopwatch.after_first_step, "at_end": gauge.now()}
    memory_gib |= _peaks(gauge, precision.device)
    longest = trainer.sizes[-1].tokens if trainer.speed_ups.cuda_graphs else max(stopwatch.widest_pass)
    return {
        "outcome": "measured",
        "precision": precision.as_dict(),
        "speed_ups": asdict(trainer.speed_ups),
        "memory_gib": memory_gib,
        "predicted_gib": _predicted(config, run, trainer.speed_ups, tokens=longest),
        **_speeds(job, stopwatch),
        "load_seconds": load_seconds,
        "capture_seconds": trainer.capture_seconds,
        "weights_ahead": trainer.graphs is not None and bool(trainer.graphs.dequantized),
        **_utilization(config, run, stopwatch, compute=precision.compute),
        "joules_per_1000_tokens": None
        if stopwatch.joules is None
        else 1000 * stopwatch.joules / sum(stopwatch.useful),
        "optimizer_steps": trainer.state.global_step,
        "tokens_per_step": statistics.mean(stopwatch.useful),
        "longest_pass_tokens": longest,
        "peak_pass_tokens": max(stopwatch.pass_tokens),
        "epoch_longest_pass_tokens": stopwatch.longest.tokens,
    }


def _run(job: Job) -> params.Run:
    """Build the run whose steps are measured, for a single process."""
    from workflow.cost.gauge import uncounted

    steps = uncounted(job.warmup_steps) + job.steps * job.repeats
    training = params.Training.model_validate(
        job.training
        | {
            "steps": steps,
            "epochs": None,
            "batch_rows": job.batch_rows,
            "micro_batch_rows": job.micro_batch_rows,
            "max_length": job.length,
            "gradient_checkpointing": job.gradient_checkpointing,
            "log_every_steps": steps,
            "learn_end_token": True,
            "second_bos": False,
        }
    )
    variant = params.Variant.model_validate(job.variant_params)
    hardware = params.Hardware.model_validate(job.hardware | {"data_workers": 0})
    run = params.Run(job.variant, variant, job.seed, training, hardware).alone()
    # What a step costs does not depend on how an adapter begins, and random weights have no file to begin it with.
    return run.with_training(initialization="default")


def _base(job: Job, run: params.Run) -> tuple[PreTrainedConfig, PreTrainedModel, LoadedPrecision]:
    """Load the model in the variant's precision; return its configuration, the model and its checked precision."""
    from transformers import AutoConfig

    from workflow.models import load

    if job.model_folder is None:
        config = load.shape(job.shape)
        config.vocab_size = job.vocabulary or config.vocab_size
        return config, *load.random_base(config, run.variant, hardware=run.hardware, seed=job.seed)
    config = AutoConfig.from_pretrained(job.model_folder, trust_remote_code=False)
    return config, *load.load_base(Path(job.model_folder), run.variant, hardware=run.hardware)


def _trainer(
    job: Job,
    run: params.Run,
    model: PreTrainedModel,
    config: PreTrainedConfig,
    precision: LoadedPrecision,
    *,
    scratch: Path,
) -> RunTrainer | PlainLoop:
    """Build the trainer of the job's loop, with the job's rows or random ones."""
    import numpy as np

    from workflow.cost.plain_loop import PlainLoop
    from workflow.fetch.convert import byte_tokenizer
    from workflow.training.train import build_trainer

    if job.rows_file is not None:
        rows = read_jsonl(Path(job.rows_file))
    else:
        random = np.random.default_rng(job.seed)
        tokens = random.integers(3, config.vocab_size, (job.batch_rows * 4, job.length)).tolist()
        rows = [{"input_ids": ids, "labels": ids} for ids in tokens]
    return (PlainLoop if job.loop == "plain" else build_trainer)(
        model,
        byte_tokenizer(vocabulary=config.vocab_size, max_positions=job.length),
        run,
        train_rows=rows,
        validation_rows=rows[:1],
        precision=precision,
        scratch=scratch,
    )


def _peaks(gauge: Gauge, device: str) -> dict[str, float]:
    import torch

    if device == "cuda":
        return {"peak_allocated": gauge.peak(), "peak_reserved": torch.cuda.max_memory_reserved() / GIB}
    return {"peak_resident": gauge.peak()}


def _predicted(
    config: PreTrainedConfig, run: params.Run, speed_ups: SpeedUps, *, tokens: int
) -> dict[str, float] | None:
    from workflow.cost import architecture, memory

    shape = architecture.known_shape(config)
    if shape is None or not memory.describes(speed_ups):
        return None
    training = run.training.model_copy(update={"shared_inputs": speed_ups.shared_inputs})
    return memory.predict(shape, run.variant, training, tokens=tokens, graphs=speed_ups.cuda_graphs).gib()


def _speeds(job: Job, stopwatch: Stopwatch) -> dict:
    seconds = stopwatch.seconds
    useful = [tokens / time for tokens, time in zip(stopwatch.useful, seconds, strict=True)]
    padded = [tokens / time for tokens, time in zip(stopwatch.padded, seconds, strict=True)]
    return {
        "step_seconds": _quartiles(seconds),
        "useful_tokens_per_second_overall": sum(stopwatch.useful) / sum(seconds),
        "useful_tokens_per_second": _quartiles(useful),
        "padded_tokens_per_second": _quartiles(padded),
        "step_seconds_of_repeats": [
            statistics.median(seconds[i * job.steps : (i + 1) * job.steps]) for i in range(job.repeats)
        ],
    }


def _utilization(
    config: PreTrainedConfig, run: params.Run, stopwatch: Stopwatch, *, compute: str
) -> dict[str, float | None]:
    """Measure the device's matrix rate, and the share of it that the steps reach; None if operations are not counted."""
    import torch

    from workflow.cost import architecture, benchmark

    shape, share = architecture.known_shape(config), None
    rate = benchmark.matmul_flops(stopwatch.device, getattr(torch, compute))
    if shape is not None:
        operations = statistics.mean(
            benchmark.model_operations(shape, run, lengths=lengths)
            for lengths in stopwatch.lengths[stopwatch.uncounted :]
        )
        share = operations / statistics.mean(stopwatch.seconds) / rate
    return {"matmul_tflops": rate / 1e12, "model_flop_utilisation": share}


def _quartiles(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def describe(point: dict) -> str:
    """Summarize a point in one line."""
    where = (
        f"{point['variant']} at {point['shape']}, {point['micro_batch_rows']} x {point['length']} tokens, "
        f"{point['loop']}"
        f"{', checkpointing' if point['gradient_checkpointing'] else ''}"
    )
    if point["outcome"] != "measured":
        return f"{where}: {point['outcome']} ({point['detail']})"
    memory_gib = point["memory_gib"]
    peak = memory_gib.get("peak_allocated", memory_gib.get("peak_resident"))
    predicted = ""
    if "peak_allocated" in memory_gib and point["predicted_gib"] is not None:
        predicted = f" (predicted {point['predicted_gib']['total']:.2f})"
    share, nominal = point["model_flop_utilisation"], cards.nominal_share(point)
    return (
        f"{where}: peak {peak:.2f} GiB{predicted}, {point['useful_tokens_per_second_overall']:.0f} tokens/s"
        + ("" if share is None else f", {share:.0%} of the matrix rate")
        + ("" if nominal is None else f" ({nominal:.0%} of the data sheet’s)")
    )


if __name__ == "__main__":
    from workflow.runtime.stage import go_offline, quiet_libraries

    go_offline()
    quiet_libraries()

    processes.answer(lambda job: measure(Job(**job)))
