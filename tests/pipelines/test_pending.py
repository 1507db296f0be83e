"""The latents that a pipeline holds between two steps: free while nobody looks, real when somebody does."""

from __future__ import annotations

import diffusers
import pytest
import torch

import fastguard
from fastguard.pipelines.call import Call
from fastguard.pipelines.pending import Pending, settled
from tests import pipelines


def pending(values: torch.Tensor) -> Pending:
    return Pending(lambda: values, values.shape, values.stride(), values.dtype, values.device)


def test_knows_its_kind_without_looking():
    def look():
        raise AssertionError("nobody asked for values")

    latents = Pending(look, (2, 4, 8, 8), (256, 64, 8, 1), torch.float16, torch.device("cpu"))
    pair = torch.cat([latents] * 2)
    assert latents.shape == (2, 4, 8, 8) and len(latents) == 2 and latents.ndim == 4
    assert latents.dtype == torch.float16 and latents.device.type == "cpu"
    assert isinstance(pair, Pending) and pair.shape == (4, 4, 8, 8)


def test_any_other_use_sees_the_values():
    values = torch.randn(2, 4, 8, 8)
    latents = pending(values)
    pair = torch.cat([latents] * 2)
    assert torch.equal(latents / 2, values / 2)
    assert torch.equal(pair.chunk(2)[1], values)
    assert torch.equal(torch.cat([latents, values]), torch.cat([values, values]))
    assert torch.equal(torch.from_numpy(latents.numpy()), values)
    assert torch.equal(settled({"images": latents})["images"], values)
    assert type(settled((latents, None))[0]) is torch.Tensor


@pytest.mark.parametrize(
    "change",
    [lambda t: t.mul_(2), lambda t: t.__setitem__(0, 1.0), lambda t: t.__iadd__(1), lambda t: t.__iand__(1)],
)
def test_is_not_changed_in_place(change):
    with pytest.raises(RuntimeError, match="clone"):
        change(pending(torch.zeros(2, 4, 8, 8)))


@pytest.mark.parametrize("output_type", ["latent", "pt"])
def test_interrupted_loops_give_the_latents_so_far(output_type, monkeypatch):
    """As if from another thread: without a callback, so that the pipeline held pending latents when it stopped."""
    pipe = pipelines.sd(scheduler=pipelines.ddim())
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    arguments = {"num_inference_steps": 6, "latents": latents, "output_type": output_type}

    def stop(pipe, step, timestep, kwargs):
        pipe._interrupt = step == 2
        return kwargs

    stock = pipe("a red cat", **arguments, callback_on_step_end=stop).images

    step = Call.step

    def interrupted(self, *args, **kwargs):
        self.pipe._interrupt = self.row == 2
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Call, "step", interrupted)
    with fastguard.enable(pipe, "cfg") as guard:
        ours = pipe("a red cat", **arguments).images
    assert type(ours) is torch.Tensor
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-4 * float(stock.abs().max()))
    assert guard.report[0].d_curve[3:] == (None, None, None)


@pytest.mark.parametrize("scheduler", [diffusers.EulerAncestralDiscreteScheduler, diffusers.DDPMScheduler])
@pytest.mark.parametrize("several", [False, True])
def test_interrupted_loops_leave_the_generator_where_stock_does(scheduler, several, monkeypatch):
    """Its noise is drawn before the loop, and what later rows would have used is given back."""
    pipe = pipelines.sd(scheduler=scheduler())

    def run(**arguments):
        generators = pipelines.generators([1, 2])
        one = generators if several else generators[0]
        pipe(["a red cat", "two dogs"], num_inference_steps=6, generator=one, output_type="latent", **arguments)
        return [g.get_state() for g in generators]

    def stop(pipe, step, timestep, kwargs):
        pipe._interrupt = step == 2
        return kwargs

    stock, step = run(callback_on_step_end=stop), Call.step

    def interrupted(self, *args, **kwargs):
        self.pipe._interrupt = self.row == 2
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Call, "step", interrupted)
    with fastguard.enable(pipe, "cfg"):
        ours = run()
    for a, b in zip(ours, stock, strict=True):
        assert torch.equal(a, b)
