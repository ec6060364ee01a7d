"""Cut a study's base in depth, and heal it by full training on rows that no split of the study uses (docs/mechanism.md)."""

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from workflow import params
from workflow.data import compatibility, lineage, model_files, near_duplicates
from workflow.data.rows import Instruction, from_rows, from_scored_rows
from workflow.data.sample import check_special_tokens
from workflow.fetch import convert, cut
from workflow.fetch.sources import folder_sha256
from workflow.params import editing
from workflow.runtime.errors import UserError, missing, suggestion
from workflow.runtime.files import read_json, read_jsonl, whole_folder, write_json, write_text
from workflow.runtime.paths import (
    CODE,
    INSTRUCTIONS,
    MODEL,
    MODEL_SOURCE,
    PARAMS,
    SAMPLE,
    TRAIN_ROWS,
    TUNING_ROWS,
    split_file,
)
from workflow.runtime.stage import say
from workflow.runtime.versions import installed

if TYPE_CHECKING:  # it takes seconds to import
    from workflow.training.train import Trained

BASE, PARAMS_OF_STUDY = "{layers}_layers", "healed_{layers}.yaml"
# Of a healed base's folder. It is none of the model's files, so nothing that reads the model sees it.
TRAINING = "training"
RECORD = "result.json"
DECIDING_ROOMS = ("data", "fetch", "methods", "models", "precisions", "training")


def heal(
    study: Path, *, variant: str, layers: list[int], folder: Path, compared: list[str] | None = None
) -> list[Path]:
    """Cut the base of a study to each of some depths, heal it, and write params whose model it is.

    All depths are trained on the same rows, with the first seed of the study. The full depth is trained as well, and not cut.
    A base that was healed before in just this way stays as it is.

    Args:
        study: the study's folder, in which at least its stage `sample` has run.
        variant: of the study's params, whose method trains every weight.
        layers: how many decoder layers to keep, of each base.
        folder: gets `LAYERS_layers`, the model, and `healed_LAYERS.yaml`, the params of its study.
        compared: the variants of these studies; None for those of the study.

    Returns:
        The params files, in the order of `layers`.

    Raises:
        UserError: the study has no sample or no such variant, its base has fewer layers, or no row is left to heal on.
    """
    settings = params.load(study / PARAMS)
    run = _run_of(settings, variant)
    _check_layers(study / MODEL, layers)
    text = (study / PARAMS).read_text(encoding="utf-8")
    if compared is not None:
        text = _with_variants(text, compared)
    rows = unused_rows(study, settings.sample)
    validation_rows = from_rows(read_jsonl(study / split_file("validation")))
    check_special_tokens(rows, model_files.load_tokenizer(study / MODEL))
    say(f"{len(rows):,} rows share no instruction with any split, and none is almost one of theirs")
    paths = []
    for kept in layers:
        healed = folder / BASE.format(layers=kept)
        _heal_one(study, healed, run, kept, rows, validation_rows)
        model = _pinned(healed, settings.model)
        paths.append(folder / PARAMS_OF_STUDY.format(layers=kept))
        write_text(paths[-1], editing.with_section(text, "model", model))
    return paths


def unused_rows(study: Path, sample: params.Sample) -> list[Instruction]:
    """Return the rows of a study's dataset that no seed trains on and none is tuned, validated or tested on.

    Rows of held-out categories are none of them, nor are rows that share an instruction with a split's, or whose prompt is
    almost that of one by `sample.near_duplicate_threshold`.

    Raises:
        UserError: the stage `sample` has not run, or no row is left.
    """
    if not (study / TRAIN_ROWS).is_dir():
        raise missing(study / TRAIN_ROWS)
    stored = [row for file in sorted((study / TRAIN_ROWS).glob("*.jsonl")) for row in read_jsonl(file)]
    stored += read_jsonl(study / split_file("validation"))
    stored += [row for line in read_jsonl(study / TUNING_ROWS) for row in line["rows"]]
    used = [*from_rows(stored), *from_scored_rows(read_jsonl(study / split_file("test")))]
    used = list({row.id: row for row in used}.values())
    groups = {row.group for row in used}
    others = [
        row
        for row in from_rows(read_jsonl(study / INSTRUCTIONS))
        if row.group not in groups and row.category not in sample.held_out_categories
    ]
    near = near_duplicates.near_duplicates(
        {"test": used, "validation": [], "train": others}, threshold=sample.near_duplicate_threshold
    )
    twins = {pair.other.id for pair in near}
    rows = [row for row in others if row.id not in twins]
    if not rows:
        raise UserError(f"the splits of {study} use every row of its dataset, so none is left to heal on.")
    return rows


def _run_of(settings: params.Params, variant: str) -> params.Run:
    if variant not in settings.variants:
        raise UserError(
            f"{variant} is not a variant of the study{suggestion(variant, settings.variants)}: its params say how to heal."
        )
    run = settings.run(variant, settings.experiment.seeds[0])
    if run.method.leaves_adapter:
        raise UserError(
            f"{variant} trains {run.method.trains}, and healing is full training: its method must be full."
        )
    return run


def _with_variants(text: str, compared: list[str]) -> str:
    """The params of a study with other variants in its experiment.

    Raises:
        UserError: the params do not fit the model then: a variant is unknown, or the baseline is missing.
    """
    text = editing.with_value(text, "experiment", "variants", compared)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / PARAMS
        path.write_text(text, encoding="utf-8")
        params.load(path)
    return text


def _check_layers(model_folder: Path, layers: list[int]) -> None:
    if not (model_folder / "config.json").is_file():
        raise missing(model_folder)
    whole = read_json(model_folder / "config.json")["num_hidden_layers"]
    if max(layers) > whole:
        raise UserError(f"--layers asks for {max(layers)}, and the base of the study has {whole}.")
    if whole not in layers:
        say(f"the comparison of depths also needs the full depth, healed and not cut: --layers {whole}")


def _heal_one(
    study: Path,
    healed: Path,
    run: params.Run,
    kept: int,
    rows: list[Instruction],
    validation_rows: list[Instruction],
) -> None:
    """Write the healed base of one depth, with the record and the curves of its training in its folder `training`."""
    from workflow.training import checkpoints
    from workflow.training.train import train

    belongs_to = checkpoints.identity(
        [study / MODEL, study / INSTRUCTIONS, study / SAMPLE, *(CODE / room for room in DECIDING_ROOMS)],
        variant=run.variant.model_dump(mode="json"),
        training=run.training.model_dump(mode="json"),
        hardware=run.hardware.model_dump(mode="json"),
        seed=run.seed,
        layers=kept,
        versions=installed(),
    )
    record = healed / TRAINING / RECORD
    if record.is_file() and read_json(record)["belongs_to"] == belongs_to:
        say(f"{healed} is healed already")
        return
    say(f"{healed}: {kept} layers")
    with tempfile.TemporaryDirectory() as scratch, whole_folder(healed) as unfinished:
        base, training = Path(scratch) / "model", unfinished / TRAINING
        shutil.copytree(study / MODEL, base)
        if kept < read_json(base / "config.json")["num_hidden_layers"]:
            cut.keep_layers(base, kept)
        training.mkdir()
        trained = train(
            run, model_folder=base, train_rows=rows, validation_rows=validation_rows, folder=training
        )
        for file in (training / "weights").iterdir():
            file.rename(unfinished / file.name)
        (training / "weights").rmdir()
        checkpoints.remove(training / "checkpoints")
        write_json(training / RECORD, {"belongs_to": belongs_to, "layers": kept, **trained.as_dict()})
        _complete(unfinished, base, read_json(study / MODEL_SOURCE), healed=_healing(run, trained))


def _healing(run: params.Run, trained: "Trained") -> dict:
    """What config.json says of a training, as `cut.Healed` has it."""
    return {
        "variant": run.name,
        "rows": trained.rows.rows,
        "tokens_in_loss": trained.rows.tokens_in_loss,
        "steps": trained.steps,
        "seed": run.seed,
        "learning_rate": run.training.learning_rate,
        "validation_loss_before": trained.validation_loss_before,
        "validation_loss_after": trained.validation_loss_kept,
    }


def _complete(folder: Path, base: Path, source: dict, *, healed: dict) -> None:
    """Put the tokenizer, the record of the cut and the healing, and a card beside the weights of a healed base."""
    lineage.copy_tokenizer(base, folder)
    cut.mark_healed(folder, healed)
    compatibility.make_compatible(folder)
    record = source | convert.describe(folder) | cut.record(folder)
    lineage.write_base_card(folder, lineage.read(base), record)


def _pinned(healed: Path, before: params.Model) -> dict:
    """The section `model` of params whose model is a healed base, with the prompt format of the model that it was."""
    return {
        "source": "file",
        "path": healed.as_posix(),
        "sha256": folder_sha256(healed, name=healed.as_posix()),
        "chat_template": before.chat_template,
        "chat_date": before.chat_date,
        "end_token": before.end_token,
        "moved": None,
        "kept_layers": None,
    }
