"""Thoughts that end at a budget, against a model that reads its whole text anew for each token."""

from __future__ import annotations

import pytest
import torch
from drafting import KINDS, prompts, tiny

from nemotron_h.core.errors import UserError
from nemotron_h.data.thoughts import after_thought, in_thought, switched, with_thought
from nemotron_h.inference.drafts import Draft
from nemotron_h.inference.generate import Generation, generate
from nemotron_h.inference.model import GenerationModel
from nemotron_h.inference.pool import Job, Pool
from nemotron_h.inference.sampling import Sampling
from nemotron_h.inference.thought import ThoughtBudget

GREEDY = Sampling(temperature=0)
LINES = range(12)
LENGTH, GRACE = 28, 7


class Pieces:
    """A tokenizer of 64 pieces, some of which end a line; both markers are one token, or four pieces of text."""

    def __init__(self, special: bool) -> None:
        self.pieces = [f"{i}\n" if i in LINES else f" {i}" for i in range(60)] + ["<", "/", "think", ">"]
        self.special_tokens = {"<think>": 58, "</think>": 59} if special else {}

    def ids_to_text(self, ids: list[int]) -> str:
        names = {number: name for name, number in self.special_tokens.items()}
        return "".join(names.get(i, self.pieces[i]) for i in ids)

    def text_to_ids(self, text: str) -> list[int]:
        return [self.pieces.index(part) for part in text.replace("think", " think ").replace("</", "< / ").split()]

    def marker(self, text: str) -> list[int]:
        return [self.special_tokens[text]] if self.special_tokens else self.text_to_ids(text)


def alone(model: GenerationModel, prompt: list[int], tokenizer: Pieces, budget: int) -> tuple[list[int], int | None]:
    """The greedy tokens of a prompt, and where the first forced one stands; nothing is kept from token to token."""
    end, tokens, forced, at, thought = tokenizer.marker("</think>"), [], [], None, 0
    while len(tokens) < LENGTH:
        whole = torch.tensor([prompt + tokens])
        best = int(model.logits(model.extend(whole, model.new_states(1, whole.shape[1])))[0, -1].argmax())
        is_open = in_thought(tokenizer.ids_to_text(prompt + tokens))
        line = tokenizer.ids_to_text((prompt + tokens)[-1:]).endswith("\n")
        if is_open and not forced and thought >= budget and (line or thought >= budget + GRACE):
            forced, at = list(end), len(tokens) if at is None else at
        thought += is_open and not forced
        tokens.append(forced.pop(0) if forced else best)
    return tokens, at


def texts(tokenizer: Pieces) -> list[list[int]]:
    """Prompts that begin a thought at their end or before, and one that has none."""
    begin = tokenizer.marker("<think>")
    plain = prompts(9, 2, 5, 7, 3, vocabulary=58)
    return [plain[0] + begin, plain[1] + begin + [1], plain[2], plain[3] + begin + plain[3], plain[4] + begin]


@pytest.mark.parametrize(("kind", "special"), [*((kind, True) for kind in KINDS), (KINDS[0], False)])
def test_a_budget_is_kept_whatever_writes(kind: str, special: bool) -> None:
    """One row and many, with drafts of all kinds, and in a pool: the tokens of the model that reads all anew."""
    model, tokenizer = tiny(kind, dtype=torch.float64), Pieces(special)
    asked, budget = texts(tokenizer), ThoughtBudget(tokenizer, 9, GRACE)
    expected, places = zip(*(alone(model, prompt, tokenizer, 9) for prompt in asked), strict=True)
    assert len({*places}) > 1, "rows end their thoughts at the same place"
    options = {"max_tokens": LENGTH, "sampling": GREEDY, "budget": budget}
    generation = Generation(model, asked, **options)
    whole: list[list[int]] = [[] for _ in asked]
    for items in generation:
        for row, tokens in zip(whole, items, strict=True):
            row += tokens
    assert whole == [*expected]
    assert [thought.cut for thought in generation.thoughts] == [place is not None for place in places]
    plain = generate(model, asked, max_tokens=LENGTH, sampling=GREEDY)
    for free, row, place in zip(plain, expected, places, strict=True):
        assert free[:place] == row[:place]
        assert place is None or tokenizer.marker("</think>") == row[place:][: len(tokenizer.marker("</think>"))]
    for draft in (Draft(model, 4), Draft(tiny(kind, seed=1, dtype=torch.float64), 3), Draft(None, 4)):
        assert generate(model, asked, **options, draft=draft) == [*expected], draft.name
    jobs = [Job(prompt, 0, 0) for prompt in range(len(asked))]
    pool = Pool(model, asked, batch=2, **options)
    samples = {sample.job.prompt: sample for sample in pool.run(lambda free: [jobs.pop() for _ in jobs[:free]])}
    assert [samples[number].tokens for number in range(len(asked))] == [*expected]


def test_a_thought_that_ends_before_its_budget_is_left_alone() -> None:
    model, tokenizer = tiny(KINDS[0]), Pieces(special=True)
    asked = [[*prompt, 59] for prompt in texts(tokenizer)]
    free = generate(model, asked, max_tokens=LENGTH, sampling=GREEDY)
    assert generate(model, asked, max_tokens=LENGTH, sampling=GREEDY, budget=ThoughtBudget(tokenizer, 0, 0)) == free
    asked = texts(tokenizer)
    free = generate(model, asked, max_tokens=LENGTH, sampling=GREEDY)
    budget = ThoughtBudget(tokenizer, LENGTH)
    assert generate(model, asked, max_tokens=LENGTH, sampling=GREEDY, budget=budget) == free


def test_a_forced_end_does_not_change_what_is_drawn_before_it() -> None:
    """Sampled: a row draws as many numbers per token, forced or not."""
    model, tokenizer = tiny(KINDS[0]), Pieces(special=True)
    asked, sampling = texts(tokenizer), Sampling(seed=3)
    free = generate(model, asked, max_tokens=LENGTH, sampling=sampling)
    budget = ThoughtBudget(tokenizer, 5, 2)
    ended = generate(model, asked, max_tokens=LENGTH, sampling=sampling, budget=budget)
    for prompt, before, after in zip(asked, free, ended, strict=True):
        first = next((i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b), LENGTH)
        thought = budget.start(prompt)
        assert thought.pass_on(before)[: first + 1] == after[: first + 1]


def test_markers_in_a_tokenizer_that_has_them_are_its_tokens_alone() -> None:
    """Text that looks like one is no marker there; a negative budget is refused."""
    tokenizer = Pieces(special=True)
    written = tokenizer.text_to_ids("<think>")
    assert not ThoughtBudget(tokenizer, 3).start([5, *written]).open
    assert ThoughtBudget(tokenizer, 3).start([58, *written]).open
    assert ThoughtBudget(Pieces(special=False), 3).start([5, *written]).open
    with pytest.raises(UserError, match="thought-budget = -1"):
        ThoughtBudget(tokenizer, -1)


def test_text_around_thoughts() -> None:
    assert after_thought("Answer: 4") == "Answer: 4"
    assert after_thought("<think>\nAnswer: 3\n</think>\nAnswer: 4") == "\nAnswer: 4"
    assert after_thought("goes on\n</think>\nAnswer: 4") == "\nAnswer: 4"  # the template began it
    assert after_thought("<think>\nAnswer: 3") == after_thought("</think> again <think> 4") == ""
    assert after_thought(with_thought("", "Answer: 4")) == after_thought(with_thought("3 + 1", "Answer: 4"))
    assert switched(None, "t", "s") == ("t", "s")
    assert switched("on", "t", "Be brief.") == ("t", "detailed thinking on\nBe brief.")
    assert switched("off", "/no_think x") == ("/no_think x", "/no_think")
    assert switched("off", "{{ enable_thinking }}") == ("{% set enable_thinking = false %}{{ enable_thinking }}", "")
    with pytest.raises(UserError, match=r"--thinking = 'maybe'"):
        switched("maybe", "")
