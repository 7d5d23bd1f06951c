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
from nemotron_h.ops.newton_schulz import orthogonalize, scale
from nemotron_h.ops.tiles import MEAN, STD, pixel_shuffle
from nemotron_h.platform.ranks import report_mistakes
from nemotron_h.recipe.checks import definition_of
from nemotron_h.recipe.compose import compose

RECIPE = "demos/vlm.yaml"
BATCH, WARMUP = 64, 50  # ours: pictures of a step, steps
PEAK, DECAY, BETAS, MOMENTUM, CLIP = 3e-3, 0.05, (0.9, 0.98), 0.95, 1.0  # ours: usual values of a small ViT


def labelled(files: list[Path], side: int) -> tuple[Tensor, Tensor, str]:
    """Return the pictures of conversations as one tile each, uint8 [n, 3, side, side], the characters of their answers
    as numbers, int64 [n, k], and these characters; numbers beyond them stand behind an answer's end.
    """
    questions = [question for file in files for question in read_questions(file, None)]
    if wrong := next((q for q in questions if len(q.pictures) != 1), None):
        raise UserError(f"{wrong.test}, question {wrong.number}: it has {len(wrong.pictures)} images, one is read here")
    cut = Tiling(side, 1).cut
    tiles = torch.from_numpy(np.concatenate([cut(read_image(q.pictures[0].read())) for q in questions]))
    answers = [question.answer.replace(" ", "") for question in questions]  # a word is spelled
    characters = "".join(sorted(set().union(*answers)))
    labels = torch.full((len(answers), max(map(len, answers))), len(characters))
    for row, answer in zip(labels, answers, strict=True):
        row[: len(answer)] = torch.tensor([characters.index(each) for each in answer])
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
        self.length, self.classes = length, classes

    def forward(self, tiles: Tensor) -> Tensor:
        """Return logits [n, 1 + t, k, classes] of tiles, uint8 [n, 3, side, side]: off all patches, and off each."""
        mean, std = (torch.tensor(each)[:, None, None] for each in (MEAN, STD))
        patches = self.encoder(pixel_values=(tiles / 255 - mean) / std).last_hidden_state[:, 1:]  # [n, l - 1, c]
        patches = self.norm(patches)
        read = [self.of_patches(patches.flatten(1))[:, None], self.of_tokens(pixel_shuffle(patches))]
        return torch.cat(read, dim=1).unflatten(2, (self.length, -1))


def moved(tiles: Tensor) -> Tensor:
    """Return tiles moved by up to a pixel either way, each by itself; their edges are continued."""
    side = torch.arange(tiles.shape[-1])
    places = (side + torch.randint(-1, 2, (2, len(tiles), 1))).clamp(0, len(side) - 1)  # [2, n, side]
    rows, columns = places[0][:, None, :, None], places[1][:, None, None, :]
    return tiles[torch.arange(len(tiles))[:, None, None, None], torch.arange(3)[:, None, None], rows, columns]


def orthogonal_gradients(matrices: list[nn.Parameter], momenta: list[Tensor]) -> None:
    """Put Muon's update of each matrix in the place of its gradient (docs/muon.md), and add that to its momentum."""
    for matrix, momentum in zip(matrices, momenta, strict=True):
        momentum.mul_(MOMENTUM).add_(matrix.grad)
        matrix.grad = scale(*matrix.shape) * orthogonalize(matrix.grad + MOMENTUM * momentum).float()


def train(reader: Reader, tiles: Tensor, labels: Tensor, steps: int, console: Console) -> None:
    """Train by cross entropy; the rate falls by a cosine. Muon updates the layers' matrices, AdamW all else. A picture
    is drawn as often as its answer has characters: a word of four teaches four times what a digit does.
    """
    matrices = [p for p in reader.encoder.encoder.parameters() if p.ndim == 2]
    rest = [p for p in reader.parameters() if all(p is not matrix for matrix in matrices)]
    momenta = [torch.zeros_like(matrix) for matrix in matrices]
    optimizers = [
        torch.optim.AdamW(rest, lr=PEAK, betas=BETAS, weight_decay=DECAY),
        torch.optim.SGD(matrices, lr=PEAK, weight_decay=DECAY),  # of gradients that are Muon's updates already
    ]

    def factor(step: int) -> float:
        return min((step + 1) / WARMUP, 0.5 + 0.5 * math.cos(math.pi * step / steps))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in optimizers]
    lengths = (labels < reader.classes - 1).sum(1).double()
    order = torch.multinomial(lengths, steps * BATCH, replacement=True)
    with StageProgress(console, "encoder", steps, "steps") as bar:
        for rows in order.split(BATCH):
            logits = reader(moved(tiles[rows]))  # [n, 1 + t, k, classes]
            right = labels[rows][:, None].expand(logits.shape[:-1])
            losses = F.cross_entropy(logits.flatten(0, 2), right.flatten(), reduction="none").view(right.shape)
            loss = losses[:, 0].mean() + losses[:, 1:].mean()
            reader.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(reader.parameters(), CLIP)
            orthogonal_gradients(matrices, momenta)
            for each in (*optimizers, *schedules):
                each.step()
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
