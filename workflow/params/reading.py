"""Reading a params file, and the few questions that are asked of params.yaml as a whole.

`load` is what every stage calls before any work: it raises a UserError of one sentence that names the key,
its value and what is allowed.
"""

from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML

from workflow.params import messages, presets, validation
from workflow.params.model import Params
from workflow.params.training import in_sections
from workflow.runtime import inputs
from workflow.runtime.dvc_lock import value_at
from workflow.runtime.errors import UserError, problems
from workflow.runtime.files import read_yaml
from workflow.runtime.paths import PARAMS

# Keys that params have not always had, with the value that says what was done before.
SINCE = {
    "model": {"chat_date": "2024-07-26", "end_token": None, "moved": None, "kept_layers": None},
    "sample": {"per_seed": False, "longest_response": None},
    "benchmark": {"processes": 1},
    "evaluation": {"divergence_items": None},
    "comparison": {"claims": {"far_less": 0.99}},
}
# Those whose value was that of another key.
SINCE_AS = {"benchmark": {"variants": "experiment.variants"}}
# The same of whole sections.
SECTIONS_SINCE = {"tuning": {"candidates": {}, "seeds": []}}
SINCE_OF_TRAINING = {
    "step": {"initialization": "default", "rank_stabilized": False, "shared_inputs": False},
    "schedule": {"b_rate_factor": 1.0, "keep": "last", "rows": None, "left_out_categories": []},
}
# The same of variants; 4 bits were always quantized in blocks of this size.
BLOCK_SIZE_BEFORE = 64


def load(path: Path = PARAMS, *, published: bool = False) -> Params:
    """Read and check a params file; within a stage, params.yaml as it was when the stage started.

    Args:
        published: whether it is that of a study, which may be older than a key; it then has the value of `SINCE` or `SINCE_AS`,
            or than the sections of `training`.

    Raises:
        UserError: the file is missing, is not YAML, or does not fit the model.
    """
    if not path.exists():
        raise UserError(f"{path} is missing: `make params PRESET=default` writes params.yaml.")
    content = read_yaml(inputs.params_file(path))
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a mapping of sections, and holds {_kind(content)}.")
    if published:
        content = SECTIONS_SINCE | content
    for section in (SINCE.keys() | SINCE_AS.keys()) if published else ():
        if isinstance(content.get(section), dict):
            others = {key: value_at(content, other) for key, other in SINCE_AS.get(section, {}).items()}
            content[section] = SINCE.get(section, {}) | others | content[section]
    if published and isinstance(content.get("training"), dict):
        content["training"] = _completed_training(content["training"])
    if published and isinstance(content.get("variants"), dict):
        content["variants"] = {name: _newer_variant(variant) for name, variant in content["variants"].items()}
    return _validated(content, str(path))


def _completed_training(training: dict[str, Any]) -> dict[str, Any]:
    """The section `training` of a study that is older than one of its keys, or than its two sections."""
    if "step" not in training:
        since = SINCE_OF_TRAINING["step"] | SINCE_OF_TRAINING["schedule"]
        return in_sections(since | training)
    return {
        name: SINCE_OF_TRAINING.get(name, {}) | section if isinstance(section, dict) else section
        for name, section in training.items()
    }


def _newer_variant(variant: Any) -> Any:
    """A published variant with the keys that variants have not always had."""
    if not isinstance(variant, dict):
        return variant
    in_blocks = variant.get("precision") in ("nf4", "fp4")
    return {"block_size": BLOCK_SIZE_BEFORE if in_blocks else None, "layers_in_16_bits": []} | variant


def preset(name: str) -> Params:
    """Read and check the complete params of a preset.

    Raises:
        UserError: there is no such preset.
    """
    text = presets.complete_text(name)
    return _validated(YAML(typ="safe", pure=True).load(text), f"preset {name}")


def _validated(content: dict, source: str) -> Params:
    try:
        try:
            return Params.model_validate(content)
        except ValidationError:
            raise problems(source, validation.problems_of(content)) from None
    except RecursionError:
        raise UserError(f"{source}: a value holds itself, by an alias.") from None


def _kind(content: Any) -> str:
    match content:
        case None:
            return "nothing"
        case list():
            return "a list"
    return messages.shortened(content)


def check_variant(params: Params, name: str) -> None:
    """Raise a UserError that lists the experiment's variants unless `name` is one of them."""
    if name not in params.experiment.variants:
        raise UserError(
            f"{name} is not a variant of this experiment; experiment.variants has "
            f"{', '.join(params.experiment.variants)}."
        )


def gpus_needed(variant: str, **_: object) -> int:
    """Return on how many GPUs a stage computes with a variant of params.yaml: none where params say `cpu`."""
    params = load()
    check_variant(params, variant)
    return 0 if params.hardware.device == "cpu" else 1
