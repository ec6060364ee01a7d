"""Measure what a variant's training costs: memory and time, on the run's own model and rows."""

import statistics
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch
from transformers import AutoTokenizer, TrainerCallback

from workflow import params
from workflow.console import progress, say
from workflow.instructions import Instruction
from workflow.precision import Precision, load_base
from workflow.training import build_trainer, check_possible

GIB = 2**30


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
    # Of each counted step, in the order of the batches, which every variant has in common.
    seconds_per_step: list[float]
    peak_gib_per_step: list[float]

    def as_dict(self) -> dict:
        return asdict(self)


def benchmark(
    *,
    model_folder: Path,
    train_rows: list[Instruction],
    variant: params.Variant,
    training: params.Training,
    benchmark: params.Benchmark,
    hardware: params.Hardware,
    scratch: Path,
) -> Measured:
    """Load, attach the adapter and train some steps, as a run does; measure memory and time of each.

    Every variant sees the same batches. It must run in a process of its own: memory is the process'.

    Args:
        scratch: a folder for the trainer, which writes nothing there.
    """
    check_possible(training, hardware)
    tokenizer = AutoTokenizer.from_pretrained(model_folder, trust_remote_code=False)
    before = resident_gib()
    started = time.perf_counter()
    model, precision = load_base(model_folder, variant, hardware=hardware)
    load_seconds = time.perf_counter() - started
    loaded = allocated_gib(precision)
    steps = benchmark.warmup_steps + benchmark.steps
    trainer = build_trainer(
        model,
        tokenizer,
        train_rows=train_rows,
        validation_rows=train_rows[:1],
        variant=variant,
        training=training.model_copy(
            update={
                "steps": steps,
                "epochs": None,
                "batch_rows": benchmark.micro_batch_rows,
                "micro_batch_rows": benchmark.micro_batch_rows,
                "log_every_steps": steps,
            }
        ),
        precision=precision,
        seed=benchmark.seed,
        data_workers=hardware.data_workers,
        scratch=scratch,
    )
    stopwatch = Stopwatch(trainer, warmup_steps=benchmark.warmup_steps, steps=steps, device=precision.device)
    trainer.add_callback(stopwatch)
    trainer.train()
    measured = [
        *speed(stopwatch),
        Measurement("load_time", load_seconds, "s", False, "reading the weights, quantising included"),
        Measurement("weights", precision.weights_gib, "GiB", False,
                    "the base's weights and quantisation constants as they are held"),
        Measurement("memory_after_load", loaded, "GiB", False, _definition(precision, "after the base was loaded")),
        Measurement("peak_memory", max(stopwatch.peaks), "GiB", False,
                    _definition(precision, "highest during the counted training steps")),
    ]  # fmt: skip
    if precision.device == "cuda":
        measured.append(
            Measurement("peak_reserved", torch.cuda.max_memory_reserved() / GIB, "GiB", False,
                        "reserved by PyTorch's allocator, highest during the counted training steps")
        )  # fmt: skip
    else:
        measured.append(
            Measurement("memory_before_load", before, "GiB", False,
                        "resident set of the process: Python and the libraries alone")
        )  # fmt: skip
    return Measured(
        precision=precision,
        micro_batch_rows=benchmark.micro_batch_rows,
        warmup_steps=benchmark.warmup_steps,
        steps=benchmark.steps,
        seed=benchmark.seed,
        measurements=measured,
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


def _definition(precision: Precision, when: str) -> str:
    what = (
        "allocated by PyTorch on the GPU"
        if precision.device == "cuda"
        else "resident set of the whole process"
    )
    return f"{what}, {when}"


def resident_gib() -> float:
    return psutil.Process().memory_info().rss / GIB


def allocated_gib(precision: Precision) -> float:
    return torch.cuda.memory_allocated() / GIB if precision.device == "cuda" else resident_gib()


class Memory:
    """The highest memory between `start` and `stop`: the allocator's on a GPU, sampled on a CPU."""

    SECONDS_BETWEEN_SAMPLES = 0.005

    def __init__(self, device: str):
        self.device = device

    def start(self) -> None:
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            return
        self.peak_gib = resident_gib()
        self.stopped = threading.Event()
        self.sampler = threading.Thread(target=self._sample, daemon=True)
        self.sampler.start()

    def stop(self) -> float:
        """The peak in GiB."""
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() / GIB
        self.stopped.set()
        self.sampler.join()
        return max(self.peak_gib, resident_gib())

    def _sample(self) -> None:
        while not self.stopped.wait(self.SECONDS_BETWEEN_SAMPLES):
            self.peak_gib = max(self.peak_gib, resident_gib())


class Stopwatch(TrainerCallback):
    """Times each counted optimizer step and counts its tokens."""

    def __init__(self, trainer, *, warmup_steps: int, steps: int, device: str):
        self.warmup_steps, self.steps, self.device = warmup_steps, steps, device
        self.memory = Memory(device)
        self.seconds: list[float] = []
        self.peaks: list[float] = []
        self.useful: list[int] = []
        self.padded: list[int] = []
        # Not the collator: it works in other processes where hardware.data_workers asks for them.
        trainer.get_batch_samples = self._counting(trainer.get_batch_samples)
        self.batches: list[tuple[int, int]] = []

    def _counting(self, get_batches):
        def counted(*arguments):
            batches, tokens_in_loss = get_batches(*arguments)
            for batch in batches:
                self.batches.append((int(batch["attention_mask"].sum()), batch["input_ids"].numel()))
            return batches, tokens_in_loss

        return counted

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step >= self.warmup_steps:
            self.memory.start()
        self._wait()
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self._wait()
        seconds = time.perf_counter() - self.started
        useful, padded = self.batches[state.global_step - 1]
        if state.global_step > self.warmup_steps:
            self.seconds.append(seconds)
            self.peaks.append(self.memory.stop())
            self.useful.append(useful)
            self.padded.append(padded)
            counted = state.global_step - self.warmup_steps
            progress(
                counted, self.steps - self.warmup_steps, sum(self.seconds), f"{useful / seconds:.0f} tokens/s"
            )
        else:
            say(f"  warm-up step {state.global_step}")

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
