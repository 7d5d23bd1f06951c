"""The vision side of a model: an image encoder as blocks, and the projector, counted. Imports no torch.

A tile of p x p patches is a class token and p^2 patches in the encoder; the class token is dropped behind it, and four
neighbouring patches become one image token of four times the channels (pixel shuffle), which the projector maps to the
language model's width (paper 4; InternVL, arXiv 2404.16821 3.1).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from nemotron_h.architecture.blocks.block import Block, Operation, Tensors
from nemotron_h.architecture.blocks.projector import Projector
from nemotron_h.architecture.blocks.registry import VISION_KINDS
from nemotron_h.core.errors import UserError
from nemotron_h.core.strict import check_name, check_number, check_one_of, ranges
from nemotron_h.schema.vision import VISION_NORMS, ProjectorSchema, VisionSchema

if TYPE_CHECKING:
    from nemotron_h.architecture.definition import ModelDefinition

#: names of the parts, as `optim.frozen`, tables and the weights' names have them
VISION, PROJECTOR = "vision", "projector"
#: red, green and blue
CHANNELS = 3
#: patches of a side that become one image token's side
SHUFFLE = 2


@dataclass(frozen=True)
class Encoder:
    """An image encoder and the projector of a model.

    Attributes:
        widths: of the encoder.
        projector: block of the projector.
        projector_epsilon: of its norm.
    """

    widths: VisionSchema
    projector: Projector
    projector_epsilon: float

    @classmethod
    def of(cls, model: ModelDefinition) -> Encoder:
        """Return those of a model that reads images."""
        projector = model.projector or ProjectorSchema()
        inner = projector.ffn_hidden_size or model.ffn_hidden_size
        inputs = SHUFFLE**2 * model.vision.hidden_size
        return cls(model.vision, Projector(inputs, inner, model.hidden_size), projector.norm_epsilon)

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """Return the encoder's layers."""
        widths = {**vars(self.widths), "norm_bias": self.widths.norm == "layernorm"}
        return tuple(kind.of(widths) for kind in VISION_KINDS) * self.widths.num_layers

    @property
    def grid(self) -> int:
        """Return the patches of a tile's side."""
        return self.widths.image_size // self.widths.patch_size

    @property
    def positions(self) -> int:
        """Return the tokens of a tile in the encoder: its patches and the class token."""
        return self.grid**2 + 1

    @property
    def tokens_per_tile(self) -> int:
        """Return the image tokens that a tile becomes."""
        return (self.grid // SHUFFLE) ** 2

    @property
    def embedding_parameters(self) -> int:
        """Return the parameters before the layers: patch embedding with bias, class token, positions."""
        hidden, pixels = self.widths.hidden_size, CHANNELS * self.widths.patch_size**2
        return hidden * (pixels + 1 + 1 + self.positions)

    @property
    def parameters(self) -> int:
        """Return the encoder's parameters."""
        return self.embedding_parameters + sum(block.parameters for block in self.blocks)

    def rank_parameters(self, tensor: int, but: Collection[str] = ()) -> int:
        """Return the parameters that one of `tensor` ranks holds of the parts that are not in `but`."""
        parts = {VISION: (self.blocks, self.embedding_parameters), PROJECTOR: ((self.projector,), 0)}
        total = 0
        for blocks, whole in (part for name, part in parts.items() if name not in but):
            wholes = sum(block.whole_parameters() for block in blocks)
            total += whole + wholes + (sum(block.parameters for block in blocks) - wholes) // tensor
        return total

    def tiles(self, tokens: int) -> int:
        """Return the most tiles that a sequence of so many tokens has."""
        return tokens // self.tokens_per_tile

    def flops_per_tile(self, training: bool = True, frozen: Collection[str] = ()) -> dict[str, float]:
        """Return part -> operations of a tile, forward and where it trains backward, as `planning.flops` counts.

        Args:
            frozen: parts that do not train. Nothing before the encoder asks for a gradient: frozen, it has no backward.
        """
        patches = self.grid**2
        embedding = 2 * self.widths.hidden_size * CHANNELS * self.widths.patch_size**2 * patches
        layers = [step for block in self.blocks for step in block.operations(self.positions, 1)]
        flops = {VISION: embedding + self.positions * sum(step.forward for step in layers)}
        matrices: Iterator[Operation] = self.projector.operations(self.tokens_per_tile, 1)
        flops[PROJECTOR] = self.tokens_per_tile * sum(step.forward for step in matrices)
        backward = {VISION: 0 if VISION in frozen else 2, PROJECTOR: (VISION not in frozen) + (PROJECTOR not in frozen)}
        return {part: size * (1 + backward[part] * training) for part, size in flops.items()}

    def tensors(self) -> Iterator[Tensors]:
        """Yield all tensors, those of the encoder first, under the names of Hugging Face's `internvl_vision`."""
        hidden, widths = self.widths.hidden_size, self.widths
        pixels = (hidden, CHANNELS, widths.patch_size, widths.patch_size)
        for ours, theirs, shape in (
            ("class_token", "cls_token", (1, 1, hidden)),
            ("position_embedding", "position_embeddings", (1, self.positions, hidden)),
            ("patch_embedding.weight", "patch_embeddings.projection.weight", pixels),
            ("patch_embedding.bias", "patch_embeddings.projection.bias", (hidden,)),
        ):
            yield Tensors({f"{VISION}.{ours}": shape}, {f"{VISION}.embeddings.{theirs}": shape})
        for number, block in enumerate(self.blocks):
            layer = number // len(VISION_KINDS)
            yield from block.tensors(f"{VISION}.layers.{number}.", f"{VISION}.encoder.layer.{layer}.")
        yield from self.projector.tensors(f"{PROJECTOR}.", f"{PROJECTOR}.")

    def validate_tensor_parallel(self, size: int, origin: str) -> None:
        """Check that every sharded dimension splits over `size` ranks; arguments as of `ModelDefinition`'s.

        Errors:
            UserError: names the dimensions, and the nearest size that fits.
        """
        sharded = {
            f"{PROJECTOR if block is self.projector else VISION}.{key}": getattr(block, key)
            for block in (*self.blocks[: len(VISION_KINDS)], self.projector)
            for key in block.sharded
        }
        bad = [f"{key} = {value}" for key, value in sharded.items() if size < 1 or value % size]
        if bad:
            fits = [n for n in range(1, max(size, 1) + 1) if not any(value % n for value in sharded.values())]
            raise UserError(
                f"{origin}: parallel.tensor = {size} does not divide model.{', model.'.join(bad)}",
                hint=f"nearest: {fits[-1]}; sizes up to {size} that fit: {', '.join(map(str, fits))}",
            )


def check_vision(model: ModelDefinition, origin: str) -> None:
    """Check the keys of `model.vision` and `model.projector`, of which a model has one.

    Errors:
        UserError: names the key, and what would fit.
    """
    vision = model.vision
    if vision is None:
        raise UserError(
            f"{origin}: model.projector has no use: the model has no model.vision",
            hint="leave it out, or name an encoder of configs/vision in the recipe's defaults",
        )
    where = f"{origin}: "
    for part, values in ((VISION, vision), (PROJECTOR, model.projector)):
        for key, allowed in ranges(type(values)).items() if values is not None else ():
            check_number(f"model.{part}.{key}", getattr(values, key), allowed, where)
    check_name("model.vision.name", vision.name, where)
    check_one_of("model.vision.norm", vision.norm, VISION_NORMS, where)
    if vision.image_size % (SHUFFLE * vision.patch_size):
        step = SHUFFLE * vision.patch_size
        fits = max(step, (2 * vision.image_size + step) // (2 * step) * step)
        raise UserError(
            f"{where}model.vision.image_size = {vision.image_size} is not a multiple of twice model.vision.patch_size "
            f"= {vision.patch_size}: four neighbouring patches become one image token",
            hint=f"the nearest is {fits}",
        )
    heads, hidden = vision.num_attention_heads, vision.hidden_size
    if hidden % heads:
        fits = [n for n in range(1, hidden + 1) if hidden % n == 0]
        raise UserError(
            f"{where}model.vision.hidden_size = {hidden} is not a multiple of model.vision.num_attention_heads = "
            f"{heads}",
            hint=f"the nearest number of heads that divides {hidden} is {min(fits, key=lambda n: abs(n - heads))}",
        )
    if not model.encoder.projector.ffn_hidden_size:
        raise UserError(
            f"{where}model.projector.ffn_hidden_size is missing: the language model has no such width to take",
            hint=f"give it, such as {4 * model.hidden_size}",
        )


def text_only(model: ModelDefinition) -> ModelDefinition:
    """Return the language model of a model: what is left without encoder and projector."""
    return replace(model, vision=None, projector=None, expect=replace(model.expect, vision=0))


def check_text_only(model: ModelDefinition, asked: str) -> None:
    """Refuse a model that reads images where only a language model can be worked on.

    Args:
        asked: begins the error: what asks for it.
    Errors:
        UserError: names the key.
    """
    if model.vision is not None:
        raise UserError(
            f"{asked}: model {model.name} has model.vision ({model.vision.name}), and only language models are taken",
            hint="take the language model that it was composed from",
        )
