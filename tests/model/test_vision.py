"""Encoder, pixel shuffle and projector against independent implementations, and images in a language model's rows."""

from __future__ import annotations

import pytest
import torch
from small_model import relative_error
from vision_model import ENCODERS, TILE, batch, internvit, tiles, vision_config, vision_model, vision_schema

from nemotron_h.architecture.rank import Layout, Rank
from nemotron_h.architecture.vision import text_only
from nemotron_h.checkpoint.names import weights
from nemotron_h.ops.tiles import MEAN, STD, pixel_shuffle

pytestmark = pytest.mark.usefixtures("megatron")


def theirs(model) -> dict[str, torch.Tensor]:
    """A model's weights under Hugging Face's names."""
    ours = dict(model.named_parameters())
    rows = list(weights(model.config.definition()))[-len(list(model.config.definition().encoder.tensors())) :]
    return {k: v for row in rows for k, v in row.to_theirs(torch.cat([ours[n] for n in row.ours])).items()}


@pytest.mark.parametrize("like", ENCODERS)
def test_the_encoder_is_internvit(like: str) -> None:
    from transformers.models.internvl.modeling_internvl import InternVLModel

    config = vision_config(like)
    vision = config.vision
    model = vision_model(config)
    oracle = internvit(vision, attn_implementation="eager").double()
    parts = theirs(model)
    state = {k.removeprefix("vision."): v.double() for k, v in parts.items() if k.startswith("vision.")}
    assert not any(oracle.load_state_dict(state, strict=True))
    pixels = tiles(3)
    mean, std = (torch.tensor(each, dtype=torch.float64).view(3, 1, 1) for each in (MEAN, STD))
    with torch.no_grad():
        patches = oracle((pixels.double() / 255 - mean) / std).last_hidden_state[:, 1:]
        shuffled = InternVLModel.pixel_shuffle(None, patches.unflatten(1, (TILE // 4, -1))).flatten(1, 2)
        assert relative_error(model.vision(pixels), shuffled) < 1e-5
        expected = shuffled * torch.rsqrt(shuffled.square().mean(-1, keepdim=True) + 1e-5)
        expected = expected * parts["projector.norm.weight"].double()
        inner = (expected @ parts["projector.linear_fc1.weight"].double().T).clamp(min=0) ** 2
        expected = inner @ parts["projector.linear_fc2.weight"].double().T
        actual = model._images.tokens(pixels)
    assert relative_error(actual, expected.flatten(0, 1)) < 1e-5


def test_a_token_has_its_four_patches() -> None:
    """Top left, top right, bottom left, bottom right, one behind the other."""
    numbers = torch.arange(36).view(1, 36, 1)
    assert pixel_shuffle(numbers)[0].tolist() == [
        [2 * row * 6 + 2 * column + each for each in (0, 1, 6, 7)] for row in range(3) for column in range(3)
    ]


@pytest.mark.parametrize("like", ENCODERS)
def test_counts_are_the_modules(like: str) -> None:
    model = vision_config(like, vocab_size=384).configure_model(None)
    definition = model.config.definition()
    counted = {name: sum(p.numel() for p in getattr(model, name).parameters()) for name in ("vision", "projector")}
    encoder = definition.encoder
    assert counted == {"vision": encoder.parameters, "projector": encoder.projector.parameters}
    assert encoder.rank_parameters(1) == definition.vision_parameters == sum(counted.values())
    assert sum(p.numel() for p in model.parameters()) == definition.parameters + definition.vision_parameters
    stored = {n: tuple(t.global_shape) for n, t in model.sharded_state_dict().items() if n.startswith(("vis", "proj"))}
    assert stored == {n: shape for row in encoder.tensors() for n, shape in row.ours.items()}


def test_an_image_takes_the_places_of_its_tokens() -> None:
    """The same as a language model whose embeddings are replaced by hand, where tiles lie in any row."""
    model = vision_model(vision_config())
    inputs = batch(2, 20, [(0, 3), (0, 9), (1, 0)])
    with torch.no_grad():
        logits = model(**inputs)
        images = model._images.tokens(inputs["tiles"])
        embedded = model.embedding.word_embeddings.weight[inputs["input_ids"]]
        embedded[0, 3:7], embedded[0, 9:13], embedded[1, 0:4] = images.split(4)
        hidden = model.decoder(embedded.transpose(0, 1))
        expected = model.output_layer(hidden)[0].transpose(0, 1)
        assert relative_error(logits, expected) < 1e-6
        for wrong in ({"tiles": inputs["tiles"][:2]}, {"tiles": None}, {"image_mask": None}):
            with pytest.raises(ValueError, match=r"tiles of 4 image tokens, and \d+ places"):
                model(**{**inputs, **wrong})
        with pytest.raises(ValueError, match=r"the encoder takes \[n, 3, 16, 16\]"):
            model(**{**inputs, "tiles": tiles(3, side=20)})


def test_packed_images_are_those_of_rows_of_their_own() -> None:
    """Losses and gradients, packed and one conversation a row; text gets no gradient from a neighbour's tiles."""
    model = vision_model(vision_config())
    lengths, starts = (13, 9, 18), ((2,), (), (0, 10))
    separate = [batch(1, n, [(0, s) for s in at], seed=n) for n, at in zip(lengths, starts, strict=True)]
    packed = {key: torch.cat([each[key] for each in separate], dim=1) for key in ("input_ids", "image_mask")}
    packed["tiles"] = torch.cat([each["tiles"] for each in separate])
    seq_idx = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None].int()

    def run(inputs: dict, seq_idx: torch.Tensor | None = None) -> torch.Tensor:
        return model(**inputs, labels=inputs["input_ids"].roll(-1), seq_idx=seq_idx)

    together = run(packed, seq_idx).split(lengths, dim=1)
    alone = [run(each) for each in separate]
    for a, b in zip(together, alone, strict=True):
        assert relative_error(a[:, :-1], b[:, :-1]) < 1e-5  # the last label is another's token
    weights = list(model.parameters())
    gradients = [torch.autograd.grad(sum(x[:, :-1].sum() for x in each), weights) for each in (together, alone)]
    errors = [relative_error(a, b) for a, b in zip(*gradients, strict=True) if b.any()]
    assert max(errors) < 1e-4
    assert len(errors) > 40
    # the conversation without an image
    vision = [*model.vision.parameters(), *model.projector.parameters()]
    for gradient in torch.autograd.grad(run(packed, seq_idx)[:, 13:21].sum(), vision):
        assert not gradient.any()


def test_a_batch_of_text_gives_gradients_of_zero() -> None:
    model = vision_model(vision_config())
    ids = batch(1, 12, [])["input_ids"]
    with torch.no_grad():
        language = vision_config(vision=None, projector=None).configure_model(None)
        language.load_state_dict({n: p for n, p in model.state_dict().items() if n in language.state_dict()})
        assert torch.equal(model(ids), language(ids))
    assert text_only(model.config.definition()).parameters == language.config.definition().parameters
    model(ids).sum().backward()
    for part in (model.vision, model.projector):
        assert all(p.grad is not None and not p.grad.any() for p in part.parameters())


def test_recomputed_gradients_are_the_same() -> None:
    inputs, found = batch(1, 12, [(0, 2)]), []
    for recompute in ("none", "layer"):
        model = vision_model(vision_config(recompute_vision=recompute)).train()
        model(**inputs).square().sum().backward()
        found.append([p.grad for p in model.vision.parameters()])
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*found, strict=True))


def test_parts_that_are_frozen_get_no_gradients() -> None:
    inputs = batch(1, 12, [(0, 2)])
    for frozen, trained in (
        (["vision", "language"], {"projector"}),
        (["projector", "language"], {"vision"}),
        (["vision"], {"projector", "decoder", "embedding", "output_layer"}),
    ):
        model = vision_model(vision_config(frozen=frozen)).train()
        model(**inputs).square().sum().backward()
        assert {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None} == trained


def test_adapters_train_the_language_model_alone() -> None:
    from nemotron_h.schema.recipe import AdapterSchema

    model = vision_config(adapter=AdapterSchema("lora", 2, 4.0, 0.0, ["linear_fc1"])).configure_model(None).train()
    model(**batch(1, 12, [(0, 2)])).square().sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained
    assert all(name.startswith("decoder.layers.") and ".linear_fc1.adapter." in name for name in trained)


@pytest.mark.parametrize("like", ENCODERS)
def test_memory_is_what_a_backward_keeps(like: str) -> None:
    """Bytes of the tensors that autograd saves, beside the weights, are those of the plan within a tenth."""
    wide = {"hidden_size": 64, "ffn_hidden_size": 256, "num_layers": 1}
    config = vision_config(vision=vision_schema(like, **wide), hidden_size=64)
    model, definition = config.configure_model(None).train(), config.definition()
    count, encoder = 5, definition.encoder
    for part, layer, block, rows in (
        *(("vision", *pair, encoder.positions) for pair in zip(model.vision.layers, encoder.blocks, strict=True)),
        ("projector", model.projector, encoder.projector, encoder.tokens_per_tile),
    ):
        weights = {p.untyped_storage().data_ptr() for p in layer.parameters()}
        saved: dict[int, int] = {}

        def keep(x: torch.Tensor, weights: set[int] = weights, saved: dict[int, int] = saved) -> torch.Tensor:
            storage = x.untyped_storage()
            if storage.data_ptr() not in weights:
                saved[storage.data_ptr()] = storage.nbytes()
            return x

        hidden = torch.randn(rows, count, block.hidden_size, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            out = layer(hidden)
        own = Layout(seq_length=rows, micro_batch=count, precision="fp32", backend="cpu")
        planned = block.memory(Rank(block, own), False).kept
        assert sum(saved.values()) == pytest.approx(planned, rel=0.1), (part, block.name)
        assert out.requires_grad
