"""Check the claims of the recipe that this project grew out of, from the contrasts and the measured costs."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from workflow import params, precisions
from workflow.comparison.inference import Verdict
from workflow.comparison.model import ALL, CLAIMED_FORMS, HELD_OUT, Arm, Claim, Contrast, Cost, Interval
from workflow.comparison.records import BenchmarkRecord, GridRecord
from workflow.runtime.forms import AS_TRAINED

# A gain in the primary metric must not make these metrics worse, if they are measured.
ANSWERS = (("holdout_generation", "ended"), ("holdout_generation", "rouge_l"))

MEASURED_ONCE, MEASURED_TWICE = "measured once", "measured twice"


@dataclass(frozen=True)
class Quantity:
    """A cost of which less is claimed: its metric in the benchmark, the claim, and its name and unit in a sentence."""

    metric: str
    text: str
    name: str
    unit: str


@dataclass(frozen=True)
class Times:
    """A cost of a variant and of the baseline, with the interval of their ratio if there is one.

    Attributes:
        processes: that measured each, at least.
    """

    ours: float
    theirs: float
    interval: Interval | None
    processes: int


QUANTITIES = (
    Quantity("peak_memory", "far less memory than 16-bit", "the peak memory", "GiB"),
    Quantity("step_time", "far less compute than 16-bit", "the time per optimizer step", "s"),
)


def check_claims(
    contrasts: list[Contrast],
    cost: list[Cost],
    benchmarks: dict[str, BenchmarkRecord],
    grids: dict[tuple[str, str], GridRecord],
    settings: params.Params,
) -> list[Claim]:
    """Check the claims of the recipe that this project grew out of, for every quantized variant.

    Args:
        benchmarks: by variant, of those whose costs were measured.
        grids: by variant and named shape, of the same.
    """
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
            *_cost_claims(variant, cost, benchmarks, grids, settings),
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
    variant: str,
    cost: list[Cost],
    benchmarks: dict[str, BenchmarkRecord],
    grids: dict[tuple[str, str], GridRecord],
    settings: params.Params,
) -> Iterator[Claim]:
    """Compare peak memory and time per step with the baseline's, on the run's own rows and at the named shapes."""
    if variant not in benchmarks:
        yield from (_not_measured(variant, quantity) for quantity in QUANTITIES)
        return
    measured = {(c.variant, c.metric): c for c in cost}
    counted = benchmarks[variant].precision.device == "cuda"
    for quantity in QUANTITIES:
        ours = measured.get((variant, quantity.metric))
        theirs = measured.get((settings.experiment.baseline, quantity.metric))
        if ours and theirs:
            ends = None if ours.ratio_low is None else Interval(ours.ratio_low, ours.ratio_high)
            times = Times(ours.value, theirs.value, ends, min(ours.processes, theirs.processes))
            yield _cost_claim(variant, quantity, times, settings, counted=counted)
    for shape in dict.fromkeys(shape for _, shape in grids):
        yield from _shape_claims(
            grids[variant, shape], grids[settings.experiment.baseline, shape], shape, settings
        )


def _not_measured(variant: str, quantity: Quantity) -> Claim:
    """A claim of a variant whose costs were not measured."""
    return Claim(
        claim="b",
        text=quantity.text,
        variant=variant,
        form=AS_TRAINED,
        metric=f"benchmark/{quantity.metric}",
        difference=None,
        verdict=None,
        holds="not tested",
        sentence=f"Not tested: {quantity.name} of {variant} was not measured, as benchmark.variants leaves it out.",
    )


def _shape_claims(
    ours: GridRecord, theirs: GridRecord, shape: str, settings: params.Params
) -> Iterator[Claim]:
    """Compare costs at a named shape, at the largest pass that both have measured; without recomputation if both have.

    Nothing if they have no point in common.
    """
    common = ours.measured.keys() & theirs.measured.keys()
    if not common:
        return
    rows, length, recomputed = key = max(common, key=lambda key: (key[0] * key[1], not key[2], key))
    point, other = ours.measured[key], theirs.measured[key]
    vocabulary = f" and a vocabulary of {point.vocabulary:,}" if point.vocabulary else ""
    where = (
        f"At the shape {shape} with random weights{vocabulary}, {rows:,} {'row' if rows == 1 else 'rows'} of {length:,} tokens"
        f"{', with gradient checkpointing' if recomputed else ''}, on {point.precision.device_name}: "
    )
    for quantity, values in zip(
        QUANTITIES,
        ((point.peak_gib, other.peak_gib), (point.step_seconds["median"], other.step_seconds["median"])),
        strict=True,
    ):
        yield _cost_claim(
            ours.variant,
            quantity,
            Times(*values, None, 1),
            settings,
            counted=point.precision.device == "cuda",
            shape=shape,
            where=where,
        )


def _cost_claim(
    variant: str,
    quantity: Quantity,
    times: Times,
    settings: params.Params,
    *,
    counted: bool,
    shape: str | None = None,
    where: str = "",
) -> Claim:
    """Check whether a cost is far less than the baseline's.

    With an interval of the ratio, that decides. Without one nothing is tested, because the steps of one process are no
    independent units. But a GPU's allocator gives the same peak for the same steps, so the ratio of two such peaks decides.

    Args:
        counted: whether a GPU's allocator counted the memory.
        shape: of the model if it is not the run's own, which `where` describes.
    """
    baseline, far_less = settings.experiment.baseline, settings.comparison.claims.far_less
    ratio, ends = times.ours / times.theirs, times.interval
    at_most = f"far less is {far_less:g} times or below"
    interval = ""
    if ends:
        holds = "yes" if ends.high <= far_less else "no" if ends.low > far_less else "undecided"
        interval = f" ({settings.comparison.confidence:.0%} interval {ends.low:.3g} to {ends.high:.3g})"
        why = f"means over {times.processes} processes each, and {at_most}"
    elif quantity.metric == "peak_memory" and counted:
        holds = "yes" if ratio <= far_less else "no"
        measured_in = f"measured in {_processes(times.processes)} each"
        why = f"{measured_in}: PyTorch's allocator gives the same peak for the same steps, and {at_most}"
    elif times.processes == 1:
        holds = MEASURED_ONCE
        why = (
            "measured in one process each: steps of one process say nothing of another, so this is no verdict"
        )
    else:
        holds = MEASURED_TWICE
        why = "measured in two processes each: they are too few for an interval, so this is no verdict"
    return Claim(
        claim="b",
        text=quantity.text if shape is None else f"{quantity.text}, at {shape}",
        variant=variant,
        form=AS_TRAINED,
        metric=f"benchmark/{quantity.metric}"
        if shape is None
        else f"benchmark_grid/{shape}/{quantity.metric}",
        difference=None,
        verdict=None,
        holds=holds,
        sentence=f"{where}{variant} took {ratio:.2f} times{interval} {quantity.name} of {baseline} "
        f"({times.ours:.3g} against {times.theirs:.3g} {quantity.unit}), {why}.",
    )


def _processes(count: int) -> str:
    return "one process" if count == 1 else f"{count} processes"
