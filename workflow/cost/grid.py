"""Measure what training costs over a grid of micro-batch, length and checkpointing, a process for each point.

Rows are of one length and random tokens, and every token is learned; or they are given. A point that does
not fit, dies or takes too long is a result like any other, and the grid goes on.
"""

import json
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

from workflow import params
from workflow.runtime.files import read_jsonl

GIB = 2**30
ANSWER = "POINT "  # the line of a process' output that holds its result
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
    """All that a process needs to measure one point."""

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


def jobs(asked: params.Params, variant: str, shape: str, *, model_folder: Path | None) -> Iterator[Job]:
    """The points of a variant's grid at one shape."""
    grid = asked.benchmark.grid
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
            variant_params=asked.variants[variant].model_dump(),
            training=asked.training_of(variant).model_dump(),
            hardware=asked.hardware.model_dump(),
            warmup_steps=grid.warmup_steps,
            steps=grid.steps,
            repeats=grid.repeats,
            memory_limit_gib=grid.memory_limit_gib,
            seed=asked.benchmark.seed,
        )


class Worker:
    """A process that has imported the libraries and waits for a job; it touches no GPU before it has one."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "workflow.cost.grid"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, job: Job, *, time_limit: float) -> dict:
        """Measure a point; `outcome` says whether it was measured, and if not why not.

        Args:
            time_limit: seconds from now, after which the process is killed.

        Returns:
            What the job asked for, how many rows it was given (null where they are random), and what
            `measure` returns.
        """
        what = {key: value for key, value in job.as_dict().items() if key in POINT}
        what["rank"] = job.training["rank"]
        what["rows"] = None if job.rows_file is None else len(read_jsonl(Path(job.rows_file)))
        started = time.monotonic()
        try:
            out, err = self.process.communicate(json.dumps(job.as_dict()), timeout=time_limit)
        except subprocess.TimeoutExpired:
            self.stop()
            return what | _missing("timed out", f"it was ended after {time_limit:g} s")
        answers = [line for line in out.splitlines() if line.startswith(ANSWER)]
        if not answers:
            return what | _missing("died", _cause_of_death(self.process.returncode, err))
        wall = {"process_seconds": round(time.monotonic() - started, 1)}
        return what | json.loads(answers[-1].removeprefix(ANSWER)) | wall

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()


def run(waiting: list[Job], *, time_limit: float, ahead: int = 0) -> Iterator[dict]:
    """Measure points one after the other, each in a process of its own.

    Args:
        ahead: processes that are started while another measures, so that their imports cost no time: on a GPU
            beside some cores; on a CPU they would be measured.
    """
    workers: list[Worker] = []
    try:
        for index, job in enumerate(waiting):
            while len(workers) < min(1 + ahead, len(waiting) - index):
                workers.append(Worker())
            yield workers.pop(0).run(job, time_limit=time_limit)
    finally:
        for worker in workers:
            worker.stop()


def _missing(outcome: str, detail: str) -> dict:
    return {"outcome": outcome, "detail": detail}


def _cause_of_death(code: int, errors: str) -> str:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    last = [line for line in errors.splitlines() if line.strip()][-1:] or ["it said nothing"]
    return f"exit code {code}: {last[0][:300]}"


def measure(job: Job) -> dict:
    """Measure one point in this process.

    Returns:
        `outcome`, and if it was measured: precision, speed-ups, memory in GiB at each stage (on a CPU the
        process' resident set), seconds per step and tokens per second (useful and padded) as the median
        with quartiles over all counted steps, the medians of the repeats, seconds to load (and quantize)
        and to capture graphs, the predicted memory (null where a speed-up is off that the prediction counts
        on), the matrix rate of this device and the share of it that the model's operations reach (it and the
        prediction are null for a model whose layers are no Llama's), joules per 1,000 useful tokens (null without
        NVML), and the tokens of the largest forward pass that was run and of the largest of an epoch, of which the
        peak is.
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
    """Pretend that the device (on a CPU: this process) has no more memory than this."""
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
    return _missing("does not fit", (message.splitlines() or ["memory ran out"])[0][:300]) | {
        "requested_gib": requested
    }


def _measure(job: Job) -> dict:
    import numpy as np
    import torch
    from transformers import AutoConfig

    from workflow.cost import architecture, benchmark, memory
    from workflow.cost.plain_loop import PlainLoop
    from workflow.fetch.convert import byte_tokenizer
    from workflow.precisions import load
    from workflow.training.checks import check_possible
    from workflow.training.train import build_trainer

    variant = params.Variant.model_validate(job.variant_params)
    hardware = params.Hardware.model_validate(job.hardware | {"data_workers": 0})
    steps = benchmark.uncounted(job.warmup_steps) + job.steps * job.repeats
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
    check_possible(training, hardware)
    this_run = params.Run(job.variant, variant, job.seed, training, hardware).alone()
    gauge = benchmark.Gauge(load.choose_device(hardware).type)
    started = time.perf_counter()
    if job.model_folder is None:
        config = load.shape(job.shape)
        config.vocab_size = job.vocabulary or config.vocab_size
        model, found = load.random_base(config, variant, hardware=hardware, seed=job.seed)
    else:
        config = AutoConfig.from_pretrained(job.model_folder, trust_remote_code=False)
        model, found = load.load_base(Path(job.model_folder), variant, hardware=hardware)
    gauge.wait()
    load_seconds = time.perf_counter() - started
    held = {"after_load": gauge.now()}
    if job.rows_file is not None:
        rows = read_jsonl(Path(job.rows_file))
    else:
        random = np.random.default_rng(job.seed)
        rows = [
            {"input_ids": ids, "labels": ids}
            for ids in random.integers(3, config.vocab_size, (job.batch_rows * 4, job.length)).tolist()
        ]
    gauge.reset()
    build = PlainLoop if job.loop == "plain" else build_trainer
    with tempfile.TemporaryDirectory() as scratch:
        trainer = build(
            model,
            byte_tokenizer(vocabulary=config.vocab_size, max_positions=job.length),
            this_run,
            train_rows=rows,
            validation_rows=rows[:1],
            precision=found,
            scratch=Path(scratch),
        )
        held["after_adapters"] = gauge.now()
        watch = benchmark.Stopwatch(
            trainer, warmup_steps=job.warmup_steps, steps=steps, device=found.device, gauge=gauge
        )
        trainer.add_callback(watch)
        trainer.train()
    held |= {"after_optimizer": watch.after_first_step, "at_end": gauge.now()}
    if found.device == "cuda":
        held |= {"peak_allocated": gauge.peak(), "peak_reserved": torch.cuda.max_memory_reserved() / GIB}
    else:
        held["peak_resident"] = gauge.peak()
    shape = architecture.known_shape(config)
    longest = max(trainer.lengths if trainer.speed_ups.cuda_graphs else watch.widest_pass)
    rate = benchmark.matmul_flops(found.device, getattr(torch, found.compute))
    share = None
    if shape is not None:
        operations = statistics.mean(
            benchmark.model_operations(shape, this_run, lengths=lengths)
            for lengths in watch.lengths[watch.uncounted :]
        )
        share = operations / statistics.mean(watch.seconds) / rate
    return {
        "outcome": "measured",
        "precision": found.as_dict(),
        "speed_ups": asdict(trainer.speed_ups),
        "memory_gib": held,
        "predicted_gib": memory.predict(
            shape, variant, training, tokens=longest, graphs=trainer.speed_ups.cuda_graphs
        ).gib()
        if shape is not None and memory.describes(trainer.speed_ups)
        else None,
        "step_seconds": _quartiles(watch.seconds),
        "useful_tokens_per_second_overall": sum(watch.useful) / sum(watch.seconds),
        "useful_tokens_per_second": _quartiles(
            [t / s for t, s in zip(watch.useful, watch.seconds, strict=True)]
        ),
        "padded_tokens_per_second": _quartiles(
            [t / s for t, s in zip(watch.padded, watch.seconds, strict=True)]
        ),
        "step_seconds_of_repeats": [
            statistics.median(watch.seconds[i * job.steps : (i + 1) * job.steps]) for i in range(job.repeats)
        ],
        "load_seconds": load_seconds,
        "capture_seconds": trainer.capture_seconds,
        "matmul_tflops": rate / 1e12,
        "model_flop_utilisation": share,
        "joules_per_1000_tokens": None if watch.joules is None else 1000 * watch.joules / sum(watch.useful),
        "optimizer_steps": trainer.state.global_step,
        "tokens_per_step": statistics.mean(watch.useful),
        "longest_pass_tokens": longest,
        "peak_pass_tokens": max(watch.pass_tokens),
        "epoch_longest_pass_tokens": watch.longest.tokens,
    }


def _quartiles(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def describe(point: dict) -> str:
    """A point in one line."""
    where = (
        f"{point['variant']} at {point['shape']}, {point['micro_batch_rows']} x {point['length']} tokens, "
        f"{point['loop']}"
        f"{', checkpointing' if point['gradient_checkpointing'] else ''}"
    )
    if point["outcome"] != "measured":
        return f"{where}: {point['outcome']} ({point['detail']})"
    held = point["memory_gib"]
    peak = held.get("peak_allocated", held.get("peak_resident"))
    predicted = ""
    if "peak_allocated" in held and point["predicted_gib"] is not None:
        predicted = f" (predicted {point['predicted_gib']['total']:.2f})"
    share = point["model_flop_utilisation"]
    return (
        f"{where}: peak {peak:.2f} GiB{predicted}, {point['useful_tokens_per_second_overall']:.0f} tokens/s"
        + ("" if share is None else f", {share:.0%} of the matrix rate")
    )


if __name__ == "__main__":
    from workflow.runtime.stage import go_offline, quiet_libraries

    go_offline()
    quiet_libraries()

    print(ANSWER + json.dumps(measure(Job(**json.load(sys.stdin)))), flush=True)
