"""`fastguard demo`: what the guard does, to the eye, in under a minute on two cores.

Memorized and ordinary prompts of the test half from the same seeds: without a guard, under presets of the paper with the
embedded model's gate, and under the policy that ships with the embedded model. Writes grid.png, curves.png, table.json and
index.html.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from . import Prompt, load, policy_path, prompts, training_images
from .measures import COPY, Judge
from .page import page, table
from .sampling import Sample, generate

if TYPE_CHECKING:
    from fastguard import Policy

FREE, SHIPPED = "no guard", "shipped policy"
MODES = (FREE, "stp", "dtp", "og+dtp", SHIPPED)
TITLES = {
    "stp": "stp: unguided\nuntil t = 500",
    "dtp": "dtp: unguided\nuntil d turns",
    "og+dtp": "og+dtp: reversed\nuntil d turns",
    SHIPPED: "shipped policy:\nanchored",
}
SHOWN = (("D", 5), ("T", 1), ("ordinary", 4))


def chosen(count: Sequence[tuple[str, int]] = SHOWN) -> list[Prompt]:
    """The first test prompts of each kind, the most duplicated ones first: not picked by result."""
    picked = []
    for kind, number in count:
        of_kind = sorted(prompts(kind, "test"), key=lambda p: -p.factor)
        picked += of_kind[:number]
    return picked


def make_jobs(shown: Sequence[Prompt], seeds: int, own: Policy) -> list[Sample]:
    """Every prompt and seed under every mode, mode by mode; `own`: the embedded model's policy, with the gate of all."""
    from fastguard import policy

    policies = {m: policy(m, gate=own.gate) for m in MODES[1:-1]}
    policies |= {FREE: policy("cfg"), SHIPPED: own}
    return [Sample(p, s, policies[m]) for m in MODES for p in shown for s in range(seeds)]


def run_demo(out: Path = Path("demo"), *, seeds: int = 2) -> list[Path]:
    """Generate, measure and write everything to `out`; returns the paths, the page last.

    seeds   images per prompt and mode; the grid shows the first, the table averages all
    """
    from fastguard import policy

    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    pipe, shown, own = load(), chosen(), policy(policy_path())
    judge, work = Judge(pipe), make_jobs(shown, seeds, own)
    pipe.set_progress_bar_config(desc=f"{len(work)} images", unit="step")
    latents, reports = generate(pipe, work)
    measured = judge(latents, [job.prompt for job in work])
    rows = [
        {
            "mode": MODES[i // (len(shown) * seeds)],
            "kind": job.prompt.kind,
            "prompt": job.prompt.prompt,
        }
        | {"seed": job.seed}
        | {key: values[i] for key, values in measured.items()}
        | reports[i]
        for i, job in enumerate(work)
    ]
    pictures = judge.decode(latents).add(1).mul(127.5).byte().permute(0, 2, 3, 1).numpy()
    first = pictures.reshape(len(MODES), len(shown), seeds, 32, 32, 3)[:, :, 0]
    copies = np.array([bool(row["copy"]) for row in rows]).reshape(len(MODES), len(shown), seeds)[:, :, 0]
    draw_grid(out / "grid.png", shown, first, copies)
    draw_curves(out / "curves.png", rows, own)
    lines = summary(rows)
    (out / "table.json").write_text(json.dumps(lines, indent=1) + "\n")
    (out / "index.html").write_text(
        page(
            "fastguard on a model that really memorizes",
            lead(lines),
            [
                (
                    "A row a prompt, the same noise in every column. Red frame: a copy of the training image.",
                    out / "grid.png",
                ),
                (
                    "By timestep: RMS(c - u), with a short mark for the gate, where it is compared; and, of the images that the shipped policy "
                    "holds, how much of the guidance leads to the anchor, the picture that the first prediction shows.",
                    out / "curves.png",
                ),
            ],
            "".join(as_table(kind, lines) for kind in ("D", "T", "ordinary")),
            f"Copy: an image whose latents differ from the training image's by a root mean square below {COPY:g}. Similarity: "
            "the cosine of the two latents, on average. Faithful: a classifier's first choice for the image is what the "
            "caption names; images that are copies are not counted, for it never saw their training images. "
            f"{len(work)} images, {seeds} seeds a prompt; prompts of the test half, the most duplicated "
            "first. The full measurement with confidence intervals is in docs/testbed.",
        )
    )
    return [out / name for name in ("grid.png", "curves.png", "table.json", "index.html")]


def mean(values: Sequence[Any]) -> float | None:
    """Mean of what is there; None if nothing is."""
    known = [float(v) for v in values if v is not None]
    return sum(known) / len(known) if known else None


def summary(rows: Sequence[dict]) -> list[dict]:
    """Per kind and mode: copies, similarity, faithfulness of what is no copy, images touched by the guard."""
    result = []
    for kind, _ in SHOWN:
        for mode in MODES:
            part = [r for r in rows if r["kind"] == kind and r["mode"] == mode]
            caught = [bool(r["gate"] and r["gate"]["caught"]) for r in part]
            result.append(
                {
                    "kind": kind,
                    "mode": mode,
                    "images": len(part),
                    "caught by the gate": sum(caught),
                    "copies": mean([r["copy"] for r in part]),
                    "similarity": mean([r["similarity"] for r in part]),
                    "faithful, no copies": mean([r["faithful"] for r in part if not r["copy"]]),
                }
            )
    return result


def lead(lines: Sequence[dict]) -> str:
    """Three sentences about what was measured just now."""

    def line(kind: str, mode: str) -> dict:
        return next(one for one in lines if (one["kind"], one["mode"]) == (kind, mode))

    free, own, ordinary = line("D", FREE), line("D", SHIPPED), line("ordinary", SHIPPED)
    return (
        f"Without a guard {free['copies']:.0%} of the images of the memorized D prompts are copies of their training image. The gate caught "
        f"{own['caught by the gate']} of these {own['images']}, and under the shipped policy {own['copies']:.0%} of all are copies. Of the "
        f"{ordinary['images']} ordinary images it touched {ordinary['caught by the gate']}; the others are what they are without a guard, bit for bit."
    )


def as_table(kind: str, lines: Sequence[dict]) -> str:
    """The lines of one kind as an HTML table."""
    title = {
        "D": "Memorized prompts, plain captions shared with other drawings (D)",
        "T": "Memorized prompts with a caption of their own (T): a stress case",
        "ordinary": "Ordinary prompts",
    }[kind]
    head = ["guard", "images", "caught", "copies", "similarity", "faithful, no copies"]
    cells = [
        [
            line["mode"],
            str(line["images"]),
            str(line["caught by the gate"]),
            "" if line["copies"] is None else f"{line['copies']:.0%}",
            "" if line["similarity"] is None else f"{line['similarity']:.2f}",
            "" if line["faithful, no copies"] is None else f"{line['faithful, no copies']:.0%}",
        ]
        for line in lines
        if line["kind"] == kind
    ]
    return table(title, head, cells)


def draw_grid(path: Path, shown: Sequence[Prompt], pictures: np.ndarray, copies: np.ndarray) -> None:
    """Training image and modes side by side: pictures [modes, prompts, 32, 32, 3]; a red frame where copies [modes, prompts] is true."""
    from matplotlib.figure import Figure

    columns = ["training image", *(TITLES.get(mode, mode) for mode in MODES)]
    figure = Figure(figsize=(1.3 * len(columns) + 2.2, 1.3 * len(shown) + 0.6))
    axes = figure.subplots(len(shown), len(columns), squeeze=False)
    for row, prompt in enumerate(shown):
        for column, name in enumerate(columns):
            axis, copied = axes[row, column], column > 0 and bool(copies[column - 1, row])
            axis.set_xticks([])
            axis.set_yticks([])
            for spine in axis.spines.values():
                spine.set(visible=copied, color="red", linewidth=3)
            if column:
                axis.imshow(pictures[column - 1, row])
            elif prompt.index is not None:
                axis.imshow(training_images()[prompt.index])
            if row == 0:
                axis.set_title(name, fontsize=10.5)
        kind = {"D": "memorized", "T": "memorized, caption of its own"}.get(prompt.kind, prompt.kind)
        text = "\n".join([*textwrap.wrap(prompt.prompt, 20), *textwrap.wrap(f"({kind})", 20)])
        axes[row, 0].set_ylabel(text, rotation=0, ha="right", va="center", labelpad=8, fontsize=11)
    figure.subplots_adjust(0.18, 0.01, 0.99, 1 - 0.55 / (1.3 * len(shown) + 0.6), 0.04, 0.06)
    figure.savefig(path, dpi=110)


COLOURS = {"D": "C3", "T": "C1", "ordinary": "C0"}


def draw_curves(path: Path, rows: Sequence[dict], own: Policy) -> None:
    """By timestep: RMS(c - u) without a guard and under the shipped policy, `own`, with its gate; and the share of the guidance that leads to the anchor."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    axes = figure.subplots(1, 3)
    axes[1].sharey(axes[0])
    compared = rows[0]["timesteps"][: own.gate_steps]
    mark: dict[str, Any] = {"color": "k", "ls": "", "marker": "_", "ms": 16, "mew": 3}
    held = [row for row in rows if row["mode"] == SHIPPED and row["gate"]["caught"]]
    for axis, some, title in (
        (axes[0], [row for row in rows if row["mode"] == FREE], "RMS(c - u), no guard"),
        (axes[1], [row for row in rows if row["mode"] == SHIPPED], "RMS(c - u), shipped policy"),
        (axes[2], held, "share of guidance that leads to the anchor,\nshipped policy, images that it holds"),
    ):
        for row in some:
            d = [np.nan if value is None else (value / 512) ** 0.5 for value in row["d_curve"]]
            height = row["share_curve"] if axis is axes[2] else d
            axis.plot(row["timesteps"], height, color=COLOURS[row["kind"]], lw=1, alpha=0.8)
        axis.set_title(title, fontsize=12)
        axis.set_xlabel("timestep t", fontsize=11)
        axis.invert_xaxis()
    for axis in axes[:2]:
        axis.plot(compared, [own.gate] * len(compared), zorder=3, **mark)
        axis.set_yscale("log")
    for kind, label in (("D", "memorized"), ("T", "memorized, caption of its own"), ("ordinary", "ordinary")):
        axes[0].plot([], [], color=COLOURS[kind], label=label)
    axes[0].plot([], [], label="gate, where it is compared", **mark)
    axes[0].legend(fontsize=10)
    figure.savefig(path, dpi=110)
