"""Small random weights of adapters."""

from __future__ import annotations

import torch


def ip_adapter_state(unet):
    generator = torch.Generator().manual_seed(9)
    dim = unet.config.cross_attention_dim

    def random(*shape):
        return torch.randn(*shape, generator=generator) * 0.1

    projection = {
        "proj.weight": random(dim * 4, 32),
        "proj.bias": random(dim * 4),
        "norm.weight": torch.ones(dim),
        "norm.bias": torch.zeros(dim),
    }
    weights, index = {}, 1
    for name in unet.attn_processors:
        if name.endswith("attn1.processor"):
            continue
        module = unet.get_submodule(name.removesuffix(".processor"))
        for which in ("k", "v"):
            weights[f"{index}.to_{which}_ip.weight"] = random(module.to_k.out_features, dim)
        index += 2
    return {"image_proj": projection, "ip_adapter": weights}
