"""A pool of sequences gives each what its prompt and seed alone give, and its clock is shared out whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import pytest
import torch
from small_model import VOCABULARY, pure_config, small_config

from nemotron_h.core.errors import UserError
from nemotron_h.inference import pool as pools
from nemotron_h.inference.generate import generate
from nemotron_h.inference.layer_costs import random_model
from nemotron_h.inference.model import GenerationModel
from nemotron_h.inference.pool import ANSWER, END, LENGTH, Job, Pool, Sample, rows_that_fit
from nemotron_h.inference.sampling import Sampling

STOPS, LONGEST = range(30), 24
SAMPLING = Sampling(temperature=1.0, top_p=0.95)


@pytest.fixture(scope="module", params=["hybrid", "*-", "M"])
def model(request: pytest.FixtureRequest) -> GenerationModel:
    config = small_config() if request.param == "hybrid" else pure_config(request.param)
    return random_model(config.definition(), torch.float64, "cpu")


def _prompts() -> list[list[int]]:
    rng = torch.Generator().manual_seed(3)
    return [torch.randint(VOCABULARY, (length,), generator=rng).tolist() for length in (7, 2, 19, 1, 11)]


def _queue(jobs: Sequence[Job]) -> Callable[[int], list[Job]]:
    left = list(jobs)

    def take(free: int) -> list[Job]:
        taken, left[:] = left[:free], left[free:]
        return taken

    return take


def _jobs(samples: int) -> list[Job]:
    return [Job(prompt, sample, 100 * prompt + sample) for sample in range(samples) for prompt in range(5)]


@pytest.mark.parametrize(("batch", "shared"), [(1, 0), (8, 0), (64, 0), (8, 37)])
def test_a_sequence_is_that_of_its_prompt_and_seed_alone(model: GenerationModel, batch: int, shared: int) -> None:
    """In batches that are filled again and that shrink, against sequences that are generated alone; what all prompts
    begin with may be read once.
    """
    prompts = [[*range(30, 30 + shared), *prompt] for prompt in _prompts()]
    options = {"max_tokens": LONGEST, "sampling": SAMPLING, "stop_ids": STOPS}
    pool = Pool(model, prompts, batch=batch, shared=shared, **options)
    samples = {sample.job: sample for sample in pool.run(_queue(_jobs(5)))}
    assert samples.keys() == {*_jobs(5)}
    for job, sample in samples.items():
        alone = Sampling(SAMPLING.temperature, 0, SAMPLING.top_p, job.seed)
        expected = generate(model, [prompts[job.prompt]], max_tokens=LONGEST, sampling=alone, stop_ids=STOPS)[0]
        ended = sample.tokens[-1] in STOPS
        assert sample.tokens[: len(sample.tokens) - ended] == expected
        assert sample.ended_by == (END if ended else LENGTH)
    assert {END, LENGTH} == {sample.ended_by for sample in samples.values()}


def test_log_probabilities_are_those_of_the_whole_sequence(model: GenerationModel) -> None:
    """At temperature 1 and without top-p, whatever the tokens were chosen by."""
    prompts = _prompts()
    sampling = Sampling(temperature=0.5, top_p=0.7)
    pool = Pool(model, prompts, batch=4, max_tokens=LONGEST, sampling=sampling, stop_ids=STOPS)
    for sample in pool.run(_queue(_jobs(1))):
        prompt = prompts[sample.job.prompt]
        whole = torch.tensor([prompt + sample.tokens])
        scores = model.logits(model.extend(whole, model.new_states(1, whole.shape[1])))[0].log_softmax(-1)
        read = scores[len(prompt) - 1 : -1].gather(-1, torch.tensor(sample.tokens)[:, None])
        assert sample.log_probability == pytest.approx(float(read.sum()), rel=1e-5)  # the pool's are of float32 scores


def test_the_clock_is_shared_out_whole(model: GenerationModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that ticks at each reading: every piece of work takes a second. Work between samples is not timed."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(pools, "now", lambda model: float(next(ticks)))
    pool = Pool(model, _prompts(), batch=8, max_tokens=LONGEST, sampling=SAMPLING, stop_ids=STOPS)
    samples: list[Sample] = []
    for sample in pool.run(_queue(_jobs(4))):
        samples.append(sample)
        next(ticks)
    assert len(samples) == 20
    assert sum(sample.seconds for sample in samples) == pytest.approx(pool.seconds)
    assert pool.seconds == round(pool.seconds) > LONGEST
    # one alone pays for all: its prompt, and a step for each token
    alone = Pool(model, _prompts(), batch=8, max_tokens=LONGEST, sampling=SAMPLING, stop_ids=STOPS)
    only = next(alone.run(_queue(_jobs(1)[:1])))
    assert only.seconds == 1 + len(only.tokens)


def test_equal_prompts_are_read_once(model: GenerationModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, read = _prompts(), Counter()
    prefill = pools.prefill

    def counting(model: GenerationModel, ids: list[list[int]], states: object, **options: object) -> torch.Tensor:
        read.update(map(tuple, ids))
        return prefill(model, ids, states, **options)

    monkeypatch.setattr(pools, "prefill", counting)
    pool = Pool(model, prompts, batch=40, max_tokens=3, sampling=SAMPLING)
    assert sum(1 for _ in pool.run(_queue(_jobs(8)))) == 40
    assert read == Counter(map(tuple, prompts))


def test_ends_where_it_is_complete_and_warms_up_without_a_clock(model: GenerationModel) -> None:
    prompts = _prompts()
    options = {"max_tokens": 20, "sampling": SAMPLING, "complete": lambda sample: len(sample.tokens) == 4}
    pool = Pool(model, prompts, batch=3, **options)
    pool.warm_up()
    assert pool.seconds == 0
    samples = list(pool.run(_queue(_jobs(2))))
    assert len(samples) == 10
    assert {(len(sample.tokens), sample.ended_by) for sample in samples} == {(4, ANSWER)}
    assert list(pool.run(lambda free: [])) == []


def test_jobs_that_come_late_get_a_whole_batch_again(model: GenerationModel) -> None:
    """A pool that shrank, as there were no jobs, is not small for those that come when all have ended."""
    left, samples, taken = _jobs(4), [], []

    def jobs(free: int) -> list[Job]:
        if len(samples) < sum(taken):  # some are on their way
            return []
        taken.append(min(free, len(left)))
        return [left.pop() for _ in range(taken[-1])]

    pool = Pool(model, _prompts(), batch=10, max_tokens=LONGEST, sampling=SAMPLING, stop_ids=STOPS)
    for sample in pool.run(jobs):
        samples.append(sample)
    assert {sample.job for sample in samples} == {*_jobs(4)}
    assert taken == [10, 10, 0]


def test_rows_by_memory(model: GenerationModel, monkeypatch: pytest.MonkeyPatch) -> None:
    each = model.new_states(1, 50).bytes() + 40 * VOCABULARY
    for free, rows in ((2 * each, 1), (7 * each, 3), (10**12, pools.MOST_ROWS)):
        monkeypatch.setattr(pools, "available", lambda device, free=free: free)
        assert rows_that_fit(model, 50) == rows
    monkeypatch.setattr(pools, "available", lambda device: 2 * each - 2)
    with pytest.raises(UserError, match="no room for a sequence of 50 tokens"):
        rows_that_fit(model, 50)
