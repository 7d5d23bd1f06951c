"""On a GPU: Adam with bfloat16 moments, its pieces, and checkpoints that both optimizers read."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from repository import import_repository

import_repository()

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

LR, BETAS, EPS, DECAY = 1e-3, (0.9, 0.95), 1e-8, 0.1


def optimizer(params: list[torch.Tensor]):
    """As Megatron makes it for `optim.moments: bf16`."""
    from nemotron_h.platform.lean_adam import lean_adam

    return lean_adam()(
        params,
        lr=LR,
        betas=BETAS,
        eps=EPS,
        weight_decay=DECAY,
        master_weights=True,
        use_decoupled_grad=True,
        store_param_remainders=True,
        exp_avg_dtype=torch.bfloat16,
        exp_avg_sq_dtype=torch.bfloat16,
    )


def weights() -> list[torch.Tensor]:
    """Bfloat16 weights at scale 1 and a float32 one, as a Mamba-2 layer has both."""
    rng = torch.Generator("cuda").manual_seed(0)
    kinds = [((300, 70), torch.bfloat16), ((513,), torch.bfloat16), ((65,), torch.float32)]
    return [torch.randn(size, device="cuda", generator=rng).to(dtype) for size, dtype in kinds]


def gradients(step: int) -> list[torch.Tensor]:
    """Of a step."""
    rng = torch.Generator("cuda").manual_seed(100 + step)
    return [torch.randn(p.shape, device="cuda", generator=rng) for p in weights()]


def step(adam, params: list[torch.Tensor], number: int) -> None:
    """One step."""
    for p, g in zip(params, gradients(number), strict=True):
        p.decoupled_grad = g
    adam.step()


def test_against_float64() -> None:
    params = weights()
    adam = optimizer(params)
    main = [p.double() for p in params]
    m, v = [torch.zeros_like(p) for p in main], [torch.zeros_like(p) for p in main]
    for number in range(8):
        step(adam, params, number)
        for i, g in enumerate(g.double() for g in gradients(number)):
            m[i] = BETAS[0] * m[i] + (1 - BETAS[0]) * g
            v[i] = BETAS[1] * v[i] + (1 - BETAS[1]) * g * g
            first, second = (1 - BETAS[0] ** (number + 1)), (1 - BETAS[1] ** (number + 1))
            main[i] -= LR * (m[i] / first / ((v[i] / second).sqrt() + EPS) + DECAY * main[i])
            m[i], v[i] = m[i].bfloat16().double(), v[i].bfloat16().double()
    for p, expected in zip(params, main, strict=True):
        found = adam.get_unscaled_state(p, "master_param")
        assert found.dtype == torch.float32
        # a moment that lies between two bfloat16 values may be rounded to the other one: 2^-9 of a step
        assert (found.double() - expected).abs().max() < 8 * LR * 2**-7
        assert (found.double() - expected).abs().median() < LR * 1e-3
        gap = (p.double() - found.double()).abs()
        assert (gap <= 2.0**-8 * found.double().abs()).all(), "the weight is not the main weight rounded"
    assert math.isclose(adam.param_groups[0]["step"], 8)


def test_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from nemotron_h.platform import lean_adam

    found = []
    for size in (1 << 28, 1):
        monkeypatch.setattr(lean_adam, "PIECE", size)
        params = weights()
        adam = optimizer(params)
        for number in range(4):
            step(adam, params, number)
        found.append([adam.get_unscaled_state(p, "master_param") for p in params])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def side(moments: str, gradients: str, **options):
    """The benchmark's model at a hundredth of its width."""
    from bench_gpu import shape_of
    from gpu_sides import Side, ours

    shape = shape_of(small=True).changed(pattern="M-M*-", micro_batches=1)
    return Side(ours, shape, "bf16", moments=moments, gradients=gradients, **options)


def test_near_the_plain_optimizer() -> None:
    losses, norms = {}, {}
    for kinds in (("fp32", "fp32"), ("fp32", "bf16"), ("bf16", "fp32"), ("bf16", "bf16")):
        run = side(*kinds)
        for _ in range(10):
            run.step()
        assert math.isfinite(run.grad_norm)
        losses[kinds], norms[kinds] = torch.tensor(run.losses), run.grad_norm
        run.close()
    plain = losses.pop(("fp32", "fp32"))
    assert plain[-1] != plain[0]
    assert norms == pytest.approx(dict.fromkeys(norms, norms["fp32", "fp32"]), rel=1e-2)
    for kinds, found in losses.items():
        assert found[0] == plain[0]
        assert ((found - plain).abs() < 2e-3 * plain).all(), (kinds, found, plain)


def main_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Those of a checkpoint."""
    from megatron.core import dist_checkpointing

    held = dist_checkpointing.load_plain_tensors(str(folder))
    return {name: value for name, value in held.items() if name.startswith("optimizer.state.fp32_param.")}


@pytest.mark.parametrize("resumed", [("bf16", "bf16"), ("fp32", "fp32")])
@pytest.mark.parametrize("saved", [("bf16", "bf16"), ("fp32", "fp32")])
def test_resume_from_either(saved: tuple[str, str], resumed: tuple[str, str], tmp_path: Path) -> None:
    straight = side(*saved)
    for _ in range(3):
        straight.step()
    straight.save(tmp_path / "checkpoint")
    for _ in range(3):
        straight.step()
    again = side(*resumed, init_seed=7)
    again.load(tmp_path / "checkpoint")
    again.save(tmp_path / "again")
    held, written = main_weights(tmp_path / "checkpoint"), main_weights(tmp_path / "again")
    assert held
    assert held.keys() == written.keys()
    assert all(torch.equal(held[name], written[name]) for name in held)
    for _ in range(3):  # the batches of the first three steps
        next(again.data)
    for _ in range(3):
        again.step()
    expected, found = torch.tensor(straight.losses[3:]), torch.tensor(again.losses)
    if saved == resumed:
        assert torch.equal(found, expected)
    else:
        assert ((found - expected).abs() < 2e-3 * expected).all()
        # a main weight half-way between two bfloat16 is rounded to even in one and up in the other
        assert (found[0] - expected[0]).abs() < 1e-4 * expected[0]
    straight.close()
    again.close()
