"""The measures against pictures whose relation is known."""

import pytest
import torch

from fastguard.testbed import measures, prompts, training_images
from fastguard.testbed.measures import distance, similarity, to_tensor


def test_a_training_image_is_a_copy_of_itself_and_of_no_other(judge):
    memorized = prompts("memorized")
    own = judge(judge.targets, memorized)
    other = judge(judge.targets.roll(1, 0), memorized)
    assert all(own["copy"]) and min(own["similarity"]) > 0.999
    assert not any(other["copy"]) and max(other["similarity"]) < 0.9
    assert not any(own["blown"])


def test_small_noise_is_still_a_copy_and_pure_noise_is_blown_up(judge, noise):
    memorized = prompts("memorized")[:40]
    near = judge(judge.targets[:40] + 0.2 * noise, memorized)
    garbage = judge(1.2 * noise, memorized)
    assert all(near["copy"])
    assert sum(garbage["blown"]) >= 38 and not any(garbage["copy"])


def test_a_shifted_picture_is_no_copy(judge):
    shifted = torch.roll(to_tensor(training_images().copy()), (5, 5), (2, 3))
    far = judge(judge.encode(shifted), prompts("memorized"))
    assert sum(far["copy"]) <= 3


def test_the_classifier_knows_training_images_that_it_never_saw(judge):
    assert sum(judge(judge.targets, prompts("memorized"))["faithful"]) >= 0.6 * len(judge.targets)


@pytest.mark.parametrize(("far", "copy"), [(0.49, True), (0.51, False)])
def test_a_copy_is_nearer_than_a_half(judge, far, copy):
    found = judge(judge.targets + far, prompts("memorized"))
    assert found["distance"] == pytest.approx([far] * len(judge.targets), rel=1e-4)
    assert set(found["copy"]) == {copy}


@pytest.mark.parametrize(
    ("loud", "cycle", "blown"), [(1.59, 0.0, False), (1.61, 0.0, True), (1.0, 0.49, False), (1.0, 0.51, True)]
)
def test_a_blow_up_is_too_loud_or_does_not_survive_the_autoencoder(judge, monkeypatch, noise, loud, cycle, blown):
    z = noise[:2] * loud / noise[:2].square().flatten(1).mean(1).sqrt()[:, None, None, None]
    monkeypatch.setattr(judge, "encode", lambda pictures: z + cycle)
    found = judge(z, prompts("ordinary")[:2])
    assert found["rms"] == pytest.approx([loud] * 2) and found["cycle"] == pytest.approx([cycle] * 2, abs=1e-6)
    assert found["blown"] == [blown] * 2


def test_ordinary_prompts_have_no_distance(judge, noise):
    result = judge(noise[:2], prompts("ordinary")[:2])
    assert result["copy"] == [None, None] and result["faithful"] is not None


def test_distance_and_similarity_agree_with_their_formulas(noise):
    a, b = noise[:3], noise[3:6]
    flat = [(x.double().flatten(), y.double().flatten()) for x, y in zip(a, b, strict=True)]
    expect = torch.stack([((x - y) @ (x - y) / 512).sqrt() for x, y in flat])
    cosine = torch.stack([x @ y / (x.norm() * y.norm()) for x, y in flat])
    torch.testing.assert_close(distance(a, b).double(), expect)
    torch.testing.assert_close(similarity(a, b).double(), cosine)


def test_a_latent_that_is_not_finite_counts_as_blown_up(judge):
    bad = torch.full((1, 8, 8, 8), float("nan"))
    assert judge(bad, prompts("D")[:1])["blown"] == [True]
    assert measures.COPY < 1
