"""The output layer and the embedding add their weights' gradients to Megatron's gradient buffer, without Apex."""

from __future__ import annotations

import torch
from small_model import small_config, small_model


def test_added_to_the_gradient_buffer_as_autograd_would(megatron) -> None:
    from nemotron_h.platform import megatron_fixes

    megatron_fixes.install()
    rng = torch.Generator().manual_seed(1)
    tokens = torch.randint(300, (2, 33), generator=rng)  # some words come more than once
    found = []
    for fused in (False, True):
        model = small_model(small_config(gradient_accumulation_fusion=fused))
        weights = [model.output_layer.weight, model.embedding.word_embeddings.weight]
        assert model.output_layer.gradient_accumulation_fusion == fused
        for weight in weights:
            weight.main_grad, weight.grad_added_to_main_grad = torch.ones_like(weight), False
        for _ in range(2):  # two micro-batches
            model(tokens[:, :-1], None, None, labels=tokens[:, 1:].contiguous()).sum().backward()
        for weight in weights:
            assert weight.grad_added_to_main_grad == fused
            if not fused:
                weight.main_grad += weight.grad
        found.append([weight.main_grad for weight in weights])
    for plain, added in zip(*found, strict=True):
        torch.testing.assert_close(added, plain, rtol=1e-5, atol=1e-5)
