"""Images for generation: encoder and projector on plain tensors, and their tokens in the places of a prompt.

It is apart from the training model, as `inference.model` is, and held against it by tests.

Axes: n tiles, l positions of a tile in the encoder, c its channels, t image tokens, h the language model's hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.architecture.vision import PROJECTOR, VISION
from nemotron_h.checkpoint.adapters import open_weights
from nemotron_h.checkpoint.definition import read_definition
from nemotron_h.checkpoint.reader import find_checkpoint, read_record
from nemotron_h.core.errors import UserError
from nemotron_h.model.blocks.registry import VISION_RUNNING
from nemotron_h.ops.norm import plain_norm
from nemotron_h.ops.select import select_ops
from nemotron_h.ops.tiles import embedded_patches, pixel_shuffle

#: ours: tiles that go through the encoder together, which bounds the memory of its activations
PASS_TILES = 16


class ImageModel:
    """Encoder and projector of a model.

    Args:
        definition: of a model that reads images.
        weights: by the names of `Encoder.tensors`.
    """

    def __init__(self, definition: ModelDefinition, weights: Mapping[str, Tensor]) -> None:
        self.encoder, self.weights = definition.encoder, weights
        blocks, epsilon = self.encoder.blocks, self.encoder.widths.norm_epsilon
        self.running = [VISION_RUNNING[block.letter](block, epsilon) for block in blocks]
        self.layers: list[dict[str, Tensor]] = []
        for number in range(len(blocks)):
            prefix = f"{VISION}.layers.{number}."
            self.layers.append({k.removeprefix(prefix): w for k, w in weights.items() if k.startswith(prefix)})
        self.ops = select_ops(next(iter(weights.values())).device)

    @torch.inference_mode()
    def tokens(self, tiles: Tensor) -> Tensor:
        """Return the image tokens [t, h] of tiles, uint8 [n, 3, pixels, pixels], one tile's behind the other's.

        Errors:
            UserError: the encoder takes tiles of another size.
        """
        side = self.encoder.widths.image_size
        if tiles.shape[1:] != (3, side, side):
            raise UserError(
                f"tiles are {list(tiles.shape)}", hint=f"{self.encoder.widths.name} takes [n, 3, {side}, {side}]"
            )
        return torch.cat([self._pass(part) for part in tiles.split(PASS_TILES)])

    def _pass(self, tiles: Tensor) -> Tensor:
        w = self.weights
        names = ("patch_embedding.weight", "patch_embedding.bias", "class_token", "position_embedding")
        ends = [w[f"{VISION}.{name}"] for name in names]
        x = embedded_patches(tiles.to(ends[0].device), *ends)  # [n, l, c]
        for running, own in zip(self.running, self.layers, strict=True):
            h = plain_norm(x, own["norm.weight"], own.get("norm.bias"), running.epsilon)
            x = torch.addcmul(x, running.whole(self.ops, own, h, None, None, {}), own["layer_scale"])
        x = pixel_shuffle(x[:, 1:]).flatten(0, 1)  # [t, 4 c]
        x = plain_norm(x, w[f"{PROJECTOR}.norm.weight"], None, self.encoder.projector_epsilon)
        inner = F.relu(F.linear(x, w[f"{PROJECTOR}.linear_fc1.weight"])).square()
        return F.linear(inner, w[f"{PROJECTOR}.linear_fc2.weight"])


def image_definition(checkpoint: Path) -> ModelDefinition:
    """Return the definition of a checkpoint's model; its weights are not read.

    Errors:
        UserError: no checkpoint, a damaged one, or one of a model that reads text alone.
    """
    definition = read_definition(read_record(checkpoint), f"checkpoint {checkpoint}")
    if definition.encoder is None:
        raise UserError(
            f"{checkpoint} is of {definition.name}, which reads text alone",
            hint="name the checkpoint of a model with an image encoder, or leave the image out",
        )
    return definition


def load_images(checkpoint: Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> ImageModel:
    """Load encoder and projector of a training checkpoint.

    Args:
        checkpoint: a checkpoint or run folder.
        dtype: of weights and activations.
    Errors:
        UserError: as `image_definition`.
    """
    checkpoint = find_checkpoint(Path(checkpoint))
    definition = image_definition(checkpoint)
    shapes = {name: shape for row in definition.encoder.tensors() for name, shape in row.ours.items()}
    weights = {name: torch.empty(shape, dtype=dtype, device=device) for name, shape in shapes.items()}
    open_weights(checkpoint).read(weights)
    return ImageModel(definition, weights)


@dataclass(frozen=True)
class Placed:
    """Image tokens of a prompt.

    Attributes:
        places: int64 [t], their positions in the prompt, ascending.
        embeddings: [t, h], of `ImageModel.tokens`.
    """

    places: Tensor
    embeddings: Tensor

    def put(self, embedded: Tensor, start: int) -> None:
        """Put those that lie in a part of the prompt over its embeddings, IN PLACE.

        Args:
            embedded: [tokens, h] of the part.
            start: position of its first token.
        """
        inside = (self.places >= start) & (self.places < start + len(embedded))
        embedded[(self.places[inside] - start).to(embedded.device)] = self.embeddings[inside].to(embedded)


def check_places(prompts: Sequence[Sequence[int]], images: Sequence[Placed | None]) -> None:
    """Check that every image token has a place, and every place is one of its prompt.

    Errors:
        UserError: they differ.
    """
    for number, (prompt, placed) in enumerate(zip(prompts, images, strict=True), 1):
        if placed is None:
            continue
        if len(placed.places) != len(placed.embeddings):
            raise UserError(
                f"prompt {number} has {len(placed.places):,} places for {len(placed.embeddings):,} image tokens",
                hint="each tile takes the tokens of one tile of its encoder",
            )
        if len(placed.places) and not 0 <= int(placed.places.min()) <= int(placed.places.max()) < len(prompt):
            raise UserError(f"prompt {number} has image tokens beyond its {len(prompt):,} tokens")
