"""No scheduler makes a guarded loop wait for the device or copy to or from it, at SD 1.5's and SDXL's real size; stock's do.

Real UNets in float16 on `cuda` tensors that are not there; no GPU takes part.
"""

from __future__ import annotations

from collections import Counter

import pytest

import fastguard
from bench import real_size
from fastguard.syncs.stream import TO_DEVICE, WAIT
from tests import schedulers

pytestmark = pytest.mark.slow

STEPS = 4
POLICIES = ["og+dtp", "anchored"]


@pytest.fixture(scope="module", params=real_size.SIZES)
def sized(request):
    """(size, function from scheduler to pipeline); the UNet runs once for each kind of arguments."""
    model = real_size.unet(request.param)
    with real_size.remembering():
        yield request.param, lambda scheduler: real_size.pipeline(request.param, scheduler, model)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", schedulers.SD)
@pytest.mark.filterwarnings("ignore")  # diffusers' about the schedulers' configurations
def test_guarded_loop_neither_waits_nor_copies(sized, name, policy):
    _, pipeline = sized
    pipe = pipeline(schedulers.SD[name]())
    with fastguard.enable(pipe, schedulers.suited(name, policy, gate=0.02)):
        report = fastguard.assert_sync_free(pipe, steps=STEPS)
    assert report.technique == "labelled" and report.guarded
    assert report.steps >= STEPS


@pytest.fixture(scope="module")
def flow():
    """From a flow scheduler to SD3 Medium's pipeline."""
    model = real_size.sd3(schedulers.FLOW["flow-euler"]()).transformer
    with real_size.remembering():
        yield lambda scheduler: real_size.sd3(scheduler, model)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", schedulers.FLOW)
@pytest.mark.filterwarnings("ignore")
def test_guarded_flow_loop_neither_waits_nor_copies(flow, name, policy):
    pipe = flow(schedulers.FLOW[name]())
    with fastguard.enable(pipe, policy, gate=0.02):
        report = fastguard.assert_sync_free(pipe, steps=STEPS)
    assert report.technique == "labelled" and report.guarded
    assert report.steps >= STEPS


# name -> (how often each kind occurs in 4 steps of SD 1.5, how many of them SDXL's pipeline saves, a culprit)
# SDXL's pipeline sets the begin index, which spares the search for the first timestep: a `nonzero` and an `.item()`.
KNOWN = {
    "ddim": ({WAIT: 22}, 0, "alpha_prod_t = self.alphas_cumprod[timestep]"),
    "ddpm": ({WAIT: 46}, 0, "if t > 0:"),
    "pndm": ({WAIT: 14}, 0, "alpha_prod_t = self.alphas_cumprod[timestep]"),
    "euler": ({WAIT: 2}, 2, "indices = (schedule_timesteps == timestep).nonzero()"),
    "dpm-2m": ({WAIT: 2}, 2, "index_candidates = (schedule_timesteps == timestep).nonzero()"),
    "unipc-2": ({WAIT: 4, TO_DEVICE: 18}, 2, "rhos_c = torch.linalg.solve(R, b).to(device).to(x.dtype)"),
}


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.filterwarnings("ignore")
def test_known_synchronisations_of_stock_are_found(sized, name):
    size, pipeline = sized
    kinds, saved, culprit = KNOWN[name]
    report = fastguard.find_syncs(pipeline(schedulers.SD[name]()), steps=STEPS)
    assert report.technique == "labelled" and not report.guarded and report.broke_off is None
    expected = dict(kinds)
    if size == "SDXL":
        expected[WAIT] -= saved
    assert Counter(op.sync for op in report.ops) == Counter(expected)
    assert not any(op.denoiser for op in report.ops)
    assert all(op.line.startswith("diffusers/schedulers/scheduling_") for op in report.ops)
    if expected[WAIT]:
        assert culprit in {op.code for op in report.ops}
        assert culprit in str(report)
    else:
        assert report.free
