"""The figure of the answer: what each variant keeps in each serving form, beside the memory that its training takes."""

from dataclasses import dataclass

from matplotlib.ticker import MaxNLocator

from workflow.comparison.model import Contrast, Cost, Share
from workflow.report.dot_table import Axis, DotRow, dot_table
from workflow.report.drawing import STYLE, Panel, color_of, marker_of
from workflow.report.english import change, decimals_for, listed, quality_name, served
from workflow.report.figure_forms import fitting_labels
from workflow.report.formatting import NARROW, number, quantity, signed
from workflow.report.model import Facts, Variant
from workflow.report.scale import kept_share, share_of_gain
from workflow.report.sections.answer_decision import Needs, own_needs, planned_needs
from workflow.runtime.forms import AS_TRAINED

PEAK = "peak_memory"
LONGEST_ROW = 55  # characters of a label and the numbers of its row that have room in one line


@dataclass(frozen=True)
class _Arm:
    """A variant in a serving form. The baseline as trained has neither of the last two.

    Attributes:
        peak: of its training; None if no variant's was measured.
    """

    variant: Variant
    form: str
    peak: Cost | None
    contrast: Contrast | None
    share: Share | None

    @property
    def is_baseline(self) -> bool:
        return self.contrast is None


@dataclass(frozen=True)
class AnswerFigure:
    """A panel for each serving form, and what its axis shows.

    Attributes:
        of_gain: whether the axis is the share of the gain; else it is the difference in the metric's unit.
        has_margin: whether a band marks the margin of equivalence.
        has_memory: whether there is an axis of memory; else none was measured.
        left_out: the variants that have no row, as their memory was not measured, in words. Empty for none.
    """

    panels: list[Panel]
    of_gain: bool
    has_margin: bool
    has_memory: bool
    left_out: str


def answer_figure(facts: Facts) -> AnswerFigure | None:
    """A dot table for each serving form, on one scale. None if there is no difference."""
    arms = _arms(facts)
    contrasts = [arm.contrast for arm in arms if arm.contrast]
    if not contrasts or facts.params.model.source == "random":
        return None
    of_gain = all(arm.share for arm in arms if arm.contrast)
    quality = _quality_axis(facts, arms, of_gain=of_gain)
    peaks = [arm.peak.value for arm in arms if arm.peak]
    memory = _memory_axis(peaks) if peaks else None
    labels = _labels(facts, arms, of_gain=of_gain)
    forms = sorted({arm.form for arm in arms}, key=lambda form: (form != AS_TRAINED, form_order(facts, form)))
    panels = []
    for form in forms:
        members = [arm for arm in arms if arm.form == form]
        if memory:
            members.sort(key=lambda arm: arm.peak.value)
        rows = [_row(facts, arm, labels[arm.variant.name], of_gain=of_gain) for arm in members]
        title = f"Served {served(form)}"
        axis = _axis_in_words(facts, of_gain, has_memory=memory is not None)
        alt = " ".join([f"{title}: {axis}", *map(_row_in_words, members, rows)])
        svg = dot_table(f"answer-{form.replace('_', '-')}", rows, quality, memory, alt)
        panels.append(Panel(title, svg, kind="dots"))
    left_out = [v.label for v in facts.variants if memory and not facts.cost_of(v.name, PEAK)]
    return AnswerFigure(
        panels,
        of_gain,
        has_margin=contrasts[0].equivalence is not None,
        has_memory=memory is not None,
        left_out=listed(left_out) if left_out else "",
    )


def form_order(facts: Facts, form: str) -> int:
    """The place of a serving form, in the order of params."""
    forms = list(facts.params.evaluation.forms)
    return forms.index(form) if form in forms else len(forms)


def _arms(facts: Facts) -> list[_Arm]:
    """The arms of the variants whose peak was measured; of all variants if none was."""
    arms = []
    for variant in facts.variants:
        peak = facts.cost_of(variant.name, PEAK)
        for form in facts.forms_of(variant.name):
            is_baseline = variant.is_baseline and form == AS_TRAINED
            contrast = None if is_baseline else facts.to_baseline(variant.name, form, facts.primary)
            if (peak or not facts.benchmarks) and (contrast or is_baseline):
                arms.append(_Arm(variant, form, peak, contrast, share_of_gain(facts, variant.name, form)))
    return arms


def _interval(arm: _Arm, *, of_gain: bool) -> tuple[float, float, float]:
    """Low, value and high of an arm on the axis; those of the baseline are one point."""
    if of_gain:
        return (
            (100 * arm.share.low, 100 * arm.share.value, 100 * arm.share.high) if arm.share else (100.0,) * 3
        )
    difference = arm.contrast.difference if arm.contrast else None
    return (difference.low, difference.value, difference.high) if difference else (0.0,) * 3


def _quality_axis(facts: Facts, arms: list[_Arm], *, of_gain: bool) -> Axis:
    """The axis of quality, with worse on the left."""
    contrast = next(arm.contrast for arm in arms if arm.contrast)
    margin = contrast.equivalence.margin if contrast.equivalence else None
    reference, landmarks = 0.0, [0.0]
    if of_gain:
        gain = next(arm.share for arm in arms if arm.share).divisor.value
        margin = margin and 100 * margin / gain
        reference, landmarks = 100.0, [0.0, 100.0]
    ends = [end for arm in arms for end in _interval(arm, of_gain=of_gain)] + landmarks
    if margin:
        ends += [reference - margin, reference + margin]
    gap = 0.04 * (max(ends) - min(ends)) or 1.0
    low, high = min(ends) - gap, max(ends) + gap
    ticks = [
        tick
        for tick in MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
        if low <= tick <= high
    ]
    decimals = next((n for n in range(6) if all(abs(round(tick, n) - tick) < 1e-9 for tick in ticks)), 6)
    write = (lambda tick: f"{number(tick, 0)}{NARROW}%") if of_gain else (lambda tick: signed(tick, decimals))
    return Axis(
        low=low,
        high=high,
        ticks=[(tick, write(tick)) for tick in ticks],
        label=f"← worse\N{EM SPACE}{'share of the gain kept' if of_gain else contrast.unit}",
        is_reversed=not of_gain and not contrast.higher_is_better,
        reference=reference,
        band=(reference - margin, reference + margin) if margin else None,
    )


def _memory_axis(peaks: list[float]) -> Axis:
    highest = 1.06 * max(peaks)
    ticks = [
        tick
        for tick in MaxNLocator(3, steps=[1, 2, 2.5, 5, 10]).tick_values(0, highest)
        if 0 <= tick <= highest
    ]
    return Axis(0.0, highest, [(tick, f"{tick:g}") for tick in ticks], label="peak GiB →")


def _row(facts: Facts, arm: _Arm, label: str, *, of_gain: bool) -> DotRow:
    low, value, high = _interval(arm, of_gain=of_gain)
    return DotRow(
        label=label,
        text=_numbers(facts, arm, of_gain=of_gain),
        color=STYLE[color_of(arm.variant)],
        marker=marker_of(arm.variant),
        value=value,
        interval=None if arm.is_baseline else (low, high),
        memory=arm.peak and arm.peak.value,
        data=_data(facts, arm),
    )


def _numbers(facts: Facts, arm: _Arm, *, of_gain: bool) -> str:
    if arm.is_baseline:
        text = "baseline"
    elif of_gain:
        text = str(kept_share(facts, arm.share)[0])
    else:
        text = str(change(facts, arm.contrast, decimals_for(facts, facts.primary)).value)
    return f"{text} · {quantity(arm.peak.value, arm.peak.unit)}" if arm.peak else text


def _labels(facts: Facts, arms: list[_Arm], *, of_gain: bool) -> dict[str, str]:
    """The longest labels of the variants that have room beside the numbers of the rows."""
    room = LONGEST_ROW - max(len(_numbers(facts, arm, of_gain=of_gain)) for arm in arms)
    return fitting_labels(facts, room)


def _data(facts: Facts, arm: _Arm) -> dict[str, float]:
    """What the script compares with a budget: the GiB that the arm needs, by model."""
    needs = {"own": own_needs(facts, arm.variant.name, arm.form)}
    if facts.planned:
        needs["planned"] = planned_needs(facts, arm.variant.name, arm.form)
    return {name: gib for name, need in needs.items() if (gib := _total(need)) is not None}


def _total(needs: Needs) -> float | None:
    return None if None in (needs.training, needs.serving) else max(needs.training, needs.serving)


def _axis_in_words(facts: Facts, of_gain: bool, *, has_memory: bool) -> str:
    subject = "share of the gain kept" if of_gain else f"difference to {facts.baseline.label}, as trained"
    beside = ", beside the peak memory of training" if has_memory else ""
    return f"{subject} in {quality_name(facts.primary)}{beside}."


def _row_in_words(arm: _Arm, row: DotRow) -> str:
    verdict = f", {arm.contrast.verdict}" if arm.contrast else ""
    return f"{arm.variant.label}: {row.text.replace(' · ', ', ')}{verdict}."
