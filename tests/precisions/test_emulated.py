"""Emulated MXFP4 and NVFP4: rounded as a search over all their numbers rounds, and trained, merged and saved as such."""

import math
from types import SimpleNamespace

import pytest
import torch
from card_code import run_card
from peft import LoraConfig, get_peft_model
from test_dynamic import CONFIG, KEPT, PATTERNS, logits
from test_precision import CPU, variant
from transformers import AutoModelForCausalLM

from workflow import precisions
from workflow.cost import memory, plan
from workflow.models import load
from workflow.precisions import rounding
from workflow.precisions.rounded_linear import ROUNDINGS, RoundedLinear
from workflow.report.labels import variant_label
from workflow.report.sections import limits
from workflow.runtime.errors import CheckError, UserError
from workflow.training.speed.fused import fuse_adapters

NAMES = ["mxfp4", "nvfp4"]
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
# A sign, four bits of exponent with a bias of 7, three of mantissa; the last pattern is not a number.
E4M3 = [m / 8 * 2.0**-6 for m in range(8)] + [
    (1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)
]


def nearest(number: float, values: list[float]) -> float:
    """The value nearest to a number that is not negative; of two, the one whose last bit is zero."""
    return values[min(range(len(values)), key=lambda i: (abs(values[i] - number), i % 2))]


def searched(weight: torch.Tensor, name: str) -> torch.Tensor:
    """A weight [out, in], rounded number by number in Python's double precision."""
    size = {"mxfp4": 32, "nvfp4": 16}[name]
    rows = weight.double().tolist()
    scale_of_all = max(abs(x) for row in rows for x in row) / (6 * 448)
    out = []
    for row in rows:
        rounded = []
        for start in range(0, len(row), size):
            block = row[start : start + size]
            largest = max(map(abs, block))
            if name == "mxfp4":
                scale = 2.0 ** (math.floor(math.log2(largest)) - 2) if largest else 1.0
            else:
                scale = nearest(largest / 6 / scale_of_all, E4M3) * scale_of_all
            rounded += [
                math.copysign(nearest(abs(x) / scale, E2M1) * scale, x) if scale else 0.0 for x in block
            ]
        out.append(rounded)
    return torch.tensor(out, dtype=torch.float64)


def test_e2m1_rounds_every_tie_to_even():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert rounding.e2m1(ties).tolist() == [0, 1, 1, 2, 2, 4, 4]
    assert rounding.e2m1(-ties).tolist() == [0, -1, -1, -2, -2, -4, -4]
    numbers = torch.linspace(0, 8, 4001)
    assert rounding.e2m1(numbers).tolist() == [nearest(x, E2M1) for x in numbers.tolist()]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [64, 40])
def test_a_weight_is_rounded_as_a_search_rounds_it(name, width):
    generator = torch.Generator().manual_seed(3)
    # Blocks of very different sizes, one of zeros, and outliers.
    weight = torch.randn(24, width, generator=generator) * torch.logspace(-3, 0, 24)[:, None]
    weight[5], weight[6, 3] = 0, 9.0
    rounded = ROUNDINGS[name](weight)
    assert torch.allclose(rounded.double(), searched(weight, name), rtol=1e-6, atol=0)
    # Relative errors of 4 bits: about a tenth, and NVFP4's scales are finer.
    error = (rounded - weight).norm() / weight.norm()
    assert 0.05 < error < {"mxfp4": 0.16, "nvfp4": 0.12}[name]
    again = ROUNDINGS[name](rounded)
    assert (again - rounded).abs().max() <= 1e-5 * weight.abs().max()


def test_mxfp4_is_exact_in_bfloat16():
    weight = torch.randn(16, 64).bfloat16()
    assert torch.equal(rounding.mxfp4(weight).float(), rounding.mxfp4(weight.float()))


@pytest.mark.parametrize("name", NAMES)
def test_a_base_is_rounded_and_the_check_proves_it(tiny_model, tiny, name):
    asked = variant(f"{name}_emulated")
    settings = tiny.model_copy(update={"variants": {"emulated": asked}})
    model, found = load.load_base(tiny_model, asked, hardware=CPU)
    plain, _ = load.load_base(tiny_model, variant("16bit"), hardware=CPU)
    assert (found.quantized_modules, found.linear_modules) == (28, 28)
    assert "emulated" in found.storage and "emulated" in variant_label(settings, "emulated")
    layer, original = (m.model.layers[2].mlp.up_proj for m in (model, plain))
    assert torch.allclose(layer.weight.double(), searched(original.weight, name), rtol=1e-6, atol=0)
    assert type(model.lm_head) is torch.nn.Linear
    layer.weight.data += 0.001
    with pytest.raises(CheckError, match="rounded of model.layers.2.mlp.up_proj is False instead of True"):
        load.describe(model, asked, compute=torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_adapters_go_on_it_fused_and_a_merge_is_rounded_again(tiny_model, tmp_path, name):
    asked = variant(f"{name}_emulated", layers_in_16_bits=PATTERNS)
    base, found = load.load_base(tiny_model, asked, hardware=CPU)
    assert found.quantized_modules == 28 - KEPT
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    load.describe(adapted, asked, compute=torch.float32)
    before = logits(adapted)
    merged = adapted.merge_and_unload()
    assert torch.allclose(logits(merged), before, atol=1e-4)
    precision = precisions.get(asked.precision)
    loading = load.loading_of(asked, torch.float32, load.base_linears(merged))
    delta = merged.model.layers[1].mlp.up_proj.weight.clone()
    again = precision.requantize(merged, loading)
    load.describe(again, asked, compute=torch.float32)
    layer = again.model.layers[1].mlp.up_proj
    assert isinstance(layer, RoundedLinear) and torch.equal(layer.weight, ROUNDINGS[name](delta))
    again.save_pretrained(tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits(read), logits(again))


def test_fused_adapters_take_its_weight(tiny_model):
    base, _ = load.load_base(tiny_model, variant("nvfp4_emulated"), hardware=CPU)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    before = logits(adapted)
    assert fuse_adapters(adapted, compute=torch.float32) == 28
    assert torch.allclose(logits(adapted), before, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_dequantized_it_is_an_ordinary_model_of_the_same_numbers(tiny_model, name):
    base, _ = load.load_base(tiny_model, variant(f"{name}_emulated"), hardware=CPU)
    before = logits(base)
    plain = precisions.get(f"{name}_emulated").dequantize(base, torch.float32)
    load.describe(plain, variant("16bit"), compute=torch.float32)
    assert torch.equal(logits(plain), before)


@pytest.mark.parametrize("name", NAMES)
def test_the_code_of_a_card_rounds_the_same(tiny_model, tmp_path, name):
    asked = variant(f"{name}_emulated", layers_in_16_bits=["down_proj"])
    base, _ = load.load_base(tiny_model, asked, hardware=CPU)
    model = run_card(asked, tiny_model, tmp_path)
    assert torch.equal(logits(model), logits(base))


def test_its_memory_is_that_of_16_bits():
    shape = memory.Shape.of(CONFIG)
    plain, emulated = (memory.weights(shape, variant(of)) for of in ("16bit", "mxfp4_emulated"))
    assert plain == emulated


def test_the_plan_says_that_it_has_no_costs_of_its_own(tiny):
    notes = plan.caveats(CONFIG, tiny, length=64)
    assert any(
        note.startswith("nvfp4_emulated is emulated: its memory and time are those of 16 bits")
        for note in notes
    )


def test_the_page_says_that_it_has_no_costs_of_its_own(tiny):
    names = ("qlora_nf4", "qlora_mxfp4")
    facts = SimpleNamespace(
        params=tiny,
        variants=[SimpleNamespace(name=name, label=variant_label(tiny, name)) for name in names],
    )
    limit = limits._emulated(facts)
    assert limit.body.startswith("4-bit QLoRA (MXFP4, emulated) is emulated")
    assert "say nothing of a GPU that has the format" in limit.body
    facts.variants.pop()
    assert limits._emulated(facts) is None


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "int4", "gptq", "awq"])
def test_what_cannot_be_trained_on_is_refused_with_the_reason(name):
    with pytest.raises(UserError, match=f"^{name} cannot be trained on: .*; use "):
        precisions.get(name)
    with pytest.raises(ValueError, match="it cannot be trained on: .*; use "):
        variant("nf4").__class__.model_validate(variant("nf4").model_dump() | {"precision": name})
