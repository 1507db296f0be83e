"""Reports: what they say about a finished, an interrupted and a broken call, and how they are written."""

import json
import math
import sys
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch

from fastguard.kernels.layout import State
from fastguard.loop.report import Report
from fastguard.policies.plan import lower
from fastguard.policies.policy import Policy
from fastguard.policies.presets import policy
from tests import tables

NAN, INF = math.nan, math.inf
TIMES = [900.0, 700.0, 500.0, 300.0, 100.0]


def report(policies, d, states, *, shares=None, rows_run=10, **fields) -> Report:
    """A report on K = 5 rows and latents of 4 elements; `states` are what differs from the initial state after all rows."""
    plan = lower(policies, tables.schedule(TIMES), 7.5, elements=4)
    state = plan.state.clone()
    state[:, State.STEP] = 5
    for b, values in enumerate(states):
        for column, value in values.items():
            state[b, column] = value
    trace = torch.tensor(d).T.contiguous()
    loop = SimpleNamespace(state=state, trace=trace, shares=shares)
    made = Report(loop, plan, path="fused", rows_run=rows_run, **fields)
    state.fill_(-99)  # the buffers belong to the next call
    trace.fill_(-99)
    return made


FIRED = {
    State.TRANSITION_STEP: 3,
    State.MINIMUM_STEP: 2,
    State.MARGIN: 0.25,
    State.GATE_STEP: 0,
    State.GATE_D: 16.0,
}


@pytest.fixture
def mixed() -> Report:
    return report(
        [policy("cfg"), policy("og+dtp", gate=1.5), policy("dtp", gate=1.5), policy("dtp")],
        [
            [1, 2, 3, 4, 5],
            [16, 8, 3, 4, 5],
            [4, 4, 4, 4, 4],
            [4, NAN, 4, INF, 4],
        ],
        [
            {},
            FIRED,
            {State.GATE_D: 4.0},
            {State.FORCED: 1, State.TRANSITION_STEP: 3, State.NON_FINITE: 1},
        ],
    )


def test_fields(mixed):
    plain, fired, released, forced = mixed
    assert len(mixed) == 4
    assert mixed[-1] is forced
    assert mixed[1:3] == (fired, released)
    assert plain.d_curve == (1, 2, 3, 4, 5)
    assert plain.rms_curve == tuple(math.sqrt(d / 4) for d in (1, 2, 3, 4, 5))
    assert plain.timesteps == tuple(TIMES)
    assert (plain.gate, plain.transition_step, plain.transition_timestep, plain.margin) == (
        None,
        None,
        None,
        None,
    )
    assert fired.gate == {"caught": True, "rms": 2.0, "threshold": 1.5, "step": 0}
    assert (fired.transition_step, fired.transition_timestep) == (3, 300)
    assert (fired.minimum_step, fired.minimum_timestep, fired.margin) == (2, 500, 0.25)
    assert not fired.forced
    assert released.gate == {"caught": False, "rms": 1.0, "threshold": 1.5, "step": None}
    assert (forced.forced, forced.non_finite) == (True, 1)
    assert math.isnan(forced.d_curve[1])
    assert forced.d_curve[3] == INF
    assert all(image.denoiser_rows == 10 for image in mixed)
    assert fired.policy == policy("og+dtp", gate=1.5)


def test_skipped_branches_are_holes():
    stp = report([policy("stp", t_star=500)], [[NAN, NAN, 3, 4, 5]], [{State.TRANSITION_STEP: 2}])
    assert stp[0].d_curve == (None, None, 3, 4, 5)
    assert stp[0].rms_curve[0] is None


def test_interrupted():
    """Rows that never ran are holes too, even after a non-finite one; the counts are those of what ran."""
    stopped = report(
        [policy("dtp")],
        [[1, NAN, 3, NAN, NAN]],
        [{State.STEP: 3, State.NON_FINITE: 1}],
        rows_run=5,
    )
    assert stopped[0].d_curve[3:] == (None, None)
    assert math.isnan(stopped[0].d_curve[1])
    assert stopped[0].denoiser_rows == 5


def test_gate_before_its_first_observation():
    image = report([policy("dtp", gate=1.0)], [[NAN] * 5], [{State.STEP: 0}])[0]
    assert image.gate == {"caught": False, "rms": None, "threshold": 1.0, "step": None}
    assert "no finite observation" in str(image)


def test_text(mixed):
    lines = repr(mixed).splitlines()
    assert len(lines) == 5
    assert lines[0] == "4 images, fused path"
    assert "plain guidance" in lines[1]
    assert "caught at row 0 (RMS 2 >= 1.5)" in lines[2]
    assert "transition at row 3, t = 300 (minimum at t = 500, margin 25.00%)" in lines[2]
    assert "not caught (RMS 1 < 1.5)" in lines[3]
    assert "forced at row 3" in lines[4]
    assert "NOT FINITE from row 1" in lines[4]
    one = report([policy("dtp")], [[1] * 5], [{}], reason="clip_sample is not linear")
    assert repr(one).startswith("1 image, fused path: clip_sample is not linear\n")
    assert "no transition" in repr(one)


def test_a_table_for_notebooks_says_what_happened():
    caught = {State.TRANSITION_STEP: 3, State.GATE_STEP: 0, State.GATE_D: 16.0}
    made = report([policy("og+dtp", gate=1.5, name="<mine>"), policy("cfg")], [[16, 8, 3, 4, 5], [1] * 5], [caught, {}])
    root = ElementTree.fromstring(f"<div>{made._repr_html_()}</div>")
    first, second = ([cell.text or "" for cell in line.findall("td")] for line in root.findall("table/tr")[1:])
    assert root.find("p").text == "2 images, fused path"
    assert first[:2] == ["0", "<mine>"] and "caught at row 0" in first[2] and "transition at row 3" in first[3]
    assert second == ["1", "cfg", "", "plain guidance", "10"] and first[4] == "10"
    assert len(ElementTree.fromstring(f"<div>{made[1]._repr_html_()}</div>").findall("table/tr")) == 2


def test_json(mixed, tmp_path):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    path = tmp_path / "report.json"
    text = mixed.to_json(path)
    values = json.loads(path.read_text(), parse_constant=refuse)
    assert json.loads(text) == values
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]
    assert values["path"] == "fused"
    fired, forced = values["images"][1], values["images"][3]
    assert forced["d_curve"] == [4, None, 4, None, 4]
    assert forced["non_finite"] == 1
    assert fired["gate"]["rms"] == 2.0
    assert Policy.from_dict(fired["policy"]) == policy("og+dtp", gate=1.5)


def test_device_is_read_once_and_late(monkeypatch):
    copies = []
    original = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: copies.append(1) or original(self))
    made = report([policy("dtp")] * 2, [[1] * 5] * 2, [{}, {}])
    assert len(made) == 2
    assert copies == [], "making a report reads nothing"
    made.to_json()
    repr(made)
    assert list(made)
    assert copies == [1]


def test_plot(mixed, tmp_path):
    pytest.importorskip("matplotlib")
    figure = mixed.plot(tmp_path / "curves.svg")
    text = (tmp_path / "curves.svg").read_text()
    assert text.startswith("<?xml")
    axes = figure.axes[0]
    curves = [line for line in axes.lines if not str(line.get_label()).startswith("_")]
    assert [line.get_label() for line in curves] == ["0: cfg", "1: og+dtp", "2: dtp", "3: dtp"]
    assert list(curves[1].get_ydata()) == pytest.approx([2, math.sqrt(2), math.sqrt(0.75), 1, math.sqrt(1.25)])
    assert axes.xaxis_inverted()
    (gate,) = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert set(gate.get_ydata()) == {1.5}
    marks = {
        (line.get_marker(), *line.get_xdata(), *line.get_ydata()) for line in axes.lines if line.get_marker() in "ov"
    }
    assert ("o", 300.0, 1.0) in marks
    hollow = [line.get_markerfacecolor() == "white" for line in axes.lines if line.get_marker() == "o"]
    assert hollow == [False, True], "forced by the deadline: hollow"
    assert ("v", 500.0, math.sqrt(0.75)) in marks


def test_a_plot_shows_the_shares_of_anchored_images_on_an_axis_of_their_own():
    colors = pytest.importorskip("matplotlib.colors")
    shares = torch.tensor([[NAN] * 5, [1, 0.75, 0.5, NAN, 0.25]]).T
    figure = report([policy("cfg"), policy("anchored")], [[4, 4, 4, 4, 4]] * 2, [{}, {}], shares=shares).plot()
    left, right = figure.axes
    assert right.get_ylabel() == "share of the guidance that leads to the anchor (dashed)"
    assert right.yaxis.get_label_position() == "right" and right.xaxis_inverted()
    plain, anchored = right.lines
    assert anchored.get_linestyle() == "--" and colors.same_color(anchored.get_color(), left.lines[1].get_color())
    assert list(anchored.get_xdata()) == TIMES
    assert list(anchored.get_ydata()) == pytest.approx([1, 0.75, 0.5, NAN, 0.25], nan_ok=True)
    assert all(map(math.isnan, plain.get_ydata()))


def test_a_plot_without_anchored_images_has_one_axis(mixed):
    pytest.importorskip("matplotlib")
    assert len(mixed.plot().axes) == 1


def test_plot_of_a_transition_without_a_curve(tmp_path):
    """A static transition at a row without d is a line, and a curve of zeros or none at all does not break the axis."""
    pytest.importorskip("matplotlib")
    for d in ([NAN] * 5, [0] * 5):
        made = report([policy("stp", t_star=100)], [d], [{State.TRANSITION_STEP: 4}])
        made.plot(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_shows_points_that_no_line_goes_through():
    pytest.importorskip("matplotlib")
    figure = report([policy("cfg")], [[1, NAN, 4, 9, NAN]], [{}]).plot()
    (curve,) = figure.axes[0].lines
    assert curve.get_marker() == "." and list(curve.get_xdata()) == TIMES
    assert list(curve.get_ydata()) == pytest.approx(
        [0.5, NAN, 1, 1.5, NAN], nan_ok=True
    )  # the root of d over 4 elements


def test_plot_without_matplotlib(mixed, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"diffusers-fastguard\[plot\]"):
        mixed.plot()
