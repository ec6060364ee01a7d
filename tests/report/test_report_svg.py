"""Drawings keep every line, marker and text when they are made small."""

import re
import xml.etree.ElementTree as ET

import pytest

from workflow.report.drawing import matplotlib_svg
from workflow.report.svg import SVG, compact


def draw(axes) -> None:
    axes.plot([0, 1, 2], [3, 1, 2], color="#0173b2", marker="o")
    axes.barh([1, 2], [1.0, 2.0], color="#de8f05", alpha=0.5)
    for x in (0.5, 1.5):
        axes.plot([x, x], [1, 3], color="#029e73")
    axes.text(1, 2, "a < b & c")


@pytest.fixture(scope="module")
def drawings() -> tuple[str, str]:
    large = matplotlib_svg("key", draw, height=200, width=300, bare=False)
    return large, compact(large)


def points(svg: str) -> list[tuple[float, float]]:
    """The corners of all visible lines and areas, and the places of all markers, in order of size."""
    found = []
    for element in ET.fromstring(svg).iter():
        is_empty = "fill: none" in element.get("style", "") and "stroke:" not in element.get("style", "")
        numbers = []
        if element.tag == f"{{{SVG}}}path" and not element.get("id", "").startswith("m") and not is_empty:
            numbers = [float(number) for number in re.findall(r"-?\d+\.?\d*", element.get("d"))]
        elif element.tag == f"{{{SVG}}}use":
            numbers = [float(element.get("x")), float(element.get("y"))]
        found += zip(numbers[::2], numbers[1::2], strict=True)
    return sorted(found)


def test_every_point_stays_where_it_was(drawings):
    before, after = map(points, drawings)
    assert len(before) == len(after) > 20
    for one, other in zip(before, after, strict=True):
        assert one == pytest.approx(other, abs=0.0101)


def test_every_text_stays_and_every_reference_is_met(drawings):
    texts = [["".join(e.itertext()) for e in ET.fromstring(svg).iter(f"{{{SVG}}}text")] for svg in drawings]
    assert texts[0] == texts[1] and "a < b & c" in texts[1]
    ids = set(re.findall(r'\bid="([^"]*)"', drawings[1]))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]*)', drawings[1])) <= ids


def test_there_are_far_fewer_elements(drawings):
    large, small = (len(list(ET.fromstring(svg).iter())) for svg in drawings)
    assert small < large / 2
