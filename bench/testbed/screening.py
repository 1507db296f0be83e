"""How well screening tells the embedded model's memorized prompts (D) from ordinary ones: AUC on the test halves, by the number of noises.

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
from fastguard.pipelines.loading import EMBEDDED, quiet

COUNTS = (1, 2, 4, 8)


def main() -> None:
    quiet()
    prompts = json.loads((EMBEDDED / "prompts.json").read_text())
    test = {kind: [row for row in prompts[kind] if row["half"] == "test"] for kind in ("memorized", "ordinary")}
    memorized = [row["prompt"] for row in test["memorized"] if row["type"] == "D"]
    ordinary = [row["prompt"] for row in test["ordinary"]]
    requests, _ = load([*memorized, *ordinary], options_for("testbed", JobOptions()))
    _, load_model, _ = model_of("testbed", options_for("testbed", JobOptions()))
    values = np.array(statistics(load_model(), requests, max(COUNTS), most=32))
    for count in COUNTS:
        rows = [
            {"prompt": request.prompt, "mean": own}
            for request, own in zip(requests, values[:, :count].mean(1), strict=True)
        ]
        found = auc_over_prompts(rows[: len(memorized)], rows[len(memorized) :], "mean")
        print(f"{count} noises: AUC {found['mean']:.4f} ({found['low']:.4f} to {found['high']:.4f})")
    print(f"{len(memorized)} memorized prompts, {len(ordinary)} ordinary ones")


if __name__ == "__main__":
    main()
