"""Losses over pairs of answers: DPO (2305.18290) and reward-aware preference optimisation (RPO), as NeMo-Aligner's.

With reference log-probabilities given, `delta` of an answer is the policy's summed log-probability less the
reference's, and of a pair

    b = beta * (delta of the chosen - delta of the rejected)      what the policy says the reward gap is
    a = gt_reward_scale * (reward of the chosen - of the rejected)      what the records say

DPO is -log sigmoid(b); `dpo_norm` is the same with each delta divided by the tokens of its answer (open-instruct's,
which Falcon-H1 took). RPO (Sun et al. 2025, arXiv 2502.00203) is KL(Bernoulli(sigmoid(a)) || Bernoulli(sigmoid(b)))
(`rpo_bwd_kl`), the other way round (`rpo_fwd_kl`), or (b - a)^2.

Axes: w windows, s positions, m slots of a window for pairs, n pairs of a micro-batch; an axis of 2 is chosen, rejected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from nemo.lightning.megatron_parallel import MegatronLossReduction
from torch import Tensor

from nemotron_h.model.context_parallel import own_tokens
from nemotron_h.schema.recipe import DPO_LOSSES

#: of a batch, beside labels and their mask
BATCH_KEYS = ("pairs", "reference", "reward_gap")
#: of the sums that a step's micro-batches give, in their order
SUMS = ("loss", "pairs", "margin", "accuracy", "chosen_logprob", "rejected_logprob")
METRICS = ("reward_margin", "reward_accuracy", "chosen_logprob", "rejected_logprob")


def _bernoulli_kl(of: Tensor, to: Tensor) -> Tensor:
    """Return the KL of Bernoulli(sigmoid(of)) to Bernoulli(sigmoid(to)), elementwise."""
    up = torch.sigmoid(of) * (F.logsigmoid(of) - F.logsigmoid(to))
    return up + torch.sigmoid(-of) * (F.logsigmoid(-of) - F.logsigmoid(-to))


#: loss of each pair from (a, b), elementwise
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    **dict.fromkeys(DPO_LOSSES, lambda a, b: -F.logsigmoid(b)),
    "rpo_bwd_kl": lambda a, b: _bernoulli_kl(a, b),
    "rpo_fwd_kl": lambda a, b: _bernoulli_kl(b, a),
    "rpo_sq": lambda a, b: (b - a) ** 2,
}


def answer_logprobs(losses: Tensor, loss_mask: Tensor, seq_idx: Tensor, slots: int) -> Tensor:
    """Sum the log-probabilities of both answers of every pair of a micro-batch of windows, over the tokens of all
    context-parallel ranks: each gets the sums, and the gradients of its own tokens.

    Args:
        losses: cross entropies of this rank's tokens, [w, s].
        loss_mask: [w, s], 1 in answers.
        seq_idx: the conversation of each position of whole windows, ascending; pair n is 2 n and 2 n + 1.
        slots: pairs of a window at most.
    Returns:
        float64 [w, m, 2]; slots without a pair hold 0. A conversation's tokens are added in one order, so a
        repeated step gives the same bits.
    """
    group = parallel_state.get_context_parallel_group()
    seq_idx = own_tokens(seq_idx, group, 1)  # [w, s]
    windows, length = len(losses), losses.shape[1] * group.size()
    # conversations of a window are numbered below s + 1: each window has so many places in the sums
    row = torch.arange(windows, device=losses.device).unsqueeze(1) * (length + 1)  # [w, 1]
    counts = torch.bincount((seq_idx + row).flatten(), minlength=windows * (length + 1))
    values = -(losses * loss_mask).double().flatten()
    sums = torch.segment_reduce(values, "sum", lengths=counts, unsafe=True)  # [w * (s + 1)]
    sums = sums.view(windows, length + 1)[:, : 2 * slots].unflatten(1, (slots, 2))
    # forward the sum, backward each rank's own; megatron-core adds what is not contiguous up in a copy that it drops
    return reduce_from_tensor_model_parallel_region(sums.contiguous(), group)


class PreferenceLoss(MegatronLossReduction):
    """The mean loss of a step's pairs, whatever micro-batch and rank they were in.

    Args:
        loss: one of `LOSSES`.
        beta: see the module.
        gt_reward_scale: see the module.

    Attributes:
        sums: `SUMS` of the newest step (of a validation: of its batches so far), over all data-parallel ranks.
    """

    def __init__(self, loss: str, beta: float, gt_reward_scale: float, accumulate: bool = False) -> None:
        super().__init__()
        self.loss, self.beta, self.gt_reward_scale = loss, beta, gt_reward_scale
        self.accumulate = accumulate
        self.sums: Tensor | None = None

    def forward(self, batch: dict[str, Tensor], forward_out: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the loss summed over the micro-batch's pairs, and their number (Megatron's tokens)."""
        reference = batch["reference"]
        logprobs = answer_logprobs(forward_out, batch["loss_mask"], batch["seq_idx"], reference.shape[1])
        there = torch.arange(reference.shape[1], device=reference.device) < batch["pairs"].unsqueeze(1)  # [w, m]
        logprobs, delta = logprobs[there], (logprobs - reference)[there]  # [n, 2]
        if self.loss == "dpo_norm":
            ones = torch.full_like(forward_out, -1.0)
            lengths = answer_logprobs(ones, batch["loss_mask"], batch["seq_idx"], reference.shape[1])[there]
            delta = delta / lengths.clamp(min=1)  # an answer may be cut away whole
        policy_gap = self.beta * (delta[:, 0] - delta[:, 1])  # b, [n]
        losses = LOSSES[self.loss](self.gt_reward_scale * batch["reward_gap"][there], policy_gap)
        total, pairs = losses.sum(), batch["pairs"].sum()
        with torch.no_grad():
            sums = [total, pairs, policy_gap.sum(), (policy_gap > 0).sum(), *logprobs.sum(0)]
            report = torch.stack([value.double() for value in sums]).detach()
        # each context-parallel rank counts the pairs, and has the gradients of its own tokens
        total = total * parallel_state.get_context_parallel_world_size()
        return total.to(forward_out.dtype), pairs.to(torch.int), {"sums": report}

    def reduce(self, losses_reduced_per_micro_batch: Sequence[dict[str, Tensor]]) -> Tensor:
        """Return the step's mean loss, float32; called where the last pipeline stage is."""
        sums = torch.stack([report["sums"] for report in losses_reduced_per_micro_batch]).sum(0)
        torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        self.sums = sums if self.sums is None or not self.accumulate else self.sums + sums
        return (sums[0] / sums[1]).float()

    def metrics(self) -> dict[str, float]:
        """Return `METRICS`, means over pairs; empty before a step and on other pipeline stages than the last."""
        if self.sums is None:
            return {}
        values = dict(zip(SUMS, self.sums.tolist(), strict=True))
        return {name: value / values["pairs"] for name, value in zip(METRICS, list(values.values())[2:], strict=True)}
