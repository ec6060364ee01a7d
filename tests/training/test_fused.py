"""The fused steps compute what the plain ones do, gradients included, and keep less for the backward pass."""

import bitsandbytes as bnb
import pytest
import torch
from conftest import CPU
from live_tensors import Live
from peft import get_peft_model
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM
from transformers.models.falcon_h1.configuration_falcon_h1 import FalconH1Config
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1MLP
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.seed_oss.configuration_seed_oss import SeedOssConfig
from transformers.models.seed_oss.modeling_seed_oss import SeedOssMLP

from workflow.methods.lora import LORA
from workflow.models import load
from workflow.training.speed import fused
from workflow.training.speed.fused import IGNORED, AdaptedLinear, GatedSilu, LinearCrossEntropy
from workflow.training.speed.shared_inputs import (
    Adapted,
    AdaptedGatedSilu,
    AdaptedLinears,
    Siblings,
    share_inputs,
)

IN, OUT, RANK, SCALING = 64, 96, 8, 0.75
BASES = ["16bit", "nf4", "nf4_dq"]
ROUNDING = 2**-7  # bfloat16 keeps 8 bits, and a value is rounded more than once


@pytest.fixture(autouse=True)
def _alike_each_time():
    load.use_exact_cpu_kernels()
    torch.manual_seed(0)


def linear(kind: str, *, bias: bool = False, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """A frozen layer as a base model of this precision has it."""
    if kind == "16bit":
        layer = nn.Linear(IN, OUT, bias=bias, dtype=dtype)
    else:
        layer = bnb.nn.Linear4bit(
            IN, OUT, bias=bias, compute_dtype=dtype, quant_type="nf4", compress_statistics=kind == "nf4_dq"
        ).to("cpu", dtype)
        assert layer.weight.quant_state.nested == (kind == "nf4_dq")
    return layer.requires_grad_(False)


def random(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=grad)


def gradients(out: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """What reaches each input from a gradient that differs from element to element."""
    weights = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    return list(torch.autograd.grad(out, inputs, weights))


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The error's size against that of the wanted."""
    assert found.shape == wanted.shape
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", BASES)
def test_an_adapted_layer_is_the_base_plus_the_scaled_product(kind, bias, dropped):
    base = linear(kind, bias=bias)
    x, a, b, after_dropout = random(2, 5, IN), random(RANK, IN), random(OUT, RANK), random(2, 5, IN)
    source = after_dropout if dropped else x
    inputs = [x, a, b, *([source] if dropped else [])]
    found = AdaptedLinear.apply(x, source if dropped else None, a, b, base, SCALING)
    wanted = base(x) + SCALING * (source @ a.T @ b.T)
    assert distance(found, wanted) < 1e-5
    for grad, right in zip(gradients(found, inputs), gradients(wanted, inputs), strict=True):
        assert distance(grad, right) < 1e-5


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("kind", BASES)
def test_in_bfloat16_an_adapted_layer_is_right_up_to_rounding(kind, dropped):
    """Against float64, with the weight that the layer itself shows: the images of the unit vectors."""
    half = torch.bfloat16
    base = linear(kind, dtype=half)
    weight = base(torch.eye(IN, dtype=half)).double()
    x, a, b, after_dropout = (
        random(3, 7, IN, dtype=half),
        random(RANK, IN),
        random(OUT, RANK),
        random(3, 7, IN),
    )
    source = after_dropout.to(half).detach().requires_grad_() if dropped else x
    inputs = [x, a, b, *([source] if dropped else [])]
    found = AdaptedLinear.apply(x, source if dropped else None, a, b, base, SCALING)
    wanted = x.double() @ weight + SCALING * (source.double() @ a.double().T @ b.double().T)
    assert found.dtype == half and distance(found, wanted) < ROUNDING
    for tensor, grad, right in zip(inputs, gradients(found, inputs), gradients(wanted, inputs), strict=True):
        assert grad.dtype == tensor.dtype and distance(grad, right) < ROUNDING


@pytest.mark.parametrize("kind", BASES)
def test_an_adapter_learns_from_an_input_that_needs_no_gradient(kind):
    """The first layer's, whose input is a frozen embedding."""
    base, x, a, b = linear(kind), random(5, IN, grad=False), random(RANK, IN), random(OUT, RANK)
    found = gradients(AdaptedLinear.apply(x, None, a, b, base, SCALING), [a, b])
    wanted = gradients(base(x) + SCALING * (x @ a.T @ b.T), [a, b])
    assert all(distance(grad, right) < 1e-5 for grad, right in zip(found, wanted, strict=True))


@pytest.mark.parametrize("shape", [(IN,), (1, IN), (2, 3, 4, IN), (0, IN)])
def test_an_adapted_layer_takes_an_input_of_any_shape(shape):
    base, x, a, b = linear("16bit", bias=True), random(*shape), random(RANK, IN), random(OUT, RANK)
    found, wanted = AdaptedLinear.apply(x, None, a, b, base, SCALING), base(x) + SCALING * (x @ a.T @ b.T)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(
        gradients(found, [x, a, b]), gradients(wanted, [x, a, b]), rtol=1e-4, atol=1e-4
    )


def test_an_adapted_layer_takes_an_input_that_is_a_view_across_memory():
    base, a, b = linear("16bit", bias=True), random(RANK, IN), random(OUT, RANK)
    across = random(IN, 5, 2)
    x = across.permute(2, 1, 0)
    found, wanted = AdaptedLinear.apply(x, None, a, b, base, SCALING), base(x) + SCALING * (x @ a.T @ b.T)
    assert distance(found, wanted) < 1e-5
    inputs = [across, a, b]
    for grad, right in zip(gradients(found, inputs), gradients(wanted, inputs), strict=True):
        assert distance(grad, right) < 1e-5


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("kind", ["16bit", "nf4_dq"])
def test_an_adapted_layers_gradients_are_its_slopes(kind, dropped):
    double = torch.float64
    base = linear(kind, bias=True, dtype=double if kind == "16bit" else torch.float32)
    x, source = random(2, IN, dtype=double), random(2, IN, dtype=double)
    a, b = random(2, IN, dtype=double), random(OUT, 2, dtype=double)
    assert torch.autograd.gradcheck(
        lambda x, source, a, b: AdaptedLinear.apply(x, source if dropped else None, a, b, base, SCALING)[
            :, ::12
        ],
        (x, source.requires_grad_(dropped), a, b),
    )


def pair(kind: str, *, rank: int, scaling: float, bias: bool, dtype: torch.dtype) -> tuple:
    """An adapter's A and B, and the layer that they are on."""
    return random(rank, IN), random(OUT, rank), Adapted(linear(kind, bias=bias, dtype=dtype), scaling)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", BASES)
def test_layers_of_one_input_give_what_each_gives_alone(kind, bias):
    """Ranks and scalings that differ too."""
    x = random(2, 5, IN)
    layers = [
        pair(kind, rank=rank, scaling=scaling, bias=bias, dtype=torch.float32)
        for rank, scaling in ((8, 0.75), (4, 2.0), (2, 0.1))
    ]
    a, b, adapted_layers = zip(*layers, strict=True)
    found = AdaptedLinears.apply(x, None, adapted_layers, *a, *b)
    wanted = [layer.base(x) + layer.scaling * (x @ one.T @ other.T) for one, other, layer in layers]
    for out, right in zip(found, wanted, strict=True):
        assert distance(out, right) < 1e-5
    inputs = [x, *a, *b]
    for grad, right in zip(
        gradients(torch.cat(found), inputs), gradients(torch.cat(wanted), inputs), strict=True
    ):
        assert distance(grad, right) < 1e-5


@pytest.mark.parametrize("kind", BASES)
def test_in_bfloat16_layers_of_one_input_are_right_up_to_rounding(kind):
    half = torch.bfloat16
    x = random(3, 7, IN, dtype=half)
    layers = [pair(kind, rank=RANK, scaling=SCALING, bias=False, dtype=half) for _ in range(3)]
    a, b, adapted_layers = zip(*layers, strict=True)
    found = torch.cat(AdaptedLinears.apply(x, None, adapted_layers, *a, *b))
    weights = [layer.base(torch.eye(IN, dtype=half)).double() for layer in adapted_layers]
    wanted = torch.cat(
        [
            x.double() @ weight + SCALING * (x.double() @ one.double().T @ other.double().T)
            for weight, one, other in zip(weights, a, b, strict=True)
        ]
    )
    assert found.dtype == half and distance(found, wanted) < ROUNDING
    inputs = [x, *a, *b]
    for tensor, grad, right in zip(inputs, gradients(found, inputs), gradients(wanted, inputs), strict=True):
        assert grad.dtype == tensor.dtype and distance(grad, right) < ROUNDING


def test_layers_of_one_input_learn_where_the_input_needs_no_gradient():
    x = random(5, IN, grad=False)
    layers = [pair("nf4", rank=RANK, scaling=SCALING, bias=False, dtype=torch.float32) for _ in range(2)]
    a, b, adapted_layers = zip(*layers, strict=True)
    found = gradients(torch.cat(AdaptedLinears.apply(x, None, adapted_layers, *a, *b)), [*a, *b])
    wanted = gradients(
        torch.cat([layer.base(x) + SCALING * (x @ one.T @ other.T) for one, other, layer in layers]),
        [*a, *b],
    )
    assert all(distance(grad, right) < 1e-5 for grad, right in zip(found, wanted, strict=True))


def test_the_output_of_a_norm_is_computed_again_and_not_kept():
    x, norm = random(5, IN), LlamaRMSNorm(IN)
    norm.weight.data.uniform_(0.5, 2)
    fused.fuse_layers(norm)
    layers = [pair("nf4", rank=RANK, scaling=SCALING, bias=False, dtype=torch.float32) for _ in range(2)]
    a, b, adapted_layers = zip(*layers, strict=True)
    normed, saved = norm(x), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        found = torch.cat(AdaptedLinears.apply(normed, normed.norm_of, adapted_layers, *a, *b))
    assert x.data_ptr() in saved and normed.data_ptr() not in saved
    wanted = torch.cat(AdaptedLinears.apply(norm(x), None, adapted_layers, *a, *b))
    inputs = [x, *a, *b]
    for grad, right in zip(gradients(found, inputs), gradients(wanted, inputs), strict=True):
        assert torch.equal(grad, right)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", BASES)
def test_an_adapted_layer_of_a_gated_silu_is_both_in_turn(kind, bias):
    gate, up = random(2, 5, IN), random(2, 5, IN)
    a, b, layer = pair(kind, rank=RANK, scaling=SCALING, bias=bias, dtype=torch.float32)
    found = AdaptedGatedSilu.apply(gate, up, a, b, layer)
    product = functional.silu(gate) * up
    wanted = layer.base(product) + SCALING * (product @ a.T @ b.T)
    assert distance(found, wanted) < 1e-5
    inputs = [gate, up, a, b]
    for grad, right in zip(gradients(found, inputs), gradients(wanted, inputs), strict=True):
        assert distance(grad, right) < 1e-5


def test_an_adapted_layer_of_a_gated_silu_keeps_the_two_and_not_their_product():
    half = torch.bfloat16
    gate, up = random(2, 5, IN, dtype=half), random(2, 5, IN, dtype=half)
    a, b, layer = pair("16bit", rank=RANK, scaling=SCALING, bias=False, dtype=half)
    with Kept(nn.ParameterList([a, b])) as kept:
        out = AdaptedGatedSilu.apply(gate, up, a, b, layer)
    assert out.requires_grad
    assert sorted(tensor.numel() for tensor in kept.tensors.values()) == [10 * RANK, 10 * IN, 10 * IN]


@pytest.mark.parametrize("name", ["lora_16bit", "qlora_nf4_dq"])
def test_shared_inputs_give_the_same_model(tiny_model, tiny, name):
    model, _ = adapted(tiny_model, tiny, name)
    plain = outputs(model)
    fused.fuse_layers(model)
    fused.fuse_adapters(model, compute=torch.float32)
    assert share_inputs(model) == 6 * model.config.num_hidden_layers  # all but the attention's output
    for found, wanted in zip(outputs(model), plain, strict=True):
        assert distance(found, wanted) < 1e-5


@pytest.mark.parametrize("changes", [{"dropout": 0.5}, {"target_modules": ["q_proj", "o_proj", "up_proj"]}])
def test_layers_that_read_inputs_of_their_own_are_not_shared(tiny_model, tiny, changes):
    model, _ = adapted(tiny_model, tiny, "lora_16bit", **changes)
    fused.fuse_layers(model)
    fused.fuse_adapters(model, compute=torch.float32)
    assert share_inputs(model) == 0


def test_adapters_of_another_kind_are_not_shared(tiny_model, tiny):
    """Those that `fuse_adapters` left to PEFT."""
    model, _ = adapted(tiny_model, tiny, "lora_int8")
    fused.fuse_layers(model)
    fused.fuse_adapters(model, compute=torch.float32)
    assert share_inputs(model) == 0


def test_siblings_that_are_given_other_inputs_compute_alone(tiny_model, tiny):
    model, _ = adapted(tiny_model, tiny, "lora_16bit")
    fused.fuse_adapters(model, compute=torch.float32)
    attention = model.get_base_model().model.layers[0].self_attn
    first, second, third = random(3, 64), random(3, 64), random(3, 64)
    modules = [attention.q_proj, attention.k_proj, attention.v_proj]
    wanted = [
        fused.adapted_forward(module, x) for module, x in zip(modules, (first, second, third), strict=True)
    ]
    siblings = Siblings(modules)
    for _ in range(2):
        found = [module(x) for module, x in zip(modules, (first, second, third), strict=True)]
        for out, right in zip(found, wanted, strict=True):
            assert distance(out, right) < 1e-6
    assert not siblings.share and not siblings.parts


def test_a_gated_silu_is_the_plain_product():
    gate, up = random(3, 5, 32), random(3, 5, 32)
    found, wanted = GatedSilu.apply(gate, up), gate * torch.sigmoid(gate) * up
    assert distance(found, wanted) < 1e-5
    for grad, right in zip(gradients(found, [gate, up]), gradients(wanted, [gate, up]), strict=True):
        assert distance(grad, right) < 1e-5


def test_in_bfloat16_a_gated_silu_is_right_up_to_rounding():
    gate, up = random(64, 32, dtype=torch.bfloat16), random(64, 32, dtype=torch.bfloat16)
    found, wanted = GatedSilu.apply(gate, up), functional.silu(gate.double()) * up.double()
    assert found.dtype == torch.bfloat16 and distance(found, wanted) < ROUNDING
    for grad, right in zip(gradients(found, [gate, up]), gradients(wanted, [gate, up]), strict=True):
        assert grad.dtype == torch.bfloat16 and distance(grad, right) < ROUNDING


def test_a_gated_silus_gradients_are_its_slopes():
    assert torch.autograd.gradcheck(
        GatedSilu.apply, (random(3, 4, dtype=torch.float64), random(3, 4, dtype=torch.float64))
    )


ROWS, SIZE, VOCABULARY = 37, 16, 50


def scored(*, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, output embeddings and labels: a third ignored, and some that are predicted rightly.

    An ignored one's prediction is token 0.
    """
    hidden, weight = random(ROWS, SIZE, dtype=dtype), random(VOCABULARY, SIZE, dtype=dtype)
    weight.data[0] = hidden.data[0]
    assert (hidden @ weight.T)[0].argmax() == 0
    labels = torch.randint(VOCABULARY, (ROWS,))
    labels[::2] = (hidden @ weight.T).argmax(1)[::2]
    labels[::3] = IGNORED
    return hidden, weight, labels


@pytest.mark.parametrize("rows_at_once", [1, 5, ROWS, 1000])
def test_a_chunked_cross_entropy_is_the_whole_ones(monkeypatch, rows_at_once):
    monkeypatch.setattr(fused, "LOGITS_AT_ONCE", rows_at_once * VOCABULARY)
    hidden, weight, labels = scored()
    loss, right = LinearCrossEntropy.apply(hidden, weight, labels)
    logits = hidden @ weight.T
    wanted = functional.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert right.item() == (logits.argmax(1) == labels).sum().item() > 5 and not right.requires_grad
    # As in training, where the sum is divided by the tokens.
    found_grads = torch.autograd.grad(loss / 17, [hidden, weight])
    wanted_grads = torch.autograd.grad(wanted / 17, [hidden, weight])
    assert all(
        distance(found, wanted) < 1e-5 for found, wanted in zip(found_grads, wanted_grads, strict=True)
    )


@pytest.mark.parametrize("learned", ["hidden", "weight"])
def test_a_chunked_cross_entropy_gives_each_gradient_without_the_other(monkeypatch, learned):
    monkeypatch.setattr(fused, "LOGITS_AT_ONCE", 5 * VOCABULARY)
    hidden, weight, labels = scored()
    (hidden if learned == "weight" else weight).requires_grad_(False)
    wanted_of = hidden if learned == "hidden" else weight
    (found,) = torch.autograd.grad(LinearCrossEntropy.apply(hidden, weight, labels)[0], [wanted_of])
    whole = functional.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    assert distance(found, torch.autograd.grad(whole, [wanted_of])[0]) < 1e-5


def test_in_bfloat16_a_chunked_cross_entropy_is_right_up_to_rounding(monkeypatch):
    monkeypatch.setattr(fused, "LOGITS_AT_ONCE", 5 * VOCABULARY)
    hidden, weight, labels = scored(dtype=torch.bfloat16)
    loss, _ = LinearCrossEntropy.apply(hidden, weight, labels)
    whole = functional.cross_entropy(hidden.double() @ weight.double().T, labels, reduction="sum")
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(whole.item(), rel=ROUNDING)
    found = torch.autograd.grad(loss / 17, [hidden, weight])
    for grad, right in zip(found, torch.autograd.grad(whole / 17, [hidden, weight]), strict=True):
        assert grad.dtype == torch.bfloat16 and distance(grad, right) < ROUNDING


@pytest.mark.parametrize("tokens", [67, 253])
def test_the_divisor_of_the_loss_scales_the_gradient_exactly(tokens):
    """Rounding moves each element, and not all of them together."""
    hidden, weight, labels = scored(dtype=torch.bfloat16)
    (found,) = torch.autograd.grad(LinearCrossEntropy.apply(hidden, weight, labels)[0] / tokens, [hidden])
    whole = functional.cross_entropy(hidden.double() @ weight.double().T, labels, reduction="sum") / tokens
    (wanted,) = (grad.double() for grad in torch.autograd.grad(whole, [hidden]))
    assert ((found * wanted).sum() / wanted.square().sum()).item() == pytest.approx(1, abs=1e-3)


def test_a_float32_head_gets_a_float32_gradient_from_16_bit_states():
    """A full fine-tuning holds its weights in float32."""
    hidden, weight, labels = scored()
    hidden = hidden.detach().bfloat16()
    (found,) = torch.autograd.grad(LinearCrossEntropy.apply(hidden, weight, labels)[0], [weight])
    whole = functional.cross_entropy(hidden.double() @ weight.double().T, labels, reduction="sum")
    assert found.dtype == torch.float32
    assert distance(found, torch.autograd.grad(whole, [weight])[0]) < ROUNDING


@pytest.mark.parametrize("rows", [0, 9])
def test_rows_without_a_label_cost_and_teach_nothing(rows):
    hidden, weight = random(rows, SIZE), random(VOCABULARY, SIZE)
    loss, right = LinearCrossEntropy.apply(hidden, weight, torch.full((rows,), IGNORED))
    assert loss.item() == right.item() == 0
    assert all(not grad.any() for grad in torch.autograd.grad(loss, [hidden, weight]))


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        made = [value for value in (out if isinstance(out, tuple) else (out,)) if torch.is_tensor(value)]
        self.elements = max([self.elements, *(value.numel() for value in made)])
        return out


def test_a_chunked_cross_entropy_never_holds_all_logits(monkeypatch):
    rows, size, vocabulary = 300, 8, 64
    monkeypatch.setattr(fused, "LOGITS_AT_ONCE", 2500)
    hidden, labels = random(rows, size), torch.randint(vocabulary, (rows,))
    weight = random(vocabulary, size, grad=False)
    with Largest() as plain:
        functional.cross_entropy(hidden @ weight.T, labels, reduction="sum").backward()
    with Largest() as chunked:
        LinearCrossEntropy.apply(hidden, weight, labels)[0].backward()
    assert plain.elements == rows * vocabulary
    assert chunked.elements == 39 * vocabulary <= 2500  # more than the hidden states' 300 * 8


@pytest.mark.parametrize("learns", [True, False])
def test_a_chunk_of_logits_is_made_when_that_before_it_is_gone(monkeypatch, learns):
    """In 32 bits a chunk and its log-probabilities, and beside them what the loss is made of."""
    rows, size, vocabulary, at_once = 60, 8, 4096, 20
    monkeypatch.setattr(fused, "LOGITS_AT_ONCE", at_once * vocabulary)
    hidden = random(rows, size, grad=False).bfloat16().requires_grad_(learns)
    weight, labels = random(vocabulary, size, grad=False).bfloat16(), torch.randint(vocabulary, (rows,))
    with Live() as live:
        LinearCrossEntropy.apply(hidden, weight, labels)
    others = 2 * (vocabulary * size + 2 * rows * size)
    assert 8 * at_once * vocabulary < live.peak < 1.02 * (8 * at_once * vocabulary + others)


def test_a_head_gives_the_loss_of_what_is_learned_in_place_of_logits(tiny_model):
    model, ids = llama(tiny_model), torch.arange(3, 27).view(2, 12)
    targets = functional.pad(ids[:, 1:], (0, 1), value=IGNORED).flatten()
    targets[5:9] = IGNORED
    logits = model(input_ids=ids).logits.flatten(0, 1)
    wanted = functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    embeddings = model.get_input_embeddings().weight
    (gradient,) = torch.autograd.grad(wanted, embeddings)
    for learned in (targets != IGNORED, (targets != IGNORED).nonzero().flatten()):
        with fused.scoring(model.get_output_embeddings(), learned, targets, torch.float32):
            loss, right = model(input_ids=ids).logits
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
        assert right.item() == (logits.argmax(-1) == targets).sum().item()
        assert (
            torch.autograd.grad(loss, embeddings)[0].sub(gradient).abs().max() < 1e-4 < gradient.abs().max()
        )
    assert torch.equal(model(input_ids=ids).logits.flatten(0, 1), logits)


def test_scoring_alone_multiplies_once():
    hidden, weight, labels = scored()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        LinearCrossEntropy.apply(hidden.detach(), weight.detach(), labels)
    assert counter.get_total_flops() == 2 * ROWS * SIZE * VOCABULARY


def llama(folder, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The tiny model, with norms whose weights are not all 1."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            module.weight.data.uniform_(0.5, 1.5)
    return model


def test_fused_norms_and_perceptrons_give_the_same_model(tiny_model):
    model, ids = llama(tiny_model), torch.randint(3, 259, (2, 40))
    weights = list(model.parameters())

    def logits_and_gradients():
        logits = model(input_ids=ids).logits
        return logits, torch.autograd.grad(logits.log_softmax(-1)[..., 0].mean(), weights)

    plain, plain_grads = logits_and_gradients()
    layers = model.config.num_hidden_layers
    assert fused.fuse_layers(model) == 2 * layers + 1 + layers
    found, grads = logits_and_gradients()
    assert (found - plain).abs().max() < 1e-6
    assert all(distance(grad, right) < 1e-5 for grad, right in zip(grads, plain_grads, strict=True))


class AddsOneRMSNorm(nn.Module):
    """Llama's norm but for Gemma's weight, with every attribute named as Llama's."""

    def __init__(self, size: int):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.rand(size)), 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt() * (1 + self.weight)


@pytest.mark.parametrize("kind", [AddsOneRMSNorm, GemmaRMSNorm])
def test_a_norm_that_adds_one_to_its_weight_is_left_alone(kind):
    norm, x = kind(32), random(4, 32)
    before = norm(x)
    assert fused.fuse_layers(nn.Sequential(norm)) == 0
    assert torch.equal(norm(x), before)


class GatedPerceptron(nn.Module):
    def __init__(self, activation: nn.Module):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
        self.act_fn = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize(("activation", "count"), [(nn.SiLU(), 1), (nn.GELU(), 0)])
def test_a_perceptron_is_fused_only_where_silu_gates_it(activation, count):
    layer, x = GatedPerceptron(activation), random(4, 8)
    before = layer(x)
    assert fused.fuse_layers(nn.Sequential(layer)) == count
    assert torch.allclose(layer(x), before, atol=1e-6)


def perceptron_with_multipliers() -> nn.Module:
    return FalconH1MLP(FalconH1Config(hidden_size=16, intermediate_size=32, mlp_multipliers=[0.5, 3.0]))


def perceptron_with_dropout() -> nn.Module:
    return SeedOssMLP(SeedOssConfig(hidden_size=16, intermediate_size=32, residual_dropout=0.5))


@pytest.mark.parametrize("made", [perceptron_with_multipliers, perceptron_with_dropout])
def test_a_perceptron_that_does_more_is_left_alone(made):
    layer, x = made(), random(4, 16)
    torch.manual_seed(1)
    before = layer(x)
    fused.fuse_layers(nn.Sequential(layer))
    torch.manual_seed(1)
    assert torch.equal(layer(x), before)


def adapted(folder, tiny, name: str, *, compute: str = "float32", **changes) -> tuple[nn.Module, int]:
    """The tiny model in a variant's precision with an adapter that changes it, and its linear layers' number."""
    hardware = CPU.model_copy(update={"compute_dtype": compute})
    base, found = load.load_base(folder, tiny.variants[name], hardware=hardware)
    model = get_peft_model(base, LORA.peft_config(tiny.training.model_copy(update=changes)))
    for parameter_name, parameter in model.named_parameters():
        if "lora_" in parameter_name:
            parameter.data = torch.randn(parameter.shape) / 10
    return model, found.linear_modules


def outputs(model: nn.Module, *, autocast: bool = False) -> list[torch.Tensor]:
    """The logits of some tokens and the gradient of each adapter weight."""
    ids = torch.arange(3, 43)[None]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(input_ids=ids).logits.float()
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [logits, *torch.autograd.grad(logits.log_softmax(-1)[..., 5].mean(), weights)]


@pytest.mark.parametrize("name", ["lora_16bit", "qlora_nf4", "qlora_nf4_dq", "qlora_fp4"])
def test_every_adapted_layer_of_a_16_or_4_bit_base_is_fused(tiny_model, tiny, name):
    model, linears = adapted(tiny_model, tiny, name)
    plain = outputs(model)
    assert fused.fuse_adapters(model, compute=torch.float32) == linears == 28
    for found, wanted in zip(outputs(model), plain, strict=True):
        assert distance(found, wanted) < 1e-5


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_adapters_on_an_int8_base_stay_pefts_own(tiny_model, tiny, compute):
    model, _ = adapted(tiny_model, tiny, "lora_int8", compute=compute)
    plain = outputs(model, autocast=compute == "bfloat16")
    assert fused.fuse_adapters(model, compute=getattr(torch, compute)) == 0
    for found, wanted in zip(outputs(model), plain, strict=True):
        assert distance(found, wanted) < 1e-6


def test_an_adapters_dropout_is_pefts(tiny_model, tiny):
    """The same draws fall out in training, and none in evaluation."""
    model, _ = adapted(tiny_model, tiny, "lora_16bit", dropout=0.5)
    found = {}
    for form in ("plain", "fused"):
        if form == "fused":
            fused.fuse_adapters(model, compute=torch.float32)
        for mode in (True, False):
            torch.manual_seed(1)
            found[form, mode] = outputs(model.train(mode))
    for mode in (True, False):
        for one, other in zip(found["fused", mode], found["plain", mode], strict=True):
            assert distance(one, other) < 1e-5
    assert distance(found["fused", True][0], found["fused", False][0]) > 1e-3


class Kept:
    """The tensors that a forward pass keeps for the backward pass, each storage once, weights left out."""

    def __init__(self, model: nn.Module | None = None):
        self.weights = {p.untyped_storage().data_ptr() for p in (model.parameters() if model else ())}
        self.tensors: dict[int, torch.Tensor] = {}

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *failure):
        self.hooks.__exit__(*failure)

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in self.weights:
            self.tensors[place] = tensor
        return tensor

    def bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors.values())


@pytest.mark.parametrize("kind", BASES)
def test_layers_that_share_an_input_keep_it_once(kind):
    x = random(2, 5, IN, dtype=torch.bfloat16)
    layers = [(random(RANK, IN), random(OUT, RANK), linear(kind, dtype=torch.bfloat16)) for _ in range(3)]
    with Kept(nn.ParameterList([weight for a, b, _ in layers for weight in (a, b)])) as kept:
        outs = [AdaptedLinear.apply(x, None, a, b, base, SCALING) for a, b, base in layers]
    assert len(outs) == 3
    shapes = sorted(tuple(tensor.shape) for tensor in kept.tensors.values())
    assert shapes == sorted([(2, 5, IN), *[(2, 5, RANK)] * 3])
    assert kept.tensors[x.untyped_storage().data_ptr()].shape == x.shape


@pytest.mark.parametrize("name", ["lora_16bit", "qlora_nf4_dq"])
def test_each_fusing_keeps_less_for_the_backward_pass(tiny_model, tiny, name):
    model, _ = adapted(tiny_model, tiny, name, compute="bfloat16")
    ids = torch.arange(3, 103)[None]

    def bytes_kept(*, autocast: bool) -> int:
        with Kept(model) as kept, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model(input_ids=ids)
        return kept.bytes()

    plain = bytes_kept(autocast=True)
    fused.fuse_layers(model)
    layers = bytes_kept(autocast=True)
    fused.fuse_adapters(model, compute=torch.bfloat16)
    both = bytes_kept(autocast=False)
    assert layers < 0.95 * plain and both < 0.8 * layers
