"""Write a saved model's settings so that transformers 4.57 and 5, PEFT, vLLM and llama.cpp read the same from them.

Newer libraries read what older ones wrote. The other way they mostly do so too, without a word and with other
numbers: transformers 5 writes the base of the rotary embedding where 4 does not look, which then takes its default.
"""

from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from workflow.runtime.files import read_json, write_json

OWN_CLASS, COMMON_CLASS = (
    "TokenizersBackend",
    "PreTrainedTokenizerFast",
)  # one class, by its names in 5 and in 4
# How and from where a model was read.
MACHINE = ("is_local", "local_files_only", "name_or_path", "_name_or_path", "_model_name_or_path")
# What rope_parameters holds, by the keys that architectures before transformers 5 have for it.
ROTARY_KEYS = {
    "gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    "gpt_neox_japanese": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    "modernbert-decoder": {"rope_theta": "global_rope_theta"},
}
# Architectures with a rotary embedding for each type of layer, and their key for the base of those with a window.
BY_LAYER = {
    "gemma3_text": "rope_local_base_freq",
    "gemma3n_text": "rope_local_base_freq",
    "modernbert-decoder": "local_rope_theta",
    "olmo3": None,
}
# What a scaled embedding's settings are called where they are checked one by one; None: not among them.
PHI_KEYS = {"rope_type": "type", "original_max_position_embeddings": None, "factor": None}
SCALING_KEYS = {"phi3": PHI_KEYS, "phi4_multimodal": PHI_KEYS, "phimoe": {"rope_type": "type"}}
# What every version of PEFT, and what else reads its adapters, expects to find.
ADAPTER_KEYS = frozenset(
    ("alpha_pattern", "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "init_lora_weights",
     "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "modules_to_save", "peft_type", "r",
     "rank_pattern", "revision", "target_modules", "task_type", "use_dora", "use_rslora")
)  # fmt: skip


def make_compatible(folder: Path) -> None:
    """Rewrite the settings in a model's folder: those of the model, of its generation and of its tokenizer.

    The weights and tokenizer.json stay as they are. The same model has the same bytes on every machine.
    """
    _rewrite(folder / "config.json", model_settings)
    _rewrite(folder / "generation_config.json", generation_settings)
    length = context_length(read_json(folder / "config.json")) if (folder / "config.json").exists() else None
    _rewrite(folder / "tokenizer_config.json", lambda settings: tokenizer_settings(settings, length))


def make_adapter_compatible(folder: Path) -> None:
    """Rewrite the settings in an adapter's folder: PEFT refuses or warns of keys that it does not know."""
    _rewrite(folder / "adapter_config.json", adapter_settings)


def _rewrite(file: Path, change) -> None:
    """Write what `change` makes of a JSON file's object; a file that is missing or right stays as it is."""
    if not file.exists():
        return
    content = read_json(file)
    changed = change(dict(content))
    if changed != content:
        write_json(file, dict(sorted(changed.items())))


def model_settings(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json with its rotary embedding and its type in the keys of transformers 5 and in those of 4."""
    config = _with_rotary_keys({key: value for key, value in config.items() if key not in MACHINE})
    if dtype := config.get("dtype") or config.get("torch_dtype"):
        config |= {"dtype": dtype, "torch_dtype": dtype}
    return config


def _with_rotary_keys(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration, and those inside it, with its `rope_parameters` in the keys of transformers 4 as well."""
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
    """A generation_config.json of what decides the answers: not what a forward pass is to give beside its logits."""
    return {
        key: value
        for key, value in settings.items()
        if key not in ("output_attentions", "output_hidden_states")
    }


def tokenizer_settings(settings: dict[str, Any], length: int | None) -> dict[str, Any]:
    """A tokenizer_config.json of a class and keys that transformers 4 and 5 know, and of nothing of this machine.

    Args:
        length: the tokens that the model can hold; the tokenizer says no more than that.
    """
    settings = {key: value for key, value in settings.items() if key not in MACHINE}
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
    """The tokens that a model of this config.json can hold; None where it does not say."""
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
    """An adapter_config.json without the keys that are at their defaults and that not every version of PEFT knows."""
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
