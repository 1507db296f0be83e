"""How well screening tells the embedded model's memorized prompts (D) from ordinary ones: AUC on the test halves, by the number of noises,
and what a bound flags of them that the ordinary prompts of the tuning half give (at most 5%, confidence 0.95).

    python -m bench.testbed.screening

Intervals (95%, bootstrap) are over prompts. The noises are the first of `fastguard screen`.
"""

from __future__ import annotations

import json

import numpy as np

from bench.testbed.stats import auc_over_prompts
from fastguard.batch.options import JobOptions
from fastguard.batch.prompt_files import load
from fastguard.batch.screening import statistics
from fastguard.batch.task import model_of, options_for
from fastguard.pipelines.loading import EMBEDDED
from fastguard.pipelines.quiet import quiet
from fastguard.policies.gate import calibrate

COUNTS = (1, 2, 4, 8)


def main() -> None:
    quiet()
    prompts = json.loads((EMBEDDED / "prompts.json").read_text())
    memorized = [row["prompt"] for row in prompts["memorized"] if row["half"] == "test" and row["type"] == "D"]
    ordinary, tuning = (
        [row["prompt"] for row in prompts["ordinary"] if row["half"] == half] for half in ("test", "tuning")
    )
    options = options_for("testbed", JobOptions())
    requests, _ = load([*memorized, *ordinary, *tuning], options)
    values = np.array(statistics(model_of("testbed", options)[1](), requests, max(COUNTS), most=32))
    end = len(memorized) + len(ordinary)
    for count in COUNTS:
        means = values[:, :count].mean(1)
        rows = [{"prompt": request.prompt, "mean": mean} for request, mean in zip(requests, means, strict=True)]
        found = auc_over_prompts(rows[: len(memorized)], rows[len(memorized) : end], "mean")
        bound = calibrate(means[end:].tolist(), 0.05, 0.95).threshold
        flagged = [int((part >= bound).sum()) for part in (means[: len(memorized)], means[len(memorized) : end])]
        print(
            f"{count} noises: AUC {found['mean']:.4f} ({found['low']:.4f} to {found['high']:.4f}); from {bound:.4g} on",
            *flagged,
        )
    print(f"{len(memorized)} memorized prompts, {len(ordinary)} ordinary ones")


if __name__ == "__main__":
    main()
