"""The prompts: fixed, disjoint, licensed."""

import json

from bench.testbed import data, split
from fastguard.testbed import concepts, path, prompts


def test_committed_file_is_what_the_seed_gives():
    assert json.loads((path().parent / "prompts.json").read_text()) == split.make()


def test_halves_and_kinds_share_no_concept():
    groups = [
        {p.concept for p in prompts(kind, half)} for kind in ("D", "T", "ordinary") for half in ("tuning", "test")
    ]
    assert sum(map(len, groups)) == len(set.union(*groups)) == len(prompts()) == 225


def test_sizes_that_the_evaluation_needs():
    assert len(prompts("D", "test")) == 28
    assert len(prompts("memorized", "test")) == 30
    assert len(prompts("ordinary", "test")) == 100


def test_d_captions_are_shared_and_t_captions_are_not():
    shared = {t.format(x=c) for c in concepts() for t in split.TEMPLATES}
    assert all(p.prompt in shared for p in prompts("D"))
    assert not any(p.prompt in shared for p in prompts("T"))


def test_every_set_of_drawings_has_a_licence_without_attribution_duty():
    assert {source["licence"] for source in data.sources()} <= {"MIT", "Apache-2.0"}
    assert all(source["version"] and source["author"] for source in data.sources())


def test_augmentation_depends_on_its_seed_alone():
    drawing = data.np.random.default_rng(0).integers(0, 256, (64, 64, 4)).astype("uint8")
    first, again, other = (data.augment(drawing, (1, 2, k)) for k in (0, 0, 1))
    assert (first == again).all() and (first != other).any()
    assert first.shape == (32, 32, 3)
