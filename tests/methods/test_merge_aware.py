"""Merge-aware LoRA against dense arithmetic of its own, and what is served against what was trained."""

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from conftest import CPU, random_adapter
from peft import LoraConfig, get_peft_model
from pydantic import ValidationError
from torch import nn

from workflow import methods, params, precisions
from workflow.cost import memory
from workflow.data import cards, lineage
from workflow.evaluation import commands, forms
from workflow.methods.merged_layers import adapted_layers
from workflow.models import load
from workflow.precisions import bnb_4bit
from workflow.runtime.forms import AS_TRAINED, REQUANTIZED
from workflow.training import train

SPREAD, ON_LEVELS = "lora_merge_aware", "lora_merge_aware_on_levels"
IN, OUT, RANK, SCALING = 128, 96, 4, 2.0
BASES = [("nf4", False), ("nf4", True), ("fp4", False), ("fp4", True)]


class Layers(nn.Module):
    """One quantized layer, under a name that LoRA finds."""

    def __init__(self, kind: str, double_quantization: bool, *, bias: bool):
        super().__init__()
        self.proj = bnb.nn.Linear4bit(
            IN,
            OUT,
            bias=bias,
            compute_dtype=torch.float32,
            quant_type=kind,
            compress_statistics=double_quantization,
        )
        self.proj.weight.data.normal_(std=0.05)  # as trained weights are; quantized by the next line
        self.proj.to("cpu")


def layer(kind: str, double_quantization: bool, *, bias: bool = True, method: str = SPREAD) -> nn.Module:
    """An adapted layer with a random adapter, computing as the method trains it."""
    load.use_exact_cpu_kernels()
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=SCALING * RANK, target_modules=["proj"], init_lora_weights=False)
    model = get_peft_model(Layers(kind, double_quantization, bias=bias), config)
    methods.get(method).attach(model, precisions.get(kind))
    (adapted,) = adapted_layers(model)
    return adapted


def levels_of(kind: str) -> np.ndarray:
    return np.unique(bnb.functional.get_4bit_type(kind, device="cpu").double().numpy())


def base_weight(adapted: nn.Module) -> np.ndarray:
    base = adapted.base_layer
    return bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state).double().numpy()


def spread(weight: np.ndarray, kind: str) -> np.ndarray:
    """The weights, one by one, at the places of Weyl's sequence within their cells."""
    levels = levels_of(kind)
    blocks = weight.reshape(-1, 64)
    moved = np.empty_like(blocks)
    for row, block in enumerate(blocks):
        largest = np.abs(block).max()
        for column, value in enumerate(block):
            index = np.abs(levels - value / largest).argmin()
            place = (64 * row + column) * 0x9E3779B9 % 2**32 / 2**32
            if index in (0, len(levels) - 1):
                moved[row, column] = levels[index] * largest
                continue
            low, high = ((levels[index] + levels[index + step]) / 2 for step in (-1, 1))
            moved[row, column] = (low + (1e-4 + 0.9998 * place) * (high - low)) * largest
    return moved.reshape(weight.shape)


def dense(adapted: nn.Module, start: np.ndarray) -> np.ndarray:
    """D + s B A [out, in] in float64."""
    a, b = (part["default"].weight.detach().double().numpy() for part in (adapted.lora_A, adapted.lora_B))
    return start + SCALING * b @ a


def rounded(weight: np.ndarray, kind: str) -> np.ndarray:
    """The nearest level of each weight, in blocks of 64 whose largest is the unit (Dettmers et al. 2023, section 3)."""
    levels = levels_of(kind)
    blocks = weight.reshape(-1, 64)
    largest = np.abs(blocks).max(1, keepdims=True)
    nearest = np.abs(blocks[..., None] / largest[..., None] - levels).argmin(-1)
    return (levels[nearest] * largest).reshape(weight.shape)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("method", [SPREAD, ON_LEVELS])
@pytest.mark.parametrize("scoring", [False, True])
def test_a_layer_multiplies_by_the_weight_rounded_with_its_adapter(kind, method, scoring):
    adapted = layer(kind, False, method=method)
    start = base_weight(adapted) if method == ON_LEVELS else spread(base_weight(adapted), kind)
    x = torch.randn(3, 5, IN)
    with torch.set_grad_enabled(not scoring):
        y = adapted(x)
    expected = x.double().numpy() @ rounded(dense(adapted, start), kind).T
    expected += adapted.base_layer.bias.detach().double().numpy()
    np.testing.assert_allclose(y.detach().numpy(), expected, rtol=0, atol=2e-5)
    plain = x.double().numpy() @ dense(adapted, start).T + adapted.base_layer.bias.detach().double().numpy()
    assert np.abs(y.detach().numpy() - plain).max() > 0.05  # the rounding is there


@pytest.mark.parametrize(("kind", "double_quantization"), BASES)
def test_a_spread_base_is_quantized_to_the_base_and_lies_all_over_its_cells(kind, double_quantization):
    adapted, precision = layer(kind, double_quantization), precisions.get(kind)
    base = adapted.base_layer
    moved = precision.spread_weight(base)
    np.testing.assert_allclose(moved.numpy(), spread(base_weight(adapted), kind), rtol=0, atol=1e-6)
    found, expected = (
        precision.stored_weight(precision.quantized_weight(base, weight), torch.float32)
        for weight in (moved, torch.tensor(base_weight(adapted), dtype=torch.float32))
    )
    assert torch.equal(found, expected)


def test_a_large_layer_is_spread_piece_by_piece_as_whole(monkeypatch):
    base, precision = layer("nf4", True).base_layer, precisions.get("nf4")
    whole = precision.spread_weight(base)
    # A piece begins the sequence anew, so pieces are compared with the beginning of the whole.
    monkeypatch.setattr(bnb_4bit, "SPREAD_AT_ONCE", 5 * 64)
    pieces = precision.spread_weight(base)
    assert torch.equal(pieces.flatten()[: 5 * 64], whole.flatten()[: 5 * 64])
    assert torch.equal(
        precision.quantized_weight(base, pieces)[0], precision.quantized_weight(base, whole)[0]
    )


def test_a_small_change_is_kept_on_average_by_a_spread_base_alone():
    """One that moves every weight by some thirtieth of a cell."""
    kept = {}
    for method in (SPREAD, ON_LEVELS):
        adapted = layer("nf4", False, bias=False, method=method)
        a, b = adapted.lora_A["default"].weight, adapted.lora_B["default"].weight
        with torch.no_grad():
            a.fill_(1)
            b.fill_(0.03 * float(np.abs(base_weight(adapted)).mean()) / RANK / SCALING)
            change = adapted(torch.eye(IN)).t() - torch.tensor(base_weight(adapted)).float()
            kept[method] = (change.mean() / (SCALING * b @ a).mean()).item()
    assert kept[SPREAD] == pytest.approx(1, abs=0.2) and abs(kept[ON_LEVELS]) < 0.1


@pytest.mark.parametrize(("kind", "double_quantization"), BASES)
def test_gradients_are_those_of_a_weight_that_was_not_rounded(kind, double_quantization):
    """Against autograd on x (W + s B A + e)^T, where e is the rounding error, a constant."""
    adapted = layer(kind, double_quantization)
    x, grad = torch.randn(3, 5, IN, requires_grad=True), torch.randn(3, 5, OUT)
    a, b = adapted.lora_A["default"].weight, adapted.lora_B["default"].weight
    found = torch.autograd.grad(adapted(x), [x, a, b], grad)
    with torch.no_grad():
        weight = (adapted(torch.eye(IN)) - adapted.base_layer.bias).t().double()
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, a, b)]
    product = SCALING * wide[2] @ wide[1]
    expected = torch.autograd.grad(wide[0] @ (weight + product - product.detach()).t(), wide, grad.double())
    for gradient, right in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient.double(), right, rtol=1e-4, atol=1e-4)


def test_an_input_that_needs_no_gradient_still_teaches_the_adapter():
    adapted = layer("nf4", False)
    adapted(torch.randn(2, IN)).sum().backward()
    assert adapted.lora_A["default"].weight.grad.any() and adapted.lora_B["default"].weight.grad.any()


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_autocast_does_not_fold_the_adapter_in_16_bits(compute):
    adapted = layer("nf4", False, bias=False)
    x = torch.eye(IN)
    with torch.autocast("cpu", compute, enabled=compute != torch.float32):
        found = adapted(x).detach()
    start = spread(base_weight(adapted), "nf4")
    expected = torch.tensor(rounded(dense(adapted, start), "nf4").T).to(compute)
    assert found.dtype == compute
    torch.testing.assert_close(found, expected, rtol=1e-6 if compute == torch.float32 else 2**-8, atol=1e-6)


def test_a_score_after_a_step_is_of_the_new_adapter():
    adapted, x = layer("nf4", False), torch.randn(2, IN)
    with torch.no_grad():
        before, same = adapted(x), adapted(x)
        adapted.lora_B["default"].weight.add_(0.5)
        after = adapted(x)
    assert torch.equal(before, same) and not torch.equal(before, after)
    assert torch.equal(after, adapted(x).detach())


def test_no_weight_is_kept_for_the_backward_pass():
    adapted, kept = layer("nf4", False), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        adapted(torch.randn(3, IN, requires_grad=True))
    assert sorted(kept) == sorted([(3, IN), (RANK, IN), (OUT, RANK)])


@pytest.mark.parametrize(("kind", "double_quantization"), BASES)
def test_an_adapter_of_zeros_leaves_the_base_as_it_is(kind, double_quantization):
    """Quantizing dequantized weights changes no 4-bit number; 8-bit constants are rounded a second time."""
    adapted = layer(kind, double_quantization, bias=False)
    with torch.no_grad():
        adapted.lora_B["default"].weight.zero_()
        found = adapted(torch.eye(IN)).t()
    base = bnb.functional.dequantize_4bit(
        adapted.base_layer.weight.data, adapted.base_layer.weight.quant_state
    )
    if not double_quantization:
        torch.testing.assert_close(found, base, rtol=1e-6, atol=0)
    assert (found - base).norm() < 0.005 * base.norm()


# What is served.


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory) -> Path:
    return random_adapter(tiny_model, tmp_path_factory.mktemp("adapter"))


def variant(kind: str = "nf4", double_quantization: bool = True, **changes) -> params.Variant:
    return params.Variant(
        method="lora_merge_aware",
        precision=kind,
        double_quantization=double_quantization,
        block_size=64,
        layers_in_16_bits=[],
        compute_dtype=None,
        processes=1,
        training={},
    ).model_copy(update=changes)


def run_of_adapter(served: params.Variant, adapter: Path) -> params.Run:
    """The run whose training gave an adapter of this size."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    size = {"rank": config["r"], "alpha": int(config["lora_alpha"])}
    return params.Run("aware", served, 1, params.preset("tiny").training.model_copy(update=size), CPU)


def logits(form, model_folder, adapter, *arguments, **changes) -> tuple[torch.Tensor, forms.Served]:
    served_run = run_of_adapter(variant(*arguments, **changes), adapter)
    model, served = forms.serve(served_run, form, model_folder=model_folder, weights_folder=adapter)
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 43).view(2, 20)).logits, served


@pytest.mark.parametrize(("kind", "double_quantization"), BASES)
@pytest.mark.parametrize("method", [SPREAD, ON_LEVELS])
def test_requantized_computes_the_bits_of_as_trained(tiny_model, adapter, kind, double_quantization, method):
    trained, served = logits(AS_TRAINED, tiny_model, adapter, kind, double_quantization, method=method)
    again, _ = logits(REQUANTIZED, tiny_model, adapter, kind, double_quantization, method=method)
    assert served.adapters == 28 and torch.equal(trained, again)
    plain, _ = logits(AS_TRAINED, tiny_model, adapter, kind, double_quantization, method="lora")
    assert (plain - again).abs().max() > 0.1  # of a plain adapter it does not


ALONE = """
import sys, torch, bitsandbytes as bnb
from transformers import AutoModelForCausalLM
bnb.nn.Linear4bit.support_avx512bf16_for_cpu = property(lambda layer: False, lambda layer, value: None)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
assert sum(isinstance(m, bnb.nn.Linear4bit) for m in model.modules()) == 28
with torch.no_grad():
    torch.save(model(input_ids=torch.arange(3, 43).view(2, 20)).logits, sys.argv[2])
assert not any(name.split(".")[0] in ("peft", "workflow") for name in sys.modules), "more than the two was needed"
"""


def test_what_is_served_needs_transformers_and_bitsandbytes_alone(tiny_model, adapter, tmp_path):
    trained, _ = logits(AS_TRAINED, tiny_model, adapter)
    served_run = run_of_adapter(variant(), adapter)
    model, _ = forms.serve(served_run, REQUANTIZED, model_folder=tiny_model, weights_folder=adapter)
    model.save_pretrained(tmp_path / "served")
    subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path / "served"), str(tmp_path / "logits.pt")],
        check=True,
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), trained, rtol=0, atol=1e-5)


# A training.


LOSSES = [5.7570558, 5.7715020, 5.5140577, 5.4139605]  # nats per token of each step


def run(tiny, tiny_model, splits, folder: Path, **changes) -> train.Trained:
    training = tiny.training.model_copy(update={"learning_rate": 1e-2, "steps": 4} | changes)
    return train.train(
        params.Run("merge_aware", variant(), 1, training, CPU),
        model_folder=tiny_model,
        train_rows=splits["train"],
        validation_rows=splits["validation"],
        folder=folder,
    )


@pytest.fixture(scope="module")
def trained(tiny, tiny_model, splits, tmp_path_factory) -> tuple[train.Trained, Path]:
    folder = tmp_path_factory.mktemp("run")
    return run(tiny, tiny_model, splits, folder), folder


def losses(folder: Path) -> list[float]:
    with (folder / "history.csv").open() as file:
        return [float(line["loss"]) for line in csv.DictReader(file)]


def test_a_training_learns_and_what_it_scored_is_what_is_served(tiny, tiny_model, splits, trained):
    result, folder = trained
    assert result.validation_loss_after < result.validation_loss_before - 0.05
    assert result.speed_ups.packing and result.speed_ups.fused_adapters and not result.speed_ups.cuda_graphs
    # A last digit may carry a weight across the edge of its cell, so another CPU's numbers are not quite these.
    assert losses(folder) == pytest.approx(LOSSES, abs=1e-3)
    config = json.loads((folder / "weights" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and math.isclose(config["lora_alpha"], tiny.training.alpha)
    served = [logits(form, tiny_model, folder / "weights")[0] for form in (AS_TRAINED, REQUANTIZED)]
    assert torch.equal(*served)


def test_a_training_is_the_same_without_the_speed_ups(tiny, tiny_model, splits, tmp_path, trained):
    off = dict.fromkeys(
        ("packing", "fused_adapters", "shared_inputs", "fused_layers", "fused_loss", "cuda_graphs"), False
    )
    result = run(tiny, tiny_model, splits, tmp_path, **off)
    assert not result.speed_ups.any
    # Another order of additions moves a number by 1e-6, and that may carry a weight across the edge of its cell.
    assert losses(tmp_path) == pytest.approx(losses(trained[1]), abs=1e-3)


def test_its_card_and_its_commands_load_what_was_trained(tiny, tiny_model):
    code = cards.loading(
        variant(), lineage.read(tiny_model), compute="float32", device="cpu", folder=Path("a/1/weights")
    )
    assert "--form requantized" in code and "PeftModel" not in code
    precision = SimpleNamespace(compute="float32", device="cpu")
    served = SimpleNamespace(form=AS_TRAINED, precision=precision, gguf=None)
    trained_run = params.Run("aware", variant(), 1, tiny.training, CPU)
    save, *calls = commands.commands(served, trained_run, tiny.evaluation)
    assert "--variant aware --seed 1 --form requantized" in save
    assert calls and not any("peft=" in call for call in calls)


# What it goes with.


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"precision": "16bit", "block_size": None},
            "trains through the quantizer of its base, which nf4 and fp4 alone let it do",
        ),
        (
            {"precision": "int8", "block_size": None},
            "precision is int8, but method lora_merge_aware trains through the quantizer",
        ),
        (
            {"precision": "nf4", "processes": 2},
            "processes is 2 and method is lora_merge_aware, which is not sharded",
        ),
    ],
)
def test_what_it_cannot_train_on_is_refused_in_a_sentence(changes, sentence):
    plain = variant(double_quantization=False).model_dump()
    with pytest.raises(ValidationError, match=sentence):
        params.Variant(**plain | changes)


def test_dropout_is_refused_in_a_sentence(tiny):
    content = tiny.model_dump(mode="json")
    content["variants"]["aware"] = variant().model_dump() | {"training": {"dropout": 0.1}}
    content["experiment"]["variants"].append("aware")
    with pytest.raises(
        ValidationError, match="variants.aware.method is lora_merge_aware and dropout 0.1, which must be 0"
    ):
        params.Params.model_validate(content)


def test_the_folded_weight_is_in_the_predicted_memory(tiny):
    shape = memory.Shape(
        layers=32,
        hidden=4096,
        intermediate=11008,
        query=4096,
        key_value=4096,
        heads=32,
        vocabulary=32000,
        tied=False,
    )
    training = tiny.training.model_copy(update={"shared_inputs": False})  # which the method does not have
    plain, aware = (
        memory.predict(shape, variant(method=name), training, tokens=128, graphs=False)
        for name in ("lora", SPREAD)
    )
    folded = 4096 * 11008
    assert aware.transient == 4 * folded + 16 * 2**22 > plain.transient
    assert aware.total - plain.total == aware.transient + aware.loss - plain.transient - plain.loss
