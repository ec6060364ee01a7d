"""The precision that a variant names is the one that is loaded, and it computes what it says."""

import copy
import shutil
from dataclasses import replace

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig

from workflow import params, precisions
from workflow.models import load as precision
from workflow.runtime.errors import CheckError, UserError

CPU = params.Hardware(device="cpu", compute_dtype="auto", data_workers=0)


def variant(of: str, double: bool = False, method: str = "lora", **choices) -> params.Variant:
    blocks = {"block_size": 64 if precisions.get(of).block_sizes else None, "layers_in_16_bits": []}
    return params.Variant(
        method=method, precision=of, double_quantization=double, compute_dtype=None, processes=1, training={},
        **blocks | choices,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("of", "double", "bytes_per_weight"),
    # 4 bits and one float32 constant per 64 weights; with double quantization that constant takes 8 bits
    # and a further float32 per 256 constants (QLoRA, section 3). int8: one float32 per row of 64 or more.
    [("16bit", False, 4), ("nf4", False, 0.5 + 4 / 64), ("nf4", True, 0.5 + 1 / 64 + 4 / 64 / 256),
     ("fp4", False, 0.5 + 4 / 64), ("int8", False, 1.0)],
)  # fmt: skip
def test_the_asked_precision_is_what_is_there(tiny, tiny_model, of, double, bytes_per_weight):
    model, found = precision.load_base(tiny_model, variant(of, double), hardware=CPU)
    layers = tiny.model.layers
    assert found.linear_modules == 7 * layers
    assert found.quantized_modules == (0 if of == "16bit" else 7 * layers)
    assert (found.base, found.double_quantization, found.compute) == (of, double, "float32")
    linear_weights = sum(
        module.in_features * module.out_features
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name
    )
    others = sum(p.numel() for n, p in model.named_parameters() if "proj" not in n)
    wanted = linear_weights * bytes_per_weight + others * 4
    assert precision.weights_bytes(model) == pytest.approx(wanted, rel=0.02)


@pytest.mark.parametrize("of", ["nf4", "fp4"])
def test_four_bits_multiply_like_their_dequantized_weights_in_float32(tiny_model, of):
    """Also after a pass in eval mode, which on some CPUs makes bitsandbytes repack to bfloat16."""
    model, _ = precision.load_base(tiny_model, variant(of, True), hardware=CPU)
    layer = model.model.layers[0].mlp.down_proj
    weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    x = torch.randn(3, weight.shape[1])
    for _ in range(2):
        with torch.no_grad():
            assert torch.allclose(layer.eval()(x), x @ weight.T, rtol=1e-5, atol=1e-6)
    x.requires_grad_()
    layer.train()(x).sum().backward()
    assert torch.allclose(x.grad, weight.sum(0).expand_as(x), rtol=1e-5, atol=1e-6)


def test_nf4_levels_are_those_of_the_paper(tiny_model):
    model, _ = precision.load_base(tiny_model, variant("nf4"), hardware=CPU)
    weight = model.model.layers[0].mlp.down_proj.weight
    blocks = bnb.functional.dequantize_4bit(weight.data, weight.quant_state).reshape(-1, 64)
    scaled = blocks / weight.quant_state.absmax.reshape(-1, 1)
    # Appendix E of the QLoRA paper, rounded.
    levels = torch.tensor([-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0, 0.0796, 0.1609, 0.2461,
                           0.3379, 0.4407, 0.5626, 0.7230, 1])  # fmt: skip
    assert (scaled.flatten()[:, None] - levels).abs().min(dim=1).values.max() < 1e-4


def load(tiny_model, of: str, double: bool = False, method: str = "lora") -> torch.nn.Module:
    return precision.load_base(tiny_model, variant(of, double, method), hardware=CPU)[0]


def with_head_quantized(model):
    model.lm_head = copy.deepcopy(model.model.layers[0].mlp.down_proj)


def with_a_layer_in_16_bits(model):
    mlp = model.model.layers[2].mlp
    mlp.up_proj = torch.nn.Linear(mlp.up_proj.in_features, mlp.up_proj.out_features, bias=False)


def setting(path: str, value):
    """Change one thing of the last layer's down_proj."""

    def change(model):
        *parents, name = path.split(".")
        owner = model.model.layers[3].mlp.down_proj
        for parent in parents:
            owner = getattr(owner, parent)
        setattr(owner, name, value)

    return change


def in_bfloat16(model):
    model.model.layers[0].self_attn.q_proj.bfloat16()


def unchanged(model):
    pass


@pytest.mark.parametrize(
    ("loaded", "change", "asked", "sentence"),
    [
        (("fp4",), unchanged, ("nf4",), "nf4 was asked for, and quantization of .* is fp4 instead of nf4"),
        (("nf4",), unchanged, ("nf4", True), "double quantization of model.layers.0.* is False instead of True"),
        (("nf4", True), unchanged, ("nf4",), "double quantization of .* is True instead of False"),
        (("nf4",), unchanged, ("16bit",), "16bit was asked for, and quantization of .* is nf4 instead of None"),
        (("16bit",), unchanged, ("nf4",), "nf4 was asked for, and quantization of .* is None instead of nf4"),
        (("int8",), unchanged, ("nf4",), "quantization of .* is int8 instead of nf4"),
        (("16bit",), in_bfloat16, ("16bit",), "storage of model.layers.0.self_attn.q_proj is bfloat16 instead of float32"),
        (("16bit", False, "full"), in_bfloat16, ("16bit", False, "full"), "storage of .* is bfloat16 instead of float32"),
        (("nf4",), with_a_layer_in_16_bits, ("nf4",), "quantization of model.layers.2.mlp.up_proj is None instead of nf4"),
        (("nf4",), with_head_quantized, ("nf4",), "29 modules are quantized, and 28 linear layers are to be"),
        (("nf4",), setting("compute_dtype", torch.bfloat16), ("nf4",), "compute type of model.layers.3.mlp.down_proj is bfloat16"),
        (("nf4",), setting("compute_dtype", None), ("nf4",), "compute type of .* is None instead of float32"),
        (("nf4",), setting("weight.quant_state.blocksize", 128), ("nf4",), "block size of .* is 128 instead of 64"),
        (("nf4", True), setting("weight.quant_state.state2.blocksize", 64), ("nf4", True), "block size of constants of .* is 64"),
        (("int8",), setting("state.threshold", 0.0), ("int8",), "outlier threshold of .* is 0.0 instead of 6.0"),
        (("int8",), setting("state.has_fp16_weights", True), ("int8",), "16-bit copy of .* is True instead of False"),
    ],
)  # fmt: skip
def test_a_precision_that_is_not_there_is_refused(tiny_model, loaded, change, asked, sentence):
    model = load(tiny_model, *loaded)
    precision.describe(model, variant(*loaded), compute=torch.float32)
    change(model)
    with pytest.raises(CheckError, match=sentence):
        precision.describe(model, variant(*asked), compute=torch.float32)


def test_load_in_4bit_alone_is_not_nf4(tiny_model, monkeypatch):
    bare = BitsAndBytesConfig(load_in_4bit=True)
    monkeypatch.setitem(precisions.TABLE, "nf4", replace(precisions.get("nf4"), config=lambda loading: bare))
    with pytest.raises(CheckError, match="nf4 was asked for, and quantization of .* is fp4 instead of nf4"):
        load(tiny_model, "nf4")


def without(name: str):
    return lambda weights: weights.pop(name)


def shortened(weights: dict) -> None:
    weights["model.norm.weight"] = weights["model.norm.weight"][:-1].clone()


@pytest.mark.parametrize(
    ("of", "change", "sentence"),
    [
        *((of, without("model.layers.1.mlp.up_proj.weight"), "lacks model.layers.1.mlp.up_proj.weight, which config.json asks")
          for of in ("16bit", "nf4")),
        *((of, without("model.norm.weight"), "lacks model.norm.weight") for of in ("16bit", "nf4")),
        # Of a quantized model older libraries do not tell it; stage fetch_model has looked at it in 16 bits.
        ("16bit", shortened, "model.norm.weight in the shape 63, and config.json asks for 64"),
    ],
    ids=["16bit, a layer", "nf4, a layer", "16bit, the norm", "nf4, the norm", "another shape"],
)  # fmt: skip
def test_a_checkpoint_that_lacks_a_weight_is_refused(tiny_model, tmp_path, of, change, sentence):
    shutil.copytree(tiny_model, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=sentence):
        load(tmp_path, of)


def test_a_full_fine_tuning_has_float32_master_weights(tiny_model):
    model, found = precision.load_base(tiny_model, variant("16bit", method="full"), hardware=CPU)
    assert {p.dtype for p in model.parameters()} == {torch.float32} and found.storage == "float32"


def test_what_a_cpu_cannot_do_is_said(tiny_model, monkeypatch):
    half = params.Hardware(device="cpu", compute_dtype="float16", data_workers=0)
    with pytest.raises(UserError, match="float16, which a CPU does not train in"):
        precision.load_base(tiny_model, variant("nf4"), hardware=half)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="hardware.device is cuda, and torch sees no CUDA device"):
        precision.choose_device(params.Hardware(device="cuda", compute_dtype="auto", data_workers=0))


def test_a_folder_without_a_model_is_said(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="holds no model that can be loaded"):
        precision.load_base(tmp_path, variant("16bit"), hardware=CPU)
