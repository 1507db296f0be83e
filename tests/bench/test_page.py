"""The page says who is better, from the results alone: results made up so that it is known."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bench.paper import report, tables
from bench.paper.inputs import Item, TrainingSet
from bench.paper.published import published_table
from bench.paper.store import Store
from bench.paper.tradeoff import PLAIN as NONE
from bench.paper.tradeoff import apart, styles_of
from bench.paper.work import Amount

SCALES = (2.0, 5.0)
ITEMS = [Item("memorized", str(i), f"prompt {i}", "memorized", (0,)) for i in range(6)]
SETTINGS = {
    "model": "m",
    "weights": "0" * 64,
    "scheduler": "S",
    "steps": 50,
    "dtype": "float32",
    "device": "cpu",
    "versions": {},
}
NETWORKS = dict.fromkeys(("similarity", "copy", "faithful"), "made up")
METHODS = {  # name: ours, rows an image, seconds an image
    "none": (False, 100, 1.0),
    "dtp": (True, 100, 1.1),
    "cheap": (False, 100, 1.0),
    "wen-1": (False, 110, 3.0),
    "og+dtp": (True, 100, 1.1),
    "reference-og+dtp": (False, 400, 4.0),
}
PLAIN = ((0.8, 0.9), (0.95, 0.95))  # similarity and faithfulness at either scale
OURS = ((0.2, 0.5), (0.3, 0.7))
WORSE, BETTER = ((0.2, 0.4), (0.3, 0.6)), ((0.2, 0.4), (0.3, 0.8))


def page(out: Path, cheap: Any, dear: Any, blown: str = "") -> str:
    """The page of made up results, one value for all prompts, with a method all of whose images are blown up. The opposite script's transition is at step 10 or, for "5", at 40."""
    curves = {"none": PLAIN, "dtp": OURS, "cheap": cheap, "wen-1": dear, "og+dtp": WORSE, "reference-og+dtp": WORSE}
    with Store(out) as store:
        for name, (_, rows, seconds) in METHODS.items():
            for scale, (x, y) in zip(SCALES, curves[name], strict=True):
                made = []
                for place, item in enumerate(ITEMS):
                    k = 40 if item.id == "5" else 10
                    detail = {"probe_curve": [0.0] * 50, "timesteps": [0.0] * (k + 4 * (50 - k) - 3)}
                    made.append(
                        {
                            "method": name,
                            "scale": scale,
                            "group": "memorized",
                            "kind": "memorized",
                            "id": item.id,
                            "prompt": item.prompt,
                            "seed": 0,
                            "image": f"images/{name}-{scale}-{place}.png",
                            "rows": rows,
                            "seconds": seconds,
                            "finite": True,
                            "similarity": x,
                            "copy": x > 0.5,
                            "faithful": y,
                            **({"blown": name == blown} if blown else {}),
                            "details": detail if name == "reference-og+dtp" else {},
                        }
                    )
                store.add(f"{name}/{scale}", made, [Image.new("RGB", (4, 4))] * len(made))
        known = {
            name: {"source": name, "ours": ours, "gated": name == "og+dtp", "peer": not ours}
            for name, (ours, _, _) in METHODS.items()
        }
        for name, reason in (("stp", report.NOT_ASKED), ("ren", report.NOT_ASKED), ("compile", "cannot")):
            known[name] = {"source": name, "ours": False, "peer": True, "skipped": reason}
        training = TrainingSet([Image.new("RGB", (4, 4))], lambda image: image, "")
        amount = Amount(scale=5.0, scales=SCALES, seeds=1, ordinary=0, detection=0, batch=6)
        report.write(store, ITEMS, known, amount, SETTINGS, NETWORKS, training)
    return (out / "report.html").read_text()


ON = "dtp (1.00 times plain cost), similarity below 0.5: on or above all 1 peers"
BELOW = "dtp (1.00 times plain cost), similarity below 0.5: of 1 peers of at most plain cost that get there it lies below cheap (1.00 times, -0.100"
NONE_BETTER = "below none of the 2 dearer ones."
DEARER = "and below the dearer wen-1 (1.10 times, -0.100 [-0.100, -0.100] at similarity 0.30)"


@pytest.mark.parametrize(
    ("cheap", "dear", "said", "unsaid"),
    [
        (WORSE, WORSE, [ON, NONE_BETTER], [BELOW, DEARER]),
        (BETTER, WORSE, [BELOW, NONE_BETTER], [ON, DEARER]),
        (WORSE, BETTER, [ON, DEARER], [BELOW]),
    ],
    ids=["the preset dominates", "a cheap peer is better", "a dearer peer is better"],
)
def test_verdict(tmp_path: Path, cheap: Any, dear: Any, said: list[str], unsaid: list[str]) -> None:
    lead = next(line for line in page(tmp_path, cheap, dear).split("<p>")[1].split("</p>"))
    ours = "dtp (1.00 times" + lead.split("dtp (1.00 times", 1)[1].split("og+dtp (")[0]
    assert all(part in ours for part in said), ours
    assert not any(part in ours for part in unsaid)


def test_blown_up_images_are_not_faithful(tmp_path: Path) -> None:
    """A preset that led by them leads no more, and one that lost to such a peer does not lose."""
    assert BELOW in page(tmp_path / "a", BETTER, WORSE, blown="wen-1")
    assert ON in page(tmp_path / "theirs", BETTER, WORSE, blown="cheap")
    assert "it lies below cheap (1.00 times, -0.600" in page(tmp_path / "ours", WORSE, WORSE, blown="dtp")
    text = (tmp_path / "ours" / "tables.md").read_text()
    assert "| dtp | 1.00 | 5 | 0.30 [0.30, 0.30] | 0.00 [0.00, 0.00] | 100% |" in text


def test_the_table_of_pairs(tmp_path: Path) -> None:
    page(tmp_path, WORSE, BETTER)
    lines = (tmp_path / "tables.md").read_text().splitlines()
    assert "| dtp | wen-1 | 1.10 | - | -0.100 [-0.100, -0.100] | 0.30 | 100% | -0.100 at 0.30 | below |" in lines
    assert "| dtp | none | 1.00 | - | - | - | - | - | the peer never gets there |" in lines
    overview = next(line for line in lines if line.startswith("| dtp | 1.00 | - | +0.100, cheap at "))
    assert "| -0.100, wen-1 at 0.30 | - |" in overview


def test_seconds_stand_there_where_they_were_taken_by_turns_alone(tmp_path: Path) -> None:
    (tmp_path / "seconds.json").write_text('{"dtp": [1.0, 2.0, 4.0]}')
    page(tmp_path, WORSE, WORSE)
    text = (tmp_path / "tables.md").read_text()
    assert "| dtp | 6 | 1.00 | 2.00 [1.00, 4.00] |" in text and "| wen-1 | 6 | 1.10 | - |" in text


def test_the_same_results_give_the_same_page(tmp_path: Path) -> None:
    for name in ("a", "b"):
        page(tmp_path / name, WORSE, WORSE)
    for name in ("tables.md", "summary.json", "curves-similarity.svg", "curves-copy-rate.svg"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_methods_that_were_left_out_stand_beside_the_verdict(tmp_path: Path) -> None:
    text = page(tmp_path, WORSE, WORSE)
    assert "Left out by --methods: stp, ren." in text.split("</p>")[0]
    assert "Not run: compile (cannot)." in text


def test_costs_that_rows_do_not_show_stand_beside_them(tmp_path: Path) -> None:
    text = page(tmp_path, WORSE, WORSE)
    assert text.count("each with a backward pass besides") >= 3  # the table, the comparison, the foot
    assert "<th>rows / plain</th><th>s / plain</th>" in text
    assert "<td>wen-1</td><td>6</td><td>1.10</td><td>-</td>" in text
    # 100 rows of og+dtp; 2 (50 + 10 + 157) = 434 of the script on five images, 2 (50 + 40 + 37) = 254 on the sixth
    assert f"og+dtp takes {600 / (5 * 434 + 254):.2f} of the denoiser rows" in text
    assert "at most a quarter on 5 of 6" in text


def test_fid_does_not_keep_every_file_open(tmp_path: Path) -> None:
    count, (soft, hard) = 200, resource.getrlimit(resource.RLIMIT_NOFILE)
    rows = [
        {"method": "a", "group": "memorized", "scale": 5.0, "seed": seed, "image": f"{seed}.png"}
        for seed in range(count)
    ]
    seen: list[int] = []

    class Network:
        network = "made up"

        def against(self, real: Sequence[Image.Image]) -> None:
            assert len(real) == 2

        def __call__(self, generated: Sequence[Image.Image]) -> float:
            for start in range(0, len(generated), 64):
                seen.extend(image.getpixel((0, 0))[0] for image in generated[start : start + 64])
            return 2.0

    training = TrainingSet([Image.new("RGB", (4, 4))] * 2, lambda image: image, "")
    amount = Amount(scale=5.0, scales=(), seeds=count, ordinary=0, detection=0, batch=6)
    with Store(tmp_path) as store:
        store.add("u", rows, [Image.new("RGB", (2, 2), (seed, 0, 0)) for seed in range(count)])
        resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))
        try:
            found = report.fid_values(store, ["a"], amount, Network(), training)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert found["values"] == {"memorized": {"a": 2.0}} and seen == list(range(count))


def test_published_rows_say_which_of_ours_stands_there() -> None:
    def table(*names: str) -> tables.Table:
        cells = {name: {"similarity_set": {"p95": 1.0 if name == "none" else 0.25}} for name in ("none", *names)}
        return published_table(cells, {})

    def ours(some: tables.Table) -> dict[str, str]:
        return {f"{row[0]} {row[1]}": row[-1] for row in some.rows}

    short = table("dtp", "paper-og+dtp", "og+dtp", "stp")
    assert ours(short)["S3 DTP"] == "dtp 0.250 (-75%)" and ours(short)["S3 OG+DTP"] == "paper-og+dtp 0.250 (-75%)"
    assert short.notes[-1].endswith("stands there: dtp for paper-dtp.")
    assert ours(table("stp"))["S3 DTP"] == "-" and "stands there" not in table("stp").notes[-1]
    # Theirs starts guidance at 700 or 600, our stp at 500.
    assert ours(short)["S2 guidance from 700"] == ours(short)["S2 guidance from 600"] == "-"
    assert ours(short)["S1 STP"] == "stp 0.250 (-75%)"


def test_labels_are_apart_and_in_their_order() -> None:
    placed = apart([0.5, 0.5, -0.1, 0.52, 1.0], 0.1, 0.0, 0.95)
    assert sorted(placed) == [placed[2], placed[0], placed[1], placed[3], placed[4]]
    assert np.diff(sorted(placed)).min() >= 0.1 - 1e-9 and max(placed) <= 0.95 + 1e-9 and min(placed) == 0
    assert apart([0.2, 0.8], 0.1, 0.0, 1.0) == [0.2, 0.8] and apart([], 0.1, 0.0, 1.0) == []


def test_no_two_methods_of_a_panel_look_the_same() -> None:
    found = styles_of([NONE, *map(str, range(30))])
    assert len(set(found.values())) == 31 and found[NONE] == ("black", "-")
    assert len({colour for colour, _ in found.values()}) == 13
