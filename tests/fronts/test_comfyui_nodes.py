"""The ComfyUI nodes as ComfyUI finds them: what they patch and report, their inputs, the example workflow, the registry's metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fastguard.fronts.comfyui as pack
from fastguard.fronts.comfyui.node import GuardReport, MemorizationGuard
from fastguard.policies.policy import Policy
from fastguard.policies.presets import PRESETS, policy
from tests.fronts import comfy

FOLDER = Path(pack.__file__).parent


def test_the_nodes_patch_and_report() -> None:
    model = comfy.Patcher(comfy.Model(comfy.Discrete(), comfy.dip))
    (patched,) = MemorizationGuard().patch(model, "dtp", gate=2.6)
    assert model.model_options == {"transformer_options": {}}
    latent = {"samples": torch.zeros(1)}
    assert GuardReport().report(patched, latent)[1] == "no run yet"
    result = comfy.sample(patched, comfy.euler, comfy.SIGMAS, batch=2)
    assert torch.equal(result, comfy.sample(comfy.guarded(policy("dtp", gate=2.6)), comfy.euler, comfy.SIGMAS, batch=2))
    passed, text = GuardReport().report(patched.clone(), latent)
    assert passed is latent and "2 images, ComfyUI path" in text and "caught at row 0" in text
    with pytest.raises(ValueError, match="model: must come from the Memorization Guard node"):
        GuardReport().report(model, latent)


def test_the_node_reads_a_policy_file_and_says_that_there_is_no_gate(tmp_path: Path, caplog: Any) -> None:
    path = policy("stp", t_star=300, gate=0.5).save(tmp_path / "mine.json")
    (patched,) = MemorizationGuard().patch(comfy.Patcher(None), "dtp", gate=0.0, policy_file=str(path))
    (guard,) = patched.model_options["sampler_post_cfg_function"]
    assert guard.policy == Policy.load(path) and not caplog.text
    MemorizationGuard().patch(comfy.Patcher(None), "dtp", gate=0.0)
    assert "has no gate" in caplog.text
    (plain,) = MemorizationGuard().patch(comfy.Patcher(None), "cfg", gate=0.0)
    assert "disable_cfg1_optimization" not in plain.model_options  # plain guidance costs nothing more


@pytest.mark.parametrize("node", pack.NODE_CLASS_MAPPINGS.values())
def test_nodes_have_what_comfyui_asks_for(node: Any) -> None:
    inputs = node.INPUT_TYPES()
    names = [*inputs["required"], *inputs.get("optional", {})]
    assert callable(getattr(node, node.FUNCTION)) and isinstance(node.CATEGORY, str) and node.DESCRIPTION
    code = getattr(node, node.FUNCTION).__code__
    assert list(code.co_varnames[1 : code.co_argcount]) == names
    assert all(kind.isupper() for kind in node.RETURN_TYPES)
    assert pack.NODE_CLASS_MAPPINGS.keys() == pack.NODE_DISPLAY_NAME_MAPPINGS.keys()
    assert MemorizationGuard.INPUT_TYPES()["required"]["policy"][0] == list(PRESETS)


def test_the_workflow_fits_the_nodes() -> None:
    (path,) = (FOLDER / "example_workflows").glob("*.json")
    workflow = json.loads(path.read_text())
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for number, source, output, target, slot, kind in workflow["links"]:
        given, taken = nodes[source]["outputs"][output], nodes[target]["inputs"][slot]
        assert number in given["links"] and taken["link"] == number and kind == given["type"]
        assert taken["type"] in (kind, "*")
    assert {node["type"] for node in nodes.values()} >= pack.NODE_CLASS_MAPPINGS.keys()
    for node in nodes.values():
        if (cls := pack.NODE_CLASS_MAPPINGS.get(node["type"])) is None:
            continue
        inputs = cls.INPUT_TYPES()
        declared = {**inputs["required"], **inputs.get("optional", {})}
        widgets = [
            name for name, (kind, *_) in declared.items() if isinstance(kind, list) or kind in ("FLOAT", "STRING")
        ]
        assert len(node["widgets_values"]) == len(widgets)
        assert [(i["name"], i["type"]) for i in node["inputs"]] == [
            (n, t[0]) for n, t in declared.items() if n not in widgets
        ]
        assert [o["type"] for o in node["outputs"]] == list(cls.RETURN_TYPES)
        assert node["widgets_values"] == [declared[name][1]["default"] for name in widgets]
        MemorizationGuard().patch(comfy.Patcher(None), *node["widgets_values"]) if node["widgets_values"] else None


def test_registry_metadata() -> None:
    tomllib = pytest.importorskip("tomllib")
    metadata = tomllib.loads((FOLDER / "pyproject.toml").read_text())
    version = next(line for line in Path("setup.py").read_text().splitlines() if "version=" in line).split('"')[1]
    assert metadata["project"]["version"] == version
    assert metadata["project"]["name"] in metadata["project"]["dependencies"]
    assert metadata["tool"]["comfy"]["PublisherId"] and metadata["tool"]["comfy"]["DisplayName"]
