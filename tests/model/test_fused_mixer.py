"""The mixer calls the fused kernel with the right arguments, in training alone, where its alignment allows it.

The kernel is stood in for by an oracle: the separate operations behind the fused signature.
"""

from __future__ import annotations

import dataclasses

import pytest
from small_model import scale_one, small_config, small_model, tokens


def fused_by_parts(calls: list):
    """The fused operation's signature over the plain operations."""
    import torch

    from nemotron_h.ops.select import Ops

    plain = Ops()

    def fused(zxbcdt, conv_weight, conv_bias, dt_bias, A, D, norm_weight, *, head_dim, groups, eps, seq_idx):
        calls.append(seq_idx)
        heads, inner = D.numel(), norm_weight.numel()
        assert inner == heads * head_dim
        state = (conv_weight.shape[0] - inner) // (2 * groups)
        z, xbc, dt = zxbcdt.split([inner, conv_weight.shape[0], heads], dim=-1)
        xbc = plain.conv1d(xbc, conv_weight, conv_bias, seq_idx=seq_idx)
        x, b, c = xbc.split([inner, groups * state, groups * state], dim=-1)
        y = plain.ssd(
            x.unflatten(-1, (heads, head_dim)),
            dt,
            A,
            b.unflatten(-1, (groups, state)),
            c.unflatten(-1, (groups, state)),
            D=D,
            dt_bias=dt_bias,
            seq_idx=seq_idx,
        )
        assert torch.all(A < 0)
        return plain.gated_rms_norm(y.flatten(-2), z, norm_weight, group_size=inner // groups, eps=eps)

    return dataclasses.replace(plain, fused_mixer=fused)


@pytest.mark.parametrize("documents", [False, True])
def test_same_loss_and_gradients_as_the_separate_operations(megatron, monkeypatch, documents: bool) -> None:
    import torch

    from nemotron_h.model import mixer

    batch, calls = tokens(2, 65), []
    seq_idx = (torch.arange(64)[None] // 23).int().expand(2, -1).contiguous() if documents else None
    results = []
    for ops in (None, fused_by_parts(calls)):
        if ops is not None:
            monkeypatch.setattr(mixer, "select_ops", lambda ops=ops: ops)
        model = small_model(small_config()).train()
        scale_one(dict(model.named_parameters()), seed=1)
        loss = model(input_ids=batch[:, :-1], labels=batch[:, 1:].contiguous(), seq_idx=seq_idx).mean()
        loss.backward()
        results.append((loss, {name: p.grad for name, p in model.named_parameters()}))
    assert len(calls) == 3  # Mamba-2 layers of the small model
    assert all((given is None) is not documents for given in calls)
    assert results[0][0].equal(results[1][0])
    assert all(results[1][1][name].equal(grad) for name, grad in results[0][1].items())
    with torch.no_grad():
        model.eval()(input_ids=batch[:, :-1], labels=batch[:, 1:].contiguous(), seq_idx=seq_idx)
    assert len(calls) == 3, "evaluation keeps nothing for a backward pass, so it needs no kernel that saves memory"


@pytest.mark.parametrize(
    ("heads", "tensor", "fits"), [(128, 1, True), (128, 8, True), (112, 1, True), (112, 2, True), (112, 4, False)]
)
def test_alignment(heads: int, tensor: int, fits: bool) -> None:
    """The 8B's 128 and the 4B's 112 heads, 64 channels each, 8 groups of state 128."""
    from nemotron_h.model.mixer import fused_obstacle

    channels = (heads * 64 + 2 * 8 * 128) // tensor
    assert (fused_obstacle(channels, channels + (heads * 64 + heads) // tensor) == "") is fits
