"""Drop decoder layers of a stored model, and read from its config.json what was done to it (docs/mechanism.md)."""

import re
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from workflow.data import model_files
from workflow.params.values import Strict
from workflow.runtime.errors import UserError
from workflow.runtime.files import read_json, whole_file, write_json

# The key of config.json that says so. Libraries keep keys that they do not know, so it stays with the weights.
CUT_AND_HEALED = "cut_and_healed"
LAYER = re.compile(r"(.*\blayers\.)(\d+)(\..+)")
PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")  # lists of config.json with an entry each


class Cut(Strict):
    layers: int
    of: int
    dropped: Annotated[list[int], Field(min_length=1)]


class Healed(Strict):
    """A training of all weights; losses in nats per token, on the study's validation rows."""

    variant: str
    rows: int
    tokens_in_loss: int
    steps: int
    seed: int
    learning_rate: float
    validation_loss_before: float
    validation_loss_after: float


class WhatWasDone(Strict):
    cut: Cut | None
    healed: Healed | None


def keep_layers(folder: Path, kept: int) -> None:
    """Drop decoder layers of a model in place: a block in the middle goes, and as many stay before it as after, or one more.

    Layers in the middle share a representation, and those at the ends have others (arXiv 2407.09298). Large models are often cut
    before the last layer instead (arXiv 2403.17887); docs/mechanism.md says what that did to the default base.

    Args:
        folder: the model, in safetensors; a failure leaves it unfinished.

    Raises:
        UserError: the model does not have more layers than that, was cut before, or stores its layers under other names.
    """
    config = read_json(folder / "config.json")
    layers = config.get("num_hidden_layers")
    if record(folder)["cut"]:
        raise UserError("the model was cut before, says its config.json, so model.kept_layers must be null.")
    if not isinstance(layers, int):
        raise UserError("model.kept_layers must be null: the model's config.json has no num_hidden_layers.")
    if kept >= layers:
        raise UserError(
            f"model.kept_layers is {kept}, and the model has {layers} layers: fewer must be kept, or null for all."
        )
    before = (kept + 1) // 2
    dropped = range(before, before + layers - kept)
    stored = _drop(folder, dropped)
    if stored != set(range(layers)):
        raise UserError(
            f"model.kept_layers must be null: the model's weights are not stored as layers.0 to layers.{layers - 1}."
        )
    for key in PER_LAYER:
        if isinstance(config.get(key), list):
            config[key] = [entry for index, entry in enumerate(config[key]) if index not in dropped]
    cut = {"layers": kept, "of": layers, "dropped": list(dropped)}
    config[CUT_AND_HEALED] = record(folder) | {"cut": cut}
    write_json(folder / "config.json", config | {"num_hidden_layers": kept})


def record(folder: Path) -> dict:
    """What config.json says was done to a model.

    Returns:
        `cut` (`layers` that it has, `of` how many, and the numbers of the `dropped` ones, from 0) and `healed` (what
        `python -m workflow.mechanism heal` says of the training that followed); None for what was not done.

    Raises:
        UserError: it has the key, and something else under it.
    """
    stored = read_json(folder / "config.json").get(CUT_AND_HEALED)
    if stored is None:
        return {"cut": None, "healed": None}
    try:
        return WhatWasDone.model_validate(stored).model_dump()
    except ValidationError:
        raise UserError(
            f"the model's config.json has {CUT_AND_HEALED}, and not as it is written here: remove that key."
        ) from None


def mark_healed(folder: Path, healed: dict) -> None:
    """Write into config.json how a model was trained after its cut."""
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", config | {CUT_AND_HEALED: record(folder) | {"healed": healed}})


def _drop(folder: Path, dropped: range) -> set[int]:
    """Drop layers from the files of a model, and number the later ones anew; return the numbers that were stored."""
    from safetensors.torch import load_file, save_file

    found: set[int] = set()
    places, size = {}, 0
    for file in model_files.weights_files(folder):
        kept = {}
        for name, tensor in load_file(file).items():
            if match := LAYER.fullmatch(name):
                prefix, index, rest = match[1], int(match[2]), match[3]
                found.add(index)
                if index in dropped:
                    continue
                if index >= dropped.stop:
                    name = f"{prefix}{index - len(dropped)}{rest}"
            kept[name] = tensor
            size += tensor.nbytes
        places |= dict.fromkeys(kept, file.name)
        if kept:
            with whole_file(file) as unfinished:
                save_file(kept, unfinished, metadata={"format": "pt"})
        else:
            file.unlink()
    if (folder / model_files.INDEX).exists():
        write_json(folder / model_files.INDEX, {"metadata": {"total_size": size}, "weight_map": places})
    return found
