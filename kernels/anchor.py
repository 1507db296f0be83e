"""Anchored guidance: what of the guidance points to the picture that the model's first prediction showed, and how much of it is taken out."""

from . import layout
from .triton_tables import tl  # noqa: F401 - Triton's interpreter wants to see it beside each function that it runs


def restrain(where, root, state, rule, row, sums, g, own_weight):  # no annotations: Triton would compile them
    """State, share p and factor f of e - f a, and the scale g and the weight of the own combination that hold at this row.

    With x0(e) = X x + E e, the anchor m = x0(c) and mu = x0(u) of the first row, and at every row U = x0(u) - mu, M = m - mu,

        a = m - x0(u),   q = <delta, a> / <a, a>,   p = E q             how much of the guidance leads to m
        s = clamp((|M| - FAINT) / (SHARP - FAINT), 0, 1)                how much of a picture m is
        v = 1 - <a, a> / (<U, U> + <M, M>)                              0 at the start, 1 where the sample is m
        rho <- clamp(rho + ETA (v - DRIFT), 0, MOST)                    at every later observation
        along = (1 - s) - BACK max(g, 0) s - rho                        the scale that is left along a
        f = max(g - along, 0) q  where p > 0,  else 0
        l = min(1, |M| / (s |E| |g delta - f a|))                       no picture is further from x0(u) than the first was
        e = u + l (g delta - f a)

    so that along a guidance is min(g, along), across it g, and what it adds never longer than |M| / s. l is part of the g and f that are
    returned. Where the output is the caller's own combination (own_weight is 1), w = combined - u stands for g delta, g q is its share
    <w, a> / <a, a>, and own_weight returns l. Sums that are not finite break the anchor: a guarded sample then has g = 0 and f = 0 to
    the end.

    `where`, `root`, state, rule and row as for `decide.decide`, whose new state this takes;
    sums = (<delta, delta>, <a, a>, <delta, a>, <U, U> + <M, M>, <w, a>, <w, w>).
    """
    phase, k = state[layout.PHASE], state[layout.STEP] - 1
    non_finite, length, rho, anchor = state[layout.NON_FINITE :]
    anchored, faint, sharp, back, eta, drift, most = rule[layout.ANCHORED :]
    dd, aa, da, spread, wa, ww = sums
    scale = row[layout.E]
    residue = (aa - aa) + (da - da) + (spread - spread)  # NaN where a sum is not finite
    finite = residue == 0
    live = (anchored != 0) & (phase != layout.PLAIN)
    held = live & (phase != layout.UNDECIDED)
    first = anchor == layout.UNWRITTEN

    length = where(live & first, where(finite, root(aa), 0.0), length)
    drifted = 1.0 - aa / where(spread > 0, spread, 1.0)
    moved = rho + eta * (where(spread > 0, drifted, 0.0) - drift)
    moved = where(moved > 0, where(moved < most, moved, most), 0.0)
    rho = where(live & (anchor == layout.WRITTEN) & finite & (row[layout.OBSERVE] != 0), moved, rho)
    anchor = where(live & first, layout.WRITTEN, anchor)
    broken = live & ((anchor == layout.BROKEN) | (residue != 0))
    anchor = where(broken, layout.BROKEN, anchor)
    non_finite = where(broken & (non_finite < 0), k, non_finite)

    strength = (length - faint) / (sharp - faint)
    strength = where(strength > 0, where(strength < 1, strength, 1.0), 0.0)
    q = where(aa > 0, da / where(aa > 0, aa, 1.0), 0.0)
    share = where(live & finite, scale * q, float("nan"))
    along = (1.0 - strength) - back * where(g > 0, g, 0.0) * strength - rho
    ga = where(own_weight != 0, wa, g * da)  # <g delta, a>, and next its square, with w in the place of g delta
    gg = where(own_weight != 0, ww, g * g * dd)
    taken = ga / where(aa > 0, aa, 1.0) - along * q
    f = where(held & (share > 0) & (scale * taken > 0), taken, 0.0)
    added = gg - f * (ga + ga - f * aa)
    added = strength * where(scale > 0, scale, -scale) * root(where(added > 0, added, 0.0))
    shorter = where(held & (added > length), length / where(added > 0, added, 1.0), 1.0)
    lost = held & broken
    f, g = where(lost, 0.0, f * shorter), where(lost, 0.0, g * shorter)
    own_weight = where(lost, 0.0, own_weight * shorter)
    state = state[: layout.NON_FINITE] + (non_finite, length, rho, anchor)  # noqa: RUF005 - Triton cannot unpack
    return state, share, f, g, own_weight
