"""Blocks of other sizes: held by the layers, kept by a merge and by saved files, and refused where there are none."""

import pytest
import torch
from card_code import run_card
from test_precision import CPU, variant
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from workflow import precisions
from workflow.cost import memory
from workflow.models import load
from workflow.params.reading import _newer_variant
from workflow.precisions.base import Quantization
from workflow.runtime.errors import UserError

SIZES = (32, 128, 256)
LEVELS = {
    # Appendix E of the QLoRA paper.
    "nf4": [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
            -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
            0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0],
    # A sign, an exponent of two bits and a mantissa of one, over the largest, as bitsandbytes has them.
    "fp4": [sign * value / 12 for sign in (-1, 1) for value in (0, 0.0625, 8, 12, 4, 6, 2, 3)],
}  # fmt: skip


def nearest(weight: torch.Tensor, name: str, size: int) -> torch.Tensor:
    """A weight [out, in] with the nearest level of each number: another computation than bitsandbytes' thresholds."""
    blocks = weight.double().reshape(-1, size)
    largest = blocks.abs().amax(1, keepdim=True)
    levels = torch.tensor(LEVELS[name], dtype=torch.float64)
    index = (blocks[..., None] / largest[..., None] - levels).abs().argmin(-1)
    return (levels[index] * largest).reshape(weight.shape)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("size", SIZES)
def test_a_layer_holds_the_nearest_levels_of_its_blocks(tiny_model, tmp_path, name, size):
    folder, wide = tmp_path, LlamaConfig.from_pretrained(tiny_model)
    wide.hidden_size, wide.intermediate_size, wide.head_dim = 256, 512, 64
    LlamaForCausalLM(wide).save_pretrained(folder)
    plain, _ = load.load_base(folder, variant("16bit"), hardware=CPU)
    model, found = load.load_base(folder, variant(name, block_size=size), hardware=CPU)
    assert found.block_size == size
    layer, original = (m.model.layers[1].mlp.up_proj for m in (model, plain))
    held = precisions.get(name).dequantized_weight(layer, torch.float32)
    assert layer.weight.quant_state.absmax.numel() == original.weight.numel() // size
    expected = nearest(original.weight.detach(), name, size)
    # A number in the middle between two levels may go either way.
    assert ((held - expected).abs() < 1e-5).float().mean() > 0.999


def test_blocks_of_another_size_are_not_made_by_the_next_base(tiny_model):
    load.load_base(tiny_model, variant("nf4", block_size=32), hardware=CPU)
    model, _ = load.load_base(tiny_model, variant("nf4"), hardware=CPU)
    assert model.model.layers[0].mlp.up_proj.weight.quant_state.blocksize == 64


def test_a_block_over_two_rows_is_refused_on_a_cpu(tiny_model):
    """Whether bitsandbytes dequantizes it to other numbers depends on the CPU; a result may not."""
    with pytest.raises(UserError, match="block_size is 128, which does not divide its 64 inputs"):
        load.load_base(tiny_model, variant("nf4", block_size=128), hardware=CPU)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("size", [32, 256])
def test_memory_is_counted_by_the_block(double, size):
    config = LlamaConfig(hidden_size=256, intermediate_size=640, num_hidden_layers=2, num_attention_heads=8,
                         num_key_value_heads=2, vocab_size=512)  # fmt: skip
    asked = variant("nf4", double, block_size=size)
    model, found = load.random_base(config, asked, hardware=CPU, seed=0)
    state = model.model.layers[1].mlp.down_proj.weight.quant_state
    assert (found.block_size, state.blocksize) == (size, size)
    weights, constants = precisions.get("nf4").tensor_bytes(640, 256, asked.quantization)
    assert weights == [640 * 256 / 2]
    stored = [state.absmax.nbytes, *([state.state2.absmax.nbytes] if double else [])]
    assert constants[: len(stored)] == stored
    # The whole base: 16-bit embeddings and norms on a GPU, float32 here.
    shape = memory.Shape.of(config)
    others = shape.embedding_parameters + shape.norm_parameters
    predicted = sum(memory.weights(shape, asked)) + 2 * others
    assert predicted == pytest.approx(load.weights_bytes(model), rel=0.03)


def test_a_merge_keeps_the_blocks_and_so_do_its_files(tiny_model, tmp_path):
    from peft import LoraConfig, get_peft_model

    model, _ = load.load_base(tiny_model, variant("nf4", block_size=32), hardware=CPU)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    merged = adapted.merge_and_unload()
    load.describe(merged, variant("nf4", block_size=32), compute=torch.float32)
    merged.save_pretrained(tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    load.describe(read, variant("nf4", block_size=32), compute=torch.float32)
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        assert torch.equal(read.eval()(ids).logits, merged.eval()(ids).logits)


def test_the_code_of_a_card_loads_the_same_blocks(tiny_model, tmp_path):
    asked = variant("fp4", True, block_size=32)
    base, _ = load.load_base(tiny_model, asked, hardware=CPU)
    model = run_card(asked, tiny_model, tmp_path)
    load.describe(model, asked, compute=torch.float32)
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, base.eval()(ids).logits)


@pytest.mark.parametrize(
    ("of", "size", "sentence"),
    [
        ("nf4", 48, "block_size is 48; precision nf4 allows 32, 64, 128 or 256"),
        ("fp4", None, "block_size is null; precision fp4 allows 32, 64, 128 or 256"),
        ("int8", 64, "block_size is 64; precision int8 allows null alone"),
        ("16bit", 64, "block_size is 64; precision 16bit allows null alone"),
    ],
)
def test_a_block_size_that_does_not_exist_is_refused(of, size, sentence):
    with pytest.raises(ValueError, match=sentence):
        variant(of, block_size=size)


def test_params_of_a_published_study_have_the_blocks_that_there_were():
    assert _newer_variant({"precision": "fp4"}) == {
        "precision": "fp4",
        "block_size": 64,
        "layers_in_16_bits": [],
    }
    assert _newer_variant({"precision": "int8"})["block_size"] is None
    assert _newer_variant({"precision": "nf4", "block_size": 32})["block_size"] == 32


def test_a_label_says_another_block_size():
    label, short = precisions.get("nf4").label, precisions.get("nf4").short
    assert label("QLoRA", Quantization(True, 64)) == "4-bit QLoRA (NF4, double-quantized)"
    assert label("QLoRA", Quantization(True, 128)) == "4-bit QLoRA (NF4, blocks of 128, double-quantized)"
    assert (short(Quantization(False, 32)), short(Quantization(True, 256))) == ("NF4/32", "NF4/256 + DQ")
