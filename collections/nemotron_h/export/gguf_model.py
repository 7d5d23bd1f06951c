"""A model definition as llama.cpp's architecture `nemotron_h` or `mamba2`: the file's values, and each tensor's name
and form.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.checkpoint.names import Weight
from nemotron_h.core.errors import UserError
from nemotron_h.export.config import check_plain, check_uniform
from nemotron_h.export.gguf_format import F32, TensorEntry, TensorType, Value

#: Mamba-2 alone has an architecture of its own, with the same tensors
HYBRID, PURE = "nemotron_h", "mamba2"
#: architecture -> names of the kinds of layers that it can hold
HOLDS = {PURE: {"mamba"}, HYBRID: {"mamba", "attention", "ffn"}}

_WHOLE = {
    "backbone.embeddings.weight": "token_embd.weight",
    "backbone.norm_f.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYERS = "backbone.layers."
#: tensors of two axes that no matmul takes as a matrix; llama.cpp reads them in float32
_EXACT = ("ssm_conv1d", "ssm_a", "ssm_d", "ssm_norm")


def values(definition: ModelDefinition, *, seq_length: int, file_type: TensorType) -> dict[str, Value]:
    """Return the values in the head of the file that tell of the model.

    Args:
        definition: the model.
        seq_length: tokens that it was trained on at once; llama.cpp's largest context without a warning.
        file_type: of the matrices.
    Errors:
        UserError: llama.cpp has no such model: rotary positions, or FFNs without attention.
    """
    d, kinds = definition, {kind.name for kind in definition.kinds}
    architecture = PURE if kinds <= HOLDS[PURE] else HYBRID
    if d.has_experts:
        raise UserError(
            f"model {d.name} has experts; llama.cpp's {architecture} has none, and its nemotron_h_moe is not written",
            hint="export it for Hugging Face's libraries: nemotron-h export hf",
        )
    check_uniform(d, f"llama.cpp's {architecture}", HOLDS[architecture])
    if d.position_embedding != "none":
        raise UserError(
            f"model {d.name} has {d.position_embedding} positions; llama.cpp's {architecture} has none, so it would "
            "compute something else",
            hint="only models with position_embedding: none can be exported",
        )
    check_plain(d, f"llama.cpp's {architecture}")
    if architecture == HYBRID and not any(kind.attends for kind in d.kinds):
        raise UserError(
            f"model {d.name} has no attention layer; llama.cpp ends with an error when it loads such a {architecture}",
            hint="export it for Hugging Face's libraries: nemotron-h export hf",
        )
    own: dict[str, Value] = {
        "block_count": d.num_layers,
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
        "feed_forward_length": 0,
    }
    if architecture == HYBRID:
        own |= {
            "attention.layer_norm_epsilon": float(d.norm_epsilon),
            # llama.cpp tells the layers' types by these two lists: both 0 is Mamba-2
            "feed_forward_length": [getattr(block, "ffn_hidden_size", 0) for block in d.blocks],
            "attention.head_count_kv": [getattr(block, "num_query_groups", 0) for block in d.blocks],
            "attention.key_length": d.head_dim,
            "attention.value_length": d.head_dim,
            "rope.dimension_count": d.head_dim,
        }
    return {
        "general.architecture": architecture,
        "general.type": "model",
        "general.name": d.name,
        "general.file_type": file_type.file_code,
        "general.quantization_version": 2,
        **{f"{architecture}.{key}": value for key, value in own.items()},
    }


@dataclass(frozen=True)
class GgufWeight:
    """Tensor of the file.

    Attributes:
        row: of the table of weights; it holds the tensor under `theirs`.
        theirs: Hugging Face's name.
        entry: llama.cpp's name, shape and type.
    """

    row: Weight
    theirs: str
    entry: TensorEntry

    def convert(self, tensor: Tensor) -> Tensor:
        """Convert Hugging Face's numbers to llama.cpp's."""
        if self.theirs.endswith("A_log"):
            tensor = -tensor.exp()
        return tensor.reshape(self.entry.shape)


def weights(definition: ModelDefinition, rows: list[Weight], file_type: TensorType) -> list[GgufWeight]:
    """Return all tensors of the file, in its order.

    Args:
        definition: the model.
        rows: the table of its weights.
        file_type: of the matrices; norms, the convolution and the scan's parameters stay in float32, and so does what
            `file_type` cannot hold.
    """
    found = []
    for row in rows:
        for theirs, shape in row.theirs.items():
            name, shape = _named(definition, theirs, shape)
            matrix = len(shape) == 2 and not any(part in name for part in _EXACT)
            type_ = file_type if matrix and shape[-1] % file_type.block == 0 else F32
            found.append(GgufWeight(row, theirs, TensorEntry(name, shape, type_)))
    return found


def _named(definition: ModelDefinition, theirs: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """Return llama.cpp's name and shape of a tensor."""
    if theirs in _WHOLE:
        return _WHOLE[theirs], shape
    number, _, name = theirs.removeprefix(_LAYERS).partition(".")
    block = definition.blocks[int(number)]
    own = block.llama_cpp[name]
    return f"blk.{number}.{own}", block.llama_cpp_shape(own, shape)
