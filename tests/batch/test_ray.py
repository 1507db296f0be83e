"""Ray: two actors make what one process makes, and one that is killed costs no image."""

from __future__ import annotations

import dataclasses
import json
import signal
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from fastguard.batch.pictures import read_record
from fastguard.batch.task import Interrupted, generate
from fastguard.files import JsonLines
from fastguard.policies.presets import policy
from tests.batch.test_docs import examples

pytestmark = pytest.mark.slow

ray = pytest.importorskip("ray")
pytest.importorskip("ray.data")

ROWS = [{"id": f"r{i}", "prompt": f"cat {i % 5}", "seed": i, "policy": ["stp", "dtp"][i % 2]} for i in range(48)]
OPTIONS = {"steps": 4, "batch_size": 4, "progress": False, "device": "cpu"}  # as in docs/ray.md


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]


def actors() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "MapWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            pass
    return found


def test_killed_actor_costs_no_image(model, tmp_path, monkeypatch):
    """The example of docs/ray.md, with one of its actors killed midway."""
    monkeypatch.chdir(tmp_path)
    header = list(ROWS[0])
    rows = [header, *([str(row[name]) for name in header] for row in ROWS)]
    Path("prompts.csv").write_text("".join(",".join(row) + "\n" for row in rows))
    out, killed = tmp_path / "images", []

    def kill():
        end = time.monotonic() + 300
        while time.monotonic() < end:
            if (out / "manifest.jsonl").exists() and len(lines(out)) >= 4 and len(found := actors()) == 2:
                found[0].send_signal(signal.SIGKILL)
                killed.append(len(lines(out)))
                return
            time.sleep(0.01)

    thread = threading.Thread(target=kill)
    thread.start()
    (example,) = examples("ray.md", "python")
    names: dict = {}
    exec(example.replace('"testbed"', repr(model)), names)
    thread.join()
    assert killed and killed[0] < len(ROWS), "no actor was killed midway"
    assert names["summary"].made == len(ROWS)
    assert sorted(line["id"] for line in lines(out)) == sorted(row["id"] for row in ROWS)
    assert not actors()  # the local cluster ended with the job

    generate(model, ROWS, tmp_path / "local", **OPTIONS)
    for row in ROWS:
        ray, local = (np.asarray(Image.open(d / f"{row['id']}.png")).astype(int) for d in (out, tmp_path / "local"))
        assert np.abs(ray - local).max() <= 1
    records = [{line["id"]: line["transition_step"] for line in lines(d)} for d in (out, tmp_path / "local")]
    assert records[0] == records[1]


def test_sigterm_ends_the_job_in_good_order(model, tmp_path, monkeypatch):
    """What the manifest says is there, the cluster is gone, and the rest is made later without making anything twice."""
    out = tmp_path / "out"
    rows, options = ROWS[:24], {**OPTIONS, "steps": 8, "batch_size": 1}
    add, sent = JsonLines.add, []

    def add_and_send(self, records):
        # In the driver, in the middle of the job however fast the actors are: a thread that polls may come too late.
        add(self, records)
        if not sent:
            sent.append(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(JsonLines, "add", add_and_send)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="SIGTERM"):
        generate(model, rows, out, engine="ray", **options)
    assert signal.getsignal(signal.SIGTERM) is before
    assert not actors()
    done = {line["id"]: (out / line["file"]).stat().st_mtime_ns for line in lines(out)}
    assert 0 < len(done) < len(rows)
    generate(model, rows, out, **{**options, "batch_size": 8})
    assert sorted(line["id"] for line in lines(out)) == sorted(row["id"] for row in rows)
    assert all((out / f"{id}.png").stat().st_mtime_ns == stamp for id, stamp in done.items())
    for path in out.glob("*.png"):
        assert read_record(path)["id"] == path.stem


def test_screening_and_remakes(model, tmp_path):
    """The same verdicts, images and remakes as in one process."""
    chosen = dataclasses.replace(
        policy("og+stp", gate=1e6, t_star=400.0, suspect=1e9), provenance={"screen": {"noises": 2, "threshold": 0.05}}
    )
    rows = [{"id": f"r{i}", "prompt": f"cat {i % 3}", "seed": i} for i in range(6)]
    found = []
    for name, engine in (("ray", {"engine": "ray"}), ("local", {})):
        summary = generate(model, rows, tmp_path / name, policy=chosen, screen=True, remake=True, **engine, **OPTIONS)
        found.append({line["id"]: line for line in lines(tmp_path / name)})
        released = sum(line["screen"] is not None and not line["screen"]["flagged"] for line in found[-1].values())
        assert (summary.total, summary.remade) == (6 + released, released) and released
    assert found[0].keys() == found[1].keys()
    for id, ray in found[0].items():
        local = found[1][id]
        assert (ray["policy"], ray["remake_of"]) == (local["policy"], local["remake_of"])
        if ray["screen"]:
            assert ray["screen"]["mean"] == pytest.approx(local["screen"]["mean"], rel=1e-4)
            assert ray["screen"]["flagged"] == local["screen"]["flagged"]
        images = [np.asarray(Image.open(tmp_path / d / f"{id}.png")).astype(int) for d in ("ray", "local")]
        assert np.abs(images[0] - images[1]).max() <= 1
