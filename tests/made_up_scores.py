"""Made-up scores whose differences are known, as the stages before compare write them."""

from pathlib import Path

import numpy as np
import pandas as pd
from edit_params import put
from ruamel.yaml import YAML

from workflow import params
from workflow.runtime.files import write_json
from workflow.runtime.paths import (
    benchmark_file,
    divergence_folder,
    evaluate_base_folder,
    evaluate_folder,
    train_folder,
)

ITEMS, SEEDS = 120, [1, 2, 3]
LOSS, CHOICE = "holdout_loss/nats_per_token", "response_choice/acc"
PRECISION = {
    "base": "16bit",
    "device": "cpu",
    "device_name": "a CPU, 2 threads",
    "storage": "float32",
    "compute": "float32",
    "double_quantization": False,
    "quantized_modules": 0,
    "linear_modules": 210,
    "weights_gib": 0.5,
}
VERSIONS = {"Python": "3.11.7", "torch": "2.13.0", "trl": "1.16.0", "lm-eval": "0.4.13", "scipy": "1.17.1"}
# Nats per token: what each arm's loss is on average. The margin is 0.02.
MEANS = {
    ("lora_16bit", "base"): 2.5,
    ("lora_16bit", "as_trained"): 2.0,
    ("lora_16bit", "merged_16bit"): 2.0,
    ("qlora_nf4_dq", "base"): 2.8,
    ("qlora_nf4_dq", "as_trained"): 2.1,
    ("qlora_nf4_dq", "merged_16bit"): 2.0,
    ("qlora_nf4_dq", "merged_dequantized"): 2.1,
    ("qlora_nf4_dq", "requantized"): 2.4,
}


def ask(folder: Path, **changes) -> params.Params:
    """The tiny preset with three seeds and a repair, as params.yaml of a folder."""
    content = YAML(typ="safe").load(params.complete_text("tiny"))
    content["experiment"]["seeds"] = SEEDS
    content["sample"]["held_out_categories"] = ["far"]
    content["evaluation"]["tasks"].pop("holdout_generation")
    content["comparison"] |= {
        "margins": {LOSS: 0.02, CHOICE: 0.03},
        "family": {"kinds": ["to_baseline", "form"], "metrics": [LOSS]},
        "repairs": {"merge": {"faulty": "qlora_nf4_dq/requantized", "repaired": "qlora_nf4_dq"}},
    }
    for path, value in changes.items():
        put(path.replace("__", "."), value)(content)
    with (folder / "params.yaml").open("w") as file:
        YAML().dump(content, file)
    return params.load(folder / "params.yaml")


def items_of(variant: str, form: str, seed: int | None) -> pd.DataFrame:
    """Scores of one arm and seed: every arm has the same hard and easy items, plus noise of its own."""
    random = np.random.default_rng([len(variant), len(form), seed or 0])
    shared = np.random.default_rng(7)
    tokens = shared.integers(5, 40, ITEMS).astype(float)
    hard = shared.normal(0, 0.3, ITEMS)
    far = np.arange(ITEMS) % 4 == 0
    loss = MEANS[variant, form] + hard + random.normal(0, 0.01, ITEMS)
    right = (shared.random(ITEMS) < 0.5) ^ (random.random(ITEMS) < 0.05)
    about = {
        "leaf": "x",
        "item": [str(i) for i in range(ITEMS)],
        "category": np.where(far, "far", "near"),
        "held_out": far,
        "group": [f"instruction {i // 2}" for i in range(ITEMS)],
        "variant": variant,
        "seed": seed,
        "form": form,
    }
    frames = [
        pd.DataFrame(about | {"task": "holdout_loss", "metric": "nats_per_token", "numerator": loss * tokens,
                              "denominator": tokens}),
        pd.DataFrame(about | {"task": "response_choice", "metric": "acc", "numerator": right.astype(float),
                              "denominator": 1.0}),
    ]  # fmt: skip
    return pd.concat(frames).astype({"seed": "Int64"})


def write_evaluation(folder: Path, variant: str, seed: int | None, forms: list[str]) -> None:
    folder.mkdir(parents=True)
    frames = {form: items_of(variant, form, seed) for form in forms}
    pd.concat(frames.values()).to_parquet(folder / "items.parquet")

    def metric(frame, task, name, unit, higher):
        rows = frame[frame["task"] == task]
        value = float(rows["numerator"].sum() / rows["denominator"].sum())
        return {"task": task, "metric": name, "value": value, "unit": unit, "higher_is_better": higher,
                "split": "test", "items": len(rows), "per_item": True}  # fmt: skip

    task = {"version": "1.0", "items": ITEMS, "few_shot": 0, "items_sha256": "a" * 64, "bos_per_prompt": 1}
    about = {
        "precision": PRECISION,
        "harness": {
            "name": "lm-evaluation-harness",
            "version": "0.4.13",
            "batch_rows": 16,
            "batch_tokens": None,
            "add_bos_token": False,
            "chat_template_sha256": "c" * 64,
            "tasks": [task | {"task": name} for name in ("holdout_loss", "response_choice")],
            "commands": [f"lm_eval {form}" for form in forms],
        },
    }
    found = [
        {
            **about,
            "form": form,
            "metrics": [
                metric(frame, "holdout_loss", "nats_per_token", "nats per token", False),
                metric(frame, "response_choice", "acc", "share of items", True),
                {"task": "response_choice", "metric": "length", "value": 7.0, "unit": "tokens",
                 "higher_is_better": None, "split": "test", "items": 3, "per_item": False},
            ],
        }
        for form, frame in frames.items()
    ]  # fmt: skip
    write_json(
        folder / "result.json", {"variant": variant, "seed": seed, "forms": found, "versions": VERSIONS}
    )


def tokens_of(variant: str, form: str, seed: int) -> pd.DataFrame:
    """Divergences of one arm: exponential at each token, larger where its loss is farther from the baseline's."""
    random = np.random.default_rng([len(variant), len(form), seed, 5])
    shared = np.random.default_rng(7)
    tokens = shared.integers(5, 40, ITEMS)
    item = np.repeat(np.arange(ITEMS), tokens)
    scale = 0.01 + MEANS[variant, form] - MEANS["lora_16bit", "as_trained"]
    divergence = random.exponential(scale, len(item)).astype(np.float32)
    return pd.DataFrame(
        {
            "leaf": "x",
            "item": item.astype(str),
            "category": None,
            "held_out": False,
            "group": [f"instruction {i // 2}" for i in item],
            "position": np.concatenate([np.arange(count) for count in tokens]),
            "divergence": divergence,
            "same_top": random.random(len(item)) > scale,
            "form": form,
        }
    )


def write_divergence(variant: str, seed: int, forms: list[str]) -> None:
    folder = divergence_folder(variant, seed)
    folder.mkdir(parents=True)
    tables = {form: tokens_of(variant, form, seed) for form in forms}
    pd.concat(tables.values()).to_parquet(folder / "tokens.parquet", index=False)
    found = [
        {"form": form, "precision": PRECISION, "items": ITEMS, "tokens": len(table), "seconds": 1.0,
         "mean": float(table["divergence"].mean()), "same_top": float(table["same_top"].mean())}
        for form, table in tables.items()
    ]  # fmt: skip
    about = {
        "variant": variant,
        "baseline": "lora_16bit",
        "seed": seed,
        "task": "holdout_loss",
        "split": "test",
    }
    write_json(folder / "result.json", {**about, "forms": found, "versions": VERSIONS})


def write_results(folder: Path) -> None:
    """Write params.yaml and everything that the stages before wrote into a folder, the working directory."""
    asked = ask(folder)
    for place, variant in enumerate(asked.experiment.variants):
        write_evaluation(evaluate_base_folder(variant), variant, None, ["base"])
        seconds = [2.0 + place + step / 10 for step in range(5)]
        measurements = [
            {"metric": "peak_memory", "value": 3.0 - place, "unit": "GiB", "higher_is_better": False,
             "definition": "made up", "low": None, "high": None},
            {"metric": "step_time", "value": 2.2 + place, "unit": "s", "higher_is_better": False,
             "definition": "made up", "low": 2.1 + place, "high": 2.3 + place},
        ]  # fmt: skip
        write_json(
            benchmark_file(variant),
            {
                "precision": PRECISION,
                "versions": VERSIONS,
                "micro_batch_rows": 4,
                "warmup_steps": 1,
                "steps": 5,
                "measurements": measurements,
                "processes": [{"measurements": measurements, "seconds_per_step": seconds,
                               "peak_gib_per_step": [3.0 - place + step / 1000 for step in range(5)]}],
            },
        )  # fmt: skip
        for seed in SEEDS:
            write_evaluation(evaluate_folder(variant, seed), variant, seed, asked.forms_of(variant))
            forms = [f for f in asked.forms_of(variant) if (variant, f) != ("lora_16bit", "as_trained")]
            write_divergence(variant, seed, forms)
            facts = {
                "variant": variant,
                "deterministic": True,
                "trainable_parameters": 100,
                "trainable_dtype": "float32",
                "adapted_modules": 210,
                "seconds": 1.0,
                "steps": 3,
                "rows": counted(rows=9, tokens_in_loss=4),
                "validation_rows": counted(rows=2, tokens_in_loss=1),
                "tokens_seen": 5,
                "order_sha256": str(seed) * 64,
                "precision": PRECISION,
                "versions": VERSIONS,
            }
            write_json(train_folder(variant, seed) / "result.json", {"seed": seed, **facts})
            write_validation(variant, seed, [2.6, 2.3, 2.1, 2.0])


def counted(*, rows: int, tokens_in_loss: int) -> dict:
    return {"rows": rows, "rows_dropped": 0, "rows_cut": 0, "tokens_in_loss": tokens_in_loss}


def write_validation(variant: str, seed: int, losses: list[float], *, every: int = 10) -> None:
    """Losses of the validation rows at the steps 0, 10, 20 and so on, a little apart from seed to seed."""
    table = pd.DataFrame({"step": range(0, every * len(losses), every), "validation_loss": losses})
    table["validation_loss"] += 0.01 * seed
    table.to_csv(train_folder(variant, seed) / "validation.csv", index=False)
