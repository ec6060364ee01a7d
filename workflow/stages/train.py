"""Stage train: fine-tune one run, a variant with a seed."""

from typing import TYPE_CHECKING

from workflow import params
from workflow.data.rows import from_rows
from workflow.runtime import inputs, launch
from workflow.runtime.errors import missing
from workflow.runtime.files import read_json, read_jsonl, sync, write_json
from workflow.runtime.paths import (
    CODE,
    MODEL,
    checkpoints_folder,
    rate_file,
    split_file,
    train_folder,
    train_rows_file,
    weights_folder,
)
from workflow.runtime.stage import run_stage
from workflow.runtime.versions import installed

if TYPE_CHECKING:
    from workflow.training.checkpoints import Checkpointing

# What decides a training, beside its rows and its params: an edit there begins it anew.
DECIDING_ROOMS = ("data", "methods", "models", "precisions", "training")


def train(variant: str, seed: int) -> None:
    """Fine-tune one variant with one seed; save its adapter, its curves and what was done."""
    settings = params.load()
    params.check_variant(settings, variant)
    from workflow.data import cards
    from workflow.training import checkpoints
    from workflow.training import train as training

    rate = rate_of(settings, variant)
    run, folder = settings.run(variant, seed, learning_rate=rate), train_folder(variant, seed)
    folder.mkdir(parents=True, exist_ok=True)
    trained = training.train(
        run,
        model_folder=MODEL,
        train_rows=from_rows(read_jsonl(train_rows_file(seed))),
        validation_rows=from_rows(read_jsonl(split_file("validation"))),
        folder=folder,
        checkpointing=checkpointing_of(settings, run),
        finish=lambda written, precision: cards.complete(
            written,
            weights_folder(variant, seed),
            settings.variants[variant].keeping(precision.layers_in_16_bits),
            model_folder=MODEL,
            compute=precision.compute,
            device=precision.device,
        ),
    )
    if launch.rank() > 0:
        return  # the first of the processes of a sharded training writes for all
    for name in ("history.csv", "validation.csv"):
        sync(folder / name)  # the checkpoints that they could be written from again go below
    write_json(
        folder / "result.json",
        {
            "variant": variant,
            "seed": seed,
            "learning_rate": rate,
            **trained.as_dict(),
            "versions": installed(),
            "inputs": inputs.recorded(),
        },
    )
    inputs.check()  # while the last checkpoint is there: from it the training ends again in no time, if an edit is undone
    checkpoints.remove(checkpoints_folder(variant, seed))


def rate_of(settings: params.Params, variant: str) -> float:
    """The learning rate that stage rates wrote for a variant; that of params where they give a number, as it does.

    Raises:
        UserError: tuning chooses the rate, and stage rates was not run.
    """
    rate = settings.rate_of(variant)
    if not isinstance(rate, str):
        return float(rate)
    path = rate_file(variant)
    if not path.is_file():
        raise missing(path)
    return read_json(path)["learning_rate"]


def checkpointing_of(settings: params.Params, run: params.Run) -> "Checkpointing | None":
    """When this training writes checkpoints; one of the same params, rows, model and code goes on from them."""
    from workflow.training import checkpoints

    if settings.checkpoints.every_steps is None:
        return None
    belongs_to = checkpoints.identity(
        [
            MODEL,
            train_rows_file(run.seed),
            split_file("validation"),
            *(CODE / room for room in DECIDING_ROOMS),
        ],
        variant=run.variant.model_dump(mode="json"),
        training=run.training.model_dump(mode="json"),
        hardware=run.hardware.model_dump(mode="json"),
        seed=run.seed,
        versions=installed(),
    )
    return checkpoints.Checkpointing(settings.checkpoints.every_steps, belongs_to)


def processes_of(variant: str, seed: int) -> int:
    """How many processes share the training of this variant."""
    settings = params.load()
    params.check_variant(settings, variant)
    return settings.variants[variant].processes


def gpus_needed(variant: str, seed: int) -> int:
    """A GPU for each of the processes."""
    return params.gpus_needed(variant) * processes_of(variant, seed)


if __name__ == "__main__":
    run_stage(
        "train",
        train,
        arguments={"variant": str, "seed": int},
        gpus_needed=gpus_needed,
        processes_of=processes_of,
    )
