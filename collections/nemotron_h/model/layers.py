"""The layer stack on Megatron's parallel layers, with Transformer Engine where a GPU has it."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from megatron.core.extensions import transformer_engine as te
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.ssm.mamba_block import MambaStack, MambaStackSubmodules
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from megatron.core.utils import make_viewless_tensor
from torch import Tensor, nn

from nemotron_h.model.mixer import NemotronHMixer
from nemotron_h.ops import linear
from nemotron_h.ops.norm import rms_norm


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
    """Multiply with `nemotron_h.ops.linear` where it applies and Megatron asks for nothing beyond the product."""

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: object, **kwargs: object) -> Tensor:
        extras = ("bias", "gradient_accumulation_fusion", "allreduce_dgrad", "sequence_parallel", "grad_output_buffer")
        plain = not args and all(kwargs[name] is None or kwargs[name] is False for name in extras)
        if plain and linear.takes(input, weight):
            return linear.linear(input, weight)
        return super()._forward_impl(input, weight, *args, **kwargs)


class CpuColumnParallelLinear(_CpuProduct, ColumnParallelLinear):
    """megatron-core's, faster in float32 on the CPU."""


class CpuRowParallelLinear(_CpuProduct, RowParallelLinear):
    """megatron-core's, faster in float32 on the CPU."""


class ScaledDotProductAttention(MegatronModule):
    """Causal grouped-query attention by torch's fused kernel, which never forms the [sequence, sequence] scores.

    megatron-core's own `DotProductAttention` does form them; Transformer Engine's needs a GPU.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, attn_mask_type: AttnMaskType, **_: object) -> None:
        super().__init__(config)
        self.layer_number = layer_number

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: object) -> Tensor:
        """Attend within each sequence.

        Args:
            query: [sequence, batch, heads, head_dim].
            key, value: [sequence, batch, query_groups, head_dim].
            attention_mask: bool [batch, 1, sequence, sequence], True where attention is allowed; None for plain causal.
        Returns:
            [sequence, batch, heads * head_dim].
        """
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=attention_mask, is_causal=attention_mask is None, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out.permute(2, 0, 1, 3).flatten(2)


def document_mask(seq_idx: Tensor) -> Tensor:
    """Where attention is allowed, bool [batch, 1, sequence, sequence], from documents, int [batch, sequence]."""
    same = seq_idx[:, :, None] == seq_idx[:, None, :]
    return same.tril().unsqueeze(1)


class NemotronHMambaLayer(MambaLayer):
    """megatron-core's Mamba layer (norm, mixer, residual) that also hands `seq_idx` to the mixer."""

    def forward(self, hidden_states: Tensor, seq_idx: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """[sequence, batch, hidden] to the same."""
        residual = hidden_states
        out = self.mixer(self.norm(hidden_states.to(self.config.params_dtype)), seq_idx=seq_idx)
        add = self.mamba_bda(training=self.training, fused=self.config.bias_dropout_fusion)
        return add(out, residual, self.hidden_dropout)


def pipeline_layers(num_layers: int, stages: int) -> list[range]:
    """Layers of each pipeline stage: contiguous, sizes differing by one at most, larger stages first."""
    size, extra = divmod(num_layers, stages)
    starts = [stage * size + min(stage, extra) for stage in range(stages + 1)]
    return [range(a, b) for a, b in pairwise(starts)]


class NemotronHStack(MambaStack):
    """megatron-core's hybrid stack with own weights' initialisation, uneven pipeline stages and `seq_idx`.

    megatron-core 0.15 gives every stage `num_layers // stages` layers, and so drops the remainder.
    """

    def __init__(self, config: TransformerConfig, submodules: MambaStackSubmodules, **kwargs: object) -> None:
        post_process = bool(kwargs.get("post_process", True))
        super().__init__(config, submodules, **{**kwargs, "post_layer_norm": False})
        self.post_layer_norm = True
        offset = pipeline_layers(config.num_layers, self.pp_group.size())[self.pp_group.rank()].start
        for index, layer in enumerate(self.layers):
            # Transformer layers derive their number from an even split
            layer.layer_number = offset + index + 1
        if post_process:
            norm = te.TENorm if te.HAVE_TE else RMSNorm
            self.final_norm = norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

    def _select_layers_for_pipeline_parallel(self, layer_type_list: list[str]) -> tuple[int, list[str]]:
        layers = pipeline_layers(len(layer_type_list), self.pp_group.size())[self.pp_group.rank()]
        return layers.start, layer_type_list[layers.start : layers.stop]

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        **_: object,
    ) -> Tensor:
        """[sequence, batch, hidden] through this stage's layers.

        Args:
            hidden_states: the embeddings; ignored on later pipeline stages, which read `input_tensor`.
            attention_mask: None; derived from `seq_idx`.
            seq_idx: int32 [batch, sequence], the document of each token, or None for one document per row.
        """
        if not self.pre_process:
            hidden_states = self.input_tensor
        mask = None if seq_idx is None else document_mask(seq_idx)
        for layer in self.layers:
            if isinstance(layer, NemotronHMambaLayer):
                hidden_states = layer(hidden_states, seq_idx=seq_idx)
            else:
                hidden_states, _ = layer(hidden_states=hidden_states, attention_mask=mask)
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
    if te.HAVE_TE and torch.cuda.is_available():
        return _stack(te.TELayerNormColumnParallelLinear, te.TERowParallelLinear, te.TEDotProductAttention, norm=None)
    return _stack(CpuColumnParallelLinear, CpuRowParallelLinear, ScaledDotProductAttention, norm=RMSNorm)
