"""The precisions that need an optional package or a GPU, on a CPU: int8 weights alone, FP8 (test_fp8_products.py has more of its
products), and HQQ in 8 to 2 bits.
"""

import sys
from importlib.util import find_spec

import pytest
import torch
from conftest import ROOT, random_adapter
from fp8_by_hand import Fp8Linear, rounded_rows
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from workflow import params, precisions
from workflow.cost import memory, trial
from workflow.data import cards
from workflow.data.lineage import Lineage
from workflow.evaluation import forms
from workflow.models import load
from workflow.precisions import stored_linear
from workflow.precisions.base import dequantized_products
from workflow.runtime.errors import CheckError, UserError
from workflow.training import train
from workflow.training.speed import fused

CPU = params.Hardware(device="cpu", compute_dtype="float32", data_workers=0)
HALF = CPU.model_copy(update={"compute_dtype": "bfloat16"})
LAYER = "model.layers.0.mlp.down_proj"
HQQ = ["hqq8", "hqq4", "hqq3", "hqq2"]


def needs(name: str):
    package = precisions.get(name).package
    missing = bool(package) and find_spec(package) is None
    return pytest.param(
        name, marks=pytest.mark.skipif(missing, reason=f"{package} is not installed: make {package}")
    )


# Nats per token of the three steps of the preset tiny.
LOSSES = {
    "int8_weight_only": [5.75104, 5.76637, 5.61589],
    "fp8": [5.75038, 5.7657, 5.61537],
    "fp8_products": [5.75516, 5.76987, 5.61985],
    "hqq8": [5.75135, 5.76667, 5.61614],
    "hqq4": [5.7402, 5.75659, 5.61119],
    "hqq3": [5.7412, 5.76163, 5.59884],
    "hqq2": [5.75401, 5.76609, 5.5962],
}
NAMES = [needs(name) for name in ("int8_weight_only", "fp8", "fp8_products", *HQQ)]
STORED = [needs(name) for name in ("fp8", "fp8_products", *HQQ)]


@pytest.fixture(autouse=True)
def _a_cpu_will_do(monkeypatch):
    """FP8 is for GPUs in a run; its numbers are the same here."""
    monkeypatch.setattr(load, "check_device", lambda precision, device: None)


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory):
    return random_adapter(tiny_model, tmp_path_factory.mktemp("adapter"))


def variant(of: str) -> params.Variant:
    return params.Variant(
        method="lora", precision=of, double_quantization=False, block_size=None, layers_in_16_bits=[],
        compute_dtype=None, processes=1, training={},
    )  # fmt: skip


def run_of(name: str) -> params.Run:
    """The run whose training gave the adapter."""
    training = params.preset("tiny").training.model_copy(update={"rank": 4, "alpha": 8})
    return params.Run(name, variant(name), 1, training, CPU)


def rounded(name: str, weight: torch.Tensor) -> torch.Tensor:
    """A weight rounded to a precision by the library that made it, or by arithmetic."""
    if name == "int8_weight_only":
        scale = weight.abs().amax(dim=1, keepdim=True) / 127.5
        return (weight * (1 / scale)).round().clamp(-128, 127) * scale
    if name == "fp8_products":
        return rounded_rows(weight).to(weight.dtype)
    if name == "fp8":
        from transformers import FineGrainedFP8Config
        from transformers.integrations import finegrained_fp8

        config = FineGrainedFP8Config(
            weight_block_size=weight.shape if min(weight.shape) < 128 else (128, 128)
        )
        quantizer = type("Quantizer", (), {"quantization_config": config})
        parts = finegrained_fp8.Fp8Quantize(quantizer)._quantize_one("layer.weight", weight)
        return finegrained_fp8._dequantize_fp8_weight(
            parts["layer.weight"], parts["layer.weight_scale_inv"], config.weight_block_size, weight.dtype
        )
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    layer = nn.Linear(*reversed(weight.shape), bias=False)
    layer.weight.data = weight.clone()
    options = BaseQuantizeConfig(nbits=int(name[-1]), group_size=64, axis=1)
    return HQQLinear(layer, options, compute_dtype=weight.dtype, device="cpu").dequantize().clone()


def round_layer(name: str, layer: nn.Linear) -> None:
    """Give an ordinary layer a precision's rounded weight, or its products where they round more than that."""
    if precisions.get(name).products is None:
        layer.weight.data = rounded(name, layer.weight.data)
    else:
        layer.__class__ = Fp8Linear


def weight_of(model) -> torch.Tensor:
    layer = model.get_submodule(LAYER)
    precision = precisions.recognize(layer)
    return layer.weight.detach() if precision is None else precision.dequantized_weight(layer, torch.float32)


def original(tiny_model) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    return model.get_submodule(LAYER).weight.detach()


@pytest.mark.parametrize("name", NAMES)
def test_the_weights_are_rounded_as_the_library_rounds_them(tiny_model, name):
    model, loaded = load.load_base(tiny_model, variant(name), hardware=CPU)
    assert loaded.quantized_modules == loaded.linear_modules == 28
    torch.testing.assert_close(weight_of(model), rounded(name, original(tiny_model)), rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_the_bytes_are_those_of_the_formula(tiny_model, name):
    """With 16-bit constants, as on a GPU; embeddings, head and norms take two bytes a number."""
    model, loaded = load.load_base(tiny_model, variant(name), hardware=HALF)
    shape = memory.Shape.of(model.config)
    tensors = [
        precisions.get(name).tensor_bytes(inputs, outputs, False)
        for inputs, outputs in shape.linears.values()
    ]
    others = 2 * (shape.embedding_parameters + shape.norm_parameters)
    expected = shape.layers * sum(sum(map(sum, layer)) for layer in tensors) + others
    assert load.weights_bytes(model) - rotary_bytes(model) == expected
    weights, constants = memory.weights(shape, variant(name))  # each tensor rounded up to 512 bytes
    assert 0 <= weights + constants - expected < 512 * 3 * loaded.linear_modules


def rotary_bytes(model) -> int:
    """Of the rotary frequencies, which the prediction leaves out."""
    buffers = {b.data_ptr(): b.nbytes for name, b in model.named_buffers() if "inv_freq" in name}
    return sum(buffers.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_random_base_is_held_as_a_loaded_one(tiny_model, name):
    _, loaded = load.load_base(tiny_model, variant(name), hardware=HALF)
    _, random = load.random_base(
        load.AutoConfig.from_pretrained(tiny_model), variant(name), hardware=HALF, seed=0
    )
    assert random.as_dict() == loaded.as_dict()


def adapted(model) -> PeftModel:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    return get_peft_model(model, config).train()


def loss_and_gradients(model) -> tuple[float, dict[str, torch.Tensor]]:
    ids = torch.arange(3, 35)[None] % model.config.vocab_size
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("is_fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_are_those_of_the_rounded_numbers(tiny_model, name, is_fused):
    stored = adapted(load.load_base(tiny_model, variant(name), hardware=CPU)[0])
    if is_fused:
        assert fused.fuse_adapters(stored, compute=torch.float32) == 28
    base, _ = load.load_base(tiny_model, variant("16bit"), hardware=CPU)
    for module in base.model.modules():
        if isinstance(module, nn.Linear):
            round_layer(name, module)
    loss, gradients = loss_and_gradients(stored)
    expected, others = loss_and_gradients(adapted(base))
    assert loss == pytest.approx(expected, rel=1e-5)
    assert gradients.keys() == others.keys() and len(gradients) == 56
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, others[key], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", STORED)
def test_the_backward_pass_keeps_no_dequantized_weight(tiny_model, name):
    layer = load.load_base(tiny_model, variant(name), hardware=CPU)[0].get_submodule(LAYER)
    sizes = []
    x = torch.randn(3, layer.in_features, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        out = layer(x)
    out.sum().backward()
    assert not sizes
    with dequantized_products():
        (gradient,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(gradient, layer.dequantize().sum(0).expand_as(x))
    if layer.products is None:
        assert x.grad.equal(gradient)


@pytest.mark.parametrize("name", NAMES)
def test_serving_forms_are_arithmetic_on_the_layer(tiny_model, adapter, name):
    def serve(form):
        return forms.serve(run_of(name), form, model_folder=tiny_model, weights_folder=adapter)

    base, _ = load.load_base(tiny_model, variant("16bit"), hardware=CPU)
    layer = PeftModel.from_pretrained(base, adapter).base_model.model.get_submodule(LAYER)
    delta = layer.get_delta_weight("default").detach()
    weight = rounded(name, layer.base_layer.weight.detach())
    merged, served = serve("merged_dequantized")
    torch.testing.assert_close(weight_of(merged), (weight + delta).bfloat16().float(), rtol=2**-7, atol=1e-6)
    assert served.precision.quantized_modules == 0 and type(merged.get_submodule(LAYER)) is nn.Linear
    assert not hasattr(merged.config, "quantization_config")
    again, served = serve("requantized")
    expected = rounded(name, weight + delta)
    # A number between two codes may fall to either.
    same = torch.isclose(weight_of(again), expected, rtol=1e-5, atol=1e-6).float().mean()
    assert same > 0.999 and not torch.allclose(expected, weight + delta, atol=1e-6)
    assert (served.precision.base, served.precision.quantized_modules) == (name, 28)
    _, served = serve("as_trained")
    assert served.adapters == 28


@pytest.mark.parametrize("name", STORED)
def test_a_merge_into_the_codes_is_refused(tiny_model, adapter, name):
    model, _ = load.load_base(tiny_model, variant(name), hardware=CPU)
    before = model.get_submodule(LAYER).weight.clone()
    with pytest.raises(RuntimeError, match="can't be cast|must match the size"):
        PeftModel.from_pretrained(model, adapter).merge_and_unload()
    assert model.get_submodule(f"{LAYER}.base_layer").weight.equal(before)


@pytest.mark.parametrize("name", STORED)
def test_dora_sees_the_dequantized_weight(tiny_model, name):
    model, _ = load.load_base(tiny_model, variant(name), hardware=CPU)
    norms = weight_of(model).norm(dim=1)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", use_dora=True))
    magnitude = model.base_model.model.get_submodule(LAYER).lora_magnitude_vector["default"].weight
    torch.testing.assert_close(magnitude.detach(), norms)


@pytest.mark.parametrize(
    ("name", "losses"),
    [pytest.param(*needs(name).values, LOSSES[name], marks=needs(name).marks) for name in LOSSES],
)
def test_a_short_training_is_pinned(tiny, tiny_model, splits, tmp_path, name, losses):
    run = params.Run(name, variant(name), 1, tiny.training, CPU)
    result = train.train(
        run,
        model_folder=tiny_model,
        train_rows=splits["train"],
        validation_rows=splits["validation"],
        folder=tmp_path,
    )
    assert result.speed_ups.packing and result.speed_ups.fused_adapters
    lines = (tmp_path / "history.csv").read_text().splitlines()
    column = lines[0].split(",").index("loss")
    assert [float(line.split(",")[column]) for line in lines[1:]] == pytest.approx(losses, abs=2e-4)


@pytest.mark.parametrize("name", STORED)
def test_a_layer_that_was_cast_is_refused(tiny_model, name):
    model, _ = load.load_base(tiny_model, variant(name), hardware=CPU)
    model.to(torch.float16)
    with pytest.raises(
        CheckError, match=f"{name} was asked for, and type of .* is float16 instead of float32"
    ):
        load.describe(model, variant(name), compute=torch.float32)


def test_a_wrong_gradient_is_refused_as_a_base_is_loaded(tiny_model, monkeypatch):
    monkeypatch.setattr(
        stored_linear.DequantizedProduct,
        "backward",
        staticmethod(lambda ctx, grad: (0.9 * grad @ ctx.layer.dequantized(ctx.layer, grad.dtype), None)),
    )
    with pytest.raises(
        CheckError, match="held in fp8 has another product or gradient .* they differ by 0.1 of"
    ):
        load.load_base(tiny_model, variant("fp8"), hardware=CPU)


@pytest.mark.parametrize("name", [needs("hqq4"), needs("hqq2")])
def test_widths_that_hqq_cannot_pack_are_said(name):
    with pytest.raises(
        UserError, match=f"{name} packs .* a linear layer of this model has 3 x 64, which is not"
    ):
        precisions.hqq.store(int(name[-1]), nn.Linear(64, 3))


def test_blocks_at_an_edge_have_a_scale_of_their_own():
    torch.manual_seed(0)
    layer = nn.Linear(200, 150, bias=False)
    layer.weight.data[:, 128:] *= 1000
    layer.weight.data[128:, :128] = 0
    stored = precisions.fp8.store(layer)
    for rows in (slice(0, 128), slice(128, 150)):
        for columns in (slice(0, 128), slice(128, 200)):
            part = layer.weight.data[rows, columns]
            scale = part.abs().max() / 448 if part.any() else torch.tensor(1.0)
            codes = (part / scale).to(torch.float8_e4m3fn).float()
            torch.testing.assert_close(stored.dequantize()[rows, columns], codes * scale, rtol=0.07, atol=0)
            assert (stored.dequantize()[rows, columns] - part).abs().max() <= part.abs().max() / 16


@pytest.mark.parametrize("name", ["int8_weight_only", *HQQ])
def test_a_package_that_is_missing_is_said(tiny_model, monkeypatch, name):
    package = precisions.get(name).package
    monkeypatch.setattr(precisions, "find_spec", lambda name: None)
    sentence = f"^precision {name} needs the package {package}, which is not installed; `make {package}` installs it.$"
    with pytest.raises(UserError, match=sentence):
        load.load_base(tiny_model, variant(name), hardware=CPU)


def test_fp8_on_a_cpu_is_refused(tiny_model, monkeypatch):
    monkeypatch.undo()
    with pytest.raises(
        UserError, match="precision fp8 needs a GPU of compute capability 8.9 or newer, and this device is"
    ):
        load.load_base(tiny_model, variant("fp8"), hardware=CPU)
    model, _ = load.load_base(tiny_model, variant("fp8"), hardware=CPU, on_any_device=True)
    assert precisions.recognize(model.get_submodule(LAYER)).name == "fp8"


@pytest.mark.parametrize("name", STORED)
def test_a_variant_is_tried_on_a_cpu_before_it_runs_on_a_gpu(tiny, tiny_model, monkeypatch, name):
    monkeypatch.undo()
    assert not trial.try_variant(tiny_model, variant(name), tiny.training, rest="")


def test_params_that_name_a_cpu_for_fp8_are_refused(tmp_path):
    path = tmp_path / "params.yaml"
    text = (ROOT / "params.yaml").read_text().replace("device: auto", "device: cpu")
    path.write_text(text)
    params.load(path)
    path.write_text(text.replace("variants: [lora_16bit,", "variants: [lora_fp8, lora_16bit,"))
    sentence = "variants.lora_fp8.precision is fp8 and hardware.device cpu: fp8 needs a GPU of compute capability 8.9"
    with pytest.raises(UserError, match=sentence):
        params.load(path)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_codes_are_unpacked_as_hqq_packs_them(bits):
    pytest.importorskip("hqq", reason="hqq is not installed: make hqq")
    from hqq.core.quantize import Quantizer

    groups = 283 if bits == 3 else 280
    codes = torch.randint(0, 2**bits, (groups, 64), generator=torch.Generator().manual_seed(0))
    packed = Quantizer.pack[Quantizer.bit_to_packing[bits]](codes)
    assert precisions.hqq.unpacked(bits, packed, groups).equal(codes.to(torch.uint8))


def test_a_table_of_precisions_needs_none_of_the_packages():
    assert {"hqq", "torchao"} & set(sys.modules) <= {name for name in ("hqq", "torchao") if find_spec(name)}
    assert [precisions.get(name).name for name in HQQ] == HQQ


@pytest.mark.parametrize("name", NAMES)
def test_the_cards_code_loads_the_same_model(tiny_model, adapter, name):
    model, _ = forms.serve(run_of(name), "as_trained", model_folder=tiny_model, weights_folder=adapter)
    code = cards.loading_adapter(variant(name), Lineage(), compute="float32", device="cpu", folder=adapter)
    names: dict = {}
    exec(code.split("tokenizer =")[0].replace(cards.MODEL.as_posix(), str(tiny_model)), names)
    torch.testing.assert_close(forms.probe(names["model"]), forms.probe(model), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_form_is_loaded_by_transformers_alone(tiny_model, adapter, tmp_path, name):
    model, _ = forms.serve(run_of(name), "requantized", model_folder=tiny_model, weights_folder=adapter)
    with dequantized_products():
        answer = forms.probe(model)
    precisions.get(name).savable(model, torch.float32).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(forms.probe(again), answer, rtol=1e-4, atol=1e-5)


GPU = params.Hardware(device="cuda", compute_dtype="bfloat16", data_workers=0)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
WIDE = LlamaConfig(
    hidden_size=1024,
    intermediate_size=2816,
    num_hidden_layers=2,
    num_attention_heads=16,
    num_key_value_heads=4,
    vocab_size=512,
)


@needs_gpu
@pytest.mark.parametrize("name", NAMES)
def test_gpu_loss_and_gradients_are_those_of_16_bit_layers(name):
    """Against the same dequantized weights in PyTorch's own layers, all in bfloat16; products in FP8 are near them."""
    times = 1 if precisions.get(name).products is None else 10
    stored, _ = load.random_base(WIDE, variant(name), hardware=GPU, seed=0)
    plain, _ = load.random_base(WIDE, variant("16bit"), hardware=GPU, seed=0)
    for module, other in zip(stored.model.modules(), plain.model.modules(), strict=True):
        if isinstance(other, nn.Linear):
            other.weight.data = precisions.get(name).dequantized_weight(module, torch.bfloat16)
    results = []
    for model in (stored, plain):
        model = adapted(model)
        assert fused.fuse_adapters(model, compute=torch.bfloat16) == 14
        ids = (torch.arange(256, device="cuda")[None] * 37) % 512
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        results.append((loss.item(), [p.grad.float() for p in model.parameters() if p.grad is not None]))
    (loss, gradients), (expected, others) = results
    assert loss == pytest.approx(expected, rel=1e-3 * times) and len(gradients) == len(others) == 28
    for gradient, other in zip(gradients, others, strict=True):
        assert (gradient - other).norm() < 0.02 * times * other.norm()


@needs_gpu
@pytest.mark.parametrize("name", NAMES)
def test_gpu_a_graph_replays_what_a_step_computes(name):
    model, _ = load.random_base(WIDE, variant(name), hardware=GPU, seed=0)
    model = adapted(model)
    fused.fuse_adapters(model, compute=torch.bfloat16)
    layer = model.base_model.model.get_submodule(LAYER)
    x = torch.randn(64, 2816, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def step():
        out = layer(x)
        (gradient,) = torch.autograd.grad(out.float().square().sum(), x)
        return out, gradient

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    expected = [tensor.clone() for tensor in step()]
    graph.replay()
    for tensor, other in zip(captured, expected, strict=True):
        torch.testing.assert_close(tensor, other)


@needs_gpu
@pytest.mark.parametrize("name", NAMES)
def test_gpu_the_weights_take_the_memory_that_is_predicted(name):
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model, _ = load.random_base(WIDE, variant(name), hardware=GPU, seed=0)
    taken = torch.cuda.memory_allocated() - before
    assert taken == pytest.approx(sum(memory.weights(memory.Shape.of(model.config), variant(name))), rel=0.01)
