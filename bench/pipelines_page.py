"""`python -m bench.pipelines_page`: every pipeline class, how it is guarded or why not, as docs/pipelines.md; and the hashes of their loops
(fastguard/pipelines/families/loops.json), after somebody has looked at those that changed."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers

from fastguard.pipelines.families import FAMILIES, OWN_FAMILIES, REASONS, Family, loops

HEADER = """# Pipelines

Written by `python -m bench.pipelines_page` from the declarations in `fastguard/pipelines/families/`.

A pipeline is guarded in one of two ways. *u* is the model's unconditional (negative) output, *c* the conditional one, *e* what the
scheduler's step gets, *g* the guidance of the image at this row.

- **Fused**: the pipeline's own combination is known to be e = u + s (c - u) of one batch. The guard takes it over, together with the
  scheduler's update, in one operation ([schedulers.md](schedulers.md)).
- **Own combination**: the pipeline runs as it is, with the denoiser's real outputs, and combines them itself. At `scheduler.step` the
  guard replaces *e* by u + g (c - u) for the images that it holds at this row. All other images keep the pipeline's own *e*, bit for bit,
  whatever its formula and dtype. The scheduler's own step follows.

What holds for own combination:

- A policy's guidance (`before`, `guidance_scale`) is always g in u + g (c - u). Where a pipeline combines c + s (c - u), its scale s is
  g = s + 1: that is the *effective scale* below. `opposite` is g = -(s + 1) there.
- Where a pipeline does more than combine (it restores a norm, say), a guarded image gets the plain u + g (c - u), `opposite` plain
  u - g (c - u): the pipeline's own formula at a negative scale is not what the method describes.
- The gate's unit is RMS(c - u) over what `scheduler.step` gets for one image.
- Where two calls are made, the one whose branch no image needs is left out: under a static policy for all images, from the second row
  on, unless somebody may remember calls (a cache, a forward hook without an attribute `only_looks = True`, a replaced `forward`, layers that are not the libraries' own) or an
  IP-Adapter is in use. The report says so then.
- A call in which no second branch runs in its first row raises. Where the second branch ends later (a truncated guidance), a warning
  says so: an image still guarded gets the conditional output from there.
- The controlnets of Flux and Qwen-Image run once a row, on the prompt, and serve both branches: there u is the model's output for the
  negative prompt beside a controlnet that saw the prompt.
- A denoiser called more often than declared between two steps raises, and so does an output that never reaches the scheduler's step.

Whether a declaration is true is found by a probe (`fastguard.pipelines.probe`): the loop runs once, at full length, with random numbers
for the denoiser's outputs, and e = a c + b u is solved for every row and image. `fastguard inspect MODEL --probe` shows that for a model's files,
`guard.probe(prompt, ...)` for a call of your own; `enable(pipe, verify=True)` probes the first call and refuses what differs, and `enable(pipe, family="probe")` takes a class that is not listed if it combines u + g (c - u) with one g above 1 in every row, for every image.
When the source of a listed pipeline's loop is not the one that was looked at, enabling it says so in one line.

**Tested** says what stands behind an entry. *instance*: a tiny random instance runs in the tests: unguarded images have stock's bits, zero
guidance is stock on the negative prompt, conditional guidance is stock without guidance, d is the distance of the outputs, and the probe
finds what is declared. Where no call of stock runs on the negative branch alone (image variations, unCLIP, BLIP, Stable Video Diffusion,
AceStep), zero guidance is stock with *u* in the place of *c*. Where each frame has a scale of its own (Stable Video Diffusion) or a part of
c - u is taken out (AceStep), the probe tells order and sign alone. EasyAnimateControlPipeline as diffusers 0.42.1 has it fails in every call (its
`encode_prompt` lacks an argument that the call passes): its instance goes around that. *fused*: compared with stock in tests/pipelines. *read*: the loop was read and declared, nothing ran; use `verify=True`.
"""

READ: frozenset[str] = frozenset()  # declared from reading: no instance of them runs in the tests


def _calls(family: Family) -> str:
    names = {"cond": "c", "uncond": "u"}
    order = ", ".join(names[branch] for branch in family.order)
    return f"two calls: {order}" if family.calls == 2 else f"one batch: [{order}]"


def _special(family: Family) -> str:
    offset = f" + {family.offset:g}" if family.offset else ""
    facts = [
        " and ".join(f"`{name}`" for name in (family.scales.values() if family.scales else (family.scale,)))
        + (f", effective scale s{offset}" if offset else ""),
        "negated" if family.sign < 0 else "",
        "mapped to the step's space" if family.to_step else "",
        family.nonlinear or "",
        "no call left out" if family.calls == 2 and not family.skippable else "",
    ]
    return "; ".join(filter(None, facts))


def markdown() -> str:
    fused = sorted((name, family.name) for family in FAMILIES for name in family.pipelines)
    own = sorted(((name, family) for family in OWN_FAMILIES for name in family.pipelines), key=lambda pair: pair[0])
    lines = [HEADER, f"## Fused ({len(fused)})", "", "| class | family | tested |", "|---|---|---|"]
    lines += [f"| {name} | {family} | fused |" for name, family in fused]
    lines += ["", f"## Own combination ({len(own)})", ""]
    lines += ["| class | calls | scale, and what is special | tested |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {_calls(family)} | {_special(family)} | {'read' if name in READ else 'instance'} |"
        for name, family in own
    ]
    lines += ["", f"## Refused ({len(REASONS)})", "", "| class | why |", "|---|---|"]
    lines += [f"| {name} | {reason} |" for name, reason in sorted(REASONS.items())]
    lines += ["", 'Any other class is refused as unknown; `family="probe"` tries it.']
    return "\n".join(lines) + "\n"


def hashes() -> dict[str, str]:
    """Of the loop of every guarded class that the installed diffusers has."""
    groups = [family.pipelines for family in FAMILIES] + [family.pipelines for family in OWN_FAMILIES]
    names = sorted(name for group in groups for name in group)
    return {name: mark for name in names if (mark := loops.fingerprint(getattr(diffusers, name, None)))}


if __name__ == "__main__":
    Path(__file__).parents[1].joinpath("docs", "pipelines.md").write_text(markdown())
    Path(loops.__file__).with_suffix(".json").write_text(
        json.dumps({"diffusers": diffusers.__version__, "loops": hashes()}, indent=1) + "\n"
    )
