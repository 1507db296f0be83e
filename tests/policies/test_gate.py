"""Calibration of the gate: the bound against scipy and against its own promise."""

import diffusers
import numpy as np
import pytest
import torch
from scipy import stats

import fastguard
from fastguard.pipelines.statistics import collect_gate_statistics
from fastguard.policies import gate as module
from fastguard.policies.gate import calibrate, needed_prompts
from tests import pipelines


@pytest.mark.parametrize(("m", "n", "p"), [(0, 299, 0.01), (3, 800, 0.01), (40, 1000, 0.05), (5, 9, 0.5)])
def test_binomial_tail_equals_scipy(m, n, p):
    assert module._binomial_cdf(m, n, p) == pytest.approx(stats.binom.cdf(m, n, p), rel=1e-9)


@pytest.mark.parametrize(("fpr", "confidence", "n"), [(0.01, 0.95, 299), (0.05, 0.95, 59), (0.01, 0.99, 459)])
def test_needed_prompts(fpr, confidence, n):
    assert needed_prompts(fpr, confidence) == n


def test_rare_false_positives_need_many_prompts_and_the_number_comes_at_once():
    assert needed_prompts(1e-12, 0.95) == pytest.approx(-np.log(0.05) / 1e-12, rel=1e-9)
    assert needed_prompts(1e-9, 0.5) == pytest.approx(np.log(2) / 1e-9, rel=1e-8)
    for fpr in (1e-17, 5e-324):
        with pytest.raises(ValueError, match=f"fpr={fpr}: must be at least 1e-12"):
            needed_prompts(fpr, 0.95)


def test_too_small_a_sample_is_refused_with_the_number_needed():
    with pytest.raises(ValueError, match=r"298 ordinary prompts.*at least 299"):
        calibrate(np.linspace(0, 1, 298))
    assert calibrate(np.linspace(0, 1, 299)).exceeding == 0


@pytest.mark.parametrize("n", [299, 473, 780, 2000])
def test_as_many_may_exceed_as_the_bound_allows_and_no_more(n):
    m = calibrate(np.arange(n) / n).exceeding
    assert stats.binom.cdf(m, n, 0.01) <= 0.05 < stats.binom.cdf(m + 1, n, 0.01)


def test_the_promise_holds_in_simulation():
    rng = np.random.default_rng(0)
    # for a uniform law the false-positive rate of a threshold is 1 - threshold
    rates = [1 - calibrate(rng.random(500), 0.02, 0.9).threshold for _ in range(2000)]
    broken = np.mean(np.array(rates) > 0.02)
    assert broken <= 0.1 + 3 * np.sqrt(0.1 * 0.9 / 2000)
    assert broken > 0.02  # and it is not needlessly wide


def test_ties_never_let_more_through():
    result = calibrate([0.5] * 400, 0.01, 0.95)
    assert result.exceeding == 0 and result.threshold > 0.5


@pytest.mark.parametrize("bad", [[float("nan")] * 400, [-1.0] * 400])
def test_values_that_cannot_be_rms_are_refused(bad):
    with pytest.raises(ValueError, match="finite and >= 0"):
        calibrate(bad)


@pytest.mark.parametrize("wish", [{"fpr": 0}, {"fpr": 1}, {"confidence": 1.0}])
def test_impossible_wishes_are_refused(wish):
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        calibrate([0.1] * 400, **wish)


def test_prompts_of_one_group_count_as_one_with_the_largest():
    rng = np.random.default_rng(0)
    values, groups = rng.random((59, 12)), np.repeat(np.arange(59), 12)
    result = calibrate(values.ravel(), 0.05, 0.95, groups=list(groups))
    assert (result.prompts, result.groups, result.exceeding) == (708, 59, 0)
    assert result.threshold == calibrate(values.max(1), 0.05, 0.95).threshold
    assert "59 calibration groups" in result.statement and "any RMS" in result.statement
    with pytest.raises(ValueError, match=r"59 ordinary groups of prompts: .* at least 299"):
        calibrate(values.ravel(), 0.01, 0.95, groups=list(groups))
    with pytest.raises(ValueError, match="groups holds 707 labels, rms_values 708 prompts"):
        calibrate(values.ravel(), 0.05, 0.95, groups=list(groups[1:]))


def test_the_promise_holds_for_dependent_prompts_by_groups_alone():
    """Twelve phrases of a thing that share its level: counting them as 720 prompts breaks the promise, counting 60 things keeps it."""
    rng, law = np.random.default_rng(1), stats.norm(scale=np.sqrt(1.1))
    labels = list(np.repeat(np.arange(60), 12))
    broken = {"prompts": 0, "groups": 0}
    for _ in range(400):
        values = np.exp(rng.normal(size=(60, 1)) + np.sqrt(0.1) * rng.normal(size=(60, 12))).ravel()
        for name, groups in (("prompts", None), ("groups", labels)):
            broken[name] += law.sf(np.log(calibrate(values, 0.05, 0.95, groups=groups).threshold)) > 0.05
    assert broken["groups"] / 400 <= 0.05 < 0.1 < broken["prompts"] / 400


def test_collecting_leaves_an_earlier_guard_as_it_was():
    pipe = pipelines.sd()
    with fastguard.enable(pipe, "dtp", gate=0.1, capture="off") as guard:
        before = guard.policy, guard.options
        values = collect_gate_statistics(pipe, ["a cat", "a dog"], num_inference_steps=2)
        assert (guard.policy, guard.options) == before and guard.options.capture == "off"
    assert len(values) == 2 and min(values) > 0


def test_collecting_refuses_what_has_no_statistic():
    pipe = pipelines.sd()
    with pytest.raises(ValueError, match=r"guidance_scale=1.0: must be above 1"):
        collect_gate_statistics(pipe, ["a cat"], guidance_scale=1.0)
    with torch.no_grad():
        pipe.unet.conv_out.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"prompt 'a cat': .* not finite"):
        collect_gate_statistics(pipe, ["a cat"], num_inference_steps=2)
    assert "_fastguard_guard" not in vars(pipe)


@pytest.mark.parametrize(
    ("scheduler", "rows"),
    [
        (diffusers.DDIMScheduler(), [0, 1, 2]),
        (diffusers.HeunDiscreteScheduler(), [0, 2, 4]),
        (diffusers.PNDMScheduler(skip_prk_steps=True), [0, 1, 3]),
        (diffusers.PNDMScheduler(), [0, 4, 8]),
    ],
    ids=["DDIM", "Heun", "PNDM", "PNDM with Runge-Kutta"],
)
def test_the_statistic_is_taken_where_the_gate_observes(scheduler, rows):
    """Heun evaluates a level twice, PNDM its second one: rows that do not count as observations do not count here either."""
    pipe = pipelines.sd(scheduler=scheduler)
    arguments = {"num_inference_steps": 8, "guidance_scale": 5.0}
    with fastguard.enable(pipe, "cfg", monitor=True) as guard:
        pipe(["a cat"], generator=[torch.Generator().manual_seed(0)], output_type="latent", **arguments)
        curve = guard.report[0].rms_curve
    (value,) = collect_gate_statistics(pipe, ["a cat"], gate_steps=3, **arguments)
    assert value == pytest.approx(max(curve[k] for k in rows), rel=1e-6)
    assert len(set(curve)) == len(curve), "or the rows could not be told apart"
