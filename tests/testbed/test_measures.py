"""The measures against pictures whose relation is known."""

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
