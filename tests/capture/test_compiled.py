"""torch.compile inside a capture: what it made is what is recorded, and a changed model is compiled and recorded anew."""

from __future__ import annotations

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from tests.capture import simulator
from tests.capture.calls import check
from tests.capture.test_stale import lora_scale, moved, stale, with_lora

pytestmark = pytest.mark.usefixtures("recorders")


class Compiler:
    """The compiler of a backend: leaves the graph as it is, and counts its runs while something is being recorded."""

    recorded = 0

    def __call__(self, graph, inputs):
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
