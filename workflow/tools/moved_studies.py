"""Read the studies of one base, unmoved and moved off its grid, and check that they differ in nothing else."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import TypeAdapter

from workflow import params
from workflow.comparison import comparable
from workflow.comparison.model import Arm
from workflow.comparison.records import TrainingRecord
from workflow.comparison.results import Table, table_of
from workflow.runtime.errors import CheckError, UserError, first_of
from workflow.runtime.files import read_json
from workflow.runtime.forms import AS_TRAINED, BASE
from workflow.runtime.paths import COMPARE, COMPARISON, MODEL_SOURCE, PARAMS, RESULTS

TASK, METRIC, UNIT = "holdout_loss", "nats_per_token", "nats per token"
SAYS = ("value", "low", "high", "p_value")  # of a difference, in the tables
ITEMS = COMPARE / "items.parquet"
READ = (PARAMS, MODEL_SOURCE, COMPARISON, ITEMS)  # what is read of a study
KEY = "model.moved"  # the only one in which studies of a moved base may differ
TRAININGS = TypeAdapter(dict[str, list[TrainingRecord]])


@dataclass(frozen=True)
class Study:
    """A finished study of one base.

    Attributes:
        moved: how its base was moved off its grid; None for the base as it is.
        source: what its source.json says of the base.
        trained: by variant, the record of each seed's training.
    """

    folder: Path
    settings: params.Params
    moved: params.Moved | None
    source: dict[str, Any]
    trained: dict[str, list[TrainingRecord]]
    items: pd.DataFrame

    def file(self, path: Path) -> Path:
        """Where one of its files lies, by its path in the folder where it ran."""
        return file_of(self.folder, path)

    def table(self, variant: str, form: str) -> Table:
        """The losses of an arm per seed and item, in nats.

        Raises:
            UserError, CheckError: it was not scored, or its seeds not on the same items.
        """
        frame = self.items[(self.items["variant"] == variant) & (self.items["form"] == form)]
        if frame.empty:
            raise UserError(f"{self.file(ITEMS)} has no {TASK}/{METRIC} of {variant}/{form}.")
        return table_of(frame, Arm(variant, form))


def read(folders: list[Path]) -> tuple[Study, list[Study]]:
    """Read finished studies.

    Returns:
        The one of the unmoved base, and those of the moved ones in the order of their seeds.

    Raises:
        UserError: a file is missing, they are not one study of the unmoved base and at least two draws, or they differ in
            more than `model.moved`.
        CheckError: they were not trained with the same libraries on the same kind of device and the same rows, or not
            scored on the same items.
    """
    studies = [read_study(folder) for folder in folders]
    unmoved = [study for study in studies if study.moved is None]
    moved = sorted((s for s in studies if s.moved), key=lambda study: study.moved.seed)
    if len(unmoved) != 1 or len(moved) < 2:
        raise UserError(
            f"one study with {KEY} null and at least two draws are compared; of the folders given, {len(unmoved)} "
            f"{'is' if len(unmoved) == 1 else 'are'} unmoved and {len(moved)} moved."
        )
    if len({study.moved.cells for study in moved}) > 1:
        cells = ", ".join(f"{study.moved.cells:g} ({study.folder})" for study in moved)
        raise UserError(f"the draws must be of the same distribution, and {KEY}.cells is {cells}.")
    seeds = [study.moved.seed for study in moved]
    if twice := [seed for seed in seeds if seeds.count(seed) > 1]:
        raise UserError(f"two studies are the same draw: {KEY}.seed is {twice[0]} in both.")
    for study in moved:
        check_alike(unmoved[0], study, but_for=KEY, allowed=(KEY, "source.json.moved"))
    return unmoved[0], moved


def is_published(folder: Path) -> bool:
    """Whether a study lies as it is published: what was in its results/ stands beside params.yaml."""
    return not (folder / RESULTS).exists() and (folder / COMPARE.relative_to(RESULTS)).is_dir()


def file_of(folder: Path, path: Path) -> Path:
    """Where a file of a study lies.

    Args:
        path: that of the file where the study ran.
    """
    if path.is_relative_to(RESULTS) and is_published(folder):
        path = path.relative_to(RESULTS)
    return folder / path


def read_study(folder: Path) -> Study:
    """Read a finished study, where it ran or as it is published.

    Raises:
        UserError: a file is missing.
        CheckError: its base was moved in another way than its params say.
    """
    published = is_published(folder)
    params_file, source_file, comparison_file, items_file = files = [file_of(folder, path) for path in READ]
    for path in files:
        if not path.is_file():
            reason = "it is not published" if published else "the study is not finished"
            raise UserError(f"{path} is missing: {reason}.")
    settings = params.load(params_file, published=published)
    source = read_json(source_file)
    moved, recorded = settings.model.moved, source.get("moved")
    if (moved and moved.model_dump()) != (recorded and {key: recorded[key] for key in ("cells", "seed")}):
        raise CheckError(
            f"{source_file} says that the base was moved by {recorded}, and {KEY} in params.yaml is {moved}: "
            "run the study again"
        )
    items = pd.read_parquet(items_file)
    items = items[(items["task"] == TASK) & (items["metric"] == METRIC)]
    trained = TRAININGS.validate_python(read_json(comparison_file)["training"])
    return Study(folder, settings, moved, source, trained, items)


def check_alike(one: Study, other: Study, *, but_for: str, allowed: tuple[str, ...]) -> None:
    """Check that two studies differ in nothing but what was done to their base.

    Args:
        but_for: what that is called in messages.
        allowed: beginnings of the keys of params, and of `source.json`, in which they may differ.

    Raises:
        UserError: they differ in another key.
        CheckError: they were not trained with the same libraries on the same kind of device and the same rows, or not
            scored on the same items.
    """
    differences = [
        *_differing(one.settings.model_dump(mode="json"), other.settings.model_dump(mode="json")),
        *_differing({"source.json": one.source}, {"source.json": other.source}),
    ]
    differences = [text for key, text in differences if not key.startswith(allowed)]
    if differences:
        raise UserError(
            f"{one.folder} and {other.folder} differ in more than {but_for}: {first_of(differences, '; ')}."
        )
    runs = [
        (f"{variant} seed {record.seed} of {study.folder}", f"train@{variant}-{record.seed}", record)
        for study in (one, other)
        for variant, records in study.trained.items()
        for record in records
    ]
    comparable.check_same_surroundings("training", "trained", runs)
    for variant, records in one.trained.items():
        for record, twin in zip(records, other.trained[variant], strict=True):
            for key in comparable.OF_TRAINING:
                if getattr(record, key) != getattr(twin, key):
                    raise CheckError(
                        f"{variant} seed {record.seed} of {other.folder} was not trained on the rows of {one.folder}: "
                        f"{key} differs"
                    )
        for form in (BASE, AS_TRAINED):
            table, twins = one.table(variant, form), other.table(variant, form)
            if not (table.items.equals(twins.items) and (table.denominators == twins.denominators).all()):
                raise CheckError(
                    f"{variant}/{form} of {other.folder} was not scored on the items of {one.folder}"
                )


def _differing(one: Any, two: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the path of each value in which two records differ, and a text with both values."""
    if isinstance(one, dict) and isinstance(two, dict):
        for key in dict.fromkeys([*one, *two]):
            yield from _differing(one.get(key), two.get(key), f"{path}.{key}".lstrip("."))
    elif one != two:
        yield path, f"{path} is {one} and {two}"
