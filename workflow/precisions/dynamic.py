"""Which linear layers of a quantized base stay in 16 bits: "dynamic" quantization.

A few layers lose more than the others when they are quantized. workflow/models/rank_layers.py measures which.
"""

import json
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from textwrap import indent

from workflow.precisions.base import Quantization
from workflow.runtime.errors import UserError, suggestion

HEADS = ["lm_head", "embed_out"]  # the names of output heads, which are never quantized


def is_named(name: str, pattern: str) -> bool:
    """Whether a pattern is a layer's whole name or the end of it, from a dot on; `*` stands for any text."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def layers_in_16_bits(names: Collection[str], patterns: Sequence[str]) -> tuple[str, ...]:
    """The whole names of the layers that patterns name.

    Args:
        names: of the base's linear layers, the output head left out.

    Raises:
        UserError: a pattern names no layer, or together they name all.
    """
    for pattern in patterns:
        if not any(is_named(name, pattern) for name in names):
            ends = sorted({name.rpartition(".")[2] for name in names})
            raise UserError(
                f"layers_in_16_bits names {pattern}, and no linear layer of the model has that name; their names end in "
                f"{', '.join(ends)}{suggestion(pattern.rpartition('.')[2], ends)}."
            )
    plain = tuple(name for name in names if any(is_named(name, pattern) for pattern in patterns))
    if plain and len(plain) == len(names):
        raise UserError(
            "layers_in_16_bits names every linear layer of the model, so nothing is quantized; use precision 16bit."
        )
    return plain


def config_code(code: str, argument: str, quantization: Quantization) -> str:
    """Arguments of a configuration in a card's code, with the one that names the layers to skip, if there are any."""
    names = skipped(quantization.layers_in_16_bits)
    return code + (f", {argument}={json.dumps(names)}" if names else "")


def each_layer(body: str, quantization: Quantization) -> str:
    """Python of a card that does something to each `layer` of `base` that is not kept in 16 bits."""
    names = ", ".join(f'"{name}"' for name in quantization.layers_in_16_bits)
    return (
        f"in_16_bits = [{names}]\n"
        "for name, layer in base.named_modules():\n"
        "    is_head = layer is base.get_output_embeddings()\n"
        "    if isinstance(layer, torch.nn.Linear) and not is_head and name not in in_16_bits:\n"
        f"{indent(body, ' ' * 8)}\n"
    )


def skipped(names: Sequence[str]) -> list[str] | None:
    """What bitsandbytes' configuration must leave alone: these and the output head; None for its own choice, the head."""
    return [*HEADS, *names] if names else None
