"""Generation with a draft: greedy, the same tokens; sampled, the same distribution; states, those of steps."""

from __future__ import annotations

import gc
import itertools
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from drafting import KINDS, prompts, tiny
from scipy import stats

from nemotron_h.core.errors import UserError
from nemotron_h.inference import drafts, speculative
from nemotron_h.inference.drafts import Draft, Lookup, check_takes_back
from nemotron_h.inference.generate import Generation, generate
from nemotron_h.inference.model import GenerationModel
from nemotron_h.inference.prefill import prefill
from nemotron_h.inference.sampling import Sampling, distribution, invert
from nemotron_h.model.blocks.running import Running

GREEDY = Sampling(temperature=0)
EXACT = {torch.float64: 1e-12, torch.float32: 1e-4}


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """max |a - b| / max |b|."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def written(generation: Generation) -> list[list[int]]:
    """All tokens of each row."""
    found: list[list[int]] = [[] for _ in generation.prompts]
    for items in generation:
        for row, tokens in zip(found, items, strict=True):
            row += tokens
    return found


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_on_trial_are_steps(kind: str, dtype: torch.dtype) -> None:
    """Scores of tokens on trial, in parts, and all states after some of them were accepted."""
    model = tiny(kind, dtype=dtype)
    lengths, width = [9, 4, 1], 5
    texts = prompts(*(length + 20 for length in lengths))
    states, stepped = (model.new_states(3, 40) for _ in range(2))
    for each in (states, stepped):
        prefill(model, [text[:length] for text, length in zip(texts, lengths, strict=True)], each)
    window = model.window(states, width)
    at = np.array(lengths)
    for counts in ([5, 0, 2], [1, 3, 5], [0, 4, 0]):
        tokens = torch.tensor([text[n : n + width] for text, n in zip(texts, at, strict=True)])
        hidden = [model.try_tokens(tokens[:, :2], states, window), model.try_tokens(tokens[:, 2:], states, window, 2)]
        scores = model.logits(torch.cat(hidden, 1))
        for row, count in enumerate(counts):
            alone = model.new_states(1, 40)
            whole = torch.tensor([texts[row][: at[row] + width]])
            assert relative_error(scores[row], model.logits(model.extend(whole, alone))[0, -width:]) < EXACT[dtype]
            part = stepped.rows(row, row + 1)
            for token in texts[row][at[row] : at[row] + count]:
                model.step(torch.tensor([token]), part)
        model.accept(states, window, torch.tensor(counts))
        states.advance(np.array(counts), on_device=False)
        at += counts
        assert states.lengths.tolist() == stepped.lengths.tolist() == at.tolist()
        for actual, expected in zip(states.layers, stepped.layers, strict=True):
            for name, tensor in vars(expected).items() if expected is not None else ():
                for row, length in enumerate(at):
                    behind = (slice(None), slice(0, length)) if name in ("keys", "values") else ()
                    assert relative_error(getattr(actual, name)[row][behind], tensor[row][behind]) < EXACT[dtype], name


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_stay(kind: str) -> None:
    """Whatever drafts, over ragged batches; a draft that is the model itself is accepted whole."""
    model = tiny(kind)
    texts = prompts(30, 1, 2, 17, 9, 5)
    plain = generate(model, texts, max_tokens=25, sampling=GREEDY)
    sources = {"itself": model, "another": tiny(kind, seed=1), "its layers": model.first_layers(2), "lookup": None}
    for (name, source), tokens in itertools.product(sources.items(), (1, 4)):
        generation = Generation(model, texts, max_tokens=25, sampling=GREEDY, draft=Draft(source, tokens))
        assert written(generation) == plain, (name, tokens)
        acceptance = generation.acceptance
        assert acceptance.passes >= len(texts) * 24 / (tokens + 1)
        if name == "itself":
            assert acceptance.accepted == acceptance.drafted == tokens * acceptance.passes
        else:
            assert acceptance.accepted < acceptance.drafted


def sequence_probabilities(model: GenerationModel, text: list[int], length: int, sampling: Sampling) -> np.ndarray:
    """Probabilities of all continuations of `length` tokens, in the order of their digits."""
    size = len(model.output)
    ways = torch.tensor(list(itertools.product(range(size), repeat=length)))
    ids = torch.cat([torch.tensor(text).expand(len(ways), -1), ways], 1)
    scores = model.logits(model.extend(ids, model.new_states(*ids.shape)))[:, len(text) - 1 : -1]
    return distribution(scores, sampling).gather(-1, ways[..., None]).squeeze(-1).prod(1).numpy()


def chances(model: GenerationModel, draft: Draft, text: list[int], sampling: Sampling) -> float:
    """The chance of counts at least as far from the model's probabilities (chi-square), over 4,000 continuations."""
    rows, length, size = 4000, 3, len(model.output)
    expected = rows * sequence_probabilities(model, text, length, sampling)
    assert expected.sum() == pytest.approx(rows, rel=1e-9)
    found = generate(model, [text] * rows, max_tokens=length, sampling=sampling, draft=draft)
    places = np.array(found) @ size ** np.arange(length)[::-1]
    counts = np.bincount(places, minlength=size**length)
    if counts[expected == 0].any():
        return 0.0
    rare = expected < 5  # a cell of few is no normal number: all such together are one
    cells = [np.append(each[~rare], each[rare].sum()) for each in (counts, expected)]
    cells = [each[cells[1] > 0] for each in cells]
    return float(stats.chisquare(*cells).pvalue)


SAMPLINGS = {
    "plain": Sampling(seed=5),
    "filtered": Sampling(temperature=0.8, top_k=5, top_p=0.9, seed=6),
}


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("source", ["model", "lookup"])
def test_sampled_distribution_stays(source: str, sampling: Sampling, monkeypatch: pytest.MonkeyPatch) -> None:
    """All continuations of three tokens, one before a window of two drafted ones and two or more of windows, have the
    model's probabilities; by two wrong rules they have not.
    """
    model, other = (tiny("hybrid", seed, vocabulary=6).first_layers(2) for seed in range(2))
    draft = Draft(None if source == "lookup" else other, 2)
    text = [0, 1, 2, 3, 4, 5, 0, 1, 2, 0, 1]
    assert chances(model, draft, text, sampling) > 1e-3

    def accepts_all(scores, proposal, sampling, uniform):
        counts = proposal.counts
        return counts, invert(distribution(scores[torch.arange(len(counts)), counts], sampling), uniform[:, -1])

    def forgets_the_rest(scores, proposal, sampling, uniform):
        """The choice after a refusal is by p, not by (p - q)+."""
        accepted, _ = judge(scores, proposal, sampling, uniform)
        rows = torch.arange(len(accepted))
        return accepted, invert(distribution(scores[rows, accepted], sampling), uniform[:, -1])

    judge = speculative.judge
    for wrong in (accepts_all, forgets_the_rest) if sampling.top_k == 0 else ():
        monkeypatch.setattr(speculative, "judge", wrong)
        assert chances(model, draft, text, sampling) < 1e-6, wrong.__name__


def test_batch_order_and_company_do_not_matter() -> None:
    model, draft = tiny("hybrid"), Draft(tiny("mamba"), 3)
    texts = prompts(5, 30, 1, 12)
    together = generate(model, texts, max_tokens=15, sampling=Sampling(0.9, 20, 0.9, seed=7), draft=draft)
    for row, text in enumerate(texts):
        sampling = Sampling(0.9, 20, 0.9, seed=7 + row)
        for _ in range(2):
            assert generate(model, [text], max_tokens=15, sampling=sampling, draft=draft) == [together[row]]
    assert generate(model, texts, max_tokens=15, sampling=Sampling(0.9, 20, 0.9, seed=8), draft=draft) != together


@pytest.mark.parametrize("source", ["itself", "lookup"])
def test_ends_inside_of_a_window(source: str) -> None:
    """By a stop token, by max_tokens and by the reader, each at every place of a window; other rows go on."""
    model = tiny("hybrid")
    texts = prompts(9, 20, 4)
    draft = Draft(model if source == "itself" else None, 4)
    free = generate(model, texts, max_tokens=30, sampling=GREEDY)
    for count in range(1, 8):
        short = generate(model, texts, max_tokens=count, sampling=GREEDY, draft=draft)
        assert short == [row[:count] for row in free]
        stop = free[0][count]
        generation = Generation(model, texts, max_tokens=30, sampling=GREEDY, stop_ids=[stop], draft=draft)
        found = written(generation)
        for row, whole, by in zip(found, free, generation.stopped_by, strict=True):
            assert row == (whole[: whole.index(stop)] if stop in whole else whole)
            assert by == (stop if stop in whole else None)
        generation, rest = Generation(model, texts, max_tokens=30, sampling=GREEDY, draft=draft), [[], []]
        for items in generation:
            generation.end(0)
            for row, tokens in zip(rest, items[1:], strict=True):
                row += tokens
        assert rest == free[1:]


def test_lookup_copies_what_followed() -> None:
    def copy(text: list[int], tokens: int = 4) -> list[int]:
        lookup = Lookup(tokens)
        lookup.read([text[:1]], 0, GREEDY, None)
        for end in range(2, len(text)):  # the index goes on with the text
            lookup.propose([text[:end]], torch.empty(0))
        proposal = lookup.propose([text], torch.empty(0))
        return proposal.tokens[0, : proposal.counts[0]].tolist()

    assert copy([1, 2, 3, 4, 5, 6, 7, 1, 2, 3]) == [4, 5, 6, 7]
    assert copy([1, 2, 3, 8, 9, 2, 3, 4, 5, 6, 1, 2, 3]) == [8, 9, 2, 3], "three tokens before two"
    assert copy([2, 3, 8, 2, 3, 4, 0, 0, 2, 3], 1) == [4], "the last place"
    assert copy([5, 1, 2, 1, 2]) == [1, 2, 1, 2], "beyond the text's end"
    assert copy([1, 2, 3, 4, 3]) == copy([7]) == []


class Forgetful(Running):
    """A kind that has a state, and nothing that takes tokens back."""

    kind = SimpleNamespace(name="forgetful")

    def state(self, *_: object) -> object:
        """Some."""
        return object()


def test_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("hybrid")
    with pytest.raises(UserError, match="small scores 32 tokens, the model that it drafts for 64"):
        generate(model, [[1]], max_tokens=2, draft=Draft(tiny("hybrid", vocabulary=32), name="small"))
    monkeypatch.setattr(drafts, "running_layers", lambda _: [*model.running, Forgetful(None, 0)])
    with pytest.raises(UserError, match="runs/x: forgetful layers cannot take back tokens"):
        check_takes_back(model.definition, "runs/x")


@pytest.mark.parametrize("drafted", [False, True])
def test_states_go_with_their_generation(monkeypatch, drafted: bool) -> None:
    """A cycle of references would leave them, and a GPU's graphs, in memory until Python looks for cycles."""
    model, all_states = tiny("hybrid"), []
    draft = Draft(tiny("hybrid", seed=1), 3) if drafted else None
    new_states = GenerationModel.new_states

    def remembered(self: GenerationModel, *sizes: int) -> object:
        states = new_states(self, *sizes)
        all_states.append(weakref.ref(states))
        return states

    monkeypatch.setattr(GenerationModel, "new_states", remembered)
    gc.collect()
    gc.disable()
    try:
        generate(model, prompts(9, 4), max_tokens=6, sampling=GREEDY, draft=draft)
        assert len(all_states) == 1 + drafted
        assert not any(states() for states in all_states)
    finally:
        gc.enable()
