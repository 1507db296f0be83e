"""What a policy would do with a model, and why, from its configuration alone: no weights are loaded."""

from __future__ import annotations

import inspect
from dataclasses import asdict, dataclass
from typing import Any

from fastguard.kernels.layout import NEVER, Row, Rule
from fastguard.pipelines.families import Family, OwnFamily, find
from fastguard.pipelines.guard import enable
from fastguard.pipelines.loading import (
    distilled,
    load_pipeline,
    model_index,
    own_scheduler,
    pipeline_class,
    skeleton,
    with_scheduler,
)
from fastguard.pipelines.probe import Probe
from fastguard.pipelines.scheduler import expected_arguments
from fastguard.policies.plan import lower
from fastguard.policies.policy import Policy
from fastguard.schedules.compiler import compile_schedule


@dataclass(frozen=True)
class RowInfo:
    """One denoiser evaluation.

    before, after   g in e = u + g (c - u) until a transition (None if there is none) and from it on
    denoiser_rows   rows of the batch per image
    """

    row: int
    timestep: float
    observe: bool
    branches: str
    denoiser_rows: int
    before: float | None
    after: float
    switch: bool


@dataclass(frozen=True)
class Inspection:
    """path: "fused" (one op per step), "own step" (the op decides and guides, the scheduler's step() updates), "own combination" (the
    pipeline guides, the op decides and guides what is guarded) or "refused"; scale: the argument that guidance_scale is given as."""

    model: str
    pipeline: str
    path: str
    reason: str | None
    family: str | None
    scheduler: str
    form: str
    history: int
    residual: float | None
    noise_draws: int
    policy: dict[str, Any]
    scale: str
    guidance_scale: float
    steps: int
    switch_row: int | None
    denoiser_rows: int
    plain_rows: int
    rows: tuple[RowInfo, ...]

    def check(self) -> None:
        """ValueError if a guard cannot run on this model."""
        if self.path == "refused":
            raise ValueError(f"model={self.model!r}: {self.reason}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def _scales(self) -> str:
        own = self.policy["guidance_scale"]
        if own is None:
            return f"{self.guidance_scale:g}"
        low, high = min(r.after for r in self.rows), max(r.after for r in self.rows)
        return f"{low:g} (the policy's)" if low == high else f"{low:g} to {high:g}, by row (the policy's)"

    def __str__(self) -> str:
        name, kind = self.policy["name"], self.policy["transition"]
        what = ["anchored"] * self.policy["anchored"] + [f"transition {kind}"] * (kind is not None)
        facts = {
            "model": f"{self.model} ({self.pipeline})",
            "path": self.path + (f": {self.reason}" if self.reason else ""),
            "family": self.family or "none",
            "scheduler": self.scheduler,
            "table": f"form {self.form}, lags {self.history}, noise draws {self.noise_draws}, residual "
            + ("none (own step)" if self.residual is None else f"{self.residual:.1e}"),
            "policy": f"{name}, {', '.join(what) or 'transition none'}, gate {self.policy['gate'] or 'none'}, "
            f"guidance scale {self._scales()}",
            "cost": f"{self.denoiser_rows} denoiser rows per image in {len(self.rows)} evaluations; plain guidance "
            f"{self.plain_rows} ({self.denoiser_rows / self.plain_rows:.0%})",
        }
        if self.switch_row is not None:
            limit = "t* at" if kind == "static" else "deadline at"
            facts["switch"] = f"{limit} row {self.switch_row}, t = {self.rows[self.switch_row].timestep:g}"
        lines = [f"{key:<10} {value}" for key, value in facts.items()]
        lines += ["", f"{'row':>4} {'t':>9}  observed  branches  rows  g before   g after"]
        for r in self.rows:
            before = "-" if r.before is None else f"{r.before:g}"
            mark = "  <- " + ("t*" if kind == "static" else "deadline") if r.switch else ""
            lines.append(
                f"{r.row:>4} {r.timestep:>9.6g}  {'yes' if r.observe else 'no':<8}  {r.branches:<8}  {r.denoiser_rows:>4}"
                f"  {before:>8}  {r.after:>8g}{mark}"
            )
        return "\n".join(lines)


def inspect_model(
    model: str,
    policy: Policy,
    *,
    steps: int | None = None,
    guidance_scale: float | None = None,
    scheduler: str | None = None,
) -> Inspection:
    """Inspect `model` under a policy for one image; steps and guidance_scale default to the pipeline's own.

    ValueError names the argument if there is no such model or scheduler, or the policy does not fit the schedule or the scale.
    """
    index = model_index(model)
    kind = pipeline_class(index)
    defaults = {name: p.default for name, p in inspect.signature(kind.__call__).parameters.items()}
    count = steps if steps is not None else int(defaults.get("num_inference_steps", 50))
    refusal: str | None = None
    known: Family | OwnFamily | None = None
    try:
        known = find(kind)
    except TypeError as error:
        refusal = str(error)
    own = known if isinstance(known, OwnFamily) else None
    name, offset = (own.scale, own.offset) if own else ("guidance_scale", 0.0)
    given = guidance_scale if guidance_scale is not None else float(defaults.get(name, 7.5))
    scale = given + offset  # g of u + g (c - u)

    if known is None:
        made = own_scheduler(model, index)
        made = made if scheduler is None else with_scheduler(scheduler, made.config, None)
    else:
        built = skeleton(model, scheduler=scheduler)
        made, refusal = built.scheduler, distilled(getattr(getattr(built, "unet", None), "config", {}))
    # A schedule that shifts with the image's size has its largest shift at 1024 x 1024, these models' default.
    shift = made.config.get("use_dynamic_shifting")
    try:
        made.set_timesteps(count, **({"mu": made.config.max_shift} if shift else {}))
        schedule = compile_schedule(made, step_kwargs=expected_arguments(made, defaults))
    except Exception as error:  # each scheduler refuses in its own way
        raise ValueError(f"steps={count}: {type(made).__name__} refuses: {error}") from None
    body = schedule.rows[:-1]
    (sample,) = policy.samples(1)
    if scale <= 1 and sample.guarded:
        raise ValueError(
            f"{name}={given:g}: must be above {1 - offset:g} under policy {sample.name!r} (at or below it pipelines run no unconditional branch)"
        )
    plan = lower([sample], schedule, scale, elements=1)  # only the gate's threshold on d depends on the elements
    # One call for both branches is made whole; of two, each runs in the first row.
    branches = plan.branches if own is None else _called(plan.branches, own)
    # Without a transition nothing comes before; the rule of an anchored policy begins at row 0 all the same.
    switches = sample.transition is not None
    switch = int(plan.rules[0, Rule.SWITCH_ROW]) if switches else NEVER
    rows = tuple(
        RowInfo(
            row=k,
            timestep=t,
            observe=bool(body[k, Row.OBSERVE]),
            branches=branches,
            denoiser_rows=2 if branches == "both" else 1,
            before=before if switches else None,
            after=after,
            switch=k == switch,
        )
        for k, (t, branches, (before, after)) in enumerate(
            zip(
                plan.timesteps,
                # Without guidance pipelines run the conditional branch alone, whatever number the scale is.
                branches if scale > 1 else ["cond"] * len(body),
                plan.guidance[0].tolist() if scale > 1 else [(1.0, 1.0)] * len(body),
                strict=True,
            )
        )
    )
    path = "refused" if refusal else "own combination" if own else "fused" if schedule.linear else "own step"
    return Inspection(
        model=model,
        pipeline=kind.__name__,
        path=path,
        reason=refusal or (own.nonlinear if own else schedule.reason),
        family=known.name if known else None,
        scheduler=type(made).__name__,
        form=schedule.form,
        history=schedule.history,
        residual=schedule.residual if schedule.linear else None,
        noise_draws=sum(schedule.draws),
        policy=sample.to_dict(),
        scale=name,
        guidance_scale=given,
        steps=count,
        switch_row=None if switch == NEVER else switch,
        denoiser_rows=sum(row.denoiser_rows for row in rows),
        plain_rows=2 * len(rows),
        rows=rows,
    )


def _called(branches: tuple[str, ...], own: OwnFamily) -> tuple[str, ...]:
    """What the pipeline's calls run of the branches that a plan needs."""
    if own.calls == 1 or not own.skippable:
        return ("both",) * len(branches)
    return ("both", *branches[1:])


def probe_model(found: Inspection) -> Probe:
    """Load the model's weights and run its loop on random numbers, with a prompt and an empty negative one.

    ValueError where the model cannot be loaded or the pipeline needs more than prompts (a picture).
    """
    pipe = load_pipeline(found.model, scheduler=found.scheduler, auto=False)
    wanted = {"prompt": "a photograph of a house", "negative_prompt": "", "num_inference_steps": found.steps}
    wanted |= {found.scale: found.guidance_scale}
    names = inspect.signature(type(pipe).__call__).parameters
    with enable(pipe, "cfg") as guard:
        try:
            return guard.probe(**{name: value for name, value in wanted.items() if name in names})
        except Exception as error:  # each pipeline refuses in its own way
            raise ValueError(
                f"probe: {found.pipeline} does not run on prompts alone ({error}); with arguments of your own: guard.probe(...)"
            ) from error
