"""Generation from prompts with images against the training model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from save_checkpoint import save
from small_model import small_config, small_model
from vision_model import ENCODERS, batch, tiles, vision_config, vision_model

from nemotron_h.core.errors import UserError
from nemotron_h.inference.generate import generate
from nemotron_h.inference.looking import Looking
from nemotron_h.inference.model import load_model
from nemotron_h.inference.prefill import prefill
from nemotron_h.inference.sampling import Sampling
from nemotron_h.inference.vision import Placed, load_images

WRITTEN = 12


@pytest.mark.parametrize("like", ENCODERS)
def test_greedy_tokens_are_those_of_the_training_forward(like: str, megatron: None, tmp_path: Path) -> None:
    """Of prompts of several lengths with one image, two and none, read in passes that part an image."""
    trained = vision_model(vision_config(like)).eval()
    checkpoint = save(trained, tmp_path / "checkpoint")
    model, images = load_model(checkpoint), load_images(checkpoint)
    inputs = [batch(1, n, [(0, at) for at in starts], seed=n) for n, starts in ((23, (2, 15)), (17, (9,)), (11, ()))]
    prompts = [each["input_ids"][0].tolist() for each in inputs]
    placed = [
        Placed(each["image_mask"][0].nonzero()[:, 0], images.tokens(each["tiles"])) if len(each["tiles"]) else None
        for each in inputs
    ]
    written = generate(model, prompts, max_tokens=WRITTEN, sampling=Sampling(0.0), images=placed)
    for each, tokens in zip(inputs, written, strict=True):
        ids = torch.cat([each["input_ids"], torch.tensor([tokens])], dim=1)
        mask = torch.nn.functional.pad(each["image_mask"], (0, WRITTEN))
        with torch.no_grad():
            scores = trained(input_ids=ids, image_mask=mask, tiles=each["tiles"])[0, :, :300]
        assert scores[-WRITTEN - 1 : -1].argmax(-1).tolist() == tokens
    assert generate(model, prompts, max_tokens=WRITTEN, sampling=Sampling(0.0))[0] != written[0]
    hidden = [prefill(model, prompts, model.new_states(3, 23), limit, images=placed) for limit in (9, 1000)]
    torch.testing.assert_close(*hidden, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_is_refused(megatron: None, tmp_path: Path) -> None:
    checkpoint = save(vision_model(vision_config()), tmp_path / "images")
    images, model = load_images(checkpoint), load_model(checkpoint)
    with pytest.raises(UserError, match=r"tiles are \[1, 3, 20, 20\]"):
        images.tokens(tiles(1, side=20))
    found = images.tokens(tiles(1))
    for places, words in (([1, 2], "2 places for 4 image tokens"), ([2, 3, 4, 5], "beyond its 5 tokens")):
        with pytest.raises(UserError, match=words):
            generate(model, [[1] * 5], max_tokens=1, images=[Placed(torch.tensor(places), found)])
    seen, pictures = [], {"one": tiles(2), "other": tiles(1)}
    looking = object.__new__(Looking)
    looking.template, looking._newest = None, None
    looking.layout = SimpleNamespace(prompt=lambda _, turns: (np.arange(9), np.arange(4), pictures[turns].numpy()))
    looking.images = SimpleNamespace(tokens=lambda each: seen.append(len(each)) or images.tokens(each))
    read = [looking.read(turns).placed.embeddings for turns in ("one", "one", "other", "one")]
    assert seen == [2, 1, 2], "prompts about one image encode it once"
    assert torch.equal(read[1], images.tokens(pictures["one"]))
    text = save(small_model(small_config()), tmp_path / "text")
    with pytest.raises(UserError, match="reads text alone"):
        load_images(text)
