"""Images on their way to tiles: odd files, grids of the public formulas, tags of one length."""

from __future__ import annotations

import os
import re

import numpy as np
import pytest
from odd_images import IMAGES, plain, saved
from PIL import Image

from nemotron_h.core.errors import UserError
from nemotron_h.core.files import file_sha256
from nemotron_h.data.images.read import MOST_BYTES, ImageError, read_bytes, read_image
from nemotron_h.data.images.store import Images, Loaded, Writer, digest_of, join
from nemotron_h.data.images.tags import tag_rows, tile_tags
from nemotron_h.data.images.tiling import FEWER_TILES, Tiling, grids
from nemotron_h.data.tokenizer import train_bpe


@pytest.mark.parametrize("name", IMAGES)
def test_an_odd_image_has_one_clear_outcome(name: str) -> None:
    make, outcome = IMAGES[name]
    if isinstance(outcome, str):
        with pytest.raises(ImageError, match=outcome):
            read_image(make())
        return
    image = read_image(make())
    assert (image.mode, image.size) == ("RGB", outcome[0])
    assert np.abs(np.asarray(image).astype(int) - outcome[1]).max() <= 6
    assert len(IMAGES) >= 40


def test_rotation_moves_pixels_as_exif_says() -> None:
    left = Image.fromarray(np.array([[[255, 0, 0], [0, 0, 255]]], dtype=np.uint8))  # red, blue
    exif = Image.Exif()
    exif[0x0112] = 6  # the top of the scene is on the right
    image = read_image(saved(left, exif=exif))
    assert np.asarray(image).tolist() == [[[255, 0, 0]], [[0, 0, 255]]]


def test_files_that_cannot_be_read_say_why(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with open(tmp_path / "huge.png", "wb") as file:
        file.truncate(MOST_BYTES + 1)
    (tmp_path / "cat.png").write_bytes(saved(plain()))
    reasons = {"none.png": "no such file", ".": "not a regular", "pipe": "not a regular", "huge.png": "over 64 MiB"}
    for name, reason in {**reasons, "a\0b": "cannot be read", "cat.png/x": "cannot be read"}.items():
        with pytest.raises(ImageError, match=reason):
            read_bytes(str(tmp_path / name))
    assert read_image(read_bytes(str(tmp_path / "cat.png"))).size == (20, 10)
    with open(tmp_path / "archive", "wb") as file:
        file.write(b"before" + saved(plain()) + b"behind")
    assert read_bytes(str(tmp_path / "archive"), 6, len(saved(plain()))) == saved(plain())


def test_grids_are_those_of_the_public_formulas() -> None:
    """Computed with Megatron-LM's formulas; columns: closest of 12 and 6, area of 12 and 6."""
    vectors = """
    1920x1080 4:2 2:1 4:2 3:2
    640x480   4:3 3:2 4:3 3:2
    1024x768  4:3 3:2 4:3 3:2
    800x1200  2:3 2:3 2:3 2:3
    2000x500  4:1 4:1 4:1 4:1
    300x900   1:3 1:3 1:3 1:3
    896x448   2:1 2:1 2:1 2:1
    448x448   1:1 1:1 1:1 1:1
    """
    for line in vectors.strip().splitlines():
        size, *expected = line.split()
        width, height = map(int, size.split("x"))
        chosen = [Tiling(448, most, by).grid(width, height) for by in ("closest", "area") for most in (12, 6)]
        assert [f"{c}:{r}" for c, r in chosen] == expected, size
    assert len(grids(12)) == 35  # paper, footnote 13
    assert Tiling(448).grid(640, 640) == (2, 2)  # of one ratio the larger grid that the image half fills
    assert Tiling(448).grid(600, 600) == (1, 1)


def test_tiles_are_the_image_row_by_row_and_the_thumbnail_last() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (16, 24, 3), dtype=np.uint8)
    tiling = Tiling(8, 6)
    tiles = tiling.cut(Image.fromarray(pixels))
    assert (tiles.shape, tiles.dtype) == ((7, 3, 8, 8), np.uint8)
    for number in range(6):
        row, column = divmod(number, 3)
        part = pixels[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        assert np.array_equal(tiles[number].transpose(1, 2, 0), part)
    assert np.abs(tiles[6].mean((1, 2)) - pixels.mean((0, 1))).max() < 3
    assert tiling.count(24, 16) == 7
    one = Tiling(8, 1).cut(Image.fromarray(pixels))
    assert (len(one), Tiling(8, 1).count(24, 16)) == (1, 1)
    assert np.array_equal(one[0], tiles[6])
    assert [t.max_tiles for t in Tiling(8, 6).fewer()] == [4, 2, 1]
    assert [t.max_tiles for t in Tiling().fewer()] == list(FEWER_TILES)
    with pytest.raises(UserError, match="max_tiles = 13"):
        Tiling(8, 13)
    with pytest.raises(UserError, match="tiling = 'nearest'"):
        Tiling(8, 12, "nearest")


def test_shards_are_joined_with_each_image_once(tmp_path) -> None:
    """Of documents that stay, in their order; what only a dropped one has is not copied."""
    contents = [saved(plain(size=(8 + n, 8))) for n in range(4)]
    loaded = [Loaded(data, digest_of(data), 8 + n, 8) for n, data in enumerate(contents)]
    shards = ([(0, [3], [0]), (2, [1, 5], [1, 0])], [(0, [2], [3]), (1, [2, 4], [1, 2])])
    stays = (np.array([True, True, True]), np.array([False, True]))
    for number, documents in enumerate(shards):
        with open(f"{tmp_path}/{number}.images", "wb") as blob, open(f"{tmp_path}/{number}.places", "wb") as index:
            writer = Writer(blob, index)
            for document, places, images in documents:
                writer.add(document, places, [loaded[image] for image in images])
    parts = [(f"{tmp_path}/{number}", kept) for number, kept in enumerate(stays)]
    content = join(parts, f"{tmp_path}/all")
    images = Images(f"{tmp_path}/all")
    assert images.places["document"].tolist() == [0, 2, 2, 3, 3]
    assert images.places["token"].tolist() == [3, 1, 5, 2, 4]
    assert [images.read(n).size for n in range(5)] == [(8, 8), (9, 8), (8, 8), (9, 8), (10, 8)]
    assert (tmp_path / "all.images").read_bytes() == b"".join(contents[:3])
    assert (content["images"], content["image_bytes"]) == (5, sum(map(len, contents[:3])))
    for suffix in ("images", "places"):
        assert content[f"sha256_{suffix}"] == file_sha256(tmp_path / f"all.{suffix}")


class Pieces:
    """A tokenizer of given pieces, the longest first, and of bytes else."""

    def __init__(self, *pieces: str) -> None:
        self.pieces = re.compile("|".join([*map(re.escape, sorted(pieces, key=len, reverse=True)), "."]))
        self.ids: dict[str, int] = {}

    def text_to_ids(self, text: str) -> list[int]:
        return [self.ids.setdefault(piece, len(self.ids)) for piece in self.pieces.findall(text)]


def test_tags_have_one_length_for_any_tokenizer(tmp_path) -> None:
    """Of the family they are the published ones; merged digits, a lone long tag and unknown digits are others' ways."""
    family = Pieces("<tile", "_global", "_thumb", "nail", "_")
    tags = tile_tags(family, 12)
    assert tags.shape == (13, 5)
    assert tags[0].tolist() == family.text_to_ids("<tile_global_thumbnail>")
    assert tags[12].tolist() == family.text_to_ids("<tile_12>")
    trained = train_bpe(["10 11 12 10 11 12 <tile_ 01 01"] * 50, 265, tmp_path)
    for tokenizer in (Pieces(), Pieces("12"), Pieces("<tile_", "<tile_0", "12>", "01"), trained):
        tags = tile_tags(tokenizer, 12)
        assert len(tags) == len({*map(tuple, tags.tolist())}) == 13
    assert trained.ids_to_text(tile_tags(trained, 12)[12].tolist()) == "<tile_12>"
    long = Pieces()
    long.text_to_ids = lambda text: [1, *map(ord, text)] if text == "7" else [*map(ord, text)]  # two tokens
    tags = tile_tags(long, 12)
    assert {row[-1] for row in tags.tolist()} == {ord(">")}
    assert len({*map(tuple, tags.tolist())}) == 13
    blind = Pieces()
    blind.text_to_ids = lambda text: [0 if c.isdigit() or c == "g" else 1 for c in text]
    with pytest.raises(UserError, match="two tags of tiles alike"):
        tile_tags(blind, 12)
    assert (tag_rows(1), tag_rows(4)) == ([0], [1, 2, 3, 0])
