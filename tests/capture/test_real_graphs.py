"""Real graphs on a real device."""

from __future__ import annotations

import pytest
import torch

from fastguard.capture import cuda_graphs
from fastguard.capture.graphs import Graphs
from tests.capture.fake_cuda import in_threads
from tests.capture.leases import content, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def test_a_real_graph():
    graphs = Graphs()
    device = torch.device("cuda", torch.cuda.current_device())
    x = torch.zeros(1024, device=device)
    held = graphs.lease("shape", device, lambda: content(x))
    weight = torch.arange(1024.0, device=device)
    for _ in range(3):
        assert run(graphs, held, "k", lambda: x.add_(weight * 2)) is None
    assert torch.equal(x, weight * 6)
    graphs.give_back()
    assert graphs()[0].bytes > 0 and graphs()[0].replays == 3


def test_a_real_capture_that_fails_leaves_draws_and_other_graphs_alone():
    device = torch.device("cuda", torch.cuda.current_device())
    x = torch.zeros(1024, device=device)
    other = cuda_graphs.Recorder(device)
    graph = other.record(lambda: x.add_(1), lambda: x.add_(1), [x])
    drawn = []

    def draws():
        drawn.append(torch.randn(4, device=device))

    def body():
        in_threads(draws)
        x.sum().item()

    recorder = cuda_graphs.Recorder(device)
    torch.manual_seed(1)
    with pytest.raises(RuntimeError):
        recorder.record(body, lambda: None, [])
    draws()
    other.replay(graph)
    recorder.new_pool()
    recorder.replay(recorder.record(lambda: x.add_(1), lambda: None, [x]))
    assert x.tolist() == [2] * 1024
    torch.manual_seed(1)
    expected = [torch.randn(4, device=device) for _ in drawn]
    assert len(drawn) == 2 and all(map(torch.equal, drawn, expected)), "no number twice, none left out"


@pytest.mark.parametrize("released", [0, 1])
def test_a_graph_outlives_another_that_was_captured_on_the_same_stream(released):
    """cuBLAS keeps a workspace per stream: whatever is freed with one graph, the other's replay must not read or write."""
    device = torch.device("cuda", torch.cuda.current_device())
    a = torch.randn(
        512, 8192, device=device, dtype=torch.float16
    )  # long sums of few rows: split, with partial sums in the workspace
    b = torch.randn(8192, 512, device=device, dtype=torch.float16)
    expected = a @ b
    made = []
    for _ in range(2):
        out = torch.empty_like(expected)
        recorder = cuda_graphs.Recorder(device)

        def body(out=out):
            torch.mm(a, b, out=out)

        made.append((recorder, recorder.record(body, body, [out]), out))
    recorder, graph, _ = made[released]
    recorder.release(graph)
    recorder.new_pool()
    free, _ = torch.cuda.mem_get_info(device)
    others = [torch.full((1 << 20,), 7, device=device, dtype=torch.uint8) for _ in range(min(256, free >> 21))]
    recorder, graph, out = made[1 - released]
    for _ in range(2):
        out.fill_(float("nan"))
        recorder.replay(graph)
        recorder.join()
        torch.testing.assert_close(out, expected, rtol=1e-2, atol=1.0)  # sums of 8,192 products, standard deviation 90
    assert all(bool((other == 7).all()) for other in others), "it wrote into memory that was freed"
