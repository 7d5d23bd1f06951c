"""Packed documents are separate documents: logits and every gradient, wherever the boundaries fall."""

from __future__ import annotations

import resource

import pytest
import torch
import torch.nn.functional as F
from small_model import VOCABULARY, pure_config, relative_error, small_config, small_model, tokens

pytestmark = pytest.mark.usefixtures("megatron")

#: lengths of the documents of each row; the scan's chunk is 32
ROWS = ([1, 31, 32, 16], [32, 1, 1, 46])


def seq_idx() -> torch.Tensor:
    """Ids that only grow, as the data module's; int32 [batch, length]."""
    rows = [[number for number, length in enumerate(lengths) for _ in range(length)] for lengths in ROWS]
    return torch.tensor(rows, dtype=torch.int32)


def spans() -> list[tuple[int, slice]]:
    """(row, positions) of every document."""
    found = []
    for row, lengths in enumerate(ROWS):
        start = 0
        for length in lengths:
            found.append((row, slice(start, start + length)))
            start += length
    return found


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


@pytest.mark.parametrize(
    ("make", "tolerance"),
    [
        (lambda: small_config(1, dtype=torch.float64), 1e-9),
        (lambda: small_config(8, dtype=torch.float64), 1e-9),
        (lambda: pure_config("M", dtype=torch.float64), 1e-9),
        (lambda: pure_config("*-", dtype=torch.float64), 1e-9),
        (lambda: pure_config("PS", dtype=torch.float64), 1e-9),
        # megatron-core rounds scores to float32
        (lambda: pure_config("E", dtype=torch.float64), 1e-5),
    ],
    ids=["hybrid, 1 group", "hybrid, 8 groups", "mamba2", "transformer, rotary", "falcon_h1", "experts"],
)
def test_packed_is_separate(make, tolerance: float) -> None:
    model = small_model(make())
    ids = tokens(len(ROWS), sum(ROWS[0]) + 1)
    inputs, labels = ids[:, :-1], ids[:, 1:]

    packed = model(input_ids=inputs, seq_idx=seq_idx())
    F.cross_entropy(packed.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    packed_gradients = gradients(model)

    for row, span in spans():
        alone = model(input_ids=inputs[row : row + 1, span])
        assert relative_error(packed[row : row + 1, span], alone) < tolerance, (row, span)
        F.cross_entropy(alone.flatten(0, 1), labels[row, span], reduction="sum").backward()
    errors = {name: relative_error(packed_gradients[name], g) for name, g in gradients(model).items()}
    assert max(errors.values()) < tolerance, sorted(errors.items(), key=lambda e: -e[1])[:5]


@pytest.mark.parametrize(
    "make",
    [lambda: small_config(pattern="M-M*-"), lambda: pure_config("PS"), lambda: pure_config("*S")],
    ids=["hybrid", "falcon_h1", "llama"],
)
def test_a_row_of_short_sequences_is_as_many_rows(make) -> None:
    """Losses, every gradient, and no gradient from a sequence to another; in float32, positions too."""
    model, sequences, length = small_model(make()), 4, 40
    ids = tokens(sequences, length + 1)
    inputs, labels = ids[:, :-1], ids[:, 1:].contiguous()
    apart = model(input_ids=inputs, labels=labels)
    apart.sum().backward()
    expected = gradients(model)

    embedded = []
    model.embedding.register_forward_hook(lambda *args: embedded.append(args[-1]))
    one_row = {"input_ids": inputs.reshape(1, -1), "labels": labels.reshape(1, -1)}
    one_row["seq_idx"] = torch.arange(sequences).repeat_interleave(length).int()[None]
    row = model(**one_row)
    assert relative_error(row.view(sequences, length), apart) < 1e-5
    row.sum().backward()
    errors = {name: relative_error(gradient, expected[name]) for name, gradient in gradients(model).items()}
    assert max(errors.values()) < 1e-5, sorted(errors.items(), key=lambda e: -e[1])[:5]
    for number in range(sequences):
        losses = model(**one_row).view(sequences, length)[number].sum()
        (gradient,) = torch.autograd.grad(losses, embedded[-1])
        sizes = gradient.abs().amax((1, 2)).view(sequences, length).amax(1)
        assert [bool(size) for size in sizes] == [n == number for n in range(sequences)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first", [1, 31, 32, 45])
def test_no_bit_of_a_document_depends_on_another(first: int, dtype: torch.dtype) -> None:
    """Logits, losses and gradients, when the last token of the document before changes."""
    model = small_model(small_config(dtype=dtype, bf16=dtype == torch.bfloat16))
    ids, documents = tokens(2, 81), seq_idx()
    documents[0] = (torch.arange(80) >= first).int()
    outcomes = []
    for change in (0, 1):
        given = ids.clone()
        given[0, first - 1] = (given[0, first - 1] + change) % VOCABULARY
        logits = model(input_ids=given[:, :-1], seq_idx=documents)
        losses = F.cross_entropy(logits.transpose(1, 2).float(), ids[:, 1:], reduction="none")
        learnt = torch.cat([losses[0, first:], losses[1]])
        learnt.sum().backward()
        outcomes.append({"logits": logits[0, first:].detach(), "losses": learnt.detach(), **gradients(model)})
    assert all(torch.equal(value, outcomes[1][name]) for name, value in outcomes[0].items())


def test_long_rows_form_no_mask() -> None:
    """A mask of 131,072 positions alone would take 16 GiB."""
    model = small_model(small_config(pattern="*", hidden_size=16, kv_channels=4, dtype=torch.bfloat16, bf16=True))
    length = 131_072
    ids, documents = tokens(1, length), (torch.arange(length) // 256).int()[None]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.no_grad():
        hidden = model.hidden_states(ids, None, documents)
    assert hidden.shape == (length, 1, 16)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB


def test_boundaries_matter() -> None:
    """Without `seq_idx` the same tokens give something else, so the test above can fail."""
    model = small_model(small_config())
    ids = tokens(len(ROWS), sum(ROWS[0]))
    assert relative_error(model(input_ids=ids), model(input_ids=ids, seq_idx=seq_idx())) > 0.1
