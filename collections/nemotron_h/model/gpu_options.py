"""Megatron's and Transformer Engine's options for speed and memory on GPUs: which are on, and why.

All are off where no GPU is visible or Transformer Engine does not import. Any of them can be set by hand:
`model.config.NAME=...`. What depends on the layout is chosen by `training.strategy`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Setting:
    """Value of an option with GPU kernels and without, and the reason."""

    with_kernels: bool | str
    without: bool | str
    reason: str


#: fields of `NemotronHConfig`
SETTINGS: dict[str, Setting] = {
    "fuse_weight_gradients": Setting(
        True,
        False,
        "the linear layers add weight gradients to the float32 gradient buffer inside the product: no bfloat16 copy "
        "and no pass that adds it (14 bytes of traffic per parameter and micro-batch become 8)",
    ),
    "gradient_accumulation_fusion": Setting(
        True,
        False,
        "the same for megatron-core's own layers: the output layer (`platform.megatron_fixes`, without Apex) and "
        "the embedding, whose gradient is then the rows that the batch has in place of the whole vocabulary's",
    ),
    "cross_entropy_loss_fusion": Setting(
        True, False, "the loss in one pass over the logits' own memory, with no float32 copy of tokens x vocabulary"
    ),
    "cross_entropy_fusion_impl": Setting("te", "native", "Transformer Engine's; megatron-core's makes that copy"),
    "bias_dropout_fusion": Setting(
        False, False, "no biases and no dropout (paper 2.1): what is left is one addition, already one kernel"
    ),
    "bias_activation_fusion": Setting(False, False, "no biases; the squared ReLU is Transformer Engine's kernel"),
    "masked_softmax_fusion": Setting(False, False, "cuDNN's attention never forms the scores that it would fuse"),
    "deallocate_pipeline_outputs": Setting(True, False, "frees what a pipeline stage has sent; the CPU path reads it"),
    "tp_comm_overlap": Setting(
        False, False, "user buffers use NVLink multicast, which shared hosts switch off; switch it on where it may run"
    ),
    "use_te_rng_tracker": Setting(False, False, "only CUDA graphs need it"),
    "cuda_graph_impl": Setting(
        "none", "none", "at 8,192 tokens of 8B width a step is bound by kernels, not by launching them"
    ),
}


@functools.cache
def has_kernels() -> bool:
    """Tell whether a GPU is visible and Transformer Engine imports."""
    if not torch.cuda.is_available():
        return False
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return HAVE_TE


def default(name: str) -> Callable[[], bool | str]:
    """Return a field's default factory, which decides where the run starts, not where it is described."""

    def choose() -> bool | str:
        setting = SETTINGS[name]
        return setting.with_kernels if has_kernels() else setting.without

    return choose
