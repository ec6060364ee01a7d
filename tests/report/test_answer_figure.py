"""The figure of the answer, measured: every point of its SVG stands where the published CSV says."""

import contextlib
import re
from dataclasses import replace
from xml.etree import ElementTree

import pandas as pd
import pytest
from made_up_results import VARIANTS, write, write_lock
from report_reader import facts

from workflow.report.dot_table import pareto
from workflow.report.english import served
from workflow.report.sections.answer_figure import answer_figure
from workflow.report.summary import summary_table
from workflow.runtime.forms import AS_TRAINED

MINUS, NARROW = "\N{MINUS SIGN}", "\N{NO-BREAK SPACE}"
LORA = "lora_16bit"


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    with contextlib.chdir(tmp_path_factory.mktemp("several")):
        write(variants=tuple(VARIANTS))
        write_lock()
        return facts()


def numbers(text: str) -> float:
    return float(re.sub(f"[{NARROW}%]", "", text).replace(MINUS, "-"))


def scale(ticks: list[tuple[float, float]], x: float) -> float:
    """The value at a place, by the axis's own ticks."""
    (x0, v0), *_, (x1, v1) = ticks
    assert all(
        v0 + (x - x0) / (x1 - x0) * (v1 - v0) == pytest.approx(v, abs=0.02 * abs(v1 - v0)) for x, v in ticks
    )
    return v0 + (x - x0) / (x1 - x0) * (v1 - v0)


def measured(panel) -> dict[str, dict[str, float]]:
    """By label, the values on both axes, the ends of the interval and the height, measured in the drawing."""
    svg = ElementTree.fromstring(str(panel.svg))
    ticks = [(float(t.get("x")), t.text) for t in svg.iter("text") if t.get("class") == "tick"]
    quality = [(x, numbers(text)) for x, text in ticks if x < 240]
    memory = [(x, numbers(text)) for x, text in ticks if x > 240]
    rows = {}
    for row in (g for g in svg.iter("g") if g.get("class") == "dots-row"):
        points = {
            p.get("class").split()[1]: re.findall(r"[\d.-]+", p.get("transform"))
            for p in row
            if "point" in p.get("class", "")
        }
        (x, y), (m, _) = ([float(n) for n in points[name]] for name in ("quality", "memory"))
        found = {"value": scale(quality, x), "memory": scale(memory, m), "y": y, "x": x}
        intervals = [p.get("d") for p in row if p.get("class") == "interval"]
        if len(intervals) == 2:
            low, _, high = (float(n) for n in re.findall(r"[\d.]+", intervals[0]))
            found |= {"low": scale(quality, low), "high": scale(quality, high)}
        rows[row[0].text] = found
    return rows


def table(found) -> pd.DataFrame:
    frame = summary_table(found)
    return frame.set_index(["variant", "form", "metric"])


def unstated(found):
    """The facts with no share of the gain, as of an older comparison."""
    return replace(found, compared=replace(found.compared, shares=[]))


@pytest.mark.parametrize("stated", [True, False])
def test_every_point_stands_where_the_csv_says(several, stated):
    found = several if stated else unstated(several)
    rows, figure = table(found), answer_figure(found)
    assert figure.of_gain == stated
    short = {variant.label: variant.name for variant in found.variants}
    seen = 0
    forms = {f"Served {served(form)}": form for form in found.params.evaluation.forms}
    for panel in figure.panels:
        form = forms[panel.title]
        for label, place in measured(panel).items():
            name = short[label]
            assert place["memory"] == pytest.approx(
                rows.loc[name, "training", "peak_memory"]["value"], abs=0.002
            )
            seen += 1
            if (name, form) == (LORA, AS_TRAINED):
                assert place["value"] == pytest.approx(100 if stated else 0, abs=1e-3 if not stated else 0.1)
                continue
            metric, value, factor = (
                ("nats_per_token:share_of_gain", "value", 100)
                if stated
                else ("nats_per_token", "difference", 1)
            )
            row = rows.loc[name, form, metric]
            near = {"abs": 0.003 * factor}
            assert place["value"] == pytest.approx(factor * row[value], **near)
            assert place["low"] == pytest.approx(factor * row["low"], **near)
            assert place["high"] == pytest.approx(factor * row["high"], **near)
    assert seen == sum(len(found.forms_of(variant.name)) for variant in found.variants)


def test_variants_without_measured_memory_have_no_row_beside_those_with_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(variants=tuple(VARIANTS), measured=(LORA, "qlora_nf4"))
    found = facts()
    figure = answer_figure(found)
    labels = {variant.name: variant.label for variant in found.variants}
    for panel in figure.panels:
        assert set(measured(panel)) <= {labels[LORA], labels["qlora_nf4"]}
    assert all(label in figure.left_out for name, label in labels.items() if name not in (LORA, "qlora_nf4"))


def test_without_measured_memory_quality_stands_alone_where_the_csv_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(variants=tuple(VARIANTS), measured=())
    found = facts()
    rows, figure = table(found), answer_figure(found)
    assert not figure.has_memory and not figure.left_out
    svg = ElementTree.fromstring(str(figure.panels[0].svg))
    ticks = [(float(t.get("x")), numbers(t.text)) for t in svg.iter("text") if t.get("class") == "tick"]
    names = {variant.label: variant.name for variant in found.variants}
    drawn = [group for group in svg.iter("g") if group.get("class") == "dots-row"]
    assert [names[group[0].text] for group in drawn] == list(VARIANTS)
    for group in drawn:
        (point,) = (part for part in group if "point" in part.get("class", ""))
        x = float(re.findall(r"[\d.-]+", point.get("transform"))[0])
        if names[group[0].text] != LORA:
            share = rows.loc[names[group[0].text], AS_TRAINED, "nats_per_token:share_of_gain"]["value"]
            assert scale(ticks, x) == pytest.approx(100 * share, abs=0.3)
    assert "pareto" not in {part.get("class") for part in svg.iter()}


@pytest.mark.parametrize("stated", [True, False])
def test_worse_is_on_the_left(several, stated):
    panel = answer_figure(several if stated else unstated(several)).panels[0]
    rows = measured(panel)
    worse, better = (next(r for label, r in rows.items() if name in label) for name in ("FP4", "full"))
    assert worse["x"] < better["x"]


def test_no_label_covers_a_point_and_rows_are_sorted_by_memory(several):
    for panel in answer_figure(several).panels:
        svg = ElementTree.fromstring(str(panel.svg))
        places = measured(panel)
        heights = [place["y"] for place in places.values()]
        labels = [float(t.get("y")) for row in svg.iter("g") for t in row if t.tag == "text"]
        assert all(
            abs(y - label) > 8 for y in heights for label in labels
        )  # its height is 11, above its baseline
        assert [p["memory"] for p in places.values()] == sorted(p["memory"] for p in places.values())


def test_the_pareto_line_goes_through_what_nothing_with_less_memory_surpasses():
    assert pareto([3.0, 2.0, 3.0, 5.0, 4.0, 6.0]) == [0, 3, 5]


def test_the_axis_of_quality_names_its_worse_side_and_the_margin_is_shaded(several):
    for panel in answer_figure(several).panels:
        assert "← worse" in panel.svg and 'class="band"' in panel.svg


def test_without_a_difference_there_is_no_figure(several):
    assert answer_figure(replace(several, compared=replace(several.compared, contrasts=[]))) is None
