"""Measure what a variant's training costs: memory and time, on the run's own model and rows."""

import statistics
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import pynvml
import torch
from transformers import AutoConfig, TrainerCallback

from workflow import params
from workflow.cost import architecture
from workflow.cost.memory import GIB, Shape
from workflow.data.model_files import load_tokenizer
from workflow.data.rows import Instruction
from workflow.params import Run
from workflow.precisions.load import Precision, load_base
from workflow.runtime.stage import progress, say
from workflow.training.checks import check_possible
from workflow.training.speed.packing import Pack
from workflow.training.train import build_trainer
from workflow.training.trainer import Batch, input_ids


@dataclass(frozen=True)
class Measurement:
    """One measured cost, with what it is; `low` and `high` are quartiles over the counted steps."""

    metric: str
    value: float
    unit: str
    higher_is_better: bool
    definition: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Measured:
    precision: Precision
    micro_batch_rows: int
    warmup_steps: int
    steps: int
    seed: int
    measurements: list[Measurement]
    peak_pass_tokens: int  # of the largest forward pass that was run; with padding, where rows are padded
    epoch_longest_pass_tokens: int  # of the largest forward pass of an epoch, counted alike
    # Of each counted step, in the order of the batches, which every variant has in common.
    seconds_per_step: list[float]
    peak_gib_per_step: list[float]

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
    """Load, attach the adapter and train some steps, as a run does; measure memory and time of each.

    Every variant sees the same batches. It must run in a process of its own: memory is the process'.

    Args:
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
    trainer.train()
    where = (
        f"highest during training, an epoch's longest pass of {stopwatch.longest.tokens:,} tokens included"
    )
    measured = [
        *speed(stopwatch),
        Measurement("load_time", load_seconds, "s", False, "reading the weights, quantizing included"),
        Measurement("weights", precision.weights_gib, "GiB", False,
                    "the base's weights and quantization constants as they are held"),
        Measurement("memory_after_load", loaded, "GiB", False, _definition(precision, "after the base was loaded")),
        Measurement("peak_memory", stopwatch.peak, "GiB", False, _definition(precision, where)),
    ]  # fmt: skip
    if precision.device == "cuda":
        measured.append(
            Measurement("peak_reserved", torch.cuda.max_memory_reserved() / GIB, "GiB", False,
                        "reserved by PyTorch's allocator, highest during training")
        )  # fmt: skip
    else:
        measured.append(
            Measurement("memory_before_load", before, "GiB", False,
                        "resident set of the process: Python and the libraries alone")
        )  # fmt: skip
    measured += utilisation(
        stopwatch,
        shape=architecture.known_shape(AutoConfig.from_pretrained(model_folder, trust_remote_code=False)),
        run=run,
        compute=getattr(torch, precision.compute),
    )
    return Measured(
        precision=precision,
        micro_batch_rows=benchmark.micro_batch_rows,
        warmup_steps=benchmark.warmup_steps,
        steps=benchmark.steps,
        seed=benchmark.seed,
        measurements=measured,
        peak_pass_tokens=max(stopwatch.pass_tokens),
        epoch_longest_pass_tokens=stopwatch.longest.tokens,
        seconds_per_step=stopwatch.seconds,
        peak_gib_per_step=stopwatch.peaks,
    )


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


def utilisation(
    stopwatch: "Stopwatch",
    *,
    shape: Shape | None,
    run: Run,
    compute: torch.dtype,
) -> list[Measurement]:
    """The device's matrix rate, and the share of it that the counted steps reach; it takes memory of its own.

    Args:
        shape: None for a model whose operations are not counted, which then has no share.
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


def _definition(precision: Precision, when: str) -> str:
    what = (
        "allocated by PyTorch on the GPU"
        if precision.device == "cuda"
        else "resident set of the whole process"
    )
    return f"{what}, {when}"


def resident_gib() -> float:
    return psutil.Process().memory_info().rss / GIB


def useful_tokens(batch: Batch) -> int:
    """Tokens of a batch, without padding."""
    return int(batch.tokens if isinstance(batch, Pack) else batch["attention_mask"].sum())


def row_lengths(batch: Batch) -> list[int]:
    """Tokens of each row of a batch, without padding."""
    if not isinstance(batch, Pack):
        return batch["attention_mask"].sum(1).tolist()
    lengths = batch.boundaries.diff().tolist()
    # What a pack's rows leave free stands as a row of its own behind them.
    while sum(lengths) > int(batch.tokens):
        lengths.pop()
    return lengths


class Gauge:
    """Reads a device's memory in GiB: PyTorch's allocator on a GPU, this process' resident set on a CPU.

    A replay of a CUDA graph allocates nothing, so on a GPU the peak is the highest since `reset` and not
    that of a step: the captures are in it.
    """

    SECONDS_BETWEEN_SAMPLES = 0.005

    def __init__(self, device: str):
        self.device = device
        self.peaks: list[float] = []

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def now(self) -> float:
        return torch.cuda.memory_allocated() / GIB if self.device == "cuda" else resident_gib()

    def reset(self) -> None:
        self.peaks = []
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> float:
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() / GIB
        return max([self.now(), *self.peaks])

    def start_step(self) -> None:
        if self.device == "cpu":
            self.step_peak = resident_gib()
            self.stopped = threading.Event()
            self.sampler = threading.Thread(target=self._sample, daemon=True)
            self.sampler.start()

    def stop_step(self) -> float:
        """The peak of the step since `start_step` (on a GPU since `reset`)."""
        if self.device == "cpu":
            self.stopped.set()
            self.sampler.join()
            self.peaks.append(max(self.step_peak, resident_gib()))
            return self.peaks[-1]
        return self.peak()

    def _sample(self) -> None:
        while not self.stopped.wait(self.SECONDS_BETWEEN_SAMPLES):
            self.step_peak = max(self.step_peak, resident_gib())


def uncounted(warmup_steps: int) -> int:
    """Steps before the counted ones: the first, which makes the optimizer's state, and the epoch's longest are among them."""
    return max(1, warmup_steps) + 1


@dataclass(frozen=True)
class LongestStep:
    """The optimizer step of a trainer's first epoch that holds the largest forward pass."""

    rows: list[list[int]]  # of each of its passes
    tokens: int  # of the largest; with padding, where rows are padded

    @classmethod
    def of(cls, trainer) -> "LongestStep":
        sampler, pass_rows = trainer.sampler(), trainer.args.per_device_train_batch_size
        sampler.set_epoch(0)
        order = list(sampler)
        steps = [order[i : i + sampler.batch_rows] for i in range(0, len(order), sampler.batch_rows)]

        def tokens(rows: list[int]) -> int:
            lengths = [sampler.lengths[row] for row in rows]
            return sum(lengths) if trainer.speed_ups.packing else len(lengths) * max(lengths)

        def passes(step: list[int]) -> list[list[int]]:
            return [step[i : i + pass_rows] for i in range(0, len(step), pass_rows)]

        longest = max(steps, key=lambda step: max(map(tokens, passes(step))))
        return cls(passes(longest), max(map(tokens, passes(longest))))


class Stopwatch(TrainerCallback):
    """Times each counted optimizer step and counts its tokens.

    The last step that is not counted is the epoch's longest, put before those that the epoch begins with: a peak over
    its first steps alone would be too low for the rest of it, and by how much would depend on the order of the rows.
    """

    def __init__(self, trainer, *, warmup_steps: int, steps: int, device: str, gauge: Gauge):
        """steps: all of them, `uncounted(warmup_steps)` among them."""
        self.uncounted, self.steps, self.device, self.gauge = uncounted(warmup_steps), steps, device, gauge
        self.trainer, self.longest = trainer, LongestStep.of(trainer)
        trainer.expect_pass(self.longest.tokens)
        self.peak = 0.0  # GiB, of the epoch's longest step and the counted ones
        self.pass_tokens: list[int] = []  # of each step's largest forward pass, as those of `longest`
        self.seconds: list[float] = []
        self.peaks: list[float] = []
        self.useful: list[int] = []
        self.padded: list[int] = []
        self.after_first_step = 0.0
        self.energy = Energy(device)
        self.joules: float | None = None  # of the counted steps
        # Not the collator: it works in other processes where hardware.data_workers asks for them.
        trainer.get_batch_samples = self._counting(trainer.get_batch_samples)
        self.batches: list[tuple[int, int]] = []
        self.widest_pass: list[int] = []  # tokens, padding included, of each step's largest forward pass
        self.lengths: list[list[int]] = []  # tokens of each step's rows

    def _counting(self, get_batches):
        def counted(iterator, *arguments):
            if len(self.batches) == self.uncounted - 1:
                iterator = iter([self.trainer.collated(rows) for rows in self.longest.rows])
                arguments = (len(self.longest.rows), *arguments[1:])
            batches, tokens_in_loss = get_batches(iterator, *arguments)
            self.batches.append(
                (
                    sum(useful_tokens(batch) for batch in batches),
                    sum(input_ids(batch).numel() for batch in batches),
                )
            )
            packed = self.trainer.speed_ups.packing
            self.pass_tokens.append(
                max(useful_tokens(batch) if packed else input_ids(batch).numel() for batch in batches)
            )
            self.widest_pass.append(max(input_ids(batch).numel() for batch in batches))
            self.lengths.append([length for batch in batches for length in row_lengths(batch)])
            return batches, tokens_in_loss

        return counted

    def on_step_begin(self, args, state, control, **kwargs):
        self.gauge.wait()
        if state.global_step == self.uncounted:
            self.joules_before = self.energy.joules()
        if state.global_step >= self.uncounted - 1:
            self.gauge.start_step()
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.gauge.wait()
        seconds = time.perf_counter() - self.started
        if state.global_step == 1:
            self.after_first_step = self.gauge.now()
        useful, padded = self.batches[state.global_step - 1]
        if state.global_step >= self.uncounted:
            peak = self.gauge.stop_step()
            self.peak = max(self.peak, peak)
        if state.global_step > self.uncounted:
            self.seconds.append(seconds)
            self.peaks.append(peak)
            self.useful.append(useful)
            self.padded.append(padded)
            counted = state.global_step - self.uncounted
            progress(
                counted, self.steps - self.uncounted, sum(self.seconds), f"{useful / seconds:.0f} tokens/s"
            )
            if state.global_step == self.steps and self.joules_before is not None:
                self.joules = self.energy.joules() - self.joules_before
        else:
            longest = f", an epoch's longest: {self.longest.tokens:,} tokens a pass"
            say(f"  warm-up step {state.global_step}{longest if state.global_step == self.uncounted else ''}")


class Energy:
    """The joules that a GPU has used since its driver was loaded, by NVML; None where it cannot tell."""

    def __init__(self, device: str):
        self.handle = None
        if device == "cuda":
            with suppress(pynvml.NVMLError):
                pynvml.nvmlInit()
                self.handle = pynvml.nvmlDeviceGetHandleByUUID(
                    f"GPU-{torch.cuda.get_device_properties(0).uuid}"
                )

    def joules(self) -> float | None:
        if self.handle is None:
            return None
        try:
            return pynvml.nvmlDeviceGetTotalEnergyConsumption(self.handle) / 1000
        except pynvml.NVMLError:
            return None


def matmul_flops(device: str, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product of random numbers, the best of some: the device's rate."""
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
    """Floating-point operations that a step's arithmetic asks for (Kaplan et al. 2020: 2 per weight and token).

    Forward, and the gradient of each product's input; the gradient of a weight only where it is trained.
    Causal attention counts its lower triangle, forward once and backward twice (recomputation is not asked for).

    Args:
        lengths: tokens of each row.
    """
    tokens = sum(lengths)
    base = shape.linear_parameters + shape.vocabulary * shape.hidden
    adapters = 3 * run.method.adapter_parameters(shape, run.training)
    attention = 3 * shape.layers * shape.query * sum(2 * length**2 for length in lengths)
    return 2 * tokens * (run.method.passes * base + adapters) + attention
