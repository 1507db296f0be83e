"""SIGKILL at any moment, then resume: the same results and images as without, none missing, none twice."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bench.paper.inputs import BadInput
from bench.paper.settings import keep
from bench.paper.store import Store
from bench.paper.work import units
from tests.bench.tiny_run import AMOUNT, ITEMS, METHODS, main

ROOT = Path(__file__).parents[2]


def results(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def images(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in (out / "images").rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    main(out)
    return out


def test_a_run_makes_every_image_once(whole: Path) -> None:
    expected = set()
    for method in ("none", "cfg", "other"):
        for item in ITEMS:
            seeds = {"memorized": AMOUNT.seeds, "ordinary": AMOUNT.ordinary}[item.group]
            seeds = max(seeds, AMOUNT.detection) if method == "cfg" else seeds
            expected |= {(method, 7.5, item.id, seed) for seed in range(seeds)}
            expected |= {(method, 2.0, item.id, seed) for seed in range(3) if item.group == "memorized"}
    keys = [(r["method"], r["scale"], r["id"], r["seed"]) for r in results(whole)]
    assert len(keys) == len(set(keys)) and set(keys) == expected
    assert set(images(whole)) == {r["image"] for r in results(whole)}
    # All seeds of a prompt are in one unit, as Wen's loss needs them.
    assert len({(r["unit"], r["method"], r["scale"], r["id"]) for r in results(whole)}) == len({k[:3] for k in keys})


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "kills"), [(1, 5), (2, 2)])
def test_killed_at_random_moments(whole: Path, tmp_path: Path, processes: int, kills: int) -> None:
    clock, killed, before = random.Random(5), 0, -1
    for _ in range(30):
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.tiny_run", str(tmp_path), str(processes)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        if killed < kills:
            # Wait for progress, so that the kills are spread over the run, then for a random part of a unit's time.
            path = tmp_path / "results.jsonl"
            while process.poll() is None and (not path.exists() or path.stat().st_size <= before):
                time.sleep(0.001)
            time.sleep(clock.uniform(0, 0.02))
            process.send_signal(signal.SIGKILL)
        process.stdout.read()  # ends when the processes that the killed one had started are gone too
        code = process.wait()
        if code == 0:
            break
        assert code == -signal.SIGKILL
        killed, before = killed + 1, (tmp_path / "results.jsonl").stat().st_size
    assert killed >= min(kills, 3)
    assert results(tmp_path) == results(whole)
    assert images(tmp_path) == images(whole)


def test_cut_off_at_any_byte(whole: Path, tmp_path: Path) -> None:
    data, rows = (whole / "results.jsonl").read_bytes(), results(whole)
    ends = [i + 1 for i, byte in enumerate(data) if byte == 10]
    near = {end + k for end in ends[:30] for k in (-2, -1, 0, 1)} | set(range(0, len(data), 997))
    for cut in sorted(c for c in near if 0 <= c <= len(data)):
        out = tmp_path / str(cut)
        out.mkdir()
        (out / "results.jsonl").write_bytes(data[:cut])
        with Store(out) as store:
            kept = list(store.rows)
            assert (out / "results.jsonl").read_bytes() == data[:cut]  # opening changes nothing
            store.add("next", [{"image": "next.png"}], [Image.new("RGB", (2, 2))])
        complete = sum(end <= cut for end in ends)
        # What is kept: whole units only, and all of them.
        names = list(dict.fromkeys(r["unit"] for r in rows[:complete]))
        full = [u for u in names if sum(r["unit"] == u for r in rows[:complete]) == sum(r["unit"] == u for r in rows)]
        assert kept == [r for r in rows if r["unit"] in full]
        cut_off, text = data[: ends[len(kept) - 1] if kept else 0], (out / "results.jsonl").read_bytes()
        assert text.startswith(cut_off) and json.loads(text[len(cut_off) :])["unit"] == "next"


def test_resuming_after_a_cut_gives_the_same_file(whole: Path, tmp_path: Path) -> None:
    data = (whole / "results.jsonl").read_bytes()
    (tmp_path / "results.jsonl").write_bytes(data[: len(data) // 2])
    (tmp_path / ".results.jsonl.0.tmp").write_text("left by a kill")
    main(tmp_path)
    assert (tmp_path / "results.jsonl").read_bytes() == data
    assert not list(tmp_path.rglob(".*.tmp"))


def test_damage_in_the_middle_is_refused_with_its_line(whole: Path, tmp_path: Path) -> None:
    lines = (whole / "results.jsonl").read_bytes().splitlines(keepends=True)
    for name, damaged in (
        ("torn", [*lines[:2], b"{torn\n", *lines[3:]]),
        ("twice", [*lines[:5], *lines[:5], *lines[5:]]),
    ):
        out = tmp_path / name
        out.mkdir()
        (out / "results.jsonl").write_bytes(b"".join(damaged))
        with pytest.raises(ValueError, match="line 3 is damaged" if name == "torn" else "line 6 does not follow"):
            Store(out)


def test_a_scale_given_twice_is_made_once() -> None:
    assert units(ITEMS, METHODS, replace(AMOUNT, scales=(2.0, 7.5, 2.0, 7.5))) == units(ITEMS, METHODS, AMOUNT)


@pytest.mark.parametrize("scales", [(2.0, 7.5000001), (2.0, 2.0000001)])
def test_scales_of_one_name_are_refused(scales: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=rf"and {scales[1]}: are both .* in six digits"):
        replace(AMOUNT, scales=scales)


def test_a_unit_is_added_once(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.add("u", [{"image": "a.png"}], [Image.new("RGB", (2, 2))])
        with pytest.raises(AssertionError, match="unit 'u'"):
            store.add("u", [{"image": "a.png"}], [Image.new("RGB", (2, 2), "red")])
        assert Image.open(tmp_path / "a.png").getpixel((0, 0)) == (0, 0, 0)
    with Store(tmp_path) as store:
        assert store.done == {"u"}


def test_opening_leaves_the_files_of_a_foreign_folder_alone(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    for name in ("notes/.draft.tmp", "results.jsonl"):
        (tmp_path / name).write_text('{"theirs": 1}\n')
    with Store(tmp_path), pytest.raises(BadInput, match=r"results\.jsonl is there without settings\.json"):
        keep(tmp_path, {}, {})
    for name in ("notes/.draft.tmp", "results.jsonl"):
        assert (tmp_path / name).read_text() == '{"theirs": 1}\n'
    assert not (tmp_path / "settings.json").exists()


def test_two_processes_at_once_are_refused(tmp_path: Path) -> None:
    with Store(tmp_path), pytest.raises(RuntimeError, match="another process"):
        Store(tmp_path)
    with Store(tmp_path):
        pass
