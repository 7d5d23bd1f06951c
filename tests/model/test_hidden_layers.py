"""The states that a distillation compares, of the layers that were named, against the plain formula."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from small_model import VOCABULARY, scale_one, small_config, small_model, tokens

PATTERN, TEACHER = "M*-M", "M-M*-M-"


@pytest.fixture(scope="module", autouse=True)
def _one_rank(megatron: None) -> None:
    pass


def models(hidden_size: int, pairs: list[list[int]], **changes: Any) -> tuple[Any, Any]:
    """A student of this width beside a teacher of 48."""
    from nemotron_h.training.stages.distillation.model import TERMS, DistillationConfig, DistillingModel

    assert TERMS == ("loss", "tokens", "kl", "lm", "hidden")
    teacher = small_model(small_config(pattern=TEACHER), seed=1).eval().requires_grad_(False)
    plain = small_config(pattern=PATTERN, hidden_size=hidden_size, **changes)
    values = {f.name: getattr(plain, f.name) for f in dataclasses.fields(plain) if f.init}
    values.pop("forward_step_fn")
    config = DistillationConfig(**values, hidden_weight=0.5, hidden_layers=pairs)
    config.__dict__["teacher_definition"] = teacher.config.definition()
    student = config.megatron_model(DistillingModel, True, True, teacher=teacher)
    student.initialize(1)
    scale_one(dict(student.named_parameters()), seed=2)
    return student.train(), teacher


def outputs(model: Any, text: torch.Tensor, numbers: list[int]) -> list[torch.Tensor]:
    """What the layers return, and what stands before the output layer, by hooks, [tokens, width] in float64."""
    seen: dict[int, torch.Tensor] = {}

    def note(number: int) -> Any:
        def hook(_: Any, __: Any, out: Any) -> None:
            seen[number] = out[0] if isinstance(out, tuple) else out

        return hook

    hooks = [model.decoder.layers[n].register_forward_hook(note(n)) for n in numbers]
    last = model.hidden_states(text, None, None)
    for hook in hooks:
        hook.remove()
    return [state.flatten(0, 1).double() for state in ([seen[n] for n in numbers] or [last])]


@pytest.mark.parametrize("again", ["none", "layer"])
@pytest.mark.parametrize("pairs", [[], [[0, 2], [3, 6]]])
@pytest.mark.parametrize("hidden_size", [48, 32])
def test_the_term_and_its_gradients(hidden_size: int, pairs: list[list[int]], again: str) -> None:
    recompute = dict.fromkeys(("recompute_mamba", "recompute_attention", "recompute_ffn"), again)
    student, teacher = models(hidden_size, pairs, **recompute)
    text = tokens(2, 24)
    labels = torch.randint(VOCABULARY, text.shape, generator=torch.Generator().manual_seed(5))
    mask = torch.rand(text.shape, generator=torch.Generator().manual_seed(6))
    assert (student.projection is None) == (hidden_size == 48)

    found = student(input_ids=text, labels=labels, loss_mask=mask)
    student.zero_grad()
    found[0].backward()
    got = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}

    def plain(state: torch.Tensor) -> torch.Tensor:
        return state if student.projection is None else state @ student.projection.double().t()

    ours = outputs(student, text, [own for own, _ in pairs])
    theirs = outputs(teacher, text, [other for _, other in pairs])
    weights = mask.t().reshape(-1).double()
    distances = [
        1 - (plain(a) * b).sum(1) / (plain(a).norm(dim=1) * b.norm(dim=1)) for a, b in zip(ours, theirs, strict=True)
    ]
    term = (weights * torch.stack(distances).mean(0)).sum()
    assert float(found[4]) == pytest.approx(float(term), rel=1e-5)

    # without the term, and the term alone by the plain formula
    student.config.hidden_weight = 0.0
    student.zero_grad()
    rest = student(input_ids=text, labels=labels, loss_mask=mask)[0]
    assert float(found[0]) == pytest.approx(float(rest) + 0.5 * float(term), rel=1e-5)
    (rest + 0.5 * term).backward()
    for name, gradient in got.items():
        expected = dict(student.named_parameters())[name].grad
        error = (gradient - expected).abs().max() / expected.abs().max().clamp_min(1e-20)
        assert error < 2e-4, name
    if hidden_size == 32:
        assert float(got["hidden_projection.weight"].abs().max()) > 1e-3


def test_the_projection_is_no_part_of_the_model() -> None:
    """In what is kept to resume; not in the model's weights, which initial ones lack too."""
    student, _ = models(32, [])
    assert "hidden_projection.weight" in student.sharded_state_dict()
    student.state_part = "base"
    base = student.sharded_state_dict()
    assert not [name for name in base if "projection" in name]
    drawn = student.projection.detach().clone()
    student.load_state_dict({name: p.detach().clone() for name, p in student.named_parameters() if name in base})
    assert torch.equal(student.projection, drawn)
