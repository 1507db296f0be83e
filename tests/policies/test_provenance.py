"""What a policy was calibrated with, against what it is used with."""

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
    assert elsewhere(GATED, used) is None


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
    told = elsewhere(GATED, {**KNOWN, **used})
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
    assert (elsewhere(known, {"model": other}) is None) is same


def test_what_has_no_calibrated_number_belongs_nowhere():
    assert elsewhere(Policy(anchored=True, provenance=KNOWN), {"steps": 25}) is None
    assert elsewhere(Policy(anchored=True, suspect=0.1, provenance=KNOWN), {"steps": 25})
    assert elsewhere(Policy(anchored=True, gate=0.1), {"steps": 25}) is None
    several = Policy.stack([GATED, GATED])
    assert "steps 50, not 25" in elsewhere(several, {"steps": 25})
