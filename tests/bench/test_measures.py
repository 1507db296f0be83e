"""The embedded model's measures, the training set's key, and the numbers that others published."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bench.metrics import Sscd
from bench.paper.inputs import Item, TrainingSet, image_files, of_folder, of_testbed
from bench.paper.measures import Embedded, training_descriptors
from bench.paper.published import ROWS
from fastguard import testbed


@torch.no_grad()
def test_similarities_of_the_embedded_model_are_to_its_own_and_to_the_most_similar_image(pipe: Any) -> None:
    prompts = testbed.prompts("memorized", "test")[:3]
    items = [Item("memorized", p.prompt, p.prompt, p.kind, (p.index,), p) for p in prompts]
    shown = torch.tensor(testbed.training_images()).permute(0, 3, 1, 2) / 127.5 - 1
    targets = pipe.vae.encode(shown).latents
    torch.manual_seed(0)
    near = [prompts[0].index, (prompts[1].index + 1) % len(targets), prompts[2].index]  # the second is another's image
    z = targets[near] + 0.5 * torch.randn(3, *targets.shape[1:])
    every = [
        [float(a @ b / np.sqrt(a @ a) / np.sqrt(b @ b)) for b in targets.flatten(1).double().numpy()]
        for a in z.flatten(1).double().numpy()
    ]
    found = Embedded(pipe)([], z, items)
    assert found["similarity_set"] == pytest.approx([max(row) for row in every], abs=1e-5)
    own = [row[p.index] for row, p in zip(every, prompts, strict=True)]
    assert found["similarity"] == pytest.approx(own, abs=1e-5)
    assert found["similarity"][1] < found["similarity_set"][1] - 0.1 and found["copy"][1] is False


@torch.no_grad()
def test_how_similar_different_training_pictures_are(pipe: Any) -> None:
    """What docs/paper.md says: a mean similarity below this protects no better."""
    shown = torch.tensor(testbed.training_images()).permute(0, 3, 1, 2) / 127.5 - 1
    z = torch.nn.functional.normalize(pipe.vae.encode(shown).latents.flatten(1), dim=1)
    others = (z @ z.T)[~torch.eye(len(z), dtype=torch.bool)].numpy()
    assert [others.mean(), *np.percentile(others, [5, 95])] == pytest.approx([0.11, -0.18, 0.40], abs=0.005)


def test_the_embedded_measures_leave_the_pipelines_autoencoder_as_it_is(pipe: Any) -> None:
    """Theirs is a float32 copy on the CPU, wherever the pipeline is."""
    vae = copy.deepcopy(pipe.vae).half()
    Embedded(SimpleNamespace(vae=vae))
    assert vae.dtype == torch.float16


def colours(folder: Path, **images: str) -> TrainingSet:
    folder.mkdir()
    for name, colour in images.items():
        Image.new("RGB", (4, 4), colour).save(folder / f"{name}.png")
    return of_folder(folder, image_files(folder, "train-images"))


def test_the_key_of_a_training_set_is_its_contents(tmp_path: Path) -> None:
    known = colours(tmp_path / "a", x="red", y="blue").key
    assert colours(tmp_path / "b", x="red", y="blue").key == known
    others = [
        colours(tmp_path / "c", x="red", y="green").key,
        colours(tmp_path / "d", x="red", z="blue").key,
        colours(tmp_path / "e", x="red").key,
        of_testbed().key,
    ]
    assert len({known, *others}) == 5 and all(len(key) == 64 for key in (known, *others))


def test_kept_descriptors_are_of_these_images_and_this_network(tmp_path: Path) -> None:
    def mean(name: str, factor: int) -> Sscd:
        return Sscd(name, lambda some: np.stack([np.asarray(x, float).mean((0, 1)) + factor for x in some]))

    red, blue = colours(tmp_path / "red", x="red"), colours(tmp_path / "blue", x="blue")
    one, two = mean("one", 0), mean("two", 255)
    for _ in range(2):
        np.testing.assert_allclose(training_descriptors(one, red, tmp_path), [[1, 0, 0]])
        np.testing.assert_allclose(training_descriptors(one, blue, tmp_path), [[0, 0, 1]])
        np.testing.assert_allclose(training_descriptors(two, red, tmp_path), [np.array([2, 1, 1]) / 6**0.5])
    assert len(list(tmp_path.glob("training-*.npy"))) == 3


@pytest.mark.parametrize(
    ("setting", "method", "similarity", "clip", "fid"),
    [  # as the paper prints them, not read from the module
        ("S1", "none", 0.6504, 0.3027, 16.84),
        ("S1", "Wen", 0.3853, 0.2895, 16.72),
        ("S1", "STP", 0.2857, 0.2976, 19.85),
        ("S1", "OG+STP", 0.3811, 0.3020, 15.67),
        ("S3", "none", 0.7977, 0.3105, 106.49),
        ("S3", "Wen, target 1", 0.6038, 0.3050, 136.34),
        ("S3", "DTP", 0.5885, 0.3020, 138.92),
        ("S3", "OG+DTP", 0.6915, 0.2910, 140.05),
        ("S2", "none", 0.3702, None, 43.35),
        ("S2", "guidance from 600", 0.2756, None, 45.73),
    ],
)
def test_published_numbers(setting: str, method: str, similarity: float, clip: float | None, fid: float) -> None:
    (row,) = [row for row in ROWS if row[:2] == (setting, method)]
    assert row[3:] == (similarity, clip, fid)
