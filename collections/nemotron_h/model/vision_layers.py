"""Layers of an image encoder and the projector on Megatron's tensor-parallel linear layers.

Every tensor-parallel rank has all positions of all tiles: these are a class token and patches, which do not split.

Axes: l positions of a tile, n tiles, c channels of the encoder, h heads of this rank, d channels of a head.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from nemotron_h.architecture.blocks.block import Block, Matrix
from nemotron_h.model.blocks.running import Parts
from nemotron_h.ops.activation import squared_relu
from nemotron_h.ops.norm import plain_norm


def encoder_config(config: TransformerConfig) -> TransformerConfig:
    """Return the configuration of an encoder's layers: the model's, without sequence parallelism."""
    own = copy.copy(config)
    own.sequence_parallel, own.tp_comm_overlap = False, False
    own.gradient_accumulation_fusion = config.fuse_weight_gradients
    return own


def parameter(config: TransformerConfig, *shape: int) -> nn.Parameter:
    """Return a parameter of ones, in the model's dtype and on its device."""
    device = torch.device("cpu") if config.use_cpu_initialization else torch.cuda.current_device()
    return nn.Parameter(torch.ones(shape, dtype=config.params_dtype, device=device))


class Norm(nn.Module):
    """LayerNorm with a bias or RMSNorm without over the last axis, in float32 at least."""

    def __init__(self, config: TransformerConfig, size: int, epsilon: float, bias: bool) -> None:
        super().__init__()
        self.weight, self.bias, self.epsilon = parameter(config, size), None, epsilon
        if bias:
            self.bias = parameter(config, size)
            self.bias.data.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` [..., size]; same shape and dtype."""
        return plain_norm(x, self.weight, self.bias, self.epsilon)


class HeadsNorm(nn.Module):
    """RMSNorm over the channels of all heads, those of other tensor-parallel ranks too."""

    def __init__(self, config: TransformerConfig, size: int, epsilon: float) -> None:
        super().__init__()
        self.size, self.epsilon = size, epsilon
        self.weight = parameter(config, size // config.tensor_model_parallel_size)
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise this rank's heads `x` [l, n, h, d]; same shape and dtype."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        squares = wide.square().sum((-2, -1), keepdim=True)
        # summed over the ranks, and so are the gradients that each has of the sum
        squares = copy_to_tensor_model_parallel_region(reduce_from_tensor_model_parallel_region(squares))
        scaled = wide * torch.rsqrt(squares / self.size + self.epsilon)
        return scaled.to(x.dtype) * self.weight.view(x.shape[-2:])

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Return the weight in Megatron's distributed-checkpoint layout."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True), prefix, {"weight": 0}, sharded_offsets
        )


class _Layer(MegatronModule):
    """Base of the layers here, which build their linear layers of the block's matrices.

    Args:
        submodules: `Parts` of our stack, of which the linear layers are taken.
        layer_number: from 1.
        block: the layer's widths.
        epsilon: of norms.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: Parts,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        block: Block,
        epsilon: float,
    ) -> None:
        super().__init__(config)
        self.block, self.layer_number, self.epsilon = block, layer_number, epsilon
        self._parts, self._group = submodules.unfused(), pg_collection.tp

    def linear(self, matrix: Matrix, bias: bool) -> nn.Module:
        """Return the parallel layer of a matrix."""
        options = {"bias": bias, "skip_bias_add": False, "is_expert": False, "tp_group": self._group}
        options |= {"config": self.config, "init_method": self.config.init_method}
        if matrix.split == "inputs":
            return self._parts.row(matrix.inputs, matrix.outputs, input_is_parallel=True, **options)
        return self._parts.column(matrix.inputs, matrix.outputs, gather_output=False, **options)


class VisionLayer(_Layer):
    """A norm, what a kind computes, a factor of each channel (LayerScale), and the residual stream."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.norm = Norm(self.config, self.block.hidden_size, self.epsilon, self.block.norm_bias)
        self.layer_scale = parameter(self.config, self.block.hidden_size)

    def compute(self, h: Tensor) -> Tensor:
        """Return what is scaled and added, [l, n, c] of the same normalised."""
        raise NotImplementedError

    def forward(self, hidden: Tensor) -> Tensor:
        """Return [l, n, c]."""
        return torch.addcmul(hidden, self.compute(self.norm(hidden)), self.layer_scale)


class VisionAttentionLayer(VisionLayer):
    """Attention in both directions within each tile."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        qkv, projection = self.block.matrices()
        self.linear_qkv, self.linear_proj = self.linear(qkv, self.block.qkv_bias), self.linear(projection, True)
        if self.block.qk_norm:
            for name in ("q_norm", "k_norm"):
                setattr(self, name, HeadsNorm(self.config, self.block.hidden_size, self.epsilon))

    def compute(self, h: Tensor) -> Tensor:
        """Return the attention's output [l, n, c]."""
        query, key, value = self.linear_qkv(h)[0].unflatten(-1, (-1, 3, self.block.head_dim)).unbind(-2)  # [l, n, h, d]
        if self.block.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        out = F.scaled_dot_product_attention(*(each.permute(1, 2, 0, 3) for each in (query, key, value)))
        return self.linear_proj(out.permute(2, 0, 1, 3).flatten(2))[0]


class VisionFFNLayer(VisionLayer):
    """GELU between two matrices."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.linear_fc1, self.linear_fc2 = (self.linear(matrix, True) for matrix in self.block.matrices())

    def compute(self, h: Tensor) -> Tensor:
        """Return the layer's output [l, n, c] before LayerScale."""
        return self.linear_fc2(F.gelu(self.linear_fc1(h)[0]))[0]


class ProjectorLayer(_Layer):
    """RMSNorm, and a squared ReLU between two matrices."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.norm = Norm(self.config, self.block.hidden_size, self.epsilon, bias=False)
        self.linear_fc1, self.linear_fc2 = (self.linear(matrix, False) for matrix in self.block.matrices())

    def forward(self, hidden: Tensor) -> Tensor:
        """Return image tokens [..., hidden of the language model] of shuffled patches [..., 4 c]."""
        return self.linear_fc2(squared_relu(self.linear_fc1(self.norm(hidden))[0]))[0]
