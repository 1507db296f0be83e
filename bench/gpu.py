"""Everything that only a GPU can tell, in one JSON: the tests marked `gpu`, then the benchmarks.

    python -m bench.gpu --out gpu.json [--only captures ...] [--seconds 600]

Without a GPU it runs to its end all the same and says what it skipped. A benchmark reports its numbers only if the tests passed.
The file is written anew after every result, so whatever ends the run, what was measured stays. Exit code 1 if a test or a
benchmark failed.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import platform
import subprocess
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bench import real_size
from bench.gpu_benchmarks import BENCHMARKS, SIZED, Benchmark
from fastguard.files import finite, write_atomic

ROOT = Path(__file__).parents[1]
PACKAGES = ("diffusers-fastguard", "torch", "triton", "diffusers", "transformers", "accelerate", "numpy")


def device() -> dict[str, Any] | None:
    """The first GPU; None without one."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
    }


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version(), "system": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def marked() -> list[str]:
    """The files that have tests marked `gpu`: collecting the others would need packages that a GPU machine may lack."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if "pytest.mark.gpu" in file.read_text(encoding="utf-8")]


def run_tests(paths: list[str]) -> dict[str, Any]:
    """The tests marked `gpu` under `paths`: counts by outcome, and each case with the reason if it did not pass."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", f"--junit-xml={log}", *paths]
        code = subprocess.run(command, cwd=ROOT, check=False, stdout=sys.stderr).returncode
        cases = [_case(element) for element in ElementTree.parse(log).iter("testcase")] if log.exists() else []
    counts = Counter(case["outcome"] for case in cases)
    return {"exit_code": code, "counts": dict(counts), "cases": cases}


def _case(element: ElementTree.Element) -> dict[str, Any]:
    outcome, reason = "passed", None
    for name in ("failure", "error", "skipped"):
        found = element.find(name)
        if found is not None:
            outcome = "skipped" if name == "skipped" else "failed"
            reason = found.get("message")
    name = f"{element.get('classname')}.{element.get('name')}"
    return {"name": name, "outcome": outcome, "reason": reason, "seconds": float(element.get("time", 0))}


def run_benchmarks(chosen: Mapping[str, Benchmark], skip: str | None, seconds: float) -> Iterator[list[dict[str, Any]]]:
    """Every benchmark's numbers, or why there are none; yielded after each result as far as they are known."""
    entries: list[dict[str, Any]] = []
    end = time.monotonic() + seconds
    for name, benchmark in chosen.items():
        entry: dict[str, Any] = {"name": name, "what": (BENCHMARKS[name].__doc__ or "").partition("\n")[0]}
        entries.append(entry)
        if skip is not None:
            entry |= {"outcome": "skipped", "reason": skip}
            yield entries
            continue
        entry |= {"outcome": "broken off", "results": []}
        try:
            with closing(benchmark()) as results:
                for result in results:
                    entry["results"].append(result)
                    yield entries
                    if time.monotonic() > end:
                        entry["reason"] = f"--seconds {seconds:g} are over"
                        break
                else:
                    entry["outcome"] = "ran"
            if wrong := [result for result in entry["results"] if "wrong" in result]:
                entry |= {"outcome": "failed", "reason": f"{len(wrong)} with wrong values"}
        except Exception as error:
            traceback.print_exc()
            entry |= {"outcome": "failed", "reason": f"{type(error).__name__}: {error}"}
        _free()
        yield entries


def _free() -> None:
    """The next benchmark begins with an empty device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="the JSON file")
    parser.add_argument("--tests", nargs="+", default=marked(), help="default: all that are marked gpu")
    parser.add_argument(
        "--only", nargs="+", choices=list(BENCHMARKS), default=list(BENCHMARKS), help="benchmarks to run"
    )
    parser.add_argument("--sizes", nargs="+", choices=real_size.SIZES, help=f"of {' and '.join(SIZED)}")
    parser.add_argument("--batches", nargs="+", type=int, help=f"of {' and '.join(SIZED)}")
    parser.add_argument("--seconds", type=float, default=math.inf, help="no result is begun later (tests not counted)")
    given = parser.parse_args(arguments)
    selection = {name: value for name in ("sizes", "batches") if (value := getattr(given, name))}
    chosen = {name: partial(BENCHMARKS[name], **(selection if name in SIZED else {})) for name in given.only}

    found = device()
    tests = run_tests(given.tests)
    failed = tests["exit_code"] not in (0, 5)  # 5: there was no test
    skip = "no GPU" if found is None else "a test failed" if failed else None
    command = ["python", "-m", "bench.gpu", *(sys.argv[1:] if arguments is None else arguments)]
    result = {"fastguard_gpu": 1, "command": command, "device": found, "versions": versions(), "tests": tests}
    benchmarks: list[dict[str, Any]] = []
    for benchmarks in run_benchmarks(chosen, skip, given.seconds):
        content = finite({**result, "benchmarks": benchmarks})
        write_atomic(given.out, json.dumps(content, indent=2, allow_nan=False) + "\n")

    print(f"device: {found['name'] if found else 'none'}")
    print(f"tests: {', '.join(f'{n} {outcome}' for outcome, n in sorted(tests['counts'].items())) or 'none'}")
    for entry in benchmarks:
        print(
            f"benchmark {entry['name']}: {entry['outcome']}{' (' + entry['reason'] + ')' if 'reason' in entry else ''}"
        )
    print(given.out)
    return int(failed or any(entry["outcome"] == "failed" for entry in benchmarks))


if __name__ == "__main__":
    sys.exit(main())
