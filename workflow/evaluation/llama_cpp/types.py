"""Which type each tensor of a GGUF file gets: the rules of llama.cpp's `llama-quantize`, without an importance matrix.

They are those of `llama_tensor_get_type` in llama.cpp's src/llama-quant.cpp (build 10605), for dense models. The file
type gives each tensor a type. Where its blocks do not divide a tensor's rows, another type takes its place.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from workflow.evaluation.llama_cpp.record import Fallback
from workflow.runtime.errors import UserError
from workflow.runtime.forms import GGUF_Q4_0, GGUF_Q4_K_M, GGUF_Q8_0

BLOCKS = {
    "Q4_0": 32,
    "Q5_0": 32,
    "Q5_1": 32,
    "Q8_0": 32,
    "Q4_K": 256,
    "Q5_K": 256,
    "Q6_K": 256,
    "F16": 1,
}  # weights in a block
FALLBACKS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
LAST_FALLBACK = "F16"
# Tensors with two dimensions that stay as they are.
KEPT = ("_norm.weight", "ffn_gate_inp.weight", "position_embd", "token_types", "ssm_conv1d", "shortconv.conv")
OTHER_RULES = ("falcon",)  # architectures with rules of their own
VALUES = ("attn_v.weight", "attn_qkv.weight", "attn_kv_b.weight")


@dataclass(frozen=True)
class FileType:
    """A file type of llama.cpp: its name, its number in the file, and the type that most tensors get."""

    name: str
    number: int
    main: str
    more_bits: str | None = None  # of the tensors that hold more of the quality


FILE_TYPES = {
    GGUF_Q8_0: FileType("Q8_0", 7, "Q8_0"),
    GGUF_Q4_K_M: FileType("Q4_K_M", 15, "Q4_K", more_bits="Q6_K"),
    GGUF_Q4_0: FileType("Q4_0", 2, "Q4_0"),
}


@dataclass(frozen=True)
class Choice:
    """The type that the file type gives a tensor, and the one that it gets. Both are None for one that stays as it is."""

    intended: str | None
    stored: str | None


def choose(
    shapes: Mapping[str, Sequence[int]], form: str, *, architecture: str, layers: int, grouped: bool
) -> dict[str, Choice]:
    """Return the type of each tensor.

    Args:
        shapes: of each tensor by its name in the file, [..., rows, weights of a row].
        form: a GGUF form.
        architecture: llama.cpp's name of it.
        layers: of the model.
        grouped: whether several heads share their keys and values.

    Raises:
        UserError: the model is one for which llama.cpp has other rules.
    """
    if architecture in OTHER_RULES or any(len(shape) > 2 for shape in shapes.values()):
        kind = architecture if architecture in OTHER_RULES else "a mixture of experts"
        raise UserError(
            f"{form} cannot be written: the model is {kind}, for which llama.cpp has other rules."
        )
    tied = "output.weight" not in shapes
    choices = {}
    for name, shape in shapes.items():
        if len(shape) < 2 or not name.endswith("weight") or any(part in name for part in KEPT):
            choices[name] = Choice(None, None)
            continue
        is_head = name == "output.weight" or (tied and name == "token_embd.weight")
        intended = _head(FILE_TYPES[form], shape[-1]) if is_head else _inner(FILE_TYPES[form], name, layers)
        # Llama-2-70B and the like: a small tensor that eight heads share.
        if (architecture, layers, grouped, intended) == ("llama", 80, True, "Q4_K") and name.endswith(VALUES):
            intended = "Q5_K"
        choices[name] = Choice(intended, fitting(intended, shape[-1]))
    return choices


def _head(file_type: FileType, width: int) -> str:
    """The type of the output head, or of the embedding that takes its place."""
    if file_type.main == "Q8_0" or width % BLOCKS[file_type.main]:
        return "Q8_0"
    return "Q6_K"


def _inner(file_type: FileType, name: str, layers: int) -> str:
    """The type of any other tensor: some layers' values and second projections have more bits."""
    layer = re.match(r"blk\.(\d+)\.", name)
    if file_type.more_bits and layer and name.endswith((*VALUES, "ffn_down.weight")):
        eighth, place = layers // 8, int(layer[1])
        if place < eighth or place >= 7 * layers // 8 or (place - eighth) % 3 == 2:
            return file_type.more_bits
    return file_type.main


def fitting(intended: str, width: int) -> str:
    """Return the type that a tensor gets whose rows have `width` weights."""
    if width % BLOCKS[intended] == 0:
        return intended
    fallback = FALLBACKS.get(intended, LAST_FALLBACK)
    return fallback if width % BLOCKS[fallback] == 0 else LAST_FALLBACK


def fallbacks(
    choices: Mapping[str, Choice], shapes: Mapping[str, Sequence[int]], form: str
) -> list[Fallback]:
    """Return the tensors that have another type than the file type gives them, those of all layers together."""
    counts: dict[tuple[str, int, str, str], int] = {}
    for name, choice in choices.items():
        # The head's own rule gives way before this: llama.cpp gives it 8 bits where a K-quant does not fit.
        intended = choice.intended
        if intended == "Q8_0" and FILE_TYPES[form].main != "Q8_0":
            intended = "Q6_K"
        if intended is not None and choice.stored not in (None, intended):
            key = (re.sub(r"^blk\.\d+\.", "blk.*.", name), shapes[name][-1], intended, choice.stored)
            counts[key] = counts.get(key, 0) + 1
    return [Fallback(name, count, *rest) for (name, *rest), count in counts.items()]
