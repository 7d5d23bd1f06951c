"""Images in a model: an encoder of tiles and a projector in front of the language model's layers.

The first pipeline stage has both. Context-parallel ranks encode all tiles of a batch each and keep the image tokens of
their part of the rows; their gradients are summed as those of any weight.

Axes: n tiles, l positions of a tile in the encoder, c its channels, t image tokens of all tiles, s positions of this
rank, b rows, w positions of whole rows, h hidden size of the language model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    checkpoint,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor, nn

from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.architecture.vision import CHANNELS, PROJECTOR, VISION, Encoder
from nemotron_h.model import init
from nemotron_h.model.blocks.registry import VISION_RUNNING
from nemotron_h.model.blocks.running import Parts, Surroundings
from nemotron_h.model.context_parallel import own_tokens
from nemotron_h.model.vision_init import AXES, distribution
from nemotron_h.model.vision_layers import ProjectorLayer, encoder_config, parameter
from nemotron_h.ops.tiles import embedded_patches, pixel_shuffle


class _Layers(nn.ModuleList):
    """Layers, each under its number in a checkpoint."""

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Return Megatron's distributed-checkpoint layout."""
        state = {}
        for number, layer in enumerate(self):
            state |= layer.sharded_state_dict(f"{prefix}{number}.", sharded_offsets, metadata)
        return state


class VisionEncoder(MegatronModule):
    """Patch embedding, class token, learned positions, and the encoder's layers.

    Args:
        encoder: the shapes.
        parts: classes of Megatron's linear layers.
    """

    def __init__(
        self, config: TransformerConfig, encoder: Encoder, parts: Parts, pg_collection: ProcessGroupCollection
    ) -> None:
        super().__init__(encoder_config(config))
        self.encoder, widths = encoder, encoder.widths
        self.patch_embedding = nn.Module()
        self.patch_embedding.weight = parameter(config, widths.hidden_size, CHANNELS, *[widths.patch_size] * 2)
        self.patch_embedding.bias = parameter(config, widths.hidden_size)
        self.class_token = parameter(config, 1, 1, widths.hidden_size)
        self.position_embedding = parameter(config, 1, encoder.positions, widths.hidden_size)
        self.running = [VISION_RUNNING[block.letter](block, widths.norm_epsilon) for block in encoder.blocks]
        self.layers = _Layers(
            build_module(
                running.layer_spec(parts), config=self.config, layer_number=number + 1, pg_collection=pg_collection
            )
            for number, running in enumerate(self.running)
        )

    def forward(self, tiles: Tensor) -> Tensor:
        """Return the patches of tiles, uint8 [n, 3, pixels, pixels], as [n, image tokens of a tile, 4 c]."""
        side = self.encoder.widths.image_size
        if tiles.shape[1:] != (CHANNELS, side, side):
            raise ValueError(f"tiles are {list(tiles.shape)}; the encoder takes [n, {CHANNELS}, {side}, {side}]")
        hidden = embedded_patches(
            tiles,
            self.patch_embedding.weight,
            self.patch_embedding.bias,
            self.class_token,
            self.position_embedding,
        )
        hidden = hidden.transpose(0, 1).contiguous()  # [l, n, c]
        recomputed = self.config.recompute_vision == "layer" and self.training and hidden.requires_grad
        for layer, running in zip(self.layers, self.running, strict=True):

            def run(x: Tensor, layer: nn.Module = layer, running: object = running) -> Tensor:
                return running.forward(layer, x, Surroundings())

            hidden = checkpoint(run, False, hidden) if recomputed else run(hidden)
        return pixel_shuffle(hidden[1:].transpose(0, 1))  # the class token is dropped


class Images:
    """Encoder and projector of a model, which it holds under the names that its checkpoints have."""

    def __init__(self, model: nn.Module, parts: Parts) -> None:
        config, encoder, groups = model.config, model.config.definition().encoder, model.pg_collection
        self.tokens_per_tile = encoder.tokens_per_tile
        self.groups, self.sequence_parallel = groups, config.sequence_parallel
        self.vision = VisionEncoder(config, encoder, parts, groups)
        self.projector = ProjectorLayer(
            encoder_config(config),
            parts,
            layer_number=1,
            pg_collection=groups,
            block=encoder.projector,
            epsilon=encoder.projector_epsilon,
        )

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that train."""
        for part in (self.vision, self.projector):
            yield from (each for each in part.parameters() if each.requires_grad)

    def initialize(self, definition: ModelDefinition, shard: Mapping[str, int]) -> None:
        """Set the initial weights; `shard` as of `InitialWeights`."""
        for part, module in ((VISION, self.vision), (PROJECTOR, self.projector)):
            for inside, each in module.named_parameters():
                axis = next((axis for end, axis in AXES.items() if inside.endswith(end)), None)
                own = {**shard, "axis": axis} if axis is not None else {"seed": shard["seed"]}
                init.fill(each, f"{part}.{inside}", distribution(f"{part}.{inside}", definition), **own)

    def tokens(self, tiles: Tensor) -> Tensor:
        """Return the image tokens [t, h] of tiles, uint8 [n, 3, pixels, pixels], one tile's behind the other's.

        Context-parallel ranks have the same tiles: each encodes a share, and all get the tokens of all. Where the
        shares are unequal, the last tile fills them up: nothing reads its copies.
        """
        count, context = len(tiles), self.groups.cp
        if context.size() > 1:
            share = -(-count // context.size())
            own = torch.arange(share, device=tiles.device) + share * context.rank()
            tiles = tiles[own.clamp(max=count - 1)]
        trains = any(each.requires_grad for each in self.vision.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains):
            shuffled = self.vision(tiles)
        tokens = self.projector(shuffled).flatten(0, 1)
        if context.size() > 1:  # its backward sums, for each rank's share, the gradients of all ranks' places
            tokens = gather_from_sequence_parallel_region(tokens, tensor_parallel_output_grad=True, group=context)
        return tokens[: count * self.tokens_per_tile]

    def place(self, embedded: Tensor, tiles: Tensor | None, mask: Tensor | None) -> Tensor:
        """Return embeddings with the image tokens in their places, [s, b, h].

        Without a tile the parameters take part with gradients of 0, as ranks with tiles expect of each other.

        Args:
            embedded: [s, b, h], of this rank's tokens.
            tiles: uint8 [n, 3, pixels, pixels], in the order of their places, row by row; None is none.
            mask: bool [b, w], the places of image tokens in whole rows.
        Errors:
            ValueError: places and image tokens differ in number.
        """
        count = 0 if tiles is None else len(tiles)
        places = 0 if mask is None else int(mask.sum())
        if places != count * self.tokens_per_tile:
            raise ValueError(f"{count} tiles of {self.tokens_per_tile} image tokens, and {places} places for them")
        if not count:
            if torch.is_grad_enabled() and (idle := [each.sum() for each in self.parameters()]):
                return embedded + (torch.stack([each.float() for each in idle]).sum() * 0).to(embedded)
            return embedded
        images = self.tokens(tiles).to(embedded.dtype)
        index = mask.flatten().cumsum(0).sub(1).clamp(min=0).view_as(mask)
        own = [own_tokens(each, self.groups.cp, 1) for each in (mask, index)]
        if self.sequence_parallel:
            own = [own_tokens(each, self.groups.tp, 1) for each in own]
            images = copy_to_tensor_model_parallel_region(images)  # each rank has gradients of its own places
        places, index = (each.t() for each in own)  # [s, b]
        return torch.where(places[..., None], images[index], embedded)
