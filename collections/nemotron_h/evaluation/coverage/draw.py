"""Draw the samples of a model: load it, fill its batch with problems, keep what comes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from nemotron_h.checkpoint.folders import INTEGRITY
from nemotron_h.core.errors import UserError
from nemotron_h.core.files import file_sha256
from nemotron_h.core.progress import StageProgress
from nemotron_h.evaluation.coverage.contestant import Contestant, answer_watch
from nemotron_h.evaluation.coverage.samples import Demand, Samples, Solution
from nemotron_h.inference.layer_costs import this_machine
from nemotron_h.inference.model import load_model
from nemotron_h.inference.opening import dtype_and_device, torch_dtype
from nemotron_h.inference.pool import Pool, Sample, rows_that_fit
from nemotron_h.inference.sampling import Sampling
from nemotron_h.inference.thought import ThoughtBudget


@dataclass(frozen=True)
class Settings:
    """Settings of all models.

    Attributes:
        budgets: seconds of each problem, ascending; infinity draws `most` samples of each.
        most: samples of each problem.
        max_tokens: longest solution.
        sampling: temperature, top-p and seed.
        chat: questions are turns of a conversation.
        thinking: `on` or `off` asks for a thought, or for none.
        thought_budget: most tokens of a thought.
        batch: rows; None takes what memory has room for.
        dtype, device: see `dtype_and_device`.
    """

    budgets: tuple[float, ...]
    most: int
    max_tokens: int
    sampling: Sampling
    chat: bool
    batch: int | None
    dtype: str
    device: str
    thinking: str | None = None
    thought_budget: int | None = None

    @classmethod
    def of(cls, dtype: str | None, device: str | None, **settings: Any) -> Settings:
        """Return settings with dtype and device chosen where they are None.

        Errors:
            UserError: see `dtype_and_device`.
        """
        return cls(**settings, **dict(zip(("dtype", "device"), dtype_and_device(dtype, device), strict=True)))


def check_samples(temperature: float, samples: int) -> None:
    """Refuse several samples of a problem that would all be the same."""
    if temperature == 0 and samples > 1:
        raise UserError(f"--temperature 0 draws the same sample {samples} times", hint="raise it, or give --samples 1")


def draw(contestant: Contestant, settings: Settings, folder: Path, console: Console) -> Samples:
    """Draw the samples of a model that the largest budget asks for and that are not there yet.

    Args:
        folder: of samples.
        console: for the progress.
    Returns:
        all samples of the model.
    Errors:
        UserError: samples of other settings are there, memory has no room, or the smallest budget pays no sample.
    """
    samples = Samples(folder, contestant.name, len(contestant.prompts))
    fixed = _fixed(contestant, settings)
    batch = settings.batch or (samples.settings.get("batch") if any(samples.by_problem) else None)
    if batch:
        samples.check({**fixed, "batch": batch})
    demand = Demand(samples, settings.budgets[-1], settings.most, settings.sampling.seed)
    demand.check_budget(contestant.name, settings.budgets[0])
    if demand.is_met():
        return samples
    subject, dtype = contestant.subject, torch_dtype(settings.dtype)
    tokenizer, budget = subject.tokenizer, settings.thought_budget
    model = load_model(subject.checkpoint, dtype=dtype, device=settings.device, tokens=tokenizer.vocab_size)
    batch = batch or rows_that_fit(model, max(map(len, contestant.prompts)) + settings.max_tokens)
    samples.check({**fixed, "batch": batch})
    is_answered = answer_watch(tokenizer, contestant.opening)
    pool = Pool(
        model,
        contestant.prompts,
        batch=batch,
        max_tokens=settings.max_tokens,
        sampling=settings.sampling,
        stop_ids=contestant.stop_ids,
        complete=lambda sample: is_answered(sample.tokens),
        budget=None if budget is None else ThoughtBudget(tokenizer, budget),
    )
    pool.warm_up()
    share, paid = demand.progress(), False
    with StageProgress(console, f"{contestant.name}, batch {batch:,}", 100) as bar, samples:
        bar.advance(100 * share)
        for sample in pool.run(demand.jobs):
            samples.add(_solution(sample, contestant))
            demand.ended(sample.job.prompt, sample.seconds)
            if not paid and demand.is_under_way():
                demand.check_budget(contestant.name, settings.budgets[0])
                paid = True
            share, before = demand.progress(), share
            bar.advance(100 * (share - before))
    demand.check_budget(contestant.name, settings.budgets[0])
    return samples


def _solution(sample: Sample, contestant: Contestant) -> Solution:
    return Solution(
        sample.job.prompt,
        sample.job.sample,
        contestant.opening + contestant.subject.tokenizer.ids_to_text(sample.written),
        len(sample.tokens),
        sample.log_probability / len(sample.tokens),
        sample.seconds,
        sample.ended_by,
    )


def _fixed(contestant: Contestant, settings: Settings) -> dict[str, Any]:
    """Return what all samples of a model have in common, but for the batch."""
    subject, machine = contestant.subject, this_machine("")
    return {
        "checkpoint": subject.checkpoint.name,
        "weights": file_sha256(subject.checkpoint / INTEGRITY),
        "tokenizer": subject.tokenizer.ids_sha256(),
        "chat": settings.chat,
        "thinking": settings.thinking,
        "thought_budget": settings.thought_budget,
        "temperature": settings.sampling.temperature,
        "top_p": settings.sampling.top_p,
        "seed": settings.sampling.seed,
        "max_tokens": settings.max_tokens,
        "dtype": settings.dtype,
        "device": settings.device,
        "processor": machine.processor,
        "threads": machine.threads,
        "torch": machine.torch,
    }
