"""Train the demo's image encoder on its own, as the paper's was before a language model read it: `make demo-vlm`.

    python demos/vlm_encoder.py runs/pictures/train/digits.jsonl runs/pictures/train/signs.jsonl --out runs/vlm_encoder

Writes an encoder of transformers' type `internvl_vision`, of the widths of `demos/vlm.yaml`, which `nemotron-h import
vision` reads. Two linear layers learn to read the characters of each picture's answer, and are dropped afterwards: one
off all patches, which is fast to learn, and one off each image token alone, so that every token comes to hold the whole
answer, wherever a language model looks. Without this the encoder would begin to learn behind thirteen layers that
cannot read yet, which takes longer than two cores have.

Axes: n pictures, k characters of the longest answer, l class token and patches, c channels, t image tokens.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from transformers import InternVLVisionConfig, InternVLVisionModel

from nemotron_h.architecture.vision import Encoder
from nemotron_h.core.errors import UserError
from nemotron_h.core.progress import StageProgress
from nemotron_h.data.images.read import read_image
from nemotron_h.data.images.tiling import Tiling
from nemotron_h.evaluation.pictures.questions import read_questions
from nemotron_h.export.folder import check_new
from nemotron_h.export.vision_config import to_config
from nemotron_h.ops.tiles import MEAN, STD, pixel_shuffle
from nemotron_h.platform.ranks import report_mistakes
from nemotron_h.recipe.checks import definition_of
from nemotron_h.recipe.compose import compose

RECIPE = "demos/vlm.yaml"
BATCH, WARMUP = 64, 50  # ours: pictures of a step, steps
PEAK, DECAY, BETAS, CLIP = 1e-3, 0.05, (0.9, 0.98), 1.0  # ours: usual values of a small ViT


def labelled(files: list[Path], side: int) -> tuple[Tensor, Tensor, str]:
    """Return the pictures of conversations as one tile each, uint8 [n, 3, side, side], the characters of their answers
    as numbers, int64 [n, k], and these characters; numbers beyond them stand behind an answer's end.
    """
    questions = [question for file in files for question in read_questions(file, None)]
    if wrong := next((q for q in questions if len(q.pictures) != 1), None):
        raise UserError(f"{wrong.test}, question {wrong.number}: it has {len(wrong.pictures)} images, one is read here")
    cut = Tiling(side, 1).cut
    tiles = torch.from_numpy(np.concatenate([cut(read_image(q.pictures[0].read())) for q in questions]))
    characters = "".join(sorted({character for q in questions for character in q.answer}))
    labels = torch.full((len(questions), max(len(q.answer) for q in questions)), len(characters))
    for row, question in zip(labels, questions, strict=True):
        row[: len(question.answer)] = torch.tensor([characters.index(each) for each in question.answer])
    return tiles, labels, characters


class Reader(nn.Module):
    """An encoder, and the linear layers that read characters off its patches and off its tokens.

    Args:
        length, classes: characters of an answer, and different ones, the end included.
    """

    def __init__(self, encoder: Encoder, length: int, classes: int) -> None:
        super().__init__()
        config = InternVLVisionConfig.from_dict(to_config(encoder, "float32"))
        self.encoder = InternVLVisionModel(config)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.of_patches = nn.Linear(config.hidden_size * (encoder.positions - 1), length * classes)
        self.of_tokens = nn.Linear(
            config.hidden_size * (encoder.positions - 1) // encoder.tokens_per_tile, length * classes
        )
        self.length = length

    def forward(self, tiles: Tensor) -> Tensor:
        """Return logits [n, 1 + t, k, classes] of tiles, uint8 [n, 3, side, side]: off all patches, and off each."""
        mean, std = (torch.tensor(each)[:, None, None] for each in (MEAN, STD))
        patches = self.encoder(pixel_values=(tiles / 255 - mean) / std).last_hidden_state[:, 1:]  # [n, l - 1, c]
        patches = self.norm(patches)
        read = [self.of_patches(patches.flatten(1))[:, None], self.of_tokens(pixel_shuffle(patches))]
        return torch.cat(read, dim=1).unflatten(2, (self.length, -1))


def train(reader: Reader, tiles: Tensor, labels: Tensor, steps: int, console: Console) -> None:
    """Train by cross entropy, in passes over all pictures; the rate falls by a cosine."""
    optimizer = torch.optim.AdamW(reader.parameters(), lr=PEAK, betas=BETAS, weight_decay=DECAY)

    def factor(step: int) -> float:
        return min((step + 1) / WARMUP, 0.5 + 0.5 * math.cos(math.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    rounds = -(-steps * BATCH // len(tiles))
    order = torch.cat([torch.randperm(len(tiles)) for _ in range(rounds)])[: steps * BATCH]
    with StageProgress(console, "encoder", steps, "steps") as bar:
        for rows in order.split(BATCH):
            logits = reader(tiles[rows])  # [n, 1 + t, k, classes]
            right = labels[rows][:, None].expand(logits.shape[:-1])
            losses = F.cross_entropy(logits.flatten(0, 2), right.flatten(), reduction="none").view(right.shape)
            loss = losses[:, 0].mean() + losses[:, 1:].mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(reader.parameters(), CLIP)
            optimizer.step()
            schedule.step()
            bar.advance(title=f"encoder, loss {loss.item():.2f}")


def main() -> None:
    """Read the command line, train, and write the encoder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="conversations about a picture each, JSONL")
    parser.add_argument("--steps", type=int, default=2000, help="of 64 pictures (2000)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args()
    check_new(arguments.out)
    torch.manual_seed(1)
    encoder = definition_of(compose(RECIPE), RECIPE).encoder
    tiles, labels, characters = labelled(arguments.files, encoder.widths.image_size)
    reader = Reader(encoder, labels.shape[1], len(characters) + 1)
    train(reader, tiles, labels, arguments.steps, Console(stderr=True, highlight=False))
    reader.encoder.save_pretrained(arguments.out)
    print(f"{arguments.out}: an encoder trained on {arguments.steps * BATCH:,} pictures of {len(tiles):,}")


if __name__ == "__main__":
    report_mistakes()
    main()
