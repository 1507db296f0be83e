"""results.json as Markdown: every sentence with a number in it is made from the measured numbers."""

from __future__ import annotations

from collections.abc import Sequence

from fastguard import Policy
from fastguard.testbed.sampling import CALL

from .rules import EVERY
from .stats import FEW

# 95th percentile of SSCD in the paper (Jain et al., CVPR 2025): setting, without and with the guard
PAPER = {
    "stp": ("S1", 0.6504, 0.2857),
    "og+stp": ("S1", 0.6504, 0.3811),
    "dtp": ("S3", 0.7977, 0.5885),
    "og+dtp": ("S3", 0.7977, 0.6915),
}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def share(value: dict | None, interval: bool = True) -> str:
    """A share with its interval, in percent."""
    if value is None:
        return "-"
    text = f"{value['mean']:.0%}" if value["mean"] in (0, 1) else f"{value['mean']:.1%}"
    return f"{text} [{value['low']:.0%}, {value['high']:.0%}]" if interval else text


def number(value: float | None, form: str = ".2f") -> str:
    """A number, or a dash."""
    return "-" if value is None else format(value, form)


def between(value: dict | None, form: str = ".2f") -> str:
    """A number with its interval."""
    if value is None:
        return "-"
    return f"{value['mean']:{form}} [{number(value['low'], form)}, {number(value['high'], form)}]"


def main_rows(main: dict, kind: str) -> list[list[str]]:
    """The preset table of one kind of prompt."""
    base = main["none"][kind]["similarity"]["p95"]["mean"]
    rows = []
    for name, cells in main.items():
        c = cells[kind]
        s = c["similarity"]
        fall = f"{s['p95']['mean'] / base - 1:+.0%}" if name != "none" else ""
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


def page(r: dict) -> str:
    """The page docs/testbed/README.md."""
    g, o, touched = r["gate"], r["ordinary, plain guidance"], r["ordinary under the default"]
    stock = r["ordinary under the default, against stock"]
    several, off = touched["prompts caught"], r["facts"]["cfg against stock"]
    q, base, alone = r["qualifying"], r["baselines"], r["D without twins"]
    plain = Policy(transition="dynamic").to_dict()
    chosen = {k: v for k, v in r["policy"].items() if v != plain[k] and k != "name"}
    shown = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in chosen.items())
    quantiles = ("distance", "similarity")
    pairs = [k for k, v in base.items() if "distance" in v]
    real = [k for k, v in base.items() if "cycle" in v]
    varied = [k for k, v in r["sensitivity"].items() if "none" in v]
    dtypes = [k for k, v in r["sensitivity"].items() if "gate flips" in v]
    parts = [
        "# The guard, measured on the embedded model\n",
        "Written by `python -m bench.testbed evaluate`; do not edit. All numbers are of the TEST "
        f"halves, {r['seeds']} seeds a prompt where nothing else is said, DDIM, 50 steps, scale {CALL['guidance_scale']:g}, seeds paired; the policy was "
        "chosen on the tuning halves (tuning.json). Intervals: 95%, over prompts: a bootstrap, "
        f"and where fewer than {FEW} prompts have, or lack, what is counted, the exact one (Clopper and Pearson's), as if each prompt were one image. The measures "
        "are defined in `fastguard/testbed/measures.py`. What the numbers mean is discussed in "
        "[FINDINGS.md](FINDINGS.md).\n",
        "## Memorized prompts\n",
        "A prompt counts as memorized if at least 80% of its unguarded seeds are copies. All D test prompts, first seed: training image, plain "
        "guidance, the default. All ordinary test prompts, first seed, plain guidance: [ordinary.png](ordinary.png).\n",
        "![memorized](memorized.png)\n",
        table(
            ("kind, copies in the data", "test prompts", "memorized"),
            [[k, str(v["prompts"]), str(v["memorized"])] for k, v in q.items()],
        ),
        "## Every preset\n",
        f"Ordinary prompts under plain guidance: faithful {share(o['faithful'])}, blown up "
        f'{share(o["blown"])}. The presets run without a gate but for the last two rows; the last, "default", is the model\'s own '
        f"policy file, `{shown}`. D: plain captions shared with other drawings, the paper's case.\n",
        table(MAIN_HEAD, main_rows(r["main"], "D")),
        f"The duplicated drawing of {len(alone['with a twin'])} D test prompts has a near twin in another set (`twins.py`), so that pictures of it are ordinary "
        f"ones, too. Without these prompts: copies {share(alone['none']['copies'])}, under the default {share(alone['default']['copies'])}; faithful, of what is no "
        f"copy, {share(alone['default']['faithful, no copies'])}, {between(alone['default']['faithful / ordinary'])} of ordinary prompts.\n",
        "T: captions of their own, the stress case.\n",
        table(MAIN_HEAD, main_rows(r["main"], "T")),
        "![presets](presets.png)\n",
        "## The gate\n",
        f"RMS(c - u) at the first step. AUC with one image {between(g['auc, one image'], '.4f')}, with the mean of the "
        f"seeds {between(g['auc, mean of the seeds'], '.4f')} ({g['memorized prompts']} prompts with a duplicated picture, "
        f"{g['ordinary prompts']} ordinary ones); with the {g['memorized, qualifying']} that qualify as memorized "
        f"{between(g['auc, one image, qualifying'], '.4f')}; memorized and ordinary prompts are drawn independently. Threshold {g['threshold']:.4g}: "
        f"{g['memorized images caught']} memorized images caught, {g['memorized images missed']} missed "
        f"(of {g['copies']} copies {g['copies missed']}); {g['ordinary images touched']} of "
        f"{g['ordinary images']} ordinary images touched. Under the default {touched['caught']} of "
        f"{touched['images']} ordinary images are caught ({share(touched['share caught'])}), of "
        f"{several['found']} of {several['of']} prompts ({share(several)}, exact), {touched['released and bit-identical']} are "
        f"bit-identical to plain guidance (policy `cfg`), {touched['released but different']} released but different; "
        f"against stock diffusers without fastguard {stock['released and bit-identical']} of "
        f"{stock['images']} are bit-identical, {stock['released but different']} released but different (in {off['images']} of them no latent's element by more than "
        f"{off['largest']:.0e}). "
        f"Other captions of the memorized concepts: {g['near captions']['caught']} of "
        f"{g['near captions']['images']} caught, {g['near captions']['copies']} copies.\n",
        "![gate](gate.png)\n",
        "## Which rule detects the transition better\n",
        "Every rule is replayed on recorded curves and scored on the images of a grid of transitions, one every "
        f"{EVERY} rows (`rules.py`): the plot shows these scores. Fixed timesteps and deadlines are named by the row of the grid on "
        "which they fire; a rule that looks at the curve is scored on the nearest row of the grid, at most one row off. Useful: no "
        "copy AND faithful. The table has the most useful candidate of each family, run for real; they were chosen ON THIS HALF, so "
        "it is optimistic.\n",
        table(
            (
                "family",
                "parameters",
                "useful",
                "replayed",
                "copies",
                "faithful, no copies",
                "fired",
                "median row",
            ),
            best_rules(r["best rules"]["best"]),
        ),
        apart(r["best rules"]["differences"]),
        "![rules](rules.png)\n",
        "![curves](curves.png)\n",
        "## Ordinary prompts without a gate\n",
        "50 prompts.\n",
        table(
            ("policy", "faithful", "blown up", "transition"),
            [
                [k, share(v["faithful"]), share(v["blown"]), f"{v['fired']:.0%}"]
                for k, v in r["harm without a gate"].items()
            ],
        ),
        "## Scheduler, steps, scale\n",
        "All D test prompts, 40 ordinary ones. Under the model's own gate, which was calibrated with DDIM at 50 steps: elsewhere the first step lies at another "
        "noise level, and RMS(c - u) is another there.\n",
        table(
            (
                "D test prompts",
                "copies, none",
                "copies, default",
                "faithful, no copies, default",
                "blown up, default",
                "caught",
                "ordinary: caught",
                "ordinary: faithful, none",
                "ordinary: blown up, none",
            ),
            [
                [
                    k,
                    share((v := r["sensitivity"][k])["none"]["copies"]),
                    share(v["default"]["copies"]),
                    share(v["default"]["faithful, no copies"]),
                    share(v["default"]["blown"]),
                    share(v["default"]["caught"]),
                    share(v["ordinary"]["caught"]),
                    share(v["ordinary"]["faithful, no copies"]),
                    share(v["ordinary"]["blown"]),
                ]
                for k in varied
            ],
        ),
        "## Decisions in other dtypes, against float32\n",
        "D test prompts and 28 ordinary ones.\n",
        table(
            (
                "dtype",
                "images",
                "gate flips",
                "transition moved",
                "largest move in rows",
                "copies of D",
            ),
            [
                [
                    k,
                    str((v := r["sensitivity"][k])["images"]),
                    share(v["gate flips"]),
                    share(moved) + f" n={moved['images']}" if (moved := v["transition moved"]) else "-",
                    str(v["largest move in rows"]),
                    share(v["copies"]),
                ]
                for k in dtypes
            ],
        ),
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
    return "\n".join(parts)
