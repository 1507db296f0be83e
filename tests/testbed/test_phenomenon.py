"""The phenomenon itself, on a few of the most duplicated D prompts and ordinary ones of the tuning half."""

import pytest

from bench.testbed.run import jobs
from fastguard import policy
from fastguard.testbed import prompts
from fastguard.testbed.sampling import generate

pytestmark = pytest.mark.slow

D = sorted(prompts("D", "tuning"), key=lambda p: -p.factor)[:6]
ORDINARY = prompts("ordinary", "tuning")[:6]


def measured(pipe, judge, some, seeds, one):
    work = jobs(some, seeds, one)
    latents, reports = generate(pipe, work)
    rows = judge(latents, [job.prompt for job in work])
    return {**rows, "reports": reports}


@pytest.fixture(scope="module")
def plain(pipe, judge):
    return measured(pipe, judge, D, 2, policy("cfg"))


def share(values):
    return sum(values) / len(values)


def test_plain_guidance_copies_and_the_unconditional_branch_does_not(pipe, judge, plain):
    zero = measured(pipe, judge, D, 2, policy("stp", t_star=0))
    assert share(plain["copy"]) >= 0.75
    assert share(zero["copy"]) <= 0.1


def test_memorized_prompts_start_with_a_much_larger_difference(pipe, judge, plain):
    ordinary = measured(pipe, judge, ORDINARY, 2, policy("cfg"))
    first = [[r["d_curve"][0] for r in m["reports"]] for m in (plain, ordinary)]
    low, high = (sorted(values)[len(values) // 2] for values in (first[1], first[0]))
    assert high > 3 * low


def test_a_later_transition_copies_less(pipe, judge):
    early = measured(pipe, judge, D, 2, policy("stp", t_star=800))
    late = measured(pipe, judge, D, 2, policy("stp", t_star=300))
    assert share(late["copy"]) < share(early["copy"])
    assert sum(late["similarity"]) < sum(early["similarity"])
