"""Batches of conversations with images: what a window holds, fewer tiles where it is too small, resuming, damage."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from odd_images import saved
from PIL import Image
from rich.console import Console
from test_sft_module import batches

from nemotron_h.core.errors import UserError
from nemotron_h.data.blend import load_blend
from nemotron_h.data.chat import FAMILY_SOURCE, ChatTemplate
from nemotron_h.data.feed.image_module import ImageConversationDataModule, ImageConversations
from nemotron_h.data.feed.sft_module import ConversationDataModule
from nemotron_h.data.images.records import asked, beside, read_illustrated
from nemotron_h.data.images.store import Images
from nemotron_h.data.images.tags import tag_rows, tile_tags
from nemotron_h.data.images.tiling import FEWER_TILES, Tiling
from nemotron_h.data.messages import Turn
from nemotron_h.data.prepare.pipeline import prepare
from nemotron_h.data.tokenizer import load_tokenizer

SEQ, BATCH, SIDE, TOKENS, COUNT = 192, 4, 8, 3, 80
SIZES = {"seq_length": SEQ, "global_batch_size": BATCH, "too_long": "cut", "tile_size": SIDE, "tile_tokens": TOKENS}
SHAPES = ((8, 8), (24, 16), (8, 30), (40, 9), (64, 48))


def record(number: int) -> dict:
    """Three of four have images: one, one, and three of them in two turns."""
    names = [{"type": "image", "image": f"{(number + n) % 50}.png"} for n in range(3)]
    asked = [{"type": "text", "text": f"Which {number}?"}]
    turns = [[[], [names[0]], [names[1]], [names[0], *asked, names[1]]][number % 4] + asked]
    turns += [[names[2], *asked]] if number % 4 == 3 else []
    said = [[("user", turn), ("assistant", f"It is {number}.")] for turn in turns]
    return {"messages": [{"role": role, "content": content} for pair in said for role, content in pair]}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(50):
        width, height = SHAPES[number % len(SHAPES)]
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        (folder / f"{number}.png").write_bytes(saved(Image.fromarray(pixels)))
    lines = "".join(json.dumps(record(number)) + "\n" for number in range(COUNT))
    (folder / "talk.jsonl").write_text(lines)
    words = [{"prompt": f"Say {n}.", "response": f"{n}" * (n % 7 + 1)} for n in range(30)]
    (folder / "words.jsonl").write_text("".join(json.dumps(word) + "\n" for word in words))
    form = {"category": "chat", "format": "jsonl", "validation": 0.1}
    sources = {"talk": {**form, "chat": "messages", "images": ".", "path": "talk.jsonl"}}
    sources["words"] = {**form, "chat": "prompt_response", "path": "words.jsonl", "weight": 0.02}  # `talk` ends first
    blend = {"name": "seen", "tokenizer": {"kind": "bpe", "vocab_size": 270}, "chat_template": "nemotron_h"}
    blend |= {"sources": sources, "phases": [{"name": "all", "weights": {"chat": 100}}]}
    (folder / "seen.yaml").write_text(yaml.safe_dump(blend))
    prepare(load_blend(folder / "seen.yaml"), folder / "data", workers=1, console=Console(quiet=True))
    return folder


def module(root: Path, step: int = 0, **settings) -> ImageConversationDataModule:
    values = {**SIZES, "blend": str(root / "seen.yaml"), "root": str(root / "data"), "seed": 5, **settings}
    data = ImageConversationDataModule(**values)
    data.trainer = SimpleNamespace(global_step=step, max_steps=10, limit_val_batches=1.0)
    data.setup()
    return data


def alone(root: Path, number: int, seq_length: int = SEQ) -> tuple | None:
    """A conversation without packing, built token by token: inputs, labels, mask, image mask, tiles."""
    tokenizer = load_tokenizer(root / "data/seen/tokenizer")
    turns = read_illustrated(record(number), "messages", beside(str(root / "talk.jsonl"), "."))
    encoded = ChatTemplate(FAMILY_SOURCE, tokenizer).encode(turns)
    pictures = [Image.open(picture.path) for turn in turns for picture in turn.images]
    for most in (12, *FEWER_TILES):
        tags, tiling = tile_tags(tokenizer, 12).tolist(), Tiling(SIDE, most)
        ids, loss, is_image, tiles, left = [], [], [], [], list(pictures)
        for place, (token, learnt) in enumerate(zip(encoded.ids, encoded.loss, strict=True)):
            if place not in encoded.images:
                ids, loss, is_image = [*ids, token], [*loss, float(learnt)], [*is_image, False]
                continue
            cut = tiling.cut(left.pop(0))
            for tile, row in zip(cut, tag_rows(len(cut)), strict=True):
                new = [*tags[row], *[tokenizer.pad_id] * TOKENS]
                ids, loss = [*ids, *new], [*loss, *[0.0] * len(new)]
                is_image += [False] * len(tags[row]) + [True] * TOKENS
                tiles.append(tile.tobytes())
        if len(ids) - 1 <= seq_length:
            return tuple(ids[:-1]), tuple(ids[1:]), tuple(loss[1:]), tuple(is_image[:-1]), tuple(tiles)
    return None


def parts(batch: dict[str, torch.Tensor]) -> list[tuple]:
    """The conversations of a micro-batch, cut apart by seq_idx, each with its tiles; padding left out."""
    found, used = [], 0
    assert batch["tiles"].dtype == torch.uint8
    assert int(batch["image_mask"].sum()) == TOKENS * len(batch["tiles"])
    assert not (batch["image_mask"][:, 1:] & (batch["loss_mask"][:, :-1] > 0)).any()
    for row in range(len(batch["tokens"])):
        seq_idx = batch["seq_idx"][row]
        for number in range(int(seq_idx[-1]) + 1):
            here = seq_idx == number
            columns = [tuple(batch[key][row][here].tolist()) for key in ("tokens", "labels", "loss_mask", "image_mask")]
            count = sum(columns[3]) // TOKENS
            tiles = tuple(tile.numpy().tobytes() for tile in batch["tiles"][used : used + count])
            used += count
            if any(columns[2]):
                found.append((int(batch["sample_ids"][row]), (*columns, tiles)))
    assert used == len(batch["tiles"])
    return found


def test_packed_conversations_are_those_alone_and_each_is_read_once(root: Path) -> None:
    data = module(root, micro_batch_size=2, workers=1)
    windows = len(data.order.round(0))
    loader = batches(data)
    read = [part for _ in range(-(-windows // BATCH) * BATCH // 2) for part in parts(next(loader))]
    read = [part for window, part in read if window < windows]
    read += [part for batch in batches(module(root), validation=True) for _, part in parts(batch)]
    expected = [alone(root, number) for number in range(COUNT)]
    assert None not in expected
    assert sorted(part for part in read if part in {*expected}) == sorted(expected)
    words = [part for part in read if part not in {*expected}]
    assert 0 < len(words) <= 30
    assert not any(any(part[3]) for part in words), "words have no image"
    talk = data.training["talk"]
    assert sum(talk.fewer.values()) > 3
    assert {*talk.fewer} <= {*FEWER_TILES}
    assert f"an image, so with fewer (conversations): 8: {talk.fewer[8]:,}" in data._described()
    assert data.tiles_per_window == pytest.approx(talk.tiles / windows)  # a round reads each conversation once
    data.trainer.global_step = 0
    assert data.record()["conversations"]["talk"] == {
        **dict.fromkeys(("cut", "dropped", "tokens_lost"), 0),
        "used": len(talk.lengths),
        "tiles": talk.tiles,
        "fewer_tiles": talk.fewer,
    }


def test_a_prompt_is_what_training_reads_before_the_answer(root: Path) -> None:
    layout = module(root).layout
    template = ChatTemplate(FAMILY_SOURCE, load_tokenizer(root / "data/seen/tokenizer"))
    for number in (1, 2, 4):
        files = [str(root / part["image"]) for part in record(number)["messages"][0]["content"] if "image" in part]
        turn = asked(f"Which {number}?", files) if files else Turn("user", f"Which {number}?")
        ids, places, tiles = layout.prompt(template, (turn,))
        tokens, _, _, is_image, trained_tiles = alone(root, number)
        assert ids.tolist() == list(tokens[: len(ids)])
        assert places.tolist() == np.flatnonzero(is_image).tolist()
        assert [tile.tobytes() for tile in tiles] == list(trained_tiles)
        assert template.tokenizer.ids_to_text(list(tokens[len(ids) :])).startswith(f"It is {number}.")


@pytest.mark.parametrize("too_long", ["cut", "drop"])
def test_what_is_too_long_with_one_tile_is_cut_before_an_image_or_left_out(root: Path, too_long: str) -> None:
    """Lengths that one conversation has at each window size, down to where no answer is left."""
    layout = module(root).layout
    stream, images = module(root).manifest.stream("talk", "train"), Images(str(root / "data/seen/talk/train"))
    whole = ImageConversations(stream, 10_000, too_long, layout, images)
    fewest = replace(layout, tiling=layout.tiling.at_most(1))
    one = ImageConversations(stream, 10_000, too_long, fewest, images)
    seen = set()
    for seq_length in range(20, 100, 7):
        source = ImageConversations(stream, seq_length, too_long, layout, images)
        for number in range(len(source.lengths)):
            conversation, tiles = source.read(number)
            assert len(conversation.ids) == source.lengths[number] + 1 <= seq_length + 1
            assert conversation.is_image[:-1].sum() == TOKENS * len(tiles), "every tile is whole, and among the inputs"
            assert conversation.learnt[1:].any()
            if len(tiles) == len(conversation.blocks):
                expected, expected_tiles = one.read(source._documents[number])
                assert np.array_equal(conversation.ids, expected.ids[: len(conversation.ids)])
                assert np.array_equal(tiles, expected_tiles[: len(tiles)])
            seen.add(len(conversation.blocks))
        assert len(source.lengths) + source.dropped == len(whole.lengths)
        assert too_long == "cut" or source.cut == 0
        assert source.tiles == sum(len(source.read(n)[1]) for n in range(len(source.lengths)))
    assert seen >= ({0, 1, 2} if too_long == "cut" else {0, 1})


def test_a_resumed_run_reads_on_and_other_tiles_are_refused(root: Path) -> None:
    straight = batches(module(root))
    expected = [next(straight) for _ in range(3 * BATCH)][2 * BATCH :]
    state = json.loads(json.dumps(module(root, step=2).state_dict()))
    resumed = module(root, step=2)
    resumed.load_state_dict(state)
    loader = batches(resumed)
    for batch in expected:
        found = next(loader)
        assert found.keys() == batch.keys()
        assert all(torch.equal(found[key], batch[key]) for key in batch)
    two = [batches(module(root), rank, 2) for rank in range(2)]
    shared = [batch for loader in two for _ in range(BATCH // 2) for batch in [next(loader)]]
    first = batches(module(root))
    straight = [part for _ in range(BATCH) for part in parts(next(first))]
    assert sorted(part for batch in shared for part in parts(batch)) == sorted(straight)
    with pytest.raises(UserError, match="max_tiles: 12 -> 6"):
        module(root, step=2, max_tiles=6).load_state_dict(state)


def test_mistakes_and_damage_are_told(root: Path, tmp_path: Path) -> None:
    sizes = {key: SIZES[key] for key in ("seq_length", "global_batch_size", "too_long")}
    with pytest.raises(UserError, match="holds conversations with images: fine-tuning reads conversations"):
        ConversationDataModule(blend=str(root / "seen.yaml"), **sizes).blend_spec  # noqa: B018 - reads the file
    with pytest.raises(UserError, match=r"data\.max_tiles = 13"):
        module(root, max_tiles=13)
    with pytest.raises(UserError, match="tiling = 'nearest'"):
        module(root, tiling="nearest")
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    data = module(tmp_path)
    blob = tmp_path / "data/seen/talk/train.images"
    blob.write_bytes(bytes(len(blob.read_bytes())))
    with pytest.raises(UserError, match=r"^sample \d+: .*talk/train\.images: image \d of conversation \d+, from byte"):
        [*itertools.islice(batches(data), BATCH)]
