"""Adam with bfloat16 moments: what of it needs no GPU (tests/gpu/test_lean_adam.py has the rest)."""

from __future__ import annotations

import pytest
import torch

from nemotron_h.core.errors import UserError
from nemotron_h.platform import lean_adam
from nemotron_h.training.optimizer import scheduled_adamw


def test_a_weight_and_its_remainder_are_the_main_weight() -> None:
    rng = torch.Generator().manual_seed(0)
    scale = 10.0 ** torch.randint(-37, 37, (200_000,), generator=rng).float()
    edges = torch.tensor([0.0, -0.0, 1.0, 1 + 2**-8, 1 + 2**-9, -1 - 2**-8, 3e-45, -1e-40, 1.17e-38])
    main = torch.cat([torch.randn(200_000, generator=rng) * scale, edges])
    weight, remainder = lean_adam.split(main)
    assert weight.dtype == torch.bfloat16
    assert remainder.dtype == torch.int16
    assert torch.equal(lean_adam.fuse(weight, remainder).view(torch.int32), main.view(torch.int32))
    ties = (main.view(torch.int32) & 0xFFFF) == 0x8000  # torch rounds those to even
    assert torch.equal(weight[~ties], main.bfloat16()[~ties])
    assert remainder.ne(0).any()


def test_pieces_keep_order_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lean_adam, "PIECE", 10)
    params = [torch.zeros(size) for size in (4, 6, 1, 30, 2, 3)]
    found = list(lean_adam.pieces(params))
    assert [[p.numel() for p in piece] for piece in found] == [[4, 6], [1], [30], [2, 3]]
    assert [id(p) for piece in found for p in piece] == [id(p) for p in params]
    assert list(lean_adam.pieces([])) == []


def adamw(**options: object) -> object:
    """As a recipe makes it."""
    return scheduled_adamw(peak_lr=1e-3, final_lr=1e-5, warmup_steps=1, **options)


def test_refused_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="sees no GPU") as caught:
        adamw(moments="bf16")
    assert "leave out optim.moments" in str(caught.value.hint)
    assert not adamw().config.use_precision_aware_optimizer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"moments": "bf61"}, "moments = 'bf61'"),
        ({"moments": "bf16", "distributed_optimizer": False}, "without the distributed optimizer"),
        ({"moments": "bf16"}, "Transformer Engine"),
    ],
)
def test_refused_with_a_gpu(options: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise lean_adam.hardware.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(lean_adam.hardware.importlib.metadata, "version", missing)
    with pytest.raises(UserError, match=message):
        adamw(**options)
