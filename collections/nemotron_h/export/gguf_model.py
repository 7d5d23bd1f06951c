"""A model definition as llama.cpp's architecture `nemotron_h`, `nemotron_h_moe`, `mamba2` or `falcon-h1`: the file's
values, and each tensor's name and form.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from gguf import ExpertGatingFuncType
from torch import Tensor

from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.architecture.vision import check_text_only
from nemotron_h.checkpoint.names import Weight, hf_names
from nemotron_h.core.errors import UserError
from nemotron_h.export import dense_config, falcon_config
from nemotron_h.export.config import check_plain, check_uniform
from nemotron_h.export.gguf_format import F32, TensorEntry, TensorType, Value

#: Mamba-2 alone has an architecture of its own, with the same tensors
HYBRID, EXPERTS, PURE, FALCON = "nemotron_h", "nemotron_h_moe", "mamba2", "falcon-h1"
#: architecture -> names of the kinds of layers that it can hold
HOLDS = {
    PURE: {"mamba"},
    HYBRID: {"mamba", "attention", "ffn"},
    EXPERTS: {"mamba", "attention", "experts"},
}
#: number of an expert in a name: llama.cpp has one tensor of all
_NUMBER = re.compile(r"(?<=\.experts\.)\d+\.")

#: tensors of two axes that no matmul takes as a matrix; llama.cpp reads them in float32
_EXACT = ("ssm_conv1d", "ssm_a", "ssm_d", "ssm_norm")


def values(definition: ModelDefinition, *, seq_length: int, file_type: TensorType) -> dict[str, Value]:
    """Return the values in the head of the file that tell of the model.

    Args:
        definition: the model.
        seq_length: tokens that it was trained on at once; llama.cpp's largest context without a warning.
        file_type: of the matrices.
    Errors:
        UserError: llama.cpp has no such model: FFNs without attention, or other positions.
    """
    check_text_only(definition, "GGUF")
    if definition.family == dense_config.FAMILY:
        raise UserError(
            f"model {definition.name} is of family {dense_config.FAMILY}, which is not written as GGUF",
            hint="export it for Hugging Face (nemotron-h export hf) and convert that with llama.cpp's "
            "convert_hf_to_gguf.py",
        )
    d, pure = definition, {kind.name for kind in definition.kinds} <= HOLDS[PURE]
    hybrid = EXPERTS if d.has_experts else HYBRID
    architecture = FALCON if d.family == falcon_config.FAMILY else PURE if pure else hybrid
    _check(d, architecture)
    own: dict[str, Value] = {
        "block_count": d.num_layers // hf_names(d).blocks,
        "context_length": seq_length,
        "embedding_length": d.hidden_size,
        "vocab_size": d.vocab_size,
        "attention.layer_norm_rms_epsilon": float(d.norm_epsilon),
        "ssm.conv_kernel": d.conv_kernel,
        "ssm.state_size": d.mamba_state_dim,
        "ssm.group_count": d.mamba_num_groups,
        "ssm.inner_size": d.mamba_num_heads * d.mamba_head_dim,
        "ssm.time_step_rank": d.mamba_num_heads,
        "attention.head_count": d.num_attention_heads,
        "feed_forward_length": d.ffn_hidden_size if architecture == FALCON else 0,
    }
    if architecture != PURE:
        own |= {
            "attention.key_length": d.head_dim,
            "attention.value_length": d.head_dim,
            "rope.dimension_count": d.head_dim,
        }
    if architecture == hybrid:
        inner = "expert_hidden_size" if d.has_experts else "ffn_hidden_size"
        own |= {
            "attention.layer_norm_epsilon": float(d.norm_epsilon),
            # llama.cpp tells the layers' types by these two lists: both 0 is Mamba-2
            "feed_forward_length": [getattr(block, inner, 0) for block in d.blocks],
            "attention.head_count_kv": [getattr(block, "num_query_groups", 0) for block in d.blocks],
        }
    if architecture == EXPERTS:
        own |= {
            "expert_count": d.num_experts,
            "expert_used_count": d.experts_per_token,
            "expert_shared_count": 1,
            "expert_group_count": 1,
            "expert_group_used_count": 1,
            "expert_feed_forward_length": d.expert_hidden_size,
            "expert_shared_feed_forward_length": d.shared_expert_hidden_size,
            # one alone is weighed by its score as it is
            "expert_weights_norm": d.experts_per_token > 1,
            "expert_weights_scale": float(d.expert_scaling),
            "expert_gating_func": int(ExpertGatingFuncType.SIGMOID),
        }
    if architecture == FALCON:
        own |= {"attention.head_count_kv": d.num_query_groups, "rope.freq_base": float(d.rope_base)}
    return {
        "general.architecture": architecture,
        "general.type": "model",
        "general.name": d.name,
        "general.file_type": file_type.file_code,
        "general.quantization_version": 2,
        **{f"{architecture}.{key}": value for key, value in own.items()},
    }


def _check(definition: ModelDefinition, architecture: str) -> None:
    """Refuse a model that an architecture of llama.cpp does not have."""
    reader = f"llama.cpp's {architecture}"
    if architecture == FALCON:
        falcon_config.check_expressible(definition, reader)
        return
    check_uniform(definition, reader, HOLDS[architecture])
    if definition.position_embedding != "none":
        raise UserError(
            f"model {definition.name} has {definition.position_embedding} positions; {reader} has none, so it would "
            "compute something else",
            hint="only models with position_embedding: none can be exported",
        )
    check_plain(definition, reader)
    if architecture in (HYBRID, EXPERTS) and not any(kind.attends for kind in definition.kinds):
        raise UserError(
            f"model {definition.name} has no attention layer; llama.cpp ends with an error when it loads such a "
            f"{architecture}",
            hint="export it for Hugging Face's libraries: nemotron-h export hf",
        )


@dataclass(frozen=True)
class GgufWeight:
    """Tensor of the file.

    Attributes:
        row: of the table of weights; it holds the tensor under `theirs`.
        theirs: Hugging Face's name, or those of all experts.
        entry: llama.cpp's name, shape and type.
        scales: multipliers that the file has in its rows, as of `Block.row_scales`.
    """

    row: Weight
    theirs: tuple[str, ...]
    entry: TensorEntry
    scales: tuple[tuple[int, float], ...] = ()

    def convert(self, tensors: Sequence[Tensor]) -> Tensor:
        """Convert Hugging Face's numbers to llama.cpp's."""
        tensor = torch.stack(tuple(tensors)) if len(tensors) > 1 else tensors[0]
        if self.theirs[0].endswith("A_log"):
            tensor = -tensor.exp()
        if self.scales:
            rows, factors = (torch.tensor(column) for column in zip(*self.scales, strict=True))
            tensor = tensor.float() * factors.repeat_interleave(rows)[:, None]
        return tensor.reshape(self.entry.shape)


def weights(definition: ModelDefinition, rows: list[Weight], file_type: TensorType) -> list[GgufWeight]:
    """Return all tensors of the file, in its order.

    Args:
        definition: the model.
        rows: the table of its weights.
        file_type: of the matrices; norms, the convolution and the scan's parameters stay in float32, and so does what
            `file_type` cannot hold.
    """
    return [weight for row in rows for weight in _of_row(definition, row, file_type)]


def _of_row(definition: ModelDefinition, row: Weight, file_type: TensorType) -> list[GgufWeight]:
    """Return a row's tensors: one of all experts, else one of each name."""
    if row.stacked:
        ((_, shape),) = row.ours.items()
        return [_weight(definition, row, tuple(row.theirs), shape, file_type)]
    return [_weight(definition, row, (theirs,), shape, file_type) for theirs, shape in row.theirs.items()]


def _weight(
    definition: ModelDefinition, row: Weight, theirs: tuple[str, ...], shape: tuple[int, ...], file_type: TensorType
) -> GgufWeight:
    """Return one tensor: llama.cpp has no multipliers, so they are in the weights."""
    names, scales = hf_names(definition), definition.scales
    whole = {
        f"{names.root}{names.embedding}.weight": ("token_embd.weight", scales.embedding),
        f"{names.root}{names.final_norm}.weight": ("output_norm.weight", 1.0),
        "lm_head.weight": ("output.weight", scales.head),
    }
    if theirs[0] in whole:
        name, scale = whole[theirs[0]]
        row_scales = () if scale == 1 else ((shape[0], scale),)
    else:
        number, inside = names.inside(_NUMBER.sub("", theirs[0]))
        first = number * names.blocks
        block = next(b for b in definition.blocks[first : first + names.blocks] if inside in b.llama_cpp)
        own, row_scales = block.llama_cpp[inside], block.row_scales(inside)
        name, shape = f"blk.{number}.{own}", block.llama_cpp_shape(own, shape)
    matrix = len(shape) > 1 and not row.exact and not any(part in name for part in _EXACT)
    type_ = file_type if matrix and shape[-1] % file_type.block == 0 else F32
    return GgufWeight(row, theirs, TensorEntry(name, shape, type_), row_scales)
