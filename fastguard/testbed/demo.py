"""`fastguard demo`: what the guard does, to the eye, in under a minute on two cores.

Memorized and ordinary prompts of the test half from the same seeds: without a guard, under presets of the paper with the
embedded model's gate, and under the policy that ships with the embedded model. Writes grid.png, curves.png, table.json and
index.html.
"""

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from fastguard.policies.policy import Policy
from fastguard.policies.presets import policy

from . import Prompt, load, policy_path, prompts, training_images
from .measures import COPY, Judge
from .page import PAGE
from .sampling import Sample, generate

FREE, SHIPPED = "no guard", "shipped policy"
TITLES = {
    FREE: FREE,
    "stp": "stp: unguided\nuntil t = 500",
    "dtp": "dtp: unguided\nuntil d turns",
    "og+dtp": "og+dtp: reversed\nuntil d turns",
    SHIPPED: "shipped policy:\nanchored",
}
MODES = tuple(TITLES)
SHOWN = {"D": 5, "T": 1, "ordinary": 4}  # prompts of each kind
KINDS = {"D": "memorized", "T": "memorized, caption of its own", "ordinary": "ordinary"}
COLOURS = {"D": "C3", "T": "C1", "ordinary": "C0"}
TABLES = {
    "D": "Memorized prompts, plain captions shared with other drawings (D)",
    "T": "Memorized prompts with a caption of their own (T): a stress case",
    "ordinary": "Ordinary prompts",
}
COLUMNS = {
    "images": "{}", "caught by the gate": "{}", "copies": "{:.0%}", "similarity": "{:.2f}", "faithful, no copies": "{:.0%}",
}  # fmt: skip
GRID = "A row a prompt, the same noise in every column. Red frame: a copy of the training image."
CURVES = (
    "By timestep: RMS(c - u), with a short mark for the gate, where it is compared; and, of the images that the shipped policy "
    "holds, how much of the guidance leads to the anchor, the picture that the first prediction shows."
)
LEAD = (
    "Without a guard {free[copies]:.0%} of the images of the memorized D prompts are copies of their training image. The gate caught "
    "{own[caught by the gate]} of these {own[images]}, and under the shipped policy {own[copies]:.0%} of all are copies. Of the "
    "{ordinary[images]} ordinary images it touched {ordinary[caught by the gate]}; the others are what they are without a guard, bit for bit."
)
FOOT = (
    f"Copy: an image whose latents differ from the training image's by a root mean square below {COPY:g}. Similarity: "
    "the cosine of the two latents, on average. Faithful: a classifier's first choice for the image is what the "
    "caption names; images that are copies are not counted, for it never saw their training images. {} images, {} seeds a prompt; "
    "prompts of the test half, the most duplicated first. The full measurement with confidence intervals is in docs/testbed."
)


def chosen() -> list[Prompt]:
    """The first test prompts of each kind, the most duplicated ones first: not picked by result."""
    return [p for kind, n in SHOWN.items() for p in sorted(prompts(kind, "test"), key=lambda p: -p.factor)[:n]]


def make_jobs(shown: Sequence[Prompt], seeds: int, own: Policy) -> list[Sample]:
    """Every prompt and seed under every mode, mode by mode; `own`: the embedded model's policy, with the gate of all."""
    policies = {m: policy(m, gate=own.gate) for m in MODES[1:-1]}
    policies |= {FREE: policy("cfg"), SHIPPED: own}
    return [Sample(p, s, policies[m]) for m in MODES for p in shown for s in range(seeds)]


def run_demo(out: Path = Path("demo"), *, seeds: int = 2) -> list[Path]:
    """Generate, measure and write everything to `out`; returns the paths, the page last.

    seeds   images per prompt and mode; the grid shows the first, the table averages all
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    pipe, shown, own = load(), chosen(), policy(policy_path())
    judge, work = Judge(pipe), make_jobs(shown, seeds, own)
    pipe.set_progress_bar_config(desc=f"{len(work)} images", unit="step")
    latents, reports = generate(pipe, work)
    measured = judge(latents, [job.prompt for job in work])
    each = len(shown) * seeds
    rows: list[dict[str, Any]] = [
        {"mode": MODES[i // each], "kind": job.prompt.kind, **{name: values[i] for name, values in measured.items()}, **reports[i]}
        for i, job in enumerate(work)
    ]  # fmt: skip
    pictures = judge.decode(latents).add(1).mul(127.5).byte().permute(0, 2, 3, 1).numpy()
    copies = np.array([bool(row["copy"]) for row in rows])
    paths = [out / name for name in ("grid.png", "curves.png", "table.json", "index.html")]
    grid, curves, numbers, index = paths
    first = (len(MODES), len(shown), seeds)
    draw_grid(grid, shown, pictures.reshape(*first, 32, 32, 3)[:, :, 0], copies.reshape(first)[:, :, 0])
    draw_curves(curves, rows, own)
    lines = summary(rows)
    numbers.write_text(json.dumps(lines, indent=1) + "\n")
    html = PAGE.render(
        title="fastguard on a model that really memorizes",
        lead=lead(lines),
        figures=[(GRID, grid), (CURVES, curves)],
        tables=[as_table(kind, lines) for kind in KINDS],
        foot=FOOT.format(len(work), seeds),
    )
    index.write_text(html)
    return paths


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per kind and mode: copies, similarity, faithfulness of what is no copy, images touched by the guard."""

    def mean(part: Sequence[dict[str, Any]], name: str) -> float | None:
        known = [float(row[name]) for row in part if row[name] is not None]
        return sum(known) / len(known) if known else None

    result = []
    for kind, mode in ((kind, mode) for kind in KINDS for mode in MODES):
        part = [row for row in rows if (row["kind"], row["mode"]) == (kind, mode)]
        line = {"kind": kind, "mode": mode, "images": len(part), "caught by the gate": sum(map(_caught, part))}
        line |= {"copies": mean(part, "copy"), "similarity": mean(part, "similarity")}
        result.append(line | {"faithful, no copies": mean([row for row in part if not row["copy"]], "faithful")})
    return result


def _caught(row: dict[str, Any]) -> bool:
    return bool(row["gate"] and row["gate"]["caught"])


def lead(lines: Sequence[dict[str, Any]]) -> str:
    """Three sentences about what was measured just now."""
    of = {(line["kind"], line["mode"]): line for line in lines}
    return LEAD.format(free=of["D", FREE], own=of["D", SHIPPED], ordinary=of["ordinary", SHIPPED])


def as_table(kind: str, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The lines of one kind as a table of texts."""
    rows = [
        [line["mode"], *("" if line[name] is None else form.format(line[name]) for name, form in COLUMNS.items())]
        for line in lines
        if line["kind"] == kind
    ]
    return {"title": TABLES[kind], "head": ["guard", *COLUMNS], "rows": rows}


def draw_grid(path: Path, shown: Sequence[Prompt], pictures: np.ndarray, copies: np.ndarray) -> None:
    """Training image and modes side by side: pictures [modes, prompts, 32, 32, 3]; a red frame where copies [modes, prompts] is true."""
    columns = ["training image", *(TITLES[mode] for mode in MODES)]
    height = 1.3 * len(shown) + 0.6
    figure = Figure(figsize=(1.3 * len(columns) + 2.2, height))
    axes = figure.subplots(len(shown), len(columns), squeeze=False)
    for axis, name in zip(axes[0], columns, strict=True):
        axis.set_title(name, fontsize=10.5)
    for row, prompt in enumerate(shown):
        original = None if prompt.index is None else training_images()[prompt.index]
        for column, axis in enumerate(axes[row]):
            picture, copied = (pictures[column - 1, row], copies[column - 1, row]) if column else (original, False)
            if picture is not None:
                axis.imshow(picture)
            axis.set(xticks=[], yticks=[])
            for spine in axis.spines.values():
                spine.set(visible=bool(copied), color="red", linewidth=3)
        text = "\n".join([*textwrap.wrap(prompt.prompt, 20), *textwrap.wrap(f"({KINDS[prompt.kind]})", 20)])
        axes[row, 0].set_ylabel(text, rotation=0, ha="right", va="center", labelpad=8, fontsize=11)
    figure.subplots_adjust(0.18, 0.01, 0.99, 1 - 0.55 / height, 0.04, 0.06)
    figure.savefig(path, dpi=110)


def draw_curves(path: Path, rows: Sequence[dict[str, Any]], own: Policy) -> None:
    """By timestep: RMS(c - u) without a guard and under the shipped policy, `own`, with its gate; and the share of the guidance that leads to the anchor."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    axes = figure.subplots(1, 3)
    axes[1].sharey(axes[0])
    free, shipped = ([row for row in rows if row["mode"] == mode] for mode in (FREE, SHIPPED))
    share = "share of guidance that leads to the anchor,\nshipped policy, images that it holds"
    titles = ("RMS(c - u), no guard", "RMS(c - u), shipped policy", share)
    for axis, some, title in zip(axes, (free, shipped, filter(_caught, shipped)), titles, strict=True):
        for row in some:
            d = [np.nan if value is None else (value / 512) ** 0.5 for value in row["d_curve"]]
            heights = row["share_curve"] if axis is axes[2] else d
            axis.plot(row["timesteps"], heights, color=COLOURS[row["kind"]], lw=1, alpha=0.8)
        axis.set_title(title, fontsize=12)
        axis.set_xlabel("timestep t", fontsize=11)
        axis.invert_xaxis()
    compared = rows[0]["timesteps"][: own.gate_steps]
    mark: dict[str, Any] = {"color": "k", "ls": "", "marker": "_", "ms": 16, "mew": 3}
    for axis in axes[:2]:
        axis.plot(compared, [own.gate] * len(compared), zorder=3, **mark)
        axis.set_yscale("log")
    for kind, label in KINDS.items():
        axes[0].plot([], [], color=COLOURS[kind], label=label)
    axes[0].plot([], [], label="gate, where it is compared", **mark)
    axes[0].legend(fontsize=10)
    figure.savefig(path, dpi=110)
