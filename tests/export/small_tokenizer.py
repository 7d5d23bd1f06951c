"""Tokenizers of the small model's size."""

from __future__ import annotations

import random
from pathlib import Path

from small_model import VOCABULARY

from nemotron_h.data.tokenizer import train_bpe


def train_small(folder: Path, size: int = VOCABULARY, seed: int = 0) -> Path:
    """Write a tokenizer of random words, with the chat tokens; another seed gives other tokens."""
    folder.mkdir(exist_ok=True)
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghöß日本🙂", k=4)) for _ in range(50)]
    train_bpe([" ".join(rng.choices(words, k=500))], size, folder)
    return folder
