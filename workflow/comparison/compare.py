"""Bring the runs' results together: every score, every difference with its verdict, and the claims they test.

An *arm* is a variant in a serving form: `base` is the untouched base in the variant's precision, the others
are those of workflow/evaluation/forms.py. A *contrast* is a sum of arms with signs, taken per seed and item, so that
all differences are paired over both. Its kind says what it is between:

    to_baseline    a variant in a form, less the baseline as it was trained
    to_base        a variant in a form, less its untouched base: what training changed
    base_to_base   the untouched base in a variant's precision, less that in the baseline's: quantization's damage
    recovery       to_baseline less base_to_base: how much of that damage training on it changed
    form           a variant in another form, less as it was trained: what serving it so changed
    repair         a variant with a fault, less the one without it (params name the pairs)

and its subset, of which items it is: `all`, `category/NAME`, `held_out` (the categories that no run was
trained on) or `seen` (the others).

Every p value is corrected: those of the family that params name together, and any other over the differences of
its own kind, form, metric and kind of subset, which are those of the other variants (and categories).
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from workflow import params
from workflow.comparison import comparable
from workflow.comparison.inference import (
    Difference,
    Equivalence,
    Verdict,
    difference,
    equivalence,
    holm,
    paired_accuracy_test,
    sentence,
    verdict,
    weighting_sentence,
)
from workflow.runtime.errors import CheckError, UserError
from workflow.runtime.files import read_json
from workflow.runtime.paths import benchmark_file, evaluate_base_folder, evaluate_folder, train_folder

ALL, HELD_OUT, SEEN = "all", "held_out", "seen"
SPANS = {"rouge_l": 1.0, "chrf": 100.0}  # from the worst to the best score of an item
FEWEST_GROUPS = 2  # an interval needs two
# The recipe published the second of these, and looked at the first.
CLAIMED_FORMS = ("as_trained", "requantized")
# What a gain in the primary metric must not be paid with, where it is measured.
ANSWERS = (("holdout_generation", "ended"), ("holdout_generation", "rouge_l"))
MEASURED_ONCE = "measured once"
LESS_MEMORY = 0.99  # times the baseline's peak; nearer to it is as much
SMALLEST_RISE = 0.005  # of the best validation loss; less is no rise that one would stop a training for


@dataclass(frozen=True)
class Arm:
    """A variant in a serving form; `base` is its untouched base."""

    variant: str
    form: str

    def __str__(self) -> str:
        return f"{self.variant}/{self.form}"


@dataclass(frozen=True)
class Score:
    """One metric of one arm, over its seeds."""

    variant: str
    form: str
    task: str
    metric: str
    unit: str
    higher_is_better: bool | None
    split: str
    subset: str
    items: int
    groups: int | None  # None where the metric has no value per item
    value: float
    per_seed: dict[str, float]  # empty for an untouched base


@dataclass(frozen=True)
class Contrast:
    """A difference between arms in one metric, with its uncertainty, its tests and its verdict."""

    kind: str
    name: str | None  # of a repair
    variant: str
    form: str
    other: str  # what is taken off: variant/form
    task: str
    metric: str
    unit: str
    higher_is_better: bool
    subset: str
    difference: Difference
    p_accuracy: float | None  # of the paired test of accuracies; then p_value is the larger of the two
    p_adjusted: float  # by Holm's correction, over `corrected_over` differences
    in_family: bool
    equivalence: Equivalence | None  # None without a margin
    p_equivalence_adjusted: float | None
    verdict: Verdict
    sentence: str
    corrected_over: int = 1
    by_rows: Difference | None = (
        None  # with every item weighing the same; of the primary metric over all items
    )
    verdict_by_rows: Verdict | None = None
    caveat: str | None = None  # what the verdict rests on; it ends the sentence too


@dataclass(frozen=True)
class Rise:
    """A variant whose validation loss rose again before its training ended, on the same rows all along."""

    variant: str
    best_step: int
    last_step: int
    best: float  # nats per token, mean over the seeds
    last: float
    low: float | None  # interval of last less best over the seeds; None with one seed
    high: float | None
    ahead_until: (
        int | None
    )  # the last step at which its loss was below the baseline's; None if at none, or at the end


@dataclass(frozen=True)
class Part:
    """One row of the decomposition of a quantized variant's difference to the baseline."""

    variant: str
    task: str
    metric: str
    part: str
    kind: str
    form: str
    value: float
    low: float
    high: float
    verdict: Verdict


@dataclass(frozen=True)
class Cost:
    """One measured cost of one variant, and its ratio to the baseline's."""

    variant: str
    metric: str
    unit: str
    higher_is_better: bool
    definition: str
    value: float
    low: float | None  # quartiles over the steps of one process: how even they were, and no interval
    high: float | None
    ratio_to_baseline: float


@dataclass(frozen=True)
class Claim:
    """One claim of the recipe that this project grew out of, checked for one variant.

    `holds` is yes, no, mixed (the primary metric says yes, and the answers got worse), undecided, measured once (a
    cost without a second process to compare it with) or not tested; the verdict is that of the difference it rests on.
    """

    claim: str
    text: str
    variant: str
    form: str
    metric: str | None
    difference: Difference | None
    verdict: Verdict | None
    holds: str
    sentence: str


@dataclass(frozen=True)
class Comparison:
    baseline: str
    seeds: list[int]
    confidence: float
    power: float
    resamples: int
    primary: str
    margins: dict[str, float]
    family: dict
    held_out_categories: list[str]
    precisions: dict[str, dict]
    training: dict[str, list[dict]]
    trained_otherwise: dict[str, list[str]]  # by variant, its own params that make it learn from other rows
    scores: list[Score]
    contrasts: list[Contrast]
    decomposition: list[Part]
    claims: list[Claim]
    cost: list[Cost]
    rises: list[Rise] = field(default_factory=list)

    def as_dict(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class Table:
    """One arm's scores in one metric: [seeds, items] numerators (one row for a base), and what the items are."""

    numerators: np.ndarray
    denominators: np.ndarray
    items: pd.DataFrame  # leaf, item, category, held_out, group
    seeds: list[int]  # empty for a base


class Results:
    """Every file that the stages wrote about the runs of params."""

    def __init__(self, asked: params.Params):
        experiment = asked.experiment
        runs = [(name, seed) for name in experiment.variants for seed in experiment.seeds]
        self.trained = {
            name: [_result(train_folder(name, seed)) for seed in experiment.seeds]
            for name in experiment.variants
        }
        self.validation = {
            name: [
                pd.read_csv(_existing(train_folder(name, seed) / "validation.csv"))
                for seed in experiment.seeds
            ]
            for name in experiment.variants
        }
        self.benchmarks = {name: _result(benchmark_file(name).parent) for name in experiment.variants}
        folders = [
            *(evaluate_base_folder(name) for name in experiment.variants),
            *(evaluate_folder(*run) for run in runs),
        ]
        self.items = pd.concat(pd.read_parquet(_existing(folder / "items.parquet")) for folder in folders)
        self.evaluated: dict[Arm, list[dict]] = {}
        for folder in folders:
            result = _result(folder)
            for form in result["forms"]:
                arm = Arm(result["variant"], form["form"])
                stage = f"evaluate_base@{arm.variant}"
                if result["seed"] is not None:
                    stage = f"evaluate@{arm.variant}-{result['seed']}"
                about = {"seed": result["seed"], "versions": result["versions"], "stage": stage}
                self.evaluated.setdefault(arm, []).append({**form, **about})
        self._tables = {
            key: frame for key, frame in self.items.groupby(["variant", "form", "task", "metric"], sort=False)
        }

    def table(self, arm: Arm, task: str, metric: str) -> Table:
        """One arm's scores per seed and item.

        Raises:
            CheckError: it has no such scores, or its seeds were not scored on the same items.
        """
        frame = self._tables.get((arm.variant, arm.form, task, metric))
        if frame is None:
            raise CheckError(f"{arm} has no items with {task}/{metric}, which other arms have")
        return table_of(frame, arm)


def table_of(frame: pd.DataFrame, arm: Arm) -> Table:
    """One arm's rows of items.parquet in one metric, by seed and item.

    Raises:
        CheckError: its seeds were not scored on the same items.
    """
    about = ["leaf", "item", "category", "held_out", "group", "denominator"]
    seeds = sorted(frame["seed"].dropna().unique().tolist())
    parts = [frame[frame["seed"] == seed] for seed in seeds] or [frame]
    parts = [part.sort_values(["leaf", "item"], ignore_index=True) for part in parts]
    if any(not part[about].equals(parts[0][about]) for part in parts):
        raise CheckError(f"the seeds of {arm} were not scored on the same items of {frame['task'].iloc[0]}")
    return Table(
        numerators=np.stack([part["numerator"].to_numpy(float) for part in parts]),
        denominators=parts[0]["denominator"].to_numpy(float),
        items=parts[0][about[:-1]],
        seeds=seeds,
    )


def compare(asked: params.Params) -> tuple[Comparison, pd.DataFrame]:
    """Compare the runs that params name, from the files of the stages before.

    Returns:
        The comparison, and every item's score: one row per item, metric, variant, seed and form.

    Raises:
        UserError: a run's file is missing, or a metric that params name was not measured.
        CheckError: the variants were not trained on the same rows for the same steps, or not scored on
            the same items, or not on one kind of device with one set of library versions; or a run read something
            else than dvc.lock and params.yaml say.
    """
    results = Results(asked)
    comparable.check_inputs(asked)
    experiment, wanted = asked.experiment, asked.comparison
    otherwise = check_alike(results, asked)
    _check_metrics(results, asked)
    rises = _rises(results, asked)
    contrasts = _contrasts(results, asked, rises)
    cost = _cost(results.benchmarks, experiment.baseline)
    return Comparison(
        baseline=experiment.baseline,
        seeds=list(experiment.seeds),
        confidence=wanted.confidence,
        power=wanted.power,
        resamples=wanted.resamples,
        primary=wanted.primary,
        margins=dict(wanted.margins),
        family=wanted.family.model_dump(),
        held_out_categories=list(asked.sample.held_out_categories),
        precisions={name: trained[0]["precision"] for name, trained in results.trained.items()},
        training=results.trained,
        trained_otherwise=otherwise,
        scores=_scores(results),
        contrasts=contrasts,
        decomposition=_decomposition(contrasts, asked),
        claims=_claims(contrasts, cost, results.benchmarks, asked),
        cost=cost,
        rises=rises,
    ), results.items


def check_alike(results: Results, asked: params.Params) -> dict[str, list[str]]:
    """Raise a CheckError unless the arms differ in nothing but what params say; see workflow/comparison/comparable.py."""
    otherwise = comparable.check_same_training(results.trained, asked)
    runs = [
        (f"{name} seed {seed}", f"train@{name}-{seed}", result)
        for name, trained in results.trained.items()
        for seed, result in zip(asked.experiment.seeds, trained, strict=True)
    ]
    comparable.check_same_surroundings("training", "trained", runs)
    measured = [(name, f"benchmark@{name}", result) for name, result in results.benchmarks.items()]
    comparable.check_same_surroundings("training", "measured", measured)
    forms = [
        (f"{arm} seed {form['seed']}" if form["seed"] is not None else str(arm), form)
        for arm, found in results.evaluated.items()
        for form in found
    ]
    comparable.check_same_items(forms)
    comparable.check_same_surroundings(
        "evaluation", "scored", [(name, form["stage"], form) for name, form in forms]
    )
    return otherwise


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"{path} is missing; `dvc repro` makes it.")
    return path


def _result(folder: Path) -> dict:
    """What a stage recorded, but for what it read, which agreement.check_inputs holds against dvc.lock."""
    result = read_json(_existing(folder / "result.json"))
    result.pop("inputs", None)
    return result


def _check_metrics(results: Results, asked: params.Params) -> None:
    """Raise a UserError if params name a metric that no item of the evaluation has a value of."""
    measured = {f"{task}/{metric}" for _, _, task, metric in results._tables}
    wanted = asked.comparison
    for key, names in (
        ("primary", [wanted.primary]),
        ("margins", wanted.margins),
        ("family.metrics", wanted.family.metrics),
    ):
        for name in names:
            if name not in measured:
                raise UserError(
                    f"comparison.{key} names {name}; the metrics that have a value per item are "
                    f"{', '.join(sorted(measured))}."
                )


def _subsets(items: pd.DataFrame, *, by_category: bool) -> Iterator[tuple[str, np.ndarray]]:
    """The subsets of a task's items: all, each category, and held-out and seen categories where there are."""
    yield ALL, np.ones(len(items), bool)
    if not by_category:
        return
    held_out = items["held_out"].to_numpy(object) == True  # noqa: E712  (None where a task does not say)
    if held_out.any():
        yield HELD_OUT, held_out
        yield SEEN, ~held_out
    categories = items["category"]
    if categories.nunique() > 1:
        for name in sorted(categories.dropna().unique()):
            yield f"category/{name}", (categories == name).to_numpy()


def _scores(results: Results) -> list[Score]:
    """Every metric of every arm, over all items and by category."""
    found = []
    for arm, forms in results.evaluated.items():
        for about in forms[0]["metrics"]:
            common = {
                **{"variant": arm.variant, "form": arm.form},
                **{key: about[key] for key in ("task", "metric", "unit", "higher_is_better", "split")},
            }
            if not about["per_item"]:
                values = {str(form["seed"]): _value(form, about) for form in forms}
                trained = {} if arm.form == "base" else values
                mean = float(np.mean(list(values.values())))
                found.append(
                    Score(
                        **common, subset=ALL, items=about["items"], groups=None, value=mean, per_seed=trained
                    )
                )
                continue
            table = results.table(arm, about["task"], about["metric"])
            for subset, chosen in _subsets(table.items, by_category=True):
                sums = table.numerators[:, chosen].sum(axis=1) / table.denominators[chosen].sum()
                found.append(
                    Score(
                        **common,
                        subset=subset,
                        items=int(chosen.sum()),
                        groups=table.items["group"][chosen].nunique(),
                        value=float(sums.mean()),
                        per_seed={str(s): float(v) for s, v in zip(table.seeds, sums, strict=False)},
                    )
                )
    return found


def _value(form: dict, about: dict) -> float:
    key = (about["task"], about["metric"])
    return next(m["value"] for m in form["metrics"] if (m["task"], m["metric"]) == key)


@dataclass(frozen=True)
class _Asked:
    """A contrast before it is taken: `arms` with their signs, the first one being what it is about."""

    kind: str
    arms: list[tuple[int, Arm]]
    other: str
    subject: str | None = None  # what a sentence is about, where it is not the first arm
    name: str | None = None
    by_category: bool = False


def _asked_contrasts(asked: params.Params) -> list[_Asked]:
    """Which differences are taken, in the order in which they are listed."""
    experiment = asked.experiment
    baseline = Arm(experiment.baseline, "as_trained")
    baseline_base = Arm(experiment.baseline, "base")
    found = []
    for name in experiment.variants:
        base, trained = Arm(name, "base"), Arm(name, "as_trained")
        forms = [Arm(name, form) for form in asked.forms_of(name)]
        if name != experiment.baseline:
            for arm in forms:
                found.append(
                    _Asked("to_baseline", [(1, arm), (-1, baseline)], str(baseline),
                           by_category=arm == trained)
                )  # fmt: skip
        found += [
            _Asked("to_base", [(1, arm), (-1, base)], str(base), by_category=arm.form in CLAIMED_FORMS)
            for arm in forms
        ]
        if asked.variants[name].precision != asked.variants[experiment.baseline].precision:
            found.append(_Asked("base_to_base", [(1, base), (-1, baseline_base)], str(baseline_base)))
            four = [(1, trained), (-1, baseline), (-1, base), (1, baseline_base)]
            change = "the change by training of {}"
            found.append(
                _Asked("recovery", four, change.format(baseline.variant), subject=change.format(name))
            )
        found += [_Asked("form", [(1, arm), (-1, trained)], str(trained)) for arm in forms if arm != trained]
    for repair, pair in asked.comparison.repairs.items():
        faulty, repaired = (
            Arm(variant, form or "as_trained")
            for variant, _, form in (served.partition("/") for served in (pair.faulty, pair.repaired))
        )
        found.append(_Asked("repair", [(1, faulty), (-1, repaired)], str(repaired), name=repair))
    return found


@dataclass(frozen=True)
class _Taken:
    """A difference before it is corrected for the others that are taken beside it."""

    contrast: _Asked
    about: dict  # the metric
    subset: str
    difference: Difference
    p_accuracy: float | None
    by_rows: Difference | None
    margin: float | None

    @property
    def metric(self) -> str:
        return f"{self.about['task']}/{self.about['metric']}"

    @property
    def arm(self) -> Arm:
        return self.contrast.arms[0][1]

    def in_family(self, family: params.Family) -> bool:
        return self.subset == ALL and self.contrast.kind in family.kinds and self.metric in family.metrics

    def together(self, family: params.Family) -> tuple:
        """What the differences that are corrected together have in common."""
        if self.in_family(family):
            return ()
        form = None if self.contrast.name else self.arm.form  # repairs are between any forms
        return self.contrast.kind, form, self.metric, self.subset.partition("/")[0]


def _contrasts(results: Results, asked: params.Params, rises: list[Rise]) -> list[Contrast]:
    """Every contrast in every metric that has a direction and a value per item."""
    wanted = asked.comparison
    metrics = {
        (about["task"], about["metric"]): about
        for forms in results.evaluated.values()
        for about in forms[0]["metrics"]
        if about["per_item"] and about["higher_is_better"] is not None
    }
    taken = [
        _Taken(contrast, about, *found, wanted.margins.get("/".join(key)))
        for contrast in _asked_contrasts(asked)
        for key, about in metrics.items()
        for found in _differences(results, contrast, key, asked)
    ]
    families: dict[tuple, list[_Taken]] = {}
    for one in taken:
        families.setdefault(one.together(wanted.family), []).append(one)
    words = {id(one): found for family in families.values() for one, found in _judged(family)}
    return [
        _contrast(
            one,
            words[id(one)],
            in_family=one.in_family(wanted.family),
            over=len(families[one.together(wanted.family)]),
            rises=rises,
        )
        for one in taken
    ]


@dataclass(frozen=True)
class _Judged:
    """A difference's p values after the correction, and what follows from them."""

    p_adjusted: float
    equivalence: Equivalence | None
    p_equivalence: float | None
    verdict: Verdict
    by_rows: Verdict | None


def _judged(family: list[_Taken]) -> Iterator[tuple[_Taken, _Judged]]:
    """The verdicts of differences that are corrected together, by tokens and by rows each."""
    by_tokens = _verdicts(family, [one.difference for one in family])
    twins = [one for one in family if one.by_rows]
    by_rows = dict(zip(map(id, twins), _verdicts(twins, [one.by_rows for one in twins]), strict=True))
    for one, (p_adjusted, tost, p_equivalence, word) in zip(family, by_tokens, strict=True):
        twin = by_rows.get(id(one))
        yield one, _Judged(p_adjusted, tost, p_equivalence, word, twin and twin[-1])


def _verdicts(
    family: list[_Taken], differences: list[Difference]
) -> list[tuple[float, Equivalence | None, float | None, Verdict]]:
    """Of each, the corrected p value, the test of equivalence, its corrected p value and the verdict."""
    p_values = holm([max(d.p_value, one.p_accuracy or 0) for one, d in zip(family, differences, strict=True)])
    tests = [
        equivalence(d, margin=one.margin) if one.margin else None
        for one, d in zip(family, differences, strict=True)
    ]
    corrected = iter(holm([test.p_value for test in tests if test]))
    found = []
    for one, d, p_adjusted, test in zip(family, differences, p_values, tests, strict=True):
        p_equivalence = next(corrected) if test else None
        word = verdict(
            d,
            p_adjusted=p_adjusted,
            p_equivalence=p_equivalence,
            higher_is_better=one.about["higher_is_better"],
        )
        found.append((p_adjusted, test, p_equivalence, word))
    return found


def _contrast(one: _Taken, judged: _Judged, *, in_family: bool, over: int, rises: list[Rise]) -> Contrast:
    contrast, about, arm = one.contrast, one.about, one.arm
    text = sentence(
        contrast.subject or str(arm),
        contrast.other,
        one.difference,
        equivalence=judged.equivalence,
        verdict=judged.verdict,
        p_adjusted=judged.p_adjusted,
        unit=about["unit"],
        higher_is_better=about["higher_is_better"],
        corrected=over > 1,
    )
    text = text[0].upper() + text[1:] if contrast.subject else text
    caveat = _caveat(one, judged, rises)
    return Contrast(
        kind=contrast.kind,
        name=contrast.name,
        variant=arm.variant,
        form=arm.form,
        other=contrast.other,
        task=about["task"],
        metric=about["metric"],
        unit=about["unit"],
        higher_is_better=about["higher_is_better"],
        subset=one.subset,
        difference=one.difference,
        p_accuracy=one.p_accuracy,
        p_adjusted=judged.p_adjusted,
        in_family=in_family,
        equivalence=judged.equivalence,
        p_equivalence_adjusted=judged.p_equivalence,
        verdict=judged.verdict,
        sentence=f"{text} {caveat}" if caveat else text,
        corrected_over=over,
        by_rows=one.by_rows,
        verdict_by_rows=judged.by_rows,
        caveat=caveat,
    )


def _caveat(one: _Taken, judged: _Judged, rises: list[Rise]) -> str | None:
    """That a verdict over all items rests on the last checkpoint, or on how the items are weighted."""
    if one.subset != ALL:
        return None
    trained = [arm.variant for _, arm in one.contrast.arms if arm.form != "base"]
    parts = [
        rise_sentence(rise)
        for rise in rises
        if rise.variant in trained and one.contrast.kind != "form"  # its two arms are the same checkpoint
    ]
    if one.by_rows and judged.by_rows != judged.verdict:
        parts.append(weighting_sentence(one.by_rows, verdict=judged.by_rows))
    return " ".join(parts) or None


def rise_sentence(rise: Rise) -> str:
    """That a verdict rests on the last checkpoint of a variant, with step and size."""
    ahead = "" if rise.ahead_until is None else f", and ahead of the baseline until step {rise.ahead_until}"
    return (
        f"It rests on the last checkpoint (step {rise.last_step}): on the validation rows {rise.variant} was best at step "
        f"{rise.best_step}, by {rise.last - rise.best:.3f} nats per token{ahead}."
    )


def _rises(results: Results, asked: params.Params) -> list[Rise]:
    """The variants whose validation loss is higher at their end than before, by more than noise.

    Noise is what the interval over the seeds leaves of it, and a rise of less than SMALLEST_RISE of the loss.
    """
    losses = {
        name: pd.concat({i: run.set_index("step")["validation_loss"] for i, run in enumerate(runs)}, axis=1)
        for name, runs in results.validation.items()
    }
    baseline = losses[asked.experiment.baseline].mean(axis=1)
    found = []
    for name, by_seed in losses.items():
        mean = by_seed.mean(axis=1)
        best, last = mean.idxmin(), mean.index[-1]
        change = (by_seed.loc[last] - by_seed.loc[best]).to_numpy()
        low = high = None
        if len(change) > 1:
            quantile = stats.t.ppf((1 + asked.comparison.confidence) / 2, len(change) - 1)
            half = float(quantile * change.std(ddof=1) / len(change) ** 0.5)
            low, high = float(change.mean()) - half, float(change.mean()) + half
        if change.mean() < SMALLEST_RISE * mean[best] or (low is not None and low <= 0):
            continue
        shared = mean.index.intersection(baseline.index)
        ahead = [step for step in shared if step and mean[step] < baseline[step]]
        until = int(ahead[-1]) if ahead and ahead[-1] != last and name != asked.experiment.baseline else None
        found.append(Rise(name, int(best), int(last), float(mean[best]), float(mean[last]), low, high, until))
    return found


def _differences(
    results: Results, contrast: _Asked, key: tuple[str, str], asked: params.Params
) -> Iterator[tuple[str, Difference, float | None, Difference | None]]:
    """A contrast in one metric, over all items and, where it is asked for, in each category.

    Of each the subset, the difference, the p value of the paired test of accuracies and the difference with every
    item weighing the same.
    """
    wanted = asked.comparison
    tables = [(sign, results.table(arm, *key)) for sign, arm in contrast.arms]
    first = tables[0][1]
    for _, table in tables:
        if not table.items.equals(first.items) or (table.denominators != first.denominators).any():
            raise CheckError(
                f"{contrast.arms[0][1]} and {contrast.other} were not scored on the same items of {key[0]}"
            )
    numerators = sum(
        sign * table.numerators for sign, table in tables
    )  # a base's one row counts for each seed
    groups = first.items["group"].to_numpy()
    accuracy = (
        all(np.isin(table.numerators, (0, 1)).all() for _, table in tables)
        and (first.denominators == 1).all()
    )
    span = span_of(np.concatenate([table.numerators for _, table in tables]), first.denominators, key[1])
    by_category = contrast.by_category and "/".join(key) == wanted.primary
    for subset, chosen in _subsets(first.items, by_category=by_category):
        if len(set(groups[chosen])) < FEWEST_GROUPS:
            continue
        one = difference(
            numerators[:, chosen],
            first.denominators[chosen],
            groups[chosen],
            trained=any(table.seeds for _, table in tables),
            span=span and span * len(tables) / 2,
            **bootstrap(wanted),
        )
        p_accuracy = None
        if accuracy and len(tables) == 2:
            p_accuracy = paired_accuracy_test(
                numerators[:, chosen], groups[chosen], resamples=wanted.resamples, seed=wanted.seed
            )
        by_rows = None
        if subset == ALL and "/".join(key) == wanted.primary and np.ptp(first.denominators):
            by_rows = difference(
                numerators / first.denominators,
                np.ones(len(first.denominators)),
                groups,
                trained=any(table.seeds for _, table in tables),
                **bootstrap(wanted),
            )
        yield subset, one, p_accuracy, by_rows


def bootstrap(asked: params.Comparison) -> dict[str, float]:
    """What params say of every difference's interval and test, as `difference` takes it."""
    return asked.model_dump(include={"confidence", "power", "resamples", "seed"})


def span_of(numerators: np.ndarray, denominators: np.ndarray, metric: str) -> float | None:
    """How far two scores of one item can be apart; None for a loss, which has no range.

    Right answers are counted: whole numbers of at most the denominator.
    """
    if (numerators % 1 == 0).all() and (numerators >= 0).all() and (numerators <= denominators).all():
        return 1.0
    if (denominators != 1).any():
        return None
    return SPANS.get(metric, float(np.ptp(numerators)))


PARTS = {
    "base_to_base": "Quantizing the untouched base",
    "recovery": "Change of that difference by training",
    "to_baseline": "What is left after training",
    "form": "Serving it in another form",
}


def _decomposition(contrasts: list[Contrast], asked: params.Params) -> list[Part]:
    """Each quantized variant's difference to the baseline, split: the first two parts add up to the third."""
    return [
        Part(
            variant=c.variant,
            task=c.task,
            metric=c.metric,
            part=PARTS[c.kind],
            kind=c.kind,
            form=c.form,
            value=c.difference.value,
            low=c.difference.low,
            high=c.difference.high,
            verdict=c.verdict,
        )
        for kind in PARTS
        for c in contrasts
        if c.kind == kind
        and c.subset == ALL
        and (kind != "to_baseline" or c.form == "as_trained")
        and asked.variants[c.variant].precision != asked.variants[asked.experiment.baseline].precision
    ]


def _claims(
    contrasts: list[Contrast], cost: list[Cost], benchmarks: dict[str, dict], asked: params.Params
) -> list[Claim]:
    """The claims of the recipe that this project grew out of, for every quantized variant."""
    primary = tuple(asked.comparison.primary.split("/"))
    by_key = {(c.kind, c.variant, c.form, (c.task, c.metric), c.subset): c for c in contrasts}

    def of(kind: str, arm: Arm, subset: str, metric: tuple[str, str] = primary) -> Contrast | None:
        return by_key.get((kind, arm.variant, arm.form, metric, subset))

    def answers(kind: str, arm: Arm) -> list[Contrast]:
        return [c for metric in ANSWERS if metric != primary and (c := of(kind, arm, ALL, metric))]

    claims = []
    baseline = asked.experiment.baseline
    for variant in asked.experiment.variants:
        if variant == baseline or asked.variants[variant].precision == "16bit":
            continue
        arms = [Arm(variant, form) for form in CLAIMED_FORMS if form in asked.forms_of(variant)]
        better, no_loss = ("better",), ("equivalent", "better")
        claims += [
            *(
                _quality_claim(
                    "a", "better than before tuning", a, of("to_base", a, ALL), better, answers("to_base", a)
                )
                for a in arms
            ),
            *_cost_claims(variant, baseline, cost, benchmarks),
            *(
                _quality_claim(
                    "c",
                    "no quality lost to 4 bits",
                    a,
                    of("to_baseline", a, ALL),
                    no_loss,
                    answers("to_baseline", a),
                )
                for a in arms
            ),
            *(
                _quality_claim(
                    "d", "gains on categories not trained on", a, of("to_base", a, HELD_OUT), better, []
                )
                for a in arms
            ),
        ]
    return claims


def _quality_claim(
    claim: str,
    text: str,
    arm: Arm,
    contrast: Contrast | None,
    holds_if: tuple[Verdict, ...],
    answers: list[Contrast],
) -> Claim:
    """A claim about quality: that the primary metric says so, and that the written answers did not get worse for it."""
    if contrast is None:
        why = "no category was held out of training, or too few of their items are in the test split"
        return Claim(
            claim, text, arm.variant, arm.form, None, None, None, "not tested", f"Not tested: {why}."
        )
    holds, because = _holds(contrast.verdict, holds_if), contrast.sentence
    if holds == "yes":
        holds, against = _with_answers(answers, undecided_counts=claim == "a")
        because = " ".join([because, *(f"But in {c.task}/{c.metric}: {c.sentence}" for c in against)])
    return Claim(
        claim=claim,
        text=text,
        variant=arm.variant,
        form=arm.form,
        metric=f"{contrast.task}/{contrast.metric}",
        difference=contrast.difference,
        verdict=contrast.verdict,
        holds=holds,
        sentence=because,
    )


def _with_answers(answers: list[Contrast], *, undecided_counts: bool) -> tuple[str, list[Contrast]]:
    """Whether a claim that the primary metric bears out holds for the written answers too, and which speak against it.

    Args:
        undecided_counts: whether answers that look worse, without that being decided, leave the claim undecided.
    """
    worse = [c for c in answers if c.verdict == "worse"]
    if worse:
        return "mixed", worse
    leaning = [
        c
        for c in answers
        if c.verdict == "undecided" and c.difference.value * (1 if c.higher_is_better else -1) < 0
    ]
    return ("undecided", leaning) if leaning and undecided_counts else ("yes", [])


def _holds(word: Verdict, holds_if: tuple[Verdict, ...]) -> str:
    """Whether a claim holds that asks for one of these verdicts."""
    if word in holds_if:
        return "yes"
    return "undecided" if word == "undecided" else "no"


def _cost_claims(
    variant: str, baseline: str, cost: list[Cost], benchmarks: dict[str, dict]
) -> Iterator[Claim]:
    """Peak memory and time of a step as ratios of what one process each measured.

    Steps of one process are no independent units, so nothing is tested. A GPU's allocator gives the same peak for
    the same steps, so its ratio decides; a resident set and a time vary from one process to the next, and decide nothing.
    """
    measured = {(c.variant, c.metric): c for c in cost}
    counted = benchmarks[variant]["precision"]["device"] == "cuda"
    for metric, text, what in (
        ("peak_memory", "less memory than 16-bit", "the peak memory"),
        ("step_time", "less compute than 16-bit", "the time per optimizer step"),
    ):
        ours, theirs = measured.get((variant, metric)), measured.get((baseline, metric))
        if ours is None or theirs is None:
            continue
        ratio, holds = ours.ratio_to_baseline, MEASURED_ONCE
        if metric == "peak_memory" and counted:
            holds = "yes" if ratio < LESS_MEMORY else "no"
            why = "PyTorch's allocator gives the same peak for the same steps"
        else:
            why = "steps of one process say nothing of another, so this is no verdict"
        yield Claim(
            claim="b",
            text=text,
            variant=variant,
            form="as_trained",
            metric=f"benchmark/{metric}",
            difference=None,
            verdict=None,
            holds=holds,
            sentence=f"{variant} took {ratio:.2f} times {what} of {baseline} ({ours.value:.3g} against "
            f"{theirs.value:.3g} {ours.unit}), measured in one process each: {why}.",
        )


def _cost(benchmarks: dict[str, dict], baseline: str) -> list[Cost]:
    costs = []
    for variant, result in benchmarks.items():
        other = {m["metric"]: m["value"] for m in benchmarks[baseline]["measurements"]}
        for measured in result["measurements"]:
            costs.append(
                Cost(
                    variant=variant,
                    **measured,
                    ratio_to_baseline=measured["value"] / other[measured["metric"]],
                )
            )
    return costs


def headline(comparison: Comparison) -> dict:
    """The few numbers that `dvc metrics` shows, by variant."""
    task, metric = comparison.primary.split("/")
    key = f"{task}_{metric}"
    shown: dict[str, dict[str, float | str]] = {variant: {} for variant in comparison.precisions}
    for score in comparison.scores:
        if (score.task, score.metric, score.form, score.subset) == (task, metric, "as_trained", ALL):
            shown[score.variant][key] = round(score.value, 6)
    for contrast in comparison.contrasts:
        chosen = (contrast.kind, contrast.form, contrast.subset) == ("to_baseline", "as_trained", ALL)
        if chosen and (contrast.task, contrast.metric) == (task, metric):
            values = shown[contrast.variant]
            values[f"{key}_minus_{comparison.baseline}"] = round(contrast.difference.value, 6)
            values["verdict"] = contrast.verdict
    for cost in comparison.cost:
        if cost.metric in ("training_speed", "peak_memory"):
            shown[cost.variant][f"{cost.metric}_{cost.unit.replace(' ', '_').replace('/', '_per_')}"] = (
                cost.value
            )
    return shown


COUNTS = ("items", "groups", "seed", "seeds")  # whole numbers, of which some are missing


def tables(comparison: Comparison) -> dict[str, pd.DataFrame]:
    """The comparison as tidy tables, by the name of their file."""
    return {
        "summary": _summary(comparison),
        "contrasts": _contrasts_table(comparison.contrasts),
        "decomposition": pd.DataFrame(comparison.decomposition, columns=[f.name for f in fields(Part)]),
    }


def _summary(comparison: Comparison) -> pd.DataFrame:
    """Every score and cost as a tidy table: one row per variant, form, metric, subset and seed.

    Where `seed` is empty, the value is the mean over `seeds` seeds; 0 of an untouched base, empty of a cost.
    """
    rows = []
    for score in comparison.scores:
        common = asdict(score)
        per_seed = common.pop("per_seed")
        rows.append({**common, "seed": None, "seeds": len(per_seed)})
        rows += [
            {**common, "seed": int(seed), "seeds": 1, "value": value} for seed, value in per_seed.items()
        ]
    for cost in comparison.cost:
        rows.append(
            {
                "variant": cost.variant,
                "form": "training",
                "task": "benchmark",
                "metric": cost.metric,
                "unit": cost.unit,
                "higher_is_better": cost.higher_is_better,
                "split": "train",
                "subset": ALL,
                "value": cost.value,
            }
        )
    columns = ("variant", "form", "task", "metric", "unit", "higher_is_better", "split", "subset", "items", "groups",
               "value", "seed", "seeds")  # fmt: skip
    table = pd.DataFrame(rows, columns=list(columns))
    table = table.astype({**dict.fromkeys(COUNTS, "Int64"), "higher_is_better": "boolean"})
    for key in ("device_name", "storage", "compute"):
        table[key] = [comparison.precisions[variant][key] for variant in table["variant"]]
    return table


def _contrasts_table(contrasts: list[Contrast]) -> pd.DataFrame:
    """Every difference: one row per contrast, metric and subset."""
    nested = ("difference", "equivalence", "by_rows")
    own = [column.name for column in fields(Contrast) if column.name not in nested]
    parts = {
        "": [column.name for column in fields(Difference)],
        "by_rows_": ["value", "low", "high", "p_value"],
    }
    parts["equivalence_"] = [column.name for column in fields(Equivalence)]
    rows = []
    for contrast in contrasts:
        row = {name: getattr(contrast, name) for name in own} | asdict(contrast.difference)
        if contrast.by_rows:
            row |= {f"by_rows_{name}": getattr(contrast.by_rows, name) for name in parts["by_rows_"]}
        if contrast.equivalence:
            row |= {f"equivalence_{key}": value for key, value in asdict(contrast.equivalence).items()}
        rows.append(row)
    columns = own + [f"{prefix}{name}" for prefix, names in parts.items() for name in names]
    return pd.DataFrame(rows, columns=columns).astype(
        dict.fromkeys(("seeds", "items", "groups"), "Int64") | {"in_family": "bool"}
    )
