"""Column layouts shared by whoever fills the tables (schedule, policy), runs them (guided_step) and reads them (report).

All three tables are float64: they hold a few scalars per sample, float64 keeps step counts exact and makes every decision agree
with a float64 reference. Latents, model outputs and the update itself are float32 or narrower.
"""

from enum import IntEnum

NEVER = 2**30  # a row that no schedule reaches
HISTORY = 3  # most history buffers (lags) a linear scheduler of diffusers needs


class Row(IntEnum):
    """One row per denoiser evaluation: m = P x + Q e;  x' = A x + B m + sum_j H_j history[j] + N z;  y = S' x'.

    H_j weighs history *slot* j, not lag j: the schedule compiler knows which slot holds which lag at each row, so no tensor is
    ever rotated. After the update m is written to slot STORE (-1: hold, nothing is written). S and TIMESTEP describe this row's own
    model input; the step that produces it reads them from the next row. x0(e) = X x + E e, NaN where unknown. Statistic = d * 1 |
    W_EPSILON | W_X0. A schedule of K evaluations has K + 1 rows, the last with ACTIVE = 0.
    """

    P, Q, A, B, H0, H1, H2, N = range(8)
    S, TIMESTEP, OBSERVE, STORE, W_EPSILON, W_X0, ACTIVE, X, E = range(8, 17)


class Rule(IntEnum):
    """One row per sample: when the guard's guidance ends. The fields of `fastguard.policies.policy` as numbers."""

    KIND = 0  # RuleKind
    SWITCH_ROW = 1  # first row at which the sample switches anyway (t_star or deadline); NEVER if there is none
    GATE = 2  # caught if d >= GATE (the smallest float32 d with sqrt(d / elements) >= tau)
    GATE_STEPS = 3  # observations in which the gate may catch; 0 = no gate
    MIN_STEP = 4  # observation index before which minima (drops) are ignored
    FLOOR = 5  # 1 - min_drop: a minimum counts only below FLOOR * maximum up to and including it
    RHO = 6  # drop rule: fires below RHO * maximum so far; `rho` of the policy
    MAGNITUDE = 7  # Magnitude
    COMBINED = 8  # 1: while unguarded the caller's own combination is the output, where there is one; 0: the policy has its own scale
    ANCHORED = 9  # 1: guarded by its anchor (`anchor.restrain`, which has the formulas of the columns that follow)
    FAINT = 10  # norm of m - mu at which the strength begins
    SHARP = 11  # norm at which it is 1
    BACK, ETA, DRIFT, MOST = range(12, 16)


class State(IntEnum):
    """One row per sample, updated by every step. Rows count denoiser evaluations from 0; -1 = has not happened."""

    STEP = 0  # next row to run, relative to BASE
    BASE = 1  # first row of this sample's schedule in the row table
    PHASE = 2  # Phase
    OBSERVATIONS = 3  # observations made so far
    LAST = 4  # statistic of the last observation; NaN before
    BEFORE_LAST = 5
    MAXIMUM = 6  # largest statistic so far (NaN ignored); -inf before
    LAST_ROW = 7  # row of the last observation
    TRANSITION_STEP = 8
    MINIMUM_STEP = 9
    MARGIN = 10  # relative depth of the minimum or drop that fired; NaN if none did
    GATE_STEP = 11  # row at which the gate caught the sample
    GATE_D = 12  # largest d among the gate's observations; -inf before
    FORCED = 13  # 1 if a dynamic rule was overruled by SWITCH_ROW
    NON_FINITE = 14  # first row with a non-finite d
    LENGTH = 15  # |m - mu| of the anchor
    PUSH = 16  # of the drift: rho in `anchor.restrain`
    ANCHOR = 17  # Anchor


class Anchor(IntEnum):
    UNWRITTEN, WRITTEN, BROKEN = range(3)  # BROKEN: a sum over it was not finite


class RuleKind(IntEnum):
    NONE, MINIMUM, DROP = range(3)


class Magnitude(IntEnum):
    OUTPUT, EPSILON, X0 = range(3)


class Phase(IntEnum):
    """Guidance is `guidance[b, step, 0]` in BEFORE, `guidance[b, step, 1]` in all other phases.

    PLAIN: not guarded, or released by the gate; UNDECIDED: the gate looks; BEFORE and AFTER the transition.
    """

    PLAIN, UNDECIDED, BEFORE, AFTER = range(4)


# The same as plain numbers: Triton takes these from a module but takes no enums, and Python compares them four times as fast.
STATE_WIDTH, ROW_WIDTH, RULE_WIDTH = len(State), len(Row), len(Rule)
P, Q, A, B, H0, H1, H2, N, S, TIMESTEP, OBSERVE, STORE, W_EPSILON, W_X0, ACTIVE, X, E = map(int, Row)
STEP, BASE, PHASE, *_, NON_FINITE, LENGTH, PUSH, ANCHOR = map(int, State)
# From LENGTH and ANCHORED on columns are `anchor.restrain`'s, before them `decide.decide`'s.
ANCHORED = int(Rule.ANCHORED)
PLAIN, UNDECIDED, BEFORE, AFTER = map(float, Phase)
NONE, MINIMUM, DROP = map(float, RuleKind)
OUTPUT, EPSILON, X0 = map(float, Magnitude)
UNWRITTEN, WRITTEN, BROKEN = map(float, Anchor)
