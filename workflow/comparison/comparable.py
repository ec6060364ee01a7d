"""What the arms of a comparison must have in common, so that a difference is due to what they differ in by name."""

import re
from collections.abc import Iterable

from workflow import params
from workflow.runtime import dvc_lock, environment, inputs
from workflow.runtime.errors import CheckError
from workflow.runtime.files import read_yaml
from workflow.runtime.paths import (
    PARAMS,
    benchmark_file,
    evaluate_base_folder,
    evaluate_folder,
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
)
# What a training recorded of them. The tokens in the loss are among `rows`.
OF_TRAINING = ("steps", "rows", "validation_rows", "tokens_seen", "order_sha256")
# What an evaluation recorded of how it scored, but for the commands that give the same numbers.
OF_HARNESS = ("name", "version", "batch_rows", "batch_tokens", "add_bos_token", "chat_template_sha256")


def check_same_training(trained: dict[str, list[dict]], settings: params.Params) -> dict[str, list[str]]:
    """Variants must have learned from the same rows in the same order and steps, unless their own params change that.

    Args:
        trained: by variant, what each seed's training recorded.

    Returns:
        By variant, which of its own training params make it learn from other rows, or in another order, than the
        baseline; only where there are some.

    Raises:
        CheckError: two runs differ without that; the sentence names both, and in what.
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
                if result[key] != reference[key]:
                    raise CheckError(
                        f"{variant} and {baseline} were not trained on the same rows for the same steps: {key} of "
                        f"seed {seed} is {_shortened(result[key])} and {_shortened(reference[key])}"
                    )
            for key in ("steps", "rows", "validation_rows"):
                if result[key] != results[0][key]:
                    raise CheckError(
                        f"the seeds of {variant} were not trained on the same rows for the same steps: {key} of "
                        f"seed {seed} is {_shortened(result[key])}, and {_shortened(results[0][key])} of another"
                    )
    return otherwise


def check_same_items(forms: list[tuple[str, dict]]) -> None:
    """Every form of every run, and every base, must have been scored on the same items in the same way.

    Args:
        forms: what each is called, and what its evaluation recorded.

    Raises:
        CheckError: two of them differ; the sentence names both, the task, and in what.
    """
    (first, reference), *others = [(name, _scoring(form["harness"])) for name, form in forms]
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


def check_same_surroundings(kind: str, verb: str, runs: Iterable[tuple[str, str, dict]]) -> None:
    """Runs whose numbers are compared must come from one kind of device and one set of library versions.

    Args:
        kind: of work; workflow/runtime/environment.py says which libraries can move its numbers.
        verb: what was done to them.
        runs: of each what it is called, the stage that makes it, and what it recorded.

    Raises:
        CheckError: two of them differ; the sentence names both, and in what.
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


def _surroundings(kind: str, result: dict) -> dict[str, str]:
    versions = {
        library: version
        for library, version in result["versions"].items()
        if library in environment.PACKAGES[kind]
    }
    # Threads add up in another order, which moves the last digits alone.
    device = re.sub(r", \d+ threads$", "", result["precision"]["device_name"])
    return versions | {"device": f"{result['precision']['device']} ({device})"}


def check_inputs(settings: params.Params) -> None:
    """Every run must have been made with what dvc.lock says of its stage, and with what params.yaml says now.

    Results that do not record what their stage read are passed over.

    Raises:
        CheckError: one was made with something else; the sentence names it, both values, and the command.
    """
    experiment, files = settings.experiment, {}
    for name in experiment.variants:
        files[f"evaluate_base@{name}"] = evaluate_base_folder(name) / "result.json"
        files[f"benchmark@{name}"] = benchmark_file(name)
        for seed in experiment.seeds:
            files[f"train@{name}-{seed}"] = train_folder(name, seed) / "result.json"
            files[f"evaluate@{name}-{seed}"] = evaluate_folder(name, seed) / "result.json"
    lock, now = dvc_lock.read(), read_yaml(inputs.params_file(PARAMS))
    for stage, path in files.items():
        recorded, contradictions = inputs.record_in(path), []
        if locked := lock.get(stage):
            contradictions += inputs.contradictions(recorded, params=locked.params, deps=locked.deps)
        contradictions += inputs.contradictions(recorded, params=now, source="params.yaml")
        if contradictions:
            raise CheckError(
                f"{path} was made with {contradictions[0]}; `dvc repro --force --single-item {stage}` makes it again"
            )


def _shortened(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
