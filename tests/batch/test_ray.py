"""Ray: two actors make what one process makes, and one that is killed costs no image."""

from __future__ import annotations

import json
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from PIL import Image

from fastguard.generate import generate, prepare
from tests.batch.test_docs import examples

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


def test_pipeline_cannot_be_sent(pipe, tmp_path):
    with pytest.raises(ValueError, match="is a pipeline already"):
        prepare(pipe, ["a cat"], tmp_path, engine="ray")


def test_retries_have_an_end(model, tmp_path, monkeypatch):
    """A task over which actors die again and again fails with its images named, instead of running for ever."""
    import pickle

    import pyarrow
    import ray

    from fastguard.batch.pictures import Picture
    from fastguard.batch.prompt_files import load
    from fastguard.batch.ray_engine import TRIES, Ledger, Worker
    from fastguard.batch.request import Defaults
    from fastguard.policy import policy
    from tests import pipelines

    ledger = Ledger()
    remote = SimpleNamespace(begin=SimpleNamespace(remote=ledger.begin))  # without a cluster
    monkeypatch.setattr(ray, "get", lambda value: value)
    batch = load(["a cat", "a dog"], Defaults(policy=policy("cfg"), steps=1))[0]
    table = pyarrow.table({"batch": pyarrow.array([pickle.dumps(batch)], pyarrow.large_binary())})
    worker = Worker(pipelines.sd, {}, Picture(), True, remote)

    def run():
        return [pickle.loads(data) for out in worker(table) for data in out.column("result").to_pylist()]

    for _ in range(TRIES):
        assert [made.request.id for made in run()] == ["00000-0", "00001-0"]
    assert [failed.request.id for failed in run()] == ["00000-0", "00001-0"]
    assert f"actors died {TRIES} times" in run()[0].message
    worker.keep_going = False
    (error,) = run()
    assert "id='00000-0': actors died" in str(error)
