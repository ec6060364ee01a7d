"""Measure a training's use of its device, step by step: memory, seconds, tokens and joules."""

import threading
import time
from contextlib import suppress
from dataclasses import dataclass

import psutil
import pynvml
import torch
from transformers import TrainerCallback

from workflow.cost.memory import GIB
from workflow.runtime.stage import progress, say
from workflow.training.speed.packing import Pack
from workflow.training.trainer import Batch, input_ids


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
    # The unused rest of a pack appears as a row at its end.
    while sum(lengths) > int(batch.tokens):
        lengths.pop()
    return lengths


class Gauge:
    """Reads a device's memory in GiB: PyTorch's allocator on a GPU, this process' resident set size on a CPU.

    A replay of a CUDA graph allocates nothing, so on a GPU the peak is the highest since `reset`, not that of
    a step. It includes the captures.
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
    """Number of steps before the counted ones, including the first, which creates the optimizer state, and the longest."""
    return max(1, warmup_steps) + 1


@dataclass(frozen=True)
class LongestStep:
    """The optimizer step of a trainer's first epoch that holds the largest forward pass."""

    rows: list[list[int]]  # of each of its passes
    epoch: list[list[int]]  # of each pass of the epoch
    tokens: int  # of the largest, including padding

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
        epoch = [rows for step in steps for rows in passes(step)]
        return cls(passes(longest), epoch, max(map(tokens, epoch)))


class Stopwatch(TrainerCallback):
    """Times each counted optimizer step and counts its tokens.

    The last uncounted step is the epoch's longest, moved ahead of the counted steps. A peak over an epoch's first steps
    alone would be too low for the rest, by an amount that depends on the order of the rows.
    """

    def __init__(self, trainer, *, warmup_steps: int, steps: int, device: str, gauge: Gauge):
        """`steps` is their total number, including `uncounted(warmup_steps)`."""
        self.uncounted, self.steps, self.device, self.gauge = uncounted(warmup_steps), steps, device, gauge
        self.trainer, self.longest = trainer, LongestStep.of(trainer)
        trainer.expect_passes(self.longest.epoch)
        self.peak = 0.0  # GiB, of the epoch's longest step and the counted ones
        self.pass_tokens: list[
            int
        ] = []  # of each step's largest forward pass, counted like those of `longest`
        self.seconds: list[float] = []
        self.peaks: list[float] = []
        self.useful: list[int] = []
        self.padded: list[int] = []
        self.after_first_step = 0.0
        self.energy = Energy(device)
        self.joules: float | None = None  # of the counted steps
        # Not in the collator, which runs in other processes if hardware.data_workers is above 0.
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
    """Read from NVML the joules that a GPU has used since its driver was loaded; None if NVML has no such reading."""

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
