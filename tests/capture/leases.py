"""What a generation leases, and bodies without arguments over it, for the tests of `Graphs` alone."""

from __future__ import annotations

from types import SimpleNamespace

import torch

CPU = torch.device("cpu")


def content(x=None, key="shape"):
    x = torch.zeros(4) if x is None else x
    return SimpleNamespace(key=key, x=x, tensors=[x], changed=[x], nbytes=x.nbytes)


def lease(graphs, key="shape", size=4):
    return graphs.lease(key, CPU, lambda: content(torch.zeros(size), key))


def run(graphs, held, key, body, arguments=(), watch=lambda: lambda: None):
    """As `BodyRunner` does: the reason why no graph was run."""
    key = held.key, key
    if (reason := graphs.failure or graphs.refused.get(key)) is not None:
        body()
        return reason
    return graphs.run(key, arguments, lambda tree: body(), lambda tree: body(), watch)
