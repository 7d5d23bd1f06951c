"""The part `reason` of a recipe: rounds of preference training on own solutions. Imports no torch, NeMo or Megatron."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from nemotron_h.core.strict import number
from nemotron_h.schema.ranges import COUNT

#: the shipped blend that stands for the pairs of a round
ROUNDS = "rounds"


@dataclass
class ReasonSchema:
    """Rounds of sampling and preference training: loss, optimizer, data and length of the recipe are those of a round.

    Attributes:
        start: a run's folder or a checkpoint, that the first round samples from and trains. A model that was tuned on
            conversations is asked in the template that came with it, another one in plain text.
        problems: a folder of `nemotron-h data problems`.
        rounds: at most so many; they end where no problem gives a pair.
        samples: of each training problem in each round, and of each test problem after it.
        pairs: of each problem and round at most, of a right and a wrong solution.
        temperature, top_p: of all samples.
        max_tokens: longest solution.
        thinking: `on` or `off` asks for a thought before each answer, or for none; null asks for neither.
        thought_budget: tokens after which a thought is ended; null is none.
    """

    start: str = MISSING
    problems: str = MISSING
    rounds: int = number(least=1, most=1000)
    samples: int = number(least=2, most=COUNT)
    pairs: int = number(1, least=1, most=COUNT)
    temperature: float = number(0.7, above=0, most=1e3)
    top_p: float = number(0.95, above=0, most=1)
    max_tokens: int = number(256, least=1, most=COUNT)
    thinking: str | None = None
    thought_budget: int | None = number(None, least=0, most=COUNT)
