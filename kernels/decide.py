"""The transition of Jain et al. (CVPR 2025, arXiv 2411.16738) as a state machine."""

from . import codes
from .triton_columns import tl  # noqa: F401 - Triton's interpreter wants to see it beside each function that it runs


def decide(where, state, rule, row, d, both):  # no annotations: Triton would compile them
    """State machine of one step: (state, rule, row, d) -> (new state, whether guidance[b, k, 0] applies, 1 where the caller's combination is the output).

    The only definition of the decisions: Python floats and Triton scalars run it. `where` is the select of that world, the sequences are indexed by `layout`'s columns, and all is float64, so every
    world decides the same.
    `both` (a Python bool) = both branches ran, so d is known. A NaN compares false: it never fires a rule nor raises a maximum.
    """
    (
        k, base, phase, j, last, before_last, maximum, last_row, transition, minimum, margin, gate_step, gate_d, forced, non_finite,
    ) = state  # fmt: skip
    kind, switch_row, gate, gate_steps, min_step, floor, rho, magnitude, combined = rule
    if both:
        non_finite = where(((d - d) != 0) & (non_finite < 0), k, non_finite)
        observe = row[codes.OBSERVE] != 0
        weight = where(magnitude == codes.EPSILON, row[codes.W_EPSILON], row[codes.W_X0])
        statistic = d * where(magnitude == codes.OUTPUT, 1.0, weight)

        looking = observe & (phase == codes.UNDECIDED) & (j < gate_steps)
        caught = looking & (d >= gate)
        gate_d = where(looking & (d > gate_d), d, gate_d)
        gate_step = where(caught, k, gate_step)
        phase = where(looking & (j + 1 >= gate_steps), codes.PLAIN, phase)
        phase = where(caught, codes.BEFORE, phase)

        guarded = observe & (phase == codes.BEFORE)
        dip = (j >= 2) & (last < before_last) & (last < statistic) & (j - 1 >= min_step) & (last < floor * maximum)
        dip = guarded & (kind == codes.MINIMUM) & dip
        neighbour = where(before_last < statistic, before_last, statistic)
        peak = where(statistic > maximum, statistic, maximum)
        drop = guarded & (kind == codes.DROP) & (j >= min_step) & (statistic < rho * peak)
        minimum = where(dip, last_row, minimum)
        # Where a rule fired its denominator is positive; elsewhere it may be 0, at which Python raises, hence the 1.
        margin = where(dip, 1.0 - last / where(dip, neighbour, 1.0), margin)
        margin = where(drop, 1.0 - statistic / where(drop, rho * peak, 1.0), margin)
        transition = where(dip | drop, k, transition)
        phase = where(dip | drop, codes.AFTER, phase)

        before_last = where(observe, last, before_last)
        last = where(observe, statistic, last)
        maximum = where(observe, peak, maximum)
        last_row = where(observe, k, last_row)
        j = where(observe, j + 1, j)

    switched = (phase == codes.BEFORE) & (k >= switch_row)
    transition = where(switched, k, transition)
    forced = where(switched & (kind != codes.NONE), 1.0, forced)
    phase = where(switched, codes.AFTER, phase)
    state = (
        k + 1, base, phase, j, last, before_last, maximum, last_row, transition, minimum, margin, gate_step, gate_d, forced, non_finite,
    )  # fmt: skip
    before = phase == codes.BEFORE
    return state, before, where(before, 0.0, combined)
