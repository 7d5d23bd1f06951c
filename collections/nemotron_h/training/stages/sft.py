"""A supervised fine-tuning recipe as the object graph that `nemo llm finetune` runs."""

from __future__ import annotations

import dataclasses

import nemo_run as run
from nemo.collections import llm

from nemotron_h.data.blend import IMAGES, load_blend
from nemotron_h.data.feed.image_module import ImageConversationDataModule
from nemotron_h.data.feed.sft_module import ConversationDataModule
from nemotron_h.recipe.checks import definition_of
from nemotron_h.schema.recipe import AdapterSchema, RecipeConfig
from nemotron_h.training.callbacks.adapter_table import AdapterTable
from nemotron_h.training.stages.pretrain import assemble, with_overrides


def build(recipe: RecipeConfig) -> run.Partial:
    """Build a `nemo_run.Partial` of `llm.finetune` from the recipe; nothing is created yet, values can be overridden.

    Errors:
        UserError: one of the recipe's `overrides` names an unknown key, or has a value of another type.
    """
    if load_blend(recipe.data.blend).holds() != IMAGES:
        task = assemble(recipe, llm.finetune, ConversationDataModule)
    else:
        encoder = definition_of(recipe, f"recipe {recipe.name}").encoder
        tiles = {"tile_size": encoder.widths.image_size, "tile_tokens": encoder.tokens_per_tile}
        task = assemble(recipe, llm.finetune, ImageConversationDataModule, **tiles)
    task.tokenizer = "data"
    # windows differ in how many tokens they teach: a mean over all of a step's, not of micro-batches' means
    task.model.config.calculate_per_token_loss = True
    adapt(task, recipe)
    return with_overrides(task, recipe)


def adapt(task: run.Partial, recipe: RecipeConfig) -> None:
    """Train the recipe's adapter in place of the weights, where it has one."""
    if recipe.adapter.kind != "none":
        task.model.config.adapter = run.Config(AdapterSchema, **dataclasses.asdict(recipe.adapter))
        task.trainer.callbacks.insert(0, run.Config(AdapterTable))
