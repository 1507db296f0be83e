"""SIGKILL at any moment, then resume: the same results and images as without, none missing, none twice."""

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bench.paper.inputs import BadInput
from bench.paper.parallel import workers
from bench.paper.settings import keep
from bench.paper.store import Store
from bench.paper.work import WATCHED, ahead, run, units
from tests.bench.tiny_run import AMOUNT, ITEMS, METHODS, main, prepare

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
    for method in METHODS:
        for item in ITEMS:
            seeds = {"memorized": AMOUNT.seeds, "ordinary": AMOUNT.ordinary}[item.group]
            seeds = AMOUNT.detection if method == WATCHED else seeds
            expected |= {(method, 7.5, item.id, seed) for seed in range(seeds)}
            expected |= {
                (method, 2.0, item.id, seed) for seed in range(3) if item.group == "memorized" and method != WATCHED
            }
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


def test_what_is_kept_is_not_added_again(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.add("u", [{"image": "a.png"}], [Image.new("RGB", (2, 2))])
        store.add("v", [{"image": "a.png"}, {"image": "b.png"}], [Image.new("RGB", (2, 2), "red")] * 2)
        assert Image.open(tmp_path / "a.png").getpixel((0, 0)) == (0, 0, 0)
    assert [(r["unit"], r["image"]) for r in results(tmp_path)] == [("u", "a.png"), ("v", "b.png")]
    with Store(tmp_path) as store:
        assert store.lacking(["a.png", "b.png", "c.png"]) == ["c.png"]


@pytest.mark.parametrize("sizes", [(5, 12, 4), (12, 3, 2)])
def test_the_batch_size_may_differ_from_run_to_run(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    """Every image once, in files that the next run can read."""
    for number, size in enumerate(sizes):
        work = units(ITEMS, METHODS, replace(AMOUNT, batch=size))
        assert max(len(unit.images) for unit in work) <= size
        with Store(tmp_path) as store:
            # All units of the last run, some of the others.
            run(work[: len(work) * (number + 1) // len(sizes)], partial(map, prepare()), store)
    names = [r["image"] for r in results(tmp_path)]
    assert len(names) == len(set(names)) and set(names) == set(images(tmp_path))
    assert set(names) == {name for unit in work for name in unit.images}


def test_a_deleted_image_is_made_again(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    for name in sorted(images(out))[::7]:
        (out / name).unlink()
    main(out)
    assert images(out) == images(whole)
    assert (out / "results.jsonl").read_bytes() == (whole / "results.jsonl").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ("killed", "RuntimeError: one of 2 processes was killed"),
        ("cannot start", "ValueError: prompts: 1 problem"),
    ],
)
def test_a_process_that_is_killed_or_cannot_start(whole: Path, tmp_path: Path, trouble: str, message: str) -> None:
    """The run ends, says why, keeps what was finished and goes on when it is started again."""
    command = [sys.executable, "-m", "tests.bench.tiny_run", str(tmp_path), "2"]
    ended = subprocess.run([*command, trouble], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1 and message in ended.stderr
    kept = results(tmp_path) if (tmp_path / "results.jsonl").exists() else []
    assert kept == results(whole)[: len(kept)] and bool(kept) is (trouble == "killed")
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=120)
    assert results(tmp_path) == results(whole) and images(tmp_path) == images(whole)


@pytest.mark.slow
def test_an_error_of_the_run_itself_ends_its_processes_at_once() -> None:
    began = time.monotonic()
    with pytest.raises(OSError, match="disk full"), workers(slow, 2) as make_all:
        next(make_all(range(3)))  # the two others take a minute each
        raise OSError("disk full")
    assert time.monotonic() - began < 30 and not multiprocessing.active_children()


def slow() -> Any:
    return lambda unit: time.sleep(60 * min(unit, 1))


def test_what_is_ahead_is_said(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "out")
    work = units(ITEMS, METHODS, AMOUNT)
    (tmp_path / "out" / work[0].images[0]).unlink()
    for out, images, rows in (
        (whole, 0, 0),
        (tmp_path / "out", 1, 2),
        (tmp_path / "empty", 136, 2 * 46 + 2 * 44 + 4 * 46),
    ):
        with Store(out) as store:
            line = ahead(work, store, {"none": 2, "first-look": 2, "other": 4}.get)
        assert line.startswith(f"{images} of 136 images still to make, about {rows} rows of the denoiser at most; ")


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
