"""The numbers in a page's sentences, once more."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from bench.recheck.curve import curves, floor_of, lead, peers
from bench.recheck.rows import Page, digits, share, shown

AXIS = {"similarity": "similarity", "copy rate": "copy"}
VERDICT = re.compile(r"^- (\S+) \((\S+) times plain cost\), (similarity|copy rate) below 0\.5: (.*)$", re.M)
AT = r"at (?:similarity|copy rate) (-?\d\.\d\d)"
Found = tuple[str, str, str]  # where, what the page has, what the rows give


def sentences(page: Page, text: str) -> Iterator[Found]:
    """Every number of the sentences of `text`, a page in Markdown."""
    for match in VERDICT.finditer(text):
        yield from verdict(page, *match.groups())
    for match in re.finditer(r"Ordinary prompts under plain guidance: (.*?)\. A lead", text):
        yield "plain guidance, ordinary", match[1], shown(share(page.of("none", "ordinary"), "faithful"))
    for match in re.finditer(
        r"^- (\d+) memorized prompts with (\d+) seeds, (\d+) ordinary ones with (\d+)", text, re.M
    ):
        for group, prompts, seeds in (("memorized", *match.groups()[:2]), ("ordinary", *match.groups()[2:])):
            rows = page.of("none", group)
            yield f"{group} prompts", prompts, str(len({r["id"] for r in rows}))
            yield f"{group} images", str(int(prompts) * int(seeds)), str(len(rows))
    for match in re.finditer(r"og\+dtp takes (\S+) of .*?; at most a quarter on (\d+) of (\d+),", text):
        yield from zip(["og+dtp against the script"] * 3, match.groups(), against_script(page), strict=True)


def verdict(page: Page, ours: str, cost: str, axis: str, rest: str) -> Iterator[Found]:
    """One of ours against the peers: its cost, how many there are, each that it lies below, the least leads."""
    where = f"{ours}, {axis}"
    yield where, cost, digits(page.cost(ours))
    known = curves(page, AXIS[axis])
    every = {m: lead(known[ours], known[m], floor_of(known)) for m in peers(page, known)}
    found = {m: one for m, one in every.items() if one is not None}
    cheap = [m for m in found if page.cost(m) <= 1 + 1e-6]
    for pattern, count in (
        (r"(?:of|all) (\d+) peers of at most", len(cheap)),
        (r"none of the (\d+) dearer", len(found) - len(cheap)),
    ):
        yield from ((where, match[1], str(count)) for match in re.finditer(pattern, rest))
    below = {m[1]: m for m in re.finditer(rf"(\S+) \((\S+) times, (\S+ \[\S+, \S+\]) {AT}", rest)}
    yield where, " ".join(sorted(below)), " ".join(sorted(m for m, one in found.items() if one.gap < -1e-4))
    for name, match in below.items():
        one = found[name]
        yield where, match[2], digits(page.cost(name))
        yield where, match[3], shown((one.gap, one.low, one.high), "+.3f")
        yield where, match[4], digits(one.at)
    for match in re.finditer(rf"least lead (\S+ \[\S+, \S+\]) {AT}, over (\S+?)[.;](?: |$)", rest):
        one = found[match[3]]
        yield where, match[1], shown((one.gap, one.low, one.high), "+.3f")
        yield where, match[2], digits(one.at)
        yield where, match[3], min(cheap, key=lambda m: found[m].gap)
    for match in re.finditer(rf"its least lead is (\S+) {AT}, over (\S+)\)", rest):
        near = found[match[3]].near or (np.nan, np.nan)
        yield where, f"{match[1]} {match[2]}", f"{digits(near[0], '+.3f')} {digits(near[1])}"


def against_script(page: Page) -> tuple[str, str, str]:
    """og+dtp's rows over those of the opposite script, and on how many images they are a quarter at most."""
    ours = {(r["id"], r["seed"]): r["rows"] for r in page.of("og+dtp", "memorized")}
    both = [
        (ours[r["id"], r["seed"]], 2 * (len(r["details"]["probe_curve"]) + len(r["details"]["timesteps"])))
        for r in page.of("reference-og+dtp", "memorized")
        if (r["id"], r["seed"]) in ours
    ]
    ratio = sum(a for a, _ in both) / sum(b for _, b in both)
    return digits(ratio), str(sum(4 * a <= b for a, b in both)), str(len(both))


def published(page: Page, cell: str) -> str:
    """ "NAME p95 (change)" of a cell that may have several."""

    def p95(name: str) -> float:
        return float(np.percentile([r["similarity_set"] for r in page.of(name, "memorized")], 95))

    def again(match: re.Match[str]) -> str:
        change = f" ({digits(p95(match[1]) / p95('none') - 1, '+.0%')})" if match[2] else ""
        return f"{match[1]} {digits(p95(match[1]), '.3f')}{change}"

    return re.sub(r"(\S+) -?\d\.\d{3}( \([+-]\d+%\))?", again, cell)
