"""The model as NeMo and Lightning see it: configuration, Megatron module, Lightning module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.mamba import MambaModel as MegatronMambaModel
from megatron.core.transformer.attention import SelfAttention
from nemo.collections.llm import MambaModel, SSMConfig
from nemo.collections.llm.gpt.model.base import get_batch_on_this_cp_rank
from nemo.lightning import get_vocab_size
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nemotron_h.errors import UserError
from nemotron_h.model import init
from nemotron_h.model.definition import ATTENTION, FFN, MAMBA, Expect, ModelDefinition
from nemotron_h.model.layers import CpuColumnParallelLinear, NemotronHMambaLayer, stack_spec
from nemotron_h.model.mixer import NemotronHMixer
from nemotron_h.ops.cross_entropy import vocabulary_cross_entropy


class _SquaredReLU(torch.autograd.Function):
    """One pass each way, and one saved tensor; autograd of the two operations takes four passes more."""

    @staticmethod
    def forward(ctx, x):
        positive = torch.relu(x)
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (positive,) = ctx.saved_tensors
        return torch.addcmul(positive.new_zeros(()), dy, positive, value=2)


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2, the FFN's activation (paper 2.1). Named, so that configurations can be saved."""
    return _SquaredReLU.apply(x)


def data_step(dataloader_iter: Any, use_mtp: bool = False) -> dict[str, Any]:
    """Take the next micro-batch and keep what this pipeline stage needs."""
    batch = next(dataloader_iter)
    if isinstance(batch, tuple) and len(batch) == 3:
        batch = batch[0]
    needed = {"seq_idx"}
    if parallel_state.is_pipeline_first_stage():
        needed |= {"tokens", "position_ids"}
    if parallel_state.is_pipeline_last_stage():
        needed |= {"labels", "loss_mask"}
    moved = {key: value.cuda(non_blocking=True) if key in needed else None for key, value in batch.items()}
    return get_batch_on_this_cp_rank(moved)


def forward_step(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """One forward pass: per-token losses where labels are present, logits otherwise."""
    return model(
        input_ids=batch["tokens"],
        position_ids=batch["position_ids"],
        attention_mask=None,
        labels=batch.get("labels"),
        seq_idx=batch.get("seq_idx"),
    )


class NemotronHMegatronModel(MegatronMambaModel):
    """megatron-core's Mamba model with layout-independent initial weights and document boundaries."""

    def __init__(self, config: NemotronHConfig, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        if self.post_process and config.use_cpu_initialization:
            # megatron-core builds this layer itself; the class adds no state, only how it multiplies
            self.output_layer.__class__ = CpuColumnParallelLinear

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: None = None,
        labels: Tensor | None = None,
        seq_idx: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Embed, run the stack, and score.

        Args:
            input_ids: int [batch, sequence].
            position_ids: unused, the model has no positions (paper 2.1).
            attention_mask: must be None; attention is causal, within documents where `seq_idx` is given.
            labels: int [batch, sequence], or None for logits.
            seq_idx: int32 [batch, sequence], the document of each token, or None.
        Returns:
            losses [batch, sequence] with labels, logits [batch, sequence, vocabulary shard] without, hidden states
            [sequence, batch, hidden] on a pipeline stage that is not the last.
        """
        if attention_mask is not None:
            raise ValueError("Nemotron-H derives its attention mask from seq_idx; pass attention_mask=None")
        embedded = self.embedding(input_ids=input_ids, position_ids=position_ids) if self.pre_process else None
        hidden = self.decoder(embedded, seq_idx=seq_idx)
        if not self.post_process:
            return hidden
        logits, _ = self.output_layer(hidden)
        if labels is None:
            return logits.transpose(0, 1).contiguous()
        if logits.device.type == "cpu":
            losses = vocabulary_cross_entropy(logits, labels.transpose(0, 1), self.pg_collection.tp)
            return losses.transpose(0, 1).contiguous()
        return self.compute_language_model_loss(labels, logits)

    def initialize(self, seed: int) -> None:
        """Draw every weight from (seed, its global name): the same model whatever the parallel layout."""
        config = self.config
        std = config.init_method_std
        shard = {
            "seed": seed,
            "tp_rank": parallel_state.get_tensor_model_parallel_rank(),
            "tp_size": parallel_state.get_tensor_model_parallel_world_size(),
        }
        weight, residual = init.normal(std), init.normal(std / config.num_layers**0.5)
        if self.pre_process:
            init.fill(self.embedding.word_embeddings.weight, "embedding", weight, axis=0, **shard)
        if self.post_process:
            init.fill(self.output_layer.weight, "output_layer", weight, axis=0, **shard)
        for layer in self.decoder.layers:
            name = f"layers.{layer.layer_number - 1}"
            if isinstance(layer, NemotronHMambaLayer):
                mixer: NemotronHMixer = layer.mixer
                mixer.initialize(f"{name}.mixer", seed)
            elif isinstance(layer.self_attention, SelfAttention):
                init.fill(layer.self_attention.linear_qkv.weight, f"{name}.linear_qkv", weight, axis=0, **shard)
                init.fill(layer.self_attention.linear_proj.weight, f"{name}.linear_proj", residual, axis=1, **shard)
            else:
                init.fill(layer.mlp.linear_fc1.weight, f"{name}.linear_fc1", weight, axis=0, **shard)
                init.fill(layer.mlp.linear_fc2.weight, f"{name}.linear_fc2", residual, axis=1, **shard)


@dataclass
class NemotronHConfig(SSMConfig):
    """NeMo's SSM configuration with the family's shared choices (paper 2.1) and what a CPU cannot fuse.

    Attributes beyond NeMo's:
        definition_name: the model definition that the numbers come from.
        vocab_size: the vocabulary of the tokenizer, before padding.
        conv_kernel: window of the causal convolution.
        init_seed: seed of the initial weights.
    """

    definition_name: str = ""
    vocab_size: int = 0
    conv_kernel: int = 4
    init_seed: int = 1234

    normalization: str = "RMSNorm"
    position_embedding_type: str = "none"
    add_bias_linear: bool = False
    gated_linear_unit: bool = False
    share_embeddings_and_output_weights: bool = False
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_func: Callable = squared_relu
    is_hybrid_model: bool = True
    attention_backend: Any = "auto"
    mamba_stack_spec: Callable = stack_spec
    forward_step_fn: Callable = forward_step
    data_step_fn: Callable = data_step
    # Fusions are kernels for GPUs; the builder of recipes switches them on where they run.
    gradient_accumulation_fusion: bool = False
    bias_dropout_fusion: bool = False
    bias_activation_fusion: bool = False
    masked_softmax_fusion: bool = False
    apply_rope_fusion: bool = False
    cross_entropy_loss_fusion: bool = False
    deallocate_pipeline_outputs: bool = False
    use_cpu_initialization: bool = field(default_factory=lambda: not torch.cuda.is_available())

    def __post_init__(self) -> None:
        if isinstance(self.attention_backend, str):
            from megatron.core.transformer.enums import AttnBackend

            self.attention_backend = AttnBackend[self.attention_backend]
        if self.hybrid_override_pattern:
            self.num_layers = len(self.hybrid_override_pattern)
        super().__post_init__()

    def definition(self) -> ModelDefinition:
        """The definition that these numbers make, without its `expect`."""
        pattern = self.hybrid_override_pattern
        return ModelDefinition(
            name=self.definition_name,
            pattern=pattern,
            hidden_size=self.hidden_size,
            ffn_hidden_size=self.ffn_hidden_size,
            num_attention_heads=self.num_attention_heads,
            num_query_groups=self.num_query_groups,
            head_dim=self.kv_channels,
            mamba_num_heads=self.mamba_num_heads,
            mamba_head_dim=self.mamba_head_dim,
            mamba_num_groups=self.mamba_num_groups,
            mamba_state_dim=self.mamba_state_dim,
            vocab_size=self.vocab_size,
            conv_kernel=self.conv_kernel,
            norm_epsilon=self.layernorm_epsilon,
            init_std=self.init_method_std,
            expect=Expect(pattern.count(MAMBA), pattern.count(ATTENTION), pattern.count(FFN), 0),
        )

    def configure_model(
        self, tokenizer: Any, pre_process: bool | None = None, post_process: bool | None = None, vp_stage: Any = None
    ) -> NemotronHMegatronModel:
        """Build this rank's part of the model.

        Errors:
            UserError: the tokenizer's vocabulary is larger than the model's.
        """
        if tokenizer is not None and tokenizer.vocab_size != self.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size:,} tokens, {self.definition_name} has a vocabulary of "
                f"{self.vocab_size:,}",
                hint="choose a blend that was prepared with the model's tokenizer, or change model.vocab_size",
            )
        model = NemotronHMegatronModel(
            self,
            mamba_stack_spec=self.mamba_stack_spec(),
            vocab_size=get_vocab_size(self, self.vocab_size, self.make_vocab_size_divisible_by),
            max_sequence_length=self.seq_length,
            hybrid_override_pattern=self.hybrid_override_pattern,
            position_embedding_type=self.position_embedding_type,
            pre_process=parallel_state.is_pipeline_first_stage() if pre_process is None else pre_process,
            post_process=parallel_state.is_pipeline_last_stage() if post_process is None else post_process,
        )
        model.initialize(self.init_seed)
        return model


class NemotronHModel(MambaModel):
    """The Lightning module; NeMo's, over `NemotronHConfig`."""

    def __init__(
        self,
        config: NemotronHConfig,
        optim: Any = None,
        tokenizer: Any = None,
        model_transform: Callable[[nn.Module], nn.Module] | None = None,
    ) -> None:
        super().__init__(config, optim=optim, tokenizer=tokenizer, model_transform=model_transform)

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: None = None,
        labels: Tensor | None = None,
        seq_idx: Tensor | None = None,
    ) -> Tensor:
        """As `NemotronHMegatronModel.forward`."""
        return self.module(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            labels=labels,
            seq_idx=seq_idx,
        )
