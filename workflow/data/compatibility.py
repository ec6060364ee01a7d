"""Write the settings of a saved model so that transformers 4.57 and 5, PEFT, vLLM and llama.cpp read the same values.

Newer libraries read what older ones wrote. Older libraries mostly read newer files as well, but silently compute other
numbers: transformers 5 stores the base of the rotary embedding where transformers 4 does not look, so 4 falls back to
its default.
"""

from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from workflow.runtime.files import read_json, write_json

# One class, by its names in transformers 5 and 4.
OWN_CLASS, COMMON_CLASS = ("TokenizersBackend", "PreTrainedTokenizerFast")
CODE = "auto_map"  # names code that came with the model, which a library that loads it later could run
# How and from where a model was read.
MACHINE = ("is_local", "local_files_only", "name_or_path", "_name_or_path", "_model_name_or_path")
# The keys that architectures of transformers 4 have in place of those in rope_parameters.
ROTARY_KEYS = {
    "gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    "gpt_neox_japanese": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    "modernbert-decoder": {"rope_theta": "global_rope_theta"},
}
# Architectures with one rotary embedding per layer type, and their key for the base of the sliding-window layers.
BY_LAYER = {
    "gemma3_text": "rope_local_base_freq",
    "gemma3n_text": "rope_local_base_freq",
    "modernbert-decoder": "local_rope_theta",
    "olmo3": None,
}
# What architectures that check each key of rope_scaling call it; None: they do not accept the key.
PHI_KEYS = {"rope_type": "type", "original_max_position_embeddings": None, "factor": None}
SCALING_KEYS = {"phi3": PHI_KEYS, "phi4_multimodal": PHI_KEYS, "phimoe": {"rope_type": "type"}}
# The keys that every version of PEFT, and every other reader of its adapters, expects.
ADAPTER_KEYS = frozenset(
    ("alpha_pattern", "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "init_lora_weights",
     "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "modules_to_save", "peft_type", "r",
     "rank_pattern", "revision", "target_modules", "task_type", "use_dora", "use_rslora")
)  # fmt: skip


def make_compatible(folder: Path) -> None:
    """Rewrite the settings of the model, of generation and of the tokenizer in a model's folder.

    Weights and tokenizer.json are not touched. The same model has the same bytes on every machine.
    """
    _rewrite(folder / "config.json", model_settings)
    _rewrite(folder / "generation_config.json", generation_settings)
    length = context_length(read_json(folder / "config.json")) if (folder / "config.json").exists() else None
    _rewrite(folder / "tokenizer_config.json", lambda settings: tokenizer_settings(settings, length))


def make_adapter_compatible(folder: Path) -> None:
    """Rewrite the settings in an adapter's folder: PEFT refuses keys that it does not know, or warns about them."""
    _rewrite(folder / "adapter_config.json", adapter_settings)


def _rewrite(file: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Apply `change` to the object in a JSON file; a file that is missing or needs no change is left alone."""
    if not file.exists():
        return
    content = read_json(file)
    changed = change(dict(content))
    if changed != content:
        write_json(file, dict(sorted(changed.items())))


def model_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config.json with rotary embedding and type under the keys of both transformers 5 and 4."""
    config = _with_rotary_keys(_without_origin(config))
    if dtype := config.get("dtype") or config.get("torch_dtype"):
        config |= {"dtype": dtype, "torch_dtype": dtype}
    return config


def _without_origin(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings that name neither this machine nor code that came with the model."""
    return {key: value for key, value in settings.items() if key not in (*MACHINE, CODE)}


def _with_rotary_keys(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration, nested ones included, with `rope_parameters` under the keys of transformers 4 as well."""
    config = {
        key: _with_rotary_keys(value) if key.endswith("_config") and isinstance(value, dict) else value
        for key, value in config.items()
    }
    parameters = config.get("rope_parameters")
    if not isinstance(parameters, dict) or not parameters:
        return config
    kind, full, sliding = config.get("model_type"), parameters, None
    if any(isinstance(value, dict) for value in parameters.values()):
        if kind not in BY_LAYER:
            return config  # transformers 4 does not know the architecture
        full, sliding = parameters.get("full_attention", {}), parameters.get("sliding_attention", {})
    names = ROTARY_KEYS.get(kind, {})
    for key in ("rope_theta", "partial_rotary_factor"):
        if full.get(key) is not None:
            config[names.get(key, key)] = full[key]
    if sliding and BY_LAYER[kind]:
        config[BY_LAYER[kind]] = sliding["rope_theta"]
    config["rope_scaling"] = None
    if full.get("rope_type", "default") != "default":
        config["rope_scaling"] = {
            SCALING_KEYS.get(kind, {}).get(key, key): value
            for key, value in full.items()
            if key not in ("rope_theta", "partial_rotary_factor")
        }
        config["rope_scaling"].pop(None, None)
    return config


def generation_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return a generation_config.json without the keys that request further outputs of a forward pass."""
    return {
        key: value
        for key, value in settings.items()
        if key not in ("output_attentions", "output_hidden_states")
    }


def tokenizer_settings(settings: dict[str, Any], length: int | None) -> dict[str, Any]:
    """Return a tokenizer_config.json with a class and keys that both transformers 4 and 5 know.

    Args:
        length: the tokens that the model can hold, which caps `model_max_length`; None if it does not say.
    """
    settings = _without_origin(settings)
    if settings.get("tokenizer_class") == OWN_CLASS:
        settings["tokenizer_class"] = COMMON_CLASS
        settings.pop("backend", None)
    tokens = settings.get("extra_special_tokens")
    if isinstance(tokens, list):
        del settings["extra_special_tokens"]
        settings["additional_special_tokens"] = tokens
    longest = settings.get("model_max_length")
    if length and (not isinstance(longest, int | float) or longest > length):
        settings["model_max_length"] = length
    return settings


def context_length(config: dict[str, Any]) -> int | None:
    """Return the tokens that a model with this config.json can hold; None if it does not say."""
    for level in (config, config.get("text_config")):
        for key in (
            "max_position_embeddings",
            "n_positions",
            "max_sequence_length",
            "max_seq_len",
            "seq_length",
        ):
            if isinstance(level, dict) and isinstance(level.get(key), int):
                return level[key]
    return None


def adapter_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return an adapter_config.json without keys that have their default value and are unknown to some PEFT versions."""
    from peft import LoraConfig

    defaults = {
        field.name: field.default if field.default is not MISSING else field.default_factory()
        for field in fields(LoraConfig)
        if field.default is not MISSING or field.default_factory is not MISSING
    }
    return {
        key: value
        for key, value in settings.items()
        if key in ADAPTER_KEYS or (key != "peft_version" and value != defaults.get(key, MISSING))
    }
