"""The gate on machine code: nothing spills, every access to latents is 16 bytes wide, no byte moves that need not; and planted faults
are found. `python -m bench.machine_code --all` does this for every configuration there is."""

import dataclasses
import re
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

import triton

from bench.machine_code import FILE, SIZES, TARGETS, Configuration, configurations, markdown, typical
from fastguard.kernels import triton_step as kernels

from . import cases, interpreted

pytestmark = [pytest.mark.slow, pytest.mark.skipif(interpreted.HERE, reason="needs the compiler, not the interpreter")]

STEP = Configuration("step", "one launch", "fp16")
# Every value of every property occurs; the fullest kernels of both launch schemes are among them.
COVERING = [
    STEP,
    Configuration("step", "one launch", "fp32", noise="fp32", timestep="i64"),
    Configuration("step", "one launch", "bf16", noise="bf16", both=False, timestep=None),
    Configuration("step", "one launch", "fp16", noise="fp32", aligned=False),
    Configuration("step", "two launches", "fp32", noise="fp32"),
    Configuration("step", "two launches", "bf16", model_input=False),
    Configuration("step", "two launches", "fp16", noise="fp32", combined="fp32"),
    Configuration("step", "one launch", "bf16", combined="bf16"),
    Configuration("step", "one launch", "fp32", noise="fp32", combined="fp32", anchored=True),
    Configuration("step", "one launch", "fp16", anchored=True, aligned=False),
    Configuration("step", "two launches", "fp16", noise="fp32", anchored=True),
    Configuration("step", "two launches", "fp16", both=False, anchored=True),
    Configuration("norm", "two launches", "fp32", combined="fp32", anchored=True),
    Configuration("step", "one launch", "fp16", combined="fp16", aligned=False),
    Configuration("step", "two launches", "fp16", noise="fp16", aligned=False),
    Configuration("norm", "two launches", "fp16"),
    Configuration("norm", "two launches", "fp32"),
    Configuration("norm", "two launches", "bf16", both=False, aligned=False),
]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("configuration", COVERING, ids=str)
def test_no_fault(configuration, target):
    assert configuration.faults(configuration.compile(target)) == []


def order_of_the_sum(configuration, target):
    """Which thread holds which elements of the first sum, d, when it begins to add them up: the layouts that the first reduction was made of."""
    hip = TARGETS[target].backend == "hip"
    options = kernels.launch_shape(SIZES[configuration.launches], configuration.aligned, hip)[2]
    text = triton.compile(configuration.source(), target=TARGETS[target], options=options).asm["ttgir"]
    layouts = dict(re.findall(r"^(#\w+) = (#ttg\..*)$", text, re.MULTILINE))
    head = text[: re.search(r"\}\) : \(tensor<\w+, #\w+>\) -> f32", text).end()]
    reordered = re.findall(r"tt\.reshape .*: tensor<\w+, (#\w+)> -> tensor<\w+, (#\w+)>", head)[-1:]
    return [layouts[name] for pair in reordered for name in pair] + [layouts[re.findall(r"#\w+", head)[-1]]]


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("kernel", ["norm", "step"])
def test_d_is_added_up_in_the_same_order_with_anchors_and_without(kernel, target):
    """So that an image's decisions do not depend on whether another one of its batch is anchored."""
    launches = "one launch" if kernel == "step" else "two launches"
    for model, combined, aligned in [
        ("fp16", None, True),
        ("bf16", "fp32", True),
        ("fp32", None, True),
        ("fp16", "fp16", False),
    ]:
        orders = [
            order_of_the_sum(
                Configuration(kernel, launches, model, combined=combined, anchored=anchored, aligned=aligned), target
            )
            for anchored in (False, True)
        ]
        assert orders[0] == orders[1] and len(orders[0]) == 3


def test_the_page_is_current():
    """Text and columns as the generator writes them, and the rows of a kernel that parks registers on gfx942."""
    page = FILE.read_text(encoding="utf-8").splitlines()
    if not any(f"Triton {triton.__version__}." in line for line in page):
        pytest.skip("the page was written with another Triton")
    *head, _, _, _, _ = written = markdown([Configuration("step", "two launches", "fp16", noise="fp32")]).splitlines()
    assert page[: len(head)] == head and set(written) <= set(page), "run python -m bench.machine_code"


def test_the_sample_covers_every_property():
    everything = list(configurations())
    assert {*COVERING, *typical()} <= set(everything)
    for field in dataclasses.fields(Configuration):
        values = {getattr(configuration, field.name) for configuration in everything}
        assert {getattr(configuration, field.name) for configuration in COVERING} == values


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_planted_spill_is_found(target):
    code = STEP.compile(target, maxnreg=32)
    assert any("spilled" in fault for fault in STEP.faults(code))


def test_planted_spill_of_gfx942_is_found(monkeypatch):
    """Its compiler takes no limit on vector registers, so the spill is planted in what the compiler says of the kernel."""
    compiled = triton.compile

    def spilling(*args, **kwargs):
        built = compiled(*args, **kwargs)
        text, count = re.subn(r"(\.vgpr_spill_count:\s*)0", r"\g<1>3", built.asm["amdgcn"])
        assert count
        return SimpleNamespace(asm={**built.asm, "amdgcn": text}, metadata=built.metadata)

    monkeypatch.setattr(triton, "compile", spilling)
    assert STEP.faults(STEP.compile("gfx942")) == ["3 spilled"]


def test_registers_that_gfx942_parks_in_lanes_are_shown_and_are_no_spill():
    code = STEP.compile("gfx942", waves_per_eu=8)
    assert code.parked > 0 and code.spills == 0


@pytest.mark.parametrize("target", TARGETS)
def test_planted_scalar_load_is_found(target):
    """Code compiled without the promise of alignment, held to what aligned code must do."""
    code = dataclasses.replace(STEP, aligned=False).compile(target)
    faults = STEP.faults(code)
    assert any("16-byte loads" in fault for fault in faults)
    assert any("16-byte stores" in fault for fault in faults)


def test_planted_extra_bytes_are_found():
    """Code that reads noise, held to the count of a step without."""
    code = dataclasses.replace(STEP, noise="fp32").compile("sm_90")
    assert any("on paper" in fault for fault in STEP.faults(code))


class Recorder:
    """Stands in for a kernel and notes what the launcher passes."""

    def __init__(self, kernel):
        self.names, self.passed = kernel.arg_names, None

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, **options):
        self.passed = {**dict(zip(self.names, args, strict=False)), **options}


@pytest.mark.parametrize("launches", SIZES)
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize(
    ("dtype", "noise", "both", "halves", "timestep", "combined", "anchored"),
    [
        (torch.float16, None, True, 2, torch.float32, None, True),
        (torch.bfloat16, torch.float32, True, 1, torch.int64, torch.bfloat16, True),
        (torch.float32, torch.float32, False, None, None, torch.float32, False),
    ],
)
def test_the_launcher_launches_what_is_compiled_here(
    monkeypatch, launches, aligned, dtype, noise, both, halves, timestep, combined, anchored
):
    width = {"one launch": 64, "two launches": 128}[launches]
    shape = (2, 4, width, width) if aligned else (2, 1, width - 1, 4 * width - 1)
    case = cases.make(
        0,
        shape,
        dtype=dtype,
        noise=noise,
        both=both,
        halves=halves,
        timestep=timestep,
        combined=combined,
        anchored=anchored,
    )
    recorders = {"norm": Recorder(kernels._norm_kernel), "step": Recorder(kernels._step_kernel)}
    for name, recorder in recorders.items():
        monkeypatch.setattr(kernels, f"_{name}_kernel", recorder)
    case.run(backend="triton")
    monkeypatch.undo()
    short = {
        torch.float16: "fp16",
        torch.bfloat16: "bf16",
        torch.float32: "fp32",
        torch.float64: "fp64",
        torch.int64: "i64",
    }
    for name, recorder in recorders.items():
        if recorder.passed is None:
            assert (name, launches) == ("norm", "one launch")
            continue
        configuration = Configuration(
            name,
            launches,
            short[dtype],
            both,
            short.get(noise),
            halves is not None,
            short.get(timestep),
            short.get(combined),
            anchored,
            aligned,
        )
        source = configuration.source()
        constants = {source.fn.arg_names[path[0]]: value for path, value in source.constants.items()}
        _, _, options = kernels.launch_shape(SIZES[launches], aligned)
        for argument, kind in source.signature.items():
            passed = recorder.passed.pop(argument)
            if isinstance(passed, torch.Tensor):
                assert kind == f"*{short[passed.dtype]}", argument
            elif kind == "constexpr":
                assert constants[argument] == passed, argument
            else:
                assert kind == "i32" and isinstance(passed, int), argument
        assert recorder.passed == options
