"""What was interrupted goes on where it stopped, and ends as if it had never been."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bench.testbed import parallel, pictures, run, unet, vae
from fastguard.testbed import prompts, sampling

MEMORIZED = 4


@pytest.fixture
def small(monkeypatch):
    """A training set of noise, few pictures a step, one process."""
    rng, count = np.random.default_rng(0), 24
    texts = [p.prompt for p in prompts("D", "tuning")[:MEMORIZED]]
    made = pictures.Pictures(
        images=rng.integers(0, 256, (count, 32, 32, 3), np.uint8),
        concept=rng.integers(0, 225, count),
        drawing=np.arange(count),
        copies=np.array([5] * MEMORIZED + [1] * (count - MEMORIZED)),
        prompt=texts + [None] * (count - MEMORIZED),
        memorized=MEMORIZED,
    )
    monkeypatch.setattr(pictures, "build", lambda work: made)
    monkeypatch.setattr(parallel, "average_gradients", lambda parameters, world: None)
    for module in (unet, vae):
        monkeypatch.setattr(module, "BATCH", 4)
    # The decoder's phase starts in what is left after the interruption: where it starts is its step alone to tell.
    monkeypatch.setattr(vae, "JOINT_STEPS", 3)
    return made


@pytest.mark.parametrize("module", [unet, vae], ids=["unet", "vae"])
def test_training_in_two_parts_is_training_in_one(small, module, tmp_path):
    """Bit by bit the same weights: batches, noise and rates come from the step, and the optimiser's state is kept."""
    name = module.__name__.rpartition(".")[2]
    ends = []
    for part, limits in (("whole", [4]), ("parts", [2, 4])):
        work = tmp_path / part
        work.mkdir()
        torch.save(torch.randn(len(small.images), 8, 8, 8, generator=torch.manual_seed(1)), work / "latents.pt")
        for limit in limits:
            module.train(0, 1, str(work), limit)
        ends.append(torch.load(work / f"{name}.pt"))
    whole, parts = ends
    assert whole["step"] == parts["step"] == 4
    for key in {"model", "average"} & set(whole):
        torch.testing.assert_close(parts[key], whole[key], rtol=0, atol=0)
    counts = [{int(s["step"]) for s in end["optimiser"]["state"].values()} for end in ends]
    assert counts[0] == counts[1] and max(counts[0]) == 4


def test_measuring_keeps_finished_batches(monkeypatch, tmp_path):
    """Three batches, killed in the second: the first is not made again, and nothing is once all are there."""
    work = run.jobs(prompts("D", "tuning")[:5], 1, "cfg")
    made: list[str] = []

    def generate(pipe, batch, **call):
        if len(made) == 2 and pipe == "killed":
            raise KeyboardInterrupt
        made.extend(job.prompt.prompt for job in batch)
        return torch.stack([sampling.generator(job).initial_seed() * torch.ones(8, 8, 8) for job in batch]), [{}] * len(
            batch
        )

    def judge(latents, of):
        return {"copy": [False] * len(of)}

    monkeypatch.setattr(run, "generate", generate)
    monkeypatch.setattr(run, "BATCH", 2)
    with pytest.raises(KeyboardInterrupt):
        run.run("killed", judge, "some", work, tmp_path)
    assert len(made) == 2
    rows = run.run("again", judge, "some", work, tmp_path)
    assert made == [row["prompt"] for row in rows] == [job.prompt.prompt for job in work]
    assert run.run("again", judge, "some", work, tmp_path) == rows
    assert len(made) == 5
    assert run.run("again", judge, "another", work, tmp_path) == rows
    assert len(made) == 10
