"""Batches of 1,000 rows on the embedded model: throughput against loops over the pipeline, 20 SIGKILLs, two Ray actors.

    python -m bench.batches [--rows 1000] [--steps 4] [--batch 16] [--kills 20] [--parts speed kill ray] [--json FILE]

speed  `generate` (encode, denoise, decode, write PNGs and a manifest) against stock `pipe(prompt)` and `pipe(list)` in equal batches,
       which write nothing. Slices of the rows in alternating pairs; the model is loaded before. Images are compared first.
kill   the command line killed at random moments, resumed, and compared with a run that nobody disturbed.
ray    images per second of a run, from its third batch to its end: two actors against one process.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from bench.pairs import alternating
from fastguard.batch.task import generate
from fastguard.files import write_json
from fastguard.pipelines.loading import load_pipeline, resolve
from fastguard.pipelines.quiet import quiet

ROOT = Path(__file__).parents[1]
SUBJECTS = ("apple", "cat", "dog", "house", "tree", "boat", "fish", "bird", "car", "star")
POLICIES = ("cfg", "dtp", "stp")
PARTS = ("speed", "kill", "ray")


def make_rows(count: int) -> list[dict[str, Any]]:
    """Distinct prompts, ten to a subject; seeds, scales and policies vary from row to row."""
    return [
        {
            "id": f"r{i:04d}",
            "prompt": f"{SUBJECTS[i % 10]} {i // 10 % 100}",
            "seed": i,
            "guidance_scale": 3.0 + i % 5,
            "policy": POLICIES[i % 3],
        }
        for i in range(count)
    ]


def speed(pipe: Any, count: int, steps: int, batch: int, pairs: int, folder: Path) -> dict[str, Any]:
    """Times of baselines over times of `generate`: above 1 is faster. Plain guidance at one scale, which is all that stock can do."""
    rows = [{**row, "policy": "cfg", "guidance_scale": 7.5} for row in make_rows(count)]
    size = max(batch, count // pairs)

    def ours(part: list[dict[str, Any]]) -> Path:
        out = Path(tempfile.mkdtemp(dir=folder))
        generate(pipe, part, out, steps=steps, batch_size=batch, progress=False)
        return out

    def stock(part: list[dict[str, Any]], batch: int) -> list[Image.Image]:
        images = []
        for i in range(0, len(part), batch):
            now = part[i : i + batch]
            prompts: Any = now[0]["prompt"] if batch == 1 else [row["prompt"] for row in now]
            generator = [torch.Generator().manual_seed(row["seed"]) for row in now]
            images += pipe(prompts, num_inference_steps=steps, generator=generator, guidance_scale=7.5).images
        return images

    out, expected = ours(rows[:size]), stock(rows[:size], batch)
    worst = max(_difference(out / f"{r['id']}.png", image) for r, image in zip(rows, expected, strict=False))
    if worst > 1:
        raise SystemExit(f"generate and pipe(list) differ by {worst}/255: nothing was timed")
    result: dict[str, Any] = {"largest difference": worst, "rows per sample": size}
    for name, other in (("loop over pipe(prompt)", 1), (f"pipe(list of {batch})", batch)):
        ratios: list[float] = []
        for i in tqdm(range(pairs), desc=name, leave=False):
            part = rows[i * size % count :][:size]
            pair = alternating(partial(stock, part, other), partial(ours, part), pairs=2, warmup=0)
            ratios += pair.values
        low, median, high = np.quantile(ratios, [0.25, 0.5, 0.75])
        result[name] = {"median": median, "quartiles": [low, high], "pairs": len(ratios)}
        print(f"generate against {name}: {median:.2f} times (quartiles {low:.2f} to {high:.2f}, {len(ratios)} pairs)")
    return result


def kill(model: str, count: int, steps: int, batch: int, kills: int, folder: Path) -> dict[str, Any]:
    """SIGKILL at random moments; every image that was there is left alone, the end is that of an undisturbed run."""
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in make_rows(count)))
    whole, killed = folder / "whole", folder / "killed"

    def command(out: Path) -> list[str]:
        options = ["--steps", str(steps), "--batch-size", str(batch), "--device", "cpu"]
        return [
            sys.executable,
            "-m",
            "fastguard",
            "generate",
            model,
            "--prompts",
            str(file),
            "--out",
            str(out),
            *options,
        ]

    quiet_run: dict[str, Any] = {"cwd": ROOT, "stderr": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    begin = time.perf_counter()
    subprocess.run(command(whole), check=True, **quiet_run)
    seconds = time.perf_counter() - begin
    stamps = sorted(line["mtime_ns"] for line in _lines(whole))
    working = (stamps[-1] - stamps[0]) / 1e9
    known: dict[str, int] = {}
    done = []
    for i in tqdm(range(kills), desc="kills", leave=False):
        process = subprocess.Popen(command(killed), **quiet_run)
        if i % 5 == 0:  # while it starts, or soon after
            time.sleep(random.uniform(0, seconds - working))
        else:  # after a share of the work
            while process.poll() is None and len(list(killed.glob("*.png"))) <= len(known):
                time.sleep(0.01)
            time.sleep(random.uniform(0, working / kills))
        process.kill()
        process.wait()
        now = {path.name: path.stat().st_mtime_ns for path in killed.glob("*.png")}
        assert known.items() <= now.items(), "an image that was there was made again or lost"
        assert {line["file"] for line in _lines(killed)} <= now.keys(), "the manifest lists what is not there"
        known = now
        done.append(len(now))
    subprocess.run(command(killed), check=True, **quiet_run)
    ids = [line["id"] for line in _lines(killed)]
    assert len(ids) == len(set(ids)) == count, "an id is missing or listed twice"
    assert {line["id"] for line in _lines(whole)} == set(ids)
    assert known.items() <= {p.name: p.stat().st_mtime_ns for p in killed.glob("*.png")}.items()
    differences = [_difference(killed / f"{name}.png", Image.open(whole / f"{name}.png")) for name in ids]
    result = {
        "images after each kill": done,
        "largest difference": max(differences),
        "same bits": sum(1 for d in differences if d == 0),
        "images": count,
    }
    print(
        f"{kills} kills: {count} ids once each, {result['same bits']} with the same bits, largest difference {max(differences)}/255"
    )
    return result


def ray(model: str, count: int, steps: int, batch: int, runs: int, folder: Path) -> dict[str, Any]:
    """Images per second, alternating; the starts are told apart.

    Counted from two batches on: two actors make one each before the first image has a stamp.
    """
    rates: dict[str, list[float]] = {"local": [], "ray": []}
    walls: dict[str, list[float]] = {"local": [], "ray": []}
    for i in tqdm(range(runs), desc="ray", leave=False):
        for engine in ("local", "ray") if i % 2 == 0 else ("ray", "local"):
            out = folder / f"{engine}{i}"
            begin = time.perf_counter()
            generate(
                model,
                make_rows(count),
                out,
                steps=steps,
                batch_size=batch,
                engine=engine,
                actors=2,
                device="cpu",
                progress=False,
            )
            walls[engine].append(time.perf_counter() - begin)
            stamps = sorted(line["mtime_ns"] for line in _lines(out))
            rest = stamps[2 * batch - 1 :]
            rates[engine].append((len(rest) - 1) / ((rest[-1] - rest[0]) / 1e9))
    ratios = sorted(a / b for a, b in zip(rates["ray"], rates["local"], strict=True))
    print(
        f"two Ray actors against one process: {np.median(ratios):.2f} times ({ratios[0]:.2f} to {ratios[-1]:.2f}, {runs} pairs)"
    )
    return {"ratios": ratios, "images per second": rates, "seconds in all": walls}


def _lines(out: Path) -> list[dict[str, Any]]:
    path = out / "manifest.jsonl"
    raw = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in raw if line.endswith(b"\n")]


def _difference(path: Path, image: Image.Image) -> int:
    ours, theirs = (np.asarray(picture).astype(int) for picture in (Image.open(path), image))
    return int(np.abs(ours - theirs).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="testbed", help="a pipeline's folder; default: the embedded model")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=10, help="slices of the rows; each is timed twice")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--runs", type=int, default=3, help="runs of each engine in the part ray")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    quiet()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    model = resolve(options.model)
    result: dict[str, Any] = {
        "device": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "rows": options.rows,
        "steps": options.steps,
        "batch": options.batch,
    }
    folder = Path(tempfile.mkdtemp(prefix="fastguard-batches-"))
    try:
        size = (options.rows, options.steps, options.batch)
        if "speed" in options.parts:
            result["speed"] = speed(load_pipeline(model), *size, options.pairs, folder)
        if "kill" in options.parts:
            result["kill"] = kill(model, *size, options.kills, folder)
        if "ray" in options.parts:
            result["ray"] = ray(model, *size, options.runs, folder)
    finally:
        shutil.rmtree(folder)
    if options.json:
        write_json(options.json, result)


if __name__ == "__main__":
    main()
