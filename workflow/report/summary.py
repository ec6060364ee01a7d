"""The headline results as Markdown, for READMEs and pull requests, and as a tidy table."""

import pandas as pd

from workflow.comparison.model import ALL, Contrast, Cost, Divergence, Score, Share
from workflow.comparison.shares import GAIN
from workflow.report import english, formatting
from workflow.report.formatting import number, quantity, ratio
from workflow.report.model import Facts, Variant
from workflow.report.sections.answer import headline, setting
from workflow.report.sections.kept import percentage
from workflow.runtime import markdown
from workflow.runtime.forms import AS_TRAINED, BASE
from workflow.runtime.markdown import escaped

COSTS = ("peak_memory", "training_speed", "step_time")
COLUMNS = ("variant", "label", "form", "task", "metric", "unit", "higher_is_better", "value", "seeds", "items",
           "difference", "low", "high", "confidence", "p_adjusted", "verdict", "margin", "ratio_to_baseline",
           "ratio_low", "ratio_high", "processes", "device")  # fmt: skip


def summary_markdown(facts: Facts) -> str:
    """The answer and the headline table, as Markdown."""
    answer = headline(facts)
    lines = [f"- {escaped(_plain(line))}" for line in answer.lines]
    notes = " ".join(_plain(note).replace(" (see Limits)", "") for note in answer.notes)
    conditions = "; ".join(_plain(part) for part in setting(facts))
    parts = [
        f"## {escaped(facts.params.report.title)}",
        *(escaped(_plain(sentence)) for sentence in answer.sentences),
        "\n".join(lines),
        _headline_table(facts),
        escaped(notes),
        escaped(f"Setting: {conditions}."),
        "The page with intervals, tests, curves, answers and limits is `report/index.html`; "
        "the numbers are in `results/summary.csv`.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _headline_table(facts: Facts) -> str:
    """A Markdown table with a row per variant and serving form: quality, difference, verdict and costs."""
    metric, decimals = facts.primary, english.decimals_for(facts, facts.primary)
    cost_metrics = [name for name in COSTS if name in facts.cost_metrics]
    confidence = formatting.percent(facts.compared.confidence)
    gains = {(s.variant, s.form): s for s in facts.compared.shares if s.measure == GAIN}
    head = [
        "Variant",
        "Served",
        *([f"Gain kept ({confidence} interval)"] if gains else []),
        english.quality_name(metric),
        f"Difference ({confidence} interval)",
        "Verdict",
        *map(english.cost_name, cost_metrics),
    ]
    rows = []
    for variant in facts.variants:
        for form in facts.forms_of(variant.name):
            score = facts.score(variant.name, form, metric)
            contrast = facts.to_baseline(variant.name, form, metric)
            change = contrast and english.change(facts, contrast, decimals)
            is_baseline = variant.is_baseline and form == AS_TRAINED
            costs = [
                facts.cost_of(variant.name, name) if form == AS_TRAINED else None for name in cost_metrics
            ]
            rows.append(
                [
                    variant.label,
                    english.form_name(form),
                    *([_gain_kept(facts, gains.get((variant.name, form)))] if gains else []),
                    number(score.value, decimals) if score else "not scored",
                    f"{change.value} ({change.interval})" if change else "",
                    change.verdict if change else ("baseline" if is_baseline else "not compared"),
                    *(
                        cost_text(cost, variant) if cost else "not measured" if form == AS_TRAINED else ""
                        for cost in costs
                    ),
                ]
            )
    shift = 1 if gains else 0
    right = [*range(2, 4 + shift), *range(5 + shift, len(head))]
    return markdown.table(head, rows, right=right)


def _gain_kept(facts: Facts, share: Share | None) -> str:
    """An arm's share of the baseline's gain with its interval; empty for the baseline as trained."""
    interval = share and percentage(facts, share)
    if interval is None:
        return "not stated" if share else ""
    return f"{interval.value} ({interval.low} to {interval.high})"


def cost_text(cost: Cost, variant: Variant) -> str:
    """A cost with its unit and, unless the variant is the baseline, its ratio to the baseline's."""
    text = quantity(cost.value, cost.unit)
    return text if variant.is_baseline else f"{text} ({ratio(cost.ratio_to_baseline)})"


def _plain(text: str) -> str:
    """A sentence of the page without its HTML."""
    return text.striptags() if hasattr(text, "striptags") else str(text)


def summary_table(facts: Facts) -> pd.DataFrame:
    """A tidy table with one row per variant, form and metric: the value, and its difference to the baseline.

    Columns: variant, label, form, task, metric, unit, higher_is_better, value, seeds, items, difference, low, high,
    confidence, p_adjusted, verdict, margin (of the difference; empty if there is none), ratio_to_baseline, ratio_low,
    ratio_high and processes (of a cost), device. Shares, divergences and costs have no difference: low and high are the
    ends of their own interval. That of a cost is over processes, and empty for fewer than three.
    """
    variants = {variant.name: variant for variant in facts.variants}
    rows = []
    for score in facts.compared.scores:
        if score.subset == ALL and score.variant in variants:
            metric = (score.task, score.metric)
            contrast = None if score.form == BASE else facts.to_baseline(score.variant, score.form, metric)
            rows.append(_score_row(score) | _contrast_row(contrast))
    rows += [_cost_row(cost, facts.compared.confidence) for cost in facts.compared.cost]
    rows += [_share_row(share) for share in facts.compared.shares]
    rows += [_divergence_row(divergence) for divergence in facts.compared.divergences]
    for row in rows:
        row["label"] = variants[row["variant"]].label
        row["device"] = variants[row["variant"]].precision.device_name
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(
        {"seeds": "Int64", "items": "Int64", "processes": "Int64", "higher_is_better": "boolean"}
    )


def _score_row(score: Score) -> dict:
    columns = ("variant", "form", "task", "metric", "unit", "higher_is_better", "value", "items")
    return {column: getattr(score, column) for column in columns} | {"seeds": len(score.per_seed)}


def _cost_row(cost: Cost, confidence: float) -> dict:
    columns = ("variant", "metric", "unit", "higher_is_better", "value", "ratio_to_baseline", "ratio_low", "ratio_high",
               "processes")  # fmt: skip
    interval = {"low": cost.mean_low, "high": cost.mean_high}
    if cost.mean_low is not None:
        interval["confidence"] = confidence
    about = {"form": "training", "task": "benchmark"}
    return about | {column: getattr(cost, column) for column in columns} | interval


def _share_row(share: Share) -> dict:
    """A share of the baseline's gain or score; its metric is called METRIC:share_of_gain or METRIC:share_of_score."""
    columns = ("variant", "form", "task", "value", "low", "high", "confidence", "seeds", "items")
    names = {"metric": f"{share.metric}:{share.measure}", "unit": f"share of that of {share.other}"}
    return names | {"higher_is_better": True} | {column: getattr(share, column) for column in columns}


def _divergence_row(divergence: Divergence) -> dict:
    columns = ("variant", "form", "task", "metric", "unit", "higher_is_better", "value", "low", "high", "confidence",
               "items")  # fmt: skip
    return {column: getattr(divergence, column) for column in columns} | {"seeds": len(divergence.per_seed)}


def _contrast_row(contrast: Contrast | None) -> dict:
    if contrast is None:
        return {}
    difference = contrast.difference
    return {
        "difference": difference.value,
        "low": difference.low,
        "high": difference.high,
        "confidence": difference.confidence,
        "p_adjusted": contrast.p_adjusted,
        "verdict": contrast.verdict,
        "margin": contrast.equivalence.margin if contrast.equivalence else None,
    }
