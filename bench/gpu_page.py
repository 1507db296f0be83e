"""The page and the plot of what `python -m bench.gpu` measured.

    python -m bench.gpu_page docs/gpu

writes README.md and captures.png into the folder from the JSON files in it, made on the same kind of device.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HEAD = """# Measured on a GPU

Written by `python -m bench.gpu_page` from the JSON files in this folder, which `python -m bench.gpu` wrote on {device} (driver {driver}, CUDA {cuda},
torch {torch}, Triton {triton}, diffusers {diffusers}). float16, random weights: the shapes are those of the published models, the pictures mean nothing.

Everything that is compared was run by turns, and a ratio is taken within a round: median [quartiles] over the rounds, which are few: of two, quartiles are no more than their spread. Before a way is timed its latents are held
against stock's ("off by": largest difference, relative to the largest latent; stock rounds its latents to float16 in each step, the guard does
not). Times are between two device events around the whole call, text encoders and decoder left out. **The ratios at small batches are those of this
machine's host**: launching a forward of SD 1.5 took it about 30 ms. A faster host leaves less to gain there; where the device is the limit
(ratios near 1) no host changes them.
"""


def read(folder: Path) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """(a file's head, results by benchmark). ValueError where the files are of different devices or versions."""
    files = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    if not files:
        raise ValueError(f"{folder}: no JSON file in it")
    first = files[0]
    for other in files[1:]:
        for part in ("device", "versions"):
            if other[part] != first[part]:
                raise ValueError(f"{folder}: the files differ in {part}: {first[part]} and {other[part]}")
    results: dict[str, list[dict[str, Any]]] = {}
    for file in files:
        for entry in file["benchmarks"]:
            results.setdefault(entry["name"], []).extend(entry.get("results", []))
    broken = [
        f"`{' '.join(file['command'])}`: {entry['name']} {entry['outcome']}, {entry.get('reason', 'the run was ended')}"
        for file in files
        for entry in file["benchmarks"]
        if entry["outcome"] != "ran"
    ]
    tests = max((file["tests"]["counts"] for file in files), key=lambda counts: sum(counts.values()))
    return {**first["device"], **first["versions"], "tests": tests, "broken": broken}, results


def page(folder: Path) -> str:
    head, results = read(folder)
    counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(head["tests"].items()))
    parts = [HEAD.format(**{**head, "device": f"one {head['name']}"}), f"Tests marked `gpu`: {counts}."]
    if head["broken"]:
        parts.append("Not run to its end:\n" + "\n".join(f"- {line}" for line in head["broken"]))
    sections = (guided_step, generations, captures, compiled, own_combination, synchronisations)
    for section in sections:
        if section.__name__ in results:
            title, *_ = (section.__doc__ or "").partition("\n")
            parts.append("\n".join([f"## {title.rstrip('.')}", "", *section(results[section.__name__])]))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _ratio(found: dict[str, float]) -> str:
    return f"{found['median']:.2f} [{found['q1']:.2f}, {found['q3']:.2f}]"


def guided_step(results: list[dict[str, Any]]) -> Iterator[str]:
    """Everything between two denoiser calls."""
    yield "diffusers' own DPM++ 2M arithmetic and a norm per sample against the fused op, µs a step of 20. Bytes are those on paper, per second of the graph."
    yield ""
    yield "| latents | launches | from Python: stock, fused | ratio | in a CUDA graph: stock, fused | ratio | GB/s |"
    yield "|---|---|---|---|---|---|---|"
    for one in results:
        shape, rate = " x ".join(map(str, one["latents"])), f"{one['bytes_per_second'] / 1e9:.0f}"
        for name, where, bandwidth in (("fused", "", rate), ("fused, anchored", ", all anchored", "-")):
            if name in one["eager"]:
                cells = [_beside(one[how], name, one["steps"]) for how in ("eager", "graph")]
                yield f"| {shape}{where} | {one['launches_per_step']} | {' | '.join(cells)} | {bandwidth} |"


def _beside(timed: dict[str, Any], name: str, steps: int) -> str:
    """Microseconds a step of stock and of another, and their ratio."""
    times = ", ".join(f"{1e3 * timed[one]['ms']['median'] / steps:.0f}" for one in ("stock", name))
    return f"{times} | {_ratio(timed[name]['ratio'])}"


def _ways(results: list[dict[str, Any]], column: str) -> Iterator[str]:
    yield f"| model | {column} | steps | how | ms a step | of stock | rounds | graphs, GiB | capture, s | off by |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for one in results:
        where = f"| {one['size']} | {one[column]} | {one['steps']} | {one['how']} |"
        if "ms" not in one:
            yield f"{where} {one.get('wrong') or one['reason']} | | | | | |"
            continue
        ms = one["ms"]["median"] / one["steps"]
        graphs = f"{one['graph_bytes'] / 2**30:.2f} | {one['capture_seconds']:.2f}" if one.get("graph_bytes") else " | "
        yield f"{where} {ms:.1f} | {_ratio(one['ratio'])} | {one['rounds']} | {graphs} | {one['difference']:.1e} |"


def generations(results: list[dict[str, Any]]) -> Iterator[str]:
    """Schedulers."""
    yield from _ways(results, "scheduler")


def captures(results: list[dict[str, Any]]) -> Iterator[str]:
    """Capture, by batch."""
    yield "Euler. `og+dtp` runs the denoiser's rows of plain guidance, `stp` three quarters of them."
    yield ""
    yield "![Time of a generation, relative to stock, by batch](captures.png)"
    yield ""
    yield from _ways(results, "batch")


def compiled(results: list[dict[str, Any]]) -> Iterator[str]:
    """torch.compile."""
    yield "Capture times include compiling; what was compiled first fills caches for what comes after it, so they are not compared."
    yield ""
    yield from _ways(results, "batch")


def own_combination(results: list[dict[str, Any]]) -> Iterator[str]:
    """A pipeline that combines the branches itself."""
    yield "Wan 2.1 with 1.3 billion parameters, bfloat16, text to video, one prompt. Plain guidance under the guard is held against stock's latents first."
    yield ""
    yield "| video | how | ms a step | of stock | rounds | off by |"
    yield "|---|---|---|---|---|---|"
    for one in results:
        video = f"{one['num_frames']} x {one['height']} x {one['width']}"
        for how, part in one["times"].items():
            off = f"{one['difference']:.1e}" if how.endswith("plain guidance") else ""
            step = f"{part['ms']['median'] / one['steps']:.1f}"
            yield f"| {video} | {how} | {step} | {_ratio(part['ratio'])} | {part['rounds']} | {off} |"


def synchronisations(results: list[dict[str, Any]]) -> Iterator[str]:
    """Waits and copies in the loop of a small pipeline, by torch's sync debug mode and by operation, 4 steps."""
    yield "| scheduler | configurations | stock | guarded |"
    yield "|---|---|---|---|"
    classes: dict[str, list[dict[str, Any]]] = {}
    for one in results:
        classes.setdefault(one["scheduler"], []).append(one)
    for name, found in classes.items():
        counts = {
            guarded: [sum(line["count"] for line in one["lines"]) for one in found if one["guarded"] == guarded]
            for guarded in (False, True)
        }
        stock, ours = (" to ".join(map(str, sorted({min(c), max(c)}))) for c in (counts[False], counts[True]))
        yield f"| {name} | {len(counts[True])} | {stock} | {ours} |"


def plot(folder: Path) -> None:
    """Ratio to stock by batch, a panel a model, a line a way."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    results = read(folder)[1].get("captures", [])
    sizes = list(dict.fromkeys(one["size"] for one in results))
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, max(len(sizes), 1), sharey=True, squeeze=False)[0]
    for axes, size in zip(panels, sizes, strict=False):
        timed = [one for one in results if one["size"] == size and "ms" in one and one["how"] != "stock"]
        for how in dict.fromkeys(one["how"] for one in timed):
            points = [(one["batch"], one["ratio"]) for one in timed if one["how"] == how]
            x, middle = [batch for batch, _ in points], [ratio["median"] for _, ratio in points]
            spread = [[r["median"] - r["q1"] for _, r in points], [r["q3"] - r["median"] for _, r in points]]
            axes.errorbar(x, middle, spread, marker="o", markersize=4, capsize=3, label=how)
        axes.axhline(1, color="0.6", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({one["batch"] for one in timed}), sorted({one["batch"] for one in timed}))
        axes.set_title(size)
        axes.set_xlabel("batch")
    panels[0].set_ylabel("time of a generation / stock's")
    panels[0].set_ylim(bottom=0)
    panels[0].legend(loc="lower right")
    figure.savefig(folder / "captures.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    (folder / "README.md").write_text(page(folder), encoding="utf-8")
    plot(folder)
    print(folder / "README.md")


if __name__ == "__main__":
    main()
