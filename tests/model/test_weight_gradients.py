"""The output layer adds its weight's gradient to Megatron's gradient buffer, without Apex."""

from __future__ import annotations

import torch
from small_model import small_config, small_model


def test_added_to_the_gradient_buffer_as_autograd_would(megatron) -> None:
    from nemotron_h.runtime import megatron_fixes

    megatron_fixes.install()
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(300, (2, 33), generator=draw)
    weights = []
    for fused in (False, True):
        model = small_model(small_config(gradient_accumulation_fusion=fused))
        weight = model.output_layer.weight
        assert model.output_layer.gradient_accumulation_fusion == fused
        weight.main_grad, weight.grad_added_to_main_grad = torch.ones_like(weight), False
        for _ in range(2):  # two micro-batches
            model(tokens[:, :-1], None, None, labels=tokens[:, 1:].contiguous()).sum().backward()
        if fused:
            assert weight.grad_added_to_main_grad
        else:
            weight.main_grad += weight.grad
        weights.append((weight.main_grad, model.embedding.word_embeddings.weight.grad))
    (plain, plain_embedding), (added, embedding) = weights
    torch.testing.assert_close(added, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(embedding, plain_embedding, rtol=1e-5, atol=1e-5)
