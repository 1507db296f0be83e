"""The gate's threshold from ordinary prompts, with a finite-sample guarantee.

The gate catches an image whose RMS(c - u) at the first observation is >= tau. Let x_(1) <= ... <= x_(n) be that statistic on n
ordinary prompts, drawn independently from the prompts that the guard will meet. For tau just above x_(n-m) the share of ordinary
prompts that would be caught is at most that beyond an order statistic, whose law is known whatever the distribution of x:

    P(FPR <= fpr) >= P(Binomial(n, fpr) > m)          (a one-sided tolerance bound; ties only make it smaller)

`calibrate` takes the largest m for which this is >= confidence. With m = 0 it needs (1 - fpr)^n <= 1 - confidence: 299 prompts for
fpr 0.01 at confidence 0.95, and fewer are refused.

The unit is what was drawn independently. Several seeds of one prompt are not independent, so each prompt enters with the largest of its
seeds. Nor are several phrases about one thing: say which belong together (`groups`), and each group enters with its largest. The bound is
then on the units of which ANY image is caught that is made as those of the sample were: with so many prompts and seeds a unit (of more
images, more units have one that is caught). The share of images that are caught is smaller.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastguard import checks
from fastguard.files import short
from fastguard.policies.policy import Policy

SMALLEST_FPR = 1e-12  # 3e12 prompts; far below it their number leaves the floats
NOISES = 4  # of a screening


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """threshold tau (same unit as RMS), the wish, the sample, the units at or above tau, and the statement in words."""

    threshold: float
    fpr: float
    confidence: float
    prompts: int
    groups: int | None
    """The units, where prompts were grouped."""
    exceeding: int
    statement: str

    def to_dict(self) -> dict[str, Any]:
        """JSON values, for the `provenance` of a policy file."""
        return dict(vars(self))


def _binomial_cdf(m: int, n: int, p: float) -> float:
    """P(Binomial(n, p) <= m)."""
    log_ways = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(m + 1)]
    return math.fsum(math.exp(ways + k * math.log(p) + (n - k) * math.log1p(-p)) for k, ways in enumerate(log_ways))


def needed_prompts(fpr: float, confidence: float) -> int:
    """The smallest n with (1 - fpr)^n <= 1 - confidence."""
    for name, value in (("fpr", fpr), ("confidence", confidence)):
        checks.number(name, value, "strictly between 0 and 1", lambda share: 0 < share < 1)
    if fpr < SMALLEST_FPR:
        raise ValueError(f"fpr={fpr!r}: must be at least {SMALLEST_FPR:g}")
    return math.ceil(math.log1p(-confidence) / math.log1p(-fpr))  # 1 - fpr may well be 1 in floats


def calibrate(
    rms_values: Sequence[float],
    fpr: float = 0.01,
    confidence: float = 0.95,
    *,
    groups: Sequence[Hashable] | None = None,
) -> Calibration:
    """The lowest threshold of which this sample proves P(FPR <= fpr) >= confidence.

    rms_values   one value per ordinary prompt (`collect_gate_statistics`)
    fpr          allowed share of ordinary prompts (with `groups`: of groups) that are caught, from SMALLEST_FPR and below 1
    confidence   in (0, 1)
    groups       one label per prompt; prompts with the same label are not independent of each other, and count as one

    ValueError if the sample is too small for the wish (with the number that is needed), holds a value that is not finite, or if
    `groups` is not as long as `rms_values`.
    """
    labels = range(len(rms_values)) if groups is None else groups
    if len(labels) != len(rms_values):
        raise ValueError(f"groups holds {len(labels)} labels, rms_values {len(rms_values)} prompts: one label a prompt")
    largest: dict[Hashable, float] = {}
    for label, value in zip(labels, rms_values, strict=True):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError("rms_values: every value must be finite and >= 0")
        largest[label] = max(largest.get(label, 0.0), float(value))
    values = sorted(largest.values())
    n, unit = len(values), "prompts" if groups is None else "groups of prompts"
    check_sample(n, fpr, confidence, unit)
    m = 0
    while m + 1 < n and _binomial_cdf(m + 1, n, fpr) <= 1 - confidence:
        m += 1
    threshold = math.nextafter(values[n - m - 1], math.inf)
    exceeding = sum(value >= threshold for value in values)
    statement = (
        f"If the {n} calibration {unit} are independent draws from the ordinary {unit} that the guard meets, each met in as many images as"
        f" here, then with confidence {confidence:g} at most {fpr:.2%} of those have any RMS(c - u) >= {threshold:.6g} at the gate"
        f" ({exceeding} of the {n} do). It says nothing about other distributions of prompts, models, schedulers or step counts"
    )
    return Calibration(
        threshold=threshold, fpr=fpr, confidence=confidence, prompts=len(rms_values), groups=None if groups is None else n,
        exceeding=exceeding, statement=statement,
    )  # fmt: skip


def check_sample(n: int, fpr: float, confidence: float, unit: str = "prompts") -> None:
    """ValueError if n units cannot prove the wish, whatever their values."""
    needed = needed_prompts(fpr, confidence)
    if n < needed:
        raise ValueError(
            f"{n} ordinary {unit}: fpr={fpr:g} at confidence={confidence:g} needs at least {needed}. Collect more, or ask for less"
        )


def screening_bound(policy: Policy) -> tuple[int, float]:
    """(noises, the mean over them from which on a prompt is flagged) of a policy: what `fastguard calibrate` found, or else its gate,
    which is one for single images, over `NOISES`. ValueError if it has neither."""
    known = policy.provenance.get("screen")
    if isinstance(known, Mapping):
        return int(known["noises"]), float(known["threshold"])
    if policy.gate is None:
        neither = "has neither a bound for screening nor a gate; `fastguard calibrate` finds them"
        raise ValueError(f"policy {short(policy.name)}: {neither}")
    return NOISES, policy.gate  # type: ignore[return-value]  # of one image, no list
