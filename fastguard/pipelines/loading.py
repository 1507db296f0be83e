"""Models by name for the command line: checked without their weights, then loaded."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastguard import checks

if TYPE_CHECKING:
    from fastguard.pipelines.families import Family

DTYPES = ("float32", "float16", "bfloat16")
TESTBED = "testbed"  # the embedded model


def resolve(model: str) -> str:
    """Where the model is: the embedded one for "testbed", otherwise a directory or a hub id as given."""
    if model != TESTBED:
        return model
    from fastguard import testbed

    return str(testbed.path())


def model_index(model: str) -> Mapping[str, Any]:
    """The model's model_index.json (a hub id's is fetched). ValueError naming the model if it has none."""
    from diffusers import DiffusionPipeline

    where = resolve(model)
    looks_local = Path(where).is_absolute() or where.startswith(".") or where.count("/") != 1
    if not Path(where).is_dir() and looks_local:
        raise ValueError(f"model={model!r}: no such directory, and not a hub id (owner/name)")
    try:
        return DiffusionPipeline.load_config(where)
    except (OSError, ValueError) as error:
        raise ValueError(f"model={model!r}: no pipeline there ({str(error).splitlines()[0]})") from error


def pipeline_class(index: Mapping[str, Any]) -> type:
    """The pipeline class that model_index.json names. ValueError if diffusers has none of that name."""
    import diffusers

    name = index.get("_class_name")
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not isinstance(found, type):
        raise ValueError(f"model: its pipeline class {name!r} is not one of diffusers'")
    return found


def distilled(config: Mapping[str, Any]) -> str | None:
    """Why a UNet of this configuration cannot be guarded; None if it can."""
    if config.get("time_cond_proj_dim") is None:
        return None
    return "its UNet takes the guidance scale as an input (time_cond_proj_dim, as in LCM-distilled models): there is no unconditional branch"


def denoiser_refusal(model: str, index: Mapping[str, Any]) -> str | None:
    """Why the model's denoiser cannot be guarded, from its configuration alone; None if it can."""
    from diffusers import UNet2DConditionModel

    return distilled(UNet2DConditionModel.load_config(resolve(model), subfolder="unet")) if "unet" in index else None


def family_of(kind: type) -> Family | None:
    """None for a pipeline class that is not supported."""
    from fastguard.pipelines.families import find

    try:
        return find(kind)
    except TypeError:
        return None


def scheduler_class(name: str) -> type:
    """A diffusers scheduler by its class name; case and the ending "Scheduler" do not matter. ValueError lists all of them."""
    import diffusers

    def key(text: str) -> str:
        return text.lower().removesuffix("scheduler")

    names = [n for n in dir(diffusers.schedulers) if n.endswith("Scheduler") and not n.startswith("Flax")]
    classes = {n: getattr(diffusers, n, None) for n in names}
    # One whose library is missing is a stand-in with `_backends`, which raises at any look at it; some real ones have no step().
    usable = {
        n: c for n, c in classes.items() if isinstance(c, type) and ("_backends" in vars(c) or hasattr(c, "step"))
    }
    for candidate, found in usable.items():
        if key(candidate) == key(name):
            return found
    raise ValueError(f"scheduler={name!r}: allowed are {', '.join(n.removesuffix('Scheduler') for n in usable)}")


def with_scheduler(name: str, config: Any, family: Family | None) -> Any:
    """The named scheduler with another's configuration, for pipelines of a family (None: not known).

    ValueError if it needs what the configuration has not, or a library that is not here, or if the pipelines cannot call it.
    """
    kind: Any = scheduler_class(name)
    try:
        made = kind.from_config(config)
    except (TypeError, ImportError) as error:
        raise ValueError(
            f"scheduler={name!r}: cannot be made from this model's configuration ({' '.join(str(error).split())})"
        ) from None
    if family is not None and family.scales_input:
        missing = [
            attribute
            for attribute in ("init_noise_sigma", "order", "scale_model_input")
            if not hasattr(made, attribute)
        ]
        known = {"model_output", "timestep", "sample"}
        asked = [
            p.name
            for p in inspect.signature(made.step).parameters.values()
            if p.default is p.empty and p.name not in known
        ]
        if missing or asked:
            why = f"has no {missing[0]}" if missing else f"wants {asked[0]} at every step"
            raise ValueError(f"scheduler={name!r}: {type(made).__name__} {why}, so this model's pipeline cannot run it")
    return made


def prepare(device: str, dtype: str) -> tuple[str, str]:
    """Device and dtype with "auto" resolved: a GPU if there is one; float16 on it, float32 elsewhere.

    ValueError if torch does not know or have the device, or for another dtype than those in `DTYPES`.
    """
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise ValueError(f"device={device!r}: {str(error).splitlines()[0]}") from None
    if dtype == "auto":
        dtype = "float16" if torch.device(device).type == "cuda" else "float32"
    return device, checks.choice("dtype", dtype, DTYPES)


def load_pipeline(model: str, *, dtype: str = "float32", device: str = "cpu", scheduler: str | None = None) -> Any:
    """The text-to-image pipeline of `model`, quiet (no progress bars of its own)."""
    import torch
    from diffusers import AutoPipelineForText2Image

    with warnings.catch_warnings():
        # torch_dtype is the name that every supported diffusers knows; new ones call it deprecated.
        warnings.simplefilter("ignore", FutureWarning)
        pipe = AutoPipelineForText2Image.from_pretrained(resolve(model), torch_dtype=getattr(torch, dtype))
    if scheduler is not None:
        pipe.scheduler = with_scheduler(scheduler, pipe.scheduler.config, family_of(type(pipe)))
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def quiet() -> None:
    """Only errors from the libraries that load the model: for programs whose output somebody reads."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
