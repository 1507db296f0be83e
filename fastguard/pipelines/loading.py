"""Models by name: checked without their weights, then loaded; and the policy and scale of one that has its own."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastguard import checks
from fastguard.files import read_json
from fastguard.pipelines.quiet import hushed
from fastguard.policies.policy import Policy
from fastguard.policies.presets import DEFAULT, policy

if TYPE_CHECKING:
    from fastguard.pipelines.families import Family, OwnFamily

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


def policy_source(model: Any, given: Any = None) -> Any:
    """`given`, or what stands for it where nothing is given: the embedded model's own policy file, else the default preset.

    ValueError for an empty name.
    """
    if isinstance(given, str) and not given.strip():
        raise ValueError(f"policy={given!r}: is empty (an unset shell variable?); leave it out for the default")
    if given is not None:
        return given
    return str(EMBEDDED / "policy.json") if is_embedded(model) else DEFAULT


def chosen_policy(model: Any, given: Any = None, gate: float | None = None) -> Policy:
    """The policy of `policy_source`, with `gate` in place of its own if one is given. Errors are those of `policy`."""
    source = policy_source(model, given)
    return policy(source) if gate is None else policy(source, gate=gate)


def chosen_scale(model: Any, given: float | None, chosen: Policy) -> float | None:
    """The guidance scale given, or that at which the embedded model's policy was tuned. None: the policy's or the pipeline's own."""
    if given is not None or chosen.guidance_scale is not None or not is_embedded(model):
        return given
    return float(read_json(EMBEDDED / "policy.json")["provenance"]["guidance_scale"])


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
        raise ValueError(f"model={model!r}: no pipeline there ({_line(error)})") from error


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


def family_of(kind: type) -> Family | OwnFamily | None:
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
    allowed = [n.removesuffix("Scheduler") for n in usable]
    raise ValueError(f"scheduler={name!r}: allowed are {', '.join(allowed)}{checks.meant(name, allowed)}")


def with_scheduler(name: str, config: Any, family: Family | OwnFamily | None) -> Any:
    """The named scheduler with another's configuration, for pipelines of a family (None: not known).

    ValueError if it needs what the configuration has not, or a library that is not here, or if the pipelines cannot call it.
    """
    kind: Any = scheduler_class(name)
    try:
        made = kind.from_config(config)
    except Exception as error:  # each scheduler refuses in its own way: NotImplementedError, KeyError, ImportError, ...
        why = " ".join(str(error).split())
        raise ValueError(f"scheduler={name!r}: cannot be made from this model's configuration ({why})") from None
    if getattr(family, "scales_input", False):  # of those with their own combination it is not known
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
        raise ValueError(f"device={device!r}: {_line(error)}") from None
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

    try:
        with warnings.catch_warnings(), hushed():
            # torch_dtype is the name that every supported diffusers knows; new ones call it deprecated.
            warnings.simplefilter("ignore", FutureWarning)
            pipe = (AutoPipelineForText2Image if auto else DiffusionPipeline).from_pretrained(
                resolve(model), torch_dtype=getattr(torch, dtype), variant=variant
            )
        if scheduler is not None:
            pipe.scheduler = with_scheduler(scheduler, pipe.scheduler.config, family_of(type(pipe)))
        pipe.set_progress_bar_config(disable=True)
        return pipe.to(device)
    except Exception as error:  # files that are missing, cut, of other shapes: each library raises errors of its own
        if isinstance(error, ValueError) and str(error).startswith("scheduler="):
            raise
        raise ValueError(f"model={model!r}: cannot be loaded: {_line(error)}{_variant_hint(model, variant)}") from error


def _variant_hint(model: str, variant: str | None) -> str:
    """Which variant to ask for, where a part of the model has weights of one alone."""
    for part in sorted(path for path in Path(resolve(model)).glob("*") if path.is_dir()):
        names = [path.name for path in part.glob("*.safetensors") if "-of-" not in path.name]
        if names and all(name.count(".") > 1 for name in names) and variant != (found := names[0].split(".")[-2]):
            return f" ({part.name} has weights of variant {found!r} alone: give variant)"
    return ""


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
            made: Any = getattr(diffusers, entry[1])
            with torch.device("meta"), _reading(model, name):
                config = made.load_config(resolve(model), subfolder=name)
                parts[name] = torch.nn.Module.to(made.from_config(config), torch.float16)
        elif name == "requires_safety_checker":
            parts[name] = False
        elif isinstance(entry, (bool, int, float, str)):
            parts[name] = entry
        elif parameter.default is inspect.Parameter.empty and name != "self":
            parts[name] = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of what is repaired
        pipe = kind(**parts)
    if scheduler is not None:
        pipe.scheduler = with_scheduler(scheduler, pipe.scheduler.config, family_of(kind))
    return pipe


def own_scheduler(model: str, index: Mapping[str, Any]) -> Any:
    """The model's scheduler as its files have it. ValueError if there is none."""
    entry = index.get("scheduler")
    if not isinstance(entry, (list, tuple)) or len(entry) != 2:
        raise ValueError(f"model={model!r}: its model_index.json names no scheduler")
    kind: Any = scheduler_class(str(entry[1]))
    where = resolve(model)
    if Path(where).is_dir() and not (Path(where) / "scheduler").is_dir():
        raise ValueError(f"model={model!r}: has no scheduler directory")
    with _reading(model, "scheduler"):
        return kind.from_pretrained(where, subfolder="scheduler")


class _reading:
    """Turn what goes wrong with a part's configuration into a ValueError that names the model and the part."""

    def __init__(self, model: str, part: str) -> None:
        self.model, self.part = model, part

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception):
            raise ValueError(f"model={self.model!r}: its {self.part} cannot be read: {_line(error)}") from None


def _line(error: BaseException) -> str:
    """The first line that an error says."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
