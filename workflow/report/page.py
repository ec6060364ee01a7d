"""Render the facts as one self-contained HTML page."""

import base64
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from workflow.report import english, formatting
from workflow.report.facts import ENVIRONMENT
from workflow.report.labels import dataset_name, model_name
from workflow.report.model import Facts
from workflow.report.numbering import number_parts
from workflow.report.origins import move_origins
from workflow.report.provenance import sources
from workflow.report.sections import (
    answer,
    answers,
    categories,
    claims,
    cost,
    decomposition,
    evidence,
    faults,
    forgetting,
    hardware,
    kept,
    limits,
    made,
    quality,
    rates,
    speed_ups,
    training,
)
from workflow.runtime.paths import COMPARISON

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Section:
    """A part of the page, from `sections/NAME.html.jinja`, at the anchor #NAME.

    Attributes:
        short: its title in the contents; None if its content has one.
        content: the facts to what its template shows, under the section's name.
        is_shown: whether there is something to show.
    """

    name: str
    short: str | None
    content: Callable[[Facts], Any]
    is_shown: Callable[[Any], bool] = lambda content: True


SECTIONS = (  # in the order of the page
    Section("evidence", "Evidence", evidence.section),
    Section("kept", "Closeness", kept.section, bool),
    Section("quality", "Quality", quality.section),
    Section("forgetting", "Forgetting", forgetting.section),
    Section("decomposition", "Decomposition", decomposition.section, lambda content: bool(content.parts)),
    Section("categories", "Categories", categories.section, lambda content: bool(content.rows)),
    Section("claims", "Claims", claims.section, lambda content: bool(content.rows)),
    Section("faults", "Faults", faults.section, lambda content: bool(content.blocks)),
    Section("training", "Training", training.section),
    Section("rates", "Learning rates", rates.section, lambda content: bool(content.tried)),
    Section("cost", "Memory and time", cost.section, bool),
    Section("speed_ups", "Speed-ups", speed_ups.section, lambda content: bool(content.rows)),
    Section("hardware", None, hardware.section, lambda content: bool(content.blocks)),
    Section("answers", "Answers", answers.section),
    Section("changes", "Changes", lambda facts: facts.changes, bool),
    Section("limits", "Limits", limits.section),
    Section("made", "How it was made", made.section),
)


def render(facts: Facts) -> str:
    """The page as HTML. The same facts give the same bytes."""
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["text"] = formatting.fold
    script = (HERE / "script.js").read_text(encoding="utf-8")
    digest = hashlib.sha256(script.encode()).digest()
    variables = _variables(facts)
    page = environment.get_template("template.html.jinja").render(
        style=Markup((HERE / "style.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_digest=base64.b64encode(digest).decode(),
        **variables,
    )
    return number_parts(move_origins(page, variables["sources"]))


def _variables(facts: Facts) -> dict[str, Any]:
    """The variables of the templates: the content of each section, and what sections share."""
    contents = {section.name: section.content(facts) for section in SECTIONS}
    return contents | {
        "answer": answer.section(facts),
        "sections": [
            (section.name, section.short or contents[section.name].short)
            for section in SECTIONS
            if section.is_shown(contents[section.name])
        ],
        "facts": facts,
        "title": facts.params.report.title,
        "sources": sources(facts),
        "primary_name": english.quality_name(facts.primary),
        "confidence": formatting.percent(facts.params.comparison.confidence),
        "equivalence_confidence": english.equivalence_confidence(facts),
        "in_family": sum(contrast.in_family for contrast in facts.compared.contrasts),
        "seeds": english.listed(facts.params.experiment.seeds),
        "what_seeds_vary": english.what_seeds_vary(facts.params),
        "devices": english.listed(facts.devices),
        "comparison_digest": facts.digests[COMPARISON.as_posix()],
        "model_name": model_name(facts.params.model),
        "dataset_name": dataset_name(facts.params.dataset),
        "environment_lock": ENVIRONMENT.as_posix(),
    }
