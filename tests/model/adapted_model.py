"""The small model of `small_model.py` with LoRA or DoRA adapters."""

from __future__ import annotations

import torch
from small_model import small_config, small_model

from nemotron_h.schema.recipe import AdapterSchema

ALL = ["in_proj", "out_proj", "linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
KINDS = ("lora", "dora")


def adapter(kind: str, **changes) -> AdapterSchema:
    """Settings; every matrix is a target."""
    return AdapterSchema(**{"kind": kind, "rank": 4, "alpha": 8.0, "targets": ALL, **changes})


def adapted_config(kind: str, dtype: torch.dtype = torch.float32, recompute: dict | None = None, **changes):
    """A `NemotronHConfig` with an adapter; `changes` are the adapter's."""
    return small_config(2, dtype=dtype, adapter=adapter(kind, **changes), **(recompute or {}))


@torch.no_grad()
def randomize_adapters(model, seed: int = 5) -> None:
    """Adapters that change the output as much as the weights make it, and lengths apart from the base's."""
    g = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".adapter." not in name:
            continue
        normal = torch.randn(parameter.shape, dtype=torch.float64, generator=g)
        if name.endswith("magnitude"):
            parameter.mul_(0.5 + torch.rand(parameter.shape, dtype=torch.float64, generator=g).to(parameter.dtype))
        else:
            inputs = parameter.shape[1] if name.endswith(".a") else 16
            parameter.copy_(normal / inputs**0.5)


def adapted_model(config, seed: int = 0):
    """A model whose base has the weights of `small_model(seed)`, loaded as a checkpoint's are, and that base alone."""
    model = config.configure_model(None).to(config.params_dtype)
    base = small_model(small_config(2, dtype=config.params_dtype), seed)
    model.load_state_dict(base.state_dict())
    return model, base
