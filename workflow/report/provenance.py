"""The provenance of the page's numbers: files, stages, keys, params and commands."""

from dataclasses import dataclass
from pathlib import Path

from workflow.report.answers import files as answer_files
from workflow.report.model import Facts
from workflow.runtime.paths import (
    COMPARISON,
    DATASET_SOURCE,
    MODEL_SOURCE,
    RATE_CHOICES,
    SAMPLE_COUNTS,
    benchmark_file,
    divergence_folder,
    evaluate_base_folder,
    evaluate_folder,
    train_folder,
    tune_folder,
)

CONTRAST = "contrasts[kind, variant, form, task, metric, subset].difference (value, low, high), .verdict, .p_adjusted"
SHARE = "shares[measure, variant, form, task, metric].value, .low and .high"
SCORE = "scores[variant, form, task, metric, subset].value and .per_seed"


@dataclass(frozen=True)
class File:
    """A file that numbers are read from. `stage` is empty if no stage wrote it."""

    path: str
    stage: str
    md5: str


@dataclass(frozen=True)
class Source:
    """The origin of the numbers of a table or figure, and the command that reproduces them.

    Attributes:
        keys: the keys of the numbers within the files.
        params: the keys of params.yaml that the stages were run with.
        command: reproduces the files.
    """

    files: list[File]
    keys: list[str]
    params: list[str]
    command: str


def sources(facts: Facts) -> dict[str, Source]:
    """The sources of the page's numbers, by part of the page."""
    experiment = facts.params.experiment
    runs = [(name, seed) for name in experiment.variants for seed in experiment.seeds]
    trained = [train_folder(*run) for run in runs]
    bases = [evaluate_base_folder(name) / "result.json" for name in experiment.variants]
    evaluated = [evaluate_folder(*run) / "result.json" for run in runs]
    benchmarks = [benchmark_file(name) for name in facts.params.benchmark.variants]
    divergences = [divergence_folder(*run) / "result.json" for run in runs]
    devices = [Path(file) for file in dict.fromkeys(file for block in facts.hardware for file in block.files)]
    compare, evaluate = "dvc repro compare", "dvc repro evaluate_base evaluate"

    def source(files: list[Path], keys: list[str], command: str) -> Source:
        return Source(_files(facts, files), keys, _params(facts, files), command)

    return {
        "answer": source(
            [COMPARISON, MODEL_SOURCE, SAMPLE_COUNTS, *evaluated],
            [CONTRAST, "cost[variant, metric].value and .ratio_to_baseline", "forms[form].precision.weights_gib"],
            "dvc repro",
        ),
        "evidence": source(
            [COMPARISON, *evaluated],
            [SCORE, CONTRAST, SHARE, "cost[variant, metric]", "forms[form].precision.weights_gib"],
            "dvc repro compare",
        ),
        "variants": source([p / "result.json" for p in trained], ["precision", "steps", "tokens_seen"], "dvc repro train"),
        "forms": source([*bases, *evaluated], ["forms[form].precision and .adapters"], evaluate),
        "quality": source([COMPARISON], [SCORE, CONTRAST], compare),
        "kept": source([COMPARISON], [SHARE], compare),
        "divergence": source(
            [COMPARISON, *divergences], ["divergences[variant, form, metric].value, .low and .high"], "dvc repro divergence compare"
        ),
        "forgetting": source([COMPARISON], [SCORE, f"{CONTRAST}, kind = to_base"], compare),
        "decomposition": source([COMPARISON], ["decomposition[variant, task, metric, kind, form]", CONTRAST], compare),
        "categories": source([COMPARISON], [f"{SCORE}, subset = category/NAME, held_out or seen", CONTRAST], compare),
        "claims": source([COMPARISON], ["claims[claim, variant, form]"], compare),
        "faults": source([COMPARISON], [SCORE, f"{CONTRAST}, kind = repair"], compare),
        "curves": source(
            [folder / file for folder in trained for file in ("history.csv", "validation.csv")],
            ["the columns loss, token_accuracy, validation_loss and validation_token_accuracy, by step"],
            "dvc repro train",
        ),
        "rates": source(
            [RATE_CHOICES, *(tune_folder(name) / "result.json" for name in facts.params.tuning.candidates)] if facts.choices else [],
            ["choices[variant].candidates[candidate].runs[seed].validation_loss_after", "choices[variant].learning_rate and .margin"],
            "dvc repro tune rates",
        ),
        "cost": source([COMPARISON, *benchmarks], ["cost[variant, metric]", "measurements[metric]"], "dvc repro benchmark compare"),
        "speed_ups": source(
            [COMPARISON, *(folder / "result.json" for folder in trained), *devices],
            ["speed_ups (of a training)", "cost[variant, metric]", "points[setting, variant].useful_tokens_per_second"],
            "dvc repro train benchmark compare",
        ),
        "answers": source(answer_files(facts.params), ["answer, by id and form", "numerator / denominator, by item"], f"{evaluate} compare"),
        "work": source(
            [*(folder / "result.json" for folder in trained), *bases, *evaluated, *benchmarks],
            ["seconds (of a training)", "forms[form].seconds", "seconds_per_step and measurements[load_time] of each of processes"],
            "dvc repro --force train evaluate_base evaluate benchmark",
        ),
        "hardware": source(
            devices,
            ["points[setting, variant, shape, rows, length].useful_tokens_per_second, .memory_gib, .predicted_gib and .joules_per_1000_tokens"],
            "make benchmark (on the device) and dvc repro benchmark_grid",
        ),
        "model": source([MODEL_SOURCE], ["all keys"], "dvc repro fetch_model"),
        "dataset": source([DATASET_SOURCE], ["all keys"], "dvc repro fetch_dataset"),
    }  # fmt: skip


def _files(facts: Facts, paths: list[Path]) -> list[File]:
    files = []
    for path in paths:
        origin = facts.lock.origins.get(path.as_posix())
        files.append(File(path.as_posix(), origin.stage if origin else "", origin.md5 if origin else ""))
    return files


def _params(facts: Facts, paths: list[Path]) -> list[str]:
    origins = [facts.lock.origins.get(path.as_posix()) for path in paths]
    return list(dict.fromkeys(key for origin in origins if origin for key in origin.params))
