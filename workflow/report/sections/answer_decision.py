"""The answer's decision: what to train and how to serve it by the memory of a GPU, and what the run cannot say."""

from collections.abc import Callable
from dataclasses import dataclass

from markupsafe import Markup

from workflow.comparison.model import Contrast
from workflow.comparison.more_data import MoreData, more_data
from workflow.cost import memory
from workflow.report.decision import Candidate, Choice, choice_sentence, decide
from workflow.report.english import change, count, decimals_for, listed, served, unmeasured_sentence
from workflow.report.formatting import NARROW, decimals_of, number, quantity
from workflow.report.labels import model_name
from workflow.report.model import Facts, Variant
from workflow.report.names import shape_name
from workflow.report.scale import kept_in_words, kept_share, share_of_gain
from workflow.report.sections.answer_verdict import item_count, margin_with_unit, metric_in_sentence
from workflow.runtime.forms import AS_TRAINED, GGUF_FORMS, MERGED_16BIT, MERGED_DEQUANTIZED

BUDGETS = (8, 12, 16, 24, 48, 80)  # GB of 10^9 bytes, as GPUs are sold
SLOW = 0.5  # times the baseline's speed; what trains slower is not preferred to one of the same quality


@dataclass(frozen=True)
class Needs:
    """The GiB that a variant needs for training, and in a form for serving. None if it is not known."""

    training: float | None
    serving: float | None


@dataclass(frozen=True)
class Advice:
    """The choices for a model, and the conditions under which they hold."""

    heading: Markup
    sentences: list[tuple[str, Markup]]  # the budgets in GB, with spaces between, and what to do
    condition: Markup


@dataclass(frozen=True)
class OpenQuestions:
    """What the run cannot say: sentences, and a line for each variant if there are several."""

    sentences: list[Markup]
    lines: list[Markup]


@dataclass(frozen=True)
class Decision:
    """What can be decided, by model, and what the run cannot say.

    Attributes:
        models: the models' names, by the name of the data attribute of what they need.
        budgets: the GiB that can be used, by budget in GB and by model.
    """

    advices: list[Advice]
    serving: list[Markup]  # how to serve a quantized variant, where verdicts tell its forms apart
    open_questions: OpenQuestions
    models: dict[str, str]
    budgets: dict[int, dict[str, float]]

    def __bool__(self) -> bool:
        return bool(self.advices)


def decision(facts: Facts) -> Decision:
    """The advice for the run's own model, and for a larger one whose memory is predicted."""
    if facts.params.model.source == "random" or not facts.others:
        return Decision([], [], OpenQuestions([], []), {}, {})
    advices, models = [], {}
    if advice := _advice_for_this_model(facts):
        advices.append(advice)
        models["own"] = model_name(facts.params.model)
    if facts.planned and (advice := _advice_for_planned(facts)):
        advices.append(advice)
        models["planned"] = f"one of {_billions(facts)} parameters"
    limits = {name: usable(facts, is_predicted=name == "planned") for name in models}
    budgets = {budget: {name: limits[name][budget] for name in models} for budget in BUDGETS}
    return Decision(advices, _serving(facts), _open_questions(facts), models, budgets)


def own_needs(facts: Facts, variant: str, form: str) -> Needs:
    """The measured peak of a training, and the weights as they were served."""
    peak = facts.cost_of(variant, "peak_memory")
    fragments = 1.0 if facts.on_cpu else memory.FRAGMENTS
    return Needs(peak and peak.value * fragments, facts.weights_of(variant, form))


def planned_needs(facts: Facts, variant: str, form: str) -> Needs:
    """The predicted needs at the planned shape. GGUF files are not predicted."""
    planned = facts.planned
    if form in GGUF_FORMS:
        return Needs(planned.training[variant], None)
    in_16_bits = form in (MERGED_16BIT, MERGED_DEQUANTIZED)
    return Needs(planned.training[variant], planned.in_16_bits if in_16_bits else planned.weights[variant])


def usable(facts: Facts, *, is_predicted: bool) -> dict[int, float]:
    """The GiB that can be used, by budget in GB: on a GPU, what its driver leaves."""
    if facts.on_cpu and not is_predicted:
        return {budget: budget * 1e9 / memory.GIB for budget in BUDGETS}
    return {budget: memory.usable_gib(budget) for budget in BUDGETS}


def _candidates(facts: Facts, needs_of: Callable[[Facts, str, str], Needs]) -> list[Candidate]:
    candidates = []
    for variant in facts.variants:
        for form in facts.forms_of(variant.name):
            needs = needs_of(facts, variant.name, form)
            is_baseline = variant.is_baseline and form == AS_TRAINED
            contrast = None if is_baseline else facts.to_baseline(variant.name, form, facts.primary)
            if needs.training is None or needs.serving is None or not (contrast or is_baseline):
                continue
            candidates.append(_candidate(facts, variant, form, needs, contrast))
    return candidates


def _candidate(
    facts: Facts, variant: Variant, form: str, needs: Needs, contrast: Contrast | None
) -> Candidate:
    by_training = facts.contrast("to_base", variant.name, form, facts.primary)
    share = share_of_gain(facts, variant.name, form)
    speed = facts.cost_of(variant.name, "training_speed")
    kept, most_lost = Markup(), 0.0
    if contrast:
        kept = kept_in_words(facts, contrast)
        most_lost = -contrast.difference.low if contrast.higher_is_better else contrast.difference.high
    slow = speed is not None and speed.ratio_to_baseline < SLOW
    if slow:
        kept += Markup("; in this run it trained at {} the speed").format(
            facts.cite(f"{speed.ratio_to_baseline:.2f}×", speed, "ratio_to_baseline")
        )
    return Candidate(
        variant=variant.label,
        form=served(form),
        training_gib=needs.training,
        serving_gib=needs.serving,
        verdict=contrast and contrast.verdict,
        most_lost=most_lost,
        keeps_nothing=(by_training is not None and by_training.verdict in ("equivalent", "worse"))
        or (share is not None and share.high <= 0),
        slow=slow,
        kept=kept,
        trained_as=_training_settings(facts, variant),
        own_settings=len(facts.params.variants[variant.name].training),
    )


def _training_settings(facts: Facts, variant: Variant) -> str:
    """All that decides a variant's training, at the rate that its runs recorded: equal for those trained alike."""
    own = facts.params.variants[variant.name].model_dump_json(exclude={"training"})
    return f"{own} {facts.training_of(variant.name).model_dump_json()}"


def _sentences(facts: Facts, choices: list[Choice]) -> list[tuple[str, Markup]]:
    return [
        (
            " ".join(map(str, choice.budgets)),
            choice_sentence(
                choice, facts.baseline.label, quantity(choice.candidate.gib * memory.GIB / 1e9, "GB", 2)
            ),
        )
        for choice in choices
    ]


def _billions(facts: Facts) -> str:
    return quantity(facts.planned.parameters / 1e9, "billion", 2)


def _advice_for_this_model(facts: Facts) -> Advice | None:
    candidates = _candidates(facts, own_needs)
    if not candidates:
        return None
    choices = decide(candidates, usable(facts, is_predicted=False))
    score = facts.score(facts.baseline.name, AS_TRAINED, facts.primary)
    where = "the memory of this machine" if facts.on_cpu else "the memory of a GPU"
    return Advice(
        heading=Markup("{}, by {}").format(model_name(facts.params.model), where),
        sentences=_sentences(facts, choices),
        condition=Markup(
            "Memory: the peak of training, {} on {}; the served model must fit too.{} Quality: {} on {}, {}."
        ).format(
            "measured once" if facts.processes == 1 else f"the mean over {facts.processes:,} processes",
            listed(facts.devices),
            f" {left_out}" if (left_out := unmeasured_sentence(facts)) else "",
            metric_in_sentence(score),
            item_count(facts, score),
            count(len(facts.params.experiment.seeds), "seed"),
        ),
    )


def _advice_for_planned(facts: Facts) -> Advice | None:
    planned = facts.planned
    candidates = _candidates(facts, planned_needs)
    if not candidates:
        return None
    choices = decide(candidates, usable(facts, is_predicted=True))
    return Advice(
        heading=Markup("A model of {} parameters, by the memory of a GPU").format(_billions(facts)),
        sentences=_sentences(facts, choices),
        condition=Markup(
            "Memory is predicted for the shape of {} and a pass of {}; quality is that of {}, "
            "and a larger model may lose less."
        ).format(shape_name(planned.shape), count(planned.tokens, "token"), model_name(facts.params.model)),
    )


def _serving(facts: Facts) -> list[Markup]:
    """A sentence for each group of quantized variants with the same verdicts on their forms against as trained."""
    groups: dict[tuple[tuple[str, str], ...], list[Variant]] = {}
    for variant in facts.others:
        verdicts = tuple(
            (form, contrast.verdict)
            for form in facts.forms_of(variant.name)
            if (contrast := facts.contrast("form", variant.name, form, facts.primary))
        )
        if any(verdict in ("better", "worse") for _, verdict in verdicts):
            groups.setdefault(verdicts, []).append(variant)
    return [_serving_sentence(facts, dict(verdicts), variants) for verdicts, variants in groups.items()]


def _serving_sentence(facts: Facts, verdicts: dict[str, str], variants: list[Variant]) -> Markup:
    """How the forms of variants compare with as trained, with what the first of them keeps."""
    parts = [
        Markup("{} is <strong>{}</strong>{}").format(
            served(form), verdict, _kept_briefly(facts, variants[0], form)
        )
        for form, verdict in verdicts.items()
        if verdict in ("better", "worse")
    ]
    likewise = listed([variant.label for variant in variants[1:]]) if len(variants) > 1 else ""
    return Markup("How to serve {}: compared with as trained{}, {}.{}").format(
        variants[0].label,
        _kept_briefly(facts, variants[0], AS_TRAINED),
        Markup(", ").join(parts),
        f" The same holds for {likewise}." if likewise else "",
    )


def _kept_briefly(facts: Facts, variant: Variant, form: str) -> Markup:
    """The share of the gain in parentheses; empty if none is stated."""
    share = share_of_gain(facts, variant.name, form)
    return Markup(" ({} of the gain)").format(kept_share(facts, share)[0]) if share else Markup()


def _open_questions(facts: Facts) -> OpenQuestions:
    """What the run could not decide about the variants as trained, and what would let it."""
    undecided = [
        (variant, contrast)
        for variant in facts.others
        if (contrast := facts.to_baseline(variant.name, AS_TRAINED, facts.primary))
        and contrast.verdict == "undecided"
    ]
    if len(undecided) == 1:
        return OpenQuestions([open_question(facts, *undecided[0])], [])
    if not undecided:
        return OpenQuestions([], [])
    contrasts = [contrast for _, contrast in undecided]
    head = Markup(
        "Whether these lose anything against {} this run cannot say: neither a difference nor equivalence was shown. After each "
        "stands the smallest difference in {} that a test of its own finds with probability {}, and what would let it find {}."
    ).format(
        facts.baseline.label, contrasts[0].unit, f"{facts.compared.power:g}", _goal_of_all(facts, contrasts)
    )
    return OpenQuestions([head], [_open_line(facts, variant, contrast) for variant, contrast in undecided])


def _target(contrast: Contrast) -> float:
    """The difference that is to be found: the one that was measured or, if that is larger, the margin."""
    margin = contrast.equivalence.margin if contrast.equivalence else 0.0
    return max(abs(contrast.difference.value), margin)


def _goal_of_all(facts: Facts, contrasts: list[Contrast]) -> Markup:
    """The difference that is to be found, for several contrasts of one metric."""
    margin = margin_with_unit(facts, contrasts[0])
    if not margin:
        return Markup("one as large as it measured (no margin is set)")
    if all(_target(contrast) == contrast.equivalence.margin for contrast in contrasts):
        return Markup("one as small as the margin, {}").format(margin)
    return Markup("one as large as it measured, or as small as the margin, {}, where that is larger").format(
        margin
    )


def _open_line(facts: Facts, variant: Variant, contrast: Contrast) -> Markup:
    need = more_data(contrast.difference, _target(contrast), power=facts.compared.power)
    amount = facts.cite(_rounded(need.detectable), contrast, "difference", "detectable")
    if need.detectable <= need.target:
        difference = change(facts, contrast, decimals_for(facts, facts.primary))
        enough = Markup("small enough by itself; it measured {} ({} to {})").format(
            difference.value, difference.low, difference.high
        )
    else:
        ways = ", or ".join(_ways(contrast, need)) or "neither more seeds nor more test rows alone"
        enough = f"{ways} would do"
    return Markup("{}: {}, {}").format(variant.label, amount, enough)


def open_question(facts: Facts, variant: Variant, contrast: Contrast) -> Markup:
    """A sentence on what the run can see, and on how many seeds or test rows would decide.

    The target is the difference that was measured or, if that is larger, the margin.
    """
    need = more_data(contrast.difference, _target(contrast), power=facts.compared.power)
    amount = facts.cite(_rounded(need.detectable), contrast, "difference", "detectable")
    margin = margin_with_unit(facts, contrast)
    against = Markup("the margin is {}").format(margin) if margin else Markup("no margin is set")
    return Markup(
        "Whether {} loses anything against {} this run cannot say: it finds a difference of {}{}{} with "
        "probability {}, and {}. {}"
    ).format(
        variant.label,
        facts.baseline.label,
        amount,
        NARROW,
        contrast.unit,
        f"{facts.compared.power:g}",
        against,
        _way_out(contrast, need),
    )


def _way_out(contrast: Contrast, need: MoreData) -> Markup:
    if need.detectable <= need.target:
        return Markup(
            "By a test of its own that would be enough, but neither a difference nor equivalence was shown."
        )
    goal = (
        f"as large as the one it measured ({_rounded(need.target)})"
        if need.target == abs(contrast.difference.value)
        else "as small as the margin"
    )
    ways = _ways(contrast, need)
    if not ways:
        return Markup("To find one {}, neither more seeds nor more test rows alone would do.").format(goal)
    return Markup("To find one {}, {} would do.").format(goal, ", or ".join(ways))


def _ways(contrast: Contrast, need: MoreData) -> list[str]:
    """How many more seeds, and how many more test rows, would do alone; empty if neither would."""
    ways = []
    if need.seeds:
        ways.append(count(need.seeds - (contrast.difference.seeds or 1), "more seed"))
    if need.items:
        ways.append(count(need.items - contrast.difference.items, "more test row"))
    return ways


def _rounded(value: float) -> str:
    """A difference with two significant digits."""
    return number(value, decimals_of(-value, value))
