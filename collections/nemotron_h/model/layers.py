"""The layer stack on Megatron's parallel layers, with Transformer Engine where a GPU has it."""

from __future__ import annotations

import torch
from megatron.core.extensions import transformer_engine as te
from megatron.core.fp8_utils import get_fp8_context, is_first_last_bf16_layer
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.ssm.mamba_block import MambaStack, MambaStackSubmodules
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    checkpoint,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from megatron.core.utils import make_viewless_tensor
from torch import Tensor, nn

from nemotron_h.architecture.definition import pipeline_layers
from nemotron_h.model.attention import Documents, ScaledDotProductAttention, engine_attention
from nemotron_h.model.gpu_options import has_kernels
from nemotron_h.model.mixer import NemotronHMixer
from nemotron_h.ops import linear
from nemotron_h.ops.norm import rms_norm
from nemotron_h.precision.emulation import fp8_linear


class RMSNorm(nn.Module):
    """RMSNorm over the last axis, float32 inside (`nemotron_h.ops.norm`).

    Marks its weight for the gradient reduction that sequence parallelism needs, which megatron-core's wrapper of
    torch's norm refuses.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        device = torch.device("cpu") if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` [..., hidden_size]; same shape and dtype."""
        return rms_norm(x, self.weight, eps=self.eps)


class _CpuProduct:
    """Multiply with `nemotron_h.ops.linear` where it applies and Megatron asks for nothing beyond the product.

    `fp8_emulation` names the FP8 recipe to emulate instead; the stack sets it in the layers that are not BF16.
    """

    fp8_emulation: str | None = None

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: object, **kwargs: object) -> Tensor:
        if self.fp8_emulation is not None:
            return self._fp8_product(input, weight, **kwargs)
        extras = ("bias", "gradient_accumulation_fusion", "allreduce_dgrad", "sequence_parallel", "grad_output_buffer")
        plain = not args and all(kwargs[name] is None or kwargs[name] is False for name in extras)
        if plain and linear.takes(input, weight):
            return linear.linear(input, weight)
        if not weight.requires_grad:
            # torch multiplies each row with a copy of the weight unless its strides say that they follow on each other,
            # which those of a transposed [1, sequence] do not
            input = input.flatten().view(input.shape)
        return super()._forward_impl(input, weight, *args, **kwargs)

    def _fp8_product(
        self, input: Tensor, weight: Tensor, *, allreduce_dgrad: bool, sequence_parallel: bool, **_: object
    ) -> Tensor:
        """Quantises what the ranks gathered: its amax is their largest, which Transformer Engine reduces likewise."""
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, group=self.tp_group)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=self.tp_group)
        return fp8_linear(input, weight, self.fp8_emulation)


class CpuColumnParallelLinear(_CpuProduct, ColumnParallelLinear):
    """megatron-core's, faster on the CPU."""


class CpuRowParallelLinear(_CpuProduct, RowParallelLinear):
    """megatron-core's, faster on the CPU."""


class NemotronHMambaLayer(MambaLayer):
    """megatron-core's Mamba layer (norm, mixer, residual) that also hands `seq_idx` to the mixer."""

    def forward(self, hidden_states: Tensor, seq_idx: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """[sequence, batch, hidden] to the same."""
        residual = hidden_states
        out = self.mixer(self.norm(hidden_states.to(self.config.params_dtype)), seq_idx=seq_idx)
        add = self.mamba_bda(training=self.training, fused=self.config.bias_dropout_fusion)
        return add(out, residual, self.hidden_dropout)


class RecomputingMLP(MLP):
    """megatron-core's FFN that computes its activation again in the backward pass instead of keeping it."""

    def forward(self, hidden_states: Tensor, per_token_scale: None = None) -> tuple[Tensor, Tensor | None]:
        """[sequence, batch, hidden] to the same, and the output projection's bias (None)."""
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(hidden_states, per_token_scale)
        inner, _ = self.linear_fc1(hidden_states)
        again = CheckpointWithoutOutput(fp8=None)  # the activation has no FP8 state; `False` would be taken as true
        activated = again.checkpoint(self.activation_func, inner)
        out, bias = self.linear_fc2(activated)
        again.discard_output_and_register_recompute(out)
        return out, bias


class NemotronHStack(MambaStack):
    """megatron-core's hybrid stack with own weights' initialisation, uneven pipeline stages and `seq_idx`.

    megatron-core 0.15 gives every stage `num_layers // stages` layers, and so drops the remainder.

    Attributes:
        taps: number of a layer -> its output [sequence, batch, hidden] of the last pass, of layers that are in it.
    """

    def __init__(self, config: TransformerConfig, submodules: MambaStackSubmodules, **kwargs: object) -> None:
        post_process = bool(kwargs.get("post_process", True))
        # Only the stack's layers: emulated FP8 has no such product, the output layer, built after it, is never FP8
        before = config.gradient_accumulation_fusion
        config.gradient_accumulation_fusion = config.fuse_weight_gradients and not config.fp8_emulation
        super().__init__(config, submodules, **{**kwargs, "post_layer_norm": False})
        config.gradient_accumulation_fusion = before
        self.post_layer_norm = True
        self.taps: dict[int, Tensor | None] = {}
        offset = pipeline_layers(config.num_layers, self.pp_group.size())[self.pp_group.rank()].start
        for index, layer in enumerate(self.layers):
            # Transformer layers derive their number from an even split
            layer.layer_number = offset + index + 1
            if config.fp8_emulation and not is_first_last_bf16_layer(config, offset + index):
                for module in layer.modules():
                    if isinstance(module, _CpuProduct):
                        module.fp8_emulation = config.fp8_emulation
            if isinstance(layer, MLPLayer) and config.recompute_ffn == "activation":
                # megatron-core's layer builds no MLP but its own; the class adds no state
                layer.mlp.__class__ = RecomputingMLP
        if post_process:
            norm = te.TENorm if has_kernels() else RMSNorm
            self.final_norm = norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

    def _select_layers_for_pipeline_parallel(self, layer_type_list: list[str]) -> tuple[int, list[str]]:
        layers = pipeline_layers(len(layer_type_list), self.pp_group.size())[self.pp_group.rank()]
        return layers.start, layer_type_list[layers.start : layers.stop]

    def _recomputed(self, layer: MegatronModule) -> bool:
        """Whether the backward pass computes this layer again from its input."""
        if isinstance(layer, NemotronHMambaLayer):
            return self.config.recompute_mamba == "layer"
        config = self.config
        return (config.recompute_ffn if isinstance(layer, MLPLayer) else config.recompute_attention) == "layer"

    def _run_layer(
        self,
        layer: MegatronModule,
        hidden_states: Tensor,
        documents: Documents | None,
        seq_idx: Tensor | None,
        rotary: Tensor | None,
    ) -> Tensor:
        """One layer, kept or to be recomputed. What a layer runs under (its precision) is entered inside `run`, so
        that the second run is under it too.
        """

        def run(hidden: Tensor) -> Tensor:
            with get_fp8_context(self.config, layer.layer_number - 1):  # none where the layer is BF16
                if isinstance(layer, NemotronHMambaLayer):
                    return layer(hidden, seq_idx=seq_idx)
                return layer(hidden_states=hidden, attention_mask=documents, rotary_pos_emb=rotary)[0]

        if self.training and torch.is_grad_enabled() and self._recomputed(layer):
            return checkpoint(run, False, hidden_states)
        return run(hidden_states)

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        **_: object,
    ) -> Tensor:
        """[sequence, batch, hidden] through this stage's layers.

        Args:
            hidden_states: the embeddings; ignored on later pipeline stages, which read `input_tensor`.
            attention_mask: None; derived from `seq_idx`.
            seq_idx: int32 [batch, sequence], the document of each token, or None for one document per row.
            rotary_pos_emb: angles [sequence, 1, 1, channels] for the attention layers, or None.
        """
        if not self.pre_process:
            hidden_states = self.input_tensor
        documents = None if seq_idx is None else Documents.of(seq_idx)
        for layer in self.layers:
            hidden_states = self._run_layer(layer, hidden_states, documents, seq_idx, rotary_pos_emb)
            if layer.layer_number - 1 in self.taps:
                self.taps[layer.layer_number - 1] = hidden_states
        if self.post_process:
            hidden_states = self.final_norm(hidden_states)
        return make_viewless_tensor(inp=hidden_states, requires_grad=hidden_states.requires_grad, keep_graph=True)


def _stack(column: type, row: type, attention: type, norm: type | None) -> ModuleSpec:
    """The stack's classes; `norm` is None where the column-parallel layer normalises its own input."""
    own_norm = {} if norm is None else {"norm": norm}
    return ModuleSpec(
        module=NemotronHStack,
        submodules=MambaStackSubmodules(
            mamba_layer=ModuleSpec(
                module=NemotronHMambaLayer,
                submodules=MambaLayerSubmodules(
                    mixer=ModuleSpec(
                        module=NemotronHMixer, submodules=MambaMixerSubmodules(in_proj=column, out_proj=row)
                    ),
                    mamba_bda=get_bias_dropout_add,
                    **own_norm,
                ),
            ),
            attention_layer=ModuleSpec(
                module=TransformerLayer,
                submodules=TransformerLayerSubmodules(
                    self_attention=ModuleSpec(
                        module=SelfAttention,
                        params={"attn_mask_type": AttnMaskType.causal},
                        submodules=SelfAttentionSubmodules(
                            linear_qkv=column, core_attention=attention, linear_proj=row
                        ),
                    ),
                    self_attn_bda=get_bias_dropout_add,
                    **({} if norm is None else {"input_layernorm": norm}),
                ),
            ),
            mlp_layer=ModuleSpec(
                module=MLPLayer,
                submodules=TransformerLayerSubmodules(
                    mlp=ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row)),
                    mlp_bda=get_bias_dropout_add,
                    **({} if norm is None else {"pre_mlp_layernorm": norm}),
                ),
            ),
        ),
    )


def stack_spec() -> ModuleSpec:
    """The stack for this machine: Transformer Engine's layers where it is installed and a GPU is visible."""
    if has_kernels():
        return _stack(te.TELayerNormColumnParallelLinear, te.TERowParallelLinear, engine_attention(), norm=None)
    return plain_stack_spec()


def plain_stack_spec() -> ModuleSpec:
    """The stack in PyTorch's operations; also the one that emulates FP8."""
    return _stack(CpuColumnParallelLinear, CpuRowParallelLinear, ScaledDotProductAttention, norm=RMSNorm)
