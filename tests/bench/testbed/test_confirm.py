"""The confirmation draws what no other measurement has drawn."""

from __future__ import annotations

import pytest

from bench.testbed import confirm
from bench.testbed.run import jobs
from fastguard import testbed


def test_the_phrases_are_new_and_the_concepts_those_of_the_test_half():
    new = confirm.other_phrases()
    test_half = testbed.prompts("ordinary", "test")
    assert not {p.prompt for p in new} & {p.prompt for p in testbed.prompts()}
    assert {p.concept for p in new} == {p.concept for p in test_half}
    assert len({p.prompt for p in new}) == len(new) == 11 * len(test_half)


def test_the_folder_is_there_before_anything_is_measured(monkeypatch, tmp_path):
    class Measuring(Exception):
        pass

    def load():
        raise Measuring(out.is_dir())

    out = tmp_path / "new" / "dir"
    monkeypatch.setattr(confirm, "load", load)
    with pytest.raises(Measuring, match="True"):
        confirm.confirm(out, tmp_path)


def test_the_seeds_are_new():
    chosen = testbed.prompts("D", "test")[:3]
    new = confirm.fresh(chosen, 2, None)
    assert [job.seed for job in new[:2]] == [1000, 1001]
    assert not {job.seed for job in new} & {job.seed for job in jobs(chosen, 100)}


def test_intervals_are_over_concepts():
    work = confirm.fresh(confirm.other_phrases()[:12], 1, None)
    rows = confirm.by_concept([{"prompt": job.prompt.prompt} for job in work], work)
    assert len({row["prompt"] for row in rows}) == 2
