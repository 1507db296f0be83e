"""One batched denoiser call per step: both branches of classifier-free guidance, or only the one that is needed.

diffusers' pipelines on the allow-list (`fastguard.pipelines.families`) hand the denoiser a batch of 2B rows, [unconditional, conditional].
Where the policy knows in advance that one branch will not be used, only its B rows are run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

Branches = str  # "both" | "uncond" | "cond"
UNBRANCHED = ("ip_adapter_masks",)  # one per adapter, whatever their number
IMAGES = ("image_embeds",)  # added_cond_kwargs of an IP-Adapter
BRANCHED = ("ip_adapter_image_embeds",)  # put among the caller's own by Stable Diffusion 3


def select_branch(tree: Any, branch: Branches, batch: int, *, several: bool = False) -> Any:
    """Keep one half of every tensor in `tree` whose leading size is 2 * batch; everything else passes through unchanged.

    `tree` may nest tuples, lists and mappings: ControlNet residuals, `added_cond_kwargs`, IP-Adapter embeddings. Tensors of
    another leading size (timestep) belong to no branch, nor does what is called by a name in UNBRANCHED.

    several: tensors may hold several rows an image, as embeddings in IMAGES do, which attention folds into the images' own.
    """
    if isinstance(tree, torch.Tensor):
        rows = tree.shape[0] if tree.ndim else 0
        if rows == 0 or (rows % (2 * batch) if several else rows != 2 * batch):
            return tree
        return tree[: rows // 2] if branch == "uncond" else tree[rows // 2 :]
    if isinstance(tree, Mapping):
        return {
            k: v if k in UNBRANCHED else select_branch(v, branch, batch, several=several or k in IMAGES)
            for k, v in tree.items()
        }
    if isinstance(tree, (tuple, list)):
        items = [select_branch(value, branch, batch, several=several) for value in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return tree


def undivided(denoiser: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether a call's inputs hold what cannot be cut into branches, so that both must run.

    FaceID's image embeddings lie on the module, [2B, ...]; what a tensor in cross_attention_kwargs is, its processor alone knows.
    """
    layers = getattr(getattr(denoiser, "encoder_hid_proj", None), "image_projection_layers", None) or ()
    if any(getattr(layer, "clip_embeds", None) is not None for layer in layers):
        return True
    given = (arguments.get(name) or {} for name in ("cross_attention_kwargs", "joint_attention_kwargs"))
    return any(
        tensor.ndim > 0
        for one in given
        for name, value in one.items()
        if name not in (*UNBRANCHED, *BRANCHED)
        for tensor in tensors_of(value)
    )


def tensors_of(tree: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested mappings, tuples and lists."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (Mapping, tuple, list)):
        for value in tree.values() if isinstance(tree, Mapping) else tree:
            yield from tensors_of(value)


def placeholder(output: torch.Tensor, rows: int) -> torch.Tensor:
    """[rows, C, 1, ...] zeros for the pipeline's own guidance arithmetic, whose result is ignored; in host memory, where it launches nothing."""
    return torch.zeros((rows, output.shape[1], *(1 for _ in output.shape[2:])), dtype=output.dtype)
