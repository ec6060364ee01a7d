"""With `keep: best` the weights that are saved are those of the lowest validation loss, and they are counted and named."""

import csv
from pathlib import Path

import pytest
import torch
from conftest import CPU
from peft import PeftModel
from plain_loss import plain_loss
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from workflow import methods, params, precisions
from workflow.models import load
from workflow.training import train

# So high a rate, on so few rows, that every curve turns up.
TURNING = {"learning_rate": 1e-2, "schedule": "constant", "steps": 7, "validations": 7, "rows": 8}
CASES = {
    "lora_16bit": {"steps": 5},
    "qlora_nf4_dq": {},
    "qlora_nf4_dq_merge_aware": {},
    "dora_16bit": {"steps": 5},
    "lora_pissa": {"steps": 5, "initialization": "pissa"},
    "loftq_nf4_dq": {"steps": 5, "initialization": "loftq"},
    "full_16bit": {"learning_rate": 0.1},
}


def run(tiny, tiny_model, splits, folder: Path, *, name="lora_16bit", **changes) -> train.Trained:
    training = tiny.training.model_copy(update=TURNING | changes)
    return train.train(
        params.Run(name, tiny.variants[name], 1, training, CPU),
        model_folder=tiny_model,
        train_rows=splits["train"],
        validation_rows=splits["validation"],
        folder=folder,
    )


def curve(folder: Path) -> dict[int, float]:
    """The validation loss of each scored step."""
    with (folder / "validation.csv").open() as file:
        return {int(line["step"]): float(line["validation_loss"]) for line in csv.DictReader(file)}


def loaded(tiny, tiny_model, name: str, weights: Path):
    """What was saved, by plain PEFT or transformers."""
    if name == "full_16bit":
        return AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32)
    base, _ = load.load_base(tiny_model, tiny.variants[name], hardware=CPU)
    model = PeftModel.from_pretrained(base, weights).eval()
    if name == "qlora_nf4_dq_merge_aware":  # multiplies with what its sum is quantized to
        methods.get("lora_merge_aware").attach(model, precisions.get("nf4"))
    return model


@pytest.mark.parametrize("name", CASES)
def test_the_best_weights_are_saved_and_not_the_last(name, tiny, tiny_model, splits, tmp_path):
    changes, folders = CASES[name], {keep: tmp_path / keep for keep in ("best", "last")}
    for folder in folders.values():
        folder.mkdir()
    result = run(tiny, tiny_model, splits, folders["best"], name=name, keep="best", **changes)
    losses = curve(folders["best"])
    lowest = min(losses, key=losses.get)
    assert 0 < lowest < result.steps  # or nothing is tested
    assert (result.kept_step, result.validation_loss_kept) == (lowest, losses[lowest])
    assert result.validation_loss_after == losses[result.steps] > losses[lowest]
    model = loaded(tiny, tiny_model, name, folders["best"] / "weights")
    scored = plain_loss(model, tiny_model, splits["validation"])
    tolerance = 0.01 if name == "full_16bit" else 1e-5  # a full model is saved in 16 bits
    assert scored == pytest.approx(losses[lowest], abs=tolerance)
    if name not in ("lora_16bit", "full_16bit"):
        return
    # The training is the same whatever is kept: it alone decides the curve.
    last = run(tiny, tiny_model, splits, folders["last"], name=name, keep="last", **changes)
    assert curve(folders["last"]) == losses
    assert (last.kept_step, last.validation_loss_kept) == (last.steps, last.validation_loss_after)
    files = [
        load_file(next(folder.glob("weights/*.safetensors"))) for folder in (folders["best"], folders["last"])
    ]
    assert any(not torch.equal(weight, files[1][key]) for key, weight in files[0].items())


def test_of_equal_losses_the_first_scored_step_is_kept(tiny, tiny_model, splits, tmp_path):
    """At a rate that changes no loss, every step is as good, the untrained weights of step 0 included."""
    result = run(tiny, tiny_model, splits, tmp_path, keep="best", learning_rate=1e-30, steps=5, validations=2)
    assert len(set(curve(tmp_path).values())) == 1
    assert list(curve(tmp_path)) == [0, 2, 4, 5]
    assert result.kept_step == 2
