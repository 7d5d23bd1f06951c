"""Precision plugins: one name in a recipe, one Lightning plugin that converts the Megatron model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from nemo.lightning.pytorch.plugins import MegatronMixedPrecision
from nemo.lightning.pytorch.plugins.mixed_precision import DtypeConfig

from nemotron_h.core.strict import check_one_of
from nemotron_h.schema.recipe import FP8_BACKENDS, PRECISIONS, STATE_DTYPES


@dataclass
class EmulatedDtypeConfig(DtypeConfig):
    """NeMo's, with the model's `fp8_emulation`: NeMo copies every field that the model's configuration has too."""

    fp8_emulation: str | None = None


class PrecisionPlugin(MegatronMixedPrecision):
    """NeMo's plugin, which knows the recipe's name for it.

    Attributes:
        recipe: the recipe's `precision`.
        bf16_edge_layers: layers at each end that stay in BF16, with FP8.
        emulated: FP8 by float8 casts around float32 matmuls.
    """

    recipe: str
    bf16_edge_layers: int = 0
    emulated: bool = False


def fp32() -> PrecisionPlugin:
    """Return weights, activations and gradients in float32."""
    return PrecisionPlugin(precision="32", params_dtype=torch.float32, pipeline_dtype=torch.float32)


def bf16(**fp8: object) -> PrecisionPlugin:
    """Return bfloat16 weights and activations; main weights, gradient sums and moments in float32 (paper 2.4)."""
    return PrecisionPlugin(
        precision="bf16-mixed",
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        grad_reduce_in_fp32=True,
        **fp8,
    )


#: Megatron's names of the FP8 recipes: number format and scaling
FP8 = {
    # paper 2.3: E4M3 weights and activations, E5M2 gradients, one scale per tensor from its amax now
    "fp8_current_scaling": {"fp8": "hybrid", "fp8_recipe": "tensorwise"},
    # Nemotron Nano 2: E4M3 everywhere, 128x128 blocks of weights, 1x128 of activations and gradients
    "fp8_blockwise": {"fp8": "e4m3", "fp8_recipe": "blockwise"},
}


def fp8(name: str, bf16_edge_layers: int, emulate: bool) -> PrecisionPlugin:
    """Return the BF16 plugin with the GEMMs of the layers in FP8 except `bf16_edge_layers` layers at each end.

    Weights stay in bfloat16 between steps (no `fp8_param_gather`): checkpoints then hold no FP8 and any precision
    resumes from any other.
    """
    edges = {
        "first_last_layers_bf16": True,
        "num_layers_at_start_in_bf16": bf16_edge_layers,
        "num_layers_at_end_in_bf16": bf16_edge_layers,
    }
    if emulate:  # Megatron sees a BF16 model, whose layers quantise by themselves
        made = bf16(**edges)
        made.dtype_config = EmulatedDtypeConfig(**{**vars(made.dtype_config), "fp8_emulation": name})
    else:
        made = bf16(**FP8[name], **edges, fp8_param_gather=False)
    made.bf16_edge_layers, made.emulated = bf16_edge_layers, emulate
    return made


def plugin(name: str, bf16_edge_layers: int = 2, fp8_backend: str = "auto", gradients: str = "fp32") -> PrecisionPlugin:
    """Return the plugin of this name.

    Args:
        name: one of `fp32`, `bf16`, `fp8_current_scaling`, `fp8_blockwise`.
        bf16_edge_layers: layers of the pattern at each end that stay in BF16; FP8 only.
        fp8_backend: `te`, `emulate`, or `auto` (Transformer Engine where a GPU is visible).
        gradients: dtype of their sums over micro-batches and data-parallel ranks, `fp32` or `bf16`; `fp32` weights
            have theirs in float32.
    Errors:
        UserError: there is no plugin, backend or dtype of this name; names the nearest.
    """
    for value, known, key in (
        (name, PRECISIONS, "precision"),
        (fp8_backend, FP8_BACKENDS, "fp8_backend"),
        (gradients, STATE_DTYPES, "gradients"),
    ):
        check_one_of(key, value, known)
    if name in FP8:
        emulate = fp8_backend == "emulate" or (fp8_backend == "auto" and not torch.cuda.is_available())
        made = fp8(name, bf16_edge_layers, emulate)
    else:
        made = bf16() if name == "bf16" else fp32()
    made.recipe = name
    made.dtype_config.grad_reduce_in_fp32 = gradients == "fp32" or name == "fp32"
    return made
