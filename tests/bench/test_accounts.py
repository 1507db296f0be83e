"""Launches and bytes of a step, the page that holds them, and the runner that measures the rest where there is a GPU."""

from __future__ import annotations

import json

import pytest
import torch

from bench import accounts, gpu, gpu_benchmarks, real_size, roofline
from fastguard.kernels.layout import Row, Rule, State
from fastguard.loop.loop import Loop
from tests import pipelines, schedulers
from tests.capture import simulator

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers' about the schedulers' configurations

# Stock in float32, launches on latents: cat, three for the guidance, and the scheduler's.
STOCK = {"ddim": 10, "euler": 11, "dpm-2m": 14, "euler-ancestral": 14, "deis-2": 16, "pndm": 16, "unipc-2": 28}


@pytest.fixture(scope="module", params=real_size.SIZES)
def sized(request):
    models = {dtype: real_size.unet(request.param, dtype) for dtype in (torch.float16, torch.float32)}

    def pipe(name, dtype=torch.float16):
        return real_size.pipeline(request.param, schedulers.SD[name](), models[dtype], dtype)

    with real_size.remembering():
        yield request.param, pipe


@pytest.mark.parametrize("name", STOCK)
def test_a_step_is_the_op_and_the_copies_beside_it(sized, name):
    """The op, one launch or two; the copy of the latents that the pipeline holds, its cat of them, and the copy of a row's noise."""
    size, pipe = sized
    stock, ours = accounts.stock(pipe(name, torch.float32)), accounts.guarded(pipe(name))
    assert round(stock.launches - stock.numbers) == STOCK[name]
    beside = 3 if name == "euler-ancestral" else 2
    assert (ours.launches, ours.numbers, ours.waits) == ((1 if size == "SD 1.5" else 2) + beside, 0, 0)


def test_a_planted_launch_is_counted(sized, monkeypatch):
    size, pipe = sized
    advance = Loop.advance

    def wasteful(self, *args):
        self.x.mul_(1.0)
        return advance(self, *args)

    monkeypatch.setattr(Loop, "advance", wasteful)
    ours = accounts.guarded(pipe("euler"))
    elements = 4 * real_size.unet(size).config.sample_size ** 2
    assert ours.launches == accounts.launches(elements) + 2 + 1
    monkeypatch.undo()
    assert ours.moved == accounts.guarded(pipe("euler")).moved + 8 * elements


def test_bytes_on_paper():
    schedule = accounts.table(schedulers.SD["ddim"]())
    numbers = 4 * 64 * 64
    tables = 8 * (2 * len(Row) + 2 * len(State) + len(Rule)) + 8
    # float32 x read and written, float16 u and c twice and two halves of the next input
    assert accounts.fused_bytes(schedule, 5, numbers, torch.float16) == numbers * (4 + 4 + 4 + 4 + 2 + 2) + tables
    # one tensor of history read and one written
    second = accounts.table(schedulers.SD["dpm-2m"]())
    assert accounts.fused_bytes(second, 5, numbers, torch.float16) == numbers * (20 + 4 + 4) + tables
    # x once more, m twice, mu
    assert accounts.fused_bytes(second, 5, numbers, torch.float16, True) == numbers * (28 + 16) + tables + 4


def test_an_eager_guard_costs_eight_launches():
    assert accounts.eager_guard() == 8


@pytest.mark.slow
def test_the_page_is_current():
    """Every scheduler of the table at SD 1.5, those that stock's counts are known of at SDXL too (another minute for the others)."""
    page = roofline.FILE.read_text(encoding="utf-8")
    head, *sections = page.split("\n## ")
    rows = list(roofline.compositions())
    assert [int(row.split(" | ")[1]) for row in rows] == [STOCK[name] for name in roofline.ESTIMATES]
    assert all(row in head for row in rows), "run python -m bench.roofline"
    for size, section in zip(real_size.SIZES, sections, strict=True):
        assert section.startswith(size)
        for line in roofline.lines(size, list(schedulers.SD if size == "SD 1.5" else STOCK)):
            assert f"{line}\n" in section, "run python -m bench.roofline"
            op = 1 if size == "SD 1.5" else 2
            # Beside it the latents' copy, the pipeline's cat, the noise of rows that draw, and a cat of a stage that has another input.
            assert op + 2 <= line.ours.launches <= op + 3 and line.ours.waits == 0
            assert (line.anchored.launches, line.anchored.waits) == (line.ours.launches, 0)
        assert {line.split(" |")[0][2:] for line in section.splitlines() if line.startswith("| ")} >= set(schedulers.SD)


def test_the_benchmarked_steps_agree():
    """The GPU benchmark's own code on the CPU: float16 outputs, stock against the fused op, and the comparison can fail."""
    stock, guided, anchored = gpu_benchmarks.steps(2, 64, torch.device("cpu"))
    assert guided.buffers["model_input"].dtype == stock().dtype == torch.float16
    first = anchored().clone()
    assert torch.equal(anchored(), first) and (first - guided()).abs().max() > 0.1
    assert anchored.buffers["shares"][0].tolist() == pytest.approx([1, 1])
    guided.buffers["rows"] *= 1.1
    with pytest.raises(AssertionError):
        gpu_benchmarks.same(stock, guided, 2**-8)


@pytest.fixture
def clockless(monkeypatch):
    """Benchmarks run, on the CPU, their graphs in the simulator, without a clock and a compiler."""

    def once(works, **_):
        for work in works.values():
            work()
        return {name: {"ms": 1.0} for name in works}

    monkeypatch.setattr(gpu_benchmarks, "rounds", once)
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    with simulator.recording():
        yield monkeypatch


@pytest.fixture
def tiny(monkeypatch):
    made = pipelines.sd()
    monkeypatch.setattr(real_size, "pipeline", lambda *_: made)
    return gpu_benchmarks.Generation("tiny", "euler", made.unet, 1, 2, "cpu")


def test_the_benchmark_of_capture_modes_runs(clockless, tiny):
    found = {entry["how"]: entry for entry in gpu_benchmarks.compare(gpu_benchmarks.capture_modes(tiny, loop=True))}
    assert [entry.get("path") for entry in found.values()] == [
        None, "fused", "fused, step graph", "fused, loop graph", "fused, step graph", "fused, step graph",
    ]  # fmt: skip
    graphs = [found[f"og+dtp, capture={mode}"]["graph_bytes"] for mode in ("off", "step", "loop")]
    assert graphs[2] > graphs[1] > graphs[0] == 0
    assert found["stock"]["difference"] == 0 and all(entry["difference"] < 1e-5 for entry in found.values())


def test_the_benchmark_of_compiled_modes_runs(clockless, tiny):
    unet = tiny.made.unet
    _stock, peer, ours = gpu_benchmarks.compare(gpu_benchmarks.compiled_modes(tiny))
    assert tiny.made.unet is unet and ours["path"] == "fused, step graph"
    assert peer["difference"] == 0 and ours["difference"] < 1e-5


def test_a_way_without_memory_says_so(clockless, tiny):
    def full():
        raise torch.OutOfMemoryError("no room")

    stock, missing = gpu_benchmarks.compare({"stock": lambda: gpu_benchmarks.Way(tiny), "large": full})
    assert stock["ms"] == 1.0 and missing == {"how": "large", "reason": "no room"}


def test_nothing_is_timed_that_computes_something_else(clockless, tiny):
    advance = Loop.advance
    clockless.setattr(Loop, "advance", lambda self, u, c, z: advance(self, u * 1.5, c, z))
    stock, *others = gpu_benchmarks.compare(gpu_benchmarks.capture_modes(tiny, loop=False))
    assert "ms" in stock and len(others) == 4
    assert all("ms" not in entry and "differ from stock's" in entry["wrong"] for entry in others)


def test_rounds_compare_within_a_round(monkeypatch):
    """Medians and ratios of known times: a machine that is twice as slow in every second round does not move the ratio."""
    durations = iter([1.0, 3.0, 2.0, 6.0, 1.0, 3.0])

    class Event:
        def __init__(self, **_):
            self.record = self.synchronize = lambda: None

        def elapsed_time(self, _):
            return next(durations)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    found = gpu_benchmarks.rounds({"a": lambda: None, "b": lambda: None}, least=3, most=3, seconds=0)
    assert found["b"]["ms"]["median"] == 3 and found["b"]["ratio"] == {"median": 3, "q1": 3, "q3": 3}
    assert found["a"]["ratio"]["median"] == 1 and found["a"]["rounds"] == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_runner_says_what_it_skipped(tmp_path):
    out = tmp_path / "gpu.json"
    assert gpu.main(["--out", str(out), "--tests", "tests/syncs/test_planted.py"]) == 0
    result = json.loads(out.read_text())
    assert result["device"] is None and torch.__version__.startswith(result["versions"]["torch"])
    assert result["tests"]["counts"] == {"skipped": 2}
    assert {case["reason"] for case in result["tests"]["cases"]} == {"needs a GPU"}
    assert {(entry["outcome"], entry["reason"]) for entry in result["benchmarks"]} == {("skipped", "no GPU")}


def test_a_failing_benchmark_fails_the_run(tmp_path, monkeypatch):
    def works():
        """Works."""
        yield {"a": float("nan")}
        yield {"a": 2}

    def broken():
        """Breaks."""
        yield {"a": 1}
        raise RuntimeError("broken")

    monkeypatch.setattr(gpu, "device", lambda: {"name": "a GPU"})
    monkeypatch.setattr(gpu, "run_tests", lambda paths: {"exit_code": 0, "counts": {"passed": 1}, "cases": []})
    monkeypatch.setattr(gpu, "BENCHMARKS", {"works": works, "broken": broken})
    out = tmp_path / "gpu.json"
    assert gpu.main(["--out", str(out)]) == 1
    worked, failed = json.loads(out.read_text())["benchmarks"]
    assert (worked["outcome"], worked["results"]) == ("ran", [{"a": None}, {"a": 2}])
    assert failed["reason"] == "RuntimeError: broken" and failed["results"] == [{"a": 1}]
    monkeypatch.setattr(gpu, "BENCHMARKS", {"works": works, "wrong": lambda: (one for one in [{"wrong": "values"}])})
    assert gpu.main(["--out", str(out), "--only", "wrong"]) == 1
    assert gpu.main(["--out", str(out), "--only", "works", "--seconds", "0"]) == 0
    (late,) = json.loads(out.read_text())["benchmarks"]
    assert (late["outcome"], late["results"]) == ("broken off", [{"a": None}])
    monkeypatch.setattr(gpu, "run_tests", lambda paths: {"exit_code": 1, "counts": {"failed": 1}, "cases": []})
    assert gpu.main(["--out", str(out)]) == 1
    assert {entry["reason"] for entry in json.loads(out.read_text())["benchmarks"]} == {"a test failed"}
