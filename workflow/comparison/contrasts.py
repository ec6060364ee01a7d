"""Compute every difference between arms, correct its p values for the other tests, and give it a verdict."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from workflow import params
from workflow.comparison.inference import (
    Bootstrap,
    Difference,
    Judgment,
    difference,
    equivalence,
    holm,
    paired_accuracy_test,
    verdict,
)
from workflow.comparison.model import ALL, CLAIMED_FORMS, Arm, Contrast, Part, Rise
from workflow.comparison.results import Metric, Results, left_out_of, subsets
from workflow.comparison.sentences import (
    OTHER_CATEGORIES,
    inequality_sentence,
    rise_sentence,
    sentence,
    weighting_sentence,
)
from workflow.runtime.errors import CheckError
from workflow.runtime.forms import AS_TRAINED, BASE, variant_and_form

SPANS = {"rouge_l": 1.0, "chrf": 100.0}  # from the worst to the best score of an item

FEWEST_GROUPS = 2  # that an interval needs
FEWEST_SEEDS = 4  # of a control: two halves of two

PARTS = {
    "base_to_base": "Quantizing the untouched base",
    "recovery": "Change of that difference by training",
    "to_baseline": "What is left after training",
    "form": "Serving it in another form",
}


@dataclass(frozen=True)
class PlannedContrast:
    """A contrast before it is computed: `arms` with their signs, the first of which is its subject."""

    kind: str
    arms: list[tuple[int, Arm]]
    other: str
    subject: str | None = None  # of the sentence, if it is not the first arm
    other_subject: str | None = None  # what the sentence compares it with, if it is not `other`
    name: str | None = None
    by_category: bool = False
    by_halves: bool = False  # of the seeds: the first half's scores minus the second's


@dataclass(frozen=True)
class MeasuredContrast:
    """A difference before its p values are corrected for the other tests."""

    contrast: PlannedContrast
    metric: Metric
    subset: str
    difference: Difference
    p_accuracy: float | None
    by_rows: Difference | None
    margin: float | None
    same_categories: bool  # whether its trained arms leave out the same categories

    @property
    def arm(self) -> Arm:
        return self.contrast.arms[0][1]

    def in_family(self, family: params.Family) -> bool:
        return (
            self.subset == ALL and self.contrast.kind in family.kinds and self.metric.name in family.metrics
        )

    def together(self, family: params.Family) -> tuple:
        """The key that differences corrected together share."""
        if self.in_family(family):
            return ()
        form = None if self.contrast.name else self.arm.form  # repairs are between any forms
        return self.contrast.kind, form, self.metric.name, self.subset.partition("/")[0]


@dataclass(frozen=True)
class JudgedContrast:
    """A difference with its judgment by tokens, and by rows if tokens weight the rows unequally."""

    measured: MeasuredContrast
    by_tokens: Judgment
    by_rows: Judgment | None


def planned_contrasts(settings: params.Params) -> list[PlannedContrast]:
    """List the differences to compute, in the order of the tables."""
    experiment = settings.experiment
    baseline = Arm(experiment.baseline, AS_TRAINED)
    baseline_base = Arm(experiment.baseline, BASE)
    contrasts = []
    for name in experiment.variants:
        base, trained = Arm(name, BASE), Arm(name, AS_TRAINED)
        forms = [Arm(name, form) for form in settings.forms_of(name)]
        if name != experiment.baseline:
            for arm in forms:
                contrasts.append(
                    PlannedContrast("to_baseline", [(1, arm), (-1, baseline)], str(baseline),
                           by_category=arm == trained)
                )  # fmt: skip
        contrasts += [
            PlannedContrast(
                "to_base", [(1, arm), (-1, base)], str(base), by_category=arm.form in CLAIMED_FORMS
            )
            for arm in forms
        ]
        if settings.variants[name].precision != settings.variants[experiment.baseline].precision:
            contrasts.append(
                PlannedContrast("base_to_base", [(1, base), (-1, baseline_base)], str(baseline_base))
            )
            four = [(1, trained), (-1, baseline), (-1, base), (1, baseline_base)]
            change = "the change by training of {}"
            contrasts.append(
                PlannedContrast(
                    "recovery", four, change.format(baseline.variant), subject=change.format(name)
                )
            )
        contrasts += [
            PlannedContrast("form", [(1, arm), (-1, trained)], str(trained))
            for arm in forms
            if arm != trained
        ]
    for repair, pair in settings.comparison.repairs.items():
        faulty, repaired = (Arm(*variant_and_form(served)) for served in (pair.faulty, pair.repaired))
        contrasts.append(PlannedContrast("repair", [(1, faulty), (-1, repaired)], str(repaired), name=repair))
    if len(experiment.seeds) >= FEWEST_SEEDS:
        contrasts.append(_control(baseline, sorted(experiment.seeds)))
    return contrasts


def _control(baseline: Arm, seeds: list[int]) -> PlannedContrast:
    """The baseline against itself with other seeds, which should not differ; an odd seed is left out."""
    half = len(seeds) // 2
    first, second = (
        f"seeds {', '.join(map(str, part[:-1]))} and {part[-1]}"
        for part in (seeds[:half], seeds[half : 2 * half])
    )
    return PlannedContrast(
        "control",
        [(1, baseline), (-1, baseline)],
        str(baseline),
        subject=f"{baseline} with {first}",
        other_subject=f"itself with {second}",
        name=f"{first} less {second}",
        by_halves=True,
    )


def take_contrasts(results: Results, settings: params.Params, rises: list[Rise]) -> list[Contrast]:
    """Compute every contrast in every metric that has a direction and a value per item."""
    comparison = settings.comparison
    metrics = {
        metric.name: metric
        for forms in results.evaluated.values()
        for metric in forms[0].metrics
        if metric.per_item and metric.higher_is_better is not None
    }
    measured = [
        difference_in_subset
        for contrast in planned_contrasts(settings)
        for metric in metrics.values()
        for difference_in_subset in _differences(results, contrast, metric, settings)
    ]
    families: dict[tuple, list[MeasuredContrast]] = {}
    for contrast in measured:
        families.setdefault(contrast.together(comparison.family), []).append(contrast)
    judged = {
        id(contrast.measured): contrast for family in families.values() for contrast in _judge_family(family)
    }
    return [
        _contrast(
            judged[id(contrast)],
            in_family=contrast.in_family(comparison.family),
            over=len(families[contrast.together(comparison.family)]),
            rises=rises,
        )
        for contrast in measured
    ]


def _judge_family(family: list[MeasuredContrast]) -> list[JudgedContrast]:
    """Judge the differences that are corrected together, by tokens and by rows."""
    by_tokens = _judge(family, [contrast.difference for contrast in family])
    weighted = [contrast for contrast in family if contrast.by_rows]
    judgments = _judge(weighted, [contrast.by_rows for contrast in weighted])
    by_rows = {id(contrast): judgment for contrast, judgment in zip(weighted, judgments, strict=True)}
    return [
        JudgedContrast(contrast, judgment, by_rows.get(id(contrast)))
        for contrast, judgment in zip(family, by_tokens, strict=True)
    ]


def _judge(family: list[MeasuredContrast], differences: list[Difference]) -> list[Judgment]:
    """Correct the p values of one family for each other, and give each difference its verdict."""
    pairs = list(zip(family, differences, strict=True))
    p_values = holm([max(d.p_value, contrast.p_accuracy or 0) for contrast, d in pairs])
    tests = [equivalence(d, margin=contrast.margin) if contrast.margin else None for contrast, d in pairs]
    corrected = iter(holm([test.p_value for test in tests if test]))
    judgments = []
    for (contrast, d), p_adjusted, test in zip(pairs, p_values, tests, strict=True):
        p_equivalence = next(corrected) if test else None
        word = verdict(
            d,
            p_adjusted=p_adjusted,
            p_equivalence=p_equivalence,
            higher_is_better=contrast.metric.higher_is_better,
        )
        judgments.append(Judgment(p_adjusted, test, p_equivalence, word))
    return judgments


def _contrast(judged: JudgedContrast, *, in_family: bool, over: int, rises: list[Rise]) -> Contrast:
    measured, judgment = judged.measured, judged.by_tokens
    contrast, metric, arm = measured.contrast, measured.metric, measured.arm
    text = sentence(
        contrast.subject or str(arm),
        contrast.other_subject or contrast.other,
        measured.difference,
        judgment,
        unit=metric.unit,
        higher_is_better=metric.higher_is_better,
        corrected=over > 1,
    )
    text = text[0].upper() + text[1:] if contrast.kind == "recovery" else text
    caveat = _caveat(judged, rises)
    return Contrast(
        kind=contrast.kind,
        name=contrast.name,
        variant=arm.variant,
        form=arm.form,
        other=contrast.other,
        task=metric.task,
        metric=metric.metric,
        unit=metric.unit,
        higher_is_better=metric.higher_is_better,
        subset=measured.subset,
        difference=measured.difference,
        p_accuracy=measured.p_accuracy,
        p_adjusted=judgment.p_adjusted,
        in_family=in_family,
        equivalence=judgment.equivalence,
        p_equivalence_adjusted=judgment.p_equivalence,
        verdict=judgment.verdict,
        sentence=f"{text} {caveat}" if caveat else text,
        corrected_over=over,
        by_rows=measured.by_rows,
        verdict_by_rows=judged.by_rows.verdict if judged.by_rows else None,
        caveat=caveat,
        warning=inequality_sentence(measured.difference),
    )


def _caveat(judged: JudgedContrast, rises: list[Rise]) -> str | None:
    """State that a verdict over all items rests on the last checkpoint, the categories learned from, or the weighting."""
    measured, by_rows = judged.measured, judged.by_rows
    if measured.subset != ALL:
        return None
    trained = [arm.variant for _, arm in measured.contrast.arms if arm.form != BASE]
    parts = [
        rise_sentence(rise)
        for rise in rises
        if rise.variant in trained
        and measured.contrast.kind not in ("form", "control")  # both arms are the same checkpoints
    ]
    if not measured.same_categories:
        parts.append(OTHER_CATEGORIES)
    if by_rows and by_rows.verdict != judged.by_tokens.verdict:
        parts.append(weighting_sentence(measured.by_rows, verdict=by_rows.verdict))
    return " ".join(parts) or None


def _differences(
    results: Results, contrast: PlannedContrast, metric: Metric, settings: params.Params
) -> Iterator[MeasuredContrast]:
    """Compute a contrast in one metric, over all items and, if planned, in each category.

    Raises:
        CheckError: the arms were not scored on the same items.
    """
    comparison = settings.comparison
    tables = [(sign, results.table(arm, metric.task, metric.metric)) for sign, arm in contrast.arms]
    first = tables[0][1]
    which = first.items.columns.drop("held_out")  # which can be another in each variant
    for _, table in tables:
        if (
            not table.items[which].equals(first.items[which])
            or (table.denominators != first.denominators).any()
        ):
            raise CheckError(
                f"{contrast.arms[0][1]} and {contrast.other} were not scored on the same items of {metric.task}"
            )
    if contrast.by_halves:
        half = len(first.seeds) // 2
        numerators = first.numerators[:half] - first.numerators[half : 2 * half]
    else:  # a base's one row counts for each seed
        numerators = sum(sign * table.numerators for sign, table in tables)
    groups = first.items["group"].to_numpy()
    accuracy = (
        all(np.isin(table.numerators, (0, 1)).all() for _, table in tables)
        and (first.denominators == 1).all()
    )
    span = span_of(
        np.concatenate([table.numerators for _, table in tables]), first.denominators, metric.metric
    )
    by_category = contrast.by_category and metric.name == comparison.primary
    trained = [arm.variant for _, arm in contrast.arms if arm.form != BASE]
    same_categories = len({frozenset(left_out_of(settings, name)) for name in trained}) <= 1
    for subset, chosen in subsets(first.items, by_category=by_category, by_held_out=same_categories):
        if len(set(groups[chosen])) < FEWEST_GROUPS:
            continue
        by_tokens = difference(
            numerators[:, chosen],
            first.denominators[chosen],
            groups[chosen],
            bootstrap(comparison),
            trained=any(table.seeds for _, table in tables),
            span=span and span * len(tables) / 2,
        )
        p_accuracy = None
        if accuracy and len(tables) == 2:
            p_accuracy = paired_accuracy_test(
                numerators[:, chosen], groups[chosen], resamples=comparison.resamples, seed=comparison.seed
            )
        by_rows = None
        if np.ptp(first.denominators[chosen]):
            by_rows = difference(
                (numerators / first.denominators)[:, chosen],
                np.ones(int(chosen.sum())),
                groups[chosen],
                bootstrap(comparison),
                trained=any(table.seeds for _, table in tables),
                span=span and span * len(tables) / 2,
            )
        yield MeasuredContrast(
            contrast=contrast,
            metric=metric,
            subset=subset,
            difference=by_tokens,
            p_accuracy=p_accuracy,
            by_rows=by_rows,
            margin=comparison.margins.get(metric.name),
            same_categories=same_categories,
        )


def bootstrap(settings: params.Comparison) -> Bootstrap:
    """The bootstrap settings of params."""
    return Bootstrap(settings.confidence, settings.power, settings.resamples, settings.seed)


def span_of(numerators: np.ndarray, denominators: np.ndarray, metric: str) -> float | None:
    """The largest possible distance between two scores of one item; None for a loss, which has no range.

    A count of right answers is a whole number of at most the denominator.
    """
    if (numerators % 1 == 0).all() and (numerators >= 0).all() and (numerators <= denominators).all():
        return 1.0
    if (denominators != 1).any():
        return None
    return SPANS.get(metric, float(np.ptp(numerators)))


def decompose(contrasts: list[Contrast], settings: params.Params) -> list[Part]:
    """Split each quantized variant's difference to the baseline; the first two parts add up to the third."""
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
        and (kind != "to_baseline" or c.form == AS_TRAINED)
        and settings.variants[c.variant].precision
        != settings.variants[settings.experiment.baseline].precision
    ]
