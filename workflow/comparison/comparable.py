"""Check that the arms of a comparison differ only in their variant, so that a difference has no other cause."""

import re
from collections.abc import Iterable

from workflow import params
from workflow.comparison.records import RunRecord, TrainingRecord
from workflow.runtime import dvc_lock, environment, inputs
from workflow.runtime.errors import CheckError
from workflow.runtime.files import read_yaml
from workflow.runtime.paths import (
    PARAMS,
    benchmark_file,
    divergence_folder,
    evaluate_base_folder,
    evaluate_folder,
    grid_file,
    train_folder,
)

# The params that decide which rows a run learns from, in which order and steps, and which of their tokens.
DECIDE_ROWS = (
    "steps",
    "epochs",
    "batch_rows",
    "length_window",
    "max_length",
    "use_context",
    "loss_on",
    "learn_end_token",
    "second_bos",
    "rows",
    "left_out_categories",
)
# What a training records about them. `rows` includes the tokens in the loss.
OF_TRAINING = ("steps", "rows", "validation_rows", "tokens_seen", "order_sha256")
# What an evaluation records about its scoring, except the commands that reproduce the numbers.
OF_HARNESS = ("name", "version", "batch_rows", "batch_tokens", "add_bos_token", "chat_template_sha256")


def check_same_training(
    trained: dict[str, list[TrainingRecord]], settings: params.Params
) -> dict[str, list[str]]:
    """Check that variants trained on the same rows in the same order and steps, unless their own params change that.

    So did the seeds of a variant, in another order; where each seed draws its own rows, they share the validation rows and,
    if params name a number of steps, the steps.

    Args:
        trained: by variant, the result of each seed's training.

    Returns:
        By variant, those of its own training params that change its rows, or their order, from the baseline's.
        Variants without such params are left out.

    Raises:
        CheckError: two runs differ for another reason; the sentence names both and the difference.
    """
    baseline = settings.experiment.baseline
    otherwise = {}
    for variant, results in trained.items():
        ours, theirs = settings.training_of(variant), settings.training_of(baseline)
        changed = [key for key in DECIDE_ROWS if getattr(ours, key) != getattr(theirs, key)]
        if changed:
            otherwise[variant] = changed
        for seed, result, reference in zip(
            settings.experiment.seeds, results, trained[baseline], strict=True
        ):
            for key in () if changed else OF_TRAINING:
                if getattr(result, key) != getattr(reference, key):
                    raise CheckError(
                        f"{variant} and {baseline} were not trained on the same rows for the same steps: {key} of "
                        f"seed {seed} is {_shortened(getattr(result, key))} and {_shortened(getattr(reference, key))}"
                    )
            for key in _shared_by_seeds(settings, ours):
                if getattr(result, key) != getattr(results[0], key):
                    raise CheckError(
                        f"the seeds of {variant} were not trained on the same rows for the same steps: {key} of "
                        f"seed {seed} is {_shortened(getattr(result, key))}, and {_shortened(getattr(results[0], key))} of another"
                    )
    return otherwise


def _shared_by_seeds(settings: params.Params, training: params.Training) -> tuple[str, ...]:
    """What all seeds of a variant have in common, of what a training records of its rows and steps."""
    if not settings.sample.per_seed:
        return ("steps", "rows", "validation_rows")
    return ("validation_rows",) if training.steps is None else ("steps", "validation_rows")


def check_same_items(harnesses: list[tuple[str, dict]]) -> None:
    """Check that every form of every run, and every base, was scored on the same items in the same way.

    Args:
        harnesses: the name of each form, and its evaluation's record of the harness.

    Raises:
        CheckError: two of them differ; the sentence names both, the task and the difference.
    """
    (first, reference), *others = [(name, _scoring(harness)) for name, harness in harnesses]
    for name, scoring in others:
        for key in sorted({*reference, *scoring}):
            if scoring.get(key) != reference.get(key):
                raise CheckError(
                    f"{name} and {first} were not scored on the same items in the same way: {key} is "
                    f"{_shortened(scoring.get(key))} and {_shortened(reference.get(key))}"
                )


def _scoring(harness: dict) -> dict:
    scoring = {key: harness[key] for key in OF_HARNESS}
    for task in harness["tasks"]:
        scoring |= {f"{key} of {task['task']}": value for key, value in task.items()}
    return scoring


def check_same_surroundings(kind: str, verb: str, runs: Iterable[tuple[str, str, RunRecord]]) -> None:
    """Check that compared runs come from one kind of device and one set of library versions.

    Args:
        kind: kind of work; workflow/runtime/environment.py lists the libraries that can change its numbers.
        verb: for the error, such as `trained`.
        runs: the name, the stage and the result of each run.

    Raises:
        CheckError: two of them differ; the sentence names both and the difference.
    """
    (first, _, result), *others = list(runs)
    reference = _surroundings(kind, result)
    for name, stage, result in others:
        surroundings = _surroundings(kind, result)
        for key in sorted({*reference, *surroundings}):
            if surroundings.get(key) != reference.get(key):
                raise CheckError(
                    f"{name} was {verb} with {key} {surroundings.get(key)} and {first} with {reference.get(key)}, so a difference "
                    f"between them could be due to that; `dvc repro --force --single-item {stage}` makes it anew here"
                )


def _surroundings(kind: str, result: RunRecord) -> dict[str, str]:
    versions = {
        library: version
        for library, version in result.versions.items()
        if library in environment.PACKAGES[kind]
    }
    # The number of threads changes the order of summation, and so only the last digits.
    device = re.sub(r", \d+ threads$", "", result.precision.device_name)
    return versions | {"device": f"{result.precision.device} ({device})"}


def check_inputs(settings: params.Params) -> None:
    """Check that every run's inputs match its stage in dvc.lock and the present params.yaml.

    Results that do not record their inputs are skipped.

    Raises:
        CheckError: an input differs; the sentence names it, both values, and the command that repeats the stage.
    """
    experiment, files = settings.experiment, {}
    for name in experiment.variants:
        files[f"evaluate_base@{name}"] = evaluate_base_folder(name) / "result.json"
        for seed in experiment.seeds:
            files[f"train@{name}-{seed}"] = train_folder(name, seed) / "result.json"
            files[f"evaluate@{name}-{seed}"] = evaluate_folder(name, seed) / "result.json"
            if settings.evaluation.divergence_items is not None:
                files[f"divergence@{name}-{experiment.baseline}-{seed}"] = (
                    divergence_folder(name, seed) / "result.json"
                )
    for name in settings.benchmark.variants:
        files[f"benchmark@{name}"] = benchmark_file(name)
        for shape in settings.benchmark.grid.named_shapes:
            files[f"benchmark_grid@{name}-{shape}"] = grid_file(name, shape)
    lock, present = dvc_lock.read(), read_yaml(inputs.params_file(PARAMS))
    for stage, path in files.items():
        recorded, contradictions = inputs.record_in(path), []
        if locked := lock.get(stage):
            contradictions += inputs.contradictions(recorded, params=locked.params, deps=locked.deps)
        contradictions += inputs.contradictions(recorded, params=present, source="params.yaml")
        if contradictions:
            raise CheckError(
                f"{path} was made with {contradictions[0]}; `dvc repro --force --single-item {stage}` makes it again"
            )


def _shortened(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
