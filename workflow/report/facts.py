"""Everything that the page says, read from params.yaml and the stages' files."""

import itertools
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pandas as pd

from workflow import params
from workflow.comparison import Cost, Quality
from workflow.errors import UserError
from workflow.files import read_json, read_jsonl, sha256
from workflow.paths import (
    COMPARE,
    DATASET_SOURCE,
    MODEL_SOURCE,
    RESULTS,
    SAMPLE,
    benchmark_file,
    evaluate_base_folder,
    evaluate_folder,
    train_folder,
)
from workflow.statistics import Difference

COMPARISON = COMPARE / "comparison.json"
SAMPLE_COUNTS = SAMPLE / "metrics.json"
LOCK = Path("requirements.lock")
# Not allowed in HTML, even escaped: controls other than tab and line feed, and lone surrogates.
FORBIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True)
class Variant:
    """One variant: what it is called on the page, and what its runs recorded."""

    name: str
    label: str
    position: int  # in experiment.variants; decides its colour and marker
    is_baseline: bool
    precision: dict
    trained: list[dict]  # one per seed


@dataclass(frozen=True)
class Answer:
    """What one model wrote; `stopped` is None for the dataset's own response."""

    who: str
    text: str
    stopped: bool | None


@dataclass(frozen=True)
class AnsweredRow:
    """One test row with everyone's answer."""

    instruction: str
    context: str
    category: str | None
    answers: list[Answer]


@dataclass(frozen=True)
class Commands:
    """The shell commands that give one evaluation's numbers."""

    what: str
    commands: list[str]


@dataclass(frozen=True)
class Facts:
    """What the page is made from."""

    asked: params.Params
    params_text: str
    model: dict
    dataset: dict
    rows: dict[str, int]  # per split
    variants: list[Variant]
    quality: list[Quality]
    cost: list[Cost]
    benchmarks: dict[str, dict]
    history: pd.DataFrame
    validation: pd.DataFrame
    answered: list[AnsweredRow]
    commands: list[Commands]
    harness: str
    versions: dict[str, str]
    digests: dict[str, str]

    @property
    def baseline(self) -> Variant:
        return next(variant for variant in self.variants if variant.is_baseline)

    @property
    def others(self) -> list[Variant]:
        return [variant for variant in self.variants if not variant.is_baseline]

    @property
    def on_cpu(self) -> bool:
        return any(variant.precision["device"] == "cpu" for variant in self.variants)

    @property
    def devices(self) -> list[str]:
        return list(dict.fromkeys(variant.precision["device_name"] for variant in self.variants))

    def quality_of(self, variant: str, metric: tuple[str, str]) -> Quality | None:
        """A variant's (task, metric), or None where it was not scored."""
        return next((q for q in self.quality if (q.variant, q.task, q.metric) == (variant, *metric)), None)

    def cost_of(self, variant: str, metric: str) -> Cost | None:
        """A variant's measured cost, or None where it was not measured."""
        return next((c for c in self.cost if (c.variant, c.metric) == (variant, metric)), None)

    @property
    def quality_metrics(self) -> list[tuple[str, str]]:
        """Every (task, metric) that some variant has, in the order of the files."""
        return list(dict.fromkeys((q.task, q.metric) for q in self.quality))

    @property
    def cost_metrics(self) -> list[str]:
        return list(dict.fromkeys(c.metric for c in self.cost))


def gather(asked: params.Params) -> Facts:
    """Read what the stages wrote for the runs that params name.

    Raises:
        UserError: a file is missing (the sentence names it), or the comparison is of other runs.
    """
    files = inputs(asked)
    for path in files:
        if not path.is_file():
            how = "; `dvc repro` makes it" if path.is_relative_to(RESULTS) else ""
            raise UserError(f"{path} is missing{how}.")
    experiment = asked.experiment
    comparison = read_json(COMPARISON)
    _check_same_runs(comparison, asked)
    labels = variant_labels(asked)
    runs = [(variant, seed) for variant in experiment.variants for seed in experiment.seeds]
    results = {run: read_json(evaluate_folder(*run) / "result.json") for run in runs}
    trained = {
        name: [read_json(train_folder(name, seed) / "result.json") for seed in experiment.seeds]
        for name in experiment.variants
    }
    benchmarks = {name: read_json(benchmark_file(name)) for name in experiment.variants}
    bases = {v: read_json(evaluate_base_folder(v) / "result.json") for v in experiment.variants}
    return Facts(
        asked=asked,
        params_text=params.PARAMS_FILE.read_text(encoding="utf-8"),
        model=read_json(MODEL_SOURCE),
        dataset=read_json(DATASET_SOURCE),
        rows={key.removesuffix("_rows"): count for key, count in read_json(SAMPLE_COUNTS).items()},
        variants=[
            Variant(
                name=name,
                label=labels[name],
                position=position,
                is_baseline=name == experiment.baseline,
                precision=comparison["precisions"][name],
                trained=trained[name],
            )
            for position, name in enumerate(experiment.variants)
        ],
        quality=[_quality(row) for row in comparison["quality"]],
        cost=[Cost(**row) for row in comparison["cost"]],
        benchmarks=benchmarks,
        history=_curves(runs, "history.csv"),
        validation=_curves(runs, "validation.csv"),
        answered=_answered(asked, labels),
        commands=[
            *(
                Commands(f"{labels[name]}, untouched base", base["harness"]["commands"])
                for name, base in bases.items()
            ),
            *(
                Commands(f"{labels[name]}, seed {seed}", result["harness"]["commands"])
                for (name, seed), result in results.items()
            ),
        ],
        harness=_harness([*bases.values(), *results.values()]),
        versions=_versions(
            [*bases.values(), *results.values(), *benchmarks.values(), *itertools.chain(*trained.values())]
        ),
        digests={path.as_posix(): sha256(path) for path in files},
    )


def inputs(asked: params.Params) -> list[Path]:
    """Every file that the page is made from."""
    experiment = asked.experiment
    files = [params.PARAMS_FILE, LOCK, MODEL_SOURCE, DATASET_SOURCE, SAMPLE_COUNTS, COMPARISON]
    for name in experiment.variants:
        files += [benchmark_file(name), evaluate_base_folder(name) / "result.json"]
        for seed in experiment.seeds:
            files += [
                train_folder(name, seed) / file for file in ("result.json", "history.csv", "validation.csv")
            ]
            files.append(evaluate_folder(name, seed) / "result.json")
    return files + [path for _, path in _answer_files(asked, {})]


def _check_same_runs(comparison: dict, asked: params.Params) -> None:
    experiment = asked.experiment
    found = (list(comparison["precisions"]), comparison["baseline"], comparison["seeds"])
    if found != (experiment.variants, experiment.baseline, experiment.seeds):
        raise UserError(
            f"{COMPARISON} compares {', '.join(found[0])} to {found[1]} over the seeds "
            f"{', '.join(map(str, found[2]))}, which is not what params.yaml names; "
            "`dvc repro compare` mends it."
        )


def variant_labels(asked: params.Params) -> dict[str, str]:
    """What each variant of the experiment is called in a sentence; no two share a label."""
    labels = {name: _label(asked.variants[name]) for name in asked.experiment.variants}
    taken = list(labels.values())
    return {name: label if taken.count(label) == 1 else f"{label}, {name}" for name, label in labels.items()}


def _label(variant: params.Variant) -> str:
    if variant.method == "full":
        return "16-bit full fine-tuning"
    match variant.precision:
        case "16bit":
            return "16-bit LoRA"
        case "int8":
            return "8-bit LoRA"
        case four_bit:
            doubly = ", double-quantised" if variant.double_quantization else ""
            return f"4-bit QLoRA ({four_bit.upper()}{doubly})"


def model_name(model: params.Model) -> str:
    """A model's short name, from where it comes."""
    match model:
        case params.HubModel():
            return model.repository
        case params.WheelModel():
            return PurePosixPath(model.member).name.removesuffix(".gguf")
        case params.FileModel():
            return PurePosixPath(model.path).name
        case params.RandomModel():
            return "Llama with random weights"


def dataset_name(dataset: params.Dataset) -> str:
    """A dataset's short name, from where it comes."""
    match dataset:
        case params.HubDataset():
            return dataset.repository
        case params.WheelDataset():
            return dataset.package
        case params.FileDataset():
            return PurePosixPath(dataset.path).name


def clean(text: str) -> str:
    """Text with the characters that HTML forbids replaced by U+FFFD."""
    return FORBIDDEN.sub("\ufffd", text.replace("\r\n", "\n"))


def _quality(row: dict) -> Quality:
    against = row["to_baseline"]
    differences = {
        "to_base": Difference(**row["to_base"]),
        "to_baseline": Difference(**against) if against else None,
    }
    return Quality(**{**row, **differences})


def _curves(runs: list[tuple[str, int]], file: str) -> pd.DataFrame:
    return pd.concat(
        [pd.read_csv(train_folder(*run) / file).assign(variant=run[0], seed=run[1]) for run in runs],
        ignore_index=True,
    )


def _answer_files(asked: params.Params, labels: dict[str, str]) -> list[tuple[str, Path]]:
    """Whose answers are shown, and their files: the baseline's base, then each variant's first seed."""
    experiment = asked.experiment
    seed = experiment.seeds[0]
    return [
        ("Untouched base", evaluate_base_folder(experiment.baseline) / "answers.jsonl"),
        *(
            (f"{labels.get(name, name)}, seed {seed}", evaluate_folder(name, seed) / "answers.jsonl")
            for name in experiment.variants
        ),
    ]


def _answered(asked: params.Params, labels: dict[str, str]) -> list[AnsweredRow]:
    """The rows that all of them answered, in the order of the base's file."""
    written = {
        who: {row["id"]: row for row in read_jsonl(path)} for who, path in _answer_files(asked, labels)
    }
    first, *_ = written.values()
    return [
        AnsweredRow(
            instruction=clean(row["instruction"]),
            context=clean(row["context"]),
            category=row["category"] and clean(row["category"]),
            answers=[
                Answer("Reference", clean(row["response"]), None),
                *(
                    Answer(who, clean(rows[key]["answer"]), rows[key]["stopped"])
                    for who, rows in written.items()
                ),
            ],
        )
        for key, row in first.items()
        if all(key in rows for rows in written.values())
    ]


def _harness(results: list[dict]) -> str:
    """Name and version of what scored the models, as its results recorded it."""
    return ", ".join(dict.fromkeys(f"{r['harness']['name']} {r['harness']['version']}" for r in results))


def _versions(results: list[dict]) -> dict[str, str]:
    """Each library's version as the results recorded it; several where the results were not made alike."""
    found: dict[str, dict[str, None]] = {}
    for result in results:
        for library, version in result["versions"].items():
            found.setdefault(library, {})[version] = None
    return {library: " and ".join(versions) for library, versions in found.items()}
