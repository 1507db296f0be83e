"""What the public sets look like is read; everything malformed is refused, with its line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from bench.paper import inputs
from bench.paper.inputs import BadInput

GOOD = '{"caption": "a wolf", "index": 7, "url": "http://example.org/7"}'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    out = tmp_path / "train"
    for name in ("7.png", "007_1.jpg", "8_0.png", "8_1.png", "b/x.webp", "b/y.bmp", "unused.png", "notes.txt"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("txt"):
            (out / name).write_text("no image")
        else:
            Image.new("RGB", (4, 4)).save(out / name)
    return out


def read(folder: Path, text: str | bytes) -> list[inputs.Item]:
    path = folder.parent / "prompts.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return inputs.memorized(path, folder, inputs.image_files(folder, "train-images"))


def test_several_training_images_a_prompt(folder: Path) -> None:
    lines = [GOOD, '{"caption": "two", "index": "08"}', '{"caption": "a folder", "index": "b", "more": 1}']
    found, files = read(folder, "\ufeff" + "\r\n".join(lines) + "\n"), inputs.image_files(folder, "train-images")
    named = [[files[place].relative_to(folder).as_posix() for place in item.training] for item in found]
    assert named == [["007_1.jpg", "7.png"], ["8_0.png", "8_1.png"], ["b/x.webp", "b/y.bmp"]]
    assert [(item.id, item.prompt) for item in found] == [("7", "a wolf"), ("8", "two"), ("b", "a folder")]
    assert len(files) == 7  # the unused one belongs to the training set all the same


BAD = {
    "": "the file is empty",
    "\n\n": "the file is empty",
    GOOD + "\n\n" + GOOD.replace("7", "8"): "line 2: is empty",
    GOOD + "\n{": "line 2: not valid JSON",
    "[1]": "line 1: is a JSON list",
    "3": "line 1: is a JSON int",
    '{"index": 7}': "line 1: must have exactly one of the fields caption",
    '{"caption": "a"}': "line 1: has no field 'index'",
    '{"caption": " ", "index": 7}': "line 1: caption=' ': must be text",
    '{"caption": 3, "index": 7}': "line 1: caption=3: must be text",
    '{"caption": "\\ud800", "index": 7}': "line 1: caption: is not UTF-8",
    '{"caption": "a", "index": true}': "line 1: index=True: must be a whole number or text",
    '{"caption": "a", "index": 7.5}': "line 1: index=7.5: must be a whole number or text",
    '{"caption": "a", "index": null}': "line 1: index=None",
    '{"caption": "a", "index": "../7"}': "must not contain a slash",
    '{"caption": "a", "index": 9}': "line 1: index='9': no training image",
    '{"caption": "a", "caption": "b", "index": 7}': "line 1: field 'caption' is given twice",
    GOOD + "\n" + GOOD.replace("7,", '"07",'): "line 2: index='7': is that of line 1 too",
    "[" * 100_000: "line 1: not valid JSON",
    b"\xff\xfe": "is not UTF-8 text",
}


@pytest.mark.parametrize(("text", "message"), BAD.items(), ids=[str(i) for i in range(len(BAD))])
def test_malformed_prompts(folder: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(BadInput) as error:
        read(folder, text)
    assert message in str(error.value) and "nothing was done" in str(error.value)


def test_every_bad_line_is_listed(folder: Path) -> None:
    with pytest.raises(BadInput) as error:
        read(folder, "\n".join([GOOD, "{", '{"caption": "a", "index": 99}']))
    assert "2 problems" in str(error.value) and "line 2" in str(error.value) and "line 3" in str(error.value)


def test_training_folders(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such directory"):
        inputs.image_files(tmp_path / "missing", "train-images")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="no image in it"):
        inputs.image_files(tmp_path / "empty", "train-images")
    (folder / "broken.png").write_bytes((folder / "7.png").read_bytes()[:20])
    with pytest.raises(BadInput, match=r"broken\.png: cannot be read"):
        inputs.readable(inputs.image_files(folder, "train-images"), folder, "train-images")


def test_images_that_are_cut_off_are_all_listed(tmp_path: Path) -> None:
    names = [f"cut{ending}" for ending in inputs.ENDINGS]
    noise = Image.effect_noise((64, 64), 50).convert("RGB")
    for name in names:
        noise.save(tmp_path / f"whole-{name}")
        data = (tmp_path / f"whole-{name}").read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(BadInput, match=rf"{len(names)} problems") as error:
        inputs.readable(inputs.image_files(tmp_path, "train-images"), tmp_path, "train-images")
    assert all(f"\n  {name}: cannot be read" in str(error.value) for name in names)


def test_missing_prompt_file(folder: Path) -> None:
    with pytest.raises(BadInput, match="No such file"):
        inputs.memorized(folder / "no.jsonl", folder, inputs.image_files(folder, "train-images"))


def test_ordinary_prompts(tmp_path: Path) -> None:
    path = tmp_path / "ordinary.jsonl"
    path.write_text('{"caption": "a"}\n{"prompt": "b"}\n')
    assert [(i.id, i.prompt, i.training) for i in inputs.ordinary(path)] == [("line 1", "a", ()), ("line 2", "b", ())]
    path.write_text('{"caption": "a"}\n' + json.dumps({"caption": "a", "prompt": "b"}) + "\n")
    with pytest.raises(BadInput, match="line 2: must have exactly one"):
        inputs.ordinary(path)
