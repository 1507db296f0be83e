"""`python -m bench.testbed train`: everything from the drawings to a folder that diffusers loads.

Every phase continues from its checkpoint in the work folder, so the command may be interrupted and
run again. Steps and seeds are fixed: two runs differ by rounding and the number of processes alone.
"""

from __future__ import annotations

from pathlib import Path

from . import export, parallel, pictures, unet, vae


def train(work: Path, out: Path, processes: int = 2) -> None:
    """Data, autoencoder, UNet with text encoder, export."""
    work.mkdir(parents=True, exist_ok=True)
    print("training set:", pictures.describe(work), flush=True)
    parallel.run(vae.train, (str(work),), processes)
    unet.latents(work)
    parallel.run(unet.train, (str(work),), processes)
    export.export(work, out)
    print(f"wrote {out}", flush=True)
