"""The custom operator: schema, FakeTensor, torch.compile, and the arguments that are refused."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastguard.kernels import guided_step as kernel
from fastguard.kernels.arguments import Operands

from . import cases

OPERATOR = torch.ops.fastguard.guided_step.default


def operands(case, backend="torch"):
    scratch = kernel.scratch_for(case.arguments["x"])
    return (*Operands(case.uncond, case.cond, **case.arguments, scratch=scratch), backend)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"both": False},
        {"noise": torch.float32},
        {"halves": None, "timestep": None},
        {"combined": torch.float16},
    ],
    ids=str,
)
def test_opcheck(options):
    torch.library.opcheck(OPERATOR, operands(cases.make(0, (3, 4, 4, 4), inactive=0.0, slots=1, **options)))


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operators = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operators.append(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="fake cuda tensors need a CUDA build of torch")
@pytest.mark.parametrize("shape", [(2, 4, 64, 64), (2, 4, 128, 128)])
def test_fake_cuda_tensors_see_one_operator_and_no_synchronisation(shape):
    real = cases.make(0, shape, dtype=torch.float16)
    with FakeTensorMode() as mode:
        fake = cases.Case(
            mode.from_tensor(real.uncond).to("cuda"),
            mode.from_tensor(real.cond).to("cuda"),
            {name: None if t is None else mode.from_tensor(t).to("cuda") for name, t in real.arguments.items()},
        )
        with Recorder() as recorder:
            fake.run()
    assert recorder.operators == [OPERATOR]


def test_other_modes_see_one_operator():
    case = cases.make(0, (2, 4, 4, 4))
    run = case.clone()
    with Recorder() as recorder:
        run.run()
    assert recorder.operators == [OPERATOR]
    cases.check(case, run)


def test_compiles_into_one_graph():
    case = cases.make(0, (3, 4, 4, 4), slots=1)
    run = case.clone()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(uncond, cond, arguments):
        kernel.guided_step(Operands(uncond * 1, cond * 1, **arguments))
        return arguments["x"] + 0

    assert torch.equal(step(run.uncond, run.cond, run.arguments), run.arguments["x"])
    cases.check(case, run)


def test_backend_comes_from_argument_then_environment_then_device(monkeypatch):
    x = torch.zeros(1)
    assert kernel.choose_backend(x) == "torch"
    assert kernel.choose_backend(torch.empty(1, device="meta")) == "torch"
    monkeypatch.setenv("FASTGUARD_BACKEND", "triton")
    assert kernel.choose_backend(x) == "triton"
    assert kernel.choose_backend(x, "torch") == "torch"
    with pytest.raises(ValueError, match="backend is 'cuda'; allowed: torch"):
        kernel.choose_backend(x, "cuda")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x", lambda t: t.double()),
        ("x", lambda t: t[:, :, ::2]),
        ("history", lambda t: t.half()),
        ("history", lambda t: t.transpose(3, 4)),
        ("model_input", lambda t: t[:1]),
        ("trace", lambda t: t[:, :1]),
        ("state", lambda t: t.float()),
        ("rows", lambda t: t[:, :3]),
        ("rules", lambda t: t[:1]),
        ("guidance", lambda t: t.double()),
        ("timestep_out", lambda t: t[:1]),
        ("noise", lambda t: torch.zeros(3)),
        ("combined", lambda t: torch.zeros(3)),
    ],
)
def test_wrong_arguments_are_named(name, change):
    case = cases.make(0, (3, 4, 4, 4))
    case.arguments[name] = change(case.arguments[name])
    with pytest.raises(ValueError, match=f"^{name} is .*; allowed: "):
        case.run()
