"""The model card is written from what was measured, and its snippet runs."""

import json
import subprocess
import sys

import pytest

from bench.testbed import card
from fastguard import testbed


def test_the_card_is_what_its_generator_writes():
    facts = json.loads((testbed.path() / "training.json").read_text())
    assert (testbed.path() / "README.md").read_text() == card.text(facts)


@pytest.mark.slow
def test_the_card_has_a_snippet_that_runs():
    snippet = card.TEMPLATE.split("```python\n")[1].split("```")[0].format(scale=3)
    check = f"{snippet}\nassert image.size == (32, 32)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
