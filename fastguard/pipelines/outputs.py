"""One batched denoiser call per row: both branches of classifier-free guidance, or only the one that is needed.

Pipelines of the fused kind hand the denoiser a batch of 2B rows, [unconditional, conditional]. Where the policy knows in advance
that one branch will not be used, only its B rows are run, if the denoiser treats its rows alike.
"""

import functools
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from fastguard.capture.obstacles import hooks
from fastguard.capture.static_inputs import tensors_of
from fastguard.pipelines.shadow import original_of

UNBRANCHED = ("ip_adapter_masks",)  # one per adapter, whatever their number
IMAGES = ("image_embeds",)  # added_cond_kwargs of an IP-Adapter
BRANCHED = ("ip_adapter_image_embeds",)  # put among the caller's own by Stable Diffusion 3
_LIBRARIES = ("torch", "diffusers", "peft", "accelerate", "bitsandbytes", "torchao", "optimum")
# Of diffusers, which move weights.
HARMLESS_HOOKS = {"group_offloading", "lazy_prefetch_group_offloading", "layerwise_casting"}
_WRAPPERS = ("accelerate.hooks", "diffusers.hooks.hooks")  # what puts hooks around a forward
_BY_HALVES = ("PAG", "CrossFrame")  # in the names of diffusers' processors that treat parts of the batch differently


class Output(tuple):
    """What a guarded denoiser returns, by index and by name: a stand-in for the sample, which stays with the guard."""

    @property
    def sample(self) -> torch.Tensor:
        return self[0]


def select_branch(tree: Any, branch: str, batch: int, *, several: bool = False) -> Any:
    """Keep one half of every tensor in `tree` whose leading size is 2 * batch; everything else passes through unchanged.

    `tree` may nest tuples, lists and mappings of any kind: ControlNet residuals, `added_cond_kwargs`, IP-Adapter embeddings. Tensors
    of another leading size (timestep) belong to no branch, nor does what is called by a name in UNBRANCHED.

    several: tensors may hold several rows an image, as those called by a name in IMAGES do, which attention folds into the images' own.
    """
    if isinstance(tree, torch.Tensor):
        rows = len(tree) if tree.ndim else 0
        if rows == 0 or (rows % (2 * batch) if several else rows != 2 * batch):
            return tree
        return tree[: rows // 2] if branch == "uncond" else tree[rows // 2 :]
    if isinstance(tree, Mapping):
        return {
            k: v if k in UNBRANCHED else select_branch(v, branch, batch, several=several or k in IMAGES)
            for k, v in tree.items()
        }
    if isinstance(tree, (tuple, list)):  # torch's pytree would take a subclass for a leaf
        items = [select_branch(value, branch, batch, several=several) for value in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return tree


def needs_both(denoiser: Any, arguments: Mapping[str, Any]) -> str | None:
    """Why both branches must run in every row of a call, whatever its policies need; None if one may run alone.

    FaceID's image embeddings lie on the module, [2B, ...]; what a tensor in cross_attention_kwargs is, its processor alone knows.
    """
    layers = getattr(getattr(denoiser, "encoder_hid_proj", None), "image_projection_layers", None) or ()
    if any(getattr(layer, "clip_embeds", None) is not None for layer in layers):
        return "FaceID embeddings lie on the denoiser for both branches"
    for argument in ("cross_attention_kwargs", "joint_attention_kwargs"):
        for name, value in (arguments.get(argument) or {}).items():
            if name not in (*UNBRANCHED, *BRANCHED) and any(tensor.ndim > 0 for tensor in tensors_of(value)):
                return f"{argument}[{name!r}] holds a tensor, which cannot be cut into branches"
    return keeps_state(denoiser)


def keeps_state(denoiser: Any) -> str | None:
    """Who keeps features from row to row, or reads a batch as [u, c]: a batch of one branch would be wrong there, without an error.

    Known to treat rows alike are the libraries' own layers and attention processors. Anything else may be such a one: feature
    caches hang hooks on modules or replace their forward, token merging replaces their classes. A hook on the denoiser itself counts.
    """
    denoiser = original_of(denoiser)
    if any(hooks(())):
        return "a forward hook for every module (torch.nn.modules.module) may keep features from row to row"
    for module in denoiser.modules() if isinstance(denoiser, torch.nn.Module) else ():
        name = type(module).__name__
        if (hook := next(_foreign_hooks(module), None)) is not None:
            return f"{hook} on {name} may keep features from row to row"
        if not _own_forward(module):
            return f"forward() is replaced on a {name}"
        # forward: of the class, which TeaCache's users replace, under the old one's name if it goes by functools.wraps.
        for where in (type(module).__module__, getattr(type(module).forward, "__globals__", {}).get("__name__", "?")):
            if where.split(".")[0] not in _LIBRARIES:
                return f"{where}.{name} is not one of the libraries' own layers"
        processor = getattr(module, "processor", None)
        kind = type(processor)
        if processor is not None and (
            kind.__module__.split(".")[0] not in _LIBRARIES or any(part in kind.__name__ for part in _BY_HALVES)
        ):
            return f"the attention processor {kind.__name__} may treat the two branches differently"
    return None


def _foreign_hooks(module: torch.nn.Module) -> Iterator[str]:
    """Hooks on a module, but for fastguard's own and those with an attribute `only_looks`, and those of diffusers and accelerate that move weights."""
    registry = getattr(module, "_diffusers_hook", None)
    if registry is not None:
        yield from (f"the hook {name}" for name in sorted(set(registry.hooks) - HARMLESS_HOOKS))
    ones = [hook] if (hook := getattr(module, "_hf_hook", None)) is not None else []
    for one in ones:
        ones += getattr(one, "hooks", ())  # of accelerate's SequentialHook
        if type(one).__module__.split(".")[0] not in _LIBRARIES:
            yield f"the hook {type(one).__name__}"
    for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
        own = (getattr(hook, "__module__", None) or "?").split(".")[0] == "fastguard"
        if not (own or getattr(hook, "only_looks", False)):
            yield "a forward hook"


def _own_forward(module: torch.nn.Module) -> bool:
    """Whether a module runs its class's forward, be it inside the wrappers of accelerate's and diffusers' hooks."""
    own = types.MethodType(type(module).forward, module)
    forward = vars(module).get("forward", own)
    while isinstance(forward, functools.partial) and getattr(forward.func, "__module__", None) in _WRAPPERS:
        inner = forward.__wrapped__  # type: ignore[attr-defined]
        # accelerate's wrapper calls what lies in _old_forward now, which may be another than what it was put around.
        if forward.func.__module__ == "accelerate.hooks" and getattr(module, "_old_forward", None) != inner:
            return False
        forward = inner
    return forward == own
