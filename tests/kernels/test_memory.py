"""No access out of bounds and no race, in every configuration that the launcher can choose.

TileLens's sanitizer solves for addresses outside the tensors. Its race detector (3.1.1) only collects accesses, so here its tracer
collects the addresses that each program really touches and `races` looks for one that two programs of a launch touch and at least
one writes.
"""

import importlib.util
import inspect
import itertools
from collections import defaultdict

import pytest
import torch

from . import cases, interpreted

pytest.importorskip("triton")

pytestmark = pytest.mark.slow
tilelens = pytest.importorskip("tilelens")

if not interpreted.HERE:

    def test_memory_in_the_interpreter():
        interpreted.run_file(__file__)

else:
    from tilelens.clients import Sanitizer, Tracer
    from tilelens.core.data import Grid, Load, Store

    from fastguard.kernels import triton_step as kernel
    from fastguard.kernels.arguments import Operands
    from fastguard.kernels.guided_step import scratch_for
    from fastguard.kernels.layout import Phase, State

    SHAPE = (2, 4, 3, 5)

    @pytest.fixture(params=[1, 2])
    def launches(request, monkeypatch):
        """The kernels of both launch schemes, on latents small enough for the interpreter."""
        if request.param == 2:
            monkeypatch.setattr(kernel, "SINGLE", 32)
            monkeypatch.setattr(kernel, "BLOCK", 16)

    CONFIGURATIONS = [
        {"dtype": dtype, "both": both, "noise": noise, "halves": halves, "timestep": timestep, "slots": slots}
        for (dtype, both), (noise, halves, timestep, slots) in itertools.product(
            [(torch.float16, True), (torch.bfloat16, True), (torch.float32, True), (torch.float32, False)],
            [
                (None, 2, None, 0),
                (torch.float32, 1, torch.int64, 1),
                ("model", None, torch.float32, 2),
                (None, 2, None, 3),
            ],
        )
    ]
    CONFIGURATIONS += [{"dtype": torch.float16, "combined": dtype} for dtype in (torch.float16, torch.float32)]
    CONFIGURATIONS += [
        {"anchored": True, "both": both, "combined": own}
        for both, own in ((True, None), (False, None), (True, torch.float32))
    ]

    MAKE = cases.make

    def in_phase(phase):
        """`cases.make` with every sample in that phase."""

        def make(*args, **options):
            case = MAKE(*args, **{"inactive": 0.0, **options})
            case.arguments["state"][:, State.PHASE] = int(phase)
            return case

        return make

    def traced(client, module, monkeypatch):
        clients = []
        for name in ("_norm_kernel", "_step_kernel"):
            clients.append(client())
            monkeypatch.setattr(module, name, tilelens.trace(client=clients[-1])(getattr(module, name)))
        return clients

    def run(module, shape, seed=0, last=False, **options):
        """last: the samples are in the last row that the tables have, where one element more would be outside."""
        if options.get("noise") == "model":
            options["noise"] = options["dtype"]
        case = cases.make(seed, shape, **options)
        if last:
            steps = case.arguments["guidance"].shape[1]
            case.arguments["state"][:, State.STEP] = steps - 1
            case.arguments["state"][:, State.BASE] = case.arguments["rows"].shape[0] - 1 - steps
        # The sanitizer executes no store, so what the first launch would hand to the second must be there already.
        scratch, state = scratch_for(case.arguments["x"]), case.arguments["state"]
        scratch[: 2 * state.numel()].view(torch.float64).copy_(state.flatten())
        module.guided_step_triton(Operands(case.uncond, case.cond, **case.arguments, scratch=scratch))

    def races(client):
        """Addresses that two programs of one launch touch, one of them writing."""
        readers, writers, program = defaultdict(set), defaultdict(set), None
        for record in client.records:
            if isinstance(record, Grid):
                program = record.idx
            elif isinstance(record, Load | Store):
                touched = (record.ptr + record.offsets)[record.masks.astype(bool)].ravel().tolist()
                for address in touched:
                    (readers if isinstance(record, Load) else writers)[address].add(program)
        return [
            address for address, wrote in writers.items() if len(wrote | readers[address]) > 1
        ]  # fmt: skip

    def planted(old, new, tmp_path):
        """The module with one line changed."""
        text = (
            inspect.getsource(kernel)
            .replace("from . import", "from fastguard.kernels import")
            .replace("from .", "from fastguard.kernels.")
        )
        assert text.count(old) >= 1, f"{old!r} is not in the source"
        path = tmp_path / "planted.py"
        path.write_text(text.replace(old, new))
        spec = importlib.util.spec_from_file_location("planted", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    @pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
    def test_in_bounds(configuration, launches, monkeypatch):
        traced(lambda: Sanitizer(abort_on_error=True), kernel, monkeypatch)
        run(kernel, SHAPE, **configuration)

    @pytest.mark.parametrize("phase", list(Phase), ids=str)
    @pytest.mark.parametrize("configuration", [*CONFIGURATIONS[:4], CONFIGURATIONS[-1]], ids=str)
    def test_in_bounds_in_the_last_row(configuration, phase, launches, monkeypatch):
        traced(lambda: Sanitizer(abort_on_error=True), kernel, monkeypatch)
        monkeypatch.setattr(cases, "make", in_phase(phase))
        run(kernel, SHAPE, last=True, **configuration)

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ("guidance_ptr += (b * steps + k) * 2", "guidance_ptr += (b * steps + k) * 2 + 1"),
            ("next_row_ptr = rows_ptr + layout.ROW_WIDTH", "next_row_ptr = rows_ptr + 2 * layout.ROW_WIDTH"),
        ],
    )
    def test_planted_row_beyond_the_last_is_found(old, new, monkeypatch, tmp_path):
        module = planted(old, new, tmp_path)
        traced(lambda: Sanitizer(abort_on_error=True), module, monkeypatch)
        with pytest.raises(SystemExit):
            for phase in Phase:
                monkeypatch.setattr(cases, "make", in_phase(phase))
                run(module, SHAPE, last=True)

    @pytest.mark.parametrize("shape", [SHAPE, (2, 4, 67, 65)])
    def test_in_bounds_at_full_size(shape, monkeypatch):
        traced(lambda: Sanitizer(abort_on_error=True), kernel, monkeypatch)
        run(kernel, shape, slots=3, noise=torch.float32)

    @pytest.mark.parametrize("shape", [SHAPE, (2, 4, 67, 65)])
    def test_planted_out_of_bounds_is_found(shape, monkeypatch, tmp_path):
        module = planted("mask = offs < n\n            x = ", "mask = offs < n + 1\n            x = ", tmp_path)
        traced(lambda: Sanitizer(abort_on_error=True), module, monkeypatch)
        with pytest.raises(SystemExit):
            run(module, shape)

    @pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
    def test_no_races(configuration, launches, monkeypatch):
        clients = traced(Tracer, kernel, monkeypatch)
        run(kernel, SHAPE, **configuration)
        assert any(client.records for client in clients)
        assert [races(client) for client in clients] == [[], []]

    def test_planted_race_is_found(monkeypatch, tmp_path):
        """Without the snapshot the second launch reads the state that its first block writes."""
        module = planted("state_ptr if snapshot_ptr is None else snapshot_ptr", "state_ptr", tmp_path)
        clients = traced(Tracer, module, monkeypatch)
        run(module, (2, 4, 67, 65))
        assert races(clients[1])
