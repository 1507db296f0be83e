"""The wheel installs `fastguard` alone: `kernels/` must not shadow the PyPI package of that name, which diffusers imports."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """Built from a copy: a build in place would take in what earlier builds left, and leave something itself."""
    out, source = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("source") / "fastguard"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("fastguard", "kernels"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", out, source],
        check=True,
    )
    (path,) = out.glob("diffusers_fastguard-*.whl")
    return zipfile.ZipFile(path)


def test_top_level_is_fastguard_alone(wheel):
    (name,) = (n for n in wheel.namelist() if n.endswith("top_level.txt"))
    assert wheel.read(name).decode().split() == ["fastguard"]
    roots = {n.split("/")[0] for n in wheel.namelist()}
    assert {r for r in roots if not r.endswith(".dist-info")} == {"fastguard"}


def test_wheel_holds_every_module_and_the_data(wheel):
    names = set(wheel.namelist())
    ours = {str(source.relative_to(ROOT)) for source in (ROOT / "fastguard").rglob("*.py")}
    ours = {name for name in ours if not name.startswith("fastguard/kernels/")}
    ours |= {f"fastguard/kernels/{source.name}" for source in (ROOT / "kernels").glob("*.py")}
    assert {name for name in names if name.endswith(".py")} == ours
    assert "fastguard/py.typed" in names
    for file in (ROOT / "fastguard/testbed").rglob("*"):
        if file.is_file() and "__pycache__" not in file.parts:
            assert str(file.relative_to(ROOT)) in names, "data of the embedded model is missing"


def test_kernels_is_not_importable_by_that_name(wheel, tmp_path):
    """Unpacked alone on the path, `import kernels` fails and `import fastguard.kernels.layout` works."""
    wheel.extractall(tmp_path)
    check = "import fastguard.kernels.layout, importlib.util as u; assert u.find_spec('kernels') is None or 'site-packages' in str(u.find_spec('kernels').origin)"
    subprocess.run([sys.executable, "-c", check], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, check=True)


def test_the_version_needs_neither_torch_nor_diffusers():
    check = "import sys, fastguard.commands.cli; assert not {'torch', 'diffusers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True)


@pytest.mark.parametrize("first", ["fastguard.pipelines.guard", "fastguard.policies.policy", "fastguard.commands.cli"])
def test_functions_that_have_their_modules_name_stay_functions(first):
    check = f"import {first}, fastguard; from fastguard import enable, policy; assert callable(fastguard.enable) and callable(policy) and fastguard.policy('cfg').name == 'cfg'"
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True)
