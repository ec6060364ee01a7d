"""Base layers that multiply in FP8: what is rounded, to what, and that every way through a layer rounds alike."""

import pytest
import torch
from fp8_by_hand import Fp8Linear, e4m3, rounded_rows, with_plain_products
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig

from workflow import params, precisions
from workflow.models import load
from workflow.precisions import fp8_products, fp8_rows, stored_linear
from workflow.precisions.base import Quantization, dequantized_products
from workflow.runtime.errors import CheckError
from workflow.training.speed import fused, packing
from workflow.training.speed.fused import AdaptedLinear, DecomposedLinear
from workflow.training.speed.shared_inputs import Adapted, AdaptedGatedSilu, AdaptedLinears

IN, OUT, RANK, SCALING = 72, 104, 4, 0.75  # no multiples of 16
TYPES = [torch.float32, torch.bfloat16]
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-7}


@pytest.fixture(autouse=True)
def _alike_each_time():
    torch.manual_seed(0)


def layers(inputs: int = IN, outputs: int = OUT, *, bias: bool = False, dtype=torch.float32):
    """The same layer stored, and by hand."""
    plain = nn.Linear(inputs, outputs, bias=bias, dtype=dtype).requires_grad_(False)
    by_hand = Fp8Linear(inputs, outputs, bias=bias, dtype=dtype).requires_grad_(False)
    by_hand.load_state_dict(plain.state_dict())
    return fp8_products.store(plain), by_hand


def random(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(dtype).requires_grad_()


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    assert found.shape == wanted.shape
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


def alike(found, wanted, inputs, within: float) -> None:
    """Assert that outputs are, and what reaches inputs from a gradient that differs from element to element."""
    found, wanted = ([out] if torch.is_tensor(out) else list(out) for out in (found, wanted))
    grads = [torch.randn_like(out) for out in found]
    for out, right in zip(found, wanted, strict=True):
        assert out.dtype == right.dtype and distance(out, right) < within
    left, right = (torch.autograd.grad(outs, inputs, grads, allow_unused=True) for outs in (found, wanted))
    for grad, other in zip(left, right, strict=True):
        assert grad.dtype == other.dtype and distance(grad, other) < within


def test_numbers_are_rounded_as_pytorch_rounds_them():
    """This holds the arithmetic of the other tests."""
    numbers = torch.cat([torch.linspace(-448, 448, 40001), torch.linspace(-0.05, 0.05, 40001)]).double()
    assert e4m3(numbers).equal(numbers.float().to(torch.float8_e4m3fn).double())


@pytest.mark.parametrize("dtype", [*TYPES, torch.float16])
def test_a_row_is_rounded_by_a_scale_of_its_own(dtype):
    x = torch.randn(6, IN).to(dtype) * torch.tensor([1, 1e-3, 1e3, 0, 1, 1]).to(dtype)[:, None]
    x[4] = 0
    x[4, 5] = -3
    rows = fp8_rows.quantized_rows(x)
    numbers = rows.codes.double() * rows.scales.double()[:, None]
    assert numbers.equal(rounded_rows(x))
    assert rows.codes.float().abs().amax(1).tolist() == [448, 448, 448, 0, 448, 448]
    assert rows.scales[3] == 1 and not numbers[3].any()
    assert (numbers - x.double()).abs().max(1).values.le(x.double().abs().amax(1) / 27).all()


def test_what_is_not_a_number_stays_none():
    x = torch.randn(4, IN)
    x[1, 3], x[2, 5], x[3] = float("nan"), float("inf"), 1e-38
    layer, _ = layers()
    assert layer(x).isnan().any(1).tolist() == [False, True, True, False]
    assert not layer(x)[3].any()  # nothing but numbers too small for a scale


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
def test_a_product_and_its_gradient_are_those_of_the_rounded_numbers(dtype, bias):
    layer, by_hand = layers(bias=bias, dtype=dtype)
    x = random(2, 5, IN, dtype=dtype)
    alike(layer(x), by_hand(x), [x], ROUNDING[dtype])
    assert 0.01 < distance(layer(x), by_hand.weight.double().matmul(x.double()[..., None])[..., 0] + (by_hand.bias if bias else 0)) < 0.06  # fmt: skip


def test_inputs_are_rounded_too():
    """Which other 8-bit precisions here do not do."""
    layer, by_hand = layers()
    x = random(9, IN)
    assert 0.01 < distance(layer(x), with_plain_products(x, by_hand.weight)) < 0.05
    with dequantized_products():
        assert distance(layer(x), with_plain_products(x, by_hand.weight)) < 1e-6


@pytest.mark.parametrize("dtype", TYPES)
def test_a_row_alone_is_the_row_in_a_pack(dtype):
    """To the last bit, forward and backward, whatever lies beside it."""
    layer, _ = layers(dtype=dtype)
    x, grad = random(7, IN, dtype=dtype), torch.randn(7, OUT).to(dtype)
    out = layer(x)
    (together,) = torch.autograd.grad(out, x, grad)
    for index in range(7):
        row = x[index : index + 1].detach().requires_grad_()
        alone = layer(row)
        assert alone[0].equal(out[index])
        assert torch.autograd.grad(alone, row, grad[index : index + 1])[0][0].equal(together[index])


@pytest.mark.parametrize("dtype", TYPES)
def test_an_adapted_layer_multiplies_as_its_base_alone_does(dtype):
    layer, by_hand = layers(bias=True, dtype=dtype)
    x, a, b = random(2, 5, IN, dtype=dtype), random(RANK, IN), random(OUT, RANK)
    wanted = by_hand(x) + (SCALING * (x @ a.t().to(dtype) @ b.t().to(dtype)))
    alike(AdaptedLinear.apply(x, None, a, b, layer, SCALING), wanted, [x, a, b], 2 * ROUNDING[dtype])


def test_a_decomposed_layer_multiplies_as_its_base_alone_does():
    layer, by_hand = layers(bias=True)
    x, a, b, magnitude = random(3, IN), random(RANK, IN), random(OUT, RANK), random(OUT)
    weight = rounded_rows(by_hand.weight).float()
    norm = (weight + SCALING * b @ a).norm(dim=1).detach()
    plain = by_hand(x) - by_hand.bias + SCALING * (x @ a.t() @ b.t())
    found = DecomposedLinear.apply(x, a, b, magnitude, layer, weight.square().sum(1), SCALING)
    alike(found, plain * magnitude / norm + by_hand.bias, [x, a, b, magnitude], 1e-5)


@pytest.mark.parametrize("dtype", TYPES)
def test_siblings_round_their_input_once_and_compute_what_each_does_alone(monkeypatch, dtype):
    stored = [layers(outputs=outputs, bias=True, dtype=dtype)[0] for outputs in (OUT, 40, 24)]
    sixteen = nn.Linear(IN, 48, dtype=dtype).requires_grad_(False)  # a layer in 16 bits reads the same input
    bases = (stored[0], sixteen, *stored[1:])
    x = random(2, 5, IN, dtype=dtype)
    a, b = ([random(*shape) for shape in shapes] for shapes in ([(RANK, IN)] * 4, [(base.out_features, RANK) for base in bases]))  # fmt: skip
    alone = [AdaptedLinear.apply(x, None, *pair, base, SCALING) for *pair, base in zip(a, b, bases, strict=True)]  # fmt: skip
    calls = []
    plain = fp8_rows.quantized_rows
    monkeypatch.setattr(fp8_rows, "quantized_rows", lambda *args: calls.append(args[0]) or plain(*args))
    together = AdaptedLinears.apply(x, None, tuple(Adapted(base, SCALING) for base in bases), *a, *b)
    assert len(calls) == 1
    alike(together, alone, [x, *a, *b], 2 * ROUNDING[dtype])
    assert len(calls) == 1 + 2 * 3  # of each layer's gradient, in two backward passes
    idle = [torch.zeros_like(weight) for weight in b]
    together = AdaptedLinears.apply(x, None, tuple(Adapted(base, SCALING) for base in bases), *a, *idle)
    assert all(out.equal(base(x)) for out, base in zip(together, bases, strict=True))


def test_a_layer_of_a_gated_silu_multiplies_as_its_base_alone_does():
    layer, by_hand = layers()
    gate, up, a, b = random(5, IN), random(5, IN), random(RANK, IN), random(OUT, RANK)
    found = AdaptedGatedSilu.apply(gate, up, a, b, Adapted(layer, SCALING))
    product = nn.functional.silu(gate).mul(up)
    alike(found, by_hand(product) + SCALING * (product @ a.t() @ b.t()), [gate, up, a, b], 1e-5)


@pytest.mark.parametrize("shape", [(IN,), (1, IN), (2, 3, 4, IN), (0, IN)])
def test_an_input_has_any_shape(shape):
    layer, by_hand = layers(bias=True)
    x, a, b = random(*shape), random(RANK, IN), random(OUT, RANK)
    for found in (layer(x), AdaptedLinear.apply(x, None, a, 0 * b, layer, SCALING)):
        torch.testing.assert_close(found, by_hand(x), rtol=1e-5, atol=1e-5)
        found.sum().backward()
    assert x.grad.shape == shape


def variant() -> params.Variant:
    return params.preset("default").variants["lora_fp8_products"]


CONFIG = LlamaConfig(
    hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=128,
)  # fmt: skip


def small_model(monkeypatch):
    monkeypatch.setattr(load, "check_device", lambda precision, device: None)
    hardware = params.Hardware(device="cpu", compute_dtype="float32", data_workers=0)
    model, _ = load.random_base(CONFIG, variant(), hardware=hardware, seed=0)
    return get_peft_model(
        model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    ).train()


def test_ways_that_round_apart_are_compared_without_the_rounding_of_inputs(monkeypatch):
    """A fused perceptron and a pack are tried before they are used; a step of FP8 would look like a fault there."""
    model = small_model(monkeypatch)
    assert fused.fuse_adapters(model, compute=torch.float32) == 14

    def off_by_a_rounding(gate, up):
        """As 16 bits are, where the same work is done in another order."""
        product = nn.functional.silu(gate) * up
        return product * (1 + 2.0**-9 * (-1) ** torch.arange(product.shape[-1]))

    calls = []
    plain = fp8_rows.quantized_rows
    monkeypatch.setattr(fp8_rows, "quantized_rows", lambda *args: calls.append(args[0]) or plain(*args))
    monkeypatch.setattr(fused, "gated_silu", off_by_a_rounding)
    assert fused.fuse_layers(model) == 5 + 2
    assert packing.can_be_packed(model.get_base_model(), longest=64)
    assert not calls
    model(input_ids=torch.arange(9)[None])
    assert len(calls) == 14


def test_a_gradient_of_another_layer_is_refused(monkeypatch):
    layer, _ = layers()
    stored_linear.check_gradient(layer, fp8_products.TOLERANCE)
    right = fp8_products.PRODUCTS
    layer.products = type(right)(
        right.prepared, right.product, lambda *args: 0.9 * right.input_gradient(*args)
    )
    with pytest.raises(CheckError, match="held in fp8_products has another product or gradient"):
        stored_linear.check_gradient(layer, fp8_products.TOLERANCE)


def test_a_layer_takes_a_byte_a_weight_and_a_number_an_output():
    layer, _ = layers()
    sizes = fp8_products.tensor_bytes(IN, OUT, Quantization())
    assert sizes == ([layer.weight.nbytes], [layer.weight_scale.nbytes]) == ([IN * OUT], [4 * OUT])
    assert precisions.recognize(layer).name == "fp8_products"


needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
    reason="needs a GPU that multiplies in FP8",
)


@needs_gpu
@pytest.mark.parametrize("dtype", [*TYPES, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (17, 1000), (300, 4096), (33, 11008), (5, 32768)])
def test_gpu_the_kernel_rounds_rows_as_pytorch_does(shape, dtype):
    x = torch.randn(shape, device="cuda").to(dtype)
    if len(x) > 2:
        x[1], x[2] = 0, x[2] * 1e-6
    for factor in (None, torch.rand(shape[1], device="cuda") + 0.1):
        rows, plain = fp8_rows.quantized_rows(x, factor), fp8_rows.rows_by_pytorch(x, factor)
        assert rows.scales.equal(plain.scales)
        same = (rows.codes.float() == plain.codes.float()).float().mean()
        assert same > 0.999  # compute capability 8.9 rounds to float16 first


@needs_gpu
@pytest.mark.parametrize(
    "shape", [(1, 64, 96), (7, 64, 64), (301, 1024, 2816), (64, 2816, 1024), (33, 50, 70)]
)
def test_gpu_products_are_the_exact_sums_up_to_rounding(shape):
    tokens, inputs, outputs = shape
    layer = layers(inputs, outputs, dtype=torch.bfloat16)[0].cuda()
    x, grad = (torch.randn(tokens, width, device="cuda").bfloat16() for width in (inputs, outputs))
    codes = layer.weight.view(torch.float8_e4m3fn)
    rows, ones = fp8_products.prepared(x), torch.ones(inputs, device="cuda")
    found = fp8_products.product(layer, rows, x.dtype)
    assert distance(found, fp8_rows.product_in_float64(rows, codes.t(), layer.weight_scale, x.dtype)) < 5e-3
    back = fp8_rows.quantized_rows(grad, layer.weight_scale)
    found = fp8_products.input_gradient(layer, grad)
    assert distance(found, fp8_rows.product_in_float64(back, codes, ones, x.dtype)) < 5e-3
