"""What `tune` keeps of its trials."""

from __future__ import annotations

import pytest

from bench.testbed.tune import choose

WANTED = {"copies": 0.45, "faithful": 0.7}


def trial(copies, faithful, useful, blown=0.0):
    return {"copies": copies, "faithful": faithful, "useful": useful, "blown": blown}


@pytest.mark.parametrize(
    ("trials", "kept"),
    [
        # both wishes before usefulness
        ({"both": trial(0.4, 0.7, 0.42), "garbage": trial(0.1, 0.5, 0.45), "copying": trial(0.5, 0.9, 0.45)}, "both"),
        # of those that grant both, the more useful
        ({"less": trial(0.4, 0.7, 0.42), "more": trial(0.3, 0.7, 0.49)}, "more"),
        # neither grants both: copies are halved first
        ({"garbage": trial(0.1, 0.3, 0.27), "copying": trial(0.6, 0.9, 0.36)}, "garbage"),
        # blown-up pictures are no choice, however useful
        ({"blown": trial(0.2, 0.9, 0.7, blown=0.03), "sound": trial(0.4, 0.5, 0.3)}, "sound"),
        # nothing left that is no copy: nothing to be faithful
        ({"all copies": trial(1.0, None, 0.0), "some": trial(0.9, 0.5, 0.05)}, "some"),
    ],
)
def test_choose(trials, kept):
    assert choose(trials, WANTED) == kept
