"""What happened, image by image: the curve of d, the gate's verdict, the transition, and what it cost."""

import functools
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, TypedDict, overload

import torch

from fastguard.files import finite, write_atomic
from fastguard.kernels.layout import State
from fastguard.loop.loop import Loop
from fastguard.policies.plan import Plan
from fastguard.policies.policy import Policy

FORMAT = 1  # version of the JSON


class Gate(TypedDict):
    """The gate's verdict. rms = sqrt(d / elements), the largest among its observations (None before the first)."""

    caught: bool
    rms: float | None
    threshold: float  # tau
    step: int | None  # row at which it caught the image


@dataclass(frozen=True, kw_only=True)
class ImageReport:
    """One image. Rows count denoiser evaluations from 0; a value is None if the thing did not happen.

    d_curve              per row d = ||c - u||_2^2; None where one of the branches, or the whole row, was not run
    share_curve          per row the share p of the guidance that leads to the anchor: 1 at the first row for any prompt, about 0 once the image
                         has left it; None where the image is not anchored
    timesteps            per row
    policy_hash          of what the policy does (`Policy.hash`)
    transition_step      first row with the guidance scale that follows the transition, and its timestep
    minimum_step         row of the local minimum that fired the rule, and its timestep
    margin               how far the minimum lies below its smaller neighbour (drop rule: the statistic below its threshold), relative:
                         a decision with a small margin may turn out otherwise with another dtype or device
    gate                 see `Gate`; None if the policy has none
    forced               the deadline ended the guard, not the rule
    non_finite           first row whose d was NaN or infinite; the last row if only the finished latents show it (no d is formed
                         where one branch runs alone)
    denoiser_rows        rows of the denoiser's batch that this image cost; plain guidance: two per evaluation
    path, reason         which code ran, and why it was not the fused op alone ("own step": the scheduler is not linear)
    """

    policy: Policy
    policy_hash: str
    timesteps: tuple[float, ...]
    d_curve: tuple[float | None, ...]
    share_curve: tuple[float | None, ...]
    elements: int
    transition_step: int | None
    transition_timestep: float | None
    minimum_step: int | None
    minimum_timestep: float | None
    margin: float | None
    gate: Gate | None
    forced: bool
    non_finite: int | None
    denoiser_rows: int
    path: str
    reason: str | None = None

    @property
    def _guarded(self) -> bool:
        """Whether the guard held this image: its policy guards, and its gate, if it has one, caught it."""
        return self.policy.guarded and (self.gate is None or self.gate["caught"])

    @property
    def rms_curve(self) -> tuple[float | None, ...]:
        """RMS(c - u) = sqrt(d / elements) per row: the gate's unit, independent of the latent's size."""
        return tuple(None if d is None else math.sqrt(d / self.elements) for d in self.d_curve)

    @property
    def collapse(self) -> float | None:
        """d at mid-run over d at the first row: small where the guidance vanishes, as it does on the way to a memorized picture."""
        first, middle = self.d_curve[0], self.d_curve[len(self.d_curve) // 2]
        return middle / first if first and middle is not None else None

    @property
    def suspect(self) -> bool | None:
        """Whether `collapse` lies below the policy's bound, which is one for plain guidance: None for a guarded image, or without bound or curve."""
        bound: Any = self.policy.suspect  # one image's, no list
        collapse = self.collapse
        return None if bound is None or collapse is None or self._guarded else collapse < bound

    def to_dict(self) -> dict[str, Any]:
        """JSON values; what is not finite becomes None."""
        judged = {"collapse": self.collapse, "suspect": self.suspect}
        return finite({**vars(self), "policy": self.policy.to_dict(), **judged})

    def __str__(self) -> str:
        parts = [self.policy.name, f"gate: {self.gate_text()}" if self.gate else "", self.transition_text()]
        parts.append(f"SUSPECT (collapse {self.collapse:.3g} < {self.policy.suspect:g})" if self.suspect else "")
        parts.append("" if self.non_finite is None else f"NOT FINITE from row {self.non_finite}")
        return "  ".join(filter(None, map(str, [*parts, f"{self.denoiser_rows} denoiser rows"])))

    def _repr_html_(self) -> str:
        return _table([self], self.path if self.reason is None else f"{self.path}: {self.reason}")

    def gate_text(self) -> str:
        """The gate's verdict in words; empty without a gate."""
        if self.gate is None:
            return ""
        rms, threshold = self.gate["rms"], f"{self.gate['threshold']:.4g}"
        if rms is None:
            return f"not caught (no finite observation; threshold {threshold})"
        if self.gate["caught"]:
            return f"caught at row {self.gate['step']} (RMS {rms:.4g} >= {threshold})"
        return f"not caught (RMS {rms:.4g} < {threshold})"

    def transition_text(self) -> str:
        """When the guard ended, in words; empty for images that the gate released."""
        if self.policy.transition is None:
            return "anchored" if self._guarded else "plain guidance"
        if self.transition_step is None:
            return "no transition" if self._guarded else ""
        minimum = "" if self.minimum_timestep is None else f"minimum at t = {self.minimum_timestep:g}"
        margin = "" if self.margin is None else f"margin {self.margin:.2%}"
        details = ", ".join(filter(None, (minimum, margin)))
        how = "forced" if self.forced else "transition"
        text = f"{how} at row {self.transition_step}, t = {self.transition_timestep:g}"
        return f"{text} ({details})" if details else text


class Report(Sequence[ImageReport]):
    """A sequence of `ImageReport`, one per image of a call. The device is read once, when the report is first looked at."""

    def __init__(
        self,
        loop: Loop,
        plan: Plan,
        *,
        rows_run: int,
        path: str,
        reason: str | None = None,
        latents: torch.Tensor | None = None,
    ) -> None:
        """Report on a finished (or interrupted) call, without waiting for the device: the loop's buffers are copied on it.

        plan      as `lower` made it, of B images and K rows
        rows_run  denoiser rows per image
        latents   [>= B, ...] at the end: whether they are finite
        """
        rows, batch = len(plan.timesteps), len(plan.policies)
        state, d = (t.double() for t in (loop.state[:batch], loop.trace[:rows, :batch]))
        shares = torch.full_like(d, math.nan) if loop.shares is None else loop.shares[:rows, :batch].double()
        finite = state.new_ones(batch) if latents is None else latents[:batch].flatten(1).isfinite().all(1).double()
        self.path, self.reason = path, reason
        self._plan, self._rows_run = plan, rows_run
        self._numbers = torch.cat([state.T, finite[None], d, shares])
        on_device = self._numbers.is_cuda and torch.cuda.is_initialized()
        self._ready = torch.cuda.current_stream(self._numbers.device).record_event() if on_device else None

    @functools.cached_property
    def images(self) -> tuple[ImageReport, ...]:
        """Waits for the device."""
        if self._ready is not None:
            self._ready.synchronize()
        lines = self._numbers.cpu().T.tolist()
        return tuple(self._image(policy, line) for policy, line in zip(self._plan.policies, lines, strict=True))

    def _image(self, policy: Any, numbers: list[float]) -> ImageReport:
        state, finite, trace = numbers[: len(State)], bool(numbers[len(State)]), numbers[len(State) + 1 :]
        times, elements = self._plan.timesteps, self._plan.elements

        def row(column: State) -> int | None:
            return int(state[column]) if state[column] >= 0 else None

        def known(value: float) -> float | None:
            return None if math.isnan(value) else value

        transition = row(State.TRANSITION_STEP) if policy.transition else None
        minimum, caught, non_finite = row(State.MINIMUM_STEP), row(State.GATE_STEP), row(State.NON_FINITE)
        rms = math.sqrt(state[State.GATE_D] / elements) if state[State.GATE_D] >= 0 else None
        gate = Gate(caught=caught is not None, rms=rms, threshold=policy.gate, step=caught)
        # NaN is what a row leaves that did not run both branches, unless the op says that d itself was not finite.
        ran = int(state[State.STEP])
        not_finite = range(ran if non_finite is None else non_finite, ran)
        d_curve = (d if k in not_finite else known(d) for k, d in enumerate(trace[: len(times)]))
        return ImageReport(
            policy=policy,
            policy_hash=policy.hash,
            timesteps=times,
            d_curve=tuple(d_curve),
            share_curve=tuple(map(known, trace[len(times) :])),
            elements=elements,
            transition_step=transition,
            transition_timestep=None if transition is None else times[transition],
            minimum_step=minimum,
            minimum_timestep=None if minimum is None else times[minimum],
            margin=known(state[State.MARGIN]),
            gate=None if policy.gate is None else gate,
            forced=bool(state[State.FORCED]),
            non_finite=ran - 1 if non_finite is None and not finite else non_finite,
            denoiser_rows=self._rows_run,
            path=self.path,
            reason=self.reason,
        )

    @overload
    def __getitem__(self, index: int) -> ImageReport: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[ImageReport, ...]: ...
    def __getitem__(self, index: int | slice) -> ImageReport | tuple[ImageReport, ...]:
        return self.images[index]

    def __len__(self) -> int:
        return len(self._plan.policies)

    def __repr__(self) -> str:
        return "\n".join([self._title(), *(f"{b:3d}: {image}" for b, image in enumerate(self.images))])

    def _repr_html_(self) -> str:
        return _table(self.images, self._title())

    def _title(self) -> str:
        why = f": {self.reason}" if self.reason else ""
        return f"{len(self)} image{'s' * (len(self) != 1)}, {self.path} path{why}"

    def to_dict(self) -> dict[str, Any]:
        images = [image.to_dict() for image in self.images]
        return {"fastguard_report": FORMAT, "path": self.path, "reason": self.reason, "images": images}

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Strict JSON (NaN and infinities are null); also written to `path`, atomically, if one is given."""
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False, ensure_ascii=False)
        if path is not None:
            write_atomic(path, text + "\n")
        return text

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """The curves as a matplotlib Figure; also saved to `path` (its suffix is the format) if one is given."""
        from fastguard.loop.plot import plot_curves

        return plot_curves(self.images, path)


def _table(images: Sequence[ImageReport], title: str) -> str:
    """HTML, a line per image, for notebooks."""
    lines = ["<tr><th>image</th><th>policy</th><th>gate</th><th>what happened</th><th>rows</th></tr>"]
    for b, image in enumerate(images):
        broken = "" if image.non_finite is None else f"not finite from row {image.non_finite}"
        told = ", ".join(filter(None, (image.transition_text(), "suspect" if image.suspect else "", broken)))
        cells = (b, image.policy.name, image.gate_text(), told, image.denoiser_rows)
        lines.append(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in cells)}</tr>")
    return f"<p>{escape(title)}</p><table>{''.join(lines)}</table>"
