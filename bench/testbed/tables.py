"""results.json, anchored-test.json and rules.json as Markdown: every sentence with a number in it is made from the measured numbers."""

from __future__ import annotations

from fastguard.testbed.sampling import CALL

from .anchored_tables import conditions, harder
from .markdown import between, number, share, table
from .rules import EVERY
from .stats import FEW

# 95th percentile of SSCD in the paper (Jain et al., CVPR 2025): setting, without and with the guard
PAPER = {
    "stp": ("S1", 0.6504, 0.2857),
    "og+stp": ("S1", 0.6504, 0.3811),
    "dtp": ("S3", 0.7977, 0.5885),
    "og+dtp": ("S3", 0.7977, 0.6915),
}


def main_rows(main: dict, kind: str) -> list[list[str]]:
    """The preset table of one kind of prompt."""
    base = main["no guard"][kind]["similarity"]["p95"]["mean"]
    rows = []
    for name, cells in main.items():
        c = cells[kind]
        s = c["similarity"]
        fall = f"{s['p95']['mean'] / base - 1:+.0%}" if name != "no guard" else ""
        paper = ""
        if name in PAPER:
            setting, before, after = PAPER[name]
            paper = f"{after / before - 1:+.0%} ({setting})"
        free = c["faithful, no copies"]
        rows.append(
            [
                name,
                share(c["copies"]),
                *(between(s[name]) for name in ("mean", "median", "p95")),
                fall,
                paper,
                share(free) + (f" n={free['images']}" if free else ""),
                between(c["faithful / ordinary"]),
                share(c["blown"]),
                number(c["transition, median t"], ".0f"),
                f"{c['fired']:.0%} / {c['forced']:.0%}",
            ]
        )
    return rows


MAIN_HEAD = (
    "preset",
    "copies",
    "similarity, mean",
    "median",
    "p95",
    "change of p95",
    "the paper's",
    "faithful, no copies",
    "/ ordinary",
    "blown up",
    "transition, median t",
    "transition / forced",
)


def best_rules(best: dict) -> list[list[str]]:
    """The most useful candidate of each family, on the test half."""
    return [
        [
            family,
            ", ".join(f"{k} = {v}" for k, v in one["parameters"].items()),
            share(one["useful"]),
            f"{one['useful, replayed']:.1%}",
            share(one["copies"]),
            share(one["faithful, no copies"]),
            f"{one['fired']:.0%}",
            number(one["median row"], ".0f"),
        ]
        for family, one in best.items()
    ]


def apart(differences: list[dict]) -> str:
    """How far the families lie apart, in a sentence."""
    parts = [f"{one['more']} over {one['less']} {between(one['useful'], '+.3f')}" for one in differences]
    return f"Useful images, differences of these rows (all of them run for real), seed by seed: {'; '.join(parts)}.\n"


def page(r: dict, tested: dict, ranked: dict) -> str:
    """The page docs/testbed/README.md: r of `evaluate`, tested of `anchored-test`, ranked of `rules`."""
    return "\n".join(
        [
            *opening(r),
            *presets(r),
            *gate(r),
            *ordinary(r),
            *conditions(tested),
            *harder(tested),
            *transitions(ranked),
            *baselines(r["baselines"]),
        ]
    )


def opening(r: dict) -> list[str]:
    """What holds for all of it, and which prompts are memorized."""
    return [
        "# The guard, measured on the embedded model\n",
        "Written by `python -m bench.testbed evaluate`; do not edit. All numbers are of the TEST "
        f"halves, {r['seeds']} seeds a prompt, DDIM, 50 steps, scale {CALL['guidance_scale']:g} where nothing else is said, seeds paired. The form of anchored "
        "guidance and the gate were chosen on the tuning halves ([anchored.md](../anchored.md)). Intervals: 95%, over prompts: a bootstrap, "
        f"and where fewer than {FEW} prompts have, or lack, what is counted, the exact one (Clopper and Pearson's), as if each prompt were one image. The measures "
        "are defined in `fastguard/testbed/measures.py`. What the numbers mean is discussed in "
        "[FINDINGS.md](FINDINGS.md).\n",
        "## Memorized prompts\n",
        "D: a plain caption that other drawings carry, too; T: a caption of its own. A prompt counts as memorized if at least 80% of its unguarded seeds are "
        "copies. All D test prompts, first seed: training image, no guard, shipped policy. All ordinary test prompts, first seed, no guard: "
        "[ordinary.png](ordinary.png).\n",
        "![memorized](memorized.png)\n",
        table(
            ("kind, copies in the data", "test prompts", "memorized"),
            [[k, str(v["prompts"]), str(v["memorized"])] for k, v in r["qualifying"].items()],
        ),
    ]


def presets(r: dict) -> list[str]:
    """The main table, D and T."""
    o, alone = r["ordinary, plain guidance"], r["D without twins"]
    return [
        "## Every preset\n",
        *of_version_01(r, "main"),
        f"Ordinary prompts without a guard: faithful {share(o['faithful'])}, blown up {share(o['blown'])}. The presets run without a gate; the last row is the "
        f"policy that ships with the model, `anchored` behind the gate {r['policy']['gate']:g}. D, the paper's case:\n",
        table(MAIN_HEAD, main_rows(r["main"], "D")),
        f"The duplicated drawing of {len(alone['with a twin'])} D test prompts has a near twin in another set (`twins.py`), so that pictures of it are ordinary "
        f"ones, too. Without these prompts: copies {share(alone['no guard']['copies'])}, anchored {share(alone['anchored']['copies'])}; faithful, of what is no "
        f"copy, {share(alone['anchored']['faithful, no copies'])}, {between(alone['anchored']['faithful / ordinary'])} of ordinary prompts.\n",
        "T, the stress case:\n",
        table(MAIN_HEAD, main_rows(r["main"], "T")),
        "![presets](presets.png)\n",
    ]


def of_version_01(r: dict, part: str) -> list[str]:
    """Which rows were not run again."""
    carried = r["of version 0.1"][part]
    return [f"Of version 0.1, on the same weights, and not run again: {', '.join(carried)}.\n"] if carried else []


def gate(r: dict) -> list[str]:
    """What the gate catches, and in other dtypes."""
    g, touched = r["gate"], r["ordinary under the shipped policy"]
    several = touched["prompts caught"]
    flips = "; ".join(f"{name} {share(v['gate flips'])}" for name, v in r["dtypes"].items())
    images = next(iter(r["dtypes"].values()))["images"]
    return [
        "## The gate\n",
        f"RMS(c - u) at the first step. AUC with one image {between(g['auc, one image'], '.4f')}, with the mean of the "
        f"seeds {between(g['auc, mean of the seeds'], '.4f')} ({g['memorized prompts']} prompts with a duplicated picture, "
        f"{g['ordinary prompts']} ordinary ones); with the {g['memorized, qualifying']} that qualify as memorized "
        f"{between(g['auc, one image, qualifying'], '.4f')}; memorized and ordinary prompts are drawn independently. Threshold {g['threshold']:.4g}: "
        f"{g['memorized images caught']} memorized images caught, {g['memorized images missed']} missed "
        f"(of {g['copies']} copies {g['copies missed']}). Under the shipped policy {touched['caught']} of "
        f"{touched['images']} ordinary images are caught ({share(touched['share caught'])}), of "
        f"{several['found']} of {several['of']} prompts ({share(several)}, exact), {touched['released and bit-identical']} are "
        f"bit-identical to policy `cfg`, {touched['released but different']} released but different. "
        f"Other captions of the memorized concepts: {g['near captions']['caught']} of "
        f"{g['near captions']['images']} caught. In another dtype the gate decides otherwise for a "
        f"share of the {images} images: {flips}.\n",
        "![gate](gate.png)\n",
    ]


def ordinary(r: dict) -> list[str]:
    """Ordinary prompts without a gate."""
    rows = [
        [k, str(v["prompts"]), share(v["faithful"]), share(v["blown"])] for k, v in r["harm without a gate"].items()
    ]
    return [
        "## Ordinary prompts without a gate\n",
        *of_version_01(r, "harm without a gate"),
        table(("policy", "prompts", "faithful", "blown up"), rows),
    ]


def transitions(ranked: dict) -> list[str]:
    """Which rule detects the transition best."""
    head = ("family", "parameters", "useful", "replayed", "copies", "faithful, no copies", "fired", "median row")
    return [
        "## Which rule detects the transition better\n",
        "By `python -m bench.testbed rules`, of version 0.1; nothing of it was run again since. Every rule is replayed on recorded curves and scored on the images of a grid of transitions, one every "
        f"{EVERY} rows (`rules.py`): the plot shows these scores. Fixed timesteps and deadlines are named by the row of the grid on "
        "which they fire; a rule that looks at the curve is scored on the nearest row of the grid, at most one row off. The table has the most useful candidate of "
        "each family, run for real; they were chosen ON THIS HALF, so it is optimistic.\n",
        table(head, best_rules(ranked["best rules"]["best"])),
        apart(ranked["best rules"]["differences"]),
        "![rules](rules.png)\n",
        "![curves](curves.png)\n",
    ]


def baselines(base: dict) -> list[str]:
    """What the measures say about real pictures."""
    quantiles = ("distance", "similarity")
    pairs = [k for k, v in base.items() if "distance" in v]
    real = [k for k, v in base.items() if "cycle" in v]
    return [
        "## Baselines of the measures\n",
        table(
            ("pair", *(f"{m} p1 / median / p99" for m in quantiles), "counted as copies"),
            [
                [
                    k,
                    *(" / ".join(f"{base[k][m][q]:.2f}" for q in ("p1", "median", "p99")) for m in quantiles),
                    f"{base[k]['below COPY']:.1%}",
                ]
                for k in pairs
            ],
        ),
        table(
            ("latents of", "cycle median / p99", "rms median / p99", "counted as blown up"),
            [
                [
                    k,
                    *(f"{base[k][m]['median']:.2f} / {base[k][m]['p99']:.2f}" for m in ("cycle", "rms")),
                    f"{base[k]['blown']:.1%}",
                ]
                for k in real
            ],
        ),
    ]
