"""Measure a GPU: the training path beside the plain loop, and the grid of every shape. `make benchmark` runs it.

It needs the sample's rows and a tokenizer (`dvc repro sample`), no model: shapes get random weights. Every
point is written as soon as it is measured to results/hardware/DEVICE.json, which the report shows; a point
that is there already is measured again only with --again.
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
from workflow.runtime import faults, gpus, variables
from workflow.runtime.errors import UserError
from workflow.runtime.files import read_json, read_jsonl, write_json, write_jsonl
from workflow.runtime.paths import HARDWARE, MODEL, split_file
from workflow.runtime.stage import go_offline, quiet_libraries, say
from workflow.runtime.versions import installed

PRESET = Path("workflow/params/presets/gpu_benchmark.yaml")
SWITCHES = ("packing", "fused_adapters", "fused_layers", "fused_loss", "cuda_graphs")
NONE = dict.fromkeys(SWITCHES, False)
# What is measured on the run's own rows: (loop, changes to training).
PATHS = {
    "every speed-up": ("ours", {}),
    "plain loop": ("plain", NONE),
    "no speed-up (TRL's step)": ("ours", NONE),
    "without cuda_graphs": ("ours", {"cuda_graphs": False}),
    "without fused_adapters": ("ours", {"fused_adapters": False}),
    "without fused_layers": ("ours", {"fused_layers": False}),
    "without fused_loss": ("ours", {"fused_loss": False}),
    "without packing and cuda_graphs": ("ours", {"packing": False, "cuda_graphs": False}),
    "lean": ("ours", {"gradient_checkpointing": True, "micro_batch_rows": 1}),
    "32 rows a step": ("ours", {"batch_rows": 32, "micro_batch_rows": 32, "length_window": 1}),
}


def narrowed(asked: params.Params, *, variants: list[str] | None, shapes: list[str] | None) -> params.Params:
    """Params that name these variants and shapes alone; None for those that they name.

    Raises:
        UserError: a variant or a shape is not in the file.
    """
    grid = asked.benchmark.grid
    for key, named, known in (
        ("--variants", variants, list(asked.variants)),
        ("--shapes", shapes, grid.shapes),
    ):
        for name in named or []:
            if name not in known:
                raise UserError(f"{key} names {name}, and the params file has {', '.join(known)}.")
    chosen = {
        "experiment": asked.experiment.model_copy(update={"variants": variants or asked.experiment.variants}),
        "benchmark": asked.benchmark.model_copy(
            update={"grid": grid.model_copy(update={"shapes": shapes or grid.shapes})}
        ),
    }
    return asked.model_copy(update=chosen)


def hardware(asked: params.Params, *, rows: Path, tokenizer: Path, parts: list[str], again: bool) -> Path:
    """Measure what `asked` names on this machine's device; return the file that holds it."""
    with tempfile.TemporaryDirectory() as scratch:
        tokenized = Path(scratch) / "rows.jsonl"
        if "paths" in parts:
            encoded, vocabulary = tokenize(rows, tokenizer, asked.training)
            write_jsonl(tokenized, encoded)
        wanted = []
        for shape in asked.benchmark.grid.shapes:
            for variant in asked.experiment.variants:
                points = list(grid.jobs(asked, variant, shape, model_folder=None))
                if "paths" in parts and shape == asked.benchmark.grid.shapes[0]:
                    wanted += [
                        (name, path_job(points[0], tokenized, vocabulary, loop, changes, asked))
                        for name, (loop, changes) in PATHS.items()
                    ]
                if "grid" in parts:
                    wanted += [("grid", point) for point in points]
        return _measure(wanted, asked, again=again)


def path_job(
    point: grid.Job, rows: Path, vocabulary: int, loop: str, changes: dict, asked: params.Params
) -> grid.Job:
    """A job on the run's own rows, with the batch that `training` asks for.

    Args:
        vocabulary: tokens that the rows are made of: a shape's own embedding can be smaller.
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
        warmup_steps=asked.benchmark.warmup_steps,
        steps=asked.benchmark.steps,
        repeats=1,
    )


def _measure(wanted: list[tuple[str, grid.Job]], asked: params.Params, *, again: bool) -> Path:
    device = _device_name()
    path = HARDWARE / f"{re.sub('[^a-z0-9]+', '_', device.lower()).strip('_')}.json"
    points = read_json(path)["points"] if path.exists() else []
    known = {_key(point["setting"], point) for point in points}
    todo = [
        (name, job)
        for name, job in wanted
        if again or _key(name, job.as_dict() | {"rank": job.training["rank"]}) not in known
    ]
    ahead = 2 if device.startswith("NVIDIA") else 0
    results = grid.run([job for _, job in todo], time_limit=asked.benchmark.grid.time_limit, ahead=ahead)
    for number, ((name, _), result) in enumerate(zip(todo, results, strict=True), start=1):
        result = {"setting": name, **result}
        key = _key(name, result)
        points = [point for point in points if _key(point["setting"], point) != key] + [result]
        write_json(path, {"device": device, "versions": installed(), "points": points})
        say(f"{number} of {len(todo)}, {name}: {grid.describe(result)}")
    return path


def _key(name: str, point: dict) -> tuple:
    return (name, *(point[key] for key in (*grid.POINT, "rank")))


def _device_name() -> str:
    import torch

    from workflow.precisions.load import device_name

    return device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def tokenize(rows: Path, tokenizer: Path, training: params.Training) -> tuple[list[dict], int]:
    """The rows as tokens and labels, and how many tokens there are.

    Rows are cut at max_length; those with no response token left are left out.
    """
    from transformers import AutoTokenizer

    if not rows.is_file() or not tokenizer.is_dir():
        raise UserError(
            f"{rows} and {tokenizer} are needed, and one is missing: run `dvc repro sample` first."
        )
    words = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
    encode = words.apply_chat_template
    made = []
    for row in from_rows(read_jsonl(rows)):
        told = row.conversation(use_context=training.use_context)
        prompt = encode(told["prompt"], add_generation_prompt=True, return_dict=False)
        whole = encode(told["prompt"] + told["completion"], return_dict=False)[: training.max_length]
        if len(whole) > len(prompt):
            made.append({"input_ids": whole, "labels": [-100] * len(prompt) + whole[len(prompt) :]})
    return made, len(words)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m workflow.hardware", description=__doc__)
    parser.add_argument("--params", type=Path, default=PRESET, help=f"a params file (default {PRESET})")
    parser.add_argument("--rows", type=Path, default=split_file("train"), help="the sample, JSON lines")
    parser.add_argument("--tokenizer", type=Path, default=MODEL, help="a folder that holds a tokenizer")
    parser.add_argument("--parts", nargs="+", choices=["paths", "grid"], default=["paths", "grid"])
    parser.add_argument(
        "--variants", nargs="+", help="of those that the file defines, in place of its experiment's"
    )
    parser.add_argument(
        "--shapes", nargs="+", help="of the file's benchmark.grid.shapes; paths are measured at the first"
    )
    parser.add_argument("--again", action="store_true", help="measure again what is there already")
    options = parser.parse_args()
    go_offline()
    quiet_libraries()
    try:
        variables.check(os.environ, network=False)
        with faults.as_user_errors("benchmark"), gpus.taken(1, say=say):
            path = hardware(
                narrowed(params.load(options.params), variants=options.variants, shapes=options.shapes),
                rows=options.rows,
                tokenizer=options.tokenizer,
                parts=options.parts,
                again=options.again,
            )
    except UserError as error:
        sys.exit(f"benchmark: {error}")
    except KeyboardInterrupt:
        sys.exit("benchmark: interrupted; what was measured is kept")
    say(f"The results are in {path}")


if __name__ == "__main__":
    main()
