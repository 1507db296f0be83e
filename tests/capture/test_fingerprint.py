"""What the fingerprint of a model looks at. That each of it matters to an image: test_stale.py."""

from __future__ import annotations

import functools
import gc
import types
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.testing._internal.two_tensor import TwoTensor

from fastguard.capture.fingerprint import Fingerprint, kind


def renamed(entries):
    """Another name for the last entry: as many entries, the same values in the same order."""
    name, value = entries.popitem()
    entries[name + " renamed"] = value


def held(value):
    """A layer that holds an object, as adapters' dictionaries and processors are held."""
    layer = torch.nn.Linear(2, 2, bias=False)
    layer.held = value
    return layer


def transposed(layer):
    layer.weight.data = layer.weight.data.t()


def resized(layer):
    layer.weight.data = layer.weight.data[:1]


def noted():
    layer = torch.nn.Linear(2, 2, bias=False)
    layer.weight.factor = 1.0
    return layer


def wrapped():
    layer = torch.nn.Linear(2, 2, bias=False)
    layer.weight = torch.nn.Parameter(TwoTensor(torch.ones(2, 2), torch.ones(2, 2)))
    return layer


class Processor:
    """As attention processors are: no module, held by one."""

    scale = 1.0

    def __init__(self, **values):
        vars(self).update(values)

    def __call__(self, x):
        return x * self.scale


class Slotted(Processor):
    __slots__ = ("factor",)

    def __init__(self):
        self.factor = 1.0


class Layer(torch.nn.Linear):
    eps = 1.0


def layer_with_method():
    layer = held(None)
    layer.held = types.MethodType(lambda self, x: x * self.factor, Processor(factor=1.0))
    return layer


def layer_pointing_at(child):
    parent = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.ReLU())
    parent.held = [parent[child]]
    return parent


CHANGES = {  # how the layer is made, what changes, and the branch of the fingerprint that sees it
    "renamed key": (lambda: held({"one": 1.0}), lambda layer: renamed(layer.held), "_mapping"),
    "renamed attribute": (lambda: held(1.0), lambda layer: renamed(vars(layer)), "_mapping"),
    "renamed parameter": (lambda: held(1.0), lambda layer: renamed(layer._parameters), "_mapping"),
    "value": (lambda: held({"one": 1.0}), lambda layer: layer.held.update(one=2.0), "_mapping"),
    "item": (lambda: held([1.0]), lambda layer: layer.held.__setitem__(0, 2.0), "_open"),
    "entry moved": (lambda: held([[1.0], []]), lambda layer: layer.held[1].append(layer.held[0].pop()), "_open"),
    "strides": (lambda: held(None), transposed, "_where"),
    "size": (lambda: held(None), resized, "_where"),
    "dtype": (
        lambda: held(None).half(),
        lambda layer: setattr(layer.weight, "data", layer.weight.data.view(torch.bfloat16)),
        "_where",
    ),
    "value on a parameter": (noted, lambda layer: setattr(layer.weight, "factor", 2.0), "_mapping"),
    "value put on a parameter": (
        lambda: held(None),
        lambda layer: setattr(layer.weight, "factor", 2.0),
        "_mapping",
    ),
    "value on a parameter of a subclass": (wrapped, lambda layer: setattr(layer.weight, "factor", 2.0), "_mapping"),
    "training": (lambda: held(None), lambda layer: layer.eval(), "_mapping"),
    "address in a subclass": (wrapped, lambda layer: setattr(layer.weight, "b", torch.ones(2, 2)), "_where"),
    "strides in a subclass": (
        wrapped,
        lambda layer: setattr(layer.weight.b, "data", layer.weight.b.data.t()),
        "_where",
    ),
    "scalar of a processor": (
        lambda: held(Processor(factor=1.0)),
        lambda layer: setattr(layer.held, "factor", 2.0),
        "_object",
    ),
    "scalar of its class": (
        lambda: held(Processor()),
        lambda layer: setattr(Processor, "scale", 2.0),
        "_classes",
    ),
    "function of its class": (
        lambda: held(Processor()),
        lambda layer: setattr(Processor, "__call__", lambda self, x: x),
        "_classes",
    ),
    "scalar of a module's class": (
        lambda: Layer(2, 2),
        lambda layer: setattr(Layer, "eps", 2.0),
        "_classes",
    ),
    "slot beside a dictionary": (
        lambda: held(Slotted()),
        lambda layer: setattr(layer.held, "factor", 2.0),
        "_slotted",
    ),
    "module of a processor": (
        lambda: held(Processor(proj=torch.nn.Linear(2, 2))),
        lambda layer: setattr(layer.held, "proj", torch.nn.Linear(2, 2)),
        "_object",
    ),
    "address in a module of a processor": (
        lambda: held(Processor(proj=torch.nn.Linear(2, 2))),
        lambda layer: setattr(layer.held.proj.weight, "data", torch.ones(2, 2)),
        "_object",
    ),
    "scalar of a module in a list": (
        lambda: held([torch.nn.LayerNorm(2)]),
        lambda layer: setattr(layer.held[0], "eps", 1.0),
        "_open",
    ),
    "which of its modules is meant": (
        lambda: layer_pointing_at(0),
        lambda layer: layer.held.__setitem__(0, layer[1]),
        "_refer",
    ),
    "partial": (
        lambda: held(functools.partial(F.gelu, approximate="none")),
        lambda layer: setattr(layer, "held", functools.partial(F.gelu, approximate="tanh")),
        "_slotted",
    ),
    "scalar of a method's object": (
        layer_with_method,
        lambda layer: setattr(layer.held.__self__, "factor", 2.0),
        "_slotted",
    ),
    "array": (lambda: held(np.ones(2)), lambda layer: layer.held.__setitem__(0, 5.0), "_where"),
    "function": (lambda: held(lambda x: x), lambda layer: setattr(layer, "held", lambda x: -x), "_identity"),
}


@pytest.fixture(autouse=True)
def classes_as_they_were(monkeypatch):
    for cls, name in ((Processor, "scale"), (Processor, "__call__"), (Layer, "eps")):
        monkeypatch.setattr(cls, name, vars(cls)[name])


def unread(branch, monkeypatch):
    """The fault that one branch of the fingerprint reads nothing."""
    nothing = {"_mapping": [], "_classes": [], "_slotted": [], "_where": []}.get(branch, "unread")
    original = getattr(Fingerprint, branch)

    def blind(self, value=None, *rest):
        # Only what the layer holds: without the layer itself there would be nothing to compare.
        return original(self, value, *rest) if branch == "_open" and isinstance(value, torch.nn.Module) else nothing

    def by_kind(self, value, depth):
        original(self, value, depth)
        return kind(value)

    monkeypatch.setattr(Fingerprint, branch, by_kind if branch == "_refer" else blind)


@pytest.mark.parametrize("blind", [False, True], ids=["", "planted"])
@pytest.mark.parametrize("name", CHANGES)
def test_changes_are_noticed(name, blind, monkeypatch):
    make, change, branch = CHANGES[name]
    if blind:
        unread(branch, monkeypatch)
    layer = make()
    fingerprint = Fingerprint(layer)
    before = fingerprint()
    assert fingerprint() == before
    change(layer)
    after = fingerprint()
    assert (after != before) != blind and fingerprint() == after


def test_nothing_is_kept_alive_by_a_fingerprint_that_is_gone():
    layer, other = held(None), torch.nn.Linear(3, 3)
    layer.held = (lambda module: lambda x: module(x))(other)
    key, alive = Fingerprint(layer)(), weakref.ref(other)
    del layer, other
    gc.collect()
    assert alive() is not None, "the key names a function, whose address nothing else may take meanwhile"
    del key
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("register", [register_module_forward_hook, register_module_forward_pre_hook])
def test_hooks_for_every_module_are_an_obstacle(register):
    fingerprint = Fingerprint(held(None))
    assert fingerprint.obstacle is None
    handle = register(lambda *args: None)
    try:
        fingerprint()
        assert "a forward hook for every module" in fingerprint.obstacle
    finally:
        handle.remove()
    fingerprint()
    assert fingerprint.obstacle is None


def test_hooks_of_modules_outside_the_tree_are_an_obstacle():
    outside = torch.nn.Linear(2, 2)
    outside.register_forward_hook(lambda *args: None)
    assert "a forward hook on Linear" in Fingerprint(held(Processor(proj=outside))).obstacle
