"""Anchored guidance: what of the guidance points to the picture that the model's first prediction showed, and how much of it is taken out."""

from . import codes
from .triton_columns import tl  # noqa: F401 - Triton's interpreter wants to see it beside each function that it runs


def push(where, root, state, phase, k, rule, row, sums, g, combines):  # no annotations: Triton would compile them
    """(non_finite, length, rho, written), share p and factor f of e - f a, and the scale g and the weight `combines` that hold at row k.

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
    returned. Where the output is the caller's own combination (`combines` is 1), combined - u stands for g delta, g q is its share
    <combined - u, a> / <a, a>, and `combines` returns l. Sums that are not finite break the anchor: a guarded sample then has g = 0 and
    f = 0 to the end.

    `where`, `root` and all columns as for `decide.decide`; phase is the new one;
    sums = (<delta, delta>, <a, a>, <delta, a>, <U, U> + <M, M>, <combined - u, a>, <combined - u, combined - u>).
    """
    non_finite, length, rho, written = state
    anchored, faint, sharp, back, eta, drift, most = rule
    dd, aa, da, spread, wa, ww = sums
    scale = row[codes.E]
    total = (aa - aa) + (da - da) + (spread - spread)
    finite = total == 0
    live = (anchored != 0) & (phase != codes.PLAIN)
    held = live & (phase != codes.UNDECIDED)
    first = written == codes.UNWRITTEN

    length = where(live & first, where(finite, root(aa), 0.0), length)
    drifted = 1.0 - aa / where(spread > 0, spread, 1.0)
    moved = rho + eta * (where(spread > 0, drifted, 0.0) - drift)
    moved = where(moved > 0, where(moved < most, moved, most), 0.0)
    rho = where(live & (written == codes.WRITTEN) & finite & (row[codes.OBSERVE] != 0), moved, rho)
    written = where(live & first, codes.WRITTEN, written)
    broken = live & ((written == codes.BROKEN) | (total != 0))
    written = where(broken, codes.BROKEN, written)
    non_finite = where(broken & (non_finite < 0), k, non_finite)

    strength = (length - faint) / (sharp - faint)
    strength = where(strength > 0, where(strength < 1, strength, 1.0), 0.0)
    q = where(aa > 0, da / where(aa > 0, aa, 1.0), 0.0)
    share = where(live & finite, scale * q, float("nan"))
    along = (1.0 - strength) - back * where(g > 0, g, 0.0) * strength - rho
    to = where(combines != 0, wa, g * da)
    taken = to / where(aa > 0, aa, 1.0) - along * q
    f = where(held & (share > 0) & (scale * taken > 0), taken, 0.0)
    added = where(combines != 0, ww, g * g * dd) - f * (to + to - f * aa)
    added = strength * where(scale > 0, scale, -scale) * root(where(added > 0, added, 0.0))
    shorter = where(held & (added > length), length / where(added > 0, added, 1.0), 1.0)
    lost = held & broken
    f, g, combines = where(lost, 0.0, f * shorter), where(lost, 0.0, g * shorter), where(lost, 0.0, combines * shorter)
    return (non_finite, length, rho, written), share, f, g, combines
