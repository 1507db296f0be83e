"""The demo page: complete, self-contained, and true to the numbers beside it."""

import json
import re
from dataclasses import replace

import matplotlib.figure
import numpy as np
import pytest

from fastguard import policy, testbed
from fastguard.testbed.demo import (
    FREE,
    MODES,
    SHIPPED,
    as_table,
    chosen,
    draw_curves,
    draw_grid,
    lead,
    make_jobs,
    run_demo,
    summary,
)


def measured(kind, mode, caught, copy, faithful):
    gate = None if mode == FREE else {"caught": caught}
    return {"kind": kind, "mode": mode, "gate": gate, "copy": copy, "similarity": 0.5, "faithful": faithful}


def made_up():
    """Of ten D images nine are copies unguarded, the gate catches seven, three stay copies; of four ordinary ones it catches one.

    Four of the ten D pictures are faithful, three of them copies; the T one is a copy without the guard.
    """
    rows = []
    for mode in MODES:
        for i in range(10):
            rows.append(measured("D", mode, i < 7, i < (9 if mode == FREE else 3), i in (0, 1, 2, 9)))
        rows.append(measured("T", mode, True, mode == FREE, False))
        rows += [measured("ordinary", mode, i == 0, None, i < 3) for i in range(4)]
    return rows


def test_the_sentences_say_what_was_measured():
    assert lead(summary(made_up())) == (
        "Without a guard 90% of the images of the memorized D prompts are copies of their training image. The gate caught 7 of these 10, and "
        "under the shipped policy 30% of all are copies. Of the 4 ordinary images it touched 1; the others are what they are without a guard, "
        "bit for bit."
    )


def test_the_tables_say_what_was_measured():
    lines = summary(made_up())
    assert as_table("D", lines)["rows"] == [
        [mode, "10", *(("0", "90%", "0.50", "100%") if mode == FREE else ("7", "30%", "0.50", "14%"))] for mode in MODES
    ]
    assert as_table("T", lines)["rows"][:2] == [
        [FREE, "1", "0", "100%", "0.50", ""],
        ["stp", "1", "1", "0%", "0.50", "0%"],
    ]
    assert as_table("ordinary", lines)["rows"] == [
        [mode, "4", "0" if mode == FREE else "1", "", "0.50", "75%"] for mode in MODES
    ]


def figures(monkeypatch):
    made = []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda self, path, **_: made.append(self))
    return made


def test_the_curves_are_d_and_the_share_and_the_gate_is_where_it_is_compared(monkeypatch, tmp_path):
    made = figures(monkeypatch)
    row = {"kind": "D", "d_curve": [512.0, 128.0, 32.0, 8.0], "timesteps": [900.0, 600.0, 300.0, 0.0]}
    rows = [
        row | {"mode": FREE, "gate": None, "share_curve": None},
        row | {"mode": SHIPPED, "gate": {"caught": True}, "share_curve": [1.0, 0.5, 0.2, 0.1]},
        row | {"mode": SHIPPED, "gate": {"caught": False}, "share_curve": [1.0, 0.9, 0.8, 0.7]},
    ]
    own = replace(policy(testbed.policy_path()), gate=0.25)
    for steps in (1, 3):
        draw_curves(tmp_path / "curves.png", rows, replace(own, gate_steps=steps))
    for figure, steps in zip(made, (1, 3), strict=True):
        free, shipped, share = figure.axes
        for axis in (free, shipped):
            gate = [line for line in axis.lines if set(line.get_ydata()) == {0.25}]
            assert [list(line.get_xdata()) for line in gate] == [row["timesteps"][:steps]]
        assert list(free.lines[0].get_ydata()) == [1.0, 0.5, 0.25, 0.125]
        assert [list(line.get_ydata()) for line in share.lines] == [[1.0, 0.5, 0.2, 0.1]]


def test_copies_have_a_red_frame(monkeypatch, tmp_path):
    made, shown = figures(monkeypatch), chosen()[:2]
    copies = np.zeros((len(MODES), 2), bool)
    copies[0, 1] = True
    draw_grid(tmp_path / "grid.png", shown, np.zeros((len(MODES), 2, 32, 32, 3), np.uint8), copies)
    framed = [all(spine.get_visible() for spine in axis.spines.values()) for axis in made[0].axes]
    assert framed == [False] * (len(MODES) + 2) + [True] + [False] * (len(MODES) - 1)


def test_every_guard_has_the_shipped_gate():
    shipped = policy(testbed.policy_path())
    jobs = make_jobs(chosen(), 1, shipped)
    gates = {mode: {job.policy.gate for job in jobs[i * 10 : i * 10 + 10]} for i, mode in enumerate(MODES)}
    assert gates == {mode: {None if mode == FREE else shipped.gate} for mode in MODES}
    assert {job.policy for job in jobs[-10:]} == {shipped}


@pytest.mark.slow
def test_demo_writes_a_self_contained_page(tmp_path, capsys):
    paths = run_demo(tmp_path / "made" / "here", seeds=1)
    assert "50 images: 100%" in capsys.readouterr().err
    assert [p.name for p in paths] == ["grid.png", "curves.png", "table.json", "index.html"]
    html = paths[-1].read_text()
    assert html.count("data:image/png;base64,") == 2
    assert not re.search(r"(src|href)=\"(?!data:)", html)
    lines = json.loads(paths[2].read_text())
    assert [line["mode"] for line in lines if line["kind"] == "D"] == list(MODES)
    ordinary = [line for line in lines if line["kind"] == "ordinary"]
    assert len({line["caught by the gate"] for line in ordinary[1:]}) == 1
    assert lead(lines) in html
    rows = [re.findall("<td>(.*?)</td>", row) for row in re.findall("<tr>(.*?)</tr>", html)]
    assert [row for row in rows if row] == [
        row for kind in ("D", "T", "ordinary") for row in as_table(kind, lines)["rows"]
    ]
    for explained in ("Copy: ", "Similarity: ", "Faithful: ", "Red frame: ", "leads to the anchor"):
        assert explained in html
