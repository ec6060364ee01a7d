"""Each serving form against arithmetic on its layers."""

import shutil
from dataclasses import replace
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from conftest import CPU, random_adapter
from peft import PeftModel
from peft.tuners.lora import LoraLayer, LoraModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from workflow import params, precisions
from workflow.evaluation import forms
from workflow.runtime.errors import CheckError, UserError
from workflow.runtime.forms import OWN_FORMS

LAYER = "model.layers.0.mlp.down_proj"  # [hidden_size, intermediate_size]


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory) -> Path:
    return random_adapter(tiny_model, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def parts(tiny_model, adapter) -> tuple[torch.Tensor, torch.Tensor]:
    """The layer's 16-bit weight W and its adapter's (alpha / rank) B A, both in float32."""
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), adapter
    )
    layer = model.base_model.model.get_submodule(LAYER)
    config = model.peft_config["default"]
    delta = config.lora_alpha / config.r * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    return layer.base_layer.weight.detach(), delta.detach()


def serve(form, tiny, tiny_model, adapter, name):
    run = replace(tiny.run(name, None if adapter is None else 1), hardware=CPU).with_training(rank=4, alpha=8)
    return forms.serve(run, form, model_folder=tiny_model, weights_folder=adapter)


def rounded_to_4_bits(weight: torch.Tensor, variant: params.Variant) -> torch.Tensor:
    quantize, back = bnb.functional.quantize_4bit, bnb.functional.dequantize_4bit
    packed, state = quantize(
        weight, quant_type=variant.precision, compress_statistics=variant.double_quantization
    )
    return back(packed, state)


def weight_of(model: torch.nn.Module) -> torch.Tensor:
    layer = model.get_submodule(LAYER)
    if isinstance(layer, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return layer.weight.detach()


FOUR_BIT = ["qlora_nf4", "qlora_nf4_dq", "qlora_fp4"]


@pytest.mark.parametrize("name", ["lora_16bit", *FOUR_BIT, "lora_int8"])
def test_merged_16bit_is_the_original_weight_and_the_adapter_rounded_once(
    tiny, tiny_model, adapter, parts, name
):
    model, served = serve("merged_16bit", tiny, tiny_model, adapter, name)
    weight, delta = parts
    assert torch.equal(weight_of(model), (weight + delta).bfloat16().float())
    assert (served.adapters, served.precision.quantized_modules, served.precision.base) == (0, 0, "16bit")


@pytest.mark.parametrize("name", FOUR_BIT)
def test_merged_dequantized_is_the_quantized_weight_and_the_adapter(tiny, tiny_model, adapter, parts, name):
    model, served = serve("merged_dequantized", tiny, tiny_model, adapter, name)
    weight, delta = parts
    expected = rounded_to_4_bits(weight, tiny.variants[name]) + delta
    assert torch.equal(weight_of(model), expected.bfloat16().float())
    assert not torch.equal(weight_of(model), (weight + delta).bfloat16().float())
    assert (served.adapters, served.precision.quantized_modules) == (0, 0)


@pytest.mark.parametrize("name", FOUR_BIT)
def test_requantized_is_that_quantized_again(tiny, tiny_model, adapter, parts, name):
    model, served = serve("requantized", tiny, tiny_model, adapter, name)
    weight, delta = parts
    variant = tiny.variants[name]
    expected = rounded_to_4_bits(rounded_to_4_bits(weight, variant) + delta, variant)
    torch.testing.assert_close(weight_of(model), expected, rtol=0, atol=1e-6)
    assert (served.adapters, served.precision.quantized_modules) == (0, 7 * tiny.model.layers)


def test_merges_of_an_8_bit_base_lose_no_more_than_its_rounding(tiny, tiny_model, adapter, parts):
    """LLM.int8() rounds each row to 255 steps of its largest weight."""
    weight, delta = parts
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    merged, _ = serve("merged_dequantized", tiny, tiny_model, adapter, "lora_int8")
    gap = (weight_of(merged) - (weight + delta)).abs()
    assert gap.max() > 0 and (gap <= step / 2 + 2**-8 * (weight + delta).abs() + 1e-6).all()
    again, served = serve("requantized", tiny, tiny_model, adapter, "lora_int8")
    layer = again.get_submodule(LAYER)
    values = layer.weight.data.float() * layer.state.SCB[:, None] / 127  # moved there by the first pass
    both = step / 2 + (weight + delta).abs().amax(dim=1, keepdim=True) / 127 / 2
    assert ((values - (weight + delta)).abs() <= 1.05 * both + 1e-6).all()
    assert served.precision.quantized_modules == 7 * tiny.model.layers


@pytest.mark.parametrize("name", ["lora_16bit", *FOUR_BIT, "lora_int8"])
def test_as_trained_adds_the_adapter_to_its_own_base(tiny, tiny_model, adapter, parts, name):
    model, served = serve("as_trained", tiny, tiny_model, adapter, name)
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert served.adapters == len(layers) == 7 * tiny.model.layers and served.adapter_dtype == "float32"
    assert served.precision.quantized_modules == (0 if name == "lora_16bit" else 7 * tiny.model.layers)
    layer = model.base_model.model.get_submodule(LAYER)
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(layer(x) - layer.base_layer(x), x @ parts[1].T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["lora_16bit", "qlora_nf4_dq"])
def test_base_is_untouched(tiny, tiny_model, adapter, parts, name):
    model, served = serve("base", tiny, tiny_model, None, name)
    variant = tiny.variants[name]
    expected = parts[0] if name == "lora_16bit" else rounded_to_4_bits(parts[0], variant)
    assert torch.equal(weight_of(model), expected)
    assert served.adapters == 0


def test_a_full_fine_tuning_is_served_from_its_own_weights(tiny, tiny_model, tmp_path):
    own = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        own.lm_head.weight.zero_()
    own.save_pretrained(tmp_path)
    model, served = serve("as_trained", tiny, tiny_model, tmp_path, "full_16bit")
    assert not model.lm_head.weight.any()
    assert (served.adapters, served.precision.quantized_modules) == (0, 0)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"adapters": 27}, "must have 28 adapters, and has 27"),
        ({"adapter_dtype": "bfloat16"}, "adapters in bfloat16, and they were trained in float32"),
        ({"quantized_modules": 27}, "must have 28 quantized modules, and has 27"),
    ],
)
def test_a_form_that_is_not_what_it_should_be_is_refused(tiny, tiny_model, adapter, change, sentence):
    _, served = serve("as_trained", tiny, tiny_model, adapter, "qlora_nf4")
    if "quantized_modules" in change:
        change = {"precision": replace(served.precision, **change)}
    with pytest.raises(CheckError, match=sentence):
        forms.check(replace(served, **change), tiny.variants["qlora_nf4"], adapters=28)


def copied(adapter: Path, folder: Path, change) -> Path:
    """An adapter whose weights (and settings) are changed."""
    shutil.copytree(adapter, folder)
    weights = load_file(folder / "adapter_model.safetensors")
    change(weights)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def zero_b(weights):
    for name, weight in weights.items():
        if "lora_B" in name:
            weight.zero_()


def not_a_number(weights):
    next(weight for name, weight in weights.items() if "lora_B" in name)[0, 0] = float("nan")


def without_one_b(weights):
    weights.pop(next(name for name in weights if "lora_B" in name))


def without_one_module(weights):
    for name in [name for name in weights if f"{LAYER}.lora_" in name]:
        weights.pop(name)


FORMS = ["as_trained", *OWN_FORMS[1:]]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (zero_b, "with the adapter attached, the model answers as its untouched base does"),
        (
            not_a_number,
            "a number in .*down_proj.lora_B.weight that is not finite; `dvc repro` trains it again",
        ),
        (without_one_b, r"adapter_model.safetensors lacks .*lora_B.weight\.$"),
        (without_one_module, rf"lacks .*{LAYER}.lora_A.weight and 1 more\.$"),
    ],
)
def test_an_adapter_that_is_not_what_was_trained_is_refused(
    tiny, tiny_model, adapter, tmp_path, form, change, sentence
):
    changed = copied(adapter, tmp_path / "adapter", change)
    with pytest.raises(UserError, match=sentence):
        serve(form, tiny, tiny_model, changed, "qlora_nf4_dq")


@pytest.mark.parametrize("form", FORMS[1:])
def test_an_adapter_that_was_not_folded_in_is_refused(tiny, tiny_model, adapter, monkeypatch, form):
    monkeypatch.setattr(LoraModel, "merge_and_unload", lambda self: self.unload())
    with pytest.raises(
        CheckError, match="with the adapter folded in, the model answers as its untouched base does"
    ):
        serve(form, tiny, tiny_model, adapter, "qlora_nf4_dq")


def test_a_full_fine_tuning_that_is_its_base_is_refused(tiny, tiny_model):
    with pytest.raises(CheckError, match="has the weights of its untouched base"):
        serve("as_trained", tiny, tiny_model, tiny_model, "full_16bit")


@pytest.mark.parametrize("form", ["base", "as_trained", "requantized"])
def test_a_form_in_another_precision_is_refused(tiny, tiny_model, adapter, monkeypatch, form):
    bare = BitsAndBytesConfig(load_in_4bit=True)
    monkeypatch.setitem(precisions.TABLE, "nf4", replace(precisions.get("nf4"), config=lambda loading: bare))
    with pytest.raises(CheckError, match="nf4 was asked for, and quantization of .* is fp4 instead of nf4"):
        serve(form, tiny, tiny_model, None if form == "base" else adapter, "qlora_nf4")


def test_a_merge_that_quantizes_otherwise_is_refused(tiny, tiny_model, adapter, monkeypatch):
    """PEFT makes the weights anew when it merges into them."""
    make = bnb.nn.Params4bit.__new__

    def always_fp4(cls, data=None, **settings):
        return make(cls, data, **settings | {"quant_type": "fp4"})

    merge = LoraModel.merge_and_unload

    def with_another_type(self):
        with monkeypatch.context() as patch:
            patch.setattr(bnb.nn.Params4bit, "__new__", always_fp4)
            return merge(self)

    monkeypatch.setattr(LoraModel, "merge_and_unload", with_another_type)
    with pytest.raises(CheckError, match="nf4 was asked for, and quantization of .* is fp4 instead of nf4"):
        serve("requantized", tiny, tiny_model, adapter, "qlora_nf4")
