"""A run's files as the stages write them, with chosen numbers, so that what the page says can be checked."""

import contextlib
import hashlib
import io
import itertools
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas as pd
from edit_params import set_training
from ruamel.yaml import YAML

from workflow import params
from workflow.comparison.contrasts import PARTS
from workflow.comparison.inference import Difference, Equivalence, Judgment, verdict
from workflow.comparison.model import (
    ALL,
    CLAIMED_FORMS,
    HELD_OUT,
    SEEN,
    Claim,
    Comparison,
    Contrast,
    Cost,
    Divergence,
    Part,
    Score,
    Share,
)
from workflow.comparison.sentences import sentence
from workflow.runtime.files import read_json, write_json, write_jsonl, write_text
from workflow.runtime.paths import (
    CANDIDATES,
    COMPARE,
    DATASET_SOURCE,
    HARDWARE,
    MEASURED,
    MODEL_SOURCE,
    RATE_CHOICES,
    SAMPLE,
    benchmark_file,
    divergence_folder,
    evaluate_base_folder,
    evaluate_folder,
    grid_file,
    train_folder,
    tune_folder,
)
from workflow.tuning.choose import choose

PROJECT = Path(__file__).resolve().parents[1]
GRID = "grid"
VERSIONS = {"Python": "3.11.7", "torch": "2.13.0+cpu"}
BASELINE = "lora_16bit"
VARIANTS = {
    "lora_16bit": {"method": "lora", "precision": "16bit", "double_quantization": False, "block_size": None},
    "qlora_nf4": {"method": "lora", "precision": "nf4", "double_quantization": False, "block_size": 64},
    "qlora_nf4_dq": {"method": "lora", "precision": "nf4", "double_quantization": True, "block_size": 64},
    "qlora_fp4": {"method": "lora", "precision": "fp4", "double_quantization": False, "block_size": 64},
    "lora_int8": {"method": "lora", "precision": "int8", "double_quantization": False, "block_size": None},
    "full_16bit": {"method": "full", "precision": "16bit", "double_quantization": False, "block_size": None},
}
BEFORE = {  # nats per token of the untouched base
    "lora_16bit": 3.0712, "qlora_nf4": 3.2104, "qlora_nf4_dq": 3.2218, "qlora_fp4": 3.4021,
    "lora_int8": 3.0741, "full_16bit": 3.0712,
}  # fmt: skip
AFTER = {  # of the mean over the seeds
    "lora_16bit": 2.2034, "qlora_nf4": 2.2571, "qlora_nf4_dq": 2.2619, "qlora_fp4": 2.3310,
    "lora_int8": 2.2041, "full_16bit": 2.1802,
}  # fmt: skip
BY_FORM = {"merged_16bit": 0.0102, "merged_dequantized": 0.0004, "requantized": 0.0311}  # added by serving so
HALF_WIDTH = 0.0187  # of the intervals of all differences, in nats per token
MARGIN = 0.02
BITS_PER_NAT = 0.3321  # bits per byte for one nat per token
METRICS = (  # task, metric, unit, higher_is_better, how many of it a nat per token is
    ("holdout_loss", "nats_per_token", "nats per token", False, 1.0),
    ("holdout_loss", "bits_per_byte", "bits per byte", False, BITS_PER_NAT),
    ("holdout_generation", "ended", "share of answers", True, -0.25),
    ("holdout_generation", "length", "tokens", None, 6.0),
)
PRIMARY = METRICS[0]
TASKS = {"holdout_loss": None, "holdout_generation": 90}  # and the first items that are scored
CATEGORIES = {"greetings": 80, "poetry": 53, "riddles": 1}  # test items; of one item no interval can be taken
PEAK_GIB = {
    "lora_16bit": 2.214, "qlora_nf4": 1.871, "qlora_nf4_dq": 1.868, "qlora_fp4": 1.872, "lora_int8": 1.953,
    "full_16bit": 3.402,
}  # fmt: skip
WEIGHTS_GIB = {
    "lora_16bit": 0.501116, "qlora_nf4": 0.166704, "qlora_nf4_dq": 0.161352, "qlora_fp4": 0.166704,
    "lora_int8": 0.205011, "full_16bit": 0.501116,
}  # fmt: skip
SPEED = {
    "lora_16bit": 131.4, "qlora_nf4": 102.7, "qlora_nf4_dq": 101.2, "qlora_fp4": 103.3, "lora_int8": 88.1,
    "full_16bit": 96.4,
}  # fmt: skip
DEVICES = {"cpu": "Made-up CPU, 2 threads", "cuda": "Made-up GPU 80GB"}
PARAMETERS = 134_515_008
ITEMS, GROUPS = 134, 100
STEPS = 12
ROWS = [
    (
        "What is the capital of France?",
        "The capital of France is Paris.",
        "The capital city of France is Paris.",
    ),
    (
        "Do you know all jokes?",
        "I don't know all jokes.",
        "I know a few jokes, and I am always glad to learn more. " * 8,
    ),
    ("Hello, I am here for my appointment.", "Who is your appointment with?", ""),
]


@contextlib.contextmanager
def further_variants(of: dict[str, str]) -> Iterator[None]:
    """Within it there are further variants, by name, each with the numbers of another one."""
    tables = (VARIANTS, BEFORE, AFTER, PEAK_GIB, WEIGHTS_GIB, SPEED)
    for table in tables:
        table.update({name: table[other] for name, other in of.items()})
    try:
        yield
    finally:
        for table, name in itertools.product(tables, of):
            del table[name]


@dataclass(frozen=True)
class Answered:
    """One test row: instruction, reference response and what every model answers."""

    instruction: str
    response: str
    answer: str


def write(
    *,
    variants: tuple[str, ...] = ("lora_16bit", "qlora_nf4_dq"),
    seeds: tuple[int, ...] = (1, 2),
    device: str = "cpu",
    model: str = "wheel",
    rows: tuple[Answered, ...] = tuple(Answered(*row) for row in ROWS),
    half_width: float = HALF_WIDTH,
    margins: dict[str, float] | None = None,
    held_out: tuple[str, ...] = ("poetry",),
    categories: dict[str, int] | None = None,
    repairs: dict[str, dict] | None = None,
    title: str = "What does 4-bit fine-tuning cost?",
    compare_to: str | None = None,
    device_hour_price: float | None = None,
    training: dict[str, dict] | None = None,
    forms: tuple[str, ...] = ("merged_16bit", "as_trained", "merged_dequantized", "requantized"),
    tasks: tuple[str, ...] = ("holdout_loss", "holdout_generation"),
    says: dict[tuple[str, int], str] | None = None,
    scores: dict[tuple[str, int], float] | None = None,
    near_duplicates: int = 0,
    processes: int = 1,
    own_rows: tuple[int, ...] | None = None,
    measured: tuple[str, ...] | None = None,
) -> Comparison:
    """Write params.yaml, requirements.lock and every stage's results into the working directory.

    Args:
        device: cpu or cuda; decides which memory was measured and in what the weights are held.
        model: wheel or random.
        half_width: of every interval, in nats per token.
        margins: by task/metric; without it, one for the primary metric.
        held_out: the categories that no run was trained on.
        categories: test items by category.
        repairs: as `comparison.repairs` of params.
        training: by variant, the keys of `training` that it changes.
        forms: as `evaluation.forms` of params.
        tasks: as the names of `evaluation.tasks` of params.
        says: by variant/form and row, an answer that is not the row's.
        scores: by variant/form and row, an answer's rouge_l; 0.5 for all others.
        near_duplicates: test rows that have one among the training and validation rows.
        processes: that measured the costs; of three or more, every interval is 2 % wide to both sides.
        measured: the variants whose costs were measured; None for all.
        own_rows: how many training rows of its own each seed has; None if all seeds have the same.

    Returns:
        The comparison, as results/compare/comparison.json holds it.
    """
    chosen = {
        "comparison": {
            "confidence": 0.95,
            "power": 0.8,
            "resamples": 9999,
            "seed": 55,
            "primary": "holdout_loss/nats_per_token",
            "margins": {"holdout_loss/nats_per_token": MARGIN} if margins is None else margins,
            "family": {"kinds": ["to_baseline"], "metrics": ["holdout_loss/nats_per_token"]},
            "claims": {"far_less": 0.75},
            "repairs": repairs or {},
        },
        "experiment": {"variants": list(variants), "baseline": BASELINE, "seeds": list(seeds)},
        "report": {"title": title, "compare_to": compare_to, "device_hour_price": device_hour_price},
    }
    measured = variants if measured is None else measured
    sample = {"rows": max(own_rows), "per_seed": True} if own_rows else {}
    _write_params(
        chosen,
        sample,
        measured=measured,
        model=model,
        held_out=held_out,
        training=training or {},
        forms=forms,
        tasks=tasks,
    )
    asked = params.load()
    write_text(Path("requirements.lock"), "torch==2.13.0\n")
    write_json(MODEL_SOURCE, _model_source(model))
    write_json(DATASET_SOURCE, {"source": "wheel", "package": "made-up-corpus", "version": "1.0",
                                "member": "data", "sha256": "d" * 64, "rows": 2026})  # fmt: skip
    train_rows = own_rows or [822] * len(seeds)
    write_json(SAMPLE / "counts.json", {"test_rows": ITEMS, "validation_rows": 44, "train_rows": train_rows[0],
                                         "train_rows_by_seed": dict(zip(seeds, train_rows, strict=True)),
                                         "rows_to_draw_from": 5000 if own_rows else None,
                                         "held_out_rows": 53, "left_out_rows": 61,
                                         "near_duplicate_test_rows": near_duplicates,
                                         "near_duplicates_dropped": 0})  # fmt: skip
    comparison = MadeUp(
        asked, device, half_width, CATEGORIES if categories is None else categories
    ).comparison()
    comparison = replace(comparison, cost=[_over(processes, cost) for cost in comparison.cost])
    write_json(COMPARE / "comparison.json", comparison.as_dict())
    answers = _Answers(tasks, rows if "holdout_generation" in tasks else (), says or {}, scores or {})
    for variant in variants:
        _write_evaluation(evaluate_base_folder(variant), variant, None, ["base"], device, answers)
        if variant in measured:
            costs = [c for c in comparison.cost if c.variant == variant]
            write_json(benchmark_file(variant), _benchmark(variant, device, costs))
        for index, seed in enumerate(seeds):
            forms = asked.forms_of(variant)
            _write_evaluation(evaluate_folder(variant, seed), variant, seed, forms, device, answers)
            write_json(train_folder(variant, seed) / "result.json", comparison.training[variant][index])
            _write_curves(train_folder(variant, seed), variant, seed)
            _write_divergence(divergence_folder(variant, seed), comparison, variant, seed)
    write_json(CANDIDATES, {"candidates": {}, "seeds": []})
    write_json(RATE_CHOICES, {"choices": {}})
    for file in MEASURED:
        write_json(file, {"variants": list(measured)})
    pd.DataFrame(answers.items).to_parquet(COMPARE / "items.parquet", index=False)
    return comparison


class _Answers:
    """What every arm answered, and the items with its scores as the stage compare gathers them."""

    def __init__(self, tasks: tuple[str, ...], rows: tuple[Answered, ...], says: dict, scores: dict):
        self.tasks = tasks
        self.rows, self.says, self.scores = rows, says, scores
        columns = ("task", "metric", "item", "numerator", "denominator", "variant", "seed", "form")
        self.items = {column: [] for column in columns}

    def of(self, variant: str, seed: int | None, form: str) -> list[dict]:
        arm, found = f"{variant}/{form}", []
        for index, row in enumerate(self.rows):
            text = self.says.get((arm, index), row.answer)
            found.append(
                {"id": index, "context": "", "category": ("made up", "other")[index % 2], "stopped": index != 1,
                 **asdict(row), "answer": text, "form": form}
            )  # fmt: skip
            score = ("holdout_generation", "rouge_l", str(index), self.scores.get((arm, index), 0.5), 1.0)
            for column, value in zip(self.items, (*score, variant, seed, form), strict=True):
                self.items[column].append(value)
        return found


def write_lock() -> None:
    """Write what DVC would have written beside the results that are here: dvc.yaml, and dvc.lock with true digests."""
    for name in ("workflow", "pyproject.toml"):  # what stages depend on and no stage writes
        if not Path(name).exists():
            Path(name).symlink_to(PROJECT / name)
    shutil.copy(PROJECT / "dvc.yaml", "dvc.yaml")
    yaml = YAML(typ="safe", pure=True)
    asked = yaml.load(Path("params.yaml").read_text(encoding="utf-8"))
    stages = {}
    for name, stage in yaml.load(Path("dvc.yaml").read_text(encoding="utf-8"))["stages"].items():
        items, stage = _items(asked, stage), stage.get("do", stage)
        for values, item in items:
            label = name + ("@" + "-".join(values) if values else "")
            item["${experiment.seeds[0]}"] = str(asked["experiment"]["seeds"][0])
            paths = {
                kind: [_filled(next(iter(one)) if isinstance(one, dict) else one, item)
                       for part in parts for one in stage.get(part, [])]
                for kind, parts in (("deps", ["deps"]), ("outs", ["outs", "metrics", "plots"]))
            }  # fmt: skip
            stages[label] = {
                "cmd": _filled(stage["cmd"], item),
                **{kind: [{"path": path, "md5": _md5(Path(path))} for path in found]
                   for kind, found in paths.items()},
                "params": {"params.yaml": {key: _by_key(asked, key)
                                           for key in (_filled(k, item) for k in stage.get("params", []))}},
            }  # fmt: skip
    with Path("dvc.lock").open("w", encoding="utf-8") as file:
        YAML(typ="safe", pure=True).dump({"schema": "2.0", "stages": stages}, file)


def _items(asked: dict, stage: dict) -> list[tuple[list[str], dict[str, str]]]:
    """The values that name each item of a stage, and what its references in dvc.yaml stand for."""
    if "foreach" in stage:
        entries = _by_key(asked, stage["foreach"].strip("${}"))
        return [
            ([key], {"${key}": key} | {f"${{item.{part}}}": str(value) for part, value in entry.items()})
            for key, entry in entries.items()
        ]
    matrix = stage.get("matrix", {})
    lists = [
        [_by_key(asked, one.strip("${}")) for one in values]
        if isinstance(values, list)
        else _by_key(asked, values.strip("${}"))
        for values in matrix.values()
    ]
    return [
        (
            list(map(str, values)),
            {f"${{item.{key}}}": str(value) for key, value in zip(matrix, values, strict=True)},
        )
        for values in itertools.product(*lists)
    ]


def _filled(text: str, item: dict[str, str]) -> str:
    for reference, value in item.items():
        text = text.replace(reference, value)
    return text


def _by_key(content: dict, key: str):
    for part in key.split("."):
        content = content[part]
    return content


def _md5(path: Path) -> str:
    if path.is_dir():
        found = sorted(
            (file.relative_to(path).as_posix(), hashlib.md5(file.read_bytes()).hexdigest())
            for file in path.rglob("*")
            if file.is_file() and "__pycache__" not in file.parts
        )
        listed = json.dumps([{"md5": digest, "relpath": name} for name, digest in found])
        return hashlib.md5(listed.encode()).hexdigest() + ".dir"
    return hashlib.md5(path.read_bytes()).hexdigest() if path.exists() else "0" * 32


def point(setting: str, variant: str, *, tokens_per_second: float = 100.0, **changes) -> dict:
    """A measured point as workflow/cost/hardware.py writes it, with what `changes` puts over it."""
    doubly = VARIANTS.get(variant, {}).get("double_quantization", False)
    return {
        "setting": setting, "variant": variant, "shape": "tinyllama_1b", "loop": "ours", "batch_rows": 4,
        "micro_batch_rows": 4, "length": 512, "gradient_checkpointing": False, "warmup_steps": 2, "steps": 10,
        "repeats": 3, "seed": 55, "rank": 16, "outcome": "measured",
        "precision": {"base": "nf4", "double_quantization": doubly, "compute": "bfloat16", "device": "cuda",
                      "device_name": DEVICES["cuda"]},
        "memory_gib": {"after_load": 2.0, "peak_allocated": 8.0, "peak_reserved": 8.5},
        "predicted_gib": {"weights": 2.0, "quantization_constants": 0.0, "adapters": 0.5, "gradients": 0.5,
                          "optimizer": 1.0, "activations": 3.5, "loss": 0.0, "transient": 0.4,
                          "workspace": 0.1, "total": 8.0},
        "step_seconds": {"median": 1.0, "low": 0.9, "high": 1.1},
        "useful_tokens_per_second": {"median": tokens_per_second, "low": 0.9 * tokens_per_second,
                                     "high": 1.1 * tokens_per_second},
        "useful_tokens_per_second_overall": 1.02 * tokens_per_second,
        "matmul_tflops": 700.0, "model_flop_utilisation": 0.4321, "joules_per_1000_tokens": 77.0,
    } | changes  # fmt: skip


def missing(setting: str, variant: str, outcome: str, detail: str, **changes) -> dict:
    """A point that could not be measured."""
    kept = point(setting, variant, **changes)
    measured = ("precision", "memory_gib", "predicted_gib", "step_seconds", "useful_tokens_per_second",
                "useful_tokens_per_second_overall", "matmul_tflops", "model_flop_utilisation",
                "joules_per_1000_tokens")  # fmt: skip
    return {k: v for k, v in kept.items() if k not in measured} | {"outcome": outcome, "detail": detail}


def predicted(total: float, peak: float) -> dict:
    """A point's changes, that make it have this predicted and this measured memory."""
    gib = point(GRID, BASELINE)["predicted_gib"]
    return {
        "predicted_gib": gib | {"activations": total - 4.5, "total": total},
        "memory_gib": {"peak_allocated": peak, "peak_reserved": peak + 1},
    }


def hardware_points() -> list[dict]:
    """Settings on the run's rows and a small grid, of the usual two variants."""
    plain = {"loop": "plain", "predicted_gib": None}
    return [
        point("every speed-up", "lora_16bit", tokens_per_second=6543.0, **predicted(20.0, 20.0)),
        point("plain loop", "lora_16bit", tokens_per_second=1000.0, **plain),
        point("every speed-up", "qlora_nf4_dq", tokens_per_second=5000.0, joules_per_1000_tokens=None),
        missing("plain loop", "qlora_nf4_dq", "does not fit", "out of memory", loop="plain")
        | {"requested_gib": 1.25},
        missing("without fused_loss", "qlora_nf4_dq", "timed out", "it was ended after 600 s"),
        point(GRID, "lora_16bit", tokens_per_second=2000.0, micro_batch_rows=1, **predicted(7.0, 8.0)),
        point(GRID, "lora_16bit", tokens_per_second=4000.0, **predicted(15.0, 15.8)),
        point(GRID, "lora_16bit", tokens_per_second=3000.0, gradient_checkpointing=True),
        point(GRID, "qlora_nf4_dq", tokens_per_second=1500.0, micro_batch_rows=1),
        missing(GRID, "qlora_nf4_dq", "died", "killed by SIGKILL", gradient_checkpointing=True),
        point(GRID, "qlora_nf4_dq", tokens_per_second=3500.0, **predicted(9.0, 9.1)),
    ]


def write_hardware(points: list[dict] | None = None, *, device: str = DEVICES["cuda"]) -> None:
    """Write a file of results/hardware/ into the working directory."""
    versions = {"Python": "3.12.9", "torch": "9.8.7"}
    points = hardware_points() if points is None else points
    write_json(HARDWARE / "made_up_gpu.json", {"device": device, "versions": versions, "points": points})


def write_rates(
    losses: dict[str, dict[float, list[float | None]]],
    *,
    own: tuple[str, ...] = (),
    seeds: tuple[int, ...] = (11, 12),
) -> None:
    """Tune the learning rates of what `write` wrote: every run takes the baseline's, those of `own` their own best.

    Args:
        losses: by variant and rate, the validation loss with each tuning seed; None for a training that diverged.
        own: variants whose candidates decide their own rate.
    """
    yaml = YAML(typ="safe", pure=True)
    content = yaml.load(Path("params.yaml").read_text())
    set_training(content, learning_rate=BASELINE)
    for variant in own:
        content["variants"][variant]["training"]["learning_rate"] = variant
    rates = [
        (f"{variant}_{i}", variant, rate)
        for variant, by_rate in losses.items()
        for i, rate in enumerate(by_rate)
    ]
    content["tuning"] = {
        "candidates": {name: {"variant": variant, "learning_rate": rate} for name, variant, rate in rates},
        "seeds": list(seeds),
    }
    with Path("params.yaml").open("w") as file:
        YAML().dump(content, file)
    for name, variant, rate in rates:
        runs = [
            {"seed": seed, "diverged": None if loss else "the training loss is not finite", "validation_loss_before": 3.0,
             "validation_loss_after": loss, "validation_loss_kept": loss, "kept_step": loss and STEPS,
             "best_validation_loss": loss and loss - 0.01, "best_step": loss and 8, "steps": loss and STEPS,
             "tokens_seen": 10_000, "order_sha256": f"{seed:064x}", "seconds": 70.0}
            for seed, loss in zip(seeds, losses[variant][rate], strict=True)
        ]  # fmt: skip
        about = {"candidate": name, "variant": variant, "learning_rate": rate}
        write_json(tune_folder(name) / "result.json", {**about, "runs": runs})
    chosen = choose(params.load())
    write_json(
        RATE_CHOICES, {"choices": {name: choice.model_dump() for name, choice in chosen.choices.items()}}
    )
    for name in content["experiment"]["variants"]:
        for file in Path("results/train", name).glob("*/result.json"):
            write_json(file, read_json(file) | {"learning_rate": chosen.variants[name].learning_rate})


def write_grid(variant: str, shape: str, points: list[dict]) -> None:
    """Write a grid of the run's own into the working directory."""
    points = [{k: v for k, v in one.items() if k != "setting"} | {"shape": shape} for one in points]
    content = {"variant": variant, "shape": shape, "points": points, "versions": VERSIONS}
    write_json(grid_file(variant, shape), content)


def _write_params(
    chosen_sections: dict, sample: dict, *, measured, model: str, held_out, training: dict, forms, tasks
) -> None:
    """The preset `tiny`, which has every key that params need, with the chosen run put over it."""
    yaml = YAML(typ="safe", pure=True)
    chosen = yaml.load(params.complete_text("tiny"))
    chosen |= chosen_sections
    chosen["benchmark"]["variants"] = list(measured)
    chosen["sample"] |= {
        "held_out_categories": list(held_out),
        "rows": 1000,
        "validation_rows": 44,
        "test_rows": ITEMS,
    } | sample
    if model == "wheel":
        chosen["model"] = {"source": "wheel", "package": "made-up-model", "version": "0.1.2",
                           "sha256": "a" * 64, "member": "folder/Made-Up-135M.Q4_1.gguf",
                           "chat_template": "model", "chat_date": "2024-07-26", "end_token": None, "moved": None, "kept_layers": None}  # fmt: skip
    chosen["dataset"] = {"source": "wheel", "package": "made-up-corpus", "version": "1.0",
                         "sha256": "d" * 64, "member": "data", "format": "chatterbot",
                         "columns": None}  # fmt: skip
    set_training(chosen, epochs=None, steps=STEPS, batch_rows=16, micro_batch_rows=8, learning_rate=1e-3)
    chosen["variants"] = {
        name: {
            **variant,
            "layers_in_16_bits": [],
            "compute_dtype": None,
            "processes": 1,
            "training": training.get(name, {}),
        }
        for name, variant in VARIANTS.items()
    }
    own = {"few_shot": 0, "chat_template": True, "files": None}
    chosen["evaluation"] |= {
        "tasks": {task: {"items": TASKS[task], **own} for task in tasks},
        "forms": list(forms),
        "answer_tokens": 48,
    }
    text = io.StringIO()
    YAML().dump(chosen, text)
    write_text(Path("params.yaml"), text.getvalue())


def _model_source(model: str) -> dict:
    if model == "random":
        record = {"source": "random", "seed": 0, "quantized_before": None}
    else:
        record = {"source": "wheel", "package": "made-up-model", "version": "0.1.2",
                  "member": "folder/Made-Up-135M.Q4_1.gguf", "sha256": "a" * 64,
                  "quantized_before": "GGUF Q4_1"}  # fmt: skip
    return record | {"parameters": PARAMETERS, "storage_dtype": "BF16", "chat_template": "the model's own"}


def _precision(variant: str, device: str, *, merged: bool = False) -> dict:
    served = BASELINE if merged else variant
    base, doubly = VARIANTS[variant]["precision"], VARIANTS[variant]["double_quantization"]
    compute = "float32" if device == "cpu" else "bfloat16"
    return {
        "base": base,
        "double_quantization": doubly,
        "block_size": 64 if base in ("nf4", "fp4") else None,
        "layers_in_16_bits": [],
        "storage": {"16bit": compute, "int8": "int8"}.get(base, f"{base} (4 bits)"),
        "compute": compute,
        "device": device,
        "device_name": DEVICES[device],
        "quantized_modules": 0 if merged or base == "16bit" else 210,
        "linear_modules": 210,
        "weights_gib": WEIGHTS_GIB[served],
    }


class MadeUp:
    """A comparison with chosen numbers, of the runs that params name, in the stage's own dataclasses."""

    def __init__(self, asked: params.Params, device: str, half_width: float, categories: dict[str, int]):
        self.asked, self.device, self.half_width = asked, device, half_width
        self.variants, self.seeds = asked.experiment.variants, asked.experiment.seeds
        self.held_out = asked.sample.held_out_categories
        self.categories = categories
        self.metrics = [metric for metric in METRICS if metric[0] in asked.evaluation.tasks]

    def comparison(self) -> Comparison:
        contrasts = self.contrasts()
        wanted = self.asked.comparison
        return Comparison(
            baseline=BASELINE,
            seeds=list(self.seeds),
            confidence=wanted.confidence,
            power=wanted.power,
            resamples=wanted.resamples,
            primary=wanted.primary,
            margins=dict(wanted.margins),
            family=wanted.family.model_dump(),
            held_out_categories=list(self.held_out),
            precisions={variant: _precision(variant, self.device) for variant in self.variants},
            training={v: [_trained(v, seed, self.device) for seed in self.seeds] for v in self.variants},
            trained_otherwise={},
            scores=self.scores(),
            contrasts=contrasts,
            decomposition=self.decomposition(contrasts),
            claims=self.claims(contrasts),
            cost=[cost for variant in self.asked.benchmark.variants for cost in _costs(variant, self.device)],
            shares=self.shares(),
            divergences=self.divergences(),
        )

    def arms(self) -> list[tuple[str, str]]:
        """Every run in every form, the baseline as trained left out."""
        arms = [(v, form) for v in self.variants for form in self.asked.forms_of(v)]
        return [arm for arm in arms if arm != (BASELINE, "as_trained")]

    def shares(self) -> list[Share]:
        """Shares of the baseline's gain in the primary metric, and of its score in `ended`."""
        gain = self.nats(BASELINE, "base") - self.nats(BASELINE, "as_trained")
        found = []
        for metric in self.metrics:
            task, name, unit, higher_is_better, scale = metric
            if metric != PRIMARY and not higher_is_better:
                continue
            for variant, form in self.arms():
                if metric == PRIMARY:
                    divisor = gain
                    value = gain and (self.nats(BASELINE, "base") - self.nats(variant, form)) / gain
                else:
                    divisor = 1.4 + scale * self.nats(BASELINE, "as_trained")
                    value = (1.4 + scale * self.nats(variant, form)) / divisor
                stated = divisor > self.half_width
                half = self.half_width / divisor if stated else 0.0
                ends = (value, value - half, value + half) if stated else (None, None, None)
                found.append(
                    Share("share_of_gain" if metric == PRIMARY else "share_of_score", variant, form,
                          f"{BASELINE}/as_trained", task, name, unit, bool(higher_is_better), "test", ALL, ITEMS,
                          GROUPS, len(self.seeds), 0.95, *ends,
                          made_up_difference(divisor, self.half_width, items=ITEMS, seeds=len(self.seeds)),
                          None if stated else "No share is stated: the gain is made up.")
                )  # fmt: skip
        return found

    def divergences(self) -> list[Divergence]:
        """A mean divergence of half the distance in loss, and the other measures as of an exponential distribution."""
        found = []
        for variant, form in self.arms():
            mean = 0.004 + abs(self.nats(variant, form) - self.nats(BASELINE, "as_trained")) / 2
            for name, unit, value, half in (
                ("kl_mean", "nats per token", mean, mean / 10),
                ("kl_median", "nats per token", mean * math.log(2), None),
                ("kl_p99_9", "nats per token", mean * math.log(1000), None),
                ("same_top_token", "share of tokens", 1 - mean, mean / 8),
            ):
                found.append(
                    Divergence(variant, form, f"{BASELINE}/as_trained", "holdout_loss", name, unit,
                               name == "same_top_token", "test", 90, 80, 1234, value, half and value - half,
                               half and value + half, 0.95, {str(seed): value for seed in self.seeds})
                )  # fmt: skip
        return found

    def subsets(self) -> dict[str, int]:
        """Test items in each subset."""
        held_out = sum(items for name, items in self.categories.items() if name in self.held_out)
        pooled = {HELD_OUT: held_out, SEEN: ITEMS - held_out} if held_out else {}
        return {ALL: ITEMS, **pooled, **{f"category/{n}": items for n, items in self.categories.items()}}

    def nats(self, variant: str, form: str) -> float:
        return BEFORE[variant] if form == "base" else AFTER[variant] + BY_FORM.get(form, 0)

    def scores(self) -> list[Score]:
        middle = (len(self.seeds) - 1) / 2
        found = []
        for variant in self.variants:
            for form in ("base", *self.asked.forms_of(variant)):
                for task, metric, unit, higher_is_better, scale in self.metrics:
                    for subset, items in self.subsets().items():
                        value = scale * self.nats(variant, form) + (1.4 if scale < 0 else 0)
                        spread = {
                            str(s): value + scale * 0.011 * (i - middle) for i, s in enumerate(self.seeds)
                        }
                        found.append(
                            Score(
                                variant=variant,
                                form=form,
                                task=task,
                                metric=metric,
                                unit=unit,
                                higher_is_better=higher_is_better,
                                split="test",
                                subset=subset,
                                items=items,
                                groups=GROUPS if subset == ALL else items,
                                value=value,
                                per_seed={} if form == "base" else spread,
                            )
                        )
        return found

    def contrasts(self) -> list[Contrast]:
        found = []
        for variant in self.variants:
            trained, base = (variant, "as_trained"), (variant, "base")
            forms = self.asked.forms_of(variant)
            if variant != BASELINE:
                for form in forms:
                    found += self.taken("to_baseline", (variant, form), (BASELINE, "as_trained"))
            for form in forms:
                found += self.taken("to_base", (variant, form), base)
            if VARIANTS[variant]["precision"] != "16bit":
                found += self.taken("base_to_base", base, (BASELINE, "base"))
                found += self.taken(
                    "recovery", trained, (BASELINE, "as_trained"), less=(base, (BASELINE, "base"))
                )
            found += [
                c for f in forms if f != "as_trained" for c in self.taken("form", (variant, f), trained)
            ]
        if len(self.seeds) >= 4:
            trained = (BASELINE, "as_trained")
            found += self.taken("control", trained, trained, name="seeds 1 and 2 less seeds 3 and 4")
        for name, pair in self.asked.comparison.repairs.items():
            arms = [(*served.split("/"), "as_trained")[:2] for served in (pair.faulty, pair.repaired)]
            found += self.taken("repair", *arms, name=name)
        return found

    def taken(self, kind: str, arm, other, *, less=None, name: str | None = None) -> list[Contrast]:
        """A contrast in every metric with a direction; in the primary one, of some kinds, by category too."""
        forms = {"to_base": CLAIMED_FORMS, "to_baseline": ("as_trained",)}
        by_category = arm[1] in forms.get(kind, ())
        nats = self.nats(*arm) - self.nats(*other)
        nats -= self.nats(*less[0]) - self.nats(*less[1]) if less else 0
        return [
            self.contrast(kind, arm, "/".join(other), metric, subset, items, nats, name)
            for metric in self.metrics
            if metric[3] is not None
            for subset, items in self.subsets().items()
            if subset == ALL or (by_category and metric == PRIMARY and items > 1)
        ]

    def contrast(self, kind, arm, other, about, subset, items, nats, name) -> Contrast:
        task, metric, unit, higher_is_better, scale = about
        margin = self.asked.comparison.margins.get(f"{task}/{metric}")
        trained = kind != "base_to_base"
        one = made_up_difference(
            scale * nats,
            abs(scale) * self.half_width,
            items=items,
            seeds=len(self.seeds) if trained else None,
        )
        tost = margin and made_up_equivalence(one, margin)
        in_family = kind == "to_baseline" and about == PRIMARY and subset == ALL
        p_adjusted = min(1.0, one.p_value * (2 if in_family else 1))
        p_equivalence = tost.p_value if tost else None
        word = verdict(
            one, p_adjusted=p_adjusted, p_equivalence=p_equivalence, higher_is_better=higher_is_better
        )
        return Contrast(
            kind=kind,
            name=name,
            variant=arm[0],
            form=arm[1],
            other=other,
            task=task,
            metric=metric,
            unit=unit,
            higher_is_better=higher_is_better,
            subset=subset,
            difference=one,
            p_accuracy=None,
            p_adjusted=p_adjusted,
            in_family=in_family,
            equivalence=tost,
            p_equivalence_adjusted=p_equivalence,
            verdict=word,
            sentence=sentence(
                "/".join(arm),
                other,
                one,
                Judgment(p_adjusted, tost, p_equivalence, word),
                unit=unit,
                higher_is_better=higher_is_better,
                corrected=in_family,
            ),
            corrected_over=2 if in_family else 1,
        )

    def decomposition(self, contrasts: list[Contrast]) -> list[Part]:
        return [
            Part(c.variant, c.task, c.metric, PARTS[kind], kind, c.form, c.difference.value, c.difference.low,
                 c.difference.high, c.verdict)
            for kind in PARTS
            for c in contrasts
            if c.kind == kind
            and c.subset == ALL
            and (kind != "to_baseline" or c.form == "as_trained")
            and VARIANTS[c.variant]["precision"] != "16bit"
        ]  # fmt: skip

    def claims(self, contrasts: list[Contrast]) -> list[Claim]:
        asked = (
            ("a", "better than before tuning", "to_base", ALL, ("better",)),
            ("c", "no quality lost to 4 bits", "to_baseline", ALL, ("equivalent", "better")),
            ("d", "gains on categories not trained on", "to_base", HELD_OUT, ("better",)),
        )
        found = []
        arms = [
            (variant, form)
            for variant in self.variants
            for form in CLAIMED_FORMS
            if VARIANTS[variant]["precision"] != "16bit"
        ]
        for variant, form in arms:
            for claim, text, kind, subset, words in asked:
                key = (kind, variant, form, *PRIMARY[:2], subset)
                c = next(
                    (c for c in contrasts if (c.kind, c.variant, c.form, c.task, c.metric, c.subset) == key),
                    None,
                )
                if c is None:
                    rest = (None, None, None, "not tested", "Not tested: no category was held out.")
                else:
                    holds = {"undecided": "undecided"}.get(c.verdict, "yes" if c.verdict in words else "no")
                    rest = ("/".join(PRIMARY[:2]), c.difference, c.verdict, holds, c.sentence)
                found.append(Claim(claim, text, variant, form, *rest))
        return found


def made_up_difference(value: float, half_width: float, *, items: int, seeds: int | None) -> Difference:
    """A difference whose p value is on the side of 0.05 on which its interval says that it is."""
    decided = abs(value) > half_width
    return Difference(
        value=value,
        low=value - half_width,
        high=value + half_width,
        confidence=0.95,
        standard_error=half_width / 2,
        degrees_of_freedom=12.0,
        p_value=0.0004 if decided else 0.34,
        seeds=seeds,
        items=items,
        groups=min(items, GROUPS),
        seed_variance_measured=bool(seeds and seeds > 1),
        detectable=1.4 * half_width,
        seed_share=0.2 if seeds and seeds > 1 else 0.0,
        low_freedom=min(items, GROUPS) - 1.0,
        high_freedom=min(items, GROUPS) - 1.0,
        effective_groups=0.8 * min(items, GROUPS),
        largest_weight=0.03,
        largest_share=0.04,
        skewness=0.4,
    )


def made_up_equivalence(one: Difference, margin: float) -> Equivalence:
    half = 0.8 * (one.high - one.low) / 2
    low, high = one.value - half, one.value + half
    return Equivalence(
        margin=margin, p_value=0.011 if -margin < low and high < margin else 0.6, low=low, high=high
    )


def _costs(variant: str, device: str) -> list[Cost]:
    def cost(metric, values, unit, higher_is_better, definition, spread=0.0):
        value = values[variant]
        quartiles = (value * (1 - spread), value * (1 + spread)) if spread else (None, None)
        return Cost(
            variant, metric, unit, higher_is_better, definition, value, *quartiles, value / values[BASELINE]
        )

    what = "resident set of the whole process" if device == "cpu" else "allocated by PyTorch on the GPU"
    own = "memory_before_load" if device == "cpu" else "peak_reserved"
    return [
        cost("training_speed", SPEED, "tokens/s", True,
             "tokens without padding, per second of an optimizer step", 0.08),
        cost("training_speed_padded", {v: s * 1.07 for v, s in SPEED.items()}, "tokens/s", True,
             "tokens with padding, per second of a step", 0.06),
        cost("step_time", {v: 560 / s for v, s in SPEED.items()}, "s", False,
             "one optimizer step on one micro-batch", 0.11),
        cost("load_time", {v: 1.3 for v in SPEED}, "s", False, "reading the weights, quantizing included"),
        cost("weights", WEIGHTS_GIB, "GiB", False,
             "the base's weights and quantization constants as they are held"),
        cost("memory_after_load", {v: 0.56 + w for v, w in WEIGHTS_GIB.items()}, "GiB", False,
             f"{what}, after the base was loaded"),
        cost("peak_memory", PEAK_GIB, "GiB", False, f"{what}, highest during the counted training steps"),
        cost(own, {v: 0.516 for v in SPEED}, "GiB", False, "another reading of a made-up run"),
    ]  # fmt: skip


def _over(processes: int, cost: Cost) -> Cost:
    """A cost as so many processes measured it."""
    if processes == 1:
        return cost
    several = replace(cost, processes=processes, low=None, high=None)
    if processes < 3:
        return several
    ends = {"mean_low": 0.98 * cost.value, "mean_high": 1.02 * cost.value}
    if cost.variant != BASELINE:
        ends |= {"ratio_low": 0.98 * cost.ratio_to_baseline, "ratio_high": 1.02 * cost.ratio_to_baseline}
    return replace(several, **ends)


def _speed_ups(variant: str, device: str) -> dict[str, bool]:
    """What a training of the default model records as in force."""
    full, int8 = VARIANTS[variant]["method"] == "full", VARIANTS[variant]["precision"] == "int8"
    return {
        "packing": not int8,
        "fused_adapters": not full,
        "shared_inputs": not full and not int8,
        "fused_layers": True,
        "fused_loss": True,
        "cuda_graphs": device == "cuda" and not full and not int8,
    }


def _trained(variant: str, seed: int, device: str) -> dict:
    return {
        "variant": variant,
        "seed": seed,
        "precision": _precision(variant, device),
        "speed_ups": _speed_ups(variant, device),
        "deterministic": device == "cpu",
        "rows": {"rows": 822, "rows_dropped": 0, "rows_cut": 3, "tokens": 46032, "tokens_in_loss": 15190,
                 "longest": 256, "bos_per_row": 1, "end_token_in_loss": True},
        "validation_rows": {"rows": 50, "rows_dropped": 0, "rows_cut": 0, "tokens_in_loss": 812},
        "order_sha256": f"{seed:064x}",
        "trainable_parameters": 4_884_480,
        "trainable_dtype": "float32",
        "adapted_modules": 210,
        "steps": STEPS,
        "tokens_seen": 10_431 + seed,
        "seconds": 81.2,
        "first_loss": BEFORE[variant],
        "last_loss": AFTER[variant],
        "validation_loss_before": BEFORE[variant],
        "validation_loss_after": AFTER[variant],
        "validation_tokens": 812,
        "kept_step": STEPS,
        "validation_loss_kept": AFTER[variant],
        "versions": VERSIONS,
    }  # fmt: skip


def _benchmark(variant: str, device: str, costs: list[Cost]) -> dict:
    kept = ("metric", "value", "unit", "higher_is_better", "definition", "low", "high")
    measurements = [{key: asdict(cost)[key] for key in kept} for cost in costs]
    return {
        "variant": variant,
        "precision": _precision(variant, device),
        "micro_batch_rows": 8,
        "warmup_steps": 1,
        "steps": 5,
        "seed": 55,
        "measurements": measurements,
        "processes": [
            {
                "measurements": measurements,
                "peak_gib_per_step": [PEAK_GIB[variant]] * 5,
                "seconds_per_step": [560 / SPEED[variant] + 0.1 * step for step in range(5)],
            }
        ]
        * costs[0].processes,
        "versions": VERSIONS,
    }


def _write_evaluation(
    folder: Path, variant: str, seed: int | None, forms: list[str], device: str, answers: _Answers
) -> None:
    command = "lm_eval run --model hf --model_args pretrained={},dtype=float32 --tasks holdout_loss"
    tasks = [(task, TASKS[task] or ITEMS) for task in answers.tasks]
    record = {"version": "1.0", "few_shot": 0, "chat_template": True, "bos_per_prompt": 1}
    write_json(
        folder / "result.json",
        {
            "variant": variant,
            "seed": seed,
            "forms": [
                {
                    "form": form,
                    "precision": _precision(variant, device, merged=form.startswith("merged")),
                    "adapters": 210 if form == "as_trained" else 0,
                    "adapter_dtype": "float32" if form == "as_trained" else None,
                    "metrics": [],
                    "harness": {
                        "name": "lm-evaluation-harness",
                        "version": "0.4.13",
                        "batch_rows": 16,
                        "batch_tokens": None,
                        "add_bos_token": False,
                        "tasks": [
                            {"task": task, "leaves": [task], "items": items, **record}
                            for task, items in tasks
                        ],
                        "commands": [command.format(folder / form)],
                    },
                    "seconds": 3.1,
                }
                for form in forms
            ],
            "versions": VERSIONS,
        },
    )
    write_jsonl(folder / "answers.jsonl", [row for form in forms for row in answers.of(variant, seed, form)])


def _write_divergence(folder: Path, comparison: Comparison, variant: str, seed: int) -> None:
    means = {d.form: d for d in comparison.divergences if (d.variant, d.metric) == (variant, "kl_mean")}
    forms = [
        {"form": form, "precision": {}, "items": d.items, "tokens": d.tokens, "mean": d.value, "same_top": 0.9,
         "seconds": 2.5}
        for form, d in means.items()
    ]  # fmt: skip
    about = {"variant": variant, "baseline": BASELINE, "seed": seed, "task": "holdout_loss", "split": "test"}
    write_json(folder / "result.json", {**about, "forms": forms, "versions": VERSIONS})
    write_text(folder / "tokens.parquet", "tokens that the page does not read\n")


def _write_curves(folder: Path, variant: str, seed: int) -> None:
    def loss(step: int) -> float:
        noise = 0.12 * math.sin(5.1 * step + 2.3 * seed)
        return AFTER[variant] + (BEFORE[variant] - AFTER[variant]) * math.exp(-step / 4) + noise

    history = [
        {"step": step, "epoch": step / 51, "loss": loss(step), "token_accuracy": 1.02 - loss(step) / 5.4,
         "learning_rate": 1e-3, "gradient_norm": 1.1, "tokens_per_second": 120.0}
        for step in range(1, STEPS + 1)
    ]  # fmt: skip
    validation = [
        {"step": step, "validation_loss": value, "validation_token_accuracy": 1.02 - value / 5.4}
        for step in (0, STEPS // 2, STEPS)
        for value in [AFTER[variant] + (BEFORE[variant] - AFTER[variant]) * math.exp(-step / 4) + 0.01 * seed]
    ]
    write_text(folder / "history.csv", pd.DataFrame(history).to_csv(index=False))
    write_text(folder / "validation.csv", pd.DataFrame(validation).to_csv(index=False))
