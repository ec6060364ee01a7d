"""The headline beyond the page: a table for READMEs and pull requests, a tidy table, and a card for each adapter."""

import re

import pandas as pd
from huggingface_hub import EvalResult, ModelCardData

from workflow import params
from workflow.comparison import ALL, Contrast, Cost, Score
from workflow.paths import weights_folder
from workflow.report import words
from workflow.report.facts import AS_TRAINED, BASE, Facts, Variant, dataset_name, model_name
from workflow.report.formatting import NARROW, number, quantity, ratio

COSTS = ("peak_memory", "training_speed", "step_time")


def summary_markdown(facts: Facts) -> str:
    """The answer and the headline table, as Markdown."""
    headline = words.headline(facts)
    said = [_plain(sentence) for sentence in headline.sentences]
    lines = [f"- {_plain(line)}" for line in headline.lines]
    notes = " ".join(_plain(note).replace(" (see Limits)", "") for note in headline.notes)
    parts = [f"## {escaped(facts.asked.report.title)}", *map(escaped, said)]
    if lines:
        parts.append("\n".join(map(escaped, lines)))
    parts.append(_table(facts))
    if notes:
        parts.append(escaped(notes))
    parts.append(escaped("Setting: " + "; ".join(_plain(part) for part in words.setting(facts)) + "."))
    parts.append(
        "The page with intervals, tests, curves, answers and limits is `report/index.html`; "
        "the numbers are in `results/summary.csv`."
    )
    return "\n\n".join(parts) + "\n"


def _table(facts: Facts) -> str:
    """A row per variant and serving form: quality with its difference and verdict, and costs."""
    metric, decimals = facts.primary, words.decimals_for(facts, facts.primary)
    measured = [m for m in COSTS if m in facts.cost_metrics]
    confidence = words.formatting.percent(facts.compared.confidence)
    head = ["Variant", "Served", words.quality_name(metric), f"Difference ({confidence} interval)", "Verdict"]
    head += [words.cost_name(m) for m in measured]
    rows = []
    for variant in facts.variants:
        for form in facts.forms_of(variant.name):
            score = facts.score(variant.name, form, metric)
            contrast = facts.to_baseline(variant.name, form, metric)
            change = contrast and words.change(facts, contrast, decimals)
            is_baseline = variant.is_baseline and form == AS_TRAINED
            row = [
                variant.label,
                words.form_name(form),
                number(score.value, decimals) if score else "not scored",
                f"{change.value} ({change.interval})" if change else "",
                change.verdict if change else ("baseline" if is_baseline else "not compared"),
            ]
            for name in measured:
                cost = facts.cost_of(variant.name, name) if form == AS_TRAINED else None
                row.append(_cost(cost, variant) if cost else "")
            rows.append(row)
    align = ["---", "---", "---:", "---:", "---", *["---:"] * len(measured)]
    return "\n".join(f"| {' | '.join(map(escaped, row))} |" for row in (head, align, *rows))


def _cost(cost: Cost, variant: Variant) -> str:
    shown = quantity(cost.value, cost.unit)
    return shown if variant.is_baseline else f"{shown} ({ratio(cost.ratio_to_baseline)})"


def _plain(marked: str) -> str:
    return marked.striptags().replace(NARROW, " ") if hasattr(marked, "striptags") else str(marked)


def escaped(text: str) -> str:
    """Text that Markdown takes for text: no table ends, no HTML, link, picture or code begins, no line breaks."""
    text = " ".join(str(text).replace(NARROW, " ").split())
    text = re.sub(r"[\\`\[\]|]", r"\\\g<0>", text)
    return text.replace("&", "&amp;").replace("<", "&lt;")


def summary_table(facts: Facts) -> pd.DataFrame:
    """A tidy table, one row per variant, form and metric: its value, and how it differs from the baseline.

    Columns: variant, label, form, task, metric, unit, higher_is_better, value, seeds, items, difference, low, high,
    confidence, p_adjusted, verdict, margin (of the difference; empty where none was taken), ratio_to_baseline (of
    a cost), device.
    """
    labels = {variant.name: variant for variant in facts.variants}
    rows = []
    for score in facts.compared.scores:
        if score.subset == ALL and score.variant in labels:
            contrast = (
                None
                if score.form == BASE
                else facts.to_baseline(score.variant, score.form, (score.task, score.metric))
            )
            rows.append(_score_row(score) | _contrast_row(contrast))
    for cost in facts.compared.cost:
        rows.append(
            {
                "variant": cost.variant,
                "form": "training",
                "task": "benchmark",
                "metric": cost.metric,
                "unit": cost.unit,
                "higher_is_better": cost.higher_is_better,
                "value": cost.value,
                "ratio_to_baseline": cost.ratio_to_baseline,
            }
        )
    columns = ("variant", "label", "form", "task", "metric", "unit", "higher_is_better", "value", "seeds", "items",
               "difference", "low", "high", "confidence", "p_adjusted", "verdict", "margin", "ratio_to_baseline",
               "device")  # fmt: skip
    for row in rows:
        row["label"] = labels[row["variant"]].label
        row["device"] = labels[row["variant"]].precision["device_name"]
    return pd.DataFrame(rows, columns=list(columns)).astype(
        {"seeds": "Int64", "items": "Int64", "higher_is_better": "boolean"}
    )


def _score_row(score: Score) -> dict:
    kept = ("variant", "form", "task", "metric", "unit", "higher_is_better", "value", "items")
    return {key: getattr(score, key) for key in kept} | {"seeds": len(score.per_seed)}


def _contrast_row(contrast: Contrast | None) -> dict:
    if contrast is None:
        return {}
    one = contrast.difference
    return {
        "difference": one.value,
        "low": one.low,
        "high": one.high,
        "confidence": one.confidence,
        "p_adjusted": contrast.p_adjusted,
        "verdict": contrast.verdict,
        "margin": contrast.equivalence.margin if contrast.equivalence else None,
    }


def model_card(facts: Facts, variant: Variant, seed: int) -> str:
    """The card of one run's adapter (or of its full model) in the hub's format: metadata, numbers, limits."""
    full = facts.asked.variants[variant.name].method == "full"
    training = facts.asked.training_of(variant.name)
    what = "model" if full else "adapter"
    base = _base_model(facts.asked.model)
    scores = [
        score
        for score in facts.compared.scores
        if (score.variant, score.form, score.subset) == (variant.name, AS_TRAINED, ALL)
        and str(seed) in score.per_seed
    ]
    dataset = facts.asked.dataset
    data = ModelCardData(
        base_model=base,
        datasets=dataset.repository if isinstance(dataset, params.HubDataset) else None,
        library_name="transformers" if full else "peft",
        pipeline_tag="text-generation",
        tags=["full-fine-tuning"] if full else ["lora", *(["qlora"] if _is_4bit(variant) else [])],
        model_name=f"{model_name(facts.asked.model)} {variant.name}, seed {seed}",
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type=dataset_name(dataset),
                dataset_name=f"{dataset_name(dataset)}, test split",
                dataset_split=score.split,
                metric_type=score.metric,
                metric_name=words.quality_name((score.task, score.metric)),
                metric_value=score.per_seed[str(seed)],
            )
            for score in scores
        ],
    )
    rows = [
        f"| {escaped(words.quality_name((s.task, s.metric)))} | {s.per_seed[str(seed)]:.4f} | {s.value:.4f} | {s.items:,} |"
        for s in scores
    ]
    run = next(run for run in variant.trained if run["seed"] == seed)
    origin = facts.lock.origins.get(weights_folder(variant.name, seed).as_posix())
    contrast = facts.to_baseline(variant.name, AS_TRAINED, facts.primary)
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {escaped(variant.label)} on {escaped(model_name(facts.asked.model))}, seed {seed}",
        f"{'All weights' if full else 'A LoRA adapter'}, trained on {run['rows']['rows']:,} rows of "
        f"{escaped(dataset_name(dataset))} with the base held in {variant.precision['storage']}, computing in "
        f"{variant.precision['compute']}, on {escaped(variant.precision['device_name'])}. It is one run of a "
        f"comparison of precisions, made to be compared and not to be used.",
        f"Base: {escaped(_source_words(facts))}"
        + ("" if base else ". It has no name on the hub, so the metadata name none")
        + ".",
        "## How to load it",
        f"```python\n{_loading(facts, full)}\n```",
        "## Numbers",
        f"On {escaped(dataset_name(dataset))}’s test split, as trained.",
        "\n".join(
            ["| Metric | This run | Mean over the seeds | Items |", "| --- | ---: | ---: | ---: |", *rows]
        )
        if rows
        else "It was not scored.",
    ]
    if contrast:
        parts.append(escaped(f"Over the seeds {words.listed(facts.compared.seeds)}: {contrast.sentence}"))
    elif variant.is_baseline:
        parts.append("It is the baseline that the other variants are compared with.")
    costs = [c for m in COSTS if (c := facts.cost_of(variant.name, m))]
    if costs:
        parts += [
            "## What it cost",
            "\n".join(
                f"- {words.cost_name(c.metric)}: {escaped(_cost(c, variant))} ({escaped(c.definition)})"
                for c in costs
            ),
        ]
    adapter = (
        f"rank {training.rank}, alpha {training.alpha}, dropout {training.dropout:g}; " if not full else ""
    )
    parts += [
        "## Training",
        f"{adapter}{words.count(run['steps'], 'step')} of {words.count(training.batch_rows, 'row')}, "
        f"{run['tokens_seen']:,} tokens, {training.optimizer}, learning rate {training.learning_rate:g} "
        f"({training.schedule}), loss on the {training.loss_on.replace('_', ' ')}, seed {seed}; "
        f"{words.duration(run['seconds'])}.".replace(NARROW, " "),
        "## Limits",
        "\n".join(f"- **{escaped(limit.head)}.** {escaped(limit.body)}" for limit in words.limits(facts)),
        "## Made by",
        f"`dvc repro train@{variant.name}-{seed}`"
        + (f"; the {what}’s md5 in dvc.lock is `{origin.md5}`" if origin and origin.md5 else "")
        + ". Versions: "
        + ", ".join(f"{name} {version}" for name, version in run["versions"].items())
        + ".",
    ]
    return "\n\n".join(parts) + "\n"


def _is_4bit(variant: Variant) -> bool:
    return variant.precision["base"] in ("nf4", "fp4")


def _base_model(model: params.Model) -> str | None:
    return model.repository if isinstance(model, params.HubModel) else None


def _source_words(facts: Facts) -> str:
    source = facts.model
    named = {
        key: source[key]
        for key in ("repository", "revision", "package", "version", "member", "path", "sha256")
        if source.get(key)
    }
    words_of = ", ".join(f"{key} {value}" for key, value in named.items())
    return f"{model_name(facts.asked.model)} ({source['source']}{': ' if words_of else ''}{words_of})"


def _loading(facts: Facts, full: bool) -> str:
    if full:
        return 'from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")'
    base = _base_model(facts.asked.model)
    if base:
        return 'from peft import AutoPeftModelForCausalLM\n\nmodel = AutoPeftModelForCausalLM.from_pretrained("THIS_FOLDER")'
    return (
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        "# The base as `dvc repro fetch_model` stores it.\n"
        'base = AutoModelForCausalLM.from_pretrained("results/fetch_model/model")\n'
        'model = PeftModel.from_pretrained(base, "THIS_FOLDER")'
    )
