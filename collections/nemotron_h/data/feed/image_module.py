"""The Lightning data module of conversations with images: packed by their length with all tags and embeddings.

Order, packing, resuming and validation are those of `data.feed.sft_module`. A loader's workers decode images and cut
them into tiles; a micro-batch has the tiles of all its windows, in the order of their places.

Axes: b windows, s positions of a window, n tiles of a micro-batch, h and w the side of a tile.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, default_collate

from nemotron_h.core.errors import UserError
from nemotron_h.core.strict import number
from nemotron_h.data.blend import IMAGES
from nemotron_h.data.feed.packing import PackedOrder
from nemotron_h.data.feed.prepared_module import of_sample
from nemotron_h.data.feed.sft_module import (
    ConversationDataModule,
    Conversations,
    PackedDataset,
    WindowList,
    packed_window,
)
from nemotron_h.data.images.layout import Expanded, ImageLayout
from nemotron_h.data.images.store import Images
from nemotron_h.data.images.tiling import Tiling
from nemotron_h.data.indexed import ArrayFile, TokenStream, read_lengths
from nemotron_h.schema.ranges import COUNT


class ImageConversations(Conversations):
    """The conversations of one split of a source that fit into a window with their images.

    A conversation longer than the window gets fewer tiles, step by step (`Tiling.fewer`). One that is too long with one
    tile for each image is truncated (`cut`), before an image that would not stay whole, or left out; so is one whose
    truncated part has nothing to learn.

    Args:
        stream: the tokens of all.
        seq_length: positions of a window.
        too_long: one of `schema.TOO_LONG`.
        layout: of images.
        images: of the split; None: it has none.

    Attributes:
        lengths: positions that each takes, int64 [conversations].
        cut, dropped, tokens_lost: as `Conversations`, embeddings counted as tokens.
        tiles: that are read of all its conversations.
        fewer: most tiles of an image -> how many conversations were brought down to that.
    """

    def __init__(
        self, stream: TokenStream, seq_length: int, too_long: str, layout: ImageLayout, images: Images | None
    ) -> None:
        self._stream, self._loss = stream, ArrayFile(stream.prefix + ".loss", np.uint8)
        self._layout, self._images = layout, images
        self._tokens = read_lengths(stream.prefix + ".idx").astype(np.int64)
        self._starts = np.cumsum(self._tokens) - self._tokens
        self._tilings = [layout.tiling, *layout.tiling.fewer()]
        documents = images.places["document"] if images else np.zeros(0, dtype=np.int64)
        self._rows = np.searchsorted(documents, np.arange(len(self._tokens) + 1))  # first image of each conversation
        whole = self._fit(documents, seq_length)
        lengths, keep, unseen = np.minimum(whole - 1, seq_length), np.ones(len(whole), dtype=bool), 0
        for document in np.flatnonzero(whole - 1 > seq_length).tolist():
            expanded = self._expanded(document)
            end = _end(expanded, seq_length)
            keep[document] = too_long == "cut" and bool(expanded.learnt[1:end].any())
            lengths[document] = end - 1
            if keep[document]:
                unseen += int(np.diff(expanded.blocks[expanded.blocks[:, 1] > end]).sum()) // layout.positions
        self._documents, self.lengths = np.flatnonzero(keep), lengths[keep]
        self.cut, self.dropped = int((whole[keep] - 1 > self.lengths).sum()), int((~keep).sum())
        self.tokens_lost = int(whole.sum() - self.lengths.sum() - len(self.lengths))
        steps = Counter(self._steps[self._documents].tolist())
        self.fewer = {self._tilings[step].max_tiles: count for step, count in sorted(steps.items()) if step}
        self.tiles = int(self._tiles[keep[documents]].sum()) - unseen

    def _fit(self, documents: np.ndarray, seq_length: int) -> np.ndarray:
        """Choose the most tiles with which each conversation fits, and return the tokens that it has then."""
        shapes = np.zeros((0, 2), dtype=np.int32)
        if self._images:
            shapes = np.stack([self._images.places[key] for key in ("width", "height")], 1)
        kinds, kind = np.unique(shapes, axis=0, return_inverse=True)
        kind, text = kind.ravel(), self._tokens - np.diff(self._rows)
        self._steps = np.full(len(self._tokens), len(self._tilings) - 1, dtype=np.int8)
        self._tiles = np.zeros(len(documents), dtype=np.int64)  # of each image
        whole, left = text.copy(), np.ones(len(text), dtype=bool)
        for step, tiling in enumerate(self._tilings):
            tiles = np.array([tiling.count(*size) for size in kinds.tolist()], dtype=np.int64)[kind]
            total = text + self._layout.positions * np.bincount(documents, tiles, len(text)).astype(np.int64)
            chosen = left & ((total - 1 <= seq_length) | (step == len(self._tilings) - 1))
            whole[chosen], self._steps[chosen] = total[chosen], step
            here = chosen[documents]
            self._tiles[here] = tiles[here]
            left &= ~chosen
        self._steps[np.diff(self._rows) == 0] = 0
        return whole

    def _expanded(self, document: int) -> Expanded:
        begin, count = int(self._starts[document]), int(self._tokens[document])
        rows = slice(self._rows[document], self._rows[document + 1])
        places = self._images.places["token"][rows].tolist() if self._images else []
        learnt = self._loss.read(begin, begin + count).astype(np.float32)
        return self._layout.expanded(self._stream.read(begin, count), learnt, places, self._tiles[rows].tolist())

    def read(self, number: int) -> tuple[Expanded, np.ndarray]:
        """Return a conversation of `length + 1` tokens, and the tiles of its images, uint8 [n, 3, h, w].

        Errors:
            UserError: an image is not what was prepared; names file, conversation and image.
        """
        document = int(self._documents[number])
        whole, end = self._expanded(document), int(self.lengths[number]) + 1
        blocks = whole.blocks[whole.blocks[:, 1] <= end]
        size = self._layout.tiling.size
        tiles = [np.zeros((0, 3, size, size), dtype=np.uint8)]
        for row in range(self._rows[document], self._rows[document] + len(blocks)):
            tiles.append(self._tilings[self._steps[document]].cut(self._images.read(row)))
        parts = {key: getattr(whole, key)[:end] for key in ("ids", "learnt", "is_image")}
        return replace(whole, blocks=blocks, **parts), np.concatenate(tiles)


def _end(expanded: Expanded, seq_length: int) -> int:
    """Return how many tokens of a conversation are read where it is too long: no image is split, and the last token is
    only predicted.
    """
    split = expanded.blocks[expanded.blocks[:, 1] > seq_length]
    return min(seq_length + 1, int(split[0, 0])) if len(split) else seq_length + 1


class ImageDataset(PackedDataset):
    """Windows of packed conversations with images, by number: those of `PackedDataset`, with bool `image_mask` [s] and
    uint8 `tiles` [n, 3, h, w].

    Args:
        tile_size: side of a tile, for windows without any.
    """

    def __init__(self, *args: Any, tile_size: int) -> None:
        super().__init__(*args)
        self.tile_size = tile_size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        try:
            read = [self.sources[item.source].read(item.number) for item in self.windows.window(index)]
        except UserError as error:
            raise of_sample(index, error) from error
        window = packed_window([(c.ids, c.learnt) for c, _ in read], self.seq_length, self.pad_id)
        masks = [c.is_image[:-1] for c, _ in read]
        image_mask = np.zeros(self.seq_length, dtype=bool)
        image_mask[: sum(map(len, masks))] = np.concatenate([*masks, image_mask[:0]])
        tiles = np.concatenate([np.zeros((0, 3, self.tile_size, self.tile_size), np.uint8), *(t for _, t in read)])
        images = {"image_mask": torch.from_numpy(image_mask), "tiles": torch.from_numpy(tiles)}
        return {**window, **images, "sample_ids": torch.tensor(index)}


def micro_batch(windows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return windows as a micro-batch: stacked to [b, s], but their tiles one behind the other, [n, 3, h, w]."""
    tiles = torch.cat([window["tiles"] for window in windows])
    rest = [{key: value for key, value in window.items() if key != "tiles"} for window in windows]
    return {**default_collate(rest), "tiles": tiles}


class ImageConversationDataModule(ConversationDataModule):
    """A prepared blend of conversations with images as training and validation data.

    Args:
        tile_size: side of a tile in pixels: the vision encoder's image size.
        tile_tokens: embeddings that the model makes of a tile.

    The others, and errors, are those of `PreparedDataModule`.
    """

    tile_size: int = number(448, least=1, most=4096)
    tile_tokens: int = number(256, least=1, most=COUNT)

    holds, reader = IMAGES, "fine-tuning with images"
    example = "one of whose sources has `images`"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._grid = Tiling(self.tile_size, self.max_tiles, self.tiling)

    @cached_property
    def layout(self) -> ImageLayout:
        """Return the layout of images with the blend's tokenizer."""
        return ImageLayout.of(self.tokenizer, self._grid, self.tile_tokens)

    @cached_property
    def tiles_per_window(self) -> float:
        """Return the mean number of tiles of a window, by those of a source's conversations."""
        windows = self.order.round(0)
        read = Counter(item.source for window in windows for item in window)
        sources = [(count, self.training[name]) for name, count in read.items()]
        return sum(count * source.tiles / len(source.lengths) for count, source in sources) / len(windows)

    def _source(self, name: str, split: str) -> ImageConversations:
        stream = self.manifest.stream(name, split)
        images = Images(stream.prefix) if self.manifest.sources[name].splits[split].images else None
        return ImageConversations(stream, self.seq_length, self.too_long, self.layout, images)

    def record(self) -> dict[str, Any]:
        """Return the record of `ConversationDataModule`, with the tiles of every source."""
        record = super().record()
        for name, source in self.training.items():
            record["conversations"][name] |= {"tiles": source.tiles, "fewer_tiles": source.fewer}
        return record

    def _plan(self) -> dict[str, Any]:
        plan = super()._plan()
        for name, source in plan["sources"].items():
            split = self.manifest.sources[name].splits["train"]
            source["sha256"] += [split.sha256_images, split.sha256_places]
        keys = ("tile_size", "tile_tokens", "max_tiles", "tiling")
        return {**plan, **{key: getattr(self, key) for key in keys}}

    def _described(self) -> str:
        tiles = sum(source.tiles for source in self.training.values())
        text = f"{super()._described()}; {tiles:,} tiles of {self.tile_size} x {self.tile_size} pixels"
        if fewer := sum((Counter(source.fewer) for source in self.training.values()), Counter()):
            steps = ", ".join(f"{most}: {count:,}" for most, count in sorted(fewer.items(), reverse=True))
            text += f"; too long with {self.max_tiles} an image, so with fewer (conversations): {steps}"
        return text

    def _packed_loader(
        self, windows: PackedOrder | WindowList, sources: dict[str, ImageConversations], samples: int, training: bool
    ) -> DataLoader:
        arguments = windows, sources, self.seq_length, self.tokenizer.pad_id, samples, training
        return self._loader(ImageDataset(*arguments, tile_size=self.tile_size), micro_batch)
