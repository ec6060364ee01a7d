"""A run's files as the stages write them, with chosen numbers, so that what the page says can be checked."""

import io
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
from ruamel.yaml import YAML

from workflow.comparison import Comparison, Cost, Quality
from workflow.files import write_json, write_jsonl, write_text
from workflow.paths import (
    COMPARE,
    DATASET_SOURCE,
    MODEL_SOURCE,
    SAMPLE,
    benchmark_file,
    evaluate_base_folder,
    evaluate_folder,
    train_folder,
)
from workflow.statistics import Difference

PROJECT = Path(__file__).resolve().parents[1]
VERSIONS = {"Python": "3.11.7", "torch": "2.13.0+cpu"}
BASELINE = "lora_16bit"
VARIANTS = {
    "lora_16bit": {"method": "lora", "precision": "16bit", "double_quantization": False},
    "qlora_nf4": {"method": "lora", "precision": "nf4", "double_quantization": False},
    "qlora_nf4_dq": {"method": "lora", "precision": "nf4", "double_quantization": True},
    "qlora_fp4": {"method": "lora", "precision": "fp4", "double_quantization": False},
    "lora_int8": {"method": "lora", "precision": "int8", "double_quantization": False},
    "full_16bit": {"method": "full", "precision": "16bit", "double_quantization": False},
}
BEFORE = {  # nats per token of the untouched base
    "lora_16bit": 3.0712, "qlora_nf4": 3.2104, "qlora_nf4_dq": 3.2218, "qlora_fp4": 3.4021,
    "lora_int8": 3.0741, "full_16bit": 3.0712,
}  # fmt: skip
AFTER = {  # of the mean over the seeds
    "lora_16bit": 2.2034, "qlora_nf4": 2.2571, "qlora_nf4_dq": 2.2619, "qlora_fp4": 2.3310,
    "lora_int8": 2.2041, "full_16bit": 2.1802,
}  # fmt: skip
HALF_WIDTH = 0.0187  # of every interval of a difference to the baseline
BITS_PER_NAT = 0.3321  # bits per byte for one nat per token
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
    title: str = "What does 4-bit fine-tuning cost?",
    training: dict[str, dict] | None = None,
) -> Comparison:
    """Write params.yaml, requirements.lock and every stage's results into the working directory.

    Args:
        device: cpu or cuda; decides which memory was measured and in what the weights are held.
        model: wheel or random.
        training: by variant, the keys of `training` that it changes.

    Returns:
        The comparison, as results/compare/comparison.json holds it.
    """
    _write_params(variants, seeds, model=model, title=title, answers=len(rows), training=training or {})
    write_text(Path("requirements.lock"), "torch==2.13.0\n")
    write_json(MODEL_SOURCE, _model_source(model))
    write_json(DATASET_SOURCE, {"source": "wheel", "package": "made-up-corpus", "version": "1.0",
                                "member": "data", "sha256": "d" * 64, "rows": 2026})  # fmt: skip
    write_json(SAMPLE / "metrics.json", {"test_rows": ITEMS, "validation_rows": 44, "train_rows": 822})
    comparison = _comparison(variants, seeds, device)
    write_json(COMPARE / "comparison.json", comparison.as_dict())
    answers = [
        {"id": index, "context": "", "category": "made up", "stopped": index != 1, **asdict(row)}
        for index, row in enumerate(rows)
    ]
    for variant in variants:
        _write_evaluation(evaluate_base_folder(variant), variant, None, device, answers)
        measured = [c for c in comparison.cost if c.variant == variant]
        write_json(benchmark_file(variant), _benchmark(variant, device, measured))
        for index, seed in enumerate(seeds):
            _write_evaluation(evaluate_folder(variant, seed), variant, seed, device, answers)
            write_json(train_folder(variant, seed) / "result.json", comparison.training[variant][index])
            _write_curves(train_folder(variant, seed), variant, seed)
    return comparison


def _write_params(variants, seeds, *, model: str, title: str, answers: int, training: dict) -> None:
    """The preset `tiny`, which has every key that params need, with the chosen run put over it."""
    yaml = YAML(typ="safe", pure=True)
    chosen = yaml.load((PROJECT / "workflow" / "presets" / "tiny.yaml").read_text(encoding="utf-8"))
    chosen["experiment"] = {"variants": list(variants), "baseline": BASELINE, "seeds": list(seeds)}
    if model == "wheel":
        chosen["model"] = {"source": "wheel", "package": "made-up-model", "version": "0.1.2",
                           "sha256": "a" * 64, "member": "folder/Made-Up-135M.Q4_1.gguf",
                           "chat_template": "model"}  # fmt: skip
    chosen["dataset"] = {"source": "wheel", "package": "made-up-corpus", "version": "1.0",
                         "sha256": "d" * 64, "member": "data", "format": "chatterbot",
                         "columns": None}  # fmt: skip
    chosen["training"] |= {"epochs": None, "steps": STEPS, "batch_rows": 16, "micro_batch_rows": 8,
                           "learning_rate": 1e-3}  # fmt: skip
    chosen["variants"] = {
        name: {**variant, "compute_dtype": None, "training": training.get(name, {})}
        for name, variant in VARIANTS.items()
    }
    chosen["evaluation"] |= {"answers": answers, "answer_tokens": 48}
    chosen["comparison"] = {"confidence": 0.95, "resamples": 9999, "seed": 55}
    chosen["report"] = {"title": title}
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


def _precision(variant: str, device: str) -> dict:
    base, doubly = VARIANTS[variant]["precision"], VARIANTS[variant]["double_quantization"]
    compute = "float32" if device == "cpu" else "bfloat16"
    return {
        "base": base,
        "double_quantization": doubly,
        "storage": {"16bit": compute, "int8": "int8"}.get(base, f"{base} (4 bits)"),
        "compute": compute,
        "device": device,
        "device_name": DEVICES[device],
        "quantized_modules": 0 if base == "16bit" else 210,
        "linear_modules": 210,
        "weights_gib": WEIGHTS_GIB[variant],
    }


def _comparison(variants, seeds, device: str) -> Comparison:
    return Comparison(
        baseline=BASELINE,
        seeds=list(seeds),
        confidence=0.95,
        resamples=9999,
        precisions={variant: _precision(variant, device) for variant in variants},
        training={variant: [_trained(variant, seed, device) for seed in seeds] for variant in variants},
        quality=[
            _quality(variant, seeds, metric, unit, scale)
            for variant in variants
            for metric, unit, scale in (
                ("nats_per_token", "nats per token", 1),
                ("bits_per_byte", "bits per byte", BITS_PER_NAT),
            )
        ],
        cost=[cost for variant in variants for cost in _costs(variant, device)],
    )


def _quality(variant: str, seeds, metric: str, unit: str, scale: float) -> Quality:
    after, before = scale * AFTER[variant], scale * BEFORE[variant]
    middle = (len(seeds) - 1) / 2
    by_training, to_baseline = after - before, after - scale * AFTER[BASELINE]
    return Quality(
        variant=variant,
        task="holdout_loss",
        metric=metric,
        unit=unit,
        higher_is_better=False,
        split="test",
        items=ITEMS,
        groups=GROUPS,
        form="as_trained",
        value=after,
        per_seed={str(seed): after + scale * 0.011 * (index - middle) for index, seed in enumerate(seeds)},
        base_value=before,
        to_base=Difference(by_training, by_training - scale * 0.09, by_training + scale * 0.08),
        to_baseline=None
        if variant == BASELINE
        else Difference(to_baseline, to_baseline - scale * HALF_WIDTH, to_baseline + scale * HALF_WIDTH),
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
        cost("load_time", {v: 1.3 for v in SPEED}, "s", False, "reading the weights, quantising included"),
        cost("weights", WEIGHTS_GIB, "GiB", False,
             "the base's weights and quantisation constants as they are held"),
        cost("memory_after_load", {v: 0.56 + w for v, w in WEIGHTS_GIB.items()}, "GiB", False,
             f"{what}, after the base was loaded"),
        cost("peak_memory", PEAK_GIB, "GiB", False, f"{what}, highest during the counted training steps"),
        cost(own, {v: 0.516 for v in SPEED}, "GiB", False, f"{own} of a made-up run"),
    ]  # fmt: skip


def _trained(variant: str, seed: int, device: str) -> dict:
    return {
        "variant": variant,
        "seed": seed,
        "precision": _precision(variant, device),
        "rows": {"rows": 822, "rows_dropped": 0, "rows_cut": 3, "tokens": 46032, "tokens_in_loss": 15190,
                 "longest": 256, "bos_per_row": 1},
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
        "versions": VERSIONS,
    }  # fmt: skip


def _benchmark(variant: str, device: str, costs: list[Cost]) -> dict:
    kept = ("metric", "value", "unit", "higher_is_better", "definition", "low", "high")
    return {
        "variant": variant,
        "precision": _precision(variant, device),
        "micro_batch_rows": 8,
        "warmup_steps": 1,
        "steps": 5,
        "seed": 55,
        "measurements": [{key: asdict(cost)[key] for key in kept} for cost in costs],
        "versions": VERSIONS,
    }


def _write_evaluation(folder: Path, variant: str, seed: int | None, device: str, answers: list[dict]) -> None:
    metrics = [{"task": "holdout_loss", "metric": "nats_per_token", "value": AFTER[variant],
                "unit": "nats per token", "higher_is_better": False, "split": "test",
                "items": ITEMS}]  # fmt: skip
    harness = {
        "name": "lm-evaluation-harness",
        "version": "0.4.13",
        "batch_rows": 16,
        "chat_template": True,
        "commands": [f"lm_eval run --model hf --model_args pretrained={folder} --tasks holdout_loss"],
    }
    write_json(
        folder / "result.json",
        {
            "variant": variant,
            "seed": seed,
            "form": "base" if seed is None else "as_trained",
            "precision": _precision(variant, device),
            "metrics": metrics,
            "harness": harness,
            "versions": VERSIONS,
        },
    )
    write_jsonl(folder / "answers.jsonl", answers)


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
