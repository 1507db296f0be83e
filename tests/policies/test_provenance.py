"""What a policy was calibrated with, against what it is used with."""

import dataclasses
import json

import pytest

from fastguard.policies.policy import Policy
from fastguard.policies.provenance import elsewhere

KNOWN = {"model": "owner/Name", "scheduler": "DDIMScheduler", "steps": 50, "dtype": "float32"}
GATED = Policy(anchored=True, gate=0.1, name="own", provenance=KNOWN)


@pytest.mark.parametrize(
    "used",
    [
        KNOWN,
        {},
        {"steps": None, "scheduler": "ddim"},
        {"model": "other/name"},  # it has moved
        {"model": "/models/name/"},
        {"model": "/models/sd15"},  # may be the same: a folder has any name
        {"model": None, "dtype": None},
    ],
)
def test_the_same_and_the_unknown_are_not_told(used):
    assert elsewhere(GATED, used) == []


@pytest.mark.parametrize(
    ("used", "said"),
    [
        ({"steps": 25}, "steps 50, not 25:"),
        ({"scheduler": "PNDM"}, "scheduler DDIMScheduler, not PNDM:"),
        ({"dtype": "float16"}, "dtype float32, not float16:"),
        ({"model": "owner/other"}, "model owner/Name, not owner/other:"),
        ({"model": "testbed"}, "model owner/Name, not testbed:"),
        ({"steps": 25, "dtype": "bfloat16"}, "steps 50, not 25 and dtype float32, not bfloat16:"),
    ],
)
def test_each_of_the_four_is_told(used, said):
    (told,) = elsewhere(GATED, {**KNOWN, **used})
    assert told.startswith("policy 'own' was calibrated with " + said)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("/a/sd15", "/b/sd15", True),
        ("/a/sd15", "/b/tuned", False),
        ("./sd15/", "C:\\models\\sd15", True),
        ("testbed", "testbed", True),
        ("testbed", "/a/testbed", False),
    ],
)
def test_folders_are_known_by_their_last_part(one, other, same):
    known = Policy(anchored=True, gate=0.1, provenance={"model": one})
    assert (elsewhere(known, {"model": other}) == []) is same


def test_what_has_no_calibrated_number_belongs_nowhere():
    assert elsewhere(Policy(anchored=True, provenance=KNOWN), {"steps": 25}) == []
    assert elsewhere(Policy(anchored=True, suspect=0.1, provenance=KNOWN), {"steps": 25})
    assert elsewhere(Policy(anchored=True, gate=0.1), {"steps": 25}) == []


def test_each_policy_of_a_list_is_told_once_by_its_name():
    other = dataclasses.replace(GATED, name="other", provenance={"steps": 10})
    here = dataclasses.replace(GATED, name="here", provenance={"steps": 25})

    def told(*policies):
        return [text.partition(":")[0] for text in elsewhere(Policy.stack(policies), {"steps": 25})]

    own = "policy 'own' was calibrated with steps 50, not 25"
    assert told(GATED, GATED) == [own]
    assert told(GATED, Policy()) == told(here, GATED) == [own]
    assert told(GATED, other, here, GATED) == [own, "policy 'other' was calibrated with steps 10, not 25"]


def test_a_list_keeps_what_each_belongs_to(tmp_path):
    pair = Policy.stack([GATED, Policy()])
    for one in (pair, Policy.load(pair.save(tmp_path / "pair.json"))):
        assert [sample.provenance for sample in one.samples(2)] == [KNOWN, {}]
    assert Policy.stack([GATED, GATED]).provenance == KNOWN
    assert Policy.stack([Policy(), Policy()]).provenance == {}
    file = tmp_path / "odd.json"
    file.write_text(json.dumps(pair.to_dict() | {"provenance": {"per_image": [KNOWN]}}))
    assert elsewhere(Policy.load(file), {"steps": 25}) == []
