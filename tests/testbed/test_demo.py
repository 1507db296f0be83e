"""The demo page: complete, self-contained, and true to the numbers beside it."""

import json
import re

from fastguard import policy, testbed
from fastguard.testbed.demo import MODES, as_table, chosen, lead, make_jobs, run_demo, summary


def measured(kind, mode, caught, copy, faithful):
    gate = None if mode == "none" else {"caught": caught}
    return {"kind": kind, "mode": mode, "gate": gate, "copy": copy, "similarity": 0.5, "faithful": faithful}


def made_up():
    """Of ten D images nine are copies unguarded, the gate catches seven, three stay copies; of four ordinary ones it catches one."""
    rows = []
    for mode in MODES:
        for i in range(10):
            rows.append(measured("D", mode, i < 7, i < (9 if mode == "none" else 3), i < 4))
        rows.append(measured("T", mode, True, mode == "none", False))
        rows += [measured("ordinary", mode, i == 0, None, i < 3) for i in range(4)]
    return rows


def cells(table):
    return [re.findall("<td>(.*?)</td>", row) for row in re.findall("<tr>(.*?)</tr>", table)][1:]


def test_the_sentences_say_what_was_measured():
    assert lead(summary(made_up())) == (
        "Under plain guidance 90% of the images of the memorized D prompts are copies of their training image. The gate caught 7 of "
        "these 10, and under the default 30% of all are copies; those that it missed are left as they were. Of the 4 ordinary images "
        "it touched 1."
    )


def test_the_tables_say_what_was_measured():
    lines = summary(made_up())
    assert cells(as_table("D", lines)) == [
        [mode, "10", *(("0", "90%") if mode == "none" else ("7", "30%")), "0.50", "40%"] for mode in MODES
    ]
    assert cells(as_table("ordinary", lines)) == [
        [mode, "4", "0" if mode == "none" else "1", "", "0.50", "75%"] for mode in MODES
    ]


def test_every_guard_has_the_shipped_gate():
    shipped = policy(testbed.policy_path())
    jobs = make_jobs(chosen(), 1, shipped.gate)
    gates = {mode: {job.policy.gate for job in jobs[i * 10 : i * 10 + 10]} for i, mode in enumerate(MODES)}
    assert gates == {mode: {None if mode == "none" else shipped.gate} for mode in MODES}
    assert {job.policy for job in jobs[-10:]} == {shipped}


def test_demo_writes_a_self_contained_page(tmp_path, capsys):
    paths = run_demo(tmp_path, seeds=1)
    assert "50 images: 100%" in capsys.readouterr().err
    assert [p.name for p in paths] == ["grid.png", "curves.png", "table.json", "index.html"]
    html = paths[-1].read_text()
    assert html.count("data:image/png;base64,") == 2
    assert not re.search(r"(src|href)=\"(?!data:)", html)
    lines = json.loads(paths[2].read_text())
    assert [line["mode"] for line in lines if line["kind"] == "D"] == list(MODES)
    ordinary = [line for line in lines if line["kind"] == "ordinary"]
    assert len({(line["faithful"], line["caught by the gate"]) for line in ordinary[1:]}) == 1
    assert lead(lines) in html and all(as_table(kind, lines) in html for kind in ("D", "T", "ordinary"))
