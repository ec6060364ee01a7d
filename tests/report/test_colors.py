"""The colors of the variants stay apart for every kind of color vision, and from the paper."""

import re

import numpy as np
import pytest
from color_vision import contrast, delta_e, lab, least_distance, linear
from conftest import ROOT

from workflow.report.drawing import PALETTE

FEWEST = 11.0  # CIEDE2000; a difference of 2 to 3 is seen side by side


def themes() -> dict[str, dict[str, str]]:
    """The custom properties of the light and the dark theme."""
    style = (ROOT / "workflow/report/style.css").read_text(encoding="utf-8")
    light, dark = re.findall(r":root \{(.*?)\}", style, re.S)[:2]
    properties = [dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block)) for block in (light, dark)]
    return dict(zip(("light", "dark"), properties, strict=True))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colors_of_variants_stay_apart_for_every_kind_of_color_vision(theme):
    properties = themes()[theme]
    colors = [properties[f"variant-{index}"] for index in range(len(PALETTE))]
    assert min(least_distance(colors).values()) > FEWEST
    assert min(contrast(color, properties["paper"]) for color in colors) >= 3.0  # WCAG 2.2, 1.4.11


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [  # of the test data of Sharma, Wu and Dalal (2005)
        ((50.0, 2.6772, -79.7751), (50.0, 0.0, -82.7485), 2.0425),
        ((50.0, 2.49, -0.001), (50.0, -2.49, 0.0011), 7.2195),
        ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
        ((6.7747, -0.2908, -2.4247), (5.8714, -0.0985, -2.2286), 0.6377),
    ],
)
def test_the_distance_is_that_of_the_published_test_data(first, second, distance):
    assert delta_e(np.array(first), np.array(second)) == pytest.approx(distance, abs=1e-4)


def test_gray_has_no_chroma():
    assert lab(linear("#808080"))[1:] == pytest.approx([0, 0], abs=0.01)
