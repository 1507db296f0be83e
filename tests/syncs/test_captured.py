"""The recorded path neither waits nor copies: with a stand-in that runs what it is given to record, on `cuda` tensors that are not there.

What a guard does around a replay (copying arguments that changed, noise, the loop's tensors) and what it records are watched alike.
"""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

import fastguard
from bench import real_size
from fastguard.capture import graphs
from fastguard.capture.static_inputs import StaticInputs
from fastguard.loop.loop import Loop
from fastguard.syncs.stream import TO_DEVICE, WAIT
from tests import schedulers

pytestmark = pytest.mark.slow

STEPS = 4
POLICIES = ["og+dtp", "anchored"]


class FakeRecorder:
    """In the place of `cuda_graphs.Recorder`: a graph is its body, a replay runs it."""

    def __init__(self, device):
        self.device, self.replays, self.recorded = device, 0, 0
        runners.append(self)

    def record(self, body, warm_up, keeps):
        self.recorded += 1
        return body

    def replay(self, body):
        self.replays += 1
        body()

    def release(self, body): ...
    def join(self, tensors=()): ...
    def new_pool(self): ...

    def pool_bytes(self):
        return 0


runners: list[FakeRecorder] = []


def storage(tensor):
    """Of the values that a labelled tensor holds; fake ones have no address."""
    tensor = getattr(tensor, "held", tensor)
    return tensor.untyped_storage()._cdata


@pytest.fixture
def device(monkeypatch):
    """A device that records."""
    runners.clear()
    real = torch.Tensor.data_ptr
    monkeypatch.setitem(graphs.RECORDERS, "cuda", FakeRecorder)
    monkeypatch.setattr(graphs, "records", lambda device: True)
    monkeypatch.setattr(graphs, "holds", lambda tensor: True)
    monkeypatch.setattr(
        torch.Tensor, "data_ptr", lambda t: storage(t) + t.storage_offset() if isinstance(t, FakeTensor) else real(t)
    )
    # A fake tensor holds its mode, on which every operation leaves something: a forward seems to change the model.
    monkeypatch.setattr("fastguard.capture.runner.BodyRunner._watch", lambda self, place: lambda: None)
    monkeypatch.setattr("fastguard.capture.static_inputs._storage", storage)


@pytest.fixture(scope="module", params=real_size.SIZES)
def sized(request):
    model = real_size.unet(request.param)
    with real_size.remembering():
        yield lambda scheduler: real_size.pipeline(request.param, scheduler, model)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mode", ["step", "loop"])
@pytest.mark.parametrize("name", schedulers.SD)
@pytest.mark.filterwarnings("ignore")  # diffusers' about the schedulers' configurations
def test_neither_waits_nor_copies(sized, device, name, mode, policy):
    pipe = sized(schedulers.SD[name]())
    with fastguard.enable(pipe, schedulers.suited(name, policy, gate=0.02), capture=mode):
        report = fastguard.assert_sync_free(pipe, steps=STEPS)
    assert report.steps >= STEPS
    (runner,) = runners
    assert runner.replays == (1 if mode == "loop" else report.steps - runner.recorded), (
        "what is recorded runs eagerly first"
    )


def test_a_loop_that_nothing_records_shows_all_of_its_rows(sized, monkeypatch):
    """On a machine with a GPU a check on tensors that no graph holds still walks through the whole generation."""
    monkeypatch.setattr(graphs, "records", lambda device: True)
    pipe = sized(schedulers.SD["ddim"]())
    with fastguard.enable(pipe, "og+dtp", gate=0.02, capture="loop"):
        report = fastguard.assert_sync_free(pipe, steps=STEPS)
    assert report.steps == STEPS


@pytest.fixture(scope="module")
def flow():
    model = real_size.sd3(schedulers.FLOW["flow-euler"]()).transformer
    with real_size.remembering():
        yield lambda scheduler: real_size.sd3(scheduler, model)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", schedulers.FLOW)
def test_flow_step_neither_waits_nor_copies(flow, device, name, policy):
    pipe = flow(schedulers.FLOW[name]())
    with fastguard.enable(pipe, policy, gate=0.02, capture="step"):
        report = fastguard.assert_sync_free(pipe, steps=STEPS)
    (runner,) = runners
    assert runner.replays == report.steps - runner.recorded >= STEPS


@pytest.mark.parametrize("mode", ["step", "loop"])
def test_planted_copy_and_wait_around_a_replay_are_found(sized, device, mode, monkeypatch):
    load = StaticInputs.load

    def copying(self, tree):
        load(self, tree)
        self._buffers[0].copy_(torch.zeros(self._buffers[0].shape))

    monkeypatch.setattr(StaticInputs, "load", copying)
    pipe = sized(schedulers.SD["ddim"]())
    with fastguard.enable(pipe, "og+dtp", gate=0.02, capture=mode):
        report = fastguard.find_syncs(pipe, steps=STEPS)
    assert {(op.sync, op.code) for op in report.ops} == {(TO_DEVICE, "self._buffers[0].copy_(torch.zeros(self._buffers[0].shape))")}  # fmt: skip
    assert len(report.ops) == (1 if mode == "loop" else STEPS)


def test_planted_wait_in_what_is_recorded_is_found(sized, device, monkeypatch):
    advance = Loop.advance

    def waiting(self, *args):
        advance(self, *args)
        assert self.x.sum().item() != 1.0

    monkeypatch.setattr(Loop, "advance", waiting)
    pipe = sized(schedulers.SD["ddim"]())
    with fastguard.enable(pipe, "og+dtp", gate=0.02, capture="step"):
        report = fastguard.find_syncs(pipe, steps=STEPS)
    assert {(op.sync, "self.x.sum().item()" in op.code) for op in report.ops} == {(WAIT, True)}
