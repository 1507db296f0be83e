"""The shipped folder: small, float16 on disk, a plain diffusers pipeline."""

import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file

from fastguard import testbed

CALL = {"num_inference_steps": 2, "output_type": "latent"}


def draw(pipe):
    return pipe("a dog", generator=torch.Generator().manual_seed(0), **CALL).images


def test_plain_from_pretrained_gives_the_same_images(pipe):
    plain = StableDiffusionPipeline.from_pretrained(testbed.path())
    plain.set_progress_bar_config(disable=True)
    assert type(pipe) is StableDiffusionPipeline
    assert {part.dtype for part in (plain.unet, plain.text_encoder, plain.vae)} == {torch.float32}
    assert torch.equal(draw(plain), draw(pipe))


def test_weights_are_float16_and_below_25_megabytes():
    files = list(testbed.path().rglob("*.safetensors"))
    assert sum(f.stat().st_size for f in files) < 25e6
    assert {v.dtype for f in files for v in load_file(f).values()} <= {torch.float16, torch.int64}


def test_training_images_are_one_per_memorized_prompt():
    images = testbed.training_images()
    assert images.shape == (len(testbed.prompts("memorized")), 32, 32, 3)
    assert all(image.std() > 10 for image in images)


def test_decoded_output_is_a_picture(pipe):
    image = pipe("a dog", num_inference_steps=2).images[0]
    assert image.size == (32, 32)


def test_the_text_encoder_has_names_that_every_transformers_knows():
    """Under others an old one fills it with random numbers, and says so in a log alone."""
    path = testbed.path() / "text_encoder" / "model.safetensors"
    with safe_open(path, "pt") as weights:
        assert all(name.startswith("text_model.") for name in weights.keys())  # noqa: SIM118 - no mapping
    first, second = (testbed.load().encode_prompt(["a dog"], "cpu", 1, True)[0] for _ in range(2))
    assert torch.equal(first, second)
