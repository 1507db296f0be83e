"""The ratios in a pytest-benchmark JSON as a table and a plot.

    python -m bench.ratios build/bench.json [--plot build/bench.png]

A benchmark takes part if its `extra_info` has `pair`, "A / B, where", and `ratios`, seconds of A over seconds of B, pair by pair.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from bench.pairs import Ratios


def read(path: Path) -> dict[str, Ratios]:
    """Ratios by pair, in the file's order. ValueError if there are none."""
    benchmarks = [one["extra_info"] for one in json.loads(path.read_text())["benchmarks"]]
    found = {info["pair"]: Ratios(tuple(info["ratios"])) for info in benchmarks if "pair" in info}
    if not found:
        raise ValueError(f"{path}: no benchmark in it has ratios")
    return found


def table(found: dict[str, Ratios]) -> str:
    """Markdown: median and quartiles."""
    return "\n".join(
        ["| pair | seconds of the first / the second |", "|---|---|", *(f"| {p} | {r} |" for p, r in found.items())]
    )


def plot(found: dict[str, Ratios], path: Path) -> None:
    """One box per pair: median, quartiles, and every ratio in the whiskers; 1 is marked. The axis is logarithmic."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(10, 1.2 + 0.32 * len(found)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.axvline(1, color="0.6", linewidth=1)
    axes.boxplot(
        [r.values for r in found.values()],
        orientation="horizontal",
        whis=(0, 100),
        widths=0.6,
        patch_artist=True,
        boxprops={"facecolor": "tab:blue", "alpha": 0.5},
        medianprops={"color": "black"},
    )
    axes.set_yticks(range(1, len(found) + 1), list(found))
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("seconds of the first / the second")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path)
    parser.add_argument("--plot", type=Path, help="where to draw them; default: beside the JSON, as .png")
    options = parser.parse_args()
    found, picture = read(options.json), options.plot or options.json.with_suffix(".png")
    print(table(found))
    plot(found, picture)
    print(f"\n{picture}")


if __name__ == "__main__":
    main()
