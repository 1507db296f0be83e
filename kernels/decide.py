"""The transition of Jain et al. (CVPR 2025, arXiv 2411.16738) as a state machine."""

from . import layout
from .triton_tables import tl  # noqa: F401 - Triton's interpreter wants to see it beside each function that it runs


def decide(where, state, rule, row, d, both):  # no annotations: Triton would compile them
    """One row of one sample: (new state, whether guidance[b, k, 0] applies, weight of the caller's own combination: 0 or 1).

    The only definition of the decisions: Python floats and Triton scalars run it. state, rule and row are tuples of `layout`'s columns, and all is float64,
    so every world decides the same. `where` is the select of that world. An `if` compares what was read: TileLens follows none that looks at d.
    `both` (a Python bool) = both branches ran, so d is known. A NaN compares false: it never fires a rule nor raises a maximum.
    """
    (
        k, base, phase, j, last, before_last, maximum, last_row, transition, minimum, margin, gate_step, gate_d, forced, non_finite,
    ) = state[: layout.LENGTH]  # fmt: skip
    kind, switch_row, gate, gate_steps, min_step, floor, rho, magnitude, combined = rule[: layout.ANCHORED]
    if both:
        non_finite = where(((d - d) != 0) & (non_finite < 0), k, non_finite)
        if row[layout.OBSERVE] != 0:
            if j < gate_steps:
                looking = phase == layout.UNDECIDED
                caught = looking & (d >= gate)
                gate_d = where(looking & (d > gate_d), d, gate_d)
                gate_step = where(caught, k, gate_step)
                phase = where(looking & (j + 1 >= gate_steps), layout.PLAIN, phase)
                phase = where(caught, layout.BEFORE, phase)
            statistic = d
            if magnitude != layout.OUTPUT:
                statistic = d * where(magnitude == layout.EPSILON, row[layout.W_EPSILON], row[layout.W_X0])
            peak = where(statistic > maximum, statistic, maximum)
            # Where a rule fired its denominator is positive; elsewhere it may be 0, at which Python raises, hence the 1.
            if kind == layout.MINIMUM:
                fired = (phase == layout.BEFORE) & (j >= 2) & (j - 1 >= min_step)
                fired = fired & (last < before_last) & (last < statistic) & (last < floor * maximum)
                neighbour = where(before_last < statistic, before_last, statistic)
                minimum = where(fired, last_row, minimum)
                margin = where(fired, 1.0 - last / where(fired, neighbour, 1.0), margin)
                transition = where(fired, k, transition)
                phase = where(fired, layout.AFTER, phase)
            if kind == layout.DROP:
                fired = (phase == layout.BEFORE) & (j >= min_step) & (statistic < rho * peak)
                margin = where(fired, 1.0 - statistic / where(fired, rho * peak, 1.0), margin)
                transition = where(fired, k, transition)
                phase = where(fired, layout.AFTER, phase)
            before_last, last, maximum, last_row, j = last, statistic, peak, k, j + 1

    if k >= switch_row:
        switched = phase == layout.BEFORE
        transition = where(switched, k, transition)
        forced = where(switched & (kind != layout.NONE), 1.0, forced)
        phase = where(switched, layout.AFTER, phase)
    decided = (
        k + 1, base, phase, j, last, before_last, maximum, last_row, transition, minimum, margin, gate_step, gate_d, forced, non_finite,
    )  # fmt: skip
    before = phase == layout.BEFORE
    return decided + state[layout.LENGTH :], before, where(before, 0.0, combined)
