"""Pipelines that combine their branches themselves wait for the device where stock waits, and nowhere else."""

from __future__ import annotations

import pytest

import fastguard
from fastguard.syncs.stream import TO_DEVICE
from tests.families.tiny import CASES


def lines(pipe, arguments):
    report = fastguard.find_syncs(pipe, steps=3, technique="labelled", **arguments)
    assert report.broke_off is None
    return sorted((op.sync, op.code) for op in report.ops)


@pytest.mark.parametrize("name", ["flux", "qwen", "wan"])
@pytest.mark.parametrize("policy", ["cfg", "og+dtp", "stp"])
def test_the_same_waits_as_stock(name, policy):
    case = CASES[name]
    pipe, arguments = case.make(), case.guided()
    stock = lines(pipe, arguments)
    gate = {} if policy == "cfg" else {"gate": 0.02}
    with fastguard.enable(pipe, policy, **gate):
        assert lines(pipe, arguments) == stock


def test_a_scale_that_changes_with_the_network_is_brought_to_the_device_once():
    case = CASES["wan 2.2"]
    pipe, arguments = case.make(), case.guided()
    stock = lines(pipe, arguments)
    with fastguard.enable(pipe, "og+dtp", gate=0.02):
        more = list(lines(pipe, arguments))
    for one in stock:
        more.remove(one)
    assert [kind for kind, _ in more] == [TO_DEVICE] * 2, "guidance and rules, at the boundary"


def test_a_planted_wait_is_found(monkeypatch):
    from fastguard.loop.guide import Guide

    call = Guide.__call__

    def waiting(self, uncond, *args, **kwargs):
        assert uncond.sum().item() != 1.0
        return call(self, uncond, *args, **kwargs)

    case = CASES["flux"]
    pipe, arguments = case.make(), case.guided()
    stock = lines(pipe, arguments)
    monkeypatch.setattr(Guide, "__call__", waiting)
    with fastguard.enable(pipe, "og+dtp", gate=0.02):
        assert len(lines(pipe, arguments)) > len(stock)
