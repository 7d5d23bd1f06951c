"""Precision plugins: one name in a recipe, one Lightning plugin that converts the Megatron model."""

from __future__ import annotations

import torch
from nemo.lightning.pytorch.plugins import MegatronMixedPrecision

from nemotron_h.errors import UserError
from nemotron_h.strict import nearest


def fp32() -> MegatronMixedPrecision:
    """Weights, activations and gradients in float32."""
    return MegatronMixedPrecision(precision="32", params_dtype=torch.float32, pipeline_dtype=torch.float32)


def bf16() -> MegatronMixedPrecision:
    """Weights and activations in bfloat16; main weights, gradient sums and optimizer state in float32 (paper 2.4)."""
    return MegatronMixedPrecision(
        precision="bf16-mixed", params_dtype=torch.bfloat16, pipeline_dtype=torch.bfloat16, grad_reduce_in_fp32=True
    )


PLUGINS = {"fp32": fp32, "bf16": bf16}


def plugin(name: str) -> MegatronMixedPrecision:
    """The plugin of this name.

    Errors:
        UserError: there is none; names the nearest.
    """
    if name not in PLUGINS:
        raise UserError(f"precision {name!r}", hint=f"{nearest(name, PLUGINS)}Known: {', '.join(PLUGINS)}.")
    return PLUGINS[name]()
