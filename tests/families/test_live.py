"""A scale that a callback changes in the middle of a call is followed where the loop reads it again, and there alone."""

from __future__ import annotations

import dataclasses

import pytest

from fastguard.pipelines import probe as probes
from fastguard.pipelines.families import find
from tests.families.every import EVERY, PARAMS


class _Changing(probes._Probing):
    def step(self, *args, **kwargs):
        result = super().step(*args, **kwargs)
        setattr(self.stand_in, f"_{self.family.scale}", 2.5)
        return result


@pytest.mark.parametrize("name", PARAMS)
def test_a_changed_scale_is_declared_as_the_loop_reads_it(name, monkeypatch):
    monkeypatch.setattr(probes, "_Probing", _Changing)
    tiny, pipe = EVERY[name], EVERY[name].make()
    found = probes.probe(pipe, tiny.guided(num_inference_steps=tiny.steps), find(type(pipe)))
    assert found.contradictions() == [] and len(found.rows) == tiny.steps


@pytest.mark.parametrize("name", ["adapter", "depth"])
def test_a_wrong_declaration_is_told(name, monkeypatch):
    monkeypatch.setattr(probes, "_Probing", _Changing)
    tiny, pipe = EVERY[name], EVERY[name].make()
    wrong = dataclasses.replace(find(type(pipe)), live=not find(type(pipe)).live)
    (first, *_) = probes.probe(pipe, tiny.guided(num_inference_steps=tiny.steps), wrong).contradictions()
    assert first.startswith("row 1")
