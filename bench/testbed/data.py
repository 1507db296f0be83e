"""The drawings: fetched from npm packages, rendered once, augmented deterministically.

`sources.json` names every package with its version and licence, the embedded model's `concepts.json` maps each
caption to its code point. All seven sets draw every concept, so every caption has seven drawings.

The npm client does the downloading (its own configuration decides from where). Nothing fetched here
is shipped: the repository holds the trained weights and the memorized training images alone.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from fastguard.testbed import concepts

SIZE = 32  # pixels of a training image
RENDER = 64  # pixels of a rendered drawing before augmentation


def sources() -> list[dict]:
    """The drawing sets with package, version, licence and author."""
    return json.loads(Path(__file__).with_name("sources.json").read_text())["drawings"]


class Unavailable(RuntimeError):
    """Something outside of Python, or an extra, that fetching and rendering need."""


def fetch(source: dict, folder: Path) -> Path:
    """Download one package with `npm pack` (once); returns the path of its archive. `Unavailable` without npm or if it fails."""
    stem = source["package"].lstrip("@").replace("/", "-")
    archive = folder / f"{stem}-{source['version']}.tgz"
    if archive.exists():
        return archive
    spec = f"{source['package']}@{source['version']}"
    npm = shutil.which("npm")
    if npm is None:
        raise Unavailable(f"npm, the client of Node.js, is not on the PATH; it downloads {spec} and the other drawings")
    folder.mkdir(parents=True, exist_ok=True)
    # npm writes in place: interrupted there it would leave half an archive under the name that is trusted.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as part:
        command = [npm, "pack", spec, "--silent", "--pack-destination", part]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not (made := Path(part) / archive.name).exists():
            raise Unavailable(f"npm pack {spec} failed: {done.stderr.strip()[-500:]}")
        made.replace(archive)
    return archive


def _to_rgba(data: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(data)).convert("RGBA").resize((RENDER, RENDER), Image.LANCZOS)
    return np.asarray(image, np.uint8)


def _iconify(archive: tarfile.TarFile, wanted: dict[str, str]) -> dict[str, np.ndarray]:
    """Drawings of an iconify package (one JSON file of SVG bodies) by icon name."""
    try:
        import resvg_py  # an SVG renderer; needed by this command only
    except ImportError:
        raise Unavailable(
            "resvg-py, which draws SVG, is not installed: pip install 'diffusers-fastguard[train]'"
        ) from None

    icons = json.load(archive.extractfile("package/icons.json"))
    aliases, result = icons.get("aliases", {}), {}
    for caption, name in wanted.items():
        while name in aliases:
            name = aliases[name]["parent"]
        if (icon := icons["icons"].get(name)) is None:
            continue
        width = icon.get("width", icons.get("width", 16))
        height = icon.get("height", icons.get("height", 16))
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}">'
            f"{icon['body']}</svg>"
        )
        png = resvg_py.svg_to_bytes(svg_string=svg, width=RENDER, height=RENDER)
        result[caption] = _to_rgba(bytes(png))
    return result


def _files(archive: tarfile.TarFile, folder: str) -> dict[str, np.ndarray]:
    """Drawings of a package with one picture file per code point."""
    names, result = set(archive.getnames()), {}
    for caption, code in concepts().items():
        for stem in (code, f"{code}-fe0f"):
            for ending in ("png", "webp"):
                member = f"package/{folder}/{stem}.{ending}"
                if member in names and caption not in result:
                    result[caption] = _to_rgba(archive.extractfile(member).read())
    return result


def _icon_names(archives: dict[str, Path]) -> dict[str, dict[str, str]]:
    """Caption -> icon name, one map for Noto and one for Fluent (their older sets carry no map)."""
    result = {}
    for family, holder in (("noto", "noto"), ("fluent", "fluent-flat")):
        with tarfile.open(archives[holder]) as archive:
            chars = json.load(archive.extractfile("package/chars.json"))
        found = {c: chars.get(code) or chars.get(f"{code}-fe0f") for c, code in concepts().items()}
        result[family] = {caption: name for caption, name in found.items() if name}
    return result


def build(work: Path) -> Path:
    """Fetch and render everything; writes `drawings.npz` (rgba [N,64,64,4], concept, set)."""
    target = work / "drawings.npz"
    if target.exists():
        return target
    bar = tqdm(sources(), desc="packages", unit="set")
    archives = {source["set"]: fetch(source, work / "packages") for source in bar}
    names = _icon_names(archives)
    rgba, concept, style = [], [], []
    for source in tqdm(sources(), desc="rendering", unit="set"):
        with tarfile.open(archives[source["set"]]) as archive:
            if source["kind"] == "iconify":
                drawn = _iconify(archive, names[source["set"].split("-")[0]])
            else:
                drawn = _files(archive, source["folder"])
        for index, caption in enumerate(concepts()):
            if caption in drawn:
                rgba.append(drawn[caption])
                concept.append(index)
                style.append(source["set"])
    order = np.lexsort((style, concept))
    part = target.with_suffix(".part.npz")
    np.savez_compressed(
        part,
        rgba=np.stack(rgba)[order],
        concept=np.array(concept)[order],
        style=np.array(style)[order],
    )
    part.replace(target)
    return target


def _background(rng: np.random.Generator) -> np.ndarray:
    """A solid, two-tone or gradient background, [32, 32, 3] in 0..255."""
    first, second = rng.uniform(60, 255, (2, 3))
    kind = rng.integers(4)  # 0: two-tone, 1: gradient, else solid
    if kind > 1:
        return np.broadcast_to(first, (SIZE, SIZE, 3)).copy()
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j]
    ramp = np.cos(angle) * x + np.sin(angle) * y + rng.uniform(-0.3, 0.3)
    weight = np.clip(ramp * (0.5 if kind else 8) + 0.5, 0, 1)[..., None]
    return first * (1 - weight) + second * weight


def augment(rgba: np.ndarray, seed: tuple[int, ...]) -> np.ndarray:
    """One training picture of a drawing: uint8 [32, 32, 3].

    Random background, size 23 to 31 pixels, rotation within 15 degrees, place within what is left,
    30% mirrored. `seed` alone decides.
    """
    rng = np.random.default_rng(seed)
    canvas = _background(rng)
    image = Image.fromarray(rgba)
    if rng.random() < 0.3:
        image = image.transpose(Image.FLIP_LEFT_RIGHT)
    image = image.rotate(rng.uniform(-15, 15), Image.BICUBIC)
    side = int(rng.integers(23, 32))
    image = image.resize((side, side), Image.LANCZOS)
    left, top = rng.integers(0, SIZE - side + 1, 2)
    drawing = np.asarray(image, np.float32)
    alpha = drawing[..., 3:] / 255
    patch = canvas[top : top + side, left : left + side]
    patch[:] = drawing[..., :3] * alpha + patch * (1 - alpha)
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8)
