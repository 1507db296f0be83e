"""The demo page: complete, self-contained, and true to the numbers beside it."""

import json
import re

from fastguard.testbed.demo import MODES, run_demo


def test_demo_writes_a_self_contained_page(tmp_path):
    paths = run_demo(tmp_path, seeds=1)
    assert [p.name for p in paths] == ["grid.png", "curves.png", "table.json", "index.html"]
    html = paths[-1].read_text()
    assert html.count("data:image/png;base64,") == 2
    assert not re.search(r"(src|href)=\"(?!data:)", html)
    lines = json.loads(paths[2].read_text())
    assert [line["mode"] for line in lines if line["kind"] == "D"] == list(MODES)
    ordinary = [line for line in lines if line["kind"] == "ordinary"]
    assert len({(line["faithful"], line["caught by the gate"]) for line in ordinary[1:]}) == 1
