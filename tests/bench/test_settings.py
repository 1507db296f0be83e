"""What has to be the same for results to stand in one folder: everything that can change an image or a number."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

from bench.paper.inputs import BadInput
from bench.paper.settings import configurations, keep, weights_hash


def pipeline(**components: Any) -> Any:
    return SimpleNamespace(components=components)


def test_the_hash_is_of_every_weight() -> None:
    torch.manual_seed(0)
    unet, vae = torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(3)
    known = weights_hash(pipeline(unet=unet, vae=vae))
    same = pipeline(vae=copy.deepcopy(vae), unet=copy.deepcopy(unet), scheduler=object(), safety_checker=None)
    assert len(known) == 64 and weights_hash(same) == known
    one_bit, buffer, shape = (copy.deepcopy(module) for module in (unet, vae, unet))
    one_bit.weight.data.view(torch.int32)[1, 2] ^= 1
    buffer.running_mean[1] += 1
    shape.weight.data = shape.weight.data.reshape(3, 2)
    others = [
        pipeline(unet=one_bit, vae=vae),
        pipeline(unet=unet, vae=buffer),
        pipeline(unet=shape, vae=vae),
        pipeline(unet=copy.deepcopy(unet).double(), vae=vae),
        pipeline(unet=unet),
        pipeline(other=unet, vae=vae),
    ]
    assert len({known, *map(weights_hash, others)}) == 1 + len(others)


def test_configurations_are_told_apart_but_not_by_where_they_were_read(tmp_path: Path) -> None:
    plain = DDIMScheduler()
    plain.save_pretrained(tmp_path)
    data = json.loads((tmp_path / "scheduler_config.json").read_text())
    (tmp_path / "scheduler_config.json").write_text(json.dumps({**data, "_diffusers_version": "0.1.0"}))
    read = DDIMScheduler.from_pretrained(tmp_path)
    read.register_to_config(_name_or_path=str(tmp_path))
    vae, moved = SimpleNamespace(config={"scaling_factor": 0.18215}), SimpleNamespace(config={"scaling_factor": 0.2})
    known = configurations(pipeline(scheduler=plain, vae=vae, tokenizer=object(), safety_checker=None))
    assert set(known) == {"scheduler", "vae"}
    assert configurations(pipeline(scheduler=read, vae=vae)) == known
    for change in ({"prediction_type": "v_prediction"}, {"beta_end": 0.012}, {"trained_betas": [0.1, 0.2]}):
        other = configurations(pipeline(scheduler=DDIMScheduler(**change), vae=vae))
        assert other["scheduler"] != known["scheduler"] and other["vae"] == known["vae"]
    assert configurations(pipeline(scheduler=plain, vae=moved))["vae"] != known["vae"]


def test_the_text_encoders_configuration_without_transformers_version(pipe: Any) -> None:
    known, other = configurations(pipe), copy.deepcopy(pipe.text_encoder.config)
    other.transformers_version = "4.0.0"
    changed = configurations(pipeline(text_encoder=SimpleNamespace(config=other)))
    assert changed["text_encoder"] == known["text_encoder"]
    other.hidden_act = "gelu"
    changed = configurations(pipeline(text_encoder=SimpleNamespace(config=other)))
    assert changed["text_encoder"] != known["text_encoder"]
    assert {"scheduler", "text_encoder", "unet", "vae"} <= set(known)


def test_settings_that_lack_a_key_are_refused_with_its_name(tmp_path: Path) -> None:
    assert keep(tmp_path, {"steps": 3}, {}) is False and keep(tmp_path, {"steps": 3}, {}) is True
    with pytest.raises(BadInput, match=r"1 problem.*\n  configurations: missing there.*; \{'vae': 'a'\} now$"):
        keep(tmp_path, {"steps": 3, "configurations": {"vae": "a"}}, {})
    with pytest.raises(BadInput, match="steps: 3 there, None now"):
        keep(tmp_path, {}, {})
    assert keep(tmp_path, {"steps": 3}, {}) is True  # nothing was written
