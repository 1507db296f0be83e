"""What is made is what the pipeline's own call makes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastguard
from fastguard.batch.local import LocalRunner
from fastguard.batch.options import JobOptions
from fastguard.batch.planning import plan, shape
from fastguard.batch.prompt_files import load
from fastguard.policies.presets import policy
from tests import pipelines

SETTINGS = {"model": "tiny", "dtype": "float32", "scheduler": None}


def requests(*rows, **defaults):
    return load(rows, JobOptions(**{"policy": policy("cfg"), "steps": 3, **defaults}))[0]


def started(pipe) -> LocalRunner:
    runner = LocalRunner(lambda: pipe, SETTINGS, JobOptions())
    runner.start()
    return runner


def made(pipe, batch):
    found = started(pipe).make(batch)
    return [one.image for one in found], [one.record for one in found]


def pixels(images) -> np.ndarray:
    return np.stack([np.asarray(image).astype(int) for image in images])


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3"])
def test_images_are_the_pipelines_own(family):
    """Against the pipeline's own call on the same list, guarded and stock."""
    pipe = getattr(pipelines, family)()
    batch = requests("a red cat", "two dogs", "a red cat", negative_prompt="ugly", seed=4, guidance_scale=3.0)
    batch[2] = requests("x", "x", {"prompt": "a red cat", "seed": 9}, negative_prompt="ugly", guidance_scale=3.0)[2]
    runner = started(pipe)
    images = [one.image for one in runner.make(batch)]

    def own():
        return pipe(
            ["a red cat", "two dogs", "a red cat"],
            negative_prompt=["ugly"] * 3,
            generator=pipelines.generators([4, 4, 9]),
            num_inference_steps=3,
            guidance_scale=3.0,
        ).images

    assert np.array_equal(pixels(images), pixels(own()))
    runner.close()
    assert "_fastguard_guard" not in pipe.__dict__
    assert np.abs(pixels(images) - pixels(own())).max() <= 1


def test_sdxl_without_negative_prompt():
    """Some models take zeros for no negative prompt, and text for an empty one."""
    pipe = pipelines.sdxl()
    pipe.register_to_config(force_zeros_for_empty_prompt=True)
    both = requests("a cat", {"prompt": "a cat", "negative_prompt": "ugly"}, guidance_scale=5.0)
    images = [one.image for batch in plan(both, 8) for one in started(pipe).make(batch)]
    for image, negative in zip(images, (None, "ugly"), strict=True):
        stock = pipe(
            "a cat", negative_prompt=negative, num_inference_steps=3, generator=torch.Generator().manual_seed(0)
        )
        assert np.abs(pixels([image]) - pixels(stock.images)).max() <= 1


def test_rows_of_different_seed_scale_and_policy_share_a_call(pipe):
    rows = [
        {"prompt": "a cat", "seed": 1, "guidance_scale": 2.0, "policy": "stp"},
        {"prompt": "a dog", "seed": 2, "guidance_scale": 6.0, "policy": "og+dtp"},
        {"prompt": "a cat", "seed": 3, "policy": "cfg"},
        {"prompt": "a cow", "seed": 4, "policy": policy("dtp", guidance_scale=(5.0, 3.0, 2.0), gate=1e-6)},
    ]
    batch = requests(*rows)
    images, records = made(pipe, batch)
    for request, image, record in zip(batch, images, records, strict=True):
        with fastguard.enable(pipe, request.policy) as guard:
            alone = pipe(
                request.prompt, num_inference_steps=3, generator=torch.Generator().manual_seed(request.seed)
            ).images
            assert np.abs(pixels([image]) - pixels(alone)).max() <= 1
            assert guard.report[0].transition_step == record["transition_step"]
            if request.policy.gate:
                np.testing.assert_allclose(record["d_curve"], guard.report[0].d_curve, rtol=1e-4)
    assert [r["guidance_scale"] for r in records[:3]] == [2.0, 6.0, 7.5]
    assert [r["policy"] for r in records] == ["stp", "og+dtp", "cfg", "dtp"]
    assert records[3]["gate"]["caught"] is True


def test_without_guidance_one_branch_runs(pipe):
    batch = requests("a cat", "a dog", guidance_scale=1.0)
    images, records = made(pipe, batch)
    stock = pipe(
        ["a cat", "a dog"], guidance_scale=1.0, num_inference_steps=3, generator=pipelines.generators([0, 0])
    ).images
    assert np.abs(pixels(images) - pixels(stock)).max() <= 1
    assert records[0]["denoiser_rows"] == 3


def test_safety_checker_is_asked(pipe, monkeypatch):
    def check(image, device, dtype):
        return image * 0.5, [True, False]

    monkeypatch.setattr(pipe, "run_safety_checker", check, raising=False)
    batch = requests("a cat", "a dog")
    images, _ = made(pipe, batch)
    stock = pipe(["a cat", "a dog"], num_inference_steps=3, generator=pipelines.generators([0, 0])).images
    assert np.abs(pixels(images) - pixels(stock)).max() <= 1


def test_disabled_guard(pipe, monkeypatch):
    """Stock images, each with its scale; their records have no report."""
    monkeypatch.setenv("FASTGUARD_DISABLE", "1")
    every = requests("a cat", {"prompt": "a dog", "guidance_scale": 3.0}, {"prompt": "a cow", "guidance_scale": 3.0})
    batches = plan(every, 8)
    assert [len(batch) for batch in batches] == [1, 2]
    images, records = made(pipe, batches[1])
    stock = pipe(
        ["a dog", "a cow"], guidance_scale=3.0, num_inference_steps=3, generator=pipelines.generators([0, 0])
    ).images
    assert np.abs(pixels(images) - pixels(stock)).max() <= 1
    assert records[0]["d_curve"] is None


def test_guard_of_the_caller_comes_back(pipe):
    guard = fastguard.enable(pipe, "dtp", gate=0.3)
    runner = started(pipe)
    runner.guard.policy = policy("cfg")
    runner.close()
    assert pipe.__dict__["_fastguard_guard"] is guard
    assert guard.policy == policy("dtp", gate=0.3)


# planning --------------------------------------------------------------------------------------------------------------


def test_batches_are_full_and_of_one_shape():
    rows = [{"prompt": "a", "width": 64 if i % 3 else None, "steps": 4 + i % 2} for i in range(60)]
    batches = plan(requests(*rows), 8)
    assert all(len({shape(r) for r in batch}) == 1 for batch in batches)
    sizes = [len(batch) for batch in batches]
    assert sorted(sizes, reverse=True) == [8, 8, 8, 8, 8, 8, 4, 4, 2, 2]


def test_what_is_left_is_put_together_and_whole_batches_stay():
    every = requests(*(f"cat {i}" for i in range(40)))
    first = plan(every, 8)
    done = {r.id for r in [*first[0][:5], *first[2][2:], *first[3]]}
    again = plan(every, 8, done)
    assert again == [[*first[0][5:], *first[2][:2]], first[1], first[4]]
