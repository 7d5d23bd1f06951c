"""Generation gives what the training model's full forward gives: every position, any chunking, any batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from save_checkpoint import save
from small_model import VOCABULARY, pure_config, relative_error, small_config, small_model, tokens

from nemotron_h.core.errors import UserError
from nemotron_h.inference.generate import Generation, generate
from nemotron_h.inference.model import GenerationModel, load_model
from nemotron_h.inference.prefill import prefill
from nemotron_h.inference.sampling import Sampling
from nemotron_h.ops.float8_matrix import Float8Matrix

pytestmark = pytest.mark.usefixtures("megatron")

BATCH, LENGTH = 3, 75  # two whole chunks of the scan and a part
GREEDY = Sampling(temperature=0)
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
#: of float64 with experts: megatron-core rounds their scores to float32
ROUNDED = 1e-5


@pytest.fixture(scope="module")
def pair(megatron: None, tmp_path_factory: pytest.TempPathFactory):
    """Builds (training model, generation model) of one checkpoint."""
    made: dict = {}

    def build(kind: int | str = 2, dtype: torch.dtype = torch.float32) -> tuple:
        """`kind`: a number of SSM groups of the hybrid, or the layers of a pure pattern, as of `pure_config`."""
        if (kind, dtype) not in made:
            config = pure_config(kind, dtype=dtype) if isinstance(kind, str) else small_config(kind, dtype=dtype)
            model = small_model(config).eval()
            folder = save(model, tmp_path_factory.mktemp("run") / "checkpoints" / "step-000001")
            made[kind, dtype] = model, load_model(folder, dtype=dtype)
        return made[kind, dtype]

    return build


@pytest.fixture(scope="module")
def model(pair) -> GenerationModel:
    return pair()[1]


@torch.no_grad()
def full_forward(model, ids: torch.Tensor) -> torch.Tensor:
    """The training model's scores, [batch, length, vocabulary]."""
    return model(input_ids=ids)[..., :VOCABULARY]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", [1, 2, 8, "M", "*-", "PS", "*S", "E", "L"])
@pytest.mark.parametrize("chunk", [1, 33, 64])
def test_prefill_and_steps_are_the_full_forward(pair, kind: int | str, dtype: torch.dtype, chunk: int) -> None:
    trained, model = pair(kind, dtype)
    ids = tokens(BATCH, LENGTH)
    expected = full_forward(trained, ids)
    states = model.new_states(BATCH, LENGTH)
    read = 66  # two chunks of 33, or 64 and 2
    hidden = [model.extend(ids[:, start : min(start + chunk, read)], states) for start in range(0, read, chunk)]
    hidden += [model.step(ids[:, position], states)[:, None] for position in range(read, LENGTH)]
    actual = model.logits(torch.cat(hidden, dim=1))
    assert actual.dtype == dtype
    for position in range(LENGTH):
        tolerance = max(TOLERANCE[dtype], ROUNDED if kind == "E" else 0)
        assert relative_error(actual[:, position], expected[:, position]) < tolerance, position


@pytest.mark.parametrize("limit", [7, 32, 100, 1000])  # passes of a part of a row, and of several rows
@pytest.mark.parametrize("kind", [2, "M", "*-", "PS", "*S", "E"])
def test_ragged_batch_is_each_alone(pair, kind: int | str, limit: int) -> None:
    trained, model = pair(kind, dtype=torch.float64)
    lengths = [70, 41, 40, 40, 3, 1]
    ids = tokens(len(lengths), LENGTH + 20)
    prompts = [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]
    states = model.new_states(len(lengths), LENGTH + 20)
    actual = [model.logits(prefill(model, prompts, states, limit=limit))]
    actual += [
        model.logits(model.step(torch.stack([ids[r, n + k] for r, n in enumerate(lengths)]), states)) for k in range(8)
    ]
    for row, length in enumerate(lengths):
        expected = full_forward(trained, ids[row : row + 1, : length + 8])[0, length - 1 :]
        tolerance = ROUNDED if kind == "E" else 1e-9
        assert relative_error(torch.stack([scores[row] for scores in actual]), expected) < tolerance


def test_batch_order_and_company_do_not_matter(model: GenerationModel) -> None:
    prompts = [tokens(1, length, seed=length)[0].tolist() for length in (5, 50, 1, 33)]
    sampling = Sampling(temperature=1.0, top_k=50, top_p=0.9, seed=7)
    together = generate(model, prompts, max_tokens=12, sampling=sampling)
    for row, prompt in enumerate(prompts):
        alone = generate(model, [prompt], max_tokens=12, sampling=Sampling(1.0, 50, 0.9, seed=7 + row))
        assert together[row] == alone[0]


def test_state_size_is_constant(model: GenerationModel) -> None:
    """Only keys and values grow with the capacity: by the attention layers' share."""
    d = model.definition
    short, long = (model.new_states(2, capacity).bytes() for capacity in (10, 1010))
    per_token = d.count("*") * 2 * d.num_query_groups * d.head_dim * 4
    assert long - short == 2 * 1000 * per_token


def test_greedy_follows_the_full_forward(pair) -> None:
    trained, model = pair()
    prompt = tokens(1, 40)[0].tolist()
    ids = prompt + generate(model, [prompt], max_tokens=20, sampling=GREEDY)[0]
    scores = full_forward(trained, torch.tensor([ids]))
    assert scores[0, len(prompt) - 1 : -1].argmax(-1).tolist() == ids[len(prompt) :]


def test_seeds(model: GenerationModel) -> None:
    prompt = [tokens(1, 20)[0].tolist()]
    runs = [generate(model, prompt, max_tokens=20, sampling=Sampling(seed=seed)) for seed in (3, 3, 4)]
    assert runs[0] == runs[1] != runs[2]


def test_stop_token_ends_a_row_and_not_the_others(model: GenerationModel) -> None:
    prompts = [tokens(1, length, seed=length)[0].tolist() for length in (9, 20)]
    free = generate(model, prompts, max_tokens=10, sampling=GREEDY)
    stop = next(token for token in free[0] if token not in free[1])
    items = list(Generation(model, prompts, max_tokens=10, sampling=GREEDY, stop_ids=[stop]))
    first, second = ([token for item in items for token in item[row]] for row in range(2))
    assert first == free[0][: free[0].index(stop)]
    assert second == free[1]
    assert generate(model, prompts[:1], max_tokens=10, sampling=GREEDY, stop_ids=[free[0][0]]) == [[]]


@pytest.mark.parametrize(
    ("prompts", "max_tokens", "words"),
    [
        ([], 5, "nothing to continue"),
        ([[1], []], 5, "without tokens"),
        ([[1, VOCABULARY]], 5, "outside the model's vocabulary"),
        ([[1]], 0, "max-tokens"),
    ],
)
def test_refused(model: GenerationModel, prompts, max_tokens, words) -> None:
    with pytest.raises(UserError, match=words):
        generate(model, prompts, max_tokens=max_tokens)


def test_bfloat16_keeps_the_recurrence_in_float32(pair, tmp_path: Path) -> None:
    trained, exact = pair()
    low = load_model(save(trained, tmp_path / "step-000001"), dtype=torch.bfloat16)
    states = low.new_states(1, 40)
    ids = tokens(1, 40)
    assert states.layers[0].ssm.dtype == low.layers[0].A.dtype == torch.float32
    scores = low.logits(low.extend(ids, states))
    assert relative_error(scores, exact.logits(exact.extend(ids, exact.new_states(1, 40)))) < 0.1


@pytest.mark.parametrize("kind", [2, "*-", "PS", "*S", "E", "L"])
def test_matrices_in_float8_are_their_rounded_values(pair, kind: int | str) -> None:
    """In every kind of layer: few rows, so that the inputs are exact, and steps in bfloat16, as a GPU has them."""
    exact = pair(kind)[1]
    model, rounded = exact.in_float8(), exact.to(torch.float32)
    matrices = 0
    for mine, theirs in zip(model.layers, rounded.layers, strict=True):
        for name, value in vars(mine).items():
            if isinstance(value, Float8Matrix):
                matrices += 1
                setattr(theirs, name, value.widened(torch.float32))
            else:
                assert torch.equal(value, getattr(theirs, name))
    assert matrices
    ids = tokens(2, 15)
    scores, expected = (each.logits(each.extend(ids, each.new_states(2, 15))) for each in (model, rounded))
    assert relative_error(scores, expected) < 1e-5
    assert relative_error(expected, exact.logits(exact.extend(ids, exact.new_states(2, 15)))) > 1e-3


def test_a_checkpoint_in_float8(pair, tmp_path: Path) -> None:
    """All but the layers' matrices is as in bfloat16; one layer after the other is read and rounded."""
    folder = save(pair()[0], tmp_path / "step-000001")
    model, low = load_model(folder, dtype=torch.float8_e4m3fn), load_model(folder, dtype=torch.bfloat16)
    ids = [[5, 7, 9] * 20, [11] * 3]
    assert generate(model, ids, max_tokens=5, sampling=GREEDY) == generate(
        low.in_float8(), ids, max_tokens=5, sampling=GREEDY
    )
    assert model.dtype == torch.bfloat16
    assert model.layers[0].A.dtype == torch.float32
    assert isinstance(model.layers[0].out_proj, Float8Matrix)
