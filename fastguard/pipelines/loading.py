"""Models by name: checked without their weights, then loaded; and the policy and scale of one that has its own."""

import inspect
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastguard import checks
from fastguard.files import read_json
from fastguard.pipelines.quiet import hushed
from fastguard.policies.policy import Policy
from fastguard.policies.presets import DEFAULT, policy

DTYPES = ("float32", "float16", "bfloat16")
TESTBED = "testbed"  # the embedded model
EMBEDDED = Path(__file__).parents[1] / "testbed"  # its folder: model/, and policy.json, which was calibrated for it


def resolve(model: str) -> str:
    """Where the model is: the embedded one for "testbed", otherwise a directory or a hub id as given."""
    return str(EMBEDDED / "model") if model == TESTBED else model


def is_embedded(model: Any) -> bool:
    """Whether a name, a path or a pipeline is that of the embedded model."""
    name = model if isinstance(model, (str, os.PathLike)) else getattr(model, "name_or_path", "")
    return name == TESTBED or (bool(name) and Path(name).absolute() == EMBEDDED / "model")


def facts(model: Any, scheduler: str | None = None, dtype: str | None = None) -> dict[str, Any]:
    """What a policy's numbers may belong to (`fastguard.policies.provenance`): of a pipeline, or of a model by name as it will be loaded."""
    name: Any
    if isinstance(model, (str, os.PathLike)):
        name, scheduler = str(model), scheduler or type(own_scheduler(str(model), model_index(str(model)))).__name__
    else:
        name, scheduler = getattr(model, "name_or_path", None), type(model.scheduler).__name__
        dtype = str(model.dtype).removeprefix("torch.")
    return {"model": TESTBED if is_embedded(model) else name, "scheduler": scheduler, "dtype": dtype}


def chosen_policy(model: Any, given: Any = None, gate: float | None = None) -> Policy:
    """The policy given, else the embedded model's own or the default preset; with `gate` in place of its own if one is given.

    ValueError for an empty name, and as of `policy`.
    """
    if isinstance(given, str) and not given.strip():
        raise ValueError(f"policy={given!r}: is empty (an unset shell variable?); leave it out for the default")
    if given is None:
        given = str(EMBEDDED / "policy.json") if is_embedded(model) else DEFAULT
    return policy(given) if gate is None else policy(given, gate=gate)


def chosen_scale(model: Any, given: float | None, chosen: Policy) -> float | None:
    """The guidance scale given, or that at which the embedded model's policy was tuned. None: the policy's or the pipeline's own."""
    if given is not None or chosen.guidance_scale is not None or not is_embedded(model):
        return given
    return float(read_json(EMBEDDED / "policy.json")["provenance"]["guidance_scale"])


# Without weights -------------------------------------------------------------------------------------------------------------


def model_index(model: str) -> Mapping[str, Any]:
    """The model's model_index.json (a hub id's is fetched). ValueError naming the model if it has none."""
    from diffusers import DiffusionPipeline

    where = resolve(model)
    looks_local = Path(where).is_absolute() or where.startswith(".") or where.count("/") != 1
    if not Path(where).is_dir() and looks_local:
        raise ValueError(f"model={model!r}: no such directory, and not a hub id (owner/name)")
    with _in_a_line(f"model={model!r}: no pipeline there"):
        return DiffusionPipeline.load_config(where)


def pipeline_class(index: Mapping[str, Any]) -> type:
    """The pipeline class that model_index.json names. ValueError if diffusers has none of that name."""
    import diffusers

    name = index.get("_class_name")
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not isinstance(found, type):
        raise ValueError(f"model: its pipeline class {name!r} is not one of diffusers'")
    return found


def distilled(pipe: Any) -> str | None:
    """Why a pipeline with this UNet, if it has one, cannot be guarded; None if it can."""
    if getattr(getattr(pipe, "unet", None), "config", {}).get("time_cond_proj_dim") is None:
        return None
    return "its UNet takes the guidance scale as an input (time_cond_proj_dim, as in LCM-distilled models): there is no unconditional branch"


def scheduler_class(name: str) -> type:
    """A diffusers scheduler by its class name; case and the ending "Scheduler" do not matter. ValueError lists all of them."""
    import diffusers

    names = [n for n in dir(diffusers.schedulers) if n.endswith("Scheduler") and not n.startswith("Flax")]
    usable: dict[str, type] = {}
    for short, found in ((n.removesuffix("Scheduler"), getattr(diffusers, n, None)) for n in names):
        # One whose library is missing is a stand-in with `_backends`, which raises at any look at it; some real ones have no step().
        if isinstance(found, type) and ("_backends" in vars(found) or hasattr(found, "step")):
            usable[short] = found
            if short.lower() == name.lower().removesuffix("scheduler"):
                return found
    raise ValueError(f"scheduler={name!r}: allowed are {', '.join(usable)}{checks.meant(name, usable)}")


def with_scheduler(name: str, config: Any, pipeline: type) -> Any:
    """The named scheduler with another's configuration, for pipelines of a class.

    ValueError if it needs what the configuration has not, or a library that is not here, or if the pipelines cannot call it.
    """
    from fastguard.pipelines.families import Fused, find

    kind: Any = scheduler_class(name)
    with _in_a_line(f"scheduler={name!r}: cannot be made from this model's configuration"):
        scheduler = kind.from_config(config)
    try:
        family = find(pipeline)
    except TypeError:
        return scheduler
    if isinstance(family, Fused) and family.scales_input:  # of those with their own combination it is not known
        why = [f"has no {n}" for n in ("init_noise_sigma", "order", "scale_model_input") if not hasattr(scheduler, n)]
        given = ("model_output", "timestep", "sample")
        wanted = [p for p in inspect.signature(scheduler.step).parameters.values() if p.default is p.empty]
        why += [f"wants {p.name} at every step" for p in wanted if p.name not in given]
        if why:
            raise ValueError(f"scheduler={name!r}: {kind.__name__} {why[0]}, so this model's pipeline cannot run it")
    return scheduler


def own_scheduler(model: str, index: Mapping[str, Any]) -> Any:
    """The model's scheduler as its files have it. ValueError if there is none."""
    entry = index.get("scheduler")
    if not isinstance(entry, (list, tuple)) or len(entry) != 2:
        raise ValueError(f"model={model!r}: its model_index.json names no scheduler")
    kind: Any = scheduler_class(str(entry[1]))
    where = resolve(model)
    if Path(where).is_dir() and not (Path(where) / "scheduler").is_dir():
        raise ValueError(f"model={model!r}: has no scheduler directory")
    with _in_a_line(f"model={model!r}: its scheduler cannot be read"):
        return kind.from_pretrained(where, subfolder="scheduler")


def skeleton(model: str, *, scheduler: str | None = None) -> Any:
    """The pipeline as its class builds it, without weights: its scheduler, its denoiser and autoencoder as structures, nothing else.

    Pipelines repair outdated configurations when they are built, so this and not the files is what will run. ValueError if the model
    has no such parts, or the scheduler cannot be made from its configuration.
    """
    import diffusers
    import torch

    index = model_index(model)
    kind: Any = pipeline_class(index)
    parts: dict[str, Any] = {}
    for name, parameter in inspect.signature(kind.__init__).parameters.items():
        entry = index.get(name)
        if name == "scheduler":
            parts[name] = own_scheduler(model, index)
        elif name in ("unet", "transformer", "vae", "controlnet") and isinstance(entry, (list, tuple)) and entry[1]:
            of_part: Any = getattr(diffusers, entry[1])
            with torch.device("meta"), _in_a_line(f"model={model!r}: its {name} cannot be read"):
                config = of_part.load_config(resolve(model), subfolder=name)
                parts[name] = torch.nn.Module.to(of_part.from_config(config), torch.float16)
        elif name == "requires_safety_checker":
            parts[name] = False
        elif isinstance(entry, (bool, int, float, str)):
            parts[name] = entry
        elif parameter.default is inspect.Parameter.empty and name != "self":
            parts[name] = None
    with hushed():  # of what is repaired
        pipe = kind(**parts)
    if scheduler is not None:
        pipe.scheduler = with_scheduler(scheduler, pipe.scheduler.config, kind)
    return pipe


# With weights ----------------------------------------------------------------------------------------------------------------


def prepare(device: str, dtype: str) -> tuple[str, str]:
    """Device and dtype with "auto" resolved: a GPU if there is one; float16 on it, float32 elsewhere.

    ValueError if torch does not know or have the device, or for another dtype than those in `DTYPES`.
    """
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with _in_a_line(f"device={device!r}"):
        torch.empty(0, device=device)
    if dtype == "auto":
        dtype = "float16" if torch.device(device).type == "cuda" else "float32"
    return device, checks.choice("dtype", dtype, DTYPES)


def load_pipeline(
    model: str,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    scheduler: str | None = None,
    variant: str | None = None,
    auto: bool = True,
) -> Any:
    """The text-to-image pipeline of `model` (auto=False: that of its own class), quiet. ValueError, in one line, if it cannot be loaded."""
    import torch
    from diffusers import AutoPipelineForText2Image, DiffusionPipeline

    kind = AutoPipelineForText2Image if auto else DiffusionPipeline
    with _in_a_line(f"model={model!r}: cannot be loaded", _variant_hint(model, variant)):
        with hushed():  # torch_dtype is the name that every supported diffusers knows; new ones call it deprecated
            pipe = kind.from_pretrained(resolve(model), torch_dtype=getattr(torch, dtype), variant=variant)
        pipe.set_progress_bar_config(disable=True)
        pipe = pipe.to(device)
    if scheduler is not None:
        pipe.scheduler = with_scheduler(scheduler, pipe.scheduler.config, type(pipe))
    return pipe


def _variant_hint(model: str, variant: str | None) -> str:
    """Which variant to ask for, where a part of the model has weights of one alone."""
    for part in sorted(path for path in Path(resolve(model)).glob("*") if path.is_dir()):
        names = [path.name for path in part.glob("*.safetensors") if "-of-" not in path.name]
        if names and all(name.count(".") > 1 for name in names) and variant != (found := names[0].split(".")[-2]):
            return f" ({part.name} has weights of variant {found!r} alone: give variant)"
    return ""


@contextmanager
def _in_a_line(what: str, hint: str = "") -> Iterator[None]:
    """Whatever goes wrong inside as a ValueError: each library and scheduler raises errors of its own, and says more than a line."""
    try:
        yield
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{what}: {lines[0]}{hint}") from error
