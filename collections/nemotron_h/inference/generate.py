"""Continue prompts: prefill in chunks, then one token at a time from constant-size state."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch

from nemotron_h.core.errors import UserError
from nemotron_h.inference.graph import Stepper
from nemotron_h.inference.model import GenerationModel
from nemotron_h.inference.sampling import Sampling, choose
from nemotron_h.inference.states import States

#: ours: tokens of a prefill pass, of all its sequences together. It bounds the memory of activations, and is long
#: enough for full-speed matmuls
PASS_TOKENS = 1024
PASS_TOKENS_GPU = 8192


def pass_tokens(model: GenerationModel) -> int:
    """Return the tokens of a prefill pass on the model's device."""
    return PASS_TOKENS if model.device.type == "cpu" else PASS_TOKENS_GPU


def prefill(
    model: GenerationModel, prompts: Sequence[Sequence[int]], states: States, limit: int | None = None
) -> torch.Tensor:
    """Read prompts of any lengths into `states` without padding, in passes of a bounded number of tokens.

    As many sequences as fit into a pass go forward together; one that has come to its end drops out of the passes that
    follow. Memory beyond `states` and the last hidden states does not grow with lengths or number of the prompts.

    Args:
        prompts: token ids, at least one each, the longest prompt first.
        states: at position 0.
        limit: most tokens of a pass; None is `pass_tokens(model)`.
    Returns:
        hidden states after each prompt's last token, [batch, hidden].
    """
    limit = limit or pass_tokens(model)
    lengths = [len(prompt) for prompt in prompts]
    if lengths != sorted(lengths, reverse=True) or lengths[-1] < 1:
        raise ValueError("prefill: prompts must be ordered from the longest to the shortest, none empty")
    last = torch.empty(len(prompts), model.definition.hidden_size, dtype=model.dtype, device=model.device)
    begin = 0
    while begin < len(prompts):
        rows = max(1, limit // lengths[begin])
        end = min(begin + rows, len(prompts))
        _prefill_together(model, prompts[begin:end], states.rows(begin, end), limit // rows, last[begin:end])
        begin = end
    return last


def extend_in_passes(
    model: GenerationModel, tokens: torch.Tensor, states: States, limit: int | None = None
) -> torch.Tensor:
    """Read more tokens of sequences at one position, in passes of a bounded number.

    Args:
        tokens: int64 [batch, length].
        limit: most tokens of a pass; None is `pass_tokens(model)`.
    Returns:
        hidden states after the last token, [batch, hidden].
    """
    chunk = max(1, (limit or pass_tokens(model)) // len(tokens))
    for part in tokens.split(chunk, dim=1):
        hidden = model.extend(part, states, last_only=True)  # [batch, 1, hidden]
    return hidden[:, -1]


def _prefill_together(
    model: GenerationModel, prompts: Sequence[Sequence[int]], states: States, chunk: int, last: torch.Tensor
) -> None:
    """Run rows side by side, at most `chunk` tokens of each per pass."""
    lengths = [len(prompt) for prompt in prompts]
    rows, done = len(prompts), 0
    while rows:
        count = min(chunk, lengths[rows - 1] - done)
        tokens = torch.tensor([list(prompt[done : done + count]) for prompt in prompts[:rows]])  # [rows, count]
        hidden = model.extend(tokens, states.rows(0, rows), last_only=True)  # [rows, 1, hidden]
        done += count
        while rows and lengths[rows - 1] == done:
            rows -= 1
            last[rows] = hidden[rows, -1]


class Generation:
    """Continuations of a batch of prompts, one token of each per item.

    Each row gets what its prompt alone would get (up to rounding), whatever else is in the batch.

    Args:
        prompts: token ids, at least one each; lengths may differ.
        max_tokens: longest continuation.
        sampling: how tokens are chosen; None is `Sampling()`.
        stop_ids: a row ends before any of these tokens (a tokenizer's `eod_id`).
        graph: see `Stepper`.

    Attributes:
        stopped_by: by row, the stop token that ended it, or None.
    Errors:
        UserError: no prompts, an empty one, ids outside the vocabulary, or max_tokens < 1.
    """

    def __init__(
        self,
        model: GenerationModel,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        sampling: Sampling | None = None,
        stop_ids: Collection[int] = (),
        graph: bool | None = None,
    ) -> None:
        check_prompts(model, prompts, max_tokens)
        self.model, self.prompts, self.max_tokens, self.graph = model, prompts, max_tokens, graph
        self.sampling, self.stop_ids = sampling or Sampling(), frozenset(stop_ids)
        self.stopped_by: list[int | None] = [None] * len(prompts)
        self._ended = [False] * len(prompts)

    def end(self, row: int) -> None:
        """End a row that has all that it was to have."""
        self._ended[row] = True

    def __iter__(self) -> Iterator[list[int | None]]:
        """Yield one entry per prompt: its next token, or None once it has ended. Ends when all have."""
        prompts, ended = self.prompts, self._ended
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        generators = self.sampling.generators(len(prompts))
        generators = [generators[i] for i in order]
        states = self.model.new_states(len(prompts), max(map(len, prompts)) + self.max_tokens)
        scores = self.model.logits(prefill(self.model, [prompts[i] for i in order], states))
        stepper = Stepper(self.model, states, self.graph)
        for number in range(self.max_tokens):
            chosen = choose(scores, self.sampling, generators)
            items: list[int | None] = [None] * len(prompts)
            for index, token in zip(order, chosen.tolist(), strict=True):
                if not ended[index] and token in self.stop_ids:
                    ended[index], self.stopped_by[index] = True, token
                items[index] = None if ended[index] else token
            if all(ended):
                return
            yield items
            if all(ended):
                return
            if number + 1 < self.max_tokens:
                scores = stepper.step(chosen)


def generate(
    model: GenerationModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    sampling: Sampling | None = None,
    stop_ids: Collection[int] = (),
    graph: bool | None = None,
) -> list[list[int]]:
    """Return the whole continuation of each prompt; see `Generation`."""
    found: list[list[int]] = [[] for _ in prompts]
    for items in Generation(model, prompts, max_tokens=max_tokens, sampling=sampling, stop_ids=stop_ids, graph=graph):
        for continuation, token in zip(found, items, strict=True):
            if token is not None:
                continuation.append(token)
    return found


def check_prompts(model: GenerationModel, prompts: Sequence[Sequence[int]], max_tokens: int) -> None:
    """Check prompts and length.

    Errors:
        UserError: see `Generation`.
    """
    if max_tokens < 1:
        raise UserError(f"max-tokens = {max_tokens}; it has to be 1 or more")
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise UserError("there is nothing to continue: no prompt, or a prompt without tokens")
    size = model.definition.vocab_size
    wrong = next((token for prompt in prompts for token in prompt if not 0 <= token < size), None)
    if wrong is not None:
        raise UserError(f"token {wrong} of a prompt is outside the model's vocabulary of {size:,}")
