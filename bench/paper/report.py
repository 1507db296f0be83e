"""tables.md, report.html, summary.json, plots and results.parquet from what the store has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from bench.metrics import Fid, note
from bench.paper import plots, seconds, tables
from bench.paper.inputs import Images, Item, TrainingSet, read_image
from bench.paper.published import published_table
from bench.paper.store import Store
from bench.paper.summary import SHIPPED, summarise
from bench.paper.tables import Table
from bench.paper.tradeoff import tradeoff
from bench.paper.work import PLAIN_CURVES, WATCHED, Amount
from fastguard.files import finite, write_atomic, write_json
from fastguard.testbed.page import PAGE

SHOWN = 8  # prompts of the picture grid
NOT_ASKED = "not asked for"  # why a method that --methods leaves out is not there
COLUMNS = 10  # methods of one; more could not be read on the page


def markdown(table: Table) -> str:
    """A Markdown table with its title and notes."""
    lines = [table.head, ["---"] * len(table.head), *table.rows]
    body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return f"## {table.title}\n\n{body}\n\n" + "\n".join(f"- {line}" for line in table.notes) + "\n"


def fid_values(
    store: Store, methods: Sequence[str], amount: Amount, fid: Fid, training: TrainingSet, real: Images | None = None
) -> dict[str, Any]:
    """FID of each method's images at the tables' scale against `real` (the training images without it), by group of prompts."""
    found: dict[str, Any] = {"network": fid.network, "values": {}, "notes": {}}
    compared = training if real is None else real
    which = "training images, as no --real-images were given; copies of them make it better"
    against = f"against the {len(compared)} {which if real is None else 'images of --real-images'}"
    fid.against(compared)
    for group in ("memorized", "ordinary"):
        seeds = amount.seeds if group == "memorized" else amount.ordinary
        values, counts = {}, []
        for name in methods:
            files = [
                store.out / r["image"]
                for r in store.rows
                if (r["method"], r["group"], r["scale"]) == (name, group, amount.scale) and r["seed"] < seeds
            ]
            if len(files) >= 2:
                values[name] = fid(Images(files, read_image))
                counts.append(len(files))
        if values:
            found["values"][group] = values
            found["notes"][group] = "; ".join(text for text in (against, note(min(counts))) if text)
    return found


def picture_grids(
    store: Store, items: Sequence[Item], methods: Sequence[str], scale: float, training: TrainingSet
) -> list[Path]:
    """The first memorized prompts, seed 0, every method at the tables' scale."""
    shown = [item for item in items if item.group == "memorized"][:SHOWN]
    path = {
        (row["method"], row["id"]): store.out / row["image"]
        for row in store.rows
        if row["group"] == "memorized" and row["seed"] == 0 and row["scale"] == scale
    }
    targets = [training[item.training[0]] if item.training else None for item in shown]
    grids: list[Path] = []
    for start in range(0, len(methods), COLUMNS):
        names = methods[start : start + COLUMNS]
        pictures = [
            [Image.open(path[name, item.id]) if (name, item.id) in path else None for name in names] for item in shown
        ]
        to = store.out / f"grid-{len(grids) + 1}.png"
        grids.append(plots.grid(to, [item.prompt for item in shown], targets, names, pictures))
    return grids


def write(
    store: Store,
    items: Sequence[Item],
    methods: Mapping[str, Mapping[str, Any]],
    amount: Amount,
    settings: Mapping[str, Any],
    networks: Mapping[str, str],
    training: TrainingSet,
    fid: Fid | None = None,
    real: Images | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Write everything; returns the summary. `methods`: name -> source, ours, peer, and "skipped" with a reason if it was not run."""
    ran, skipped = _finished(store, items, methods, amount)
    result = summarise(store.rows, ran, amount, settings["steps"])
    cells = result["tables"]["memorized"]
    for name, ratios in seconds.read(store.out).items():
        if name in cells and ratios:
            cells[name]["seconds ratio"] = seconds.summary(ratios)
    frechet = {} if fid is None else fid_values(store, list(ran), amount, fid, training, real)
    result.update(
        {"settings": dict(settings), "networks": dict(networks), "fid": frechet, "skipped": skipped, "command": command}
    )
    result["batch sizes"] = {
        name: sorted({row.get("batch_size", amount.batch) for row in store.rows if row["method"] == name})
        for name in ran
    }
    shown = _tables(result, networks, frechet, amount)
    figures = _figures(store, result, items, list(cells), amount, networks, training, ran)

    lead = list(result["sentences"]) or [
        "No verdict: no measure of faithfulness was given (--clip), or nothing to compare."
    ]
    further: list[str] = []
    if omitted := [name for name, reason in skipped.items() if reason == NOT_ASKED]:
        lead.append(f"Left out by --methods: {', '.join(omitted)}.")
    if cheaper := result["against reference"]:
        further.append(
            f"og+dtp takes {cheaper['ratio']:.2f} of the denoiser rows of the authors' opposite script mended (reference-og+dtp) on "
            f"the same memorized images; at most a quarter on {cheaper['a quarter at most']} of {cheaper['images']}, those whose "
            "transition the script finds in the first third of the steps."
        )
    facts = _facts(result, items, amount, settings, skipped)
    rows = [[name, str(one["source"]), str(one.get("needs") or "-")] for name, one in ran.items()]
    sources = Table("Methods", ["method", "source", "needs beyond plain guidance"], rows)
    parts = [
        "# The paper's tables\n\nWritten by `python -m bench paper`; do not edit.\n",
        "\n".join(f"- {line}" for line in [*lead, *further]) + "\n",
        "\n".join(f"- {line}" for line in facts) + "\n",
        *(markdown(one) for one in [*shown, sources]),
    ]
    write_atomic(store.out / "tables.md", "\n".join(parts))
    html = PAGE.render(
        title="The paper's tables: memorization guards compared",
        lead=" ".join(lead),
        figures=figures,
        further=further,
        tables=[*shown, sources],
        foot=" ".join(facts),
    )
    write_atomic(store.out / "report.html", html)
    write_json(store.out / "summary.json", finite(result))
    store.parquet()
    return result


def _finished(
    store: Store, items: Sequence[Item], methods: Mapping[str, Mapping[str, Any]], amount: Amount
) -> tuple[dict[str, Mapping[str, Any]], dict[str, str]]:
    """The methods with every image of the main table, those of earlier runs too; and why others are not there."""
    needed = sum(item.group == "memorized" for item in items) * amount.seeds
    have = Counter(
        row["method"]
        for row in store.rows
        if row["group"] == "memorized" and row["scale"] == amount.scale and row["seed"] < amount.seeds
    )
    ran = {name: one for name, one in methods.items() if have[name] >= needed and name != WATCHED}
    skipped = {name: one["skipped"] for name, one in methods.items() if one.get("skipped") and name not in ran}
    skipped.update({name: "an earlier run did not finish it" for name in have if name not in ran and name != WATCHED})
    return ran, skipped


def _facts(
    result: Mapping[str, Any],
    items: Sequence[Item],
    amount: Amount,
    settings: Mapping[str, Any],
    skipped: Mapping[str, str],
) -> list[str]:
    prompts = {group: sum(item.group == group for item in items) for group in ("memorized", "ordinary")}
    sizes = sorted({size for of_method in result["batch sizes"].values() for size in of_method})
    facts = [
        f"Model {settings['model']} (weights {settings['weights'][:12]}), {settings['scheduler']}, {settings['steps']} steps, "
        f"guidance scale {amount.scale:g} in the tables; {settings['dtype']} on {settings['device']}; "
        + ", ".join(f"{k} {v}" for k, v in settings["versions"].items())
        + ".",
        f"{prompts['memorized']} memorized prompts with {amount.seeds} seeds, {prompts['ordinary']} ordinary ones with {amount.ordinary}"
        + (f", {amount.detection} noises a prompt for detection" if amount.detection else "")
        + "; every method starts from the same noise for the same prompt and seed.",
        f"Cost, {tables.COST} Batches of {' and '.join(map(str, sizes))}; not a benchmark of speed.",
    ]
    if reasons := [f"{name} ({reason})" for name, reason in skipped.items() if reason != NOT_ASKED]:
        facts.append(f"Not run: {'; '.join(reasons)}.")
    if result["command"]:
        facts.append(f"Command: {result['command']}")
    return facts


def _tables(
    result: Mapping[str, Any], networks: Mapping[str, str], frechet: Mapping[str, Any], amount: Amount
) -> list[Table]:
    shown = []
    for group, text in (("memorized", "Memorized prompts"), ("ordinary", "Ordinary prompts")):
        if result["tables"][group]:
            title = f"{text}, guidance scale {amount.scale:g}"
            shown.append(tables.methods_table(title, result["tables"][group], networks, frechet, group))
    cells = result["tables"]["memorized"]
    for axis, pairs in result["verdicts"].items():
        if pairs:
            shown.append(tables.overview_table(pairs, axis, cells, result["tables"]["ordinary"]))
            some = [pair for pair in pairs if pair["ours"] in SHIPPED] or pairs
            shown.append(tables.verdict_table(some, axis, networks, cells))
    if result["detection"]:
        shown.append(tables.detection_table(result["detection"]))
    if result.get("first prediction"):
        shown.append(tables.first_prediction_table(result["first prediction"], networks))
    shown.append(published_table(result["tables"]["memorized"], networks))
    if result["curves"].get("similarity"):
        shown.append(tables.points_table(result["curves"]["similarity"], result["cost"], networks))
    return shown


def _figures(
    store: Store,
    result: Mapping[str, Any],
    items: Sequence[Item],
    methods: Sequence[str],
    amount: Amount,
    networks: Mapping[str, str],
    training: TrainingSet,
    known: Mapping[str, Mapping[str, Any]],
) -> list[tuple[str, Path]]:
    figures = []
    ours = [name for name in methods if known[name]["ours"]]
    for axis, curves in result["curves"].items():
        if curves:
            path = store.out / f"curves-{axis.replace(' ', '-')}.svg"
            focus = [name for name in SHIPPED if name in curves]
            tradeoff(path, curves, ours, focus, axis, networks["faithful"])
            figures.append(
                (
                    f"Faithfulness against {axis}, a point a guidance scale. Up and left is better; blown-up images are not faithful.",
                    path,
                )
            )
    rows = [r for r in store.rows if r["method"] == PLAIN_CURVES and r["scale"] == amount.scale]
    drawn = plots.d_curves(store.out / "d-curves.svg", rows)
    if drawn is not None:
        figures.append(("RMS(c - u) by timestep. Network: the model's own denoiser.", drawn))
    looked = [r for r in store.rows if r["method"] == WATCHED and r["scale"] == amount.scale]
    drawn = plots.first_prediction(store.out / "first-prediction.svg", looked)
    if drawn is not None:
        figures.append(("Does the first conditional prediction show the picture?", drawn))
    text = f"A row a prompt, the same noise in every column; guidance scale {amount.scale:g}."
    if looked:
        methods, text = [WATCHED, *methods], f"{text} {WATCHED}: the first conditional prediction."
    return figures + [(text, grid) for grid in picture_grids(store, items, methods, amount.scale, training)]
