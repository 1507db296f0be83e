"""torch.compile inside a capture: what it made is what is recorded, and a changed model is compiled and recorded anew."""

from __future__ import annotations

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

import fastguard
from tests.capture import simulator
from tests.capture.calls import call, check
from tests.capture.changes import lora_scale, moved, stale, with_lora

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("recorders")]


class Compiler:
    """The compiler of a backend: leaves the graph as it is, and counts its runs while something is being recorded."""

    recorded = 0
    operations: tuple[str, ...] = ()  # of the last graph

    def __call__(self, graph, inputs):
        self.operations = tuple(str(node.target) for node in graph.graph.nodes)

        def run(*args):
            self.recorded += simulator.is_recording()
            return graph(*args)

        return make_boxed_func(run)


COMPILER = Compiler()
OPTIONS = {
    "compile": {"backend": aot_autograd(fw_compiler=COMPILER)}
}  # as inductor: traced, functional, wrapped by torch


@pytest.fixture(autouse=True, scope="module")
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", ["step", "loop"])
def test_a_compiled_denoiser_is_what_is_recorded(sd, mode):
    unet, forward = sd.unet, sd.unet.forward
    before = COMPILER.recorded
    check(sd, mode=mode, options=OPTIONS, times=2)
    assert COMPILER.recorded - before == (1 if mode == "step" else 3)
    assert sd.unet is unet and sd.unet.forward == forward and unet._compiled_call_impl is None


@pytest.mark.parametrize("blind", [False, True], ids=["", "planted"])
@pytest.mark.parametrize("change", [lora_scale, moved])
def test_a_changed_model_is_compiled_and_recorded_anew(change, blind, monkeypatch):
    before = COMPILER.recorded
    after, expected = stale(with_lora(), change, monkeypatch, blind, options=OPTIONS, steps=2)
    assert torch.equal(after, expected) != blind
    assert COMPILER.recorded - before == (1 if blind else 2)


def test_a_compiled_denoiser_attends_with_the_chosen_backend(sd):
    """Compiled anew for each of them, although it is the same module and the same compiler."""
    images = []
    for name, operation in (("native", "scaled_dot_product"), ("native_math", "softmax")):
        options = {"attention_backend": name}
        with fastguard.enable(sd, "cfg", capture="off", **options):
            images.append(call(sd, steps=2))
        with fastguard.enable(sd, "cfg", capture="step", **options, **OPTIONS) as guard:
            assert torch.equal(call(sd, steps=2), images[-1])
            assert guard.report.path == "fused, step graph", guard.report.reason
        assert any(operation in target for target in COMPILER.operations)
    assert not torch.equal(*images), "they compute the same in other ways"
