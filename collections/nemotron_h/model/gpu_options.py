"""Options of Megatron and Transformer Engine that depend on having GPU kernels: each with its values and the reason."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nemotron_h.model.megatron_layers import has_kernels


@dataclass(frozen=True)
class GpuOption:
    """Option of Megatron or Transformer Engine for speed or memory: its value with GPU kernels, without, and why.

    Any can be set by hand: `model.config.NAME=...`. What depends on the layout is chosen by `training.strategy`.
    """

    with_kernels: bool | str
    without: bool | str
    reason: str


#: fields of `NemotronHConfig`
GPU_OPTIONS: dict[str, GpuOption] = {
    "fuse_weight_gradients": GpuOption(
        True,
        False,
        "the linear layers add weight gradients to the float32 gradient buffer inside the matmul: no bfloat16 copy "
        "and no pass that adds it (14 bytes of traffic per parameter and micro-batch become 8)",
    ),
    "gradient_accumulation_fusion": GpuOption(
        True,
        False,
        "the same for megatron-core's own layers: the output layer (`platform.megatron_fixes`, without Apex) and "
        "the embedding, whose gradient is then the rows that the batch has in place of the whole vocabulary's",
    ),
    "cross_entropy_loss_fusion": GpuOption(
        True, False, "the loss in one pass over the logits' own memory, with no float32 copy of tokens x vocabulary"
    ),
    "cross_entropy_fusion_impl": GpuOption("te", "native", "Transformer Engine's; megatron-core's makes that copy"),
    "bias_dropout_fusion": GpuOption(
        False, False, "no biases and no dropout (paper 2.1): what is left is one addition, already one kernel"
    ),
    "bias_activation_fusion": GpuOption(False, False, "no biases; the squared ReLU is Transformer Engine's kernel"),
    "moe_permute_fusion": GpuOption(
        True,
        False,
        "tokens to experts and back in one kernel each, whose sums have one order: steps repeat bit for bit",
    ),
    "masked_softmax_fusion": GpuOption(False, False, "cuDNN's attention never forms the scores that it would fuse"),
    "deallocate_pipeline_outputs": GpuOption(
        True, False, "frees what a pipeline stage has sent; the CPU path reads it"
    ),
    "tp_comm_overlap": GpuOption(
        False, False, "user buffers use NVLink multicast, which shared hosts switch off; switch it on where it may run"
    ),
    "use_te_rng_tracker": GpuOption(False, False, "only CUDA graphs need it"),
    "cuda_graph_impl": GpuOption(
        "none", "none", "at 8,192 tokens of 8B width a step is bound by kernels, not by launching them"
    ),
}


def gpu_option(name: str) -> Any:
    """Return a field whose default is chosen where the run starts, not where it is described."""

    def choose() -> bool | str:
        option = GPU_OPTIONS[name]
        return option.with_kernels if has_kernels() else option.without

    return field(default_factory=choose)
