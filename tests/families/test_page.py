"""docs/pipelines.md and loops.json are what their commands write; an entry called tested has an instance here."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import diffusers
import pytest

from bench.pipelines_page import READ, hashes, markdown
from fastguard.pipelines.families import FAMILIES, OWN_FAMILIES, REASONS
from tests.families.every import EVERY
from tests.families.tiny_guiders import CASES as GUIDED

ROOT = Path(__file__).parents[2]


def test_the_page_is_what_the_command_writes():
    assert (ROOT / "docs" / "pipelines.md").read_text() == markdown()


def test_every_class_stands_in_one_place():
    names = [name for family in (*FAMILIES, *OWN_FAMILIES) for name in family.pipelines] + list(REASONS)
    assert len(names) == len(set(names))
    assert [name for name in names if not hasattr(diffusers, name)] == []


@pytest.mark.slow
def test_a_class_is_called_read_where_no_instance_of_it_runs():
    made = {type(tiny.make()).__name__ for tiny in (*EVERY.values(), *GUIDED.values())}
    assert {name for family in OWN_FAMILIES for name in family.pipelines} - made == READ


def test_a_family_rescales_where_its_call_has_that_argument():
    declared = {
        name: "guidance_rescale" in (family.nonlinear or "") for family in OWN_FAMILIES for name in family.pipelines
    }
    found = {
        name: "guidance_rescale" in inspect.signature(getattr(diffusers, name).__call__).parameters for name in declared
    }
    assert declared == found


def test_loops_are_those_of_the_installed_diffusers():
    known = json.loads((ROOT / "fastguard" / "pipelines" / "families" / "loops.json").read_text())
    if known["diffusers"] == diffusers.__version__:
        assert known["loops"] == hashes()
