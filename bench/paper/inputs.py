"""Prompts and training images as the public sets of memorized prompts have them. Bad input is refused before any work.

Memorized prompts: JSON lines {"caption": ..., "index": ..., "url": ...}; `index` (a whole number or text, unique) names the training
images, `url` and further fields are kept as they are and not used. The training images of index 7 in a folder DIR:

    DIR/7.png    DIR/7_0.png, DIR/7_1.png, ...    DIR/7/anything.png

(.png, .jpg, .jpeg, .webp, .bmp; leading zeros do not matter: 007.png is of index 7.) Every image below DIR belongs to the training set
that the pairing "whole set" compares with, whether a prompt names it or not.

Ordinary prompts: JSON lines with "caption" (or "prompt").
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SHOWN = 20  # problems listed in an error message


@dataclass(frozen=True)
class Item:
    """A prompt of the benchmark.

    group     "memorized" or "ordinary"
    id        unique within the group; with the seed number it decides the noise
    prompt    text
    kind      a finer group for the tables ("D", "T" on the embedded model, else the group)
    training  places of the prompt's own training images in the training set
    extra     anything that a measure needs (the embedded model's Prompt)
    """

    group: str
    id: str
    prompt: str
    kind: str
    training: tuple[int, ...] = ()
    extra: Any = None


class BadInput(ValueError):
    """Input that cannot be used; the message lists the problems with their lines."""

    def __init__(self, where: object, problems: Sequence[str]) -> None:
        shown = list(problems[:SHOWN])
        if len(problems) > SHOWN:
            shown.append(f"... and {len(problems) - SHOWN} more")
        many = f"{len(problems)} problem{'s' * (len(problems) != 1)}"
        super().__init__("\n  ".join([f"{where}: {many}, nothing was done", *shown]))

    def __reduce__(self) -> tuple[type[ValueError], tuple[str]]:
        """From one process to another as its message."""
        return ValueError, (str(self),)


class Images(Sequence[Image.Image]):
    """read(one) for one of `kept`, when it is asked for: as many open files as images would be too many."""

    def __init__(self, kept: Sequence[Any], read: Callable[[Any], Image.Image]) -> None:
        self._kept, self._read = kept, read

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self._read(one) for one in self._kept[place]]
        return self._read(self._kept[place])


class TrainingSet(Images):
    """The training images in the order of their places. `key`: a hash of their contents."""

    def __init__(self, kept: Sequence[Any], read: Callable[[Any], Image.Image], key: str) -> None:
        super().__init__(kept, read)
        self.key = key


def read_image(path: Path) -> Image.Image:
    """RGB, decoded, the file closed again."""
    with Image.open(path) as image:
        return image.convert("RGB")


def of_folder(folder: Path, files: Sequence[Path]) -> TrainingSet:
    """The images `files` of `folder`."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(folder).as_posix()}\n".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return TrainingSet(files, read_image, digest.hexdigest())


def of_testbed() -> TrainingSet:
    """The embedded model's memorized training images."""
    from fastguard import testbed

    images = testbed.training_images()
    return TrainingSet(list(images), Image.fromarray, hashlib.sha256(images.tobytes()).hexdigest())


def image_files(folder: Path, option: str) -> list[Path]:
    """Every image below `folder`, sorted by its path. BadInput, naming the option, if there is none."""
    where = f"{option}={str(folder)!r}"
    if not folder.is_dir():
        raise BadInput(where, ["no such directory"])
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in ENDINGS and p.is_file())
    if not found:
        raise BadInput(where, [f"no image in it ({', '.join(ENDINGS)})"])
    return found


def readable(files: Sequence[Path], folder: Path, option: str) -> None:
    """BadInput lists every one of `folder`'s files that cannot be read as an image."""
    problems = []
    for path in tqdm(files, desc=f"reading --{option}", unit="image", mininterval=2, delay=2, leave=False):
        try:
            read_image(path)  # Image.verify() decodes nothing: a truncated JPEG or BMP passes it
        except Exception as error:  # OSError, SyntaxError, struct.error, ...: every decoder raises its own
            problems.append(f"{path.relative_to(folder)}: cannot be read as an image ({error})")
    if problems:
        raise BadInput(f"{option}={str(folder)!r}", problems)


def real_images(folder: Path) -> Images:
    """The images that FID compares with. BadInput as for `image_files` and `readable`."""
    files = image_files(folder, "real-images")
    readable(files, folder, "real-images")
    return Images(files, read_image)


def name_of(index: Any) -> str:
    """An index as it stands in file names: without leading zeros."""
    text = str(index).strip()
    return (text.lstrip("0") or "0") if text.isdigit() else text


def by_index(folder: Path, files: Sequence[Path]) -> dict[str, list[int]]:
    """Places in `files` by the index that their names carry: INDEX.png, INDEX_N.png or INDEX/anything.png."""
    found: dict[str, list[int]] = {}
    for place, path in enumerate(files):
        parts = path.relative_to(folder).parts
        if len(parts) > 1:
            names = {name_of(parts[0])}
        else:
            names = {name_of(path.stem), name_of(re.sub(r"_\d+$", "", path.stem))}
        for name in names:
            found.setdefault(name, []).append(place)
    return found


def lines_of(path: Path, option: str) -> Iterator[tuple[int, str]]:
    """Lines with their numbers from 1. BadInput if the file cannot be read or is empty."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = "is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise BadInput(f"{option}={str(path)!r}", [str(reason)]) from None
    if not text.strip():
        raise BadInput(f"{option}={str(path)!r}", ["the file is empty"])
    yield from enumerate(text.removesuffix("\n").split("\n"), 1)


def read_object(line: str) -> dict[str, Any]:
    """A line's JSON object. ValueError that says what is wrong."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"field {name!r} is given twice")
        return dict(pairs)

    if not line.strip():
        raise ValueError("is empty")
    try:
        value = json.loads(line, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error}") from None
    except RecursionError:
        raise ValueError("not valid JSON: nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"is a JSON {type(value).__name__}: must be an object")
    return value


def caption_of(value: dict[str, Any], fields: Sequence[str] = ("caption",)) -> str:
    """The text of the one field of `fields` that is there. ValueError otherwise."""
    given = [name for name in fields if name in value]
    if len(given) != 1:
        raise ValueError(f"must have exactly one of the fields {', '.join(fields)}; has {', '.join(given) or 'none'}")
    text = value[given[0]]
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{given[0]}={text!r}: must be text that is not empty")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{given[0]}: is not UTF-8 text")
    return text


def index_of(value: dict[str, Any]) -> str:
    """The index as text. ValueError if there is none that can stand in a file name."""
    if "index" not in value:
        raise ValueError("has no field 'index'")
    index = value["index"]
    if isinstance(index, bool) or not isinstance(index, (int, str)) or not str(index).strip():
        raise ValueError(f"index={index!r}: must be a whole number or text")
    if re.search(r"[/\\\x00]", str(index)):
        raise ValueError(f"index={index!r}: must not contain a slash, a backslash or a zero byte")
    return name_of(index)


def memorized(path: Path, folder: Path, files: Sequence[Path]) -> list[Item]:
    """The memorized prompts with the places of their training images in `files`. BadInput lists every bad line."""
    named, found, problems = by_index(folder, files), [], []
    seen: dict[str, int] = {}
    for number, line in lines_of(path, "prompts"):
        try:
            value = read_object(line)
            caption, index = caption_of(value), index_of(value)
            if index in seen:
                raise ValueError(f"index={index!r}: is that of line {seen[index]} too; must be unique")
            seen[index] = number
            if index not in named:
                raise ValueError(f"index={index!r}: no training image {index}.*, {index}_N.* or {index}/* in {folder}")
            found.append(Item("memorized", index, caption, "memorized", tuple(named[index])))
        except ValueError as error:
            problems.append(f"line {number}: {error}")
    if problems:
        raise BadInput(f"prompts={str(path)!r}", problems)
    return found


def ordinary(path: Path) -> list[Item]:
    """The ordinary prompts; their ids are "line N". BadInput lists every bad line."""
    found, problems = [], []
    for number, line in lines_of(path, "ordinary"):
        try:
            found.append(
                Item("ordinary", f"line {number}", caption_of(read_object(line), ("caption", "prompt")), "ordinary")
            )
        except ValueError as error:
            problems.append(f"line {number}: {error}")
    if problems:
        raise BadInput(f"ordinary={str(path)!r}", problems)
    return found


def limited(items: Sequence[Item], limit: int | None) -> list[Item]:
    """At most `limit` items of each group, evenly spread over the group, so that its kinds stay in it."""
    if limit is None:
        return list(items)
    kept: list[Item] = []
    for group in dict.fromkeys(item.group for item in items):
        mine = [item for item in items if item.group == group]
        count = min(limit, len(mine))
        kept += [mine[k * len(mine) // count] for k in range(count)]
    return kept


def embedded() -> list[Item]:
    """The test halves of the embedded model; ids are the prompts, so that seeds are those of its own evaluation."""
    from fastguard import testbed

    return [
        Item(
            "memorized" if p.memorized else "ordinary",
            p.prompt,
            p.prompt,
            p.kind,
            () if p.index is None else (p.index,),
            p,
        )
        for p in testbed.prompts(half="test")
    ]
