"""Compare the runs in params: read the stages' results, and compute scores, differences, verdicts and claims."""

import pandas as pd

from workflow import params
from workflow.comparison import comparable
from workflow.comparison.claims import check_claims
from workflow.comparison.contrasts import decompose, take_contrasts
from workflow.comparison.costs import compare_costs
from workflow.comparison.divergences import measure_divergences
from workflow.comparison.model import Comparison
from workflow.comparison.records import RunRecord
from workflow.comparison.results import Results, left_out_of, measure_scores
from workflow.comparison.rises import find_rises
from workflow.comparison.shares import measure_shares
from workflow.comparison.weights import weigh_rows
from workflow.runtime.errors import UserError


def compare(settings: params.Params) -> tuple[Comparison, pd.DataFrame]:
    """Compare the runs in params, from the files of the earlier stages.

    Returns:
        The comparison, and every item's score: one row per item, metric, variant, seed and form.

    Raises:
        UserError: a run's file is missing, or a metric that params name was not measured.
        CheckError: the variants were not trained on the same rows for the same steps, or not scored on
            the same items, or not on one kind of device with one set of library versions; or a run's inputs differ
            from dvc.lock or params.yaml.
    """
    results = Results(settings)
    comparable.check_inputs(settings)
    experiment, comparison = settings.experiment, settings.comparison
    otherwise = check_alike(results, settings)
    _check_metrics(results, settings)
    rises = find_rises(results, settings)
    contrasts = take_contrasts(results, settings, rises)
    cost = compare_costs(results.benchmarks, experiment.baseline, confidence=comparison.confidence)
    return Comparison(
        baseline=experiment.baseline,
        seeds=list(experiment.seeds),
        confidence=comparison.confidence,
        power=comparison.power,
        resamples=comparison.resamples,
        primary=comparison.primary,
        margins=dict(comparison.margins),
        family=comparison.family.model_dump(),
        held_out_categories=list(settings.sample.held_out_categories),
        precisions={name: runs[0].precision.model_dump() for name, runs in results.trained.items()},
        training={
            name: [run.model_dump(exclude_unset=True) for run in runs]
            for name, runs in results.trained.items()
        },
        trained_otherwise=otherwise,
        scores=measure_scores(results),
        contrasts=contrasts,
        decomposition=decompose(contrasts, settings),
        claims=check_claims(contrasts, cost, results.benchmarks, results.grids, settings),
        cost=cost,
        rises=rises,
        shares=measure_shares(results, settings),
        divergences=measure_divergences(results, settings),
        row_weights=weigh_rows(results, settings),
        left_out_categories={
            name: sorted(left_out)
            for name in experiment.variants
            if (left_out := left_out_of(settings, name))
        },
    ), results.items


def check_alike(results: Results, settings: params.Params) -> dict[str, list[str]]:
    """Raise a CheckError if the arms differ in anything but params; see workflow/comparison/comparable.py."""
    otherwise = comparable.check_same_training(results.trained, settings)
    runs = [
        (f"{name} seed {seed}", f"train@{name}-{seed}", result)
        for name, trained in results.trained.items()
        for seed, result in zip(settings.experiment.seeds, trained, strict=True)
    ]
    comparable.check_same_surroundings("training", "trained", runs)
    measured = [(name, f"benchmark@{name}", result) for name, result in results.benchmarks.items()]
    if measured:
        comparable.check_same_surroundings("training", "measured", measured)
    for shape in settings.benchmark.grid.named_shapes:
        if grids := _grid_runs(results, shape):
            comparable.check_same_surroundings("training", "measured", grids)
    forms = [
        (f"{arm} seed {form.seed}" if form.seed is not None else str(arm), form)
        for arm, evaluations in results.evaluated.items()
        for form in evaluations
    ]
    comparable.check_same_items([(name, form.record.harness) for name, form in forms])
    comparable.check_same_surroundings(
        "evaluation", "scored", [(name, form.stage, form.record) for name, form in forms]
    )
    compared = [
        (
            f"{run.variant}/{form['form']} seed {run.seed}",
            run.stage,
            RunRecord.model_validate({**form, "versions": run.record["versions"]}),
        )
        for run in results.divergences
        for form in run.record["forms"]
    ]
    if compared:
        comparable.check_same_surroundings("evaluation", "compared", compared)
    return otherwise


def _grid_runs(results: Results, shape: str) -> list[tuple[str, str, RunRecord]]:
    """The name, the stage and the record of each variant's grid at a shape, of those that measured a point."""
    return [
        (
            f"{name} at {shape}",
            f"benchmark_grid@{name}-{shape}",
            RunRecord(precision=next(iter(grid.measured.values())).precision, versions=grid.versions),
        )
        for (name, measured_shape), grid in results.grids.items()
        if measured_shape == shape and grid.measured
    ]


def _check_metrics(results: Results, settings: params.Params) -> None:
    """Raise a UserError if params name a metric that has no value per item."""
    measured = results.metrics_per_item
    comparison = settings.comparison
    for key, names in (
        ("primary", [comparison.primary]),
        ("margins", comparison.margins),
        ("family.metrics", comparison.family.metrics),
    ):
        for name in names:
            if name not in measured:
                raise UserError(
                    f"comparison.{key} names {name}; the metrics that have a value per item are "
                    f"{', '.join(sorted(measured))}."
                )
