"""On a GPU: generation through kernels and CUDA graphs gives what plain PyTorch gives in float64, reading all at once.

Also runs as a script where pytest is not installed: `python tests/gpu/test_generation.py`.
"""

from __future__ import annotations

import gc
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "planning"))
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from repository import import_repository

import_repository()

from random_model import random_model  # noqa: E402
from small_models import MODELS, as_definition  # noqa: E402

from nemotron_h.architecture.definition import Expect, ModelDefinition  # noqa: E402
from nemotron_h.inference import layer_costs  # noqa: E402
from nemotron_h.inference.drafts import Draft  # noqa: E402
from nemotron_h.inference.generate import Generation, generate  # noqa: E402
from nemotron_h.inference.graph import Recorded, Stepper  # noqa: E402
from nemotron_h.inference.model import GenerationModel  # noqa: E402
from nemotron_h.inference.pool import Job, Pool  # noqa: E402
from nemotron_h.inference.prefill import prefill  # noqa: E402
from nemotron_h.inference.sampling import Sampling  # noqa: E402
from nemotron_h.ops.select import Ops  # noqa: E402

try:
    import pytest

    pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
except ImportError:
    pytest = None  # type: ignore[assignment]

#: largest difference of a position's scores, by norm: the kernels multiply float32 in TF32
TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 5e-2}


def definition(pattern: str) -> ModelDefinition:
    """A small model with heads that share keys and several SSM groups."""
    widths = {"hidden_size": 256, "head_dim": 64, "vocab_size": 512, "num_attention_heads": 8, "num_query_groups": 2}
    widths |= {"ffn_hidden_size": 512 if "-" in pattern else 0}
    if "M" in pattern:
        widths |= {"mamba_num_heads": 8, "mamba_head_dim": 64, "mamba_num_groups": 2, "mamba_state_dim": 128}
        widths |= {"conv_kernel": 4, "position_embedding": "none", "family": "nemotron_h"}
    else:
        widths |= {"mamba_num_heads": 0, "mamba_head_dim": 0, "mamba_num_groups": 0, "mamba_state_dim": 0}
        widths |= {"position_embedding": "rope", "rope_base": 10000, "rope_percent": 1.0, "family": "transformer"}
    counts = Expect(pattern.count("M"), pattern.count("*"), pattern.count("-"), 0)
    return ModelDefinition(name="gpu", pattern=pattern, expect=counts, norm_epsilon=1e-5, init_std=0.02, **widths)


def exact_copy(model: GenerationModel) -> GenerationModel:
    """The same weights in float64, through plain PyTorch."""

    def wide(weights: object) -> object:
        return type(weights)(**{name: value.double() for name, value in vars(weights).items()})

    layers = [wide(layer) for layer in model.layers]
    copied = GenerationModel(
        model.definition, model.embedding.double(), layers, model.final_norm.double(), model.output.double()
    )
    copied.ops = Ops()
    return copied


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest, over positions, of the difference's norm over the norm."""
    return float(((actual.double() - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


def test_prefill_and_graphed_steps_are_the_full_forward() -> None:
    lengths, steps = [700, 333, 332, 20], 24
    rng = torch.Generator().manual_seed(1)
    ids = torch.randint(512, (len(lengths), max(lengths) + steps), generator=rng)
    prompts = [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]
    for pattern in ("M-M*-M-", "*-*-"):
        for dtype, tolerance in TOLERANCE.items():
            model = random_model(definition(pattern), dtype, "cuda")
            exact = exact_copy(model)
            assert model.ops.origin != exact.ops.origin, f"no kernels were selected: {model.ops.origin}"
            for graph in (None, False):
                states = model.new_states(len(lengths), max(lengths) + steps)
                found = [model.logits(prefill(model, prompts, states, limit=900))]
                stepper = Stepper(model, states, graph)
                for number in range(steps):
                    token = torch.stack([ids[row, n + number] for row, n in enumerate(lengths)]).cuda()
                    found.append(stepper.step(token).clone())
                assert (stepper.recorded.graph is not None) == (graph is None and model.ops.graphs)
                worst = 0.0
                for row, length in enumerate(lengths):
                    whole = ids[row : row + 1, : length + steps]
                    scores = exact.logits(exact.extend(whole, exact.new_states(1, length + steps)))
                    actual = torch.stack([scores[row] for scores in found])
                    worst = max(worst, difference(actual, scores[0, length - 1 :]))
                print(f"{pattern} {dtype} graph {graph is None}: largest difference {worst:.1e}", flush=True)
                assert worst < tolerance, (pattern, dtype, graph, worst)


def test_graph_changes_no_token() -> None:
    model = random_model(definition("M-M*-M-"), torch.bfloat16, "cuda")
    rng = torch.Generator().manual_seed(2)
    prompts = [torch.randint(512, (length,), generator=rng).tolist() for length in (300, 40, 7)]
    sampling = Sampling(temperature=0.8, top_p=0.9, seed=3)
    runs = [generate(model, prompts, max_tokens=40, sampling=sampling, graph=graph) for graph in (None, False)]
    assert runs[0] == runs[1]


def test_a_graph_of_before_is_not_freed_while_another_is_recorded() -> None:
    model = random_model(definition("M-M*-M-"), torch.bfloat16, "cuda")
    before = Recorded(lambda x: x + 1, model, True)
    for _ in range(3):
        before(torch.ones(4, device="cuda"))
    before.itself = before  # a cycle, which the collector alone frees
    del before
    often, usual = (1, 1, 1), gc.get_threshold()

    def function(x: torch.Tensor) -> torch.Tensor:
        for _ in range(100):
            x = x + len([[] for _ in range(100)])
        return x

    recorded = Recorded(function, model, True)
    gc.set_threshold(*often)
    try:
        results = [recorded(torch.zeros(4, device="cuda")).sum().item() for _ in range(3)]
    finally:
        gc.set_threshold(*usual)
    assert results == [4 * 100 * 100] * 3
    assert recorded.graph is not None
    assert gc.isenabled()


def test_drafts_change_no_greedy_token() -> None:
    """Tokens are those of plain generation, or begin to differ where the exact scores of both are as close as rounding;
    CUDA graphs of windows and of drafts change none.
    """
    rng = torch.Generator().manual_seed(4)
    prompts = [torch.randint(512, (length,), generator=rng).tolist() for length in (300, 40, 7, 1)]
    greedy, count = Sampling(temperature=0), 100
    small = {kind: {**MODELS[kind], "vocab_size": 512} for kind in ("falcon_h1", "experts")}
    for dtype, tolerance in TOLERANCE.items():
        models = {pattern: random_model(definition(pattern), dtype, "cuda") for pattern in ("M-M*-M-", "*-*-")}
        models |= {kind: layer_costs.random_model(as_definition(each), dtype, "cuda") for kind, each in small.items()}
        for name, model in models.items():
            exact = exact_copy(model)
            plain, rate = _timed(model, prompts, count, greedy, None, None)
            print(f"{name} {dtype} plain: {rate:,.0f} tokens/s", flush=True)
            sources = {"itself": model, "its first two layers": model.first_layers(2), "lookup": None}
            for title, source in sources.items():
                runs = [_timed(model, prompts, count, greedy, Draft(source, 4), graph) for graph in (None, False)]
                (found, rate), (without, _) = runs
                assert found == without, (name, dtype, title)
                same = sum(a == b for a, b in zip(found, plain, strict=True))
                print(f"{name} {dtype}, {title}: {rate:,.0f} tokens/s, {same} of {len(plain)} alike", flush=True)
                if name == "experts" and dtype == torch.bfloat16:
                    continue  # rounding sends tokens to other experts, which moves scores by more than it
                for prompt, actual, expected in zip(prompts, found, plain, strict=True):
                    place = next((i for i in range(count) if actual[i] != expected[i]), None)
                    if place is not None:
                        text = torch.tensor([prompt + expected[:place]]).cuda()
                        scores = exact.logits(exact.extend(text, exact.new_states(*text.shape), last_only=True))[0, -1]
                        gap = scores.max() - scores[[actual[place], expected[place]]].min()
                        assert gap < 2 * tolerance * scores.abs().max(), (name, dtype, title, place)


def _timed(model, prompts, count, sampling, draft, graph) -> tuple[list[list[int]], float]:
    """Continuations, and tokens/s behind the first passes, in which kernels compile and graphs are recorded."""
    found: list[list[int]] = [[] for _ in prompts]
    began, before = 0.0, 0
    options = {"max_tokens": count, "sampling": sampling, "draft": draft, "graph": graph}
    for number, items in enumerate(Generation(model, prompts, **options)):
        for text, tokens in zip(found, items, strict=True):
            text += tokens
        if number == 4:
            began, before = time.perf_counter(), sum(map(len, found))
    return found, (sum(map(len, found)) - before) / (time.perf_counter() - began)


def test_sampled_drafts_are_the_host_s() -> None:
    """By the same seeds, with and without graphs: choices are drawn from generators of the host."""
    model = random_model(definition("M-M*-M-"), torch.float32, "cuda")
    prompts = [list(range(length)) for length in (300, 40, 7)]
    sampling = Sampling(temperature=0.8, top_p=0.9, seed=3)
    for source in (model.first_layers(2), None):
        runs = [
            generate(model, prompts, max_tokens=40, sampling=sampling, draft=Draft(source, 3), graph=graph)
            for graph in (None, False)
        ]
        assert runs[0] == runs[1]


def test_rows_of_a_pool_are_their_sequences() -> None:
    """Filled again under one graph and shrunk: log-probabilities are those of each sequence read whole in float64."""
    rng = torch.Generator().manual_seed(4)
    prompts = [torch.randint(512, (length,), generator=rng).tolist() for length in (300, 20, 133)]
    for pattern in ("M-M*-M-", "*-*-"):
        model = random_model(definition(pattern), torch.float32, "cuda")
        exact = exact_copy(model)
        pool = Pool(model, prompts, batch=8, max_tokens=24, sampling=Sampling(), stop_ids=range(64))
        pool.warm_up()
        left = [Job(prompt, sample, 3 * sample + prompt) for sample in range(10) for prompt in range(3)]
        worst, samples = 0.0, 0
        for sample in pool.run(lambda free, left=left: [left.pop() for _ in range(min(free, len(left)))]):
            prompt, samples = prompts[sample.job.prompt], samples + 1
            whole = torch.tensor([prompt + sample.tokens])
            scores = exact.logits(exact.extend(whole, exact.new_states(1, whole.shape[1])))[0].log_softmax(-1)
            logs = scores[len(prompt) - 1 : -1].gather(-1, torch.tensor(sample.tokens)[:, None].cuda())
            worst = max(worst, abs(float(logs.sum()) - sample.log_probability) / len(sample.tokens))
        print(f"{pattern}: largest difference of a mean log-probability {worst:.1e}", flush=True)
        assert samples == 30
        assert worst < 5 * TOLERANCE[torch.float32]


def test_attention_kernel_reads_only_what_was_written() -> None:
    from nemotron_h.ops import attention, attention_kernel

    rng = torch.Generator(device="cuda").manual_seed(0)
    lengths = torch.tensor([1, 64, 1000, 4097], device="cuda")
    q = torch.randn(4, 8, 4, 128, device="cuda", generator=rng, dtype=torch.bfloat16)
    keys, values = (torch.randn(4, 8, 5000, 128, device="cuda", generator=rng, dtype=torch.bfloat16) for _ in range(2))
    expected = attention.attention_step(q.double(), keys.double(), values.double(), lengths, 4097, True)
    for row, length in enumerate(lengths.tolist()):
        keys[row, :, length:] = values[row, :, length:] = torch.nan
    error = difference(attention_kernel.attention_step(q, keys, values, lengths), expected)
    print(f"attention of single tokens: {error:.1e}")
    assert error < 1e-2


if __name__ == "__main__":
    test_attention_kernel_reads_only_what_was_written()
    test_prefill_and_graphed_steps_are_the_full_forward()
    test_graph_changes_no_token()
    test_a_graph_of_before_is_not_freed_while_another_is_recorded()
    test_drafts_change_no_greedy_token()
    test_sampled_drafts_are_the_host_s()
    test_rows_of_a_pool_are_their_sequences()
    print("GPU tests of generation passed")
