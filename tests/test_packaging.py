"""The wheel installs `fastguard` alone: `kernels/` must not shadow the PyPI package of that name, which diffusers imports."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", out, ROOT],
        check=True,
    )
    (path,) = out.glob("fastguard-*.whl")
    return zipfile.ZipFile(path)


def test_top_level_is_fastguard_alone(wheel):
    (name,) = (n for n in wheel.namelist() if n.endswith("top_level.txt"))
    assert wheel.read(name).decode().split() == ["fastguard"]
    roots = {n.split("/")[0] for n in wheel.namelist()}
    assert {r for r in roots if not r.endswith(".dist-info")} == {"fastguard"}


def test_wheel_holds_every_module_and_the_data(wheel):
    names = set(wheel.namelist())
    for folder, inside in (("fastguard", "fastguard"), ("kernels", "fastguard/kernels")):
        for source in (ROOT / folder).glob("*.py"):
            assert f"{inside}/{source.name}" in names
    assert "fastguard/py.typed" in names
    for file in (ROOT / "fastguard/testbed").rglob("*"):
        if file.is_file() and "__pycache__" not in file.parts:
            assert str(file.relative_to(ROOT)) in names, "data of the embedded model is missing"


def test_kernels_is_not_importable_by_that_name(wheel, tmp_path):
    """Unpacked alone on the path, `import kernels` fails and `import fastguard.kernels.layout` works."""
    wheel.extractall(tmp_path)
    check = "import fastguard.kernels.layout, importlib.util as u; assert u.find_spec('kernels') is None or 'site-packages' in str(u.find_spec('kernels').origin)"
    subprocess.run([sys.executable, "-c", check], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, check=True)
