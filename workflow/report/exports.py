"""The headline beyond the page: a table for READMEs and pull requests, a tidy table, and a card for each adapter."""

import re

import pandas as pd
from huggingface_hub import EvalResult

from workflow import methods
from workflow.comparison.compare import ALL, Contrast, Cost, Score
from workflow.data import cards, lineage
from workflow.data.lineage import Lineage
from workflow.report import english
from workflow.report.facts import AS_TRAINED, BASE, Facts, Variant, dataset_name, model_name
from workflow.report.formatting import NARROW, number, quantity, ratio
from workflow.runtime.paths import weights_folder

COSTS = ("peak_memory", "training_speed", "step_time")


def summary_markdown(facts: Facts) -> str:
    """The answer and the headline table, as Markdown."""
    headline = english.headline(facts)
    said = [_plain(sentence) for sentence in headline.sentences]
    lines = [f"- {_plain(line)}" for line in headline.lines]
    notes = " ".join(_plain(note).replace(" (see Limits)", "") for note in headline.notes)
    parts = [f"## {escaped(facts.asked.report.title)}", *map(escaped, said)]
    if lines:
        parts.append("\n".join(map(escaped, lines)))
    parts.append(_table(facts))
    if notes:
        parts.append(escaped(notes))
    parts.append(escaped("Setting: " + "; ".join(_plain(part) for part in english.setting(facts)) + "."))
    parts.append(
        "The page with intervals, tests, curves, answers and limits is `report/index.html`; "
        "the numbers are in `results/summary.csv`."
    )
    return "\n\n".join(parts) + "\n"


def _table(facts: Facts) -> str:
    """A row per variant and serving form: quality with its difference and verdict, and costs."""
    metric, decimals = facts.primary, english.decimals_for(facts, facts.primary)
    measured = [m for m in COSTS if m in facts.cost_metrics]
    confidence = english.formatting.percent(facts.compared.confidence)
    head = [
        "Variant",
        "Served",
        english.quality_name(metric),
        f"Difference ({confidence} interval)",
        "Verdict",
    ]
    head += [english.cost_name(m) for m in measured]
    rows = []
    for variant in facts.variants:
        for form in facts.forms_of(variant.name):
            score = facts.score(variant.name, form, metric)
            contrast = facts.to_baseline(variant.name, form, metric)
            change = contrast and english.change(facts, contrast, decimals)
            is_baseline = variant.is_baseline and form == AS_TRAINED
            row = [
                variant.label,
                english.form_name(form),
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
    settings = facts.asked.variants[variant.name]
    method = methods.get(settings.method)
    origin = lineage.of_record(facts.asked.model, facts.model)
    dataset = dataset_name(facts.asked.dataset)
    scores = [
        score
        for score in facts.compared.scores
        if (score.variant, score.form, score.subset) == (variant.name, AS_TRAINED, ALL)
        and str(seed) in score.per_seed
    ]
    data = cards.metadata(
        origin,
        settings,
        dataset=dataset,
        name=f"{model_name(facts.asked.model)} {variant.name}, seed {seed}",
        results=[
            EvalResult(
                task_type="text-generation",
                dataset_type=dataset,
                dataset_name=f"{dataset}, test split",
                dataset_split=score.split,
                metric_type=score.metric,
                metric_name=english.quality_name((score.task, score.metric)),
                metric_value=score.per_seed[str(seed)],
            )
            for score in scores
        ],
    )
    run = next(run for run in variant.trained if run["seed"] == seed)
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {escaped(variant.label)} on {escaped(model_name(facts.asked.model))}, seed {seed}",
        f"{method.product if method.leaves_adapter else method.trains.capitalize()}, trained on {run['rows']['rows']:,} rows of "
        f"{escaped(dataset)} with the base held in {variant.precision['storage']}, computing in "
        f"{variant.precision['compute']}, on {escaped(variant.precision['device_name'])}. It is one run of a "
        f"comparison of precisions, made to be compared and not to be used.",
        f"Base: {escaped(_source_words(facts))}" + _base_words(origin),
        *_loading(facts, variant, seed, origin),
        *_numbers(facts, variant, seed, scores),
        *_other_forms(facts, variant, seed),
        *_costs(facts, variant),
        "## Training",
        _training(facts, variant, run),
        "## Limits",
        "\n".join(f"- **{escaped(limit.head)}.** {escaped(limit.body)}" for limit in english.limits(facts)),
        "## Made by",
        _made_by(facts, variant, run),
    ]
    return "\n\n".join(parts) + "\n"


def _base_words(origin: Lineage) -> str:
    """What the metadata's base model is to the base that was trained on."""
    if origin.base_model and origin.revision:
        return "."
    if origin.base_model:
        return (
            f". It descends from {origin.base_model}, whose own weights are others: the numbers are of the base that "
            "`dvc repro fetch_model` stores."
        )
    return ". It has no name on the hub, so the metadata name none."


def _loading(facts: Facts, variant: Variant, seed: int, origin: Lineage) -> list[str]:
    code = cards.loading(
        facts.asked.variants[variant.name],
        origin,
        compute=variant.precision["compute"],
        device=variant.precision["device"],
        folder=weights_folder(variant.name, seed),
    )
    return ["## How to load it", f"```python\n{code}\n```"]


def _numbers(facts: Facts, variant: Variant, seed: int, scores: list[Score]) -> list[str]:
    """What the run scored as trained, and how that stands to the baseline."""
    rows = [
        f"| {escaped(english.quality_name((s.task, s.metric)))} | {s.per_seed[str(seed)]:.4f} | {s.value:.4f} | {s.items:,} |"
        for s in scores
    ]
    parts = [
        "## Numbers",
        f"On {escaped(dataset_name(facts.asked.dataset))}’s test split, as trained: loaded by the code above.",
        "\n".join(
            ["| Metric | This run | Mean over the seeds | Items |", "| --- | ---: | ---: | ---: |", *rows]
        )
        if rows
        else "It was not scored.",
    ]
    contrast = facts.to_baseline(variant.name, AS_TRAINED, facts.primary)
    if contrast:
        parts.append(escaped(f"Over the seeds {english.listed(facts.compared.seeds)}: {contrast.sentence}"))
    elif variant.is_baseline:
        parts.append("It is the baseline that the other variants are compared with.")
    return parts


def _other_forms(facts: Facts, variant: Variant, seed: int) -> list[str]:
    """What the run gives when it is loaded otherwise, each form with its own number and the way to get it."""
    rows = []
    for form in facts.forms_of(variant.name):
        score = facts.score(variant.name, form, facts.primary)
        if form != AS_TRAINED and score and str(seed) in score.per_seed:
            command = f"save_served --variant {variant.name} --seed {seed} --form {form} --to FOLDER"
            rows.append(
                f"| {escaped(english.form_name(form))} | {score.per_seed[str(seed)]:.4f} | {score.value:.4f} "
                f"| `python -m workflow.{command}` |"
            )
    if not rows:
        return []
    name = escaped(english.quality_name(facts.primary))
    head = f"| Served | {name}: this run | Mean over the seeds | Written as a model of its own by |"
    return [
        "## Loaded otherwise",
        "The same run in another form is another model, with numbers of its own. An adapter put on a base in another "
        "precision than it was trained on is none of these forms, and was not scored.",
        "\n".join([head, "| --- | ---: | ---: | --- |", *rows]),
    ]


def _costs(facts: Facts, variant: Variant) -> list[str]:
    costs = [c for m in COSTS if (c := facts.cost_of(variant.name, m))]
    lines = (
        f"- {english.cost_name(c.metric)}: {escaped(_cost(c, variant))} ({escaped(c.definition)})"
        for c in costs
    )
    return ["## What it cost", "\n".join(lines)] if costs else []


def _training(facts: Facts, variant: Variant, run: dict) -> str:
    training = facts.asked.training_of(variant.name)
    adapter = f"rank {training.rank}, alpha {training.alpha}, dropout {training.dropout:g}; "
    return (
        f"{adapter if methods.get(facts.asked.variants[variant.name].method).leaves_adapter else ''}"
        f"{english.count(run['steps'], 'step')} of {english.count(training.batch_rows, 'row')}, "
        f"{run['tokens_seen']:,} tokens, {training.optimizer}, learning rate {training.learning_rate:g} "
        f"({training.schedule}), loss on the {training.loss_on.replace('_', ' ')}, seed {run['seed']}; "
        f"{english.duration(run['seconds'])}.".replace(NARROW, " ")
    )


def _made_by(facts: Facts, variant: Variant, run: dict) -> str:
    origin = facts.lock.origins.get(weights_folder(variant.name, run["seed"]).as_posix())
    what = "adapter" if methods.get(facts.asked.variants[variant.name].method).leaves_adapter else "model"
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    digest = f"; the {what}’s md5 in dvc.lock is `{origin.md5}`" if origin and origin.md5 else ""
    return f"`dvc repro train@{variant.name}-{run['seed']}`{digest}. Versions: {versions}."


def _source_words(facts: Facts) -> str:
    source = facts.model
    named = {
        key: source[key]
        for key in ("repository", "revision", "package", "version", "member", "path", "sha256")
        if source.get(key)
    }
    words_of = ", ".join(f"{key} {value}" for key, value in named.items())
    return f"{model_name(facts.asked.model)} ({source['source']}{': ' if words_of else ''}{words_of})"
