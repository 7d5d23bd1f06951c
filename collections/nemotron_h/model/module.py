"""The model as NeMo and Lightning see it: configuration, Megatron module, Lightning module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from megatron.core import parallel_state
from megatron.core.models.mamba import MambaModel as MegatronMambaModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from nemo.collections.llm import MambaModel, SSMConfig
from nemo.lightning import get_vocab_size
from torch import Tensor, nn

from nemotron_h.architecture.adapters import check_adapter
from nemotron_h.architecture.blocks.registry import KINDS
from nemotron_h.architecture.definition import Expect, ModelDefinition
from nemotron_h.architecture.frozen import check_frozen
from nemotron_h.core.errors import UserError
from nemotron_h.data.tokenizer_base import MAX_PADDING
from nemotron_h.model import adapters, init
from nemotron_h.model.blocks.running import InitialWeights
from nemotron_h.model.context_parallel import own_tokens
from nemotron_h.model.core_attention import document_positions
from nemotron_h.model.frozen import freeze
from nemotron_h.model.gpu_options import gpu_option
from nemotron_h.model.layers import plain_stack_spec, stack_spec
from nemotron_h.model.megatron_layers import AccumulatingEmbedding, CpuColumnParallelLinear
from nemotron_h.model.step import TokenLoss, data_step, forward_step
from nemotron_h.model.stored_parts import StoredParts
from nemotron_h.model.vision import Images
from nemotron_h.ops.activation import squared_relu
from nemotron_h.ops.cross_entropy import chunked_cross_entropy, mask_padding, vocabulary_cross_entropy
from nemotron_h.ops.rotary import rotary_frequencies
from nemotron_h.schema.multipliers import MultipliersSchema
from nemotron_h.schema.nemo_names import MODEL, nemo_fields
from nemotron_h.schema.recipe import AdapterSchema
from nemotron_h.schema.vision import ProjectorSchema, VisionSchema


def scaled(x: Tensor, factor: float) -> Tensor:
    """Return activations times a multiplier of the model."""
    return x if factor == 1 else x * factor


class NemotronHMegatronModel(StoredParts, MegatronMambaModel):
    """megatron-core's Mamba model with layout-independent initial weights, document boundaries and adapters."""

    def __init__(self, config: NemotronHConfig, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        definition = config.definition()
        self.scales = definition.scales
        if definition.rope_scaling:  # megatron-core's own scaling has three of its four values fixed
            frequencies = self.rotary_pos_emb.inv_freq
            self.rotary_pos_emb.inv_freq = rotary_frequencies(
                definition.rotary_dim, definition.rope_base, definition.rope_scaling, frequencies.device
            )
        if self.post_process and config.use_cpu_initialization:
            # megatron-core builds this layer itself; the class adds no state, only how it multiplies
            self.output_layer.__class__ = CpuColumnParallelLinear
        self._images: Images | None = None
        if self.pre_process and definition.encoder:
            images = Images(self, kwargs["mamba_stack_spec"].submodules)
            self.vision, self.projector, self._images = images.vision, images.projector, images
        if self.pre_process and config.gradient_accumulation_fusion:
            self.embedding.word_embeddings.__class__ = AccumulatingEmbedding
        self._register_load_state_dict_pre_hook(self._expect_no_extra_state)
        self._register_load_state_dict_pre_hook(self._expect_a_part)

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: None = None,
        labels: Tensor | None = None,
        seq_idx: Tensor | None = None,
        loss_count: Tensor | None = None,
        tiles: Tensor | None = None,
        image_mask: Tensor | None = None,
        loss_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Embed, run the stack, and score.

        Args:
            input_ids: int [batch, sequence], this context-parallel rank's tokens.
            position_ids: unused. Most of the family has no positions (paper 2.1); rotary ones count from where
                `seq_idx` starts a document: scores see differences of positions alone, but a row of 524,288 has
                positions whose angles float32 rounds by 0.03.
            attention_mask: must be None; attention is causal, within documents where `seq_idx` is given.
            labels: int [batch, sequence], or None for logits.
            seq_idx: int32 [batch, sequence], the document of each token of whole rows, or None.
            loss_count: tokens or pairs of the batch that the loss counts, int64: they weigh the balance of experts.
            tiles: uint8 [tiles, 3, pixels, pixels] of all rows' images, in the order of their places; None is none.
            image_mask: bool [batch, sequence], the places of image tokens in whole rows; None is none.
            loss_mask: [batch, sequence], 0 where no loss is asked for: it may be 0 there; None asks for all.
        Returns:
            losses [batch, sequence] with labels, logits [batch, sequence, vocabulary shard] without, hidden states
            [sequence, batch, hidden] on a pipeline stage that is not the last.
        """
        if attention_mask is not None:
            raise ValueError("Nemotron-H derives its attention mask from seq_idx; pass attention_mask=None")
        hidden = self.hidden_states(input_ids, position_ids, seq_idx, loss_count, tiles, image_mask)
        if not self.post_process:
            return hidden
        if labels is not None and self.config.recompute_logits == "chunks":
            of_tokens = labels.transpose(0, 1)  # [s, b]
            options = {"group": self.pg_collection.tp, "words": self.words}
            losses = chunked_cross_entropy(self.whole(hidden), self.output_weight, of_tokens.reshape(-1), **options)
            return losses.view(of_tokens.shape).transpose(0, 1).contiguous()
        asked = self._asked(labels, loss_mask)
        if asked is not None:
            logits, _ = self.output_layer(hidden.flatten(0, 1)[asked, None], weight=self.output_weight)  # [t, 1, v]
            of_asked = labels.t().reshape(-1)[asked, None]
            losses = vocabulary_cross_entropy(mask_padding(logits, self.words), of_asked, self.pg_collection.tp)
            whole = losses.new_zeros(labels.numel()).index_copy(0, asked, losses.squeeze(1))
            return whole.view(labels.t().shape).t().contiguous()
        logits, _ = self.output_layer(hidden, weight=self.output_weight)
        if labels is None:
            return logits.transpose(0, 1).contiguous()
        mask_padding(logits, self.words)
        if logits.device.type == "cpu":
            losses = vocabulary_cross_entropy(logits, labels.transpose(0, 1), self.pg_collection.tp)
            return losses.transpose(0, 1).contiguous()
        return self.compute_language_model_loss(labels, logits)

    def _asked(self, labels: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """Return the numbers [t] of the tokens that a loss is asked for, in the order of [s, b], where they are so few
        that the logits of the others are worth leaving out; else None. A GPU would have to wait for their number, and
        with sequence parallelism a rank has other tokens than it has labels.
        """
        if labels is None or mask is None or labels.device.type != "cpu" or self.config.sequence_parallel:
            return None
        asked = mask.t().reshape(-1).nonzero().squeeze(1)
        return asked if 0 < 2 * len(asked) <= mask.numel() else None

    @property
    def output_weight(self) -> Tensor:
        """Return the last stage's output matrix [vocabulary shard, hidden]; tied, it is the embedding."""
        tied = self.share_embeddings_and_output_weights
        return self.shared_embedding_or_output_weight() if tied else self.output_layer.weight

    @property
    def words(self) -> int:
        """Return how many of this rank's rows of the output matrix are words: padding comes behind them."""
        rows, group = self.output_weight.shape[0], self.pg_collection.tp
        return min(max(self.config.vocab_size - group.rank() * rows, 0), rows)

    def whole(self, hidden: Tensor) -> Tensor:
        """Return states [s, b, h] as [t, h] of the whole sequence, as a loss takes them with the output matrix:
        gradients are summed over the ranks that hold the vocabulary.
        """
        group = self.pg_collection.tp
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=group)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=group)
        return hidden.flatten(0, 1)

    def hidden_states(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        seq_idx: Tensor | None,
        loss_count: Tensor | None = None,
        tiles: Tensor | None = None,
        image_mask: Tensor | None = None,
    ) -> Tensor:
        """Return [sequence, batch, hidden] after this stage's layers, on the last stage what the output layer takes."""
        embedded = None
        if self.pre_process:
            embedded = scaled(self.embedding(input_ids=input_ids, position_ids=position_ids), self.scales.embedding)
            if self._images:
                embedded = self._images.place(embedded, tiles, image_mask)
        if embedded is not None and not embedded.requires_grad and self.training and torch.is_grad_enabled():
            # with a frozen embedding nothing else asks for the gradient of a recomputed layer, or of a first stage
            embedded.requires_grad_()
        angles = self._rotary_angles(embedded, seq_idx)
        hidden = self.decoder(embedded, seq_idx=seq_idx, rotary_pos_emb=angles, loss_count=loss_count)
        # in place of the logits: they are far larger
        return scaled(hidden, self.scales.head) if self.post_process else hidden

    def _rotary_angles(self, embedded: Tensor | None, seq_idx: Tensor | None) -> Tensor | None:
        """Return angles [sequence, batch or 1, 1, channels] of this context-parallel rank's tokens; sequence
        parallelism shows a part of these.
        """
        if self.position_embedding_type != "rope":
            return None
        length = self.rotary_pos_emb.get_rotary_seq_len(None, self.decoder, embedded, self.config)
        # of the whole sequence; what megatron-core takes of it by itself is in another order
        angles = self.rotary_pos_emb(length, packed_seq=True)
        if seq_idx is not None:
            angles = angles[document_positions(seq_idx).t(), 0]
        return own_tokens(angles, self.pg_collection.cp, 0)

    def initialize(self, seed: int) -> None:
        """Initialize every weight from (seed, its global name): the same model whatever the parallel layout."""
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
        if self.post_process and not (self.pre_process and config.share_embeddings_and_output_weights):
            # the last stage has the embedding once more where it is the output matrix too
            name = "embedding" if config.share_embeddings_and_output_weights else "output_layer"
            init.fill(self.output_layer.weight, name, weight, axis=0, **shard)
        self.decoder.initialize(InitialWeights(weight, residual, shard))
        if self._images:
            self._images.initialize(config.definition(), shard)


@dataclass
class NemotronHConfig(SSMConfig):
    """NeMo's SSM configuration with the family's shared choices (paper 2.1) and what a CPU cannot fuse.

    Attributes beyond NeMo's:
        definition_name: the model definition that the numbers come from.
        family: the rules that the pattern follows.
        overrides: layer -> widths of its own.
        vocab_size: the vocabulary of the tokenizer, before padding.
        conv_kernel: window of the causal convolution.
        num_experts, ..., mtp_steps: as in `ModelDefinition`.
        balance_loss, bias_update: as the recipe's `experts`.
        mamba_norm: an RMSNorm follows the gate of each mixer.
        multipliers: factors of activations, stated or by a rule.
        vision, projector: as in `ModelDefinition`.
        rope_scaling_factor, ..., rope_original_length: as in `ModelDefinition`.
        init_seed: seed of the initial weights.
        fp8_emulation: the FP8 recipe that the layers emulate (`nemotron_h.precision.emulation`), or None.
        fuse_weight_gradients: Transformer Engine's layers accumulate into Megatron's gradient buffer (`main_grad`, made
            by its DistributedDataParallel); off for a model that is trained without that wrapper.
        recompute_mamba, recompute_attention, ...: what the backward pass computes again instead of keeping, by layer
            type: `none`, `layer` (only the layer's input is kept), and for FFNs `activation` (its output is not kept).
        recompute_logits, recompute_offload: as the recipe's `recompute.logits` and `recompute.offload`.
        adapter: what is trained in place of the weights, or None.
        frozen: parts that do not train (`nemotron_h.architecture.frozen`).
    """

    definition_name: str = ""
    family: str = "nemotron_h"
    overrides: dict[int, dict[str, int]] = field(default_factory=dict)
    vocab_size: int = 0
    conv_kernel: int = 4
    num_experts: int = 0
    experts_per_token: int = 0
    expert_hidden_size: int = 0
    shared_expert_hidden_size: int = 0
    expert_scaling: float = 0.0
    expert_latent_size: int = 0
    mtp_pattern: str = ""
    mtp_steps: int = 0
    balance_loss: float = 1e-4
    bias_update: float = 1e-3
    mamba_norm: bool = True
    multipliers: MultipliersSchema = field(default_factory=MultipliersSchema)
    vision: VisionSchema | None = None
    projector: ProjectorSchema | None = None
    rope_scaling_factor: float = 0.0
    rope_low_freq_factor: float = 0.0
    rope_high_freq_factor: float = 0.0
    rope_original_length: int = 0
    init_seed: int = 1234
    fp8_emulation: str | None = None
    recompute_mamba: str = "none"
    recompute_attention: str = "none"
    recompute_ffn: str = "none"
    recompute_parallel: str = "none"
    recompute_swiglu: str = "none"
    recompute_experts: str = "none"
    recompute_linear: str = "none"
    recompute_logits: str = "none"
    recompute_vision: str = "none"
    recompute_offload: bool = False
    adapter: AdapterSchema | None = None
    frozen: list[str] = field(default_factory=list)

    normalization: str = "RMSNorm"
    position_embedding_type: str = "none"
    rotary_base: int = 0
    rotary_percent: float = 0.0
    add_bias_linear: bool = False
    gated_linear_unit: bool = False
    share_embeddings_and_output_weights: bool = False
    # of experts (DeepSeek-V3, arXiv 2412.19437, 2.1.2): no token is dropped
    moe_router_score_function: str = "sigmoid"
    moe_router_load_balancing_type: str = "seq_aux_loss"
    moe_token_dispatcher_type: str = "alltoall"
    moe_permute_fusion: bool = gpu_option("moe_permute_fusion")
    expert_tensor_parallel_size: int = 1
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_func: Callable = squared_relu
    is_hybrid_model: bool = True
    attention_backend: Any = "auto"
    mamba_stack_spec: Callable = stack_spec
    forward_step_fn: Callable = forward_step
    # `GPU_OPTIONS` says why each is on or off
    fuse_weight_gradients: bool = gpu_option("fuse_weight_gradients")
    gradient_accumulation_fusion: bool = gpu_option("gradient_accumulation_fusion")
    bias_dropout_fusion: bool = gpu_option("bias_dropout_fusion")
    bias_activation_fusion: bool = gpu_option("bias_activation_fusion")
    masked_softmax_fusion: bool = gpu_option("masked_softmax_fusion")
    apply_rope_fusion: bool = False
    cross_entropy_loss_fusion: bool = gpu_option("cross_entropy_loss_fusion")
    cross_entropy_fusion_impl: str = gpu_option("cross_entropy_fusion_impl")
    deallocate_pipeline_outputs: bool = gpu_option("deallocate_pipeline_outputs")
    tp_comm_overlap: bool = gpu_option("tp_comm_overlap")
    use_te_rng_tracker: bool = gpu_option("use_te_rng_tracker")
    cuda_graph_impl: str = gpu_option("cuda_graph_impl")
    use_cpu_initialization: bool = field(default_factory=lambda: not torch.cuda.is_available())

    def __post_init__(self) -> None:
        if isinstance(self.attention_backend, str):
            from megatron.core.transformer.enums import AttnBackend

            self.attention_backend = AttnBackend[self.attention_backend]
        pattern = self.hybrid_override_pattern
        if pattern:
            self.num_layers = len(pattern)
            widths = {key for letter in pattern for key in KINDS[letter].widths}
            # NeMo refuses 0, which is how a width is left out; no layer reads these
            if "num_attention_heads" not in widths:
                self.num_attention_heads = self.num_query_groups = self.mamba_num_heads
            if "ffn_hidden_size" not in widths:
                self.ffn_hidden_size = self.hidden_size
            # Megatron asks for these where there are experts; a layer has its own widths
            self.num_moe_experts = self.num_experts or None
            self.moe_permute_fusion = self.moe_permute_fusion and self.num_experts > 0  # else an old engine will do
            self.moe_ffn_hidden_size = self.expert_hidden_size or None
        self.overrides = {int(number): dict(widths) for number, widths in self.overrides.items()}
        if self.adapter == AdapterSchema():
            self.adapter = None
        if self.adapter is not None or self.frozen:
            self.fuse_weight_gradients = False  # frozen weights have no gradient to fuse
        super().__post_init__()

    def definition(self) -> ModelDefinition:
        """Return the definition that these numbers make, without its `expect`."""
        pattern = self.hybrid_override_pattern
        values = {key: getattr(self, name) for key, name in MODEL.items()}
        needed = {key for letter in pattern for key in KINDS[letter].widths}
        values |= {key: 0 for kind in KINDS.values() for key in kind.widths if key not in needed}
        definition = ModelDefinition(**values, expect=Expect())
        return replace(definition, expect=replace(definition.counts(), parameters=0))

    def configure_model(
        self, tokenizer: Any, pre_process: bool | None = None, post_process: bool | None = None, vp_stage: Any = None
    ) -> NemotronHMegatronModel:
        """Build this rank's part of the model, with its initial weights.

        Errors:
            UserError: the tokenizer's vocabulary is larger than the model's; an adapter that cannot be.
        """
        self.check_tokenizer(tokenizer)
        model = self.megatron_model(
            NemotronHMegatronModel,
            parallel_state.is_pipeline_first_stage() if pre_process is None else pre_process,
            parallel_state.is_pipeline_last_stage() if post_process is None else post_process,
        )
        model.initialize(self.init_seed)
        if self.adapter is not None:
            check_adapter(
                self.adapter,
                self.definition(),
                "adapter",
                pipeline=self.pipeline_model_parallel_size,
            )
            adapters.attach(model, self.adapter, self.init_seed)
        return self.freeze_parts(model)

    def freeze_parts(self, model: NemotronHMegatronModel) -> NemotronHMegatronModel:
        """Return a model whose parts of `frozen` do not train.

        Errors:
            UserError: see `check_frozen`.
        """
        if self.frozen:
            check_frozen(self.frozen, self.definition(), "optim.frozen", pipeline=self.pipeline_model_parallel_size)
            freeze(model, self.frozen)
        return model

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Refuse a tokenizer of another vocabulary; the model's may have rows of padding beyond it.

        Errors:
            UserError: names both sizes.
        """
        if tokenizer is not None and not 0 <= self.vocab_size - tokenizer.vocab_size <= MAX_PADDING:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size:,} tokens, {self.definition_name} has a vocabulary of "
                f"{self.vocab_size:,}",
                hint="choose a blend that was prepared with the model's tokenizer, or change model.vocab_size",
            )

    def megatron_model(
        self, model: type[NemotronHMegatronModel], pre_process: bool, post_process: bool, **options: Any
    ) -> NemotronHMegatronModel:
        """Build this rank's part of a model of this class, its weights not yet set; `options` go to the class."""
        return model(
            self,
            mamba_stack_spec=plain_stack_spec() if self.fp8_emulation else self.mamba_stack_spec(),
            vocab_size=get_vocab_size(self, self.vocab_size, self.make_vocab_size_divisible_by),
            max_sequence_length=self.seq_length,
            hybrid_override_pattern=self.hybrid_override_pattern,
            position_embedding_type=self.position_embedding_type,
            rotary_base=self.rotary_base,
            rotary_percent=self.rotary_percent,
            share_embeddings_and_output_weights=self.share_embeddings_and_output_weights,
            pre_process=pre_process,
            post_process=post_process,
            **options,
        )

    def definitions(self) -> dict[str, ModelDefinition]:
        """Return every model whose matmuls a step runs, by its name; the trained one first."""
        return {"model": self.definition()}

    def record(self) -> dict[str, Any]:
        """Return what a run's record says beyond the definition."""
        return {}

    def of_definition(self, definition: ModelDefinition, **changes: Any) -> NemotronHConfig:
        """Return the configuration of another model in this one's layout and precision."""
        values = {f.name: getattr(self, f.name) for f in fields(NemotronHConfig) if f.init}
        values |= {"num_layers": definition.num_layers, **nemo_fields(definition)}
        if not definition.has_experts:
            values["expert_model_parallel_size"] = 1
        return NemotronHConfig(**{**values, **changes})


class NemotronHModel(MambaModel):
    """The Lightning module; NeMo's, over `NemotronHConfig`.

    Attributes:
        batch_keys: of a batch, that this stage's loss reads beside labels and their mask.
    """

    batch_keys: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        config: NemotronHConfig,
        optim: Any = None,
        tokenizer: Any = None,
        model_transform: Callable[[nn.Module], nn.Module] | None = None,
    ) -> None:
        super().__init__(config, optim=optim, tokenizer=tokenizer, model_transform=model_transform)

    def data_step(self, dataloader_iter: Any) -> dict[str, Any]:
        """Take the next micro-batch."""
        return data_step(dataloader_iter, self.batch_keys)

    def settings(self) -> dict[str, Any]:
        """Return what a resumed run may change of the loss, by recipe key."""
        config, adapter = self.config, self.config.adapter
        found = {} if adapter is None else {"adapter.dropout": adapter.dropout}
        if config.frozen:
            found |= {"optim.frozen": list(config.frozen)}
        if config.num_experts:
            found |= {f"experts.{key}": getattr(config, key) for key in ("balance_loss", "bias_update")}
        return found

    @property
    def training_loss_reduction(self) -> TokenLoss:
        """Return the loss of a step."""
        if self._training_loss_reduction is None:
            self._training_loss_reduction = TokenLoss(self.config.calculate_per_token_loss)
        return self._training_loss_reduction

    @property
    def validation_loss_reduction(self) -> TokenLoss:
        """Return the loss of a validation's batches."""
        if self._validation_loss_reduction is None:
            self._validation_loss_reduction = TokenLoss(self.config.calculate_per_token_loss, validation_step=True)
        return self._validation_loss_reduction

    def forward(self, input_ids: Tensor, **batch: Tensor | None) -> Tensor:  # type: ignore[override]
        """Run the Megatron module, as `NemotronHMegatronModel.forward`."""
        return self.module(input_ids=input_ids, **batch)
