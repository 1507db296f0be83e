"""Reports in notebooks: what the table says, and where the drawn curve has its points."""

import math
from xml.etree import ElementTree

import pytest

from fastguard.kernels.layout import State
from fastguard.loop.notebook import HEIGHT, WIDTH, curve
from fastguard.policies.presets import policy
from tests.loop.test_report import report


def test_a_table_says_what_happened():
    caught = {State.TRANSITION_STEP: 3, State.GATE_STEP: 0, State.GATE_D: 16.0}
    made = report([policy("og+dtp", gate=1.5, name="<mine>"), policy("cfg")], [[16, 8, 3, 4, 5], [1] * 5], [caught, {}])
    root = ElementTree.fromstring(f"<div>{made._repr_html_()}</div>")
    first, second = ([cell.text or "" for cell in line.findall("td")] for line in root.findall("table/tr")[1:])
    assert root.find("p").text == "2 images, fused path"
    assert first[:2] == ["0", "<mine>"] and "caught at row 0" in first[2] and "transition at row 3" in first[3]
    assert second[:4] == ["1", "cfg", "", "plain guidance"] and first[5] == second[5] == "10"
    assert len(ElementTree.fromstring(f"<div>{made[1]._repr_html_()}</div>").findall("table/tr")) == 2


def test_the_curve_is_logarithmic_and_has_gaps():
    points = [line.get("points") for line in ElementTree.fromstring(curve([1.0, 10.0, None, 100.0, 0.0]))]
    assert points == [f"0.0,{HEIGHT - 1:.1f} {WIDTH / 4:.1f},{HEIGHT / 2:.1f}", f"{WIDTH * 3 / 4:.1f},1.0"]


@pytest.mark.parametrize("values", [[], [None, 1.0], [math.nan, math.inf]])
def test_nothing_to_draw(values):
    assert curve(values) == ""
