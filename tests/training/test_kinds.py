"""A speed-up is tried on one module of each kind, and what another kind would show is not missed."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.activations import ACT2FN

from workflow.training.speed import fused
from workflow.training.speed.kinds import first_of_each_kind, kind
from workflow.training.speed.packing import can_be_packed

SIZES = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def llama(layers: int = 4) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM._from_config(
        LlamaConfig(num_hidden_layers=layers, **SIZES), attn_implementation="sdpa"
    ).eval()


def test_layers_are_of_one_kind_wherever_they_stand():
    layers = llama().model.layers
    assert len({kind(layer) for layer in layers}) == 1
    layers[2].mlp.act_fn = ACT2FN["gelu"]
    layers[3].input_layernorm.variance_epsilon *= 2
    assert len({kind(layer) for layer in layers}) == 3


@pytest.mark.parametrize(
    ("types", "count"),
    [
        (["full_attention"] * 4, 1),
        (["full_attention", "full_attention", "sliding_attention", "full_attention"], 3),
        (["sliding_attention", "full_attention"] * 2, 2),
    ],
)
def test_as_many_layers_are_tried_as_show_every_kind(types, count):
    config = Qwen2Config(
        num_hidden_layers=4, layer_types=types, use_sliding_window=True, sliding_window=4, **SIZES
    )
    model = Qwen2ForCausalLM._from_config(config, attn_implementation="sdpa").eval()
    ids, layers = torch.arange(12)[None], list(model.model.layers)
    whole = model(input_ids=ids, use_cache=False).logits
    with first_of_each_kind(model):
        assert list(model.model.layers) == layers[:count]
        assert not torch.allclose(model(input_ids=ids, use_cache=False).logits, whole)
    assert list(model.model.layers) == layers
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, whole)


class Leaks(type(llama(1).model.layers[0])):
    """A decoder layer that gives each token the mean of all."""

    def forward(self, hidden_states, **others):
        return super().forward(hidden_states, **others) + hidden_states.mean(1, keepdim=True)


@pytest.mark.parametrize("leaks", [False, True])
def test_a_leak_of_one_layer_is_found(leaks):
    model = llama()
    if leaks:
        model.model.layers[2].__class__ = Leaks
    with first_of_each_kind(model):
        assert can_be_packed(model, longest=64) != leaks


def test_a_perceptron_is_tried_once_where_all_are_alike(tiny_model, monkeypatch):
    tried, agree = [], fused._agree

    def noted(module, form, probe):
        tried.append(type(module).__name__)
        return agree(module, form, probe)

    monkeypatch.setattr(fused, "_agree", noted)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    layers = model.config.num_hidden_layers
    assert fused.fuse_layers(model) == 3 * layers + 1 and layers > 1
    assert sorted(tried) == ["LlamaMLP", "LlamaRMSNorm"]
