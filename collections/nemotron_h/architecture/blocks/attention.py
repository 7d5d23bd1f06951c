"""Grouped-query attention, without positions or with rotary ones; with biases and norms of each head where a model has
them (Qwen2, arXiv 2407.10671; Qwen3, arXiv 2505.09388).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from nemotron_h.architecture.blocks.block import (
    AttentionHeads,
    Block,
    Cut,
    Indices,
    LayerMemory,
    Matrix,
    Operation,
    Tensors,
    copies,
    filled_up,
    input_norm,
    stays,
)

if TYPE_CHECKING:
    from nemotron_h.architecture.rank import Rank


@dataclass(frozen=True)
class Attention(Block):
    """Grouped-query attention; the attributes are as in `ModelDefinition`.

    Attributes:
        rotary_dim: channels of each head that are rotated.
        qkv_bias: queries, keys and values have biases.
        qk_norm: each head's query and key is normalised before it is rotated, with weights that all heads share.
    """

    letter: ClassVar[str] = "*"
    name: ClassVar[str] = "attention"
    title: ClassVar[str] = "attention"
    widths: ClassVar[tuple[str, ...]] = ("num_attention_heads", "num_query_groups", "head_dim")
    divides: ClassVar[tuple[tuple[str, str], ...]] = (("num_attention_heads", "num_query_groups"),)
    sharded: ClassVar[tuple[str, ...]] = ("num_query_groups", "num_attention_heads")
    exchanges: ClassVar[tuple[tuple[str, str], ...]] = (("num_attention_heads", "num_query_groups"),)
    pads: ClassVar[tuple[str, ...]] = ("num_attention_heads",)
    attends: ClassVar[bool] = True
    switches: ClassVar[tuple[str, ...]] = ("qkv_bias", "qk_norm")
    llama_cpp: ClassVar[Mapping[str, str]] = {
        "norm.weight": "attn_norm.weight",
        "mixer.q_proj.weight": "attn_q.weight",
        "mixer.k_proj.weight": "attn_k.weight",
        "mixer.v_proj.weight": "attn_v.weight",
        "mixer.o_proj.weight": "attn_output.weight",
    }

    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    rotary_dim: int = 0
    qkv_bias: bool = False
    qk_norm: bool = False

    @classmethod
    def of(cls, widths: Mapping[str, Any]) -> Attention:
        """Return the block with the widths of a layer."""
        own = {key: widths[key] for key in cls.switches}
        return replace(super().of(widths), rotary_dim=int(widths["head_dim"] * widths["rope_percent"]), **own)

    @property
    def queries(self) -> int:
        """Return the width of all queries, and of the attention's output."""
        return self.num_attention_heads * self.head_dim

    @property
    def keys(self) -> int:
        """Return the width of all keys, and of all values."""
        return self.num_query_groups * self.head_dim

    def matrices(self) -> tuple[Matrix, ...]:
        """Return queries, keys and values in one, and the output projection."""
        hidden, part = self.hidden_size, "attention_projections"
        qkv = self.queries + 2 * self.keys
        groups = self.num_query_groups
        of_a_group = (self.queries // groups, self.head_dim, self.head_dim)  # its queries, key and value
        return (
            Matrix(
                "linear_qkv",
                qkv,
                hidden,
                "outputs",
                part,
                ("hidden_size", "head_dim"),
                parts=of_a_group,
                groups=groups,
            ),
            Matrix("linear_proj", hidden, self.queries, "inputs", part, ("head_dim", "hidden_size")),
        )

    def tensor_count(self) -> int:
        """Return those of both projections, and biases and norms where it has them."""
        return super().tensor_count() + self.qkv_bias + 2 * self.qk_norm

    def pieces(self, tensor: int) -> int:
        """Return those of `tensor` ranks: the norms are whole on each, and one writes them."""
        return (self.tensor_count() - 2 * self.qk_norm) * tensor + 2 * self.qk_norm

    def vectors(self) -> int:
        """Return the parameters of biases and norms."""
        return self.qkv_bias * (self.queries + 2 * self.keys) + self._head_norms

    def whole_parameters(self) -> int:
        """Return the parameters of all norms."""
        return super().whole_parameters() + self._head_norms

    @property
    def _head_norms(self) -> int:
        return self.qk_norm * 2 * self.head_dim

    def operations(self, seq_length: int, chunk: int) -> Iterator[Operation]:
        """Yield projections and core: scores and weighted values, the causal triangle with its diagonal."""
        qkv, projection = super().operations(seq_length, chunk)
        yield qkv
        yield Operation("attention_core", self._core_flops(seq_length), of_activations=True)
        yield projection

    def exchanged(self, tensor: int, context: int) -> int:
        """Return those of queries, keys and values, and of the attention's output."""
        copied = self.keys // tensor * copies(self.num_query_groups // tensor, context)
        return 2 * (self.filled_up(tensor, context) * self.head_dim + copied)

    def empty_flops(self, seq_length: int, tensor: int, context: int) -> float:
        """Return those of scores and sums."""
        share = self.filled_up(tensor, context) * tensor / self.num_attention_heads - 1
        return share * self._core_flops(seq_length)

    def _core_flops(self, seq_length: int) -> float:
        return 4 * self.queries * (seq_length + 1) / 2

    def filled_up(self, tensor: int, context: int) -> int:
        """Return the heads that context-parallel ranks attend with, in place of those of a tensor-parallel rank."""
        return filled_up(self.num_attention_heads // tensor, self.num_query_groups // tensor, context)

    def states(self, context: int) -> dict[str, int]:
        """Return keys and values."""
        return {"kv_cache": context * 2 * self.keys}

    def memory(self, rank: Rank, fp8: bool) -> LayerMemory:
        """Return what training keeps and allocates."""
        qkv, projection = self.matrices()
        layout, t = rank.layout, rank.layout.tensor
        q, kv, out = rank.act(self.queries), rank.act(2 * self.keys), rank.act(self.queries)
        rows = rank.tokens * self.num_attention_heads // t * 4  # log-sum-exp
        kept = rank.input(qkv, fp8) + out + rows
        if layout.frozen:
            given = out if layout.adapted(projection.name) and not layout.adapter.dropout else 0
            kept += rank.saved_input(projection, out, fp8) - given  # the output is kept anyway
        elif fp8:
            kept += rank.saved_input(projection, out, True)
        rows_copied = layout.documents and layout.micro_batch > 1
        exchanged = layout.context > 1
        if exchanged:
            # of whole rows, some heads twice or filled up; the output in the order of tokens beside
            kv = kv * copies(self.num_query_groups // t, layout.context)
            more = q * self.filled_up(t, layout.context) * t // self.num_attention_heads - q
            kept += q + 2 * more + kv + (0 if layout.frozen else out)
        elif rank.cpu and not rows_copied:
            # keys and values are views of the projection's output; queries are copied unless there is one group
            kept += q + kv + (q if self.num_query_groups // t > 1 or self.rotary_dim else 0)
            kept += kv // 2 if self.rotary_dim else 0
        else:
            kept += q + kv
        if self.qk_norm:
            # norms keep their inputs: queries where they are no view, keys with all that the projection gave; and rows
            kept += rank.tokens * (self.num_attention_heads + self.num_query_groups) // t * 4
            if not rank.cpu:
                kept += q + kv // 2
            else:
                kept += (q if self.num_query_groups // t > 1 else 0) + (q + kv if rows_copied or exchanged else 0)
        if rows_copied or (rank.cpu and layout.documents):
            kept += out  # of all documents, beside what the kernel keeps: concatenated, or in the order of the rows
        project = rank.gathered + out + rank.weight(projection)
        attend = out + q + kv  # gradients of the output, queries, keys and values
        split = attend + (q + kv) - 2 * q
        if not rank.cpu:
            attend += 2 * q  # cuDNN sums the queries' gradient in float32
        return LayerMemory(kept, rank.residual + max(project, attend, split))

    def tensors(self, ours: str, theirs: str) -> Iterator[Tensors]:
        """Yield norm, queries with keys and values, the output projection, and what biases and norms there are."""
        fused = f"{ours}self_attention.linear_qkv.layer_norm_weight"
        yield input_norm(self.hidden_size, f"{ours}input_layernorm.weight", fused, theirs)
        yield from self.projection_tensors(f"{ours}self_attention.", f"{theirs}mixer.")

    def projection_tensors(self, ours: str, theirs: str) -> Iterator[Tensors]:
        """Yield both projections, then biases and norms; `ours` and `theirs` begin the attention's names."""
        hidden = self.hidden_size
        yield Tensors(
            {f"{ours}linear_qkv.weight": (self.queries + 2 * self.keys, hidden)},
            {
                f"{theirs}{name}_proj.weight": (rows, hidden)
                for name, rows in (("q", self.queries), ("k", self.keys), ("v", self.keys))
            },
            order=self._query_key_value_order(),
        )
        yield Tensors(
            {f"{ours}linear_proj.weight": (hidden, self.queries)},
            {f"{theirs}o_proj.weight": (hidden, self.queries)},
        )
        if self.qkv_bias:
            yield Tensors(
                {f"{ours}linear_qkv.bias": (self.queries + 2 * self.keys,)},
                {
                    f"{theirs}{name}_proj.bias": (rows,)
                    for name, rows in (("q", self.queries), ("k", self.keys), ("v", self.keys))
                },
                order=self._query_key_value_order(),
            )
        for name in "qk" if self.qk_norm else "":
            norm = (self.head_dim,)
            yield Tensors({f"{ours}{name}_layernorm.weight": norm}, {f"{theirs}{name}_norm.weight": norm})

    def _query_key_value_order(self) -> Indices:
        """Order ours (group by group its queries, its key, its value) as theirs: all queries, all keys, all values."""
        import numpy as np  # a plan does without

        groups, per_group = self.num_query_groups, self.num_attention_heads // self.num_query_groups
        rows = np.arange(groups * (per_group + 2) * self.head_dim).reshape(groups, per_group + 2, self.head_dim)
        parts = (rows[:, :per_group], rows[:, per_group], rows[:, per_group + 1])
        return np.concatenate([part.reshape(-1) for part in parts])

    def attention_heads(self) -> AttentionHeads:
        """Return the heads; behind the projections are biases and norms alone."""
        last = self.tensor_count() - len(self.matrices())
        return AttentionHeads(
            self.num_query_groups,
            self.num_attention_heads // self.num_query_groups,
            self.head_dim,
            self.rotary_dim,
            "num_query_groups",
            qkv=-2 - last,
            proj=-1 - last,
            fixed=tuple(key for key in self.switches if getattr(self, key)),
        )

    def cuts(self, kept: Mapping[str, Indices], hidden: Indices) -> tuple[Cut, ...]:
        """Return what stays of norm, queries with keys and values, and the output projection; heads stay whole."""
        stream, whole = stays(hidden, self.hidden_size), ((),) * (self.tensor_count() - 2)
        return (stream, None), (None, stream), (stream, None), *whole
