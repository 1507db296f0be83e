"""`python -m bench.testbed anchored-plot`: the forms that were tried, from docs/testbed/anchored-search.json, as a picture of the trade-off."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from fastguard.files import read_json

LIMITS = {"similarity": 0.25, "copies": 0.08}


def plot(source: Path, target: Path) -> None:
    """Useful images of D prompts, and faithfulness of the ordinary ones that a gate at 10% catches, against similarity and copies."""
    forms = read_json(source)["embedded"]
    figure = Figure(figsize=(11, 5), layout="constrained")
    for axes, (x, y) in zip(
        figure.subplots(1, 2), (("similarity", "useful"), ("copies", "caught faithful")), strict=True
    ):
        for number, (name, cell) in enumerate(forms.items(), 1):
            colour = "tab:red" if name == "shipped" else "tab:gray" if name == "plain guidance" else "tab:blue"
            axes.plot(cell[x], cell[y], "o", color=colour, label=f"{number} {name}")
            axes.annotate(str(number), (cell[x], cell[y]), xytext=(4, 3), textcoords="offset points", fontsize=8)
        axes.axvline(LIMITS[x], color="k", linewidth=0.5, linestyle=":")
        axes.set(xlabel=f"D: {x}", ylabel=y, xlim=(-0.02, None))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize=7)
    figure.suptitle("Anchored guidance, forms on the tuning halves of the embedded model, scale 3", fontsize=10)
    figure.savefig(target, dpi=110)
