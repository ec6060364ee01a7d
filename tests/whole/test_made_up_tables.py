"""A precision and methods that this file makes up go through every stage to the page, and no other file knows of them."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
from edit_params import set_variants

from workflow import methods, params, precisions
from workflow.methods.full import FULL, Full
from workflow.methods.lora import LORA, Lora, adapted
from workflow.precisions.base import Facts, Loading, Precision, dtype_name
from workflow.runtime.errors import UserError

STEP = 1 / 256


def linears(model):
    """The linear layers besides the output head."""
    from torch import nn

    head = model.get_output_embeddings()
    return [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]


def on_grid(weight):
    return (weight / STEP).round() * STEP


def quantize(model, loading):
    for layer in linears(model):
        layer.weight.data = on_grid(layer.weight.data)
        layer.step = STEP
    return model


def dequantize(model, compute):
    for layer in linears(model):
        del layer.step
    return model.to(compute)


def facts(layer) -> Facts:
    is_on_grid = bool((on_grid(layer.weight) == layer.weight).all())
    return {"quantization": "grid", "storage": dtype_name(layer.weight.dtype), "on the grid": is_on_grid}


def expected_facts(loading: Loading) -> Facts:
    return {"quantization": "grid", "storage": dtype_name(loading.weights), "on the grid": True}


GRID = Precision(
    name="grid",
    label=lambda method, quantization: f"{method} on a coarse grid",
    short=lambda quantization: "Grid",
    in_words="multiples of 1/256",
    is_quantized=True,
    is_4_bit=False,
    can_be_double_quantized=False,
    can_be_trained=False,
    can_be_sharded=False,
    can_be_packed=True,
    can_be_fused=True,
    can_be_captured=True,
    can_be_merged=True,
    can_be_requantized=True,
    recognizes=lambda layer: hasattr(layer, "step"),
    expected_facts=expected_facts,
    facts=facts,
    storage=lambda layer: "a grid of float32",
    tensor_bytes=lambda inputs, outputs, quantization: ([4 * inputs * outputs], []),
    quantize=quantize,
    dequantize=dequantize,
    requantize=quantize,
)


@dataclass(frozen=True)
class Norms(Full):
    """Trains the norms' weights alone."""

    def wrap(self, model, settings):
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.dim() == 1)
        return model

    def expected(self, model, linears):
        return {name for name, _ in model.named_parameters() if "norm" in name}

    def trained_parameters(self, shape, settings):
        return shape.norm_parameters


@dataclass(frozen=True)
class PlainDora(Lora):
    """DoRA in PEFT's own layers, as if no file of the project knew of it."""

    def peft_config(self, settings):
        config = super().peft_config(settings)
        config.use_dora = True
        return config

    def adapter_parameters(self, shape, settings):
        outputs = sum(out for _, out in adapted(shape, settings).values())
        return super().adapter_parameters(shape, settings) + shape.layers * outputs


def register() -> None:
    precisions.register(GRID)
    shared = {field: getattr(FULL, field) for field in FULL.__dataclass_fields__}
    methods.register(
        Norms(**shared | {"name": "norms", "label": "norm tuning", "short": "norms", "tag": "norm-tuning", "passes": 2,
                          "trains": "the norms", "product": "A model whose norms were trained"})
    )  # fmt: skip
    shared = {field: getattr(LORA, field) for field in LORA.__dataclass_fields__}
    methods.register(
        PlainDora(**shared | {"name": "plain_dora", "label": "plain DoRA", "label_on_4_bits": "plain QDoRA",
                              "short": "plain DoRA", "tag": "plain-dora", "product": "A plain DoRA adapter",
                              "may_fuse_adapters": False, "may_graph": False,
                              "parts": (*LORA.parts, "lora_magnitude_vector.default.weight")})
    )  # fmt: skip


def test_an_unknown_method_is_refused_by_name():
    with pytest.raises(UserError, match="vera is not a known method; known are lora, dora, full"):
        methods.get("vera")


def test_an_unknown_precision_is_refused_by_name(tmp_path):
    from real_pipeline import TINY

    known = ", ".join(precisions.names())
    with pytest.raises(UserError, match=rf"^nf5 is not a known precision; known are {known} \(did"):
        precisions.get("nf5")
    path = tmp_path / "params.yaml"
    path.write_text(TINY.replace("precision: int8", "precision: grid"))
    *others, last = map(repr, precisions.names())
    sentence = f'variants.lora_int8.precision is "grid": input should be {", ".join(others)} or {last}'
    with pytest.raises(UserError, match=sentence):
        params.load(path)


@pytest.fixture(scope="module")
def pipeline(warm_python, tmp_path_factory) -> Path:
    """A finished pipeline of LoRA, the precision and the methods, in a clone whose processes import this file first."""
    from real_pipeline import TINY, clone, run

    folder, hook = tmp_path_factory.mktemp("clone"), tmp_path_factory.mktemp("hook")
    rows = [{"instruction": f"Say {n} words.", "response": " word" * (n % 9 + 1)} for n in range(80)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    digest = hashlib.sha256((folder / "rows.jsonl").read_bytes()).hexdigest()

    def change(content):
        columns = {"instruction": "instruction", "context": None, "response": "response", "category": None}
        content["dataset"] = {
            "source": "file", "path": "rows.jsonl", "sha256": digest, "format": "jsonl", "columns": columns,
        }  # fmt: skip
        content["variants"] |= {
            # At a smaller rate the norms, which are near 1, round back to where they began when saved in 16 bits.
            "norms": content["variants"]["full_16bit"]
            | {"method": "norms", "training": {"learning_rate": 0.05}},
            "dora_nf4": content["variants"]["qlora_nf4"] | {"method": "plain_dora"},
            "lora_grid": content["variants"]["lora_16bit"] | {"precision": GRID.name},
        }
        set_variants(content, ["lora_16bit", "norms", "dora_nf4", "lora_grid"])
        content["benchmark"]["grid"] |= {
            "micro_batch_rows": [1],
            "gradient_checkpointing": [False],
            "repeats": 1,
        }

    clone(folder, TINY, change)
    warm_python.enter(folder)
    (hook / "sitecustomize.py").write_text(
        f"import {Path(__file__).stem}\n{Path(__file__).stem}.register()\n"
    )
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (hook, folder, *Path(__file__).parents[:2])))
    try:
        run(folder, "dvc", "repro")
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return folder


def result(folder: Path, variant: str) -> dict:
    return json.loads((folder / "results/train" / variant / "1/result.json").read_text())


def test_made_up_methods_train_what_they_say(pipeline):
    norms, dora, lora = (result(pipeline, name) for name in ("norms", "dora_nf4", "lora_16bit"))
    assert 0 < norms["trainable_parameters"] < lora["trainable_parameters"] < dora["trainable_parameters"]
    assert norms["adapted_modules"] == 0 and dora["adapted_modules"] == lora["adapted_modules"] > 0
    assert not dora["speed_ups"]["fused_adapters"] and lora["speed_ups"]["fused_adapters"]
    for run in (norms, dora):
        assert run["validation_loss_after"] != run["validation_loss_before"]


def test_made_up_methods_are_served_in_their_own_forms(pipeline):
    scores = json.loads((pipeline / "results/compare/comparison.json").read_text())["scores"]
    forms = {name: {s["form"] for s in scores if s["variant"] == name} for name in ("norms", "dora_nf4")}
    assert forms["norms"] == {"base", "as_trained"}
    assert forms["dora_nf4"] == {"base", "as_trained", "merged_16bit", "merged_dequantized", "requantized"}


def test_made_up_methods_are_called_by_their_labels_on_the_page(pipeline):
    page = (pipeline / "report/index.html").read_text()
    assert "16-bit norm tuning" in page and "4-bit plain QDoRA (NF4)" in page


def test_a_made_up_precision_goes_through_every_stage_to_the_page(pipeline):
    comparison = json.loads((pipeline / "results/compare/comparison.json").read_text())
    precision = comparison["precisions"]["lora_grid"]
    assert (precision["base"], precision["storage"]) == ("grid", "a grid of float32")
    assert precision["quantized_modules"] == precision["linear_modules"] == 7 * 4
    forms = {score["form"] for score in comparison["scores"] if score["variant"] == "lora_grid"}
    assert forms == {"base", "as_trained", "merged_16bit", "merged_dequantized", "requantized"}
    assert "LoRA on a coarse grid" in (pipeline / "report/index.html").read_text()
