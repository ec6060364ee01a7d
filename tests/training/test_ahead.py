"""Weights dequantized ahead: in the order that a pass asks for them, never before what they overwrite was used."""

import gc
import weakref
from contextlib import contextmanager

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import LlamaConfig

from workflow import params
from workflow.methods.lora import LORA
from workflow.models import load
from workflow.training.speed import ahead
from workflow.training.speed.ahead import Ahead, Asked, Weight, made_by
from workflow.training.speed.fused import (
    dequantized_weight,
    fuse_adapters,
    fuse_layers,
    layers_to_dequantize,
)
from workflow.training.speed.shared_inputs import share_inputs

CPU = params.Hardware(device="cpu", compute_dtype="float32", data_workers=0)
CONFIG = LlamaConfig(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=96,
)
LAYER = [f"self_attn.{name}_proj" for name in "qkvo"] + [
    f"mlp.{name}_proj" for name in ("gate", "up", "down")
]


def adapted(variant: str) -> nn.Module:
    settings = params.load()
    model, _ = load.random_base(CONFIG, settings.variants[variant], hardware=CPU, seed=0)
    torch.manual_seed(0)
    model = get_peft_model(model, LORA.peft_config(settings.training)).train()
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    fuse_layers(model)
    fuse_adapters(model, compute=torch.float32)
    share_inputs(model)
    return model


def gradients(model: nn.Module) -> list[torch.Tensor]:
    """Of one pass of a fixed row."""
    model.zero_grad()
    ids = torch.arange(3, 43)[None]
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]


def test_a_pass_asks_for_each_weight_forward_and_then_backward():
    model = adapted("qlora_nf4_dq")
    layers = layers_to_dequantize(model)
    asked = Asked(dequantized_weight)
    with made_by(asked, layers):
        found = gradients(model)
    names = {module: name for name, module in model.named_modules()}
    order = [
        names[weight.layer].partition("layers.")[2].removesuffix(".base_layer") for weight in asked.order
    ]
    forward = [f"{number}.{name}" for number in range(2) for name in LAYER]
    assert order[: len(forward)] == forward
    # The first layer's input has no gradient: nothing below it is trained.
    backward = order[len(forward) :]
    assert sorted(backward) == sorted(set(forward) - {f"0.self_attn.{name}_proj" for name in "qkv"})
    assert backward[0] == "1.mlp.down_proj" and backward[-1] == "0.self_attn.o_proj"
    # A second pass asks in the same order, and the weights are those that it makes by itself.
    again = Asked(dequantized_weight)
    with made_by(again, layers):
        gradients(model)
    assert again.order == asked.order
    assert all(map(torch.equal, found, gradients(model)))
    assert not any(hasattr(layer, ahead.SOURCE) for layer in layers)


def test_only_layers_whose_weight_is_made_are_made_ahead():
    assert layers_to_dequantize(adapted("lora_16bit")) == []
    assert len(layers_to_dequantize(adapted("qlora_nf4_dq"))) == 2 * len(LAYER)


def test_a_pass_that_fails_leaves_no_layer_with_a_source():
    layer = nn.Linear(2, 2)
    with pytest.raises(ZeroDivisionError), made_by(Asked(lambda layer, dtype: layer.weight), [layer]):
        raise ZeroDivisionError
    assert not hasattr(layer, ahead.SOURCE)


class Stream:
    """Writes down what it is told, in place of a GPU's."""

    def __init__(self, name: str, log: list[tuple]):
        self.name, self.log = name, log

    def wait_stream(self, other: "Stream") -> None:
        self.log.append((self.name, "waits for all of", other.name))

    def record_event(self) -> int:
        self.log.append((self.name, "records", len(self.log)))
        return self.log[-1][-1]

    def wait_event(self, event: int) -> None:
        self.log.append((self.name, "waits for", event))


@pytest.fixture
def streams(monkeypatch) -> tuple[Stream, list[tuple]]:
    """A second stream and the log of both; work goes to the first but within `torch.cuda.stream`."""
    log: list[tuple] = []
    first, current = Stream("first", log), []

    @contextmanager
    def on(stream: Stream):
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: (current or [first])[-1])
    monkeypatch.setattr(torch.cuda, "stream", on)
    return Stream("second", log), log


def test_a_weight_is_made_while_the_one_before_is_used(streams):
    second, log = streams
    layers = [nn.Linear(2, 2) for _ in range(4)]
    alive: list[weakref.ref] = []
    most = 0

    def make(layer: nn.Linear, dtype: torch.dtype) -> torch.Tensor:
        nonlocal most
        gc.collect()
        weight = layer.weight.detach().to(dtype).clone()
        alive.append(weakref.ref(weight))
        most = max(most, sum(reference() is not None for reference in alive))
        log.append((torch.cuda.current_stream().name, "makes", layers.index(layer)))
        return weight

    source = Ahead(make, [Weight(layer, torch.float32) for layer in layers], second)
    for number, layer in enumerate(layers):
        weight = source.weight(layer, torch.float32)
        assert weight.equal(layer.weight)
        log.append(("first", "uses", number))
        del weight
    assert most == 2
    made = {entry[2]: place for place, entry in enumerate(log) if entry[:2] == ("second", "makes")}
    used = {entry[2]: place for place, entry in enumerate(log) if entry[:2] == ("first", "uses")}
    for number in range(4):
        # Before the use, the first stream waits for the event that the second recorded after the weight was made.
        event = log[made[number] + 1]
        assert event[:2] == ("second", "records")
        assert ("first", "waits for", event[2]) in log[made[number] : used[number]]
        # Before it is made, the second stream waits for all that the first was given, the use before the last included.
        assert log[made[number] - 1] == ("second", "waits for all of", "first")
        if number >= 2:
            assert used[number - 2] < made[number] < used[number - 1]


def test_another_order_is_refused(streams):
    layers = [nn.Linear(2, 2) for _ in range(2)]
    source = Ahead(
        lambda layer, dtype: layer.weight, [Weight(layer, torch.float32) for layer in layers], streams[0]
    )
    with pytest.raises(RuntimeError, match="another order"):
        source.weight(layers[1], torch.float32)
    source.weight(layers[0], torch.float32)
    source.weight(layers[1], torch.float32)
    with pytest.raises(RuntimeError, match="another order"):
        source.weight(layers[0], torch.float32)
