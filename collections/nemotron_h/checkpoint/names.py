"""Every weight under both of its names: Megatron's checkpoint (`ours`) and Hugging Face's `nemotron_h` (`theirs`).

One table serves both directions. The tensors of a row, joined along their first axis, are the same numbers on both
sides; only attention's queries, keys and values are in another order of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nemotron_h.architecture.definition import ATTENTION, MAMBA, ModelDefinition

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Weight:
    """One row of the table.

    Attributes:
        ours, theirs: names and shapes; along the first axis both sum to the same number of rows.
        fused: our name where Transformer Engine's layers hold a norm inside the projection that follows it, or "".
        order: for each row of `theirs`, the row of `ours` that it is; None where both are in one order.
        exact: kept in float32 whatever the model's dtype; the scan's decays are exponentials of it.
        padded: rows of padding, which depend on the layout that trained, may follow in `ours`.
    """

    ours: dict[str, Shape]
    theirs: dict[str, Shape]
    fused: str = ""
    order: Tensor | None = None
    exact: bool = False
    padded: bool = False

    def dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of this weight in a model of `dtype`."""
        return torch.float32 if self.exact else dtype

    def to_theirs(self, whole: Tensor) -> dict[str, Tensor]:
        """Their tensors, of what `ours` joins to."""
        return _parts(whole if self.order is None else whole[self.order], self.theirs)

    def to_ours(self, whole: Tensor) -> dict[str, Tensor]:
        """Our tensors, of what `theirs` joins to."""
        return _parts(whole if self.order is None else whole[self.order.argsort()], self.ours)


def _parts(whole: Tensor, shapes: dict[str, Shape]) -> dict[str, Tensor]:
    return dict(zip(shapes, whole.split([shape[0] for shape in shapes.values()]), strict=True))


def weights(definition: ModelDefinition) -> Iterator[Weight]:
    """All weights of a model, in the order in which the model applies them."""
    vocabulary = (definition.vocab_size, definition.hidden_size)
    yield Weight(
        {"embedding.word_embeddings.weight": vocabulary}, {"backbone.embeddings.weight": vocabulary}, padded=True
    )
    for index, symbol in enumerate(definition.pattern):
        rows = {MAMBA: _mamba, ATTENTION: _attention}.get(symbol, _ffn)
        yield from rows(definition, f"decoder.layers.{index}.", f"backbone.layers.{index}.")
    hidden = (definition.hidden_size,)
    yield Weight({"decoder.final_norm.weight": hidden}, {"backbone.norm_f.weight": hidden})
    yield Weight({"output_layer.weight": vocabulary}, {"lm_head.weight": vocabulary}, padded=True)


def _norm(definition: ModelDefinition, ours: str, fused: str, theirs: str) -> Weight:
    shape = (definition.hidden_size,)
    return Weight({ours: shape}, {f"{theirs}norm.weight": shape}, fused=fused)


def _mamba(d: ModelDefinition, ours: str, theirs: str) -> Iterator[Weight]:
    state = d.mamba_num_groups * d.mamba_state_dim
    conv = {"x": d.d_inner, "B": state, "C": state}
    ours, own_norm = f"{ours}mixer.", f"{ours}norm.weight"
    yield _norm(d, own_norm, f"{ours}in_proj.layer_norm_weight", theirs)
    theirs = f"{theirs}mixer."

    def joined(name: str, parts: dict[str, int], *shape: int) -> Weight:
        whole = {f"{theirs}{name}": (sum(parts.values()), *shape)}
        return Weight({f"{ours}{name}.{part}": (rows, *shape) for part, rows in parts.items()}, whole)

    def same(name: str, *shape: int, exact: bool = False) -> Weight:
        return Weight({f"{ours}{name}": shape}, {f"{theirs}{name}": shape}, exact=exact)

    yield joined("in_proj.weight", {"z": d.d_inner, **conv, "dt": d.mamba_num_heads}, d.hidden_size)
    yield joined("conv1d.weight", conv, 1, d.conv_kernel)
    yield joined("conv1d.bias", conv)
    for name in ("A_log", "D", "dt_bias"):
        yield same(name, d.mamba_num_heads, exact=True)
    yield same("norm.weight", d.d_inner)
    yield same("out_proj.weight", d.hidden_size, d.d_inner)


def _attention(d: ModelDefinition, ours: str, theirs: str) -> Iterator[Weight]:
    qkv, hidden = f"{ours}self_attention.linear_qkv", d.hidden_size
    queries, keys = d.num_attention_heads * d.head_dim, d.num_query_groups * d.head_dim
    yield _norm(d, f"{ours}input_layernorm.weight", f"{qkv}.layer_norm_weight", theirs)
    yield Weight(
        {f"{qkv}.weight": (queries + 2 * keys, hidden)},
        {
            f"{theirs}mixer.{name}_proj.weight": (rows, hidden)
            for name, rows in (("q", queries), ("k", keys), ("v", keys))
        },
        order=_query_key_value_order(d),
    )
    yield Weight(
        {f"{ours}self_attention.linear_proj.weight": (hidden, queries)},
        {f"{theirs}mixer.o_proj.weight": (hidden, queries)},
    )


def _query_key_value_order(d: ModelDefinition) -> Tensor:
    """Ours: group by group its queries, its key, its value. Theirs: all queries, all keys, all values."""
    groups, per_group = d.num_query_groups, d.num_attention_heads // d.num_query_groups
    rows = torch.arange(groups * (per_group + 2) * d.head_dim).view(groups, per_group + 2, d.head_dim)
    return torch.cat([rows[:, :per_group].flatten(), rows[:, per_group].flatten(), rows[:, per_group + 1].flatten()])


def _ffn(d: ModelDefinition, ours: str, theirs: str) -> Iterator[Weight]:
    yield _norm(d, f"{ours}pre_mlp_layernorm.weight", f"{ours}mlp.linear_fc1.layer_norm_weight", theirs)
    for own, other, shape in (
        ("linear_fc1", "up_proj", (d.ffn_hidden_size, d.hidden_size)),
        ("linear_fc2", "down_proj", (d.hidden_size, d.ffn_hidden_size)),
    ):
        yield Weight({f"{ours}mlp.{own}.weight": shape}, {f"{theirs}mixer.{other}.weight": shape})
