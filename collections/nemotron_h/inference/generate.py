"""Continue prompts: prefill in chunks, then one token at a time from constant-size state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from nemotron_h.errors import UserError
from nemotron_h.inference.graph import Stepper
from nemotron_h.inference.model import GenerationModel
from nemotron_h.inference.sampling import Sampling, choose
from nemotron_h.inference.states import States

#: ours: tokens of a prefill pass, of all its sequences together. It bounds the memory of activations, and is long
#: enough for full-speed products
PASS_TOKENS = 2048
PASS_TOKENS_GPU = 8192


def pass_tokens(model: GenerationModel) -> int:
    """Tokens of a prefill pass where the model is."""
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


def _prefill_together(
    model: GenerationModel, prompts: Sequence[Sequence[int]], states: States, chunk: int, last: torch.Tensor
) -> None:
    """Rows side by side, at most `chunk` tokens of each per pass."""
    lengths = [len(prompt) for prompt in prompts]
    rows, done = len(prompts), 0
    while rows:
        count = min(chunk, lengths[rows - 1] - done)
        tokens = torch.tensor([list(prompt[done : done + count]) for prompt in prompts[:rows]])
        hidden = model.extend(tokens, states.rows(0, rows))
        done += count
        while rows and lengths[rows - 1] == done:
            rows -= 1
            last[rows] = hidden[rows, -1]


def stream(
    model: GenerationModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    sampling: Sampling | None = None,
    stop_id: int | None = None,
    graph: bool | None = None,
) -> Iterator[list[int | None]]:
    """Continue a batch of prompts, one token of each per item.

    Each row gets what its prompt alone would get (up to rounding), whatever else is in the batch.

    Args:
        prompts: token ids, at least one each; lengths may differ.
        max_tokens: longest continuation.
        sampling: how tokens are chosen; None is `Sampling()`.
        stop_id: a row ends before this token (a tokenizer's `eod_id`).
        graph: see `Stepper`.
    Yields:
        one entry per prompt: its next token, or None once it has ended. Ends when all have.
    Errors:
        UserError: no prompts, an empty one, ids outside the vocabulary, or max_tokens < 1.
    """
    sampling = sampling or Sampling()
    _check(model, prompts, max_tokens)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    generators = sampling.generators(len(prompts))
    generators = [generators[i] for i in order]
    states = model.new_states(len(prompts), max(map(len, prompts)) + max_tokens)
    scores = model.logits(prefill(model, [prompts[i] for i in order], states))
    stepper = Stepper(model, states, graph)
    ended = [False] * len(prompts)
    for number in range(max_tokens):
        chosen = choose(scores, sampling, generators)
        items: list[int | None] = [None] * len(prompts)
        for row, (index, token) in enumerate(zip(order, chosen.tolist(), strict=True)):
            ended[row] = ended[row] or token == stop_id
            items[index] = None if ended[row] else token
        if all(ended):
            return
        yield items
        if number + 1 < max_tokens:
            scores = stepper.step(chosen)


def generate(
    model: GenerationModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    sampling: Sampling | None = None,
    stop_id: int | None = None,
    graph: bool | None = None,
) -> list[list[int]]:
    """The whole continuation of each prompt; see `stream`."""
    continuations: list[list[int]] = [[] for _ in prompts]
    for items in stream(model, prompts, max_tokens=max_tokens, sampling=sampling, stop_id=stop_id, graph=graph):
        for continuation, token in zip(continuations, items, strict=True):
            if token is not None:
                continuation.append(token)
    return continuations


def _check(model: GenerationModel, prompts: Sequence[Sequence[int]], max_tokens: int) -> None:
    if max_tokens < 1:
        raise UserError(f"max-tokens = {max_tokens}; it has to be 1 or more")
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise UserError("there is nothing to continue: no prompt, or a prompt without tokens")
    size = model.definition.vocab_size
    wrong = next((token for prompt in prompts for token in prompt if not 0 <= token < size), None)
    if wrong is not None:
        raise UserError(f"token {wrong} of a prompt is outside the model's vocabulary of {size:,}")


class TextStream:
    """Turn token ids into text as they come; a character spread over several tokens appears once it is complete.

    Args:
        decode: token ids to text, with U+FFFD for bytes that are no character (yet).
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self.decode = decode
        self.ids: list[int] = []
        # ids[shown:] are not shown yet; ids[context:shown] only give a decoder the context that spaces depend on
        self.context = self.shown = 0

    def add(self, token: int) -> str:
        """The text that this token completes; empty inside a character."""
        self.ids.append(token)
        text = self._new_text()
        if not text or text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self.context, self.shown = self.shown, len(self.ids)
        return text

    def finish(self) -> str:
        """What is left, incomplete characters as U+FFFD."""
        text = self._new_text()
        self.context = self.shown = len(self.ids)
        return text

    def _new_text(self) -> str:
        before = self.decode(self.ids[self.context : self.shown])
        return self.decode(self.ids[self.context :])[len(before) :]
