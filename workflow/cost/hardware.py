"""Measure a GPU: each training path, the plain loop, and the grid of every model shape. `make benchmark` runs it.

It needs the sample's rows and a tokenizer (`dvc repro sample`) but no model: shapes get random weights. Each point is
written to results/hardware/DEVICE.json as soon as it is measured, and the report shows it; points in that file are measured
again only with --again.
"""

import argparse
import os
import re
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from workflow import params
from workflow.cost import grid
from workflow.data.rows import from_rows
from workflow.runtime import gpus
from workflow.runtime.errors import UserError
from workflow.runtime.files import read_json, read_jsonl, write_json, write_jsonl
from workflow.runtime.paths import HARDWARE, MODEL, train_rows_file
from workflow.runtime.stage import offline_command, say
from workflow.runtime.versions import installed

PRESET = "gpu_benchmark"
SWITCHES = ("packing", "fused_adapters", "shared_inputs", "fused_layers", "fused_loss", "cuda_graphs")
NONE = dict.fromkeys(SWITCHES, False)
ALLOCATOR, SEGMENTS = "PYTORCH_ALLOC_CONF", "expandable_segments:True"  # workflow/run says why
# The settings to measure on the run's own rows: (loop, changes to training).
PATHS = {
    "every speed-up": ("ours", {}),
    "plain loop": ("plain", NONE),
    "no speed-up (TRL's step)": ("ours", NONE),
    "without cuda_graphs": ("ours", {"cuda_graphs": False}),
    "without fused_adapters": ("ours", {"fused_adapters": False}),
    "without shared_inputs": ("ours", {"shared_inputs": False}),
    "without fused_layers": ("ours", {"fused_layers": False}),
    "without fused_loss": ("ours", {"fused_loss": False}),
    "without packing and cuda_graphs": ("ours", {"packing": False, "cuda_graphs": False}),
    "lean": ("ours", {"gradient_checkpointing": True, "micro_batch_rows": 1}),
    "32 rows a step": ("ours", {"batch_rows": 32, "micro_batch_rows": 32, "length_window": 1}),
}


def select(settings: params.Params, *, variants: list[str] | None, shapes: list[str] | None) -> params.Params:
    """Return params with only these variants and shapes; None keeps those of the params.

    Raises:
        UserError: the params have no such variant or shape.
    """
    grid = settings.benchmark.grid
    for option, names, known in (
        ("--variants", variants, list(settings.variants)),
        ("--shapes", shapes, grid.shapes),
    ):
        for name in names or []:
            if name not in known:
                raise UserError(f"{option} names {name}, and the params file has {', '.join(known)}.")
    changes = {
        "experiment": settings.experiment.model_copy(
            update={"variants": variants or settings.experiment.variants}
        ),
        "benchmark": settings.benchmark.model_copy(
            update={"grid": grid.model_copy(update={"shapes": shapes or grid.shapes})}
        ),
    }
    return settings.model_copy(update=changes)


def measure(settings: params.Params, *, rows: Path, tokenizer: Path, parts: list[str], again: bool) -> Path:
    """Measure the variants and shapes of the params on this machine's device.

    Args:
        settings: whose `benchmark` says what to measure.
        rows: the sample as JSON lines.
        tokenizer: a folder with a tokenizer.
        parts: of "paths", the training paths at the first shape, and "grid".
        again: whether to repeat points that were measured before.

    Returns:
        The file with every point of the device.
    """
    with tempfile.TemporaryDirectory() as scratch:
        tokenized = Path(scratch) / "rows.jsonl"
        if "paths" in parts:
            encoded, vocabulary = tokenize(rows, tokenizer, settings.training)
            write_jsonl(tokenized, encoded)
        jobs = []
        for shape in settings.benchmark.grid.shapes:
            for variant in settings.experiment.variants:
                points = list(grid.jobs(settings, variant, shape, model_folder=None))
                if "paths" in parts and shape == settings.benchmark.grid.shapes[0]:
                    jobs += [
                        (name, path_job(points[0], tokenized, vocabulary, loop, changes, settings))
                        for name, (loop, changes) in PATHS.items()
                    ]
                if "grid" in parts:
                    jobs += [("grid", point) for point in points]
        return _measure(jobs, settings, again=again)


def path_job(
    point: grid.Job, rows: Path, vocabulary: int, loop: str, changes: dict, settings: params.Params
) -> grid.Job:
    """Return a job on the run's own rows, with the batch of its `training`.

    Args:
        point: a job of the grid with the same variant and shape.
        rows: a file of tokenized rows.
        vocabulary: number of the tokenizer's tokens; a shape's own embedding can be smaller.
        loop: "ours" or "plain".
        changes: to the point's training.
        settings: the params, for the number of steps.
    """
    training = params.Training.model_validate(point.training | changes)
    return replace(
        point,
        loop=loop,
        rows_file=str(rows),
        vocabulary=point.vocabulary or vocabulary,
        batch_rows=training.batch_rows,
        micro_batch_rows=training.micro_batch_rows,
        length=training.max_length,
        gradient_checkpointing=training.gradient_checkpointing,
        training=training.model_dump(),
        warmup_steps=settings.benchmark.warmup_steps,
        steps=settings.benchmark.steps,
        repeats=1,
    )


def _measure(jobs: list[tuple[str, grid.Job]], settings: params.Params, *, again: bool) -> Path:
    device = _device_name()
    path = HARDWARE / f"{re.sub('[^a-z0-9]+', '_', device.lower()).strip('_')}.json"
    points = read_json(path)["points"] if path.exists() else []
    measured = {_key(point["setting"], point) for point in points}
    pending = [
        (name, job)
        for name, job in jobs
        if again or _key(name, job.as_dict() | {"rank": job.training["rank"]}) not in measured
    ]
    ahead = 2 if device.startswith("NVIDIA") else 0
    results = grid.run(
        [job for _, job in pending], time_limit=settings.benchmark.grid.time_limit, ahead=ahead
    )
    for number, ((name, _), result) in enumerate(zip(pending, results, strict=True), start=1):
        result = {"setting": name, **result}
        key = _key(name, result)
        points = [point for point in points if _key(point["setting"], point) != key] + [result]
        write_json(path, {"device": device, "versions": installed(), "points": points})
        say(f"{number} of {len(pending)}, {name}: {grid.describe(result)}")
    return path


def _key(name: str, point: dict) -> tuple:
    return (name, *(point[key] for key in (*grid.POINT, "rank")))


def _device_name() -> str:
    import torch

    from workflow.models.load import device_name

    return device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def tokenize(rows: Path, tokenizer_folder: Path, training: params.Training) -> tuple[list[dict], int]:
    """Tokenize the rows of a sample, cut at max_length; rows without a response token left are dropped.

    Returns:
        The token ids and labels of each row, and the number of the tokenizer's tokens.

    Raises:
        UserError: the rows or the tokenizer are missing.
    """
    from transformers import AutoTokenizer

    if not rows.is_file() or not tokenizer_folder.is_dir():
        raise UserError(
            f"{rows} and {tokenizer_folder} are needed, and one is missing: run `dvc repro sample` first."
        )
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, trust_remote_code=False)
    encode = tokenizer.apply_chat_template
    tokenized = []
    for row in from_rows(read_jsonl(rows)):
        conversation = row.conversation(use_context=training.use_context)
        prompt = encode(conversation["prompt"], add_generation_prompt=True, return_dict=False)
        messages = conversation["prompt"] + conversation["completion"]
        tokens = encode(messages, return_dict=False)[: training.max_length]
        if len(tokens) > len(prompt):
            tokenized.append({"input_ids": tokens, "labels": [-100] * len(prompt) + tokens[len(prompt) :]})
    return tokenized, len(tokenizer)


def main() -> None:
    """Parse the command line and measure; exit with one sentence on a UserError."""
    parser = argparse.ArgumentParser(prog="python -m workflow.hardware", description=__doc__)
    parser.add_argument("--params", type=Path, help=f"a params file (default: the preset {PRESET})")
    parser.add_argument(
        "--rows", type=Path, help="JSON lines; by default the training rows of the first seed of params.yaml"
    )
    parser.add_argument("--tokenizer", type=Path, default=MODEL, help="a folder that holds a tokenizer")
    parser.add_argument("--parts", nargs="+", choices=["paths", "grid"], default=["paths", "grid"])
    parser.add_argument(
        "--variants", nargs="+", help="of those that the file defines; by default those of its experiment"
    )
    parser.add_argument(
        "--shapes", nargs="+", help="of the file's benchmark.grid.shapes; paths are measured at the first"
    )
    parser.add_argument("--again", action="store_true", help="measure points again that are in the file")
    options = parser.parse_args()
    # Before torch is imported. For stages workflow/run sets it.
    os.environ.setdefault(ALLOCATOR, SEGMENTS)
    try:
        with offline_command("benchmark"), gpus.reserved(1, say=say):
            settings = params.load(options.params) if options.params else params.preset(PRESET)
            path = measure(
                select(settings, variants=options.variants, shapes=options.shapes),
                rows=options.rows or train_rows_file(params.load().experiment.seeds[0]),
                tokenizer=options.tokenizer,
                parts=options.parts,
                again=options.again,
            )
    except KeyboardInterrupt:
        sys.exit("benchmark: interrupted; what was measured is kept")
    say(f"The results are in {path}")


if __name__ == "__main__":
    main()
