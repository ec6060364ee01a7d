"""Render the facts as one self-contained HTML page."""

import base64
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from workflow.report import english, formatting
from workflow.report.facts import ENVIRONMENT
from workflow.report.labels import dataset_name, model_name
from workflow.report.model import Facts
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
    training,
)

HERE = Path(__file__).parent
SHORT_TEXT = 240  # characters, and
SHORT_LINES = 6  # lines: longer texts are folded


@dataclass(frozen=True)
class Section:
    """A part of the page, from `sections/NAME.html.jinja`, at the anchor #NAME."""

    name: str
    short: str  # its title in the contents


@dataclass(frozen=True)
class Text:
    """A text that may be long. `short` is its beginning if it is to be folded, otherwise None."""

    full: str
    short: str | None


def contents(facts: Facts, content: dict[str, Any]) -> list[Section]:
    """The sections with content for this run, in the order of the page.

    Args:
        content: the object of each section, by the section's name.
    """
    candidates = [
        ("evidence", "Evidence", True),
        ("kept", "What is kept", bool(content["kept"])),
        ("quality", "Quality", True),
        ("forgetting", "Forgetting", True),
        ("decomposition", "Decomposition", bool(content["decomposition"].parts)),
        ("categories", "Categories", bool(content["categories"].rows)),
        ("claims", "Claims", bool(facts.compared.claims)),
        ("faults", "Faults", bool(content["faults"].blocks)),
        ("training", "Training", True),
        ("cost", "Memory and time", True),
        ("hardware", content["hardware"].short, bool(facts.hardware)),
        ("answers", "Answers", True),
        ("changes", "Changes", bool(facts.changes)),
        ("limits", "Limits", True),
        ("made", "How it was made", True),
    ]
    return [Section(name, short) for name, short, has_content in candidates if has_content]


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
    """The variables of the templates: an object for each section, and those that sections share."""
    content = {
        "answer": answer.section(facts),
        "evidence": evidence.section(facts),
        "kept": kept.section(facts),
        "quality": quality.section(facts),
        "forgetting": forgetting.section(facts),
        "decomposition": decomposition.section(facts),
        "categories": categories.section(facts),
        "claims": claims.section(facts),
        "faults": faults.section(facts),
        "training": training.section(facts),
        "cost": cost.section(facts),
        "hardware": hardware.section(facts),
        "answers": answers.section(facts),
        "limits": limits.section(facts),
        "made": made.section(facts),
    }
    return content | {
        "facts": facts,
        "title": facts.params.report.title,
        "sections": contents(facts, content),
        "sources": sources(facts),
        "primary_name": english.quality_name(facts.primary),
        "confidence": formatting.percent(facts.params.comparison.confidence),
        "equivalence_confidence": english.equivalence_confidence(facts),
        "in_family": sum(contrast.in_family for contrast in facts.compared.contrasts),
        "seeds": english.listed(facts.params.experiment.seeds),
        "devices": english.listed(facts.devices),
        "model_name": model_name(facts.params.model),
        "dataset_name": dataset_name(facts.params.dataset),
        "environment_lock": ENVIRONMENT.as_posix(),
    }


def fold(text: str) -> Text:
    """A text, with its beginning if it is long enough to be folded."""
    lines = text.splitlines()
    if len(text) <= SHORT_TEXT and len(lines) <= SHORT_LINES:
        return Text(text, None)
    return Text(text, "\n".join(lines[: SHORT_LINES - 2])[: SHORT_TEXT - 60].rstrip() + " …")
