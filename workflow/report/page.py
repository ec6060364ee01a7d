"""Render the page: the facts, put into words, tables and figures, in one HTML file that needs no other."""

import base64
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from workflow.report import english, formatting, quality_figures, tables, training_figures
from workflow.report.answers import TIE
from workflow.report.facts import ENVIRONMENT, GPU_SIZES, Facts, dataset_name, model_name
from workflow.report.provenance import sources

HERE = Path(__file__).parent
SHORT_TEXT = 240  # characters, and
SHORT_LINES = 6  # lines, that are shown without a fold


@dataclass(frozen=True)
class Section:
    """A part of the page: `sections/NAME.html.jinja`, which stands under the address #NAME."""

    name: str
    short: str  # in the contents


@dataclass(frozen=True)
class Text:
    """A text that may be long: `short` is its beginning where it is to be folded, else None."""

    full: str
    short: str | None


def sections(facts: Facts) -> list[Section]:
    """The sections that this run has something for, in the order of the page."""
    found = [
        ("evidence", "Evidence", True),
        ("quality", "Quality", True),
        ("decomposition", "Decomposition", bool(tables.decomposition(facts))),
        ("categories", "Categories", bool(tables.category_rows(facts))),
        ("claims", "Claims", bool(facts.compared.claims)),
        ("faults", "Faults", bool(tables.repair_blocks(facts))),
        ("training", "Training", True),
        ("cost", "Memory and time", True),
        ("hardware", english.hardware_short(facts), bool(facts.hardware)),
        ("answers", "Answers", True),
        ("changes", "Changes", bool(facts.changes)),
        ("limits", "Limits", True),
        ("made", "How it was made", True),
    ]
    return [Section(name, short) for name, short, shown in found if shown]


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
    script = (HERE / "script.js").read_text(encoding="utf-8")
    digest = hashlib.sha256(script.encode()).digest()
    return environment.get_template("template.html.jinja").render(
        style=Markup((HERE / "style.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_digest=base64.b64encode(digest).decode(),
        **_content(facts),
    )


def _content(facts: Facts) -> dict[str, Any]:
    """What the templates show, by the names that they use."""
    return {
        "facts": facts,
        "title": facts.asked.report.title,
        "sections": sections(facts),
        "headline": english.headline(facts),
        "setting": english.setting(facts),
        "answer_panel": quality_figures.answer_panel(facts),
        "answer_legend": quality_figures.answer_legend(facts),
        "evidence": tables.evidence(facts),
        "variant_rows": tables.variant_rows(facts),
        "form_rows": tables.form_rows(facts),
        "quality_blocks": tables.quality_blocks(facts),
        "value_blocks": tables.value_blocks(facts),
        "decomposition": tables.decomposition(facts),
        "claim_rows": tables.claim_rows(facts),
        "repair_blocks": tables.repair_blocks(facts),
        "category_rows": tables.category_rows(facts),
        "cost_rows": tables.cost_rows(facts),
        "quality_panels": quality_figures.quality_panels(facts),
        "forest_panels": quality_figures.forest_panels(facts),
        "waterfall_panels": quality_figures.waterfall_panels(facts),
        "category_panels": quality_figures.category_panels(facts),
        "repair_panel": quality_figures.repair_panel(facts),
        "curve_panels": training_figures.curve_panels(facts),
        "cost_panels": training_figures.cost_panels(facts),
        "hardware_heading": english.hardware_heading(facts),
        "hardware_blocks": tables.hardware_blocks(facts),
        "prediction": english.prediction_sentence(facts),
        "fit_blocks": tables.fit_blocks(facts),
        "gpu_sizes": GPU_SIZES,
        "primary_name": english.quality_name(facts.primary),
        "equivalence_confidence": english.equivalence_confidence(facts),
        "in_family": sum(contrast.in_family for contrast in facts.compared.contrasts),
        "commands": tables.commands(facts),
        "weights_in_16_bits": tables.gib(english.weights_in_16_bits(facts)),
        "answers": facts.answers,
        "answer_words": english.answer_words(facts),
        "tie": TIE,
        "limits": english.limits(facts),
        "missing": english.missing(facts),
        "confidence": formatting.percent(facts.asked.comparison.confidence),
        "seeds": english.listed(facts.asked.experiment.seeds),
        "model_name": model_name(facts.asked.model),
        "dataset_name": dataset_name(facts.asked.dataset),
        "model_record": tables.record(facts.model),
        "dataset_record": tables.record(facts.dataset),
        "training": tables.training_words(facts),
        "sources": sources(facts),
        "work_rows": tables.work_rows(facts),
        "peak_words": english.peak_words(facts),
        "work_words": english.work_words(facts),
        "devices": english.listed(facts.devices),
        "environment_lock": ENVIRONMENT.as_posix(),
    }


def fold(text: str) -> Text:
    """A text with its beginning, where it is long enough to be folded."""
    lines = text.splitlines()
    if len(text) <= SHORT_TEXT and len(lines) <= SHORT_LINES:
        return Text(text, None)
    return Text(text, "\n".join(lines[: SHORT_LINES - 2])[: SHORT_TEXT - 60].rstrip() + " …")
