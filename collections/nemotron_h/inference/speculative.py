"""Write several tokens per pass: a draft's tokens are read on trial, and those stay that the model would have written.

Axes: b batch, k drafted tokens, w = k + 1 tokens of a pass, v vocabulary.

A drafted token x, chosen by q(x), is accepted with probability min(1, p(x) / q(x)), where p is the model's distribution
after temperature and filters; at the first that is not, the token is chosen by the rest, (p - q)+ divided by its sum,
and where all are, by p of the place behind them. What is written then has the distribution p, whatever q is (Leviathan
et al. 2022, arXiv 2211.17192, appendix A.1). Greedy choices are the case of a p of 0 and 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from nemotron_h.checkpoint.finite import check_scores
from nemotron_h.inference.drafts import Acceptance, Drafter, Proposal
from nemotron_h.inference.graph import Recorded
from nemotron_h.inference.model import GenerationModel
from nemotron_h.inference.sampling import Sampling, distribution, invert, uniforms
from nemotron_h.inference.states import States
from nemotron_h.inference.thought import Thought
from nemotron_h.inference.writer import Writer
from nemotron_h.model.blocks.running import State


def judge(scores: Tensor, proposal: Proposal, sampling: Sampling, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Accept drafted tokens and choose the one that follows them.

    Args:
        scores: of the model, [b, w, v], at the token before each drafted one and at the last.
        proposal: on the same device.
        sampling: how tokens are chosen.
        uniform: numbers from 0 to 1, float64 [b, w]: of each acceptance, and of the choice behind.
    Returns:
        accepted tokens of each row and the next token, int64 [b] both.
    """
    drafted = proposal.tokens
    rows, places = (torch.arange(size, device=drafted.device) for size in drafted.shape)
    if sampling.temperature == 0:
        best = scores.argmax(-1)  # [b, w]
        right = drafted == best[:, :-1]
    else:
        p, q = distribution(scores, sampling), proposal.probabilities
        if q is None:  # no choice: all of the probability is the token's
            q = torch.zeros_like(p[:, :-1]).scatter_(-1, drafted.unsqueeze(-1), 1)
        p_drafted, q_drafted = (t.gather(-1, drafted.unsqueeze(-1)).squeeze(-1) for t in (p[:, :-1], q))  # [b, k]
        right = uniform[:, :-1] * q_drafted < p_drafted
    accepted = (right & (places < proposal.counts[:, None])).long().cumprod(1).sum(1)  # [b]
    if sampling.temperature == 0:
        return accepted, best[rows, accepted]
    free = p[rows, accepted]  # [b, v]
    rest = (free - q[rows, accepted.clamp(max=drafted.shape[1] - 1)]).clamp_(min=0)
    # rounding may leave no rest where p and q are the same
    refused = (accepted < proposal.counts) & (rest.sum(-1) > 0)
    return accepted, invert(torch.where(refused[:, None], rest, free), uniform[:, -1])


def _score_and_judge(
    model: GenerationModel,
    states: States,
    window: list[State | None],
    sampling: Sampling,
    tokens: Tensor,
    counts: Tensor,
    uniform: Tensor,
    *probabilities: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return scores [b, w, v] of a pass over tokens [b, w], and `judge`'s accepted and next tokens, [b, 2]."""
    scores = model.logits(model.try_tokens(tokens, states, window))
    proposal = Proposal(tokens[:, 1:], counts, *(probabilities or (None,)))
    return scores, torch.stack(judge(scores, proposal, sampling, uniform), dim=1)


class SpeculativeWriter(Writer):
    """Writes by drafts: reads the last token and those drafted on trial, all in one pass.

    Every row draws the same numbers per pass, whatever is accepted of it and what else is in the batch.

    Args:
        model, states, hidden, sampling, generators, thoughts, graph: as `Writer`'s; the states with room for
            `drafter.tokens` + 1 more than is written.
        drafter: has read the texts.
        texts: token ids that the states have read.
        acceptance: is counted on.

    Attributes:
        judged, accepted: a pass over the window, and the advance of the states.
    """

    def __init__(
        self,
        model: GenerationModel,
        states: States,
        hidden: Tensor,
        sampling: Sampling,
        generators: list[torch.Generator],
        drafter: Drafter,
        texts: Sequence[Sequence[int]],
        acceptance: Acceptance,
        *,
        thoughts: Sequence[Thought] = (),
        graph: bool | None = None,
    ) -> None:
        super().__init__(model, states, hidden, sampling, generators, thoughts=thoughts, graph=graph)
        self.drafter, self.acceptance = drafter, acceptance
        self.texts = [list(text) for text in texts]
        window = model.window(states, drafter.tokens + 1)
        self.accepted = Recorded(partial(model.accept, states, window), model, graph)
        self.judged = Recorded(partial(_score_and_judge, model, states, window, sampling), model, graph)
        #: tokens of the last window that stay, by row
        self._stay = np.zeros(len(texts), dtype=np.int64)

    def write(self, ended: Sequence[bool]) -> list[list[int]]:
        """Return the accepted tokens of every sequence and one more; see `Writer`."""
        # the first tokens are those that prefill has scored
        written = super().write(ended) if self.chosen is None else self._next(ended)
        for text, tokens, over in zip(self.texts, written, ended, strict=True):
            text += [] if over else tokens
        return written

    def _next(self, ended: Sequence[bool]) -> list[list[int]]:
        # a row that has ended stays where it is: the others may go on beyond its room
        self._accept(np.where(ended, 0, self._stay))
        drafts, device = self.drafter.tokens, self.model.device
        uniform = torch.zeros(len(ended), 2 * drafts + 1, dtype=torch.float64)
        if self.sampling.temperature > 0:
            uniform = uniforms(self.generators, 2 * drafts + 1)
        proposal = self.drafter.propose(self.texts, uniform[:, :drafts])
        last = torch.tensor([text[-1] for text in self.texts])
        counts = proposal.counts.tolist()
        if not any(counts) and not any(ended):  # a step costs less than a window
            self.chosen = last
            self.acceptance.passes += len(ended)
            return super().write(ended)
        drafted = proposal.tokens.to(device)
        inputs = [torch.cat([last[:, None].to(device), drafted], dim=1), proposal.counts.to(device)]
        inputs += [uniform[:, drafts:].to(device)]
        inputs += [] if proposal.probabilities is None else [proposal.probabilities]
        scores, choice = self.judged(*inputs)
        check_scores(scores)
        tokens = torch.cat([drafted, choice], dim=1).tolist()
        written = [row[: row[-2]] + row[-1:] for row in tokens]
        if self.thoughts:  # a forced token stands where a drafted one would: none behind it stays
            written = [
                row if over else thought.pass_on(row)
                for row, thought, over in zip(written, self.thoughts, ended, strict=True)
            ]
        self._stay[:] = [len(row) for row in written]
        for row, count, over in zip(written, counts, ended, strict=True):
            if not over:
                self.acceptance.add(Acceptance(1, count, len(row) - 1))
        return written

    def finish(self, taken: Sequence[int]) -> None:
        """Accept what was read of the tokens that stay."""
        self._accept(np.minimum(self._stay, np.asarray(taken) + 1))

    def _accept(self, counts: np.ndarray) -> None:
        """Advance all states over the first tokens of the last window."""
        if counts.any():
            self.drafter.accept(counts)  # first: it looks at scores, for which nothing is to be waited for yet
            self.accepted(torch.from_numpy(counts).to(self.model.device))
            self.states.advance(counts, on_device=False)
        self._stay[:] = 0
