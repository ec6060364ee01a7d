"""Evidence: quality, memory and speed of all variants in one table, and a description of each variant."""

import math
from dataclasses import dataclass

from workflow import precisions
from workflow.comparison.model import Contrast
from workflow.comparison.records import PrecisionRecord
from workflow.data.gguf_cards import fallback_words
from workflow.report import drawing, english, formatting
from workflow.report.english import Change
from workflow.report.formatting import Number, number, ratio
from workflow.report.model import Facts, Variant
from workflow.report.scale import NATS
from workflow.report.sections.cost import cost_span
from workflow.report.sections.kept import Gain, Interval, gain
from workflow.runtime.forms import AS_TRAINED

EVIDENCE_COSTS = ("peak_memory", "training_speed", "step_time")


@dataclass(frozen=True)
class VariantRow:
    label: str
    short: str
    name: str
    is_baseline: bool
    color: str
    held_as: str
    computes_in: str
    quantized: str
    learning_rate: str
    trainable: str
    steps: str
    tokens_seen: str


@dataclass(frozen=True)
class FormRow:
    """A serving form, as it was found after loading."""

    label: str
    form: str
    held_as: str
    quantized: str
    adapters: str


@dataclass(frozen=True)
class EvidenceCell:
    """A number of the evidence table. `best` is set if the number is decidedly better than all other rows'."""

    number: Number
    note: str
    ratio: str | None
    best: bool


@dataclass(frozen=True)
class EvidenceRow:
    """A variant in a serving form. The costs of training are in the row of the run as trained only."""

    label: str
    short: str
    form: str
    color: str
    is_baseline: bool
    as_trained: bool
    quality: EvidenceCell | None
    change: Change | None
    notes: list[int]  # the numbers of the notes on what the difference rests on
    share: Interval | None  # of the gain; None if it is not stated
    perplexity: str  # times the baseline's; empty unless the metric is a loss in nats per token
    weights: EvidenceCell | None
    costs: list[EvidenceCell | None]


@dataclass(frozen=True)
class Evidence:
    """The table of all variants and serving forms.

    Attributes:
        gain: what the baseline's training gained; None if no shares of it were taken.
        notes: what differences rest on, each once.
        costs: (name, unit, direction) of the last columns.
    """

    rows: list[EvidenceRow]
    gain: Gain | None
    has_perplexity: bool
    notes: list[str]
    costs: list[tuple[str, str, str]]
    energy: str  # a sentence on the origin of the energy, or on why there is none


def evidence(facts: Facts) -> Evidence:
    """Quality, memory, time and energy of each variant and form, absolute and relative to the baseline."""
    decimals = english.decimals_for(facts, facts.primary)
    arms = [(variant, form) for variant in facts.variants for form in facts.forms_of(variant.name)]
    best = _decided_best(facts, arms)
    weights = {(v.name, form): facts.weights_of(v.name, form) for v, form in arms}
    lightest = min((gib for gib in weights.values() if gib is not None), default=None)
    metrics = [metric for metric in EVIDENCE_COSTS if metric in facts.cost_metrics]
    energy = facts.energy
    kept = gain(facts)
    rows, notes = [], []
    for variant, form in arms:
        score = facts.score(variant.name, form, facts.primary)
        contrast = facts.to_baseline(variant.name, form, facts.primary)
        served = facts.served_as(variant.name, form)
        costs = [_cost_cell(facts, variant, metric) if form == AS_TRAINED else None for metric in metrics]
        if energy:
            costs.append(_energy_cell(facts, variant) if form == AS_TRAINED else None)
        caveats = english.caveats_of(facts, contrast) if contrast else []
        notes += [caveat for caveat in caveats if caveat not in notes]
        rows.append(
            EvidenceRow(
                label=variant.label,
                short=variant.short,
                form=english.form_name(form),
                color=drawing.STYLE[drawing.color_of(variant)],
                is_baseline=variant.is_baseline and form == AS_TRAINED,
                as_trained=form == AS_TRAINED,
                quality=score
                and EvidenceCell(
                    facts.cite(number(score.value, decimals), score, "value"),
                    "",
                    None,
                    (variant.name, form) == best,
                ),
                change=contrast and english.change(facts, contrast, decimals),
                notes=[notes.index(caveat) + 1 for caveat in caveats],
                share=kept and kept.shares.get((variant.name, form)),
                perplexity=_perplexity(contrast),
                weights=served
                and EvidenceCell(
                    Number(
                        formatting.significant(served.precision.weights_gib),
                        served.precision.weights_gib,
                        f"{served.key}.weights_gib",
                    ),
                    "",
                    None,
                    weights[variant.name, form] == lightest and list(weights.values()).count(lightest) == 1,
                ),
                costs=costs,
            )
        )
    columns = []
    for metric in metrics:
        first = next(cost for v in facts.variants if (cost := facts.cost_of(v.name, metric)))
        columns.append((english.cost_name(metric), first.unit, english.direction(first.higher_is_better)))
    if energy:
        columns.append(("Energy", "J per 1,000 tokens", english.direction(False)))
    return Evidence(
        rows=rows,
        gain=kept,
        has_perplexity=any(row.perplexity for row in rows),
        notes=notes,
        costs=columns,
        energy=english.energy_sentence(facts),
    )


def _perplexity(contrast: Contrast | None) -> str:
    """How many times the baseline's perplexity an arm has: exp(difference) of a loss in nats per token."""
    if contrast is None or contrast.unit != NATS:
        return ""
    return number(math.exp(contrast.difference.value), 3)


def _decided_best(facts: Facts, arms: list[tuple[Variant, str]]) -> tuple[str, str] | None:
    """The arm whose interval of the difference to the baseline is entirely better than all others. None if there is none."""
    spans = {}
    for variant, form in arms:
        contrast = facts.to_baseline(variant.name, form, facts.primary)
        if contrast:
            sign = 1 if contrast.higher_is_better else -1
            spans[variant.name, form] = sorted(
                (sign * contrast.difference.low, sign * contrast.difference.high)
            )
        elif variant.is_baseline and form == AS_TRAINED:
            spans[variant.name, form] = [0.0, 0.0]
    for arm, (low, _) in spans.items():
        if len(spans) > 1 and all(low > high for other, (_, high) in spans.items() if other != arm):
            return arm
    return None


def _cost_cell(facts: Facts, variant: Variant, metric: str) -> EvidenceCell | None:
    """A cost. No cost is the best, because that is a word for quality, and one process gives no interval."""
    cost = facts.cost_of(variant.name, metric)
    if cost is None:
        return None
    return EvidenceCell(
        number=facts.cite(formatting.significant(cost.value), cost, "value"),
        note=cost_span(cost),
        ratio=None
        if variant.is_baseline
        else facts.cite(ratio(cost.ratio_to_baseline), cost, "ratio_to_baseline"),
        best=False,
    )


def _energy_cell(facts: Facts, variant: Variant) -> EvidenceCell | None:
    energy = facts.energy
    if variant.name not in energy:
        return None
    point, first = energy[variant.name], energy.get(facts.baseline.name)
    relative = None
    if first and not variant.is_baseline:
        relative = ratio(point.joules / first.joules)
    value = Number(formatting.significant(point.joules), point.joules, f"{point.key}.joules_per_1000_tokens")
    return EvidenceCell(value, "", relative, False)


def variant_rows(facts: Facts) -> list[VariantRow]:
    """A description of each variant: storage, compute type, quantized layers and training."""
    rows = []
    for variant in facts.variants:
        precision, trained = variant.precision, variant.trained[0]
        rows.append(
            VariantRow(
                label=variant.label,
                short=variant.short,
                name=variant.name,
                is_baseline=variant.is_baseline,
                color=drawing.STYLE[drawing.color_of(variant)],
                held_as=_held_as(precision),
                computes_in=precision.compute,
                quantized=f"{precision.quantized_modules:,} of {precision.linear_modules:,}",
                learning_rate=f"{facts.training_of(variant.name).learning_rate:g}",
                trainable=f"{trained.trainable_parameters:,} ({trained.trainable_dtype})",
                steps=english.listed(list(dict.fromkeys(f"{run.steps:,}" for run in variant.trained))),
                tokens_seen=english.listed(
                    list(dict.fromkeys(f"{run.tokens_seen:,}" for run in variant.trained))
                ),
            )
        )
    return rows


def _held_as(precision: PrecisionRecord) -> str:
    if not precisions.get(precision.base).is_quantized and precision.storage == "float32":
        return "float32 (rounded to 16 bits)"
    return precision.storage + (", double-quantized" if precision.double_quantization else "")


def file_words(gguf: dict | None) -> str:
    """How a GGUF file departs from its type, and how llama.cpp itself scores it, as sentences after its name."""
    if gguf is None:
        return ""
    agreement = gguf["agreement"]
    scored = agreement and (
        f"llama.cpp itself gives {agreement['rows']:,} rows of {english.TASKS[agreement['task']].lower()} "
        f"{agreement['llama_cpp']:.4f} nats per token, and transformers {agreement['transformers']:.4f} "
        f"(at most {agreement['tolerance']:g} apart)."
    )
    texts = [text.rstrip(".") for text in (fallback_words(gguf["fallbacks"]), scored) if text]
    return "".join(f". {text}" for text in texts) + ("." if texts else "")


def form_rows(facts: Facts) -> list[FormRow]:
    """The serving forms of all variants, by variant."""
    rows = []
    for variant in facts.variants:
        for served in facts.served:
            if served.variant == variant.name:
                precision = served.precision
                rows.append(
                    FormRow(
                        label=variant.label,
                        form=english.form_name(served.form),
                        held_as=_held_as(precision) + file_words(served.gguf),
                        quantized=f"{precision.quantized_modules:,} of {precision.linear_modules:,}",
                        adapters=f"{served.adapters:,} ({served.adapter_dtype})" if served.adapters else "0",
                    )
                )
    return rows


@dataclass(frozen=True)
class EvidenceSection:
    """The evidence table, and the tables of variants and serving forms."""

    table: Evidence
    variants: list[VariantRow]
    forms: list[FormRow]


def section(facts: Facts) -> EvidenceSection:
    """The content of this section's template."""
    return EvidenceSection(table=evidence(facts), variants=variant_rows(facts), forms=form_rows(facts))
