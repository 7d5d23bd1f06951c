"""Checks of a recipe of stage sft: packed conversations, their images, and an adapter."""

from __future__ import annotations

from nemotron_h.architecture.adapters import check_adapter
from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.core.errors import UserError
from nemotron_h.core.strict import check_one_of
from nemotron_h.schema.recipe import TOO_LONG, DataSchema, RecipeConfig
from nemotron_h.schema.vision import TILINGS


def check(recipe: RecipeConfig, definition: ModelDefinition, origin: str) -> None:
    """Check the adapter, how conversations become windows, and that the longest of one image's tiles fit into one."""
    check_adapter(recipe.adapter, definition, f"{origin}: adapter", pipeline=recipe.parallel.pipeline)
    _check_images(recipe, definition, origin)
    check_one_of("data.too_long", recipe.data.too_long or "", TOO_LONG, f"{origin}: ")
    if not recipe.data.document_reset:
        raise UserError(f"{origin}: data.document_reset = false", hint="packed conversations are always reset")
    if recipe.resume.blend_change is not None:
        raise UserError(
            f"{origin}: resume.blend_change is for pretraining",
            hint="start a run with other conversations from this one's weights: init.checkpoint",
        )


def _check_images(recipe: RecipeConfig, definition: ModelDefinition, origin: str) -> None:
    """Check how images become tiles, and that a window holds one."""
    data, encoder = recipe.data, definition.encoder
    check_one_of("data.tiling", data.tiling, TILINGS, f"{origin}: ")
    if encoder is None:
        for key in ("max_tiles", "tiling"):
            if (value := getattr(data, key)) != getattr(DataSchema(), key):
                raise UserError(
                    f"{origin}: data.{key} = {value} is unused: {definition.name} reads text alone",
                    hint="leave it out, or give the model an encoder: vision=internvit_300m",
                )
    elif (tokens := encoder.tokens_per_tile) >= data.seq_length:
        raise UserError(
            f"{origin}: data.seq_length = {data.seq_length:,} has no room for a tile, which is {tokens:,} tokens",
            hint=f"raise data.seq_length; an image has up to data.max_tiles = {data.max_tiles} tiles and a thumbnail",
        )
