"""Which methods are run with given arguments, why others are not, and what each costs at most."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from bench.methods import FirstLook, HanBatch, HanSample, Method, Opposite, Preset, Wen, methods
from bench.methods.look import ROWS as LOOKED_AT
from bench.methods.reference import FINER
from bench.paper import report, settings
from bench.paper.inputs import BadInput
from bench.paper.request import Request
from bench.paper.work import PLAIN, PLAIN_CURVES, WATCHED, Amount

COMPILED = "compile"
SLOW = {
    COMPILED: "its images are those of plain guidance",
    "han-sample": "up to 1,000 gradient steps an image",
}


@dataclass(frozen=True)
class Chosen:
    """The methods that are run, what the page says of each, and why others are not run."""

    made: dict[str, Method]
    known: dict[str, dict[str, Any]]


def choose(request: Request, pipe: Any) -> Chosen:
    """The methods by name: those asked for, or all that can run here. BadInput for one that was asked for and cannot."""
    found = methods(gate=request.gate, policy=request.policy)
    asked = None if request.methods is None else dict.fromkeys(request.methods)
    problems = [f"--methods: {name!r} is unknown{near(name, found)}" for name in asked or () if name not in found]
    always = {PLAIN, PLAIN_CURVES, WATCHED} if request.amount.detection else {PLAIN}
    usable: dict[str, Method] = {}
    known: dict[str, dict[str, Any]] = {}
    for name, factory in found.items():
        method = factory()
        policy = method.policy if isinstance(method, Preset) else None
        guarded = policy is not None and bool(policy.guarded)
        peer = not isinstance(method, Preset) and name not in (COMPILED, PLAIN, WATCHED)
        gated = policy is not None and policy.gate is not None
        known[name] = {"source": factory.source, "ours": guarded, "gated": gated, "peer": peer, "needs": factory.needs}
        if asked is not None and name not in asked and name not in always:
            known[name]["skipped"] = report.NOT_ASKED
            continue
        reason = unsuitable(name, request) or refusal(method, pipe)
        if reason is None:
            usable[name] = method
        elif asked is None:
            known[name]["skipped"] = reason
        else:
            problems.append(f"--methods: {name}: {reason}")
    if problems:
        raise BadInput("arguments", problems)
    return Chosen(usable, known)


def near(name: str, known: Iterable[str]) -> str:
    """What may have been meant, and what is allowed, for an error message."""
    close = difflib.get_close_matches(name, list(known), 1)
    return (f", did you mean {close[0]!r}?" if close else ";") + f" allowed are {', '.join(known)}"


def unsuitable(name: str, request: Request) -> str | None:
    """Why a method is not run with these arguments; None if it is."""
    own_gate = request.embedded or request.gate is not None or request.policy is not None
    if not request.embedded and name.startswith("embedded-policy"):
        return "belongs to the embedded model; pass --policy FILE for yours"
    if name.endswith("-gated") and not own_gate:
        return "needs --gate or --policy, see fastguard calibrate"
    if name == WATCHED and not request.amount.detection:
        return "needs --detection-seeds"
    if request.methods is None and name in SLOW:
        return f"only where it is named: {SLOW[name]}"
    return None


def refusal(method: Method, pipe: Any) -> str | None:
    """Why a method cannot run on the pipeline; None if it can."""
    try:
        method.check(pipe)
        method.prepare(pipe)
    except (TypeError, ValueError, RuntimeError) as error:
        return str(error).splitlines()[0]
    return None


def parameters(method: Method, amount: Amount) -> dict[str, Any]:
    """What settings.json keeps of a method. Wen's loss is one norm over the images of a prompt in a batch, so their number belongs to it."""
    found = settings.describe(method)
    if isinstance(method, Wen):
        found["images of a prompt at once"] = [min(amount.batch, seeds) for seeds in (amount.seeds, amount.ordinary)]
    return found


def most_rows(method: Method, steps: int) -> int:
    """Rows of the denoiser for an image, at most, where the scheduler evaluates once a step."""
    if isinstance(method, Wen):
        return 2 * (steps + method.iterations)
    if isinstance(method, HanSample):
        return 2 * (steps + method.iterations)
    if isinstance(method, HanBatch):
        return 2 * steps + 4 * method.updates - method.without
    if isinstance(method, FirstLook):
        return 2 * (min(steps, LOOKED_AT) + 1)
    if isinstance(method, Opposite):
        return 2 * (steps + FINER * steps)
    return 2 * steps
