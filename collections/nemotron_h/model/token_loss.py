"""The mean loss per token where context-parallel ranks share the tokens of a micro-batch."""

from __future__ import annotations

from typing import Any

from megatron.core import parallel_state
from nemo.lightning.megatron_parallel import MaskedTokenLossReduction
from torch import Tensor


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
