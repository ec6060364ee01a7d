"""Check a model's files before anything is computed with them.

The libraries silently repair much of what is refused here: they draw a missing weight at random, ignore a weight that
the architecture has no place for, and load an encoder as a decoder.
"""

import json
from pathlib import Path
from typing import Any

from workflow.runtime.errors import UserError, missing
from workflow.runtime.files import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Types of tensors that are read; integers are masks and positions.
TYPES = ("F32", "F16", "BF16", "I64", "I32", "U8", "BOOL")


def weights_files(folder: Path) -> list[Path]:
    """Return the files that hold a model's weights: those that its index names, or the only one.

    Raises:
        UserError: there is no such file, the index is not valid, or it names a missing file.
    """
    if not (folder / INDEX).exists():
        if not (folder / SINGLE).exists():
            raise UserError(f"the model has neither {SINGLE} nor {INDEX}, which names its parts.")
        return [folder / SINGLE]
    index = json_object(folder / INDEX)
    weight_map = index.get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise UserError(f"the model's {INDEX} has no weight_map that says which file holds which weight.")
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    if missing:
        raise UserError(f"the model's {INDEX} names {missing[0]}, which is not there.")
    return [folder / name for name in names]


def check_files(folder: Path) -> None:
    """Check a model's files, as they were fetched, without loading the model.

    Raises:
        UserError: config.json or the index is missing or is not JSON, the weights are quantized, or one of their
            files is damaged or holds a type that is not supported.
    """
    check_unquantized(json_object(folder / "config.json"))
    from safetensors import SafetensorError, safe_open

    for file in weights_files(folder):
        try:
            with safe_open(file, "pt") as weights:
                types = {weights.get_slice(name).get_dtype(): name for name in weights.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise UserError(
                f"the model's {file.name} is no whole safetensors file ({reason(error)}): get it again."
            ) from None
        for kind, name in types.items():
            if kind not in TYPES:
                raise UserError(
                    f"the model's {file.name} holds {name} in {kind}; weights in F32, F16 or BF16 are read."
                )


def check_unquantized(config: dict[str, Any]) -> None:
    """Raise a UserError if config.json says that the weights are already quantized."""
    if config.get("quantization_config"):
        quantized = config["quantization_config"]
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise UserError(
            f"the model's weights are quantized already ({method}, says quantization_config in config.json): "
            "take the model that was quantized, in 16 bits."
        )


def check_model(folder: Path) -> int:
    """Check that a stored model is a complete causal language model; return the rows of its embedding.

    Only one weight is in memory at a time.

    Raises:
        UserError: the architecture is unknown, is not a decoder, or has no layer for an adapter; a weight is missing,
            unexpected, of a wrong shape or not finite.
    """
    _check_finite(folder)
    return _empty_model(folder).get_input_embeddings().weight.shape[0]


def _empty_model(folder: Path):
    """Return the model on the meta device after checking that every stored weight has its place."""
    import torch
    from transformers import AutoModelForCausalLM

    config = read_config(folder / "config.json")
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            device_map="meta",
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # they are named below
            output_loading_info=True,
        )
    except Exception as error:  # each architecture has code of its own
        raise UserError(f"the model cannot be made from its config.json: {reason(error)}.") from None
    check_loaded(loading, "the model")
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head")
    ]
    if not linear:
        raise UserError(
            f"the model ({config.model_type}) has no linear layer, so there is nothing to quantize or to put an "
            "adapter on."
        )
    return model


def check_loaded(loading: dict[str, Any], source: str) -> None:
    """Check what transformers reports about the weights that it loaded.

    Args:
        loading: its `output_loading_info`.
        source: what messages call the model or its file.

    Raises:
        UserError: a weight is missing, has another shape, or has no place in the architecture.
    """
    if missing := sorted(loading["missing_keys"]):
        raise UserError(f"{source} lacks {_listed(missing)}, which config.json asks for.")
    if mismatched := sorted(loading["mismatched_keys"]):
        name, stored, expected = mismatched[0]
        raise UserError(
            f"{source} has {name} in the shape {_shape(stored)}, and config.json asks for {_shape(expected)}"
            + (f" (and {len(mismatched) - 1} more)." if len(mismatched) > 1 else ".")
        )
    if unexpected := sorted(loading["unexpected_keys"]):
        raise UserError(f"{source} holds {_listed(unexpected)}, which config.json has no place for.")


def read_config(file: Path):
    """Read the configuration of a causal language model whose architecture is part of transformers.

    Raises:
        UserError: the file is not such a configuration.
    """
    import transformers
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    content = json_object(file)
    kind = content.get("model_type")
    if not isinstance(kind, str):
        raise UserError(f"the model's {file.name} names no model_type.")
    if kind not in CONFIG_MAPPING_NAMES:
        own = "; it comes with code of its own, which is never run" if content.get("auto_map") else ""
        raise UserError(
            f"the model is a {kind}, which transformers {transformers.__version__} does not know{own}."
        )
    try:
        config = AutoConfig.from_pretrained(file, trust_remote_code=False)
    except Exception as error:  # each architecture has code of its own
        raise UserError(f"the model's {file.name} is refused: {reason(error)}.") from None
    _check_decoder(config)
    return config


def _check_decoder(config) -> None:
    """Raise a UserError unless this is the configuration of a model that predicts the next token."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    decoder = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    named = config.architectures or [decoder]
    if decoder not in named or decoder is None:
        raise UserError(
            f"the model is {' and '.join(map(str, named))}, says config.json, which is no causal language model"
            + (f"; of {config.model_type} that is {decoder}." if decoder else ".")
        )
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        raise UserError(
            f"the model is an encoder ({config.model_type} without is_decoder in config.json), in which a token "
            "sees those after it."
        )


def _check_finite(folder: Path) -> None:
    from safetensors import safe_open

    for file in weights_files(folder):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (it is not a dict)
                tensor = weights.get_tensor(name)
                if tensor.is_floating_point() and not tensor.isfinite().all():
                    raise UserError(
                        f"the model's {file.name} holds a number in {name} that is not finite (in 16 bits)."
                    )


def check_tokenizer(folder: Path, *, rows: int) -> None:
    """Check that a model's tokenizer can be loaded, and that the model has all of its tokens.

    Args:
        rows: of the model's embedding.

    Raises:
        UserError: the tokenizer cannot be loaded, or it or a configuration has a token beyond the embedding.
    """
    tokenizer = load_tokenizer(folder)
    # Texts cannot contain special tokens (stage sample refuses them), so those that nothing inserts do no harm.
    inserted = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    harmless = special_ids(tokenizer) - inserted
    beyond = {n: token for token, n in tokenizer.get_vocab().items() if n >= rows and n not in harmless}
    if beyond:
        raise UserError(
            f"the model's tokenizer has the token {beyond[max(beyond)]!r} with the number {max(beyond)}, and the "
            f"model's embedding only {rows} rows: they do not belong together."
        )
    for name in ("config.json", "generation_config.json"):
        if not (folder / name).exists():
            continue
        content = json_object(folder / name)
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = content.get(key)
            for number in ids if isinstance(ids, list) else [ids]:
                if number is not None and (not isinstance(number, int) or number >= rows):
                    raise UserError(
                        f"the model's {name} has the {key} {number}, and its embedding only {rows} rows."
                    )


def context_length(folder: Path) -> int | None:
    """Return the tokens that a stored model can hold, prompt and response together; None if it does not say."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
    return getattr(config, "max_position_embeddings", None)


def special_ids(tokenizer) -> set[int]:
    """Return the tokens with a meaning for the model (turns, beginning, end), which are never part of a text.

    The token for unknown characters is not among them, since many texts contain it.
    """
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return (added | set(tokenizer.all_special_ids)) - {tokenizer.unk_token_id}


def load_tokenizer(folder: Path):
    """Load the tokenizer in a model's folder.

    Raises:
        UserError: there is none, or it cannot be loaded.
    """
    from transformers import AutoTokenizer

    if not folder.is_dir():
        raise missing(folder)
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        raise UserError("the model has no tokenizer: neither tokenizer.json nor tokenizer.model.")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain Exceptions
        if "custom code" in str(error):
            raise UserError(
                "the model's tokenizer needs code that comes with the model, and no such code is run; choose a model "
                "whose tokenizer transformers knows."
            ) from None
        raise UserError(f"the model's tokenizer cannot be loaded: {reason(error)}.") from None


def json_object(path: Path) -> dict:
    """Read a JSON file that holds an object.

    Raises:
        UserError: there is no such file, or it does not hold an object.
    """
    if not path.is_file():
        raise UserError(f"the model has no {path.name}.")
    try:
        content = read_json(path)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"the model's {path.name} is not JSON: {reason(error)}.") from None
    if not isinstance(content, dict):
        raise UserError(f"the model's {path.name} holds no JSON object.")
    return content


def reason(error: Exception) -> str:
    """Return the beginning of a library's message, to end one of our sentences."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2]) if lines else type(error).__name__
    text = text.removeprefix("Error while deserializing header: ")
    text = f"it has no {text}" if isinstance(error, KeyError) else text
    return (text if len(text) <= 300 else text[:300] + "...").rstrip(".")


def _listed(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more weights" if len(names) > 1 else "")


def _shape(shape) -> str:
    return " x ".join(map(str, shape))
