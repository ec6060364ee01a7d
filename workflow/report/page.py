"""Render the page: the facts, put into words, tables and figures, in one HTML file that needs no other."""

from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from workflow.paths import DATASET_SOURCE, MODEL_SOURCE, RESULTS
from workflow.report import figures, formatting, words
from workflow.report.facts import COMPARISON, LOCK, Facts, dataset_name, model_name
from workflow.report.formatting import number, quantity, ratio, signed
from workflow.statistics import Difference

HERE = Path(__file__).parent
SHORT_TEXT = 240  # characters, and
SHORT_LINES = 6  # lines, that are shown without a fold
FIRST_COSTS = ("peak_memory", "weights", "training_speed", "step_time")  # the others follow
RECORD_NAMES = {"sha256": "sha256", "quantized_before": "Quantised before", "storage_dtype": "Stored as"}


@dataclass(frozen=True)
class Provenance:
    """Where a table's or figure's numbers come from, and what makes them again."""

    stages: list[str]
    files: list[str]
    command: str


@dataclass(frozen=True)
class VariantRow:
    label: str
    name: str
    is_baseline: bool
    colour: str
    held_as: str
    computes_in: str
    quantized: str
    trainable: str
    steps: str
    tokens_seen: str


@dataclass(frozen=True)
class Change:
    """A difference as a cell shows it."""

    value: str
    interval: str
    verdict: str
    decided: bool


@dataclass(frozen=True)
class QualityRow:
    label: str
    before: str
    after: str
    per_seed: list[str]
    by_training: Change
    to_baseline: Change | None


@dataclass(frozen=True)
class QualityBlock:
    """One metric's rows."""

    name: str
    unit: str
    direction: str
    rows: list[QualityRow]


@dataclass(frozen=True)
class CostCell:
    value: str
    quartiles: str
    ratio: str


@dataclass(frozen=True)
class CostRow:
    """One measured cost, with a cell per variant."""

    name: str
    unit: str
    direction: str
    definition: str
    cells: list[CostCell | None]


@dataclass(frozen=True)
class Text:
    """A text that may be long: `short` is its beginning where it is to be folded, else None."""

    full: str
    short: str | None


def render(facts: Facts) -> str:
    """The whole page; the same facts give the same bytes."""
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["text"] = fold
    experiment = facts.asked.experiment
    first = facts.quality[0] if facts.quality else None
    return environment.get_template("template.html.jinja").render(
        style=Markup((HERE / "style.css").read_text(encoding="utf-8")),
        facts=facts,
        title=facts.asked.report.title,
        headline=words.headline(facts),
        setting=words.setting(facts),
        variant_rows=variant_rows(facts),
        quality_blocks=quality_blocks(facts),
        cost_rows=cost_rows(facts),
        quality_panels=figures.quality_panels(facts),
        curve_panels=figures.curve_panels(facts),
        cost_panels=figures.cost_panels(facts),
        legend=figures.legend(facts),
        before_training=words.before_training(facts) if facts.quality else "",
        weights_in_16_bits=_gib(words.weights_in_16_bits(facts)),
        limits=words.limits(facts),
        confidence=formatting.percent(facts.asked.comparison.confidence),
        test_set=first
        and f"{words.count(first.items, 'row')}, {words.count(first.groups, 'different instruction')}",
        seeds=words.listed(experiment.seeds),
        model_name=model_name(facts.asked.model),
        dataset_name=dataset_name(facts.asked.dataset),
        model_record=record(facts.model),
        dataset_record=record(facts.dataset),
        training=training_words(facts),
        provenance=provenance(),
        devices=words.listed(facts.devices),
        lock=LOCK.as_posix(),
    )


def provenance() -> dict[str, Provenance]:
    """Where each part of the page comes from."""
    compared = COMPARISON.as_posix()
    run = f"{RESULTS}/%s/<variant>/<seed>/%s"
    return {
        "variants": Provenance(["train"], [run % ("train", "result.json")], "dvc repro train"),
        "quality": Provenance(["evaluate_base", "evaluate", "compare"], [compared], "dvc repro compare"),
        "curves": Provenance(
            ["train"], [run % ("train", "history.csv"), run % ("train", "validation.csv")], "dvc repro train"
        ),
        "cost": Provenance(["benchmark", "compare"], [compared], "dvc repro compare"),
        "answers": Provenance(
            ["evaluate_base", "evaluate"],
            [f"{RESULTS}/evaluate_base/<variant>/answers.jsonl", run % ("evaluate", "answers.jsonl")],
            "dvc repro evaluate_base evaluate",
        ),
        "model": Provenance(["fetch_model"], [MODEL_SOURCE.as_posix()], "dvc repro fetch_model"),
        "dataset": Provenance(["fetch_dataset"], [DATASET_SOURCE.as_posix()], "dvc repro fetch_dataset"),
    }


def variant_rows(facts: Facts) -> list[VariantRow]:
    """What each variant is: storage, compute type, what was quantised and what was trained."""
    rows = []
    for variant in facts.variants:
        precision, trained = variant.precision, variant.trained[0]
        rows.append(
            VariantRow(
                label=variant.label,
                name=variant.name,
                is_baseline=variant.is_baseline,
                colour=figures.STYLE[figures.colour_of(variant)],
                held_as=_held_as(precision),
                computes_in=precision["compute"],
                quantized=f"{precision['quantized_modules']:,} of {precision['linear_modules']:,}",
                trainable=f"{trained['trainable_parameters']:,} ({trained['trainable_dtype']})",
                steps=words.listed(list(dict.fromkeys(f"{run['steps']:,}" for run in variant.trained))),
                tokens_seen=words.listed(
                    list(dict.fromkeys(f"{run['tokens_seen']:,}" for run in variant.trained))
                ),
            )
        )
    return rows


def _held_as(precision: dict) -> str:
    if precision["base"] == "16bit" and precision["storage"] == "float32":
        return "float32 (rounded to 16 bits)"
    return precision["storage"] + (", double-quantised" if precision["double_quantization"] else "")


def quality_blocks(facts: Facts) -> list[QualityBlock]:
    """The quality table: a block per metric, a row per variant that was scored in it."""
    blocks = []
    for metric in facts.quality_metrics:
        decimals = words.decimals_for(facts, metric)
        scored = [(v, q) for v in facts.variants if (q := facts.quality_of(v.name, metric))]
        first = scored[0][1]
        blocks.append(
            QualityBlock(
                name=words.metric_name(first.task),
                unit=first.unit,
                direction=words.direction(first.higher_is_better),
                rows=[
                    QualityRow(
                        label=variant.label,
                        before=number(quality.base_value, decimals),
                        after=number(quality.value, decimals),
                        per_seed=[number(value, decimals) for value in quality.per_seed.values()],
                        by_training=_change(quality.to_base, decimals, quality.higher_is_better),
                        to_baseline=_change(quality.to_baseline, decimals, quality.higher_is_better)
                        if quality.to_baseline
                        else None,
                    )
                    for variant, quality in scored
                ],
            )
        )
    return blocks


def _change(difference: Difference, decimals: int, higher_is_better: bool) -> Change:
    return Change(
        value=signed(difference.value, decimals),
        interval=words.interval(difference, decimals),
        verdict=words.verdict(difference, higher_is_better),
        decided=difference.decided,
    )


def cost_rows(facts: Facts) -> list[CostRow]:
    """The cost table: a row per measurement, a cell per variant, None where it was not measured."""
    rows = []
    first_ones = [metric for metric in FIRST_COSTS if metric in facts.cost_metrics]
    for metric in dict.fromkeys([*first_ones, *facts.cost_metrics]):
        costs = [facts.cost_of(variant.name, metric) for variant in facts.variants]
        first = next(cost for cost in costs if cost)
        cells = [
            CostCell(
                value=quantity(cost.value, cost.unit),
                quartiles=""
                if cost.low is None or cost.high is None
                else f"{formatting.significant(cost.low)} to {formatting.significant(cost.high)}",
                ratio="" if variant.is_baseline else ratio(cost.ratio_to_baseline),
            )
            if cost
            else None
            for variant, cost in zip(facts.variants, costs, strict=True)
        ]
        rows.append(
            CostRow(
                name=words.metric_name(metric),
                unit=first.unit,
                direction=words.direction(first.higher_is_better),
                definition=first.definition,
                cells=cells,
            )
        )
    return rows


def record(source: dict) -> list[tuple[str, str]]:
    """A source record as pairs of a readable name and its value."""
    pairs = []
    for key, value in source.items():
        name = RECORD_NAMES.get(key, key.replace("_", " ").capitalize())
        if value is None:
            value = "no"
        pairs.append((name, f"{value:,}" if isinstance(value, int) and key != "seed" else str(value)))
    return pairs


def training_words(facts: Facts) -> str:
    """How the baseline was trained, in a sentence or two."""
    asked = facts.asked.training_of(facts.baseline.name)
    trained = facts.baseline.trained[0]
    modules = (
        "all linear layers" if asked.target_modules == "all-linear" else words.listed(asked.target_modules)
    )
    adapter = (
        f"A LoRA adapter of rank {asked.rank} (alpha {asked.alpha}, dropout {asked.dropout:g}) on {modules} "
        f"({trained['adapted_modules']:,} of them)"
        if facts.asked.variants[facts.baseline.name].method == "lora"
        else "Every weight"
    )
    part = "the response alone" if asked.loss_on == "response" else "prompt and response"
    return (
        f"{adapter} was trained for {words.count(trained['steps'], 'step')} of "
        f"{words.count(asked.batch_rows, 'row')} with {asked.optimizer}, learning rate "
        f"{asked.learning_rate:g} ({asked.schedule} schedule), with the loss on {part}. "
        f"{_rows(trained['rows'], asked.max_length)}{_shared(facts)}"
    )


def _rows(rows: dict, max_length: int) -> str:
    text = (
        f"Of {words.count(rows['rows'], 'training row')}, {rows['rows_cut']:,} end at {max_length:,} tokens"
    )
    if rows["rows_dropped"]:
        text += f"; {rows['rows_dropped']:,} more had no response within that length and were left out"
    return f"{text}."


def _shared(facts: Facts) -> str:
    """What the variants have in common, where nothing but the precision of the base sets them apart."""
    methods = {facts.asked.variants[variant.name].method for variant in facts.variants}
    if (
        not facts.others
        or len(methods) > 1
        or any(words.other_settings(facts, other) for other in facts.others)
    ):
        return ""
    return " With one seed, all variants begin with the same adapter and see the same rows in the same order."


def fold(text: str) -> Text:
    """A text with its beginning, where it is long enough to be folded."""
    lines = text.splitlines()
    if len(text) <= SHORT_TEXT and len(lines) <= SHORT_LINES:
        return Text(text, None)
    return Text(text, "\n".join(lines[: SHORT_LINES - 2])[: SHORT_TEXT - 60].rstrip() + " …")


def _gib(value: float | None) -> str | None:
    return None if value is None else quantity(value, "GiB")
