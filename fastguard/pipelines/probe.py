"""What a pipeline's loop does with its denoiser's outputs: found by running it once on random numbers.

The loop runs at full length on a copy of the pipeline, with a copy of the scheduler and a stub in the denoiser's place. Per row, what
reaches `scheduler.step` is fitted by the two branches p, q, for each image:  e = a p + b q. That tells order, sign, effective scale
and linearity. A family is held against it, or made of it where a class is on no list.
"""

import copy
import dataclasses
import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fastguard.capture.static_inputs import tensors_of
from fastguard.pipelines.enabled import stock_class
from fastguard.pipelines.families import Family, parts_of
from fastguard.pipelines.own_combination import OwnCombination
from fastguard.policies.presets import policy

DENOISERS = ("transformer", "transformer_2", "unet", "prior", "decoder")
UNKNOWN = "unknown"  # the name of a family whose first call is to be probed
LINEAR = 1e-5  # largest residual of a linear combination in float32; measured: 7e-8
LINEAR_NARROW = 3e-2  # where the pipeline combines in float16 or bfloat16
RATIO = 0.15  # of a / b, where a norm is restored besides; measured: 0.02 to 0.06


@dataclass(frozen=True)
class ProbedRow:
    """cond, uncond: the weights a, b of the branches in e, None in a row with one branch; scale: the declared effective one.

    residual: largest |e - a c - b u|, relative to the largest |e|; narrow: e has fewer bits than float32.
    direction: the same for e and the declared combination, both of norm 1 along the family's `norm`; None where it has none.
    image: whose numbers these are: of the first image that contradicts the family, else of image 0.
    """

    scale: float
    cond: float | None = None
    uncond: float | None = None
    residual: float = 0.0
    narrow: bool = False
    direction: float | None = None
    image: int = 0

    @property
    def linear(self) -> bool:
        return self.residual <= (LINEAR_NARROW if self.narrow else LINEAR)

    def contradiction(self, family: Family) -> str | None:
        """How this differs from what the family declares; None if it does not, or if one branch ran."""
        a, b, g = self.cond, self.uncond, self.scale
        if a is None or b is None:
            return None
        tolerance = (LINEAR_NARROW if self.narrow else 1e-4) * max(abs(g), 1.0)

        def in_ratio(tolerance: float) -> bool:
            """Whether (a, b) is (g, 1 - g) up to a positive factor, one for the whole image."""
            factor = a / g
            return factor > 0 and abs(b - factor * (1 - g)) <= tolerance * factor

        expected = f"e = {1 - g:.4g} u + {g:.4g} c is expected"
        where = f"where {expected}"
        if self.linear:
            right = abs(a - g) <= tolerance and abs(b - 1 + g) <= tolerance
            right = right or (bool(family.nonlinear) and in_ratio(tolerance))
        elif family.by_sign:
            right, where = a > 0 > b, "where it goes from u to c"
        elif not family.nonlinear:
            right, where = False, f"not linear, where {expected}"
        elif self.direction is not None:
            right, where = self.direction <= tolerance, f"where a multiple of {expected}"
        else:
            right, where = in_ratio(RATIO * max(abs(g), 1.0)), f"where about {expected}"
        return None if right else f"e = {b:.4g} u + {a:.4g} c (residual {self.residual:.1g}), {where}"


@dataclass(frozen=True)
class Probe:
    """What was found: the rows that ran, and why the loop broke off, if it did."""

    family: Family
    rows: tuple[ProbedRow, ...]
    problem: str | None = None

    def contradictions(self) -> list[str]:
        """How the loop differs from what the family declares; empty if it does not."""
        if self.problem:
            return [self.problem]
        if not any(row.cond is not None for row in self.rows):
            return [f"no row ran a second branch; {self.family.second_branch}"]
        return [
            f"row {k}{f', image {row.image}' if row.image else ''}: {text}"
            for k, row in enumerate(self.rows)
            if (text := row.contradiction(self.family))
        ]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        rows = [{**dataclasses.asdict(row), "linear": row.linear} for row in self.rows]
        return {"family": self.family.name, "contradictions": self.contradictions(), "rows": rows}

    def __str__(self) -> str:
        family, found = self.family, self.contradictions()
        order = ", ".join("cu"[branch == "uncond"] for branch in family.order)
        calls = f"two calls {order}" if family.calls == 2 else f"one batch [{order}]"
        declared = f"{family.name}: {calls}, {'negated, ' if family.sign < 0 else ''}{family.scale}"
        offset = f" + {family.offset:g}" if family.offset else ""
        lines = [f"{declared}{offset}: {'the loop does otherwise' if found else 'agrees with the loop'}", *found]
        for k, row in enumerate(self.rows):
            if row.cond is None:
                lines.append(f"{k:>4}  one branch")
            else:
                kind = "linear" if row.linear else "not linear"
                lines.append(f"{k:>4}  e = {row.uncond:.4g} u + {row.cond:.4g} c   {kind}, residual {row.residual:.1g}")
        return "\n".join(lines)


class _Finished(Exception):
    """The last row has run."""


class _Probing(OwnCombination):
    """An own combination that only looks: weights and residual of every row. The denoiser runs once for each form of its inputs."""

    def __init__(self, family: Family, arguments: Mapping[str, Any], pipe: Any) -> None:
        super().__init__(policy("cfg"), family, arguments, pipe)
        self._skip_until = 0
        self.rows: list[ProbedRow] = []
        self._generator = torch.Generator().manual_seed(0)
        self._outputs_of: dict[Any, Any] = {}
        self.denoisers = {name: functools.partial(self._stub, name, part) for name, part in self.denoisers.items()}

    def begin(self, latents: torch.Tensor, row: int) -> None:
        """It needs no tables."""

    def _stub(self, name: str, denoiser: Any, *args: Any, **kwargs: Any) -> Any:
        key = (name, *(tuple(t.shape) for t in tensors_of((args, kwargs))))
        if key not in self._outputs_of:
            self._outputs_of[key] = denoiser(*args, **kwargs)
        return self._random(self._outputs_of[key])

    def _random(self, tree: Any) -> Any:
        if isinstance(tree, torch.Tensor):
            return torch.randn(tree.shape, generator=self._generator).to(tree.device)
        if isinstance(tree, (tuple, list)):  # torch's pytree would take a subclass for a leaf
            return type(tree)([self._random(one) for one in tree])
        if isinstance(tree, dict):
            return type(tree)(**{name: self._random(one) for name, one in tree.items()})
        return tree

    def _guided(self, output: torch.Tensor, sample: torch.Tensor, timestep: Any) -> torch.Tensor:
        combined = output[:, : sample.shape[1]] if output.shape[1] > sample.shape[1] else output
        uncond, cond = self._branches(combined)
        scale = self.family.guidance_scale(self.stand_in, self.arguments, self._outputs[0].denoiser)
        narrow = output.dtype in (torch.float16, torch.bfloat16)
        if uncond is None or cond is None:
            self.rows.append(ProbedRow(scale))
        else:
            images = [
                ProbedRow(scale, *_fitted(e, c, u), narrow, self._direction(e, u + scale * (c - u)), image)
                for image, (e, c, u) in enumerate(zip(combined, cond, uncond, strict=True))
            ]
            self.rows.append(next((row for row in images if row.contradiction(self.family)), images[0]))
        return output

    def _direction(self, e: torch.Tensor, declared: torch.Tensor) -> float | None:
        if self.family.norm is None:
            return None
        dim = self.family.norm if self.family.norm < 0 else self.family.norm - 1  # of one image
        pair = (tensor.double() / tensor.double().norm(dim=dim, keepdim=True) for tensor in (e, declared))
        return torch.sub(*pair).abs().max().item()

    def step(self, *args: Any, **kwargs: Any) -> Any:
        result = super().step(*args, **kwargs)
        if len(self.rows) >= len(self.scheduling.scheduler.timesteps) - (self.scheduling.told_row or 0):
            raise _Finished
        return result


def probe(pipe: Any, arguments: Mapping[str, Any], family: Family) -> Probe:
    """Run the loop of `pipe`, called with `arguments`, on random numbers. A family that is unknown is inferred (`infer`).

    Text encoders and an image's encoder run as in a call; the denoiser once for each form of its inputs, nothing is decoded.
    Generators, the global random state, the scheduler, attributes and offloading are afterwards as before; no callback is called.
    """
    if family.name == UNKNOWN:
        return infer(pipe, arguments)
    stock_call: Any = stock_class(type(pipe)).__call__
    signature = inspect.signature(stock_call)
    given = {name: _cloned(value) for name, value in arguments.items() if "callback" not in name}
    if "output_type" in signature.parameters:
        given["output_type"] = "latent"
    values = by_name(signature, pipe, **given)
    state = object.__new__(type(pipe))
    own = {"scheduler": copy.deepcopy(pipe.scheduler), "_progress_bar_config": {"disable": True}}
    state.__dict__.update(pipe.__dict__, maybe_free_model_hooks=lambda: None, **own, **family.in_probe(pipe))
    call = _Probing(family, values, state)
    parts = parts_of(pipe, family.denoisers).values()
    hooked = [part for part in parts if "_diffusers_hook" in vars(part)]
    problem = None
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())), torch.no_grad():
            stock_call(call.stand_in, **given)
            call.finish()
    except _Finished:
        pass
    except torch.OutOfMemoryError:
        raise  # a RuntimeError, too, of which the loop knows nothing
    except RuntimeError as error:
        problem = str(error)
    finally:
        for hook in getattr(pipe, "_all_hooks", ()):
            hook.offload()
        for part in parts:
            if part not in hooked:
                vars(part).pop("_diffusers_hook", None)  # which cache_context makes
            elif hasattr(part, "_reset_stateful_cache"):
                part._reset_stateful_cache()
    return Probe(family, tuple(call.rows), problem)


def by_name(signature: inspect.Signature, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The arguments of a pipeline's call by name, with the defaults of what is not given."""
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    values = {**bound.arguments, **bound.arguments.get("kwargs", {})}
    return {name: value for name, value in values.items() if name not in ("self", "args", "kwargs")}


def _fitted(e: torch.Tensor, p: torch.Tensor, q: torch.Tensor) -> tuple[float, float, float]:
    """(a, b, residual) of e = a p + b q by least squares, for one image: some loops have a factor for each."""
    target, one, other = (tensor.detach().double().flatten().cpu() for tensor in (e, p, q))
    pair = torch.stack([one, other], 1)
    weights = torch.linalg.lstsq(pair, target[:, None]).solution
    residual = (target - (pair @ weights)[:, 0]).abs().max() / target.abs().max()
    return (*weights.flatten().tolist(), residual.item())


def unlisted(pipe: Any) -> Family:
    """What is known of a pipeline class that nobody declared: under which names it may have denoisers. TypeError if there is none."""
    name, found = stock_class(type(pipe)).__name__, tuple(parts_of(pipe, DENOISERS))
    if not found:
        raise TypeError(f"pipe: {name} has no denoiser under a name that is known: {', '.join(DENOISERS)}")
    return Family(name=UNKNOWN, pipelines=(name,), denoisers=found, skippable=False)


def infer(pipe: Any, arguments: Mapping[str, Any]) -> Probe:
    """The family of a pipeline that nobody declared is read off its first guided row, and probed as a declared one is.

    TypeError unless it combines u + g (c - u) with g = s + offset above 1 in every row, for every image.
    """
    stock: Any = stock_class(type(pipe))
    known = {*inspect.signature(stock.__call__).parameters, *arguments}
    scale = "true_cfg_scale" if "true_cfg_scale" in known else "guidance_scale"
    problem = f"its call has no {scale}"
    for calls in (1, 2) if scale in known else ():
        guess = dataclasses.replace(unlisted(pipe), name="probe", calls=calls, scale=scale)
        found = probe(pipe, arguments, guess)
        row = next((row for row in found.rows if row.cond is not None), None)
        if found.problem or row is None or row.cond is None or row.uncond is None:
            problem = found.problem or "no row ran a second branch"
            continue
        sign = 1 if row.cond + row.uncond > 0 else -1
        p, q = sign * row.cond, sign * row.uncond
        offset = round(max(p, q) - row.scale, 4)
        order = guess.order if p > q else guess.order[::-1]  # c is the branch that weighs more
        held = probe(pipe, arguments, dataclasses.replace(guess, order=order, sign=sign, offset=offset))
        contradictions = held.contradictions()
        if not contradictions and row.scale + offset > 1:
            return held
        found_there = f"row {found.rows.index(row)}: e = {row.cond:.4g} p + {row.uncond:.4g} q"
        problem = contradictions[0] if contradictions else f"{found_there}: g is at most 1, where either may be c"
        break
    raise TypeError(
        f"pipe: {stock.__name__} cannot be guarded: {problem}, which is not u + g (c - u) of two branches with one g above 1"
    )


def _cloned(value: Any) -> Any:
    """Generators of one's own, at the same place."""
    if isinstance(value, torch.Generator):
        return value.clone_state()
    return [_cloned(one) for one in value] if isinstance(value, list) else value
