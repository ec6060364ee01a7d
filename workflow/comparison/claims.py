"""Check the claims of the recipe that this project grew out of, from the contrasts and the measured costs."""

from collections.abc import Iterator
from dataclasses import replace

from workflow import params, precisions
from workflow.comparison.inference import Verdict
from workflow.comparison.model import ALL, CLAIMED_FORMS, HELD_OUT, Arm, Claim, Contrast, Cost
from workflow.comparison.records import BenchmarkRecord
from workflow.runtime.forms import AS_TRAINED

# A gain in the primary metric must not make these metrics worse, if they are measured.
ANSWERS = (("holdout_generation", "ended"), ("holdout_generation", "rouge_l"))

MEASURED_ONCE = "measured once"


def check_claims(
    contrasts: list[Contrast],
    cost: list[Cost],
    benchmarks: dict[str, BenchmarkRecord],
    settings: params.Params,
) -> list[Claim]:
    """Check the claims of the recipe that this project grew out of, for every quantized variant."""
    primary = tuple(settings.comparison.primary.split("/"))
    by_key = {(c.kind, c.variant, c.form, (c.task, c.metric), c.subset): c for c in contrasts}
    required = [metric for metric in ANSWERS if metric != primary]

    def of(kind: str, arm: Arm, subset: str, metric: tuple[str, str] = primary) -> Contrast | None:
        return by_key.get((kind, arm.variant, arm.form, metric, subset))

    def answers(kind: str, arm: Arm) -> list[Contrast]:
        return [c for metric in required if (c := of(kind, arm, ALL, metric))]

    claims = []
    baseline = settings.experiment.baseline
    for variant in settings.experiment.variants:
        if variant == baseline or not precisions.get(settings.variants[variant].precision).is_quantized:
            continue
        arms = [Arm(variant, form) for form in CLAIMED_FORMS if form in settings.forms_of(variant)]
        better, no_loss = ("better",), ("equivalent", "better")
        claims += [
            *(
                _with_required(
                    _quality_claim(
                        "a",
                        "better than before tuning",
                        a,
                        of("to_base", a, ALL),
                        better,
                        answers("to_base", a),
                    ),
                    [metric for metric in required if not of("to_base", a, ALL, metric)],
                )
                for a in arms
            ),
            *_cost_claims(variant, cost, benchmarks, settings),
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
    """Check a claim about quality: the primary metric must support it, and the written answers must not get worse."""
    if contrast is None:
        why = "no category was held out of training, or too few of their items are in the test split"
        return Claim(
            claim, text, arm.variant, arm.form, None, None, None, "not tested", f"Not tested: {why}."
        )
    holds, explanation = _holds(contrast.verdict, holds_if), contrast.sentence
    if holds == "yes":
        holds, against = _with_answers(answers, undecided_counts=claim == "a")
        explanation = " ".join([explanation, *(f"But in {c.task}/{c.metric}: {c.sentence}" for c in against)])
    return Claim(
        claim=claim,
        text=text,
        variant=arm.variant,
        form=arm.form,
        metric=f"{contrast.task}/{contrast.metric}",
        difference=contrast.difference,
        verdict=contrast.verdict,
        holds=holds,
        sentence=explanation,
    )


def _with_required(claim: Claim, missing: list[tuple[str, str]]) -> Claim:
    """A claim of better answers with what its sentence lacks: it holds in part if its answers were not measured."""
    if claim.holds != "yes" or not missing:
        return claim
    names = " and ".join("/".join(metric) for metric in missing)
    verb = "were" if len(missing) > 1 else "was"
    text = f"{claim.sentence} But {names} {verb} not measured, so whether the answers got worse is not known."
    return replace(claim, holds="in part", sentence=text)


def _with_answers(answers: list[Contrast], *, undecided_counts: bool) -> tuple[str, list[Contrast]]:
    """Whether a claim that the primary metric supports also holds for the written answers, and which contradict it.

    Args:
        undecided_counts: whether answers that look worse, but are undecided, make the claim undecided.
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
    """Whether a claim that requires one of these verdicts holds."""
    if word in holds_if:
        return "yes"
    return "undecided" if word == "undecided" else "no"


def _cost_claims(
    variant: str, cost: list[Cost], benchmarks: dict[str, BenchmarkRecord], settings: params.Params
) -> Iterator[Claim]:
    """Compare peak memory and time per step, each measured in one process, as ratios.

    The steps of one process are not independent units, so nothing is tested. A GPU's allocator gives the same peak for
    the same steps, so its ratio decides. A resident set size and a time vary between processes and decide nothing.
    """
    baseline, far_less = settings.experiment.baseline, settings.comparison.claims.far_less
    measured = {(c.variant, c.metric): c for c in cost}
    counted = benchmarks[variant].precision.device == "cuda"
    for metric, text, quantity in (
        ("peak_memory", "far less memory than 16-bit", "the peak memory"),
        ("step_time", "far less compute than 16-bit", "the time per optimizer step"),
    ):
        ours, theirs = measured.get((variant, metric)), measured.get((baseline, metric))
        if ours is None or theirs is None:
            continue
        ratio, holds = ours.ratio_to_baseline, MEASURED_ONCE
        if metric == "peak_memory" and counted:
            holds = "yes" if ratio <= far_less else "no"
            why = (
                "PyTorch's allocator gives the same peak for the same steps, and far less is "
                f"{far_less:g} times or below"
            )
        else:
            why = "steps of one process say nothing of another, so this is no verdict"
        yield Claim(
            claim="b",
            text=text,
            variant=variant,
            form=AS_TRAINED,
            metric=f"benchmark/{metric}",
            difference=None,
            verdict=None,
            holds=holds,
            sentence=f"{variant} took {ratio:.2f} times {quantity} of {baseline} ({ours.value:.3g} against "
            f"{theirs.value:.3g} {ours.unit}), measured in one process each: {why}.",
        )


def compare_costs(benchmarks: dict[str, BenchmarkRecord], baseline: str) -> list[Cost]:
    """List every benchmarked cost with its ratio to the baseline's."""
    costs = []
    for variant, result in benchmarks.items():
        for measured in result.measurements:
            other = benchmarks[baseline].value_of(measured.metric)
            costs.append(
                Cost(variant=variant, **measured.model_dump(), ratio_to_baseline=measured.value / other)
            )
    return costs
