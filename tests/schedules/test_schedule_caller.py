"""How compile_schedule treats its caller: nothing of the scheduler changes, results are cached, any number of threads may call."""

from __future__ import annotations

import copy
import functools
import gc
import threading
import time

import diffusers
import numpy as np
import pytest
import torch

from fastguard.kernels.layout import Row
from fastguard.schedules import compiler as module
from fastguard.schedules.compiler import compile_schedule
from tests.schedules.cases import DDIM, Case


def snapshot(value):
    if isinstance(value, torch.Tensor):
        return value.clone(), value.dtype, value.device
    if isinstance(value, (list, tuple)):
        return [snapshot(item) for item in value]
    return copy.deepcopy(value)


def same(before, after):
    if isinstance(before, torch.Tensor):
        return torch.equal(before, after)
    if isinstance(before, np.ndarray):
        return np.array_equal(before, after)
    if isinstance(before, (list, tuple)):
        return len(before) == len(after) and all(same(a, b) for a, b in zip(before, after, strict=True))
    return before == after


@pytest.mark.parametrize(
    "case",
    [
        DDIM,
        Case("PNDM", {"skip_prk_steps": True}),
        Case("EulerAncestralDiscrete"),
        Case("HeunDiscrete"),
        Case("UniPCMultistep"),
        Case("SASolver"),
        Case("LMSDiscrete"),
        Case("IPNDM"),
        Case("DPMSolverSinglestep"),
    ],
    ids=str,
)
def test_caller_is_left_alone(case):
    """Compiled in the middle of a run: nothing of the scheduler changes, and the table is that of a fresh run."""
    scheduler = case.make(12)
    x = torch.zeros(1, 4, 8, 8)
    for t in scheduler.timesteps[:3]:
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)
        scheduler.step(x, t, x)
    before = {name: snapshot(value) for name, value in vars(scheduler).items()}
    generator, random = torch.Generator().manual_seed(3), torch.get_rng_state()
    state, dtype = generator.get_state(), torch.get_default_dtype()
    accepts = "generator" in scheduler.step.__code__.co_varnames
    schedule = module._compile(scheduler, {}, 0)
    compile_schedule(scheduler, step_kwargs={"generator": generator} if accepts else {})
    after = {name: snapshot(value) for name, value in vars(scheduler).items()}
    assert before.keys() == after.keys()
    assert all(same(before[name], after[name]) for name in before)
    assert torch.equal(state, generator.get_state()) and torch.equal(random, torch.get_rng_state())
    assert torch.get_default_dtype() == dtype
    assert torch.equal(schedule.rows, module._compile(case.make(12), {}, 0).rows)


@pytest.mark.parametrize(
    "case",
    [
        DDIM,
        Case("HeunDiscrete"),
        Case("KDPM2AncestralDiscrete"),
        Case("FlowMatchHeunDiscrete"),
        Case("DPMSolverSinglestep", {"solver_order": 3}),
        Case("PNDM", {"skip_prk_steps": True}),
        Case("PNDM"),
    ],
    ids=str,
)
@pytest.mark.parametrize("begin", [0, 4])
def test_hooked_step_is_not_run_and_its_rows_are_known_all_the_same(case, begin):
    scheduler = case.make(10)
    scheduler.step = lambda *args, **kwargs: pytest.fail("ran the hook")
    schedule = compile_schedule(scheduler, begin_index=begin)
    assert not schedule.linear
    free = compile_schedule(case.make(10), begin_index=begin)
    kept = [Row.S, Row.TIMESTEP, Row.OBSERVE, Row.W_EPSILON, Row.W_X0]
    assert torch.equal(schedule.rows[:, kept], free.rows[:, kept])


def test_cached_by_value():
    a = compile_schedule(DDIM.make(10), step_kwargs={"eta": 0.5})
    assert compile_schedule(DDIM.make(10), step_kwargs={"eta": 0.5, "generator": torch.Generator()}) is a
    others = [
        compile_schedule(DDIM.make(10)),
        compile_schedule(DDIM.make(11), step_kwargs={"eta": 0.5}),
        compile_schedule(DDIM.make(10), step_kwargs={"eta": 0.25}),
        compile_schedule(DDIM.make(10), step_kwargs={"eta": 0.5}, begin_index=3),
        compile_schedule(
            Case("DDIM", {"clip_sample": False, "set_alpha_to_one": False}).make(10),
            step_kwargs={"eta": 0.5},
        ),
    ]
    assert len({id(s) for s in [a, *others]}) == 6
    changed = DDIM.make(10)
    changed.timesteps = changed.timesteps - 1
    assert compile_schedule(changed, step_kwargs={"eta": 0.5}) is not a
    changed = DDIM.make(10)
    changed.alphas_cumprod = changed.alphas_cumprod * 0.99
    assert compile_schedule(changed, step_kwargs={"eta": 0.5}) is not a


def test_functions_count_by_what_they_do():
    """SA-Solver's tau_func: another function may lie at the address of one that is gone, and the same one may come to say something else."""

    def table(tau):
        scheduler = diffusers.SASolverScheduler(tau_func=tau)
        scheduler.set_timesteps(10)
        return compile_schedule(scheduler)

    says = {"tau": 0.0}
    outside = lambda t: says["tau"]  # noqa: E731
    zero, one = table(lambda t, tau=0.0: tau), table(lambda t, tau=1.0: tau)
    assert not torch.equal(zero.rows, one.rows)
    assert torch.equal(table(outside).rows, zero.rows)
    says["tau"] = 1.0
    assert torch.equal(table(outside).rows, one.rows)
    assert torch.equal(table(functools.partial(lambda tau, t: tau, 1.0)).rows, one.rows)
    assert table(lambda t, tau=1.0: tau) is one
    assert table(None) is table(None)


def test_what_repr_leaves_out_counts():
    """Long tensors are shortened there, and objects have their address."""

    def table(tau):
        scheduler = diffusers.SASolverScheduler(tau_func=tau)
        scheduler.set_timesteps(10)
        return compile_schedule(scheduler).rows

    def held(value):
        return lambda t, tau=value: tau[1000]

    def nested(value):
        inner = lambda t, v=value: v  # noqa: E731
        return lambda t, f=inner: f(t)

    long = torch.zeros(2000), torch.zeros(2000)
    long[1][1000] = 1.0
    for kind in (torch.Tensor.clone, torch.Tensor.numpy, torch.Tensor.tolist):
        assert not torch.equal(*(table(held(kind(one))) for one in long))
    assert len({table(nested(v / 20)).numpy().tobytes() for v in range(20)}) == 20
    inner = lambda t, v=0.0: v  # noqa: E731
    outer = lambda t, f=inner: f(t)  # noqa: E731
    zero = table(outer)
    inner.__defaults__ = (1.0,)
    assert not torch.equal(table(outer), zero)
    round_about: dict = {}
    round_about["self"] = round_about
    scheduler = DDIM.make(10)
    scheduler.notes = round_about
    assert torch.equal(compile_schedule(scheduler).rows, compile_schedule(DDIM.make(10)).rows)


def test_begin_index_of_the_scheduler_counts():
    scheduler = Case("EulerDiscrete").make(10)
    scheduler.set_begin_index(4)
    schedule = compile_schedule(scheduler)
    assert len(schedule.timesteps) == 6
    whole = compile_schedule(Case("EulerDiscrete").make(10))
    assert torch.equal(schedule.rows, whole.rows[4:])


def test_cache_is_bounded():
    for steps in range(1, module.CACHED + 20):
        compile_schedule(Case("FlowMatchEulerDiscrete").make(steps))
    assert len(module._cache) == module.CACHED


def test_a_class_of_the_same_name_has_a_table_of_its_own():
    """Notebooks define a class again and again; the next one may get the address of the one before."""

    def rows(factor):
        class Again(diffusers.DDIMScheduler):
            def step(self, model_output, *args, **kwargs):
                return super().step(model_output * factor, *args, **kwargs)

        scheduler = Again(clip_sample=False)
        scheduler.set_timesteps(12)
        return compile_schedule(scheduler).rows

    for factor in (1.0, 1.1, 1.2):
        first = rows(factor)
        gc.collect()
        assert not torch.equal(first, rows(factor + 0.05))
        gc.collect()


def test_threads():
    """Eight threads compile at once while this one draws noise: same tables, and a foreign torch.randn stays what it is."""
    cases = [DDIM, Case("EulerAncestralDiscrete"), Case("UniPCMultistep"), Case("SASolver")] * 2
    alone = [module._compile(case.make(20), {}, 0) for case in cases]
    found = [None] * len(cases)

    def work(i):
        found[i] = module._compile(cases[i].make(20), {}, 0)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(cases))]
    for thread in threads:
        thread.start()
    drawn = []
    while any(thread.is_alive() for thread in threads):
        drawn.append(torch.randn(3, generator=torch.Generator().manual_seed(0)))
    for thread in threads:
        thread.join()
    expected = torch.randn(3, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(d, expected) for d in drawn)
    for one, other in zip(alone, found, strict=True):
        assert torch.equal(one.rows, other.rows) and one.draws == other.draws


def test_inside_inference_mode_and_with_a_default_device():
    expected = module._compile(Case("UniPCMultistep").make(10), {}, 0)
    with torch.inference_mode():
        inside = module._compile(Case("UniPCMultistep").make(10), {}, 0)
    assert not inside.rows.is_inference() and torch.equal(inside.rows, expected.rows)
    scheduler = Case("UniPCMultistep").make(10)
    if (
        torch.__version__ < "2.7"
    ):  # its item() of a CPU tensor fails under a default device "meta", with or without a table
        return
    with torch.device("meta"):
        assert torch.equal(module._compile(scheduler, {}, 0).rows, expected.rows)


def test_compile_time():
    """50 rows of DPM-Solver++ 2M take 31 ms of one core here (DDIM 30, UniPC 65, SA-Solver 100, LMS 200); again, 0.1 ms."""
    scheduler = Case("DPMSolverMultistep").make(50)
    module._compile(scheduler, {}, 0)
    start = time.process_time()
    module._compile(scheduler, {}, 0)
    assert time.process_time() - start < 0.5  # a machine may be slow; ten times the measurement is a fault
    compile_schedule(scheduler)
    start = time.process_time()
    for _ in range(10):
        compile_schedule(scheduler)
    assert time.process_time() - start < 0.05
