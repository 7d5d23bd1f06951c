"""Core attention: Transformer Engine's on a GPU, torch's fused kernel elsewhere.

Each document of a packed row attends within itself, and no path forms a mask [sequence, sequence]: at 524,288 tokens it
would be 256 GiB, and Transformer Engine's flash and cuDNN kernels ignore the one that `causal` attention is given. With
context parallelism a rank attends over whole rows with its share of the heads (`nemotron_h.model.context_parallel`).

Axes: s position in a row, b row, t = b * s position in the batch (rows one behind the other), n position in a
document, h query head, g group of key-value heads, d channel of a head.

Per head, with the keys and values of its group (Ainslie et al. 2023, arXiv 2305.13245), over the positions j up to i of
i's document: out_i = sum_j softmax_j(q_i.k_j / sqrt(d)) v_j
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.extensions import transformer_engine as te
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from nemotron_h.model.context_parallel import HeadShare, heads_for_tokens, tokens_for_heads


@dataclass(frozen=True)
class Documents:
    """The documents of packed rows, the rows one behind the other.

    Attributes:
        lengths: tokens of each, on the host.
        offsets: int32, the first token of each on the device, and the end until their number is a power of two and
            one: kernels are chosen, and built, by it.
    """

    lengths: tuple[int, ...]
    offsets: Tensor

    @classmethod
    def of(cls, seq_idx: Tensor) -> Documents:
        """Find where `seq_idx` [b, s] changes; a row's start begins a document too. Waits for the device once."""
        first = torch.ones_like(seq_idx, dtype=torch.bool)
        first[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
        starts = first.flatten().cpu().nonzero().flatten()
        ends = F.pad(starts[1:], (0, 1), value=seq_idx.numel())
        empty = (1 << (len(starts) - 1).bit_length()) - len(starts)
        offsets = F.pad(starts, (0, 1 + empty), value=seq_idx.numel()).int()
        return cls(tuple((ends - starts).tolist()), offsets.to(seq_idx.device, non_blocking=True))


def document_positions(seq_idx: Tensor) -> Tensor:
    """Return the position of each token in its document, int64 [b, s], of `seq_idx` [b, s]."""
    places = torch.arange(seq_idx.shape[1], device=seq_idx.device)
    begins = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
    return places - (places * begins).cummax(1).values


def _rows_fused(x: Tensor) -> Tensor:
    """Return [s, b, h, d] as [t, h, d]: a view for one row, else a copy."""
    return x.transpose(0, 1).flatten(0, 1)


def _rows_split(x: Tensor, rows: int) -> Tensor:
    """Return [t, channels] as [s, b, channels], contiguous."""
    return x.unflatten(0, (rows, -1)).transpose(0, 1).contiguous()


class WholeRows:
    """Mixin of core attention that attends over whole rows, with this rank's share of the heads.

    Attributes:
        share: of a tensor-parallel rank's heads; None is all of them.
        watch: told of queries [l, b, h, d] and keys [l, b, g, d] of whole rows, and of the documents, in each pass.
    """

    share: HeadShare | None = None
    watch: Callable[[Tensor, Tensor, Documents | None], None] | None = None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Documents | None, *_, **__) -> Tensor:
        """Attend within each document.

        Args:
            query: [s, b, h, d], s positions of this context-parallel rank.
            key, value: [s, b, g, d].
            attention_mask: the documents of the whole rows, or None where each row is one.
        Returns:
            [s, b, h * d].
        """
        share = self.share
        if share is not None:
            width, heads, groups = query.shape[-1], len(share.heads), len(share.groups)
            query = query.unflatten(2, (key.shape[2], -1))  # [s, b, g, h / g, d]
            per_group = query.shape[3]
            missing = heads * share.group.size() // key.shape[2] - per_group
            query = F.pad(query, (0, 0, 0, missing)).flatten(2)
            pair = (share.copied(each.flatten(2), width) for each in (key, value))
            whole = tokens_for_heads([query, *pair], share.group).unflatten(-1, (-1, width))
            query, key, value = whole.split([heads, groups, groups], dim=2)
        if self.watch is not None:
            self.watch(query, key, attention_mask)
        out = self.attend(query, key, value, attention_mask)
        if share is None:
            return out
        out = heads_for_tokens(out, share.group)
        return out.unflatten(-1, (-1, per_group + missing, width))[..., :per_group, :].flatten(2)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, documents: Documents | None) -> Tensor:
        """Return [l, b, h * d] of queries [l, b, h, d], keys and values [l, b, g, d] of whole rows."""
        raise NotImplementedError


def _share(config: TransformerConfig, groups: ProcessGroupCollection) -> HeadShare | None:
    """Return this context-parallel rank's share of a tensor-parallel rank's attention heads."""
    ranks = groups.tp.size()
    return HeadShare.of(groups.cp, config.num_attention_heads // ranks, config.num_query_groups // ranks)


class ScaledDotProductAttention(WholeRows, MegatronModule):
    """Causal grouped-query attention by torch's fused kernel, which never forms the [sequence, sequence] scores.

    megatron-core's own `DotProductAttention` does form them; Transformer Engine's needs a GPU.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        pg_collection: ProcessGroupCollection,
        **_: object,
    ) -> None:
        super().__init__(config)
        self.layer_number = layer_number
        self.share = _share(config, pg_collection)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, documents: Documents | None) -> Tensor:
        """Attend as of `WholeRows`."""
        if documents is None:
            out = self._attend(*(x.permute(1, 2, 0, 3) for x in (query, key, value)))  # [b, h, s, d]
            return out.permute(2, 0, 1, 3).flatten(2)
        # One split over all documents: the gradient of a slice would be as long as the batch for each of them
        parts = (_rows_fused(x).split(documents.lengths) for x in (query, key, value))
        outs = [
            self._attend(*(x.transpose(0, 1).unsqueeze(0) for x in qkv))  # [1, h, n, d]
            for qkv in zip(*parts, strict=True)
        ]
        fused = torch.cat([out.squeeze(0).transpose(0, 1).flatten(1) for out in outs])  # [t, h * d]
        return _rows_split(fused, query.shape[1])

    @staticmethod
    def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend causally: q [b, h, s, d], k and v [b, g, s, d] to [b, h, s, d]."""
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[-3] != k.shape[-3])


@functools.cache
def engine_attention() -> type:
    """Return the core attention on Transformer Engine's class, which exists only where that package imports."""
    engine = te.TEDotProductAttention

    class EngineAttention(WholeRows, engine):
        """Transformer Engine's causal attention; documents go to its kernels as packed sequences (`thd`).

        Its own context parallelism is left alone: it takes documents of multiples of 2 c tokens.
        """

        def __init__(
            self,
            config: TransformerConfig,
            layer_number: int,
            attn_mask_type: AttnMaskType,
            attention_type: str,
            *,
            pg_collection: ProcessGroupCollection,
            **options: object,
        ) -> None:
            share, ranks = _share(config, pg_collection), pg_collection.tp.size()
            if share is not None:
                config = copy.copy(config)
                config.context_parallel_size = 1
                config.num_attention_heads = len(share.heads) * ranks
                config.num_query_groups = len(share.groups) * ranks
            options["pg_collection"] = pg_collection
            super().__init__(config, layer_number, attn_mask_type, attention_type, **options)
            self.share = share

        def attend(self, query: Tensor, key: Tensor, value: Tensor, documents: Documents | None) -> Tensor:
            """Attend as of `WholeRows`.

            Errors:
                ValueError: Transformer Engine has no kernel that keeps documents apart for these shapes.
            """
            if documents is None:
                return engine.forward(self, query, key, value, None, AttnMaskType.causal)
            longest = max(documents.lengths)
            packed = PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=documents.offsets,
                cu_seqlens_kv=documents.offsets,
                max_seqlen_q=longest,
                max_seqlen_kv=longest,
            )
            qkv = (_rows_fused(x) for x in (query, key, value))
            out = engine.forward(self, *qkv, None, AttnMaskType.causal, packed_seq_params=packed)  # [t, h * d]
            return _rows_split(out, query.shape[1])

    return EngineAttention
