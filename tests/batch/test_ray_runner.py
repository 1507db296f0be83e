"""The parts of the Ray runner, most of them without a cluster: addresses, resources, what actors send and what comes of errors."""

from __future__ import annotations

import pickle
import re
import socket
from types import SimpleNamespace

import pyarrow
import pytest
import torch
from typer.testing import CliRunner

from fastguard.batch.local import Failed
from fastguard.batch.options import JobOptions
from fastguard.batch.prompt_files import load
from fastguard.batch.ray_runner import TRIES, Ledger, RayRunner, Worker, check_resources
from fastguard.batch.store import Made
from fastguard.batch.task import generate, prepare
from fastguard.commands.cli import app
from fastguard.policies.presets import policy
from tests import pipelines

pytestmark = pytest.mark.slow

ray = pytest.importorskip("ray")
pytest.importorskip("ray.data")


def runner(**options) -> RayRunner:
    return RayRunner(None, {}, JobOptions(engine="ray", **options))


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
    batches = [[i] for i in range(48)]
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


def answers(worker, batch) -> list[list]:
    """What an actor sends back for a task of one batch: its groups."""
    table = pyarrow.table({"batch": pyarrow.array([pickle.dumps(batch)], pyarrow.large_binary())})
    # One row a table: Ray Data would send the rows one by one.
    return [pickle.loads(data) for out in worker(table) for (data,) in [out.column("group").to_pylist()]]


def test_a_model_that_actors_cannot_load():
    """Its reason arrives as an error of the job, in one line; a constructor that raises would be tried for ever."""

    def broken():
        raise ValueError("model='x': cannot be loaded: cut")

    worker = Worker(broken, {}, JobOptions(engine="ray", keep_going=True), None)
    ((failed,),) = answers(worker, load(["a cat"], JobOptions(policy=policy("cfg"), steps=1))[0])
    assert failed.fatal and isinstance(failed.error, ValueError) and "cut" in str(failed.error)


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


def test_picture_that_the_driver_cannot_write(monkeypatch):
    """The others of its group are kept."""
    requests = load(["a", "b", "c"], JobOptions(policy=policy("cfg"), steps=1))[0]
    packed = pickle.dumps([Made(request, {}) for request in requests])
    table = pyarrow.table({"group": pyarrow.array([packed], pyarrow.large_binary())})
    made = runner()
    monkeypatch.setattr(made, "_dataset", lambda *_: SimpleNamespace(iter_batches=lambda **_: iter([table])))

    def prepare(item):
        if item.request.prompt == "b":
            raise IsADirectoryError(21, "Is a directory", "b.png")
        return item

    (group,) = made.run([requests], prepare)
    assert [(item.request.prompt, type(item)) for item in group] == [("a", Made), ("b", Failed), ("c", Made)]
    assert group[1].message.startswith("IsADirectoryError: ") and not group[1].fatal


def test_pipeline_cannot_be_sent(pipe, tmp_path):
    with pytest.raises(ValueError, match="engine='ray': needs a model given by name"):
        prepare(pipe, ["a cat"], tmp_path, engine="ray")


def test_retries_have_an_end(model, tmp_path, monkeypatch):
    """A task over which actors die again and again fails with its images named, instead of running for ever."""
    ledger = Ledger()
    remote = SimpleNamespace(begin=SimpleNamespace(remote=ledger.begin))  # without a cluster
    monkeypatch.setattr(ray, "get", lambda value: value)
    batch = load(["a cat", "a dog"], JobOptions(policy=policy("cfg"), steps=1))[0]
    worker = Worker(pipelines.sd, {}, JobOptions(engine="ray"), remote)
    for _ in range(TRIES):
        assert [made.request.id for (made,) in zip(*answers(worker, batch), strict=True)] == ["00000-0", "00001-0"]
    (group,) = answers(worker, batch)
    assert [failed.request.id for failed in group] == ["00000-0", "00001-0"]
    assert all(f"id='00000-0': actors died {TRIES} times" in failed.message for failed in group)
