"""What a policy would do with a model, and why, from its configuration alone: no weights are loaded."""

import inspect
from typing import Any

import torch

from fastguard.kernels.layout import NEVER, Row, Rule
from fastguard.pipelines import loading as models
from fastguard.pipelines.families import Family, Fused, find
from fastguard.pipelines.guard import enable
from fastguard.pipelines.probe import Probe
from fastguard.pipelines.scheduler import expected_arguments
from fastguard.policies.plan import lower
from fastguard.policies.policy import Policy
from fastguard.schedules.compiler import compile_schedule

ROW = "{row:>4} {timestep:>9.6g}  {observe:<8}  {branches:<8}  {denoiser_rows:>4}  {before:>8}  {after:>8g}{mark}"


def inspect_model(
    model: str,
    policy: Policy,
    *,
    steps: int | None = None,
    guidance_scale: float | None = None,
    scheduler: str | None = None,
    probe: bool = False,
) -> dict[str, Any]:
    """What `fastguard inspect` shows of one image under a policy, as JSON values; steps and guidance_scale default to the pipeline's own.

    path       "fused" (one op per step), "own step" (the op decides and guides, the scheduler's step() updates), "own combination" (the
               pipeline guides, the op decides and guides what is guarded) or "refused"
    scale      the argument that guidance_scale is given as
    rows       one per denoiser evaluation. before, after: g in e = u + g (c - u) until a transition (None if there is none) and from it
               on; denoiser_rows: rows of the batch per image

    ValueError names the argument if there is no such model or scheduler, or the policy does not fit the schedule or the scale; with
    `probe` no policy fits a scale at which the second branch does not run.
    """
    index = models.model_index(model)
    kind = models.pipeline_class(index)
    defaults = {name: p.default for name, p in inspect.signature(kind.__call__).parameters.items()}  # type: ignore[operator]
    known: Family | None = None
    try:
        known = find(kind)
    except TypeError as error:
        refusal: str | None = str(error)
        made = models.own_scheduler(model, index)
        made = made if scheduler is None else models.with_scheduler(scheduler, made.config, kind)
    else:
        built = models.skeleton(model, scheduler=scheduler)
        made, refusal = built.scheduler, models.distilled(built)

    count = int(defaults.get("num_inference_steps", 50)) if steps is None else steps
    # A schedule that shifts with the image's size has its largest shift at 1024 x 1024, these models' default.
    shift = {"mu": made.config.max_shift} if made.config.get("use_dynamic_shifting") else {}
    try:
        made.set_timesteps(count, **shift)
        schedule = compile_schedule(made, step_kwargs=expected_arguments(made, defaults))
    except Exception as error:  # each scheduler refuses in its own way
        raise ValueError(f"steps={count}: {type(made).__name__} refuses: {error}") from None

    own = None if isinstance(known, Fused) else known
    name, offset = (own.scale, own.offset) if own else ("guidance_scale", 0.0)
    given = float(defaults.get(name, 7.5)) if guidance_scale is None else guidance_scale
    scale = given + offset  # g of u + g (c - u)
    (sample,) = policy.samples(1)
    if scale <= 1 and (sample.guarded or (probe and not refusal)):
        why = f"under policy {sample.name!r}" if sample.guarded else "for a probe"
        raise ValueError(
            f"{name}={given:g}: must be above {1 - offset:g} {why} (at or below it pipelines run no unconditional branch)"
        )
    plan = lower([sample], schedule, scale, elements=1)  # only the gate's threshold on d depends on the elements
    body, branches, guidance = schedule.rows[:-1], list(plan.branches), plan.guidance[0].tolist()
    if own is not None:  # one call for both branches is made whole; of two, each runs in the first row
        branches = ["both", *branches[1:]] if own.calls > 1 and own.skippable else ["both"] * len(body)
    if scale <= 1:  # pipelines run the conditional branch alone then, whatever number the scale is
        branches, guidance = ["cond"] * len(body), [(1.0, 1.0)] * len(body)
    # Without a transition nothing comes before; the rule of an anchored policy begins at row 0 all the same.
    switch = NEVER if sample.transition is None else int(plan.rules[0, Rule.SWITCH_ROW])
    rows = [
        {
            "row": k,
            "timestep": plan.timesteps[k],
            "observe": bool(body[k, Row.OBSERVE]),
            "branches": branches[k],
            "denoiser_rows": 2 if branches[k] == "both" else 1,
            "before": None if sample.transition is None else before,
            "after": after,
            "switch": k == switch,
        }
        for k, (before, after) in enumerate(guidance)
    ]
    return {
        "model": model,
        "pipeline": kind.__name__,
        "path": "refused" if refusal else "own combination" if own else "fused" if schedule.linear else "own step",
        "reason": refusal or (own.nonlinear if own else schedule.reason),
        "family": known.name if known else None,
        "scheduler": type(made).__name__,
        "form": schedule.form,
        "history": schedule.history,
        "residual": schedule.residual if schedule.linear else None,
        "noise_draws": sum(schedule.draws),
        "policy": sample.to_dict(),
        "scale": name,
        "guidance_scale": given,
        "steps": count,
        "switch_row": None if switch == NEVER else switch,
        "denoiser_rows": sum(row["denoiser_rows"] for row in rows),
        "plain_rows": 2 * len(rows),
        "rows": rows,
    }


def as_text(found: dict[str, Any]) -> str:
    """What `inspect_model` found, to read."""
    policy, rows = found["policy"], found["rows"]
    kind, limit = policy["transition"], "t*" if policy["transition"] == "static" else "deadline"
    what = ["anchored"] * policy["anchored"] + [f"transition {kind}"] * (kind is not None)
    scale = f"{found['guidance_scale']:g}"
    if policy["guidance_scale"] is not None:
        low, high = min(row["after"] for row in rows), max(row["after"] for row in rows)
        scale = f"{low:g} (the policy's)" if low == high else f"{low:g} to {high:g}, by row (the policy's)"
    residual = "none (own step)" if found["residual"] is None else f"{found['residual']:.1e}"
    lines = [
        f"model      {found['model']} ({found['pipeline']})",
        f"path       {': '.join(filter(None, (found['path'], found['reason'])))}",
        f"family     {found['family'] or 'none'}",
        f"scheduler  {found['scheduler']}",
        f"table      form {found['form']}, lags {found['history']}, noise draws {found['noise_draws']}, residual {residual}",
        f"policy     {policy['name']}, {', '.join(what) or 'transition none'}, gate {policy['gate'] or 'none'}, guidance scale {scale}",
        f"cost       {found['denoiser_rows']} denoiser rows per image in {len(rows)} evaluations; plain guidance "
        f"{found['plain_rows']} ({found['denoiser_rows'] / found['plain_rows']:.0%})",
    ]
    if (switch := found["switch_row"]) is not None:
        lines.append(f"switch     {limit} at row {switch}, t = {rows[switch]['timestep']:g}")
    lines += ["", f"{'row':>4} {'t':>9}  observed  branches  rows  g before   g after"]
    for row in rows:
        shown = row | {"observe": "yes" if row["observe"] else "no", "mark": f"  <- {limit}" * row["switch"]}
        shown["before"] = "-" if row["before"] is None else f"{row['before']:g}"
        lines.append(ROW.format(**shown))
    return "\n".join(lines)


def probe_model(found: dict[str, Any]) -> Probe:
    """Load the weights of the model that `inspect_model` found, and run its loop on random numbers, with a prompt and an empty negative one.

    ValueError where the model cannot be loaded or the pipeline needs more than prompts (a picture).
    """
    pipe = models.load_pipeline(found["model"], scheduler=found["scheduler"], auto=False)
    wanted = {"prompt": "a photograph of a house", "negative_prompt": "", "num_inference_steps": found["steps"]}
    wanted |= {found["scale"]: found["guidance_scale"]}
    names = inspect.signature(type(pipe).__call__).parameters
    with enable(pipe, "cfg") as guard:
        try:
            return guard.probe(**{name: value for name, value in wanted.items() if name in names})
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # each pipeline refuses in its own way
            raise ValueError(
                f"probe: {found['pipeline']} does not run on prompts alone ({error}); with arguments of your own: guard.probe(...)"
            ) from error
