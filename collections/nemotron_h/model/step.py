"""A micro-batch of a step: what a rank takes of it, its forward pass, and the mean loss per token."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from megatron.core import parallel_state
from nemo.lightning.megatron_parallel import MaskedTokenLossReduction
from torch import Tensor, nn

from nemotron_h.model.context_parallel import own_tokens

#: of a batch, values of each token, [batch, sequence, ...]; documents stay whole (`model/context_parallel.py`)
_OF_TOKENS = ("tokens", "position_ids", "labels", "loss_mask", "teacher_values", "teacher_ids")


def data_step(dataloader_iter: Any, last_stage: Iterable[str] = ()) -> dict[str, Any]:
    """Take the next micro-batch and keep what this pipeline stage and context-parallel rank need.

    Tiles of images and the mask of their places stay whole.

    Args:
        last_stage: keys that the loss of a training stage reads, beside labels and their mask.
    """
    batch = next(dataloader_iter)
    if isinstance(batch, tuple) and len(batch) == 3:
        batch = batch[0]
    needed = {"seq_idx"}
    if parallel_state.is_pipeline_first_stage():
        needed |= {"tokens", "position_ids", "tiles", "image_mask"}
    if parallel_state.is_pipeline_last_stage():
        needed |= {"labels", "loss_mask", *last_stage}
    moved = {key: value.cuda(non_blocking=True) if key in needed else None for key, value in batch.items()}
    moved["sample_ids"] = batch.get("sample_ids")  # for callbacks, on the CPU
    # on all stages, as a whole number, which no cast to bfloat16 rounds
    moved["loss_count"] = batch.get("pairs", batch["loss_mask"]).sum().long().cuda(non_blocking=True)
    group = parallel_state.get_context_parallel_group()
    own = {key: own_tokens(moved[key], group, 1).contiguous() for key in _OF_TOKENS if moved.get(key) is not None}
    return {**moved, **own}


def forward_step(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Run one forward pass: per-token losses where labels are present, logits otherwise."""
    return model(
        input_ids=batch["tokens"],
        position_ids=batch["position_ids"],
        attention_mask=None,
        labels=batch.get("labels"),
        seq_idx=batch.get("seq_idx"),
        loss_count=batch.get("loss_count"),
        tiles=batch.get("tiles"),
        image_mask=batch.get("image_mask"),
        loss_mask=batch.get("loss_mask"),
    )


def over_all_tokens(total: Tensor, tokens: Tensor, batch: dict[str, Any], per_token: bool) -> tuple[Tensor, Tensor]:
    """Return a sum over this rank's tokens of a micro-batch and what Megatron divides it by, for the mean over all.

    Megatron averages gradients over context- and data-parallel ranks alike. The mean over all tokens is the average of
    the context-parallel ranks' sums, each times the number of ranks, over the tokens of all: not of their means, where
    they have different numbers of tokens that count.

    Args:
        tokens: of this rank that count.
        batch: of `data_step`.
        per_token: Megatron divides the sums of a whole step by its tokens, so that nothing is averaged.
    """
    ranks = parallel_state.get_context_parallel_world_size()
    if per_token or ranks == 1:
        return total, tokens
    return total * ranks, batch["loss_count"].to(tokens.dtype)


class TokenLoss(MaskedTokenLossReduction):
    """NeMo's mean over the tokens that a mask lets count; `per_token` as of `over_all_tokens`."""

    def __init__(self, per_token: bool, validation_step: bool = False) -> None:
        super().__init__(validation_step)
        self.per_token = per_token

    def forward(self, batch: dict[str, Any], forward_out: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the loss summed over this rank's tokens, what Megatron divides it by, and the sums for `reduce`."""
        total, tokens, report = super().forward(batch, forward_out)
        return *over_all_tokens(total, tokens, batch, self.per_token), report
