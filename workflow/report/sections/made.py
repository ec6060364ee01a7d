"""How it was made: commands, sources, and the time of the stages."""

from dataclasses import dataclass

from workflow.report import english, formatting
from workflow.report.english import duration, energy_sentence
from workflow.report.formatting import quantity
from workflow.report.model import Facts

RECORD_NAMES = {
    "sha256": "sha256",
    "quantized_before": "Quantized before",
    "moved": "Moved off its grid",
    "cut": "Cut",
    "healed": "Healed",
    "storage_dtype": "Stored as",
}
IN_WORDS = {"moved": english.move_of, "cut": english.cut_of, "healed": english.healing_of}


@dataclass(frozen=True)
class WorkRow:
    """The recorded time of a stage's runs."""

    stage: str
    runs: str
    time: str
    measured: str


def work_rows(facts: Facts) -> list[WorkRow]:
    """The recorded time by stage, and the total."""
    rows = [WorkRow(w.stage, f"{w.runs:,}", english.duration(w.seconds), w.measured) for w in facts.work]
    total = english.duration(sum(work.seconds for work in facts.work))
    return [*rows, WorkRow("together", f"{sum(work.runs for work in facts.work):,}", total, "")]


def commands(facts: Facts) -> list[tuple[str, list[str]]]:
    """The commands that reproduce the scores, each list with the run and form that it scores."""
    labels = {variant.name: variant.label for variant in facts.variants}
    return [
        (
            f"{labels[run.variant]}, {'' if run.seed is None else f'seed {run.seed}, '}{english.form_name(run.form)}",
            run.commands,
        )
        for run in facts.commands
    ]


def record(source: dict) -> list[tuple[str, str]]:
    """A source record as pairs of a readable name and its value."""
    pairs = []
    for key, value in source.items():
        name = RECORD_NAMES.get(key, key.replace("_", " ").capitalize())
        if key in IN_WORDS and value is not None:
            value = IN_WORDS[key](value)
        if isinstance(value, dict):
            pairs += record(value)
            continue
        if isinstance(value, list):
            value = english.listed(value)
        if value is None:
            value = "no"
        pairs.append((name, f"{value:,}" if isinstance(value, int) and key != "seed" else str(value)))
    return pairs


def _price(hours: float, an_hour: float | None) -> str:
    if an_hour is None:
        return f"{formatting.significant(hours, 2)} times its price per hour"
    return f"about {formatting.significant(hours * an_hour, 2)} at {an_hour:g} an hour (report.device_hour_price)"


def work_words(facts: Facts) -> str:
    """Sentences on the recorded time: what it covers, and its cost in money and energy."""
    total = sum(work.seconds for work in facts.work)
    where = "None of it was on a GPU." if facts.on_cpu else "All of it held the GPU."
    text = (
        "Wall time as the runs recorded it. The stages that fetch, draw rows, measure a grid, compare and render record none, and "
        f"importing libraries is not in it. {where} "
        f"Cost: {duration(total)} of this device, {_price(total / 3600, facts.params.report.device_hour_price)}. "
    )
    energy = facts.energy
    if not energy:
        return text + energy_sentence(facts)
    if facts.unmeasured:
        return text + "Energy: not estimated, as that of some variants was not measured."
    joules = sum(
        run.tokens_seen / 1000 * energy[variant.name].joules
        for variant in facts.variants
        for run in variant.trained
    )
    return text + (
        f"Energy: the trainings’ tokens, at the joules per token of the run’s own grid, are about "
        f"{quantity(joules / 3.6e6, 'kWh', 2)} of the GPU alone; scoring is not in it."
    )


@dataclass(frozen=True)
class Made:
    """The commands, sources and recorded times."""

    commands: list[tuple[str, list[str]]]  # by run and form
    model: list[tuple[str, str]]
    dataset: list[tuple[str, str]]
    work: list[WorkRow]
    work_words: str


def section(facts: Facts) -> Made:
    """The content of this section's template."""
    return Made(
        commands=commands(facts),
        model=record(facts.model),
        dataset=record(facts.dataset),
        work=work_rows(facts),
        work_words=work_words(facts),
    )
