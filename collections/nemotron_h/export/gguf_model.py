"""A model definition as llama.cpp's architecture `nemotron_h` or `mamba2`: the file's values, and each tensor's name
and form.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nemotron_h.architecture.definition import ATTENTION, FFN, MAMBA, ModelDefinition
from nemotron_h.checkpoint.names import Weight
from nemotron_h.core.errors import UserError
from nemotron_h.export.gguf_format import F32, TensorEntry, TensorType, Value

#: Mamba-2 alone has an architecture of its own, with the same tensors
HYBRID, PURE = "nemotron_h", "mamba2"

#: Hugging Face's name within a layer -> llama.cpp's
_LAYER = {
    "norm.weight": "attn_norm.weight",
    "mixer.in_proj.weight": "ssm_in.weight",
    "mixer.conv1d.weight": "ssm_conv1d.weight",
    "mixer.conv1d.bias": "ssm_conv1d.bias",
    "mixer.dt_bias": "ssm_dt.bias",
    "mixer.A_log": "ssm_a",
    "mixer.D": "ssm_d",
    "mixer.norm.weight": "ssm_norm.weight",
    "mixer.out_proj.weight": "ssm_out.weight",
    "mixer.q_proj.weight": "attn_q.weight",
    "mixer.k_proj.weight": "attn_k.weight",
    "mixer.v_proj.weight": "attn_v.weight",
    "mixer.o_proj.weight": "attn_output.weight",
    "mixer.up_proj.weight": "ffn_up.weight",
    "mixer.down_proj.weight": "ffn_down.weight",
}
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
    d, architecture = definition, PURE if set(definition.pattern) == {MAMBA} else HYBRID
    if d.position_embedding != "none":
        raise UserError(
            f"model {d.name} has {d.position_embedding} positions; llama.cpp's {architecture} has none, so it would "
            "compute something else",
            hint="only models with position_embedding: none can be exported",
        )
    if architecture == HYBRID and ATTENTION not in d.pattern:
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
        "ssm.inner_size": d.d_inner,
        "ssm.time_step_rank": d.mamba_num_heads,
        "attention.head_count": d.num_attention_heads,
        "feed_forward_length": 0,
    }
    if architecture == HYBRID:
        own |= {
            "attention.layer_norm_epsilon": float(d.norm_epsilon),
            # llama.cpp tells the layers' types by these two lists: both 0 is Mamba-2
            "feed_forward_length": [d.ffn_hidden_size if symbol == FFN else 0 for symbol in d.pattern],
            "attention.head_count_kv": [d.num_query_groups if symbol == ATTENTION else 0 for symbol in d.pattern],
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
            name = _name(theirs)
            shape = _shape(definition, name, shape)
            matrix = len(shape) == 2 and not any(part in name for part in _EXACT)
            type_ = file_type if matrix and shape[-1] % file_type.block == 0 else F32
            found.append(GgufWeight(row, theirs, TensorEntry(name, shape, type_)))
    return found


def _name(theirs: str) -> str:
    if theirs in _WHOLE:
        return _WHOLE[theirs]
    number, _, name = theirs.removeprefix(_LAYERS).partition(".")
    return f"blk.{number}.{_LAYER[name]}"


def _shape(d: ModelDefinition, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    kind = name.partition("ssm_")[2]
    if kind in ("a", "d"):
        return (*shape, 1)
    if kind == "norm.weight":
        return (d.mamba_num_groups, d.d_inner // d.mamba_num_groups)
    if kind == "conv1d.weight":
        return (shape[0], shape[2])
    return shape
