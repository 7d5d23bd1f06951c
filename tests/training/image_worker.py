"""worker.py with images in some of the micro-batches: tiles are a function of the tokens beside them."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from pathlib import Path

import torch

from nemotron_h.model import module

plain = module.data_step


def with_images(batches: Iterator, keys: tuple[str, ...]) -> dict:
    """The next micro-batch, two of three with a tile of 4 tokens in its first row."""
    batch = next(batches)
    batch = batch[0] if isinstance(batch, tuple) else batch
    number = int(batch["tokens"].sum())
    count = int(number % 3 > 0)
    mask = torch.zeros_like(batch["tokens"], dtype=torch.bool)
    mask[0, 5:9] = bool(count)
    tiles = torch.randint(256, (count, 3, 16, 16), generator=torch.Generator().manual_seed(number)).byte()
    return plain(iter([{**batch, "image_mask": mask, "tiles": tiles}]), keys)


module.data_step = with_images
runpy.run_path(str(Path(__file__).with_name("worker.py")), run_name="__main__")
