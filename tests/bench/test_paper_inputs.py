"""What `python -m bench paper` reads, and refuses before it does anything."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.paper import command
from bench.paper.inputs import Item, limited
from tests.bench.own_model import call


def test_a_dry_run_reads_everything_and_writes_nothing(given: Path, done: Path, tmp_path: Path) -> None:
    result = call(given, tmp_path / "new", flags=("--dry-run",))
    assert result.exit_code == 0, result.output
    said = (
        "2 memorized and 3 ordinary prompts, 3 training images",
        "ren: 11 images, at most 6 rows",
        "in all 64 images, at most 424",
    )
    assert all(part in result.output for part in said), result.output
    assert not (tmp_path / "new").exists()
    before = {path: path.read_bytes() for path in done.rglob("*") if path.is_file()}
    result = call(given, done, flags=("--dry-run",), steps=4)
    assert result.exit_code == 2 and "steps: 3 there, 4 now" in result.output
    assert {path: path.read_bytes() for path in done.rglob("*") if path.is_file()} == before


def test_what_is_wrong_in_several_files_is_said_at_once(given: Path, tmp_path: Path) -> None:
    shutil.copytree(given / "train", tmp_path / "train")
    (tmp_path / "train/9.png").write_bytes(b"no picture")
    (tmp_path / "prompts.jsonl").write_text('{"caption": "a", "index": 1}\n{"caption": "b", "index": 7}\nno object\n')
    (tmp_path / "ordinary.jsonl").write_text('{"caption": 3}\n')
    files = {"prompts": tmp_path / "prompts.jsonl", "ordinary": tmp_path / "ordinary.jsonl"}
    more = {"train_images": tmp_path / "train", "sscd": "missing.pt", "model": "./missing"}
    result = call(given, tmp_path / "out", flags=("--dry-run",), **files, **more)
    assert result.exit_code == 2 and not (tmp_path / "out").exists()
    for part in (
        "  9.png: cannot be read as an image",
        "  line 2: index='7': no training image 7.*",
        "  line 3: not valid JSON",
        "  line 1: caption=3: must be text",
        "no TorchScript file",
        "no such directory",
    ):
        assert result.output.count(part) == 1, result.output


def test_a_limit_keeps_that_many_of_each_group(given: Path, tmp_path: Path) -> None:
    result = call(given, tmp_path / "out", flags=("--dry-run",), limit=1)
    assert "1 memorized and 1 ordinary prompts" in result.output
    items = [Item("memorized", str(k), "", "") for k in range(10)] + [Item("ordinary", "o", "", "")]
    assert [item.id for item in limited(items, 3)] == ["0", "3", "6", "o"] and limited(items, None) == items


def test_the_networks_are_asked_for_on_the_runs_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torchscript_sscd", "onnx_sscd", "Clip", "Fid"):
        monkeypatch.setattr(command, name, lambda *given, name=name: (name, *given))
    assert command.find_sscd("a.pt", "cuda:1") == ("torchscript_sscd", Path("a.pt"), "cuda:1")
    assert command.find_sscd("onnx", "cuda:1") == ("onnx_sscd", "cuda:1")
    request: Any = SimpleNamespace(clip="c", fid="f")
    assert command.find_scores(request, "cuda:1") == (("Clip", "c", "cuda:1"), ("Fid", "f", "cuda:1"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": None}, "--model and --prompts go together"),
        ({"train_images": None}, "--train-images: is needed"),
        ({"seeds": 0}, "--seeds=0: must be at least 1"),
        ({"batch_size": 0}, "--batch-size=0"),
        ({"guidance_scales": "7.5,1"}, "guidance scale 1.0: must be above 1"),
        ({"guidance_scales": "3,7.5000001"}, "guidance scales 7.5 and 7.5000001: are both 7.5 in six digits"),
        ({"guidance_scales": "a"}, "--guidance-scales='a'"),
        ({"gate": "nan"}, "--gate=nan"),
        ({"methods": "stp,nothing"}, "'nothing' is unknown; allowed are none"),
        ({"methods": "og+sp"}, "'og+sp' is unknown, did you mean 'og+stp'?"),
        ({"methods": "dtp-gated"}, "dtp-gated: needs --gate or --policy"),
        ({"methods": "embedded-policy"}, "belongs to the embedded model; pass --policy FILE"),
        ({"methods": "first-look", "detection_seeds": 0}, "first-look: needs --detection-seeds"),
        ({"lora": "missing"}, "lora='missing'"),
        ({"policy": "missing.json"}, "missing.json"),
        ({"limit": 0}, "--limit=0: must be at least 1"),
        ({"sscd": "missing.pt"}, "no TorchScript file"),
        ({"clip": "missing-folder/at/all"}, "--clip"),
        ({"prompts": "missing.jsonl"}, "prompts='missing.jsonl'"),
        ({"model": "./missing"}, "no such directory"),
        ({"real_images": "missing"}, "--real-images: is for --fid, which is not given"),
        ({"fid": "inception", "real_images": "missing"}, "real-images='missing'"),
        ({"fid": "inception", "real_images": "{given}/one"}, "--fid: 1 problem, nothing was done\n  1 image"),
    ],
)
def test_bad_arguments_leave_nothing_behind(given: Path, tmp_path: Path, changed: dict, message: str) -> None:
    changed = {name: value.format(given=given) if isinstance(value, str) else value for name, value in changed.items()}
    result = call(given, tmp_path / "out", **changed)
    assert result.exit_code == 2 and message in result.output, result.output
    assert not (tmp_path / "out").exists()
