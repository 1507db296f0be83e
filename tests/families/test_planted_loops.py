"""Loops that do otherwise in some rows, or for some images, are refused: unlisted ones (family="probe") and listed ones (verify=True)."""

from __future__ import annotations

import inspect
import sys
import textwrap

import diffusers
import pytest
import torch

import fastguard
from fastguard.pipelines.families import find
from fastguard.pipelines.probe import probe
from tests.families.tiny import CASES, parts, run

COMBINES = "noise_pred = neg_noise_pred + true_cfg_scale * (noise_pred - neg_noise_pred)"
GUIDED = "neg_noise_pred + {} * (noise_pred - neg_noise_pred)"
TINY = CASES["flux"]  # two images, s = 4, calls c, u


def loop(combination):
    """Flux's own `__call__` with another combination."""
    kind = diffusers.FluxPipeline
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(kind.__call__)))
    source = source[source.index("def __call__") :]
    assert COMBINES in source
    names = dict(vars(sys.modules[kind.__module__]))
    exec(source.replace(COMBINES, f"noise_pred = {combination}"), names)
    return torch.no_grad()(names["__call__"])


def unlisted(combination):
    pipe = TINY.make()
    kind = type("Unlisted", (diffusers.FluxPipeline,), {"__call__": loop(combination)})
    return parts(kind, transformer=pipe.transformer, scheduler=pipe.scheduler)


@pytest.mark.parametrize(
    ("combination", "told"),
    [
        (
            GUIDED.format("true_cfg_scale * i / (len(timesteps) - 1)"),
            r"row 1: e = 1.333 u \+ -0.3333 c \(residual .*\), where e = \S+ u \+ 1 c is expected",
        ),
        (GUIDED.format("0.3"), r"row 0: e = 0.7 p \+ 0.3 q: g is at most 1"),
        (
            GUIDED.format("(true_cfg_scale - i)"),
            r"row 1: e = -2 u \+ 3 c \(residual .*\), where e = -3 u \+ 4 c is expected",
        ),
        (
            f"{GUIDED.format('true_cfg_scale')} if i < 2 else noise_pred + true_cfg_scale * (neg_noise_pred - noise_pred)",
            r"row 2: e = 4 u \+ -3 c \(residual .*\), where e = -3 u \+ 4 c is expected",
        ),
        (
            GUIDED.format("torch.tensor([4.0, 3.0])[:, None, None]"),
            r"row 0, image 1: e = -2 u \+ 3 c \(residual .*\), where e = -3 u \+ 4 c is expected",
        ),
        (f"2 * ({GUIDED.format('true_cfg_scale')})", r"row 0: e = -6 u \+ 8 c"),
    ],
    ids=["ramp from 0", "below 1", "falling", "order swapped later", "scale per image", "doubled"],
)
def test_an_unlisted_loop_must_hold_in_every_row_and_image(combination, told):
    pipe = unlisted(combination)
    with fastguard.enable(pipe, "stp", t_star=0, family="probe"), pytest.raises(TypeError, match=told):
        run(TINY, pipe, TINY.guided())


def test_an_unlisted_loop_with_one_scale_is_taken():
    """s + 1, negated: stock's bits where nothing is guarded, stock on the negative prompt under zero guidance."""
    pipe = unlisted("-(noise_pred + true_cfg_scale * (noise_pred - neg_noise_pred))")
    stock = run(TINY, pipe, TINY.guided())
    with fastguard.enable(pipe, "cfg", family="probe") as guard:
        assert torch.equal(run(TINY, pipe, TINY.guided()), stock)
        assert (guard.family.order, guard.family.sign, guard.family.offset) == (("cond", "uncond"), -1, 1.0)


def test_verify_looks_at_every_image(monkeypatch):
    monkeypatch.setattr(
        diffusers.FluxPipeline,
        "__call__",
        loop(f"({GUIDED.format('true_cfg_scale')}) * torch.tensor([1.0, -1.0])[:, None, None]"),
    )
    pipe = TINY.make()
    told = r"row 0, image 1: e = 3 u \+ -4 c \(residual .*\), where e = -3 u \+ 4 c is expected"
    with fastguard.enable(pipe, "cfg", verify=True), pytest.raises(RuntimeError, match=told):
        run(TINY, pipe, TINY.guided())


@pytest.mark.parametrize("how", [{"verify": True}, {"family": "probe"}])
def test_no_memory_is_not_the_loops_fault(how, monkeypatch):
    pipe = TINY.make() if "verify" in how else unlisted(GUIDED.format("true_cfg_scale"))

    def full(*_):
        raise torch.OutOfMemoryError("no room")

    hook = pipe.transformer.register_forward_hook(full)
    with fastguard.enable(pipe, "cfg", **how), pytest.raises(torch.OutOfMemoryError, match=r"^no room$"):
        run(TINY, pipe, TINY.guided())
    hook.remove()
    with fastguard.enable(pipe, "cfg", **how) as guard:
        run(TINY, pipe, TINY.guided())
        assert guard.probed


def test_a_row_in_json_names_its_image():
    pipe = TINY.make()
    arguments = TINY.guided(num_inference_steps=2)
    assert [row["image"] for row in probe(pipe, arguments, find(type(pipe))).to_dict()["rows"]] == [0, 0]
