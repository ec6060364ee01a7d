"""Finished studies as the comparisons of bases read them: items, records of trainings, params and the base's record."""

from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import pandas as pd

from workflow.params import editing
from workflow.runtime.files import read_json, write_json
from workflow.runtime.paths import COMPARISON, MODEL_SOURCE, PARAMS
from workflow.tools.moved_studies import ITEMS

BASELINE = "lora_16bit"
SEEDS, ROWS = (1, 2, 3), 150


def record(variant: str, seed: int, device: str = "Made-up GPU") -> dict:
    rows = {"rows": 700, "rows_dropped": 0, "rows_cut": 0, "tokens_in_loss": 70000}
    return {
        "variant": variant, "seed": seed, "deterministic": False, "rows": rows, "validation_rows": rows,
        "order_sha256": f"{seed}" * 64, "trainable_parameters": 1, "trainable_dtype": "float32", "adapted_modules": 1,
        "steps": 132, "tokens_seen": 200000, "seconds": 1.0, "versions": {"torch": "2.13.0"},
        "precision": {"base": "nf4", "double_quantization": True, "storage": "nf4", "compute": "bfloat16", "device": "cuda",
                      "device_name": device, "quantized_modules": 210, "linear_modules": 210, "weights_gib": 0.2},
    }  # fmt: skip


def scores(
    gaps: Collection[str],
    noise: np.random.Generator,
    loss_of: Callable[[str, int | None, np.ndarray | float], tuple[float, np.ndarray | float]],
) -> pd.DataFrame:
    """Scores of the baseline and of the variants in `gaps`, untrained (seed None) and with each seed.

    Args:
        noise: draws that of each score.
        loss_of: what a variant, a seed and the variant's own noise of the rows add to a row's loss: for all variants alike,
            and for this one.
    """
    rows = np.random.default_rng(0)
    tokens, level = rows.integers(5, 200, ROWS).astype(float), rows.normal(2.0, 0.5, ROWS)
    own = {name: rows.normal(0, 0.02, ROWS) for name in gaps}
    frames = []
    for variant in (BASELINE, *gaps):
        for seed in (None, *SEEDS):
            shift, gap = loss_of(variant, seed, own.get(variant, 0.0))
            loss = level + shift + gap
            frames.append(
                pd.DataFrame(
                    {"task": "holdout_loss", "metric": "nats_per_token", "leaf": "holdout_loss", "item": range(ROWS),
                     "category": "made up", "held_out": False, "group": [f"g{row // 2}" for row in range(ROWS)],
                     "numerator": tokens * (loss + noise.normal(0, 0.01, ROWS)), "denominator": tokens, "variant": variant,
                     "seed": seed, "form": "base" if seed is None else "as_trained"}
                )
            )  # fmt: skip
    return pd.concat(frames).astype({"seed": "float64"})


def write_finished(
    folder: Path, *, text: str, source: dict, gaps: Collection[str], table: pd.DataFrame
) -> Path:
    """Write what is read of a study: its params (`text`), the record of its base, its trainings and its items."""
    (folder / ITEMS).parent.mkdir(parents=True)
    (folder / MODEL_SOURCE).parent.mkdir(parents=True)
    (folder / PARAMS).write_text(text)
    write_json(folder / MODEL_SOURCE, source)
    trained = {name: [record(name, seed) for seed in SEEDS] for name in (BASELINE, *gaps)}
    write_json(folder / COMPARISON, {"training": trained})
    table.to_parquet(folder / ITEMS, index=False)
    return folder


def edit_params(folder: Path, section: str, key: str, value) -> None:
    path = folder / PARAMS
    path.write_text(editing.with_value(path.read_text(), section, key, value))


def edit_training(folder: Path, **changes) -> None:
    content = read_json(folder / COMPARISON)
    content["training"]["qlora_fp4"][0] |= changes
    write_json(folder / COMPARISON, content)


def edit_source(folder: Path, **changes) -> None:
    write_json(folder / MODEL_SOURCE, read_json(folder / MODEL_SOURCE) | changes)
