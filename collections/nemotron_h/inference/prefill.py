"""Read prompts into the states of a model, in passes of a bounded number of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nemotron_h.inference.model import GenerationModel
from nemotron_h.inference.states import States
from nemotron_h.inference.vision import Placed

#: ours: tokens of a prefill pass, of all its sequences together. It bounds the memory of activations, and is long
#: enough for full-speed matmuls
PASS_TOKENS = 1024
PASS_TOKENS_GPU = 8192


def pass_tokens(model: GenerationModel) -> int:
    """Return the tokens of a prefill pass on the model's device."""
    return PASS_TOKENS if model.device.type == "cpu" else PASS_TOKENS_GPU


def prefill(
    model: GenerationModel,
    prompts: Sequence[Sequence[int]],
    states: States,
    limit: int | None = None,
    images: Sequence[Placed | None] = (),
) -> torch.Tensor:
    """Read prompts of any lengths into `states` without padding, in passes of a bounded number of tokens.

    As many sequences as fit into a pass go forward together; one that has come to its end drops out of the passes that
    follow. Memory beyond `states` and the last hidden states does not grow with lengths or number of the prompts.

    Args:
        prompts: token ids, at least one each, the longest prompt first.
        states: of sequences at one position.
        limit: most tokens of a pass; None is `pass_tokens(model)`.
        images: of each prompt, or None; empty is none at all.
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
        part = states.rows(begin, end), limit // rows, last[begin:end], images[begin:end]
        _prefill_together(model, prompts[begin:end], *part)
        begin = end
    return last


def extend_in_passes(
    model: GenerationModel,
    tokens: torch.Tensor,
    states: States,
    limit: int | None = None,
    placed: Placed | None = None,
) -> torch.Tensor:
    """Read more tokens of sequences at one position, in passes of a bounded number.

    Args:
        tokens: int64 [batch, length].
        limit: most tokens of a pass; None is `pass_tokens(model)`.
        placed: image tokens of the one sequence that there is then.
    Returns:
        hidden states after the last token, [batch, hidden].
    """
    chunk = max(1, (limit or pass_tokens(model)) // len(tokens))
    for number, part in enumerate(tokens.split(chunk, dim=1)):
        embedded = None
        if placed is not None:
            embedded = model.embed(part)
            placed.put(embedded[0], number * chunk)
        hidden = model.extend(part, states, last_only=True, embedded=embedded)  # [batch, 1, hidden]
    return hidden[:, -1]


def _prefill_together(
    model: GenerationModel,
    prompts: Sequence[Sequence[int]],
    states: States,
    chunk: int,
    last: torch.Tensor,
    images: Sequence[Placed | None],
) -> None:
    """Run rows side by side, at most `chunk` tokens of each per pass."""
    lengths = [len(prompt) for prompt in prompts]
    rows, done = len(prompts), 0
    while rows:
        count = min(chunk, lengths[rows - 1] - done)
        tokens = torch.tensor([list(prompt[done : done + count]) for prompt in prompts[:rows]])  # [rows, count]
        embedded = None
        if any(images[:rows]):
            embedded = model.embed(tokens)
            for row, placed in zip(embedded, images, strict=False):
                if placed is not None:
                    placed.put(row, done)
        hidden = model.extend(tokens, states.rows(0, rows), last_only=True, embedded=embedded)  # [rows, 1, hidden]
        done += count
        while rows and lengths[rows - 1] == done:
            rows -= 1
            last[rows] = hidden[rows, -1]
