"""What no single section of params can say: the checks of one section against another.

Each yields a sentence, without its full stop, for each problem that it finds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from difflib import get_close_matches
from typing import TYPE_CHECKING

from pydantic import ValidationError

from workflow import methods, precisions
from workflow.methods import initializations
from workflow.params import messages
from workflow.params.sources import ChatColumns
from workflow.params.training import Training
from workflow.params.values import OWN_METRICS, OWN_TASKS
from workflow.runtime.errors import suggestion
from workflow.runtime.forms import variant_and_form

if TYPE_CHECKING:
    from workflow.params.model import Params, Variant


def check(params: Params, damaged: Collection[tuple] = ()) -> Iterator[str]:
    """Yield a sentence for each section that does not fit another.

    Args:
        damaged: paths of keys that `params` lacks, as they were not sound; no check reads one of them.
    """
    for inspect, keys in CHECKS.items():
        read = [tuple(key.split(".")) for key in keys.split()]
        if not any(path[: len(key)] == key[: len(path)] for key in read for path in damaged):
            yield from inspect(params)


def _check_experiment(params: Params) -> Iterator[str]:
    """Yield a sentence if the experiment names a variant or seed twice, or a variant that is not defined."""
    defined = ", ".join(params.variants)
    for key in ("variants", "seeds"):
        values = getattr(params.experiment, key)
        twice = [value for value in values if values.count(value) > 1]
        if twice:
            yield f"experiment.{key} names {twice[0]} more than once"
    for name in params.experiment.variants:
        if name not in params.variants:
            yield (
                f"experiment.variants names {name}, which variants does not define; it defines {defined}"
                f"{suggestion(name, params.variants)}"
            )
    if params.experiment.baseline not in params.experiment.variants:
        yield (
            f"experiment.baseline is {params.experiment.baseline}, "
            f"which must be one of experiment.variants: {', '.join(params.experiment.variants)}"
            f"{suggestion(params.experiment.baseline, params.experiment.variants)}"
        )


def _check_measured(params: Params) -> Iterator[str]:
    """Yield a sentence if a variant is to be measured that does not run, or twice, or without the baseline."""
    experiment, measured = params.experiment, params.benchmark.variants
    if any(_check_experiment(params)):
        return  # one slip there is one sentence
    if twice := [name for name in measured if measured.count(name) > 1]:
        yield f"benchmark.variants names {twice[0]} more than once"
    for name in dict.fromkeys(measured):
        if name not in experiment.variants:
            yield (
                f"benchmark.variants names {name}, which is none of experiment.variants: {', '.join(experiment.variants)}"
                f"{suggestion(name, experiment.variants)}"
            )
    if measured and experiment.baseline not in measured:
        yield (
            f"benchmark.variants is {', '.join(measured)}, which must have the baseline {experiment.baseline} among them, as "
            "costs are compared with its, or be []"
        )


def _check_device(params: Params) -> Iterator[str]:
    """Yield a sentence if a variant that runs has a precision that no CPU has, and runs are on one."""
    running = [name for name in params.trained_variants if name in params.variants]
    for name in running if params.hardware.device == "cpu" else ():
        precision = precisions.get(params.variants[name].precision)
        if precision.compute_capability:
            yield (
                f"variants.{name}.precision is {precision.name} and hardware.device cpu: {precision.name} needs a GPU of "
                f"compute capability {'.'.join(map(str, precision.compute_capability))} or newer"
            )


def _check_sample(params: Params) -> Iterator[str]:
    """Yield a sentence if validation and test, taken from the drawn rows, leave none to train on."""
    sample = params.sample
    held_out = sample.validation_rows + sample.test_rows
    if not sample.per_seed and held_out >= sample.rows:
        yield f"sample.validation_rows + test_rows is {held_out}, which must be below rows ({sample.rows})"


def _check_conversations(params: Params) -> Iterator[str]:
    """Yield a sentence if a task of ours puts examples before a conversation."""
    for name in OWN_TASKS if isinstance(params.dataset.columns, ChatColumns) else ():
        if name in params.evaluation.tasks and params.evaluation.tasks[name].few_shot:
            yield (
                f"evaluation.tasks.{name}.few_shot is {params.evaluation.tasks[name].few_shot}, "
                "which must be 0 where dataset.columns names messages: a conversation has its own turns before it"
            )


def _check_own_training(params: Params) -> Iterator[str]:
    """Yield a sentence for each key of a variant's own training that there is not, or whose value cannot be."""
    for name, variant in params.variants.items():
        try:
            Training.model_validate(variant.training)
        except ValidationError as error:
            errors = [each for each in error.errors() if each["loc"] and each["type"] != "missing"]
            yield from messages.describe(errors, Training, prefix=f"variants.{name}.training")


def _check_variants(params: Params) -> Iterator[str]:
    """Yield a sentence if a variant's own training params do not fit the shared ones, or if it cannot run with them."""
    for name in params.variants:
        try:
            params.training_of(name)
        except ValidationError as error:
            errors = [
                each for each in error.errors() if not each["loc"]
            ]  # of values, `_check_own_training` tells
            yield from messages.describe(errors, Training, prefix=f"variants.{name}.training")
            continue
        if name in params.trained_variants:  # others may be defined beside those that run
            yield from _check_adapter(params, name)
            yield from _check_sharding(params, name)
            yield from _check_dropout(params, name)


def _check_adapter(params: Params, name: str) -> Iterator[str]:
    """Yield a sentence if a variant's adapter cannot begin or learn as its training params say."""
    variant, training = params.variants[name], params.training_of(name)
    method = methods.get(variant.method)
    for key, (value, plain) in _of_an_adapter(training).items():
        if value != plain and not method.leaves_adapter:
            yield (
                f"variants.{name}.method is {method.name}, which has no adapter, and its {key} {_yaml(value)}; "
                f"set {key} to {_yaml(plain)} in its training"
            )
    initialization = initializations.get(training.initialization)
    is_quantized = precisions.get(variant.precision).is_quantized
    if not (initialization.on_quantized if is_quantized else initialization.on_unquantized):
        others = [entry.name for entry in initializations.TABLE.values()
                  if (entry.on_quantized if is_quantized else entry.on_unquantized)]  # fmt: skip
        yield (
            f"variants.{name}.precision is {variant.precision} and its initialization {initialization.name}, "
            f"{initialization.refusal}; such a base allows {' or '.join(others)}"
        )


def _of_an_adapter(training: Training) -> dict[str, tuple[object, object]]:
    """What changes how an adapter begins or learns: by key, its value and that of a plain one."""
    return {
        "initialization": (training.initialization, "default"),
        "rank_stabilized": (training.rank_stabilized, False),
        "b_rate_factor": (training.b_rate_factor, 1.0),
    }


def _yaml(value: object) -> str:
    """A value as params.yaml writes it."""
    return json.dumps(value) if isinstance(value, bool) else str(value)


def _check_sharding(params: Params, name: str) -> Iterator[str]:
    """Yield a sentence if a variant's training cannot be spread over so many processes."""
    variant, training = params.variants[name], params.training_of(name)
    together = training.micro_batch_rows * variant.processes
    if variant.processes > 1 and training.batch_rows % together:
        yield (
            f"variants.{name}.processes is {variant.processes}: batch_rows ({training.batch_rows}) must be a multiple of "
            f"micro_batch_rows x processes ({together})"
        )
    if variant.processes > 1:
        for reason in why_not_shared(variant, training):
            yield f"variants.{name}.processes is {variant.processes} and {reason}"


def why_not_shared(variant: Variant, training: Training) -> Iterator[str]:
    """Yield, as a clause, each reason for which no processes can share a training, however they deal out its rows."""
    if variant.why_not_shared:
        yield variant.why_not_shared
    for key, (value, plain) in _of_an_adapter(training).items():
        if value != plain and key != "rank_stabilized":
            yield (
                f"its {key} {_yaml(value)}, which was not tried in a sharded training; a sharded one has {key} "
                f"{_yaml(plain)}"
            )
    if training.optimizer.startswith("paged_"):
        yield (
            f"its optimizer {training.optimizer}, which cannot update a part of a weight; use adamw_torch or "
            "adamw_torch_fused"
        )


def _check_dropout(params: Params, name: str) -> Iterator[str]:
    """Yield a sentence if an adapter is to drop inputs that it does not see alone."""
    method, dropout = params.variants[name].method, params.training_of(name).dropout
    if methods.get(method).through_quantizer and dropout:
        yield (
            f"variants.{name}.method is {method} and dropout {dropout}, which must be 0 here: base and adapter are one "
            "weight, so the adapter has no input of its own"
        )


def _check_chosen_rows(params: Params) -> Iterator[str]:
    """Yield a sentence if more rows are to be trained on than are drawn, or if a category is left out twice.

    How many training rows the sample has, the training finds.
    """
    sample = params.sample
    sentences = {}  # a shared key is told of once, and not for each variant
    for name in params.experiment.variants:
        try:
            own, training = params.variants[name].training, params.training_of(name)
        except (KeyError, ValidationError):
            continue  # of these the checks of variants tell
        rows, left_out = (
            f"variants.{name}.training.{key}" if key in own else f"training.schedule.{key}"
            for key in ("rows", "left_out_categories")
        )
        if training.rows and training.rows > sample.rows:
            sentences[rows] = f"{rows} is {training.rows}, and sample.rows draws only {sample.rows}"
        for category in training.left_out_categories:
            if category in sample.held_out_categories:
                sentences[left_out] = (
                    f"{left_out} names {category}, which sample.held_out_categories keeps from every variant"
                )
    yield from sentences.values()


def _check_candidates(params: Params) -> Iterator[str]:
    """Yield a sentence for each candidate that cannot be trained, or that says nothing beside the others."""
    candidates = params.tuning.candidates
    for name, candidate in candidates.items():
        variant, key = candidate.variant, f"tuning.candidates.{name}"
        if variant not in params.variants:
            yield (
                f"{key}.variant is {variant}, which variants does not define; it defines {', '.join(params.variants)}"
                f"{suggestion(variant, params.variants)}"
            )
            continue
        if (processes := params.variants[variant].processes) > 1:
            yield (
                f"{key}.variant is {variant}, whose processes is {processes}, and a candidate is trained in one: try the "
                f"rates of an unsharded variant, whose name {variant} can then have as its learning_rate"
            )
        own = params.tuning.of(variant)
        first, *others = (n for n, other in own.items() if other.learning_rate == candidate.learning_rate)
        if name in others:
            yield f"{key} has the variant and the learning_rate ({candidate.learning_rate}) of {first}"
        if len(own) == 1:
            yield f"{key} is the only candidate of {variant}; a choice takes two at least"


def _check_tuning_seeds(params: Params) -> Iterator[str]:
    """Yield a sentence if candidates have no seed, one of them twice, or one that a compared run has."""
    seeds = params.tuning.seeds
    if params.tuning.candidates and not seeds:
        yield "tuning.seeds is [], and tuning.candidates is not empty: each is trained with one seed at least"
    if twice := [seed for seed in seeds if seeds.count(seed) > 1]:
        yield f"tuning.seeds names {twice[0]} more than once"
    if shared := [seed for seed in seeds if seed in params.experiment.seeds]:
        yield (
            f"tuning.seeds names {shared[0]}, and experiment.seeds does too; no seed may be in both, so that no choice "
            "rests on a run that is compared"
        )


def _check_rates(params: Params) -> Iterator[str]:
    """Yield a sentence if a learning rate is to be the one that was chosen for a variant without candidates."""
    rates = {"training.schedule.learning_rate": params.training.learning_rate}
    for name, variant in params.variants.items():
        rates[f"variants.{name}.training.learning_rate"] = variant.training.get("learning_rate")
    tuned = list(dict.fromkeys(candidate.variant for candidate in params.tuning.candidates.values()))
    for key, rate in rates.items():
        if isinstance(rate, str) and rate not in tuned:
            named = (
                f"a variant that tuning.candidates has rates for: {', '.join(tuned)}{suggestion(rate, tuned)}"
            )
            yield (
                f"{key} is {json.dumps(rate)}, which must be a number or "
                + (named if tuned else "a variant that has tuning.candidates, and there are none")
            )


def _check_own_tasks(params: Params) -> Iterator[str]:
    """Yield a sentence if a task is to score, or to show, more test rows than the test split is asked for."""
    rows = params.sample.test_rows
    for name in OWN_TASKS:
        task = params.evaluation.tasks.get(name)
        if task and (task.items or 0) > rows:
            yield (
                f"evaluation.tasks.{name}.items is {task.items}, and sample.test_rows only {rows}; null is for all"
            )
        if task and (task.few_shot or 0) >= rows:
            yield (
                f"evaluation.tasks.{name}.few_shot is {task.few_shot}, which must be below sample.test_rows ({rows})"
            )


def _check_divergence(params: Params) -> Iterator[str]:
    """Yield a sentence if predictions are to be compared on rows of holdout_loss, which is not scored."""
    items = params.evaluation.divergence_items
    if items is None or "holdout_loss" in params.evaluation.tasks:
        return
    if close := _misspelled_task(params, "holdout_loss"):
        yield f"evaluation.tasks names {close}, and there is holdout_loss; one of the two is misspelled"
    else:
        yield (
            f"evaluation.divergence_items is {items}, and evaluation.tasks has no holdout_loss, whose rows they are; "
            "null is for none"
        )


def _check_comparison(params: Params) -> Iterator[str]:
    """Yield a sentence if the comparison names a task or metric that is not evaluated."""
    comparison = params.comparison
    named = [("primary", comparison.primary), *(("margins", m) for m in comparison.margins)]
    for key, metric in [*named, *(("family.metrics", metric) for metric in comparison.family.metrics)]:
        task, _, name = metric.partition("/")
        if task not in params.evaluation.tasks:
            yield _missing_task(params, key, metric, task)
        if name not in OWN_METRICS.get(task, [name]):
            yield (
                f"comparison.{key} names {metric}, and {task} has only {', '.join(OWN_METRICS[task])}"
                f"{suggestion(name, OWN_METRICS[task])}"
            )


def _check_repairs(params: Params) -> Iterator[str]:
    """Yield a sentence if a repair names a variant or form that is not evaluated."""
    for name, repair in params.comparison.repairs.items():
        for key in ("faulty", "repaired"):
            served = getattr(repair, key)
            variant, form = variant_and_form(served)
            forms = params.forms_of(variant) if variant in params.variants else []
            if variant not in params.experiment.variants or form not in forms:
                yield (
                    f"comparison.repairs.{name}.{key} is {served}, which is not evaluated: "
                    "experiment.variants and evaluation.forms decide what is"
                    f"{suggestion(served, _served(params))}"
                )


def _missing_task(params: Params, key: str, metric: str, task: str) -> str:
    """The sentence of a metric whose task is not evaluated: the misspelled one of the two names comes first."""
    tasks = params.evaluation.tasks
    ours = f"there is {task}" if task in OWN_TASKS else f"comparison.{key} names {metric}"
    if close := _misspelled_task(params, task):
        return f"evaluation.tasks names {close}, and {ours}; one of the two is misspelled"
    known = ", ".join(tasks)
    return f"comparison.{key} names {metric}, and evaluation.tasks has only {known}{suggestion(task, tasks)}"


def _misspelled_task(params: Params, task: str) -> str | None:
    """The evaluated task whose name is probably a misspelled `task`; None if there is none.

    Of two like names, the one that nothing else has is the slip: of our own tasks this is known for sure.
    """
    used = {params.comparison.primary, *params.comparison.margins, *params.comparison.family.metrics}
    known = {*OWN_TASKS, *(metric.partition("/")[0] for metric in used)}
    strange = [name for name in params.evaluation.tasks if name not in known]
    return next(iter(get_close_matches(task, strange, n=1, cutoff=0.8)), None)


def _served(params: Params) -> list[str]:
    """Every variant, and every variant/form, that is evaluated."""
    names = [name for name in params.experiment.variants if name in params.variants]
    return [*names, *(f"{name}/{form}" for name in names for form in params.forms_of(name))]


# Each check with the keys that it reads: one whose keys are sound is made even if others are not.
CHECKS: dict[Callable[[Params], Iterator[str]], str] = {
    _check_experiment: "experiment variants",
    _check_measured: "benchmark.variants experiment variants",
    _check_device: "experiment.variants hardware.device tuning.candidates variants",
    _check_candidates: "tuning.candidates variants",
    _check_tuning_seeds: "experiment.seeds tuning",
    _check_rates: "training tuning.candidates variants",
    _check_sample: "sample.per_seed sample.rows sample.test_rows sample.validation_rows",
    _check_chosen_rows: "experiment.variants sample.rows sample.held_out_categories training tuning.candidates "
    "variants",
    _check_own_tasks: "evaluation.tasks sample.test_rows",
    _check_comparison: "comparison.primary comparison.margins comparison.family evaluation.tasks",
    _check_divergence: "comparison.primary comparison.margins comparison.family evaluation.tasks "
    "evaluation.divergence_items",
    _check_repairs: "comparison.repairs evaluation.forms experiment.variants variants",
    _check_conversations: "dataset evaluation.tasks",
    _check_own_training: "variants",
    _check_variants: "experiment.variants training tuning.candidates variants",
}
