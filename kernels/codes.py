"""`layout`'s members that `decide.decide` compares with, as plain numbers.

A comparison of a float with an IntEnum member costs Python four times one with a number, and Triton takes no enums but does take
the numbers of a module.
"""

from .layout import Anchor, Magnitude, Phase, Row, Rule, RuleKind, State

OBSERVE, W_EPSILON, W_X0 = int(Row.OBSERVE), int(Row.W_EPSILON), int(Row.W_X0)
PLAIN, UNDECIDED, BEFORE, AFTER = (float(phase) for phase in Phase)
NONE, MINIMUM, DROP = (float(kind) for kind in RuleKind)
OUTPUT, EPSILON, X0 = (float(magnitude) for magnitude in Magnitude)
UNWRITTEN, WRITTEN, BROKEN = (float(kind) for kind in Anchor)
STATE_WIDTH, ROW_WIDTH, RULE_WIDTH = len(State), len(Row), len(Rule)
STEP, BASE = int(State.STEP), int(State.BASE)
P, Q, A, B = int(Row.P), int(Row.Q), int(Row.A), int(Row.B)
H0, H1, H2, N, S = int(Row.H0), int(Row.H1), int(Row.H2), int(Row.N), int(Row.S)
X, E = int(Row.X), int(Row.E)
DECIDED, RULED = int(State.LENGTH), int(Rule.ANCHORED)  # columns before these are `decide`'s, the others `push`'s
ANCHORED, PHASE, NON_FINITE, ANCHOR = int(Rule.ANCHORED), int(State.PHASE), int(State.NON_FINITE), int(State.ANCHOR)
TIMESTEP, STORE, ACTIVE = int(Row.TIMESTEP), int(Row.STORE), int(Row.ACTIVE)
