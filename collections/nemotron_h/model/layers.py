"""The stack of layers on Megatron's parallel layers, with Transformer Engine where a GPU has it."""

from __future__ import annotations

import contextlib
import copy

import torch
from megatron.core.extensions import transformer_engine as te
from megatron.core.fp8_utils import get_fp8_context, is_first_last_bf16_layer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.mamba_block import MambaStack
from megatron.core.tensor_parallel import checkpoint
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.utils import make_viewless_tensor
from torch import Tensor, nn

from nemotron_h.architecture.definition import pipeline_layers
from nemotron_h.model.blocks.registry import running_layers
from nemotron_h.model.blocks.running import InitialWeights, Parts, Running, Surroundings
from nemotron_h.model.core_attention import Documents, ScaledDotProductAttention, engine_attention
from nemotron_h.model.host_inputs import HostInputs
from nemotron_h.model.megatron_layers import (
    CpuColumnParallelLinear,
    CpuDuplicatedLinear,
    CpuMatmul,
    CpuRowParallelLinear,
    RMSNorm,
    has_kernels,
)
from nemotron_h.schema.nemo_names import MODEL


class NemotronHStack(MambaStack):
    """The blocks of a model, or of a pipeline stage of it, and the final norm.

    megatron-core's stack knows three letters, gives all layers one width and every stage `num_layers // stages` of
    them; of it stay the checkpoint's layout and the interface to pipeline schedules.

    Attributes:
        running: how each of the layers runs.
        taps: number of a layer -> its output [sequence, batch, hidden] of the last pass, of layers that are in it.
        host_inputs: inputs of recomputed layers, in host memory; None where they stay on the device.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: Parts,
        pre_process: bool = True,
        post_process: bool = True,
        pg_collection: ProcessGroupCollection | None = None,
        **_: object,
    ) -> None:
        MegatronModule.__init__(self, config=config)
        self.pre_process, self.post_process, self.post_layer_norm = pre_process, post_process, True
        self.pp_group, self.input_tensor = pg_collection.pp, None
        self.taps: dict[int, Tensor | None] = {}
        self.host_inputs = HostInputs() if config.recompute_offload else None
        stage = pipeline_layers(config.num_layers, self.pp_group.size())[self.pp_group.rank()]
        self.running: list[Running] = running_layers(config.definition())[stage.start : stage.stop]
        # Only the stack's layers: emulated FP8 has no such matmul, the output layer, built after it, is never FP8
        before = config.gradient_accumulation_fusion
        config.gradient_accumulation_fusion = config.fuse_weight_gradients and not config.fp8_emulation
        layers = zip(stage, self.running, strict=True)
        self.layers = nn.ModuleList(
            self._build(number, running, submodules, pg_collection) for number, running in layers
        )
        config.gradient_accumulation_fusion = before
        self.num_layers_per_pipeline_rank = len(self.layers)
        if post_process:
            norm = te.TENorm if has_kernels() else RMSNorm
            self.final_norm = norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

    def _build(self, number: int, running: Running, parts: Parts, groups: ProcessGroupCollection) -> nn.Module:
        """Return Megatron's layer of this number."""
        config = layer_config(self.config, number)
        with get_fp8_context(self.config, number, is_init=True):
            layer = build_module(
                running.layer_spec(parts), config=config, layer_number=number + 1, pg_collection=groups
            )
        layer.layer_number = number + 1  # transformer layers derive theirs from an even split
        if config.fp8_emulation and not is_first_last_bf16_layer(config, number):
            for module in layer.modules():
                if isinstance(module, CpuMatmul):
                    module.fp8_emulation = config.fp8_emulation
        running.prepare_layer(layer, config)
        return layer

    def initialize(self, weights: InitialWeights) -> None:
        """Set the initial weights of every layer."""
        for layer, running in zip(self.layers, self.running, strict=True):
            running.initialize(layer, f"layers.{layer.layer_number - 1}", weights)

    def _run_layer(
        self, layer: MegatronModule, running: Running, hidden_states: Tensor, around: Surroundings
    ) -> Tensor:
        """Return a layer's output, kept or to be recomputed.

        What a layer runs under (its precision) is entered inside `run`, so that the second run is under it too.
        """

        def run(hidden: Tensor) -> Tensor:
            with get_fp8_context(self.config, layer.layer_number - 1):  # none where the layer is BF16
                return running.forward(layer, hidden, around)

        recomputed = getattr(self.config, f"recompute_{running.kind.name}", "none") == "layer"
        if self.training and torch.is_grad_enabled() and recomputed:
            with contextlib.nullcontext() if self.host_inputs is None else self.host_inputs.saving():
                return checkpoint(run, False, hidden_states)
        return run(hidden_states)

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        loss_count: Tensor | None = None,
        **_: object,
    ) -> Tensor:
        """Return [sequence, batch, hidden] after this stage's layers.

        Args:
            hidden_states: the embeddings; ignored on later pipeline stages, which read `input_tensor`.
            attention_mask: None; derived from `seq_idx`.
            seq_idx: int32 [batch, sequence], the document of each token of whole rows, or None for one per row.
            rotary_pos_emb: angles [sequence, batch or 1, 1, channels] of this context-parallel rank's tokens, or None.
            loss_count: as `NemotronHMegatronModel.forward`.
        """
        if not self.pre_process:
            hidden_states = self.input_tensor
        documents = None if seq_idx is None else Documents.of(seq_idx)
        around = Surroundings(documents, seq_idx, rotary_pos_emb, loss_count)
        if self.host_inputs is not None:
            self.host_inputs.begin_pass()
        for layer, running in zip(self.layers, self.running, strict=True):
            hidden_states = self._run_layer(layer, running, hidden_states, around)
            if layer.layer_number - 1 in self.taps:
                self.taps[layer.layer_number - 1] = hidden_states
        if self.post_process:
            hidden_states = self.final_norm(hidden_states)
        return make_viewless_tensor(inp=hidden_states, requires_grad=hidden_states.requires_grad, keep_graph=True)


def layer_config(config: TransformerConfig, number: int) -> TransformerConfig:
    """Return the configuration of one layer: the model's, with the widths that the layer has of its own."""
    widths = config.overrides.get(number)
    if not widths:
        return config
    own = copy.copy(config)
    for key, value in widths.items():
        setattr(own, MODEL[key], value)
    return own


def stack_spec() -> ModuleSpec:
    """Return the stack for this machine: Transformer Engine's layers where it is installed and a GPU is visible."""
    if has_kernels():
        parts = Parts(
            te.TELayerNormColumnParallelLinear,
            te.TERowParallelLinear,
            engine_attention(),
            norm=None,
            plain_column=te.TEColumnParallelLinear,
            shared_norm=te.TENorm,
            grouped=(te.TEColumnParallelGroupedLinear, te.TERowParallelGroupedLinear),
            duplicated=te.TELinear,
        )
        return ModuleSpec(module=NemotronHStack, submodules=parts)
    return plain_stack_spec()


def plain_stack_spec() -> ModuleSpec:
    """Return the stack in PyTorch's operations; also the one that emulates FP8."""
    parts = Parts(
        CpuColumnParallelLinear,
        CpuRowParallelLinear,
        ScaledDotProductAttention,
        norm=RMSNorm,
        duplicated=CpuDuplicatedLinear,
    )
    return ModuleSpec(module=NemotronHStack, submodules=parts)
