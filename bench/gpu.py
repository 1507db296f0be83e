"""Everything that only a GPU can tell, in one JSON: the tests marked `gpu`, then the benchmarks.

    python -m bench.gpu --out gpu.json

Without a GPU it runs to its end all the same and says what it skipped. A benchmark reports its numbers only if the tests passed.
Exit code 1 if a test or a benchmark failed.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import traceback
import xml.etree.ElementTree as ElementTree
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bench.gpu_benchmarks import BENCHMARKS
from fastguard.files import finite, write_atomic

ROOT = Path(__file__).parents[1]
PACKAGES = ("fastguard", "torch", "triton", "diffusers", "transformers", "accelerate", "numpy")


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


def run_benchmarks(skip: str | None) -> list[dict[str, Any]]:
    """Every benchmark's numbers, or why there are none."""
    results = []
    for name, benchmark in BENCHMARKS.items():
        entry: dict[str, Any] = {"name": name, "what": (benchmark.__doc__ or "").partition("\n")[0]}
        if skip is not None:
            entry |= {"outcome": "skipped", "reason": skip}
        else:
            try:
                entry |= {"outcome": "ran", "results": benchmark()}
            except Exception as error:
                traceback.print_exc()
                entry |= {"outcome": "failed", "reason": f"{type(error).__name__}: {error}"}
        results.append(entry)
    return results


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="the JSON file")
    parser.add_argument("--tests", nargs="*", default=["tests"], help="where to look for tests")
    given = parser.parse_args(arguments)

    found = device()
    tests = run_tests(given.tests)
    failed = tests["exit_code"] not in (0, 5)  # 5: there was no test
    skip = "no GPU" if found is None else "a test failed" if failed else None
    benchmarks = run_benchmarks(skip)
    result = {
        "fastguard_gpu": 1,
        "device": found,
        "versions": versions(),
        "tests": tests,
        "benchmarks": benchmarks,
    }
    write_atomic(given.out, json.dumps(finite(result), indent=2, allow_nan=False) + "\n")

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
