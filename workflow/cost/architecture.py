"""Count a model's parameters from the model itself, built without its weights on torch's `meta` device.

The formulas of workflow/cost/memory.py describe a Llama's layers. This module checks a configuration against them
before a number is printed, and refuses any other architecture by name.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from workflow import params
from workflow.cost.memory import Shape
from workflow.data import model_files
from workflow.runtime.errors import UserError
from workflow.runtime.files import read_json

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig  # it takes seconds to import

# Architectures whose layers keep for the backward pass what `memory.kept_of_a_layer` counts, as tests/cost/test_plan.py checks.
MEASURED = (
    "ernie4_5", "granite", "helium", "llama", "mistral", "olmo", "olmo2", "olmo3", "qwen2", "qwen3", "smollm3",
)  # fmt: skip
# The sizes that a configuration must have, with their bounds. An architecture may use its own names for them.
SIZES = {
    "hidden_size": params.Size,
    "intermediate_size": params.Size,
    "num_hidden_layers": params.Layers,
    "num_attention_heads": params.Size,
    "num_key_value_heads": params.Size,
    "head_dim": params.Size,
    "vocab_size": params.Vocabulary,
}
OPTIONAL = ("num_key_value_heads", "head_dim")
# Sizes that a multimodal model's text_config may leave to its class, as Gemma 3's does.
LEFT_TO_THE_CLASS = (*OPTIONAL, "vocab_size", "num_attention_heads")


def read(file: Path) -> tuple[PreTrainedConfig, Shape]:
    """Read the configuration in `file`, and count every parameter of its shape in the model itself.

    Raises:
        UserError: the file is not such a configuration, a size is missing or impossible, the model is already
            quantized, or its layers are not those of a Llama.
    """
    config = model_files.read_config(file)
    content = read_json(file)
    _check_content(content, file.name)
    _check_sizes(content, config, file.name)
    model = build(config)
    return config, counted_shape(model)


def build(config: PreTrainedConfig) -> nn.Module:
    """Build the model of a configuration, without values in its weights.

    Raises:
        UserError: transformers cannot build it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # each architecture has code of its own
        raise UserError(
            f"a model of type {config.model_type} cannot be made from config.json: {model_files.reason(error)}."
        ) from None


def counted_shape(model: nn.Module) -> Shape:
    """Return the shape of a model with the layers of a Llama; `others` is counted in the model.

    Raises:
        UserError: its linear layers, embeddings or other weights do not match the formulas, or its attention is not
            supported in training.
    """
    from workflow.training.speed.fused import is_named_rms_norm

    config = model.config
    difference, others = _difference(model)
    if difference:
        raise UserError(
            f"the model ({config.model_type}) has {_billions(parameters(model))} billion parameters, and memory and "
            f"time are predicted for layers as a Llama has them: {difference}."
        )
    check_attention(model)
    normed = any(_last(name) == "q_norm" for name, _ in model.named_modules())
    # OLMo's norms are others, and OLMo 2 has them after attention and MLP.
    again = any(
        _last(name) == "input_layernorm" and is_named_rms_norm(module)
        for name, module in model.named_modules()
    )
    return replace(Shape.of(config), others=others, query_key_norms=normed, norms_again=again)


def known_shape(config: PreTrainedConfig) -> Shape | None:
    """Return the shape of a configuration; None if its layers do not match the formulas."""
    model = build(config)
    return None if _difference(model)[0] else counted_shape(model)


def outside_linears(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights of more than one dimension outside of linear layers, embeddings and head, such as experts in one tensor."""
    from torch import nn

    known = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding)}
    return {name: p for name, p in model.named_parameters() if id(p) not in known and p.dim() > 1}


def check_attention(model: nn.Module) -> None:
    """Raise a UserError if a model's attention is not supported in training."""
    if not getattr(model, "_supports_sdpa", False):
        raise UserError(
            f"the model ({model.config.model_type}) has an attention that PyTorch's scaled_dot_product_attention does "
            "not compute, and no other is trained with here."
        )


def parameters(model: nn.Module) -> int:
    """Count all parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _difference(model: nn.Module) -> tuple[str, int]:
    """Describe how a model differs from a Llama (empty if it does not), and count its parameters in norms and biases."""
    from torch import nn

    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    in_linears = {id(module.weight) for module in linears.values()}
    embedded = {id(module.weight): module.weight for module in (embedding, head) if module is not None}
    rest = {name: p for name, p in model.named_parameters() if id(p) not in in_linears | embedded.keys()}
    large = outside_linears(model)
    if large:
        share = sum(p.numel() for p in large.values())
        name = max(large, key=lambda name: large[name].numel())
        return (
            f"{_billions(share)} billion of these lie outside of linear layers and embeddings ({name} is one tensor of "
            f"{' x '.join(map(str, large[name].shape))}), where nothing is quantized or adapted"
        ), 0
    try:
        shape = Shape.of(model.config)
    except AttributeError as error:
        return f"its configuration has no {error.name}", 0
    actual = Counter((_last(name), m.in_features, m.out_features) for name, m in linears.items())
    expected = Counter({(name, *size): shape.layers for name, size in shape.linears.items()})
    if actual != expected:
        odd = sorted((actual - expected) or (expected - actual))[0]
        name, inputs, outputs = odd
        return (
            f"it has {actual[odd]} linear layers {name} of {inputs} x {outputs}, where a Llama of this size "
            f"has {expected[odd]}"
        ), 0
    if sum(p.numel() for p in embedded.values()) != shape.embedding_parameters:
        return "its embeddings are not of the size that vocab_size and hidden_size say", 0
    return "", sum(p.numel() for p in rest.values())


def _check_content(content: dict[str, Any], name: str) -> None:
    """Raise a UserError if the weights are already quantized, or a number of the configuration is not finite."""
    model_files.check_unquantized(content)
    pending: list[tuple[str, Any]] = list(content.items())
    while pending:
        key, value = pending.pop()
        if isinstance(value, dict):
            pending += [(f"{key}.{inner}", deeper) for inner, deeper in value.items()]
        elif isinstance(value, list):
            pending += [(key, inner) for inner in value]
        elif isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{name} has {key} {value}, which is no finite number.")


def _check_sizes(content: dict[str, Any], config: PreTrainedConfig, name: str) -> None:
    """Raise a UserError if a size without a default is missing, or a size is not an integer or out of bounds."""
    text = content.get("text_config")
    text, nested = (text, True) if isinstance(text, dict) else (content, False)
    aliases = getattr(config.get_text_config(), "attribute_map", {})
    for key, kind in SIZES.items():
        alias = aliases.get(key, key)
        written = next((name for name in (key, alias) if name in text), None)
        may_be_missing = key in (LEFT_TO_THE_CLASS if nested else OPTIONAL)
        if written is None:
            # Other architectures have other sizes; a Llama needs all of its own.
            if not may_be_missing and hasattr(config.get_text_config(), key):
                raise UserError(f"{name} has no {alias}, so the model's size is not known.")
            continue
        value = text[written]
        if value is None:
            continue  # left to the class, like GPT-Neo's intermediate_size; if the class has none, the model cannot be built
        try:
            TypeAdapter(kind).validate_python(value, strict=True)
        except ValidationError as error:
            message = error.errors()[0]["msg"]
            raise UserError(
                f"{name} has {written} {_shown(value)}: {message[0].lower()}{message[1:]}."
            ) from None


def _billions(count: int) -> str:
    return f"{count / 1e9:.4g}"


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else text[:37] + "..."
