"""Layers that stay in 16 bits among quantized ones: loaded, checked, merged, saved, counted, and refused by name."""

import pytest
import torch
from card_code import run_card
from peft import LoraConfig, get_peft_model
from test_precision import CPU, variant
from transformers import AutoModelForCausalLM, LlamaConfig

from workflow import params, precisions
from workflow.cost import memory, plan, trial
from workflow.models import load
from workflow.precisions.dynamic import is_named, layers_in_16_bits
from workflow.report.labels import variant_label
from workflow.runtime.errors import CheckError, UserError

PATTERNS = ["down_proj", "model.layers.0.*"]
# Of four layers with seven linear layers each: four down_proj, and the six others of the first layer.
KEPT = 10
CONFIG = LlamaConfig(hidden_size=256, intermediate_size=640, num_hidden_layers=3, num_attention_heads=8,
                     num_key_value_heads=2, vocab_size=512)  # fmt: skip


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(3, 19)[None]).logits


def test_a_pattern_is_a_name_or_the_end_of_one():
    name = "model.layers.1.mlp.down_proj"
    for pattern in (name, "down_proj", "mlp.down_proj", "1.mlp.*", "model.layers.*.down_proj", "*"):
        assert is_named(name, pattern)
    for pattern in ("proj", "own_proj", "model.layers.1", "layers.11.mlp.down_proj", "up_proj"):
        assert not is_named(name, pattern)


@pytest.mark.parametrize("name", ["nf4", "fp4", "int8"])
def test_named_layers_are_plain_and_the_others_quantized(tiny_model, name):
    model, found = load.load_base(tiny_model, variant(name, layers_in_16_bits=PATTERNS), hardware=CPU)
    plain, _ = load.load_base(tiny_model, variant("16bit"), hardware=CPU)
    assert (found.quantized_modules, found.linear_modules, len(found.layers_in_16_bits)) == (
        28 - KEPT,
        28,
        KEPT,
    )
    assert found.storage == ("int8" if name == "int8" else f"{name} (4 bits)")
    layers = load.base_linears(model)
    for whole, layer in layers.items():
        kept = whole.endswith("down_proj") or whole.startswith("model.layers.0.")
        assert precisions.recognize(layer).name == ("16bit" if kept else name), whole
        if kept:
            assert torch.equal(layer.weight, load.base_linears(plain)[whole].weight)


def test_a_layer_that_is_quantized_and_should_not_be_is_refused(tiny_model):
    model, _ = load.load_base(tiny_model, variant("nf4", layers_in_16_bits=["up_proj"]), hardware=CPU)
    sentence = "16bit was asked for, and quantization of model.layers.0.mlp.down_proj is nf4 instead of None"
    with pytest.raises(CheckError, match=sentence):
        load.describe(
            model, variant("nf4", layers_in_16_bits=["up_proj", "down_proj"]), compute=torch.float32
        )
    with pytest.raises(CheckError, match="quantization of model.layers.0.mlp.up_proj is None instead of nf4"):
        load.describe(model, variant("nf4"), compute=torch.float32)


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_a_merge_leaves_them_in_16_bits_and_so_do_its_files(tiny_model, tmp_path, name):
    asked = variant(name, layers_in_16_bits=PATTERNS)
    base, _ = load.load_base(tiny_model, asked, hardware=CPU)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    assert load.describe(adapted, asked, compute=torch.float32).quantized_modules == 28 - KEPT
    merged = adapted.merge_and_unload()
    load.describe(merged, asked, compute=torch.float32)
    merged.save_pretrained(tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    load.describe(read, asked, compute=torch.float32)
    assert torch.equal(logits(read), logits(merged))


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_the_code_of_a_card_keeps_the_same_layers(tiny_model, tmp_path, name):
    asked = variant(name, layers_in_16_bits=PATTERNS)
    base, found = load.load_base(tiny_model, asked, hardware=CPU)
    model = run_card(asked, tiny_model, tmp_path)
    assert load.describe(model, asked, compute=torch.float32).layers_in_16_bits == found.layers_in_16_bits
    assert torch.equal(logits(model), logits(base))


def test_memory_counts_them_in_16_bits():
    asked = variant("nf4", layers_in_16_bits=["down_proj", "model.layers.0.self_attn.*"])
    shape = memory.Shape.of(CONFIG)
    kept = 3 * 256 * 640 + 256 * (2 * 256 + 2 * 64)
    weights, constants = memory.weights(shape, asked)
    quantized = shape.linear_parameters - kept
    others = shape.embedding_parameters + shape.norm_parameters
    assert weights == pytest.approx(quantized / 2 + 2 * (kept + others), rel=0.001)
    tables = 14 * memory.ALLOCATION  # of the levels, one for each quantized layer
    assert constants == 4 * quantized / 64 + tables
    assert memory.quantized_parameters(shape, asked) == quantized
    # A loaded base holds in float32, on a CPU, what is counted in 16 bits.
    model, _ = load.random_base(CONFIG, asked, hardware=CPU, seed=0)
    assert weights + constants - tables + 2 * (kept + others) == pytest.approx(
        load.weights_bytes(model), rel=0.01
    )


@pytest.mark.parametrize(
    ("patterns", "sentence"),
    [
        (["down_prj"], "layers_in_16_bits names down_prj, and no linear layer .* end in down_proj, .*did you mean down_proj"),
        (["model.layers.9.mlp.up_proj"], "names model.layers.9.mlp.up_proj, and no linear layer"),
        (["lm_head"], "names lm_head, and no linear layer"),
        (["*"], "names every linear layer of the model, so nothing is quantized; use precision 16bit"),
    ],
)  # fmt: skip
def test_names_that_no_layer_has_are_refused(tiny_model, patterns, sentence):
    with pytest.raises(UserError, match=sentence):
        load.load_base(tiny_model, variant("nf4", layers_in_16_bits=patterns), hardware=CPU)


def test_a_base_in_16_bits_keeps_no_layer_apart():
    with pytest.raises(
        ValueError, match="layers_in_16_bits names up_proj, and precision 16bit quantizes no layer"
    ):
        variant("16bit", layers_in_16_bits=["up_proj"])


def test_the_trial_knows_the_whole_model(tiny_model):
    full = LlamaConfig.from_pretrained(tiny_model)
    small = trial.small_config(full)
    last = variant("nf4", layers_in_16_bits=["model.layers.3.mlp.up_proj", "model.layers.1.mlp.up_proj"])
    assert trial.in_trial(last, full, small, hardware=CPU).layers_in_16_bits == ["model.layers.1.mlp.up_proj"]
    first = variant("nf4", layers_in_16_bits=["model.layers.0.*", "model.layers.1.*"])
    assert trial.in_trial(first, full, small, hardware=CPU).layers_in_16_bits == []
    with pytest.raises(UserError, match=r"names model.layers.4.\*, and no linear layer"):
        trial.in_trial(variant("nf4", layers_in_16_bits=["model.layers.4.*"]), full, small, hardware=CPU)


def test_the_plan_says_which_names_the_model_lacks(tiny):
    content = tiny.model_dump()
    content["variants"]["qlora_nf4"]["layers_in_16_bits"] = ["model.layers.40.*"]
    notes = plan.caveats(CONFIG, params.Params.model_validate(content), length=64)
    assert [note for note in notes if note.startswith("qlora_nf4 keeps model.layers.40.* in 16 bits")]


@pytest.mark.parametrize(
    ("precision", "label"), [("nf4", "4-bit QLoRA (NF4), dynamic"), ("int8", "8-bit LoRA, dynamic")]
)
def test_a_label_says_dynamic(tiny, precision, label):
    variants = {"dynamic": variant(precision, layers_in_16_bits=["up_proj"])}
    assert variant_label(tiny.model_copy(update={"variants": variants}), "dynamic") == label


def test_no_pattern_names_no_layer():
    assert layers_in_16_bits(["a.b"], []) == ()
