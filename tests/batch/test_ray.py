"""Ray: two actors make what one process makes, and one that is killed costs no image."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import re
import signal
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pyarrow
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from fastguard.batch.conveyor import Failed
from fastguard.batch.options import JobOptions
from fastguard.batch.pictures import Picture, read_record
from fastguard.batch.prompt_files import load
from fastguard.batch.ray_runner import TRIES, Ledger, RayRunner, Worker, check_resources
from fastguard.batch.store import Made
from fastguard.batch.task import Interrupted, generate, prepare
from fastguard.commands.cli import app
from fastguard.policies.presets import policy
from tests import pipelines
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


def test_sigterm_ends_the_job_in_good_order(model, tmp_path):
    """What the manifest says is there, the cluster is gone, and the rest is made later without making anything twice."""
    out = tmp_path / "out"
    rows, options = ROWS[:24], {**OPTIONS, "steps": 8, "batch_size": 1}

    def send():
        end = time.monotonic() + 300
        while time.monotonic() < end:
            if (out / "manifest.jsonl").exists() and lines(out):
                os.kill(os.getpid(), signal.SIGTERM)
                return
            time.sleep(0.01)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=send)
    thread.start()
    with pytest.raises(Interrupted, match="SIGTERM"):
        generate(model, rows, out, engine="ray", **options)
    thread.join()
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


def runner(**options) -> RayRunner:
    return RayRunner(None, settings={}, options=JobOptions(engine="ray", **options))


def test_address_is_passed_on(monkeypatch):
    given = {}
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: given.update(options))
    monkeypatch.setattr(ray, "shutdown", lambda: given.clear())
    monkeypatch.setattr(ray, "nodes", lambda: machines((64, 0)))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for address in ("auto", f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
            made = runner(ray_address=address)
            made.start()
            assert given["address"] == address
            assert "num_cpus" not in given  # of a cluster that is there already
            made.close()
            assert not given  # left, as it was joined
    made = runner(actors=3, cpus_per_actor=1.5)
    made.start()
    assert given["address"] == "local"
    assert given["num_cpus"] >= 6  # the actors' 4.5 and one for Ray Data


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("nonsense", "Invalid address format"),
        ("127.0.0.1:1", "no Ray cluster answers there: .*refused"),
        ("ray://127.0.0.1:1", "no Ray cluster answers there: .*refused"),
        ("127.0.0.1:99999", "no Ray cluster answers there"),
    ],
)
def test_wrong_address(model, tmp_path, address, reason):
    arguments = [
        "--out",
        str(tmp_path),
        "--prompt",
        "a cat",
        "--engine",
        "ray",
        "--ray-address",
        address,
        "--steps",
        "1",
    ]
    result = CliRunner().invoke(app, ["generate", model, "--policy", "cfg", "--device", "cpu", *arguments])
    assert result.exit_code == 2
    assert re.search(f"error: ray_address='{address}': {reason}", result.output)
    assert not ray.is_initialized()
    assert not list(tmp_path.iterdir())


def test_resources_are_passed_on(monkeypatch):
    given = {}

    class Items:
        def map_batches(self, worker, **options):
            given.update(options)

    data = SimpleNamespace(from_items=lambda items, **_: Items(), ActorPoolStrategy=lambda size: size)
    ledger = SimpleNamespace(remote=lambda: None)
    monkeypatch.setattr(ray, "remote", lambda kind: SimpleNamespace(options=lambda **_: ledger))
    batches = [[row] for row in ROWS]
    for gpus, passed in ((0, None), (0.25, 0.25), (1, 1.0), (2, 2.0)):
        runner(actors=2, cpus_per_actor=0.5, gpus_per_actor=gpus)._dataset(data, batches)
        assert (given["num_gpus"], given["num_cpus"], given["compute"]) == (passed, 0.5, 2)


def machines(*amounts: tuple[float, float]) -> list[dict]:
    """As ray.nodes() lists them: CPUs and GPUs of each."""
    return [{"Alive": True, "Resources": {"CPU": cpus, **({"GPU": gpus} if gpus else {})}} for cpus, gpus in amounts]


@pytest.mark.parametrize(
    ("actors", "cpus", "gpus", "held"),
    [
        (1, 1, 1, 0),
        (4, 1, 0.5, 4),
        (5, 1, 0.5, 4),
        (2, 4, 0, 2),
        (3, 4, 0, 2),
        (1, 8, 0, 0),
        (9, 0, 0, 9),
        (3, 0.1, 1, 2),
    ],
)
def test_a_cluster_that_is_too_small(actors, cpus, gpus, held):
    """Two machines of 4 CPUs, one of them with two GPUs; no actor is on both. Without it Ray would wait for ever."""
    nodes = [*machines((4, 2 if (actors, gpus) != (1, 1) else 0), (4, 0)), {"Alive": False, "Resources": {"GPU": 99}}]
    if held >= actors:
        check_resources(nodes, actors, cpus, gpus)
        return
    with pytest.raises(
        ValueError, match=rf"actors={actors}, cpus_per_actor={cpus:g}, gpus_per_actor={gpus:g}: .* {held} of the actors"
    ):
        check_resources(nodes, actors, cpus, gpus)


def test_gpus_that_are_not_there(model, tmp_path):
    """Told before any work, and a run that made no image leaves the directory free for others."""
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(
        ValueError, match=r"gpus_per_actor=1: the cluster of 1 machine has 0 GPUs|has .* CPUs and 0 GPUs"
    ):
        generate(model, ["a cat"], tmp_path, engine="ray", gpus_per_actor=1, progress=False)
    assert not list(tmp_path.iterdir())


def test_a_model_that_actors_cannot_load(monkeypatch):
    """Its reason arrives as an error of the job, in one line; a constructor that raises would be tried for ever."""

    def load():
        raise ValueError("model='x': cannot be loaded: cut")

    worker = Worker(load, {}, Picture(), True, None)
    (table,) = worker(pyarrow.table({"batch": pyarrow.array([pickle.dumps([])], pyarrow.large_binary())}))
    ((error,),) = [pickle.loads(data) for data in table.column("group").to_pylist()]
    assert isinstance(error, ValueError) and "cut" in str(error)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("gpus_per_actor", value) for value in (-1, -0.5, float("nan"), float("inf"), 1e-9, 1.5, 10**400, True)],
        *[("cpus_per_actor", value) for value in (-1, float("nan"), 1e-9, 1e30)],
        *[("actors", value) for value in (0, -1, 10**30, 1.5)],
    ],
    ids=lambda value: str(value)[:20],
)
def test_resources_that_cannot_be(model, tmp_path, name, value):
    with pytest.raises(ValueError, match=name):
        prepare(model, ["a cat"], tmp_path / "out", engine="ray", device="cpu", **{name: value})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("keep_going", [True, False])
def test_picture_that_the_driver_cannot_write(monkeypatch, keep_going):
    """The others of its group are kept either way."""
    requests = load(["a", "b", "c"], JobOptions(policy=policy("cfg"), steps=1))[0]
    packed = pickle.dumps([Made(request, {}) for request in requests])
    table = pyarrow.table({"group": pyarrow.array([packed], pyarrow.large_binary())})
    made = runner(keep_going=keep_going)
    monkeypatch.setattr(made, "_dataset", lambda *_: SimpleNamespace(iter_batches=lambda **_: iter([table])))

    def prepare(item):
        if item.request.prompt == "b":
            raise IsADirectoryError(21, "Is a directory", "b.png")
        return item

    results = made.run([requests], prepare)
    kinds = [(item.request.prompt, type(item)) for item in next(results)]
    if keep_going:
        assert kinds == [("a", Made), ("b", Failed), ("c", Made)]
        assert not list(results)
    else:
        assert kinds == [("a", Made), ("c", Made)]
        with pytest.raises(IsADirectoryError):
            next(results)


def test_pipeline_cannot_be_sent(pipe, tmp_path):
    with pytest.raises(ValueError, match="engine='ray': needs a model given by name"):
        prepare(pipe, ["a cat"], tmp_path, engine="ray")


def test_retries_have_an_end(model, tmp_path, monkeypatch):
    """A task over which actors die again and again fails with its images named, instead of running for ever."""
    ledger = Ledger()
    remote = SimpleNamespace(begin=SimpleNamespace(remote=ledger.begin))  # without a cluster
    monkeypatch.setattr(ray, "get", lambda value: value)
    batch = load(["a cat", "a dog"], JobOptions(policy=policy("cfg"), steps=1))[0]
    table = pyarrow.table({"batch": pyarrow.array([pickle.dumps(batch)], pyarrow.large_binary())})
    worker = Worker(pipelines.sd, {}, Picture(), True, remote)

    def run():
        # One row a table: Ray Data would send the rows one by one.
        return [
            item
            for out in worker(table)
            for (data,) in [out.column("group").to_pylist()]
            for item in pickle.loads(data)
        ]

    for _ in range(TRIES):
        assert [made.request.id for made in run()] == ["00000-0", "00001-0"]
    assert [failed.request.id for failed in run()] == ["00000-0", "00001-0"]
    assert f"actors died {TRIES} times" in run()[0].message
    worker.keep_going = False
    (error,) = run()
    assert "id='00000-0': actors died" in str(error)
