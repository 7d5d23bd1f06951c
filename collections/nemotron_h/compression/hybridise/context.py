"""The things that the stages of a hybrid share, beside each other's outputs.

<log.dir>/<name>/mixers-N/      layer-L.safetensors: mixers by themselves; score-L.json; mixers.json;
                                transplanted/ (checkpoint): the model with this round's mixers
                 distil-N/      <name>_N_frozen, <name>_N (runs); results.json
                 then-N/        run of a recipe that follows; results.json
                 generation/    generation.json: throughput and states of parent and rounds
                 report/        report.html, result.json, model.yaml
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nemotron_h.architecture.blocks.transplant import attention_layers, transplants
from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.checkpoint.adapters import check_whole
from nemotron_h.checkpoint.definition import read_definition
from nemotron_h.checkpoint.reader import read_record
from nemotron_h.compression.forward import Forward
from nemotron_h.compression.hybridise.rounds import RESULTS, TRANSPLANTED, Round, following_stages, planned, rounds_of
from nemotron_h.compression.pipeline.compression import Compression
from nemotron_h.compression.pipeline.text import named
from nemotron_h.compression.transplant.mixers import Lengths, Mixers
from nemotron_h.core.units import count_of
from nemotron_h.data.blend import load_blend
from nemotron_h.data.manifest import check_manifest
from nemotron_h.export.source import ModelSource
from nemotron_h.inference.model import load_model
from nemotron_h.recipe.stages.hybridise import following
from nemotron_h.schema.recipe import RecipeConfig


class Context(Compression):
    """A compression whose attention becomes Mamba-2 in rounds.

    Args:
        arguments: as of `Compression`.
    Errors:
        UserError: as of `Compression`; a run does not fit its layout or length; there is less text than mixers train
            on; data of a recipe that follows is not prepared with the parent's tokenizer.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        check_whole(self.parent.checkpoint, f"{self.origin}: hybridise.parent: ")
        self.rounds = rounds_of(self.recipe, self.definition)
        planned(self.recipe, self.place)  # which checks each
        if tokens := self._tokens("matrices") + self._tokens("mixers"):
            with named(f"{self.origin}: hybridise.local"):
                self.text.batches(tokens, self.part.local.batch, self.recipe.init_seed)
        for stage, name in following_stages(self.recipe):
            own = self.following(name)
            with named(f"{self.origin}: hybridise.then: {name}"):
                manifest = check_manifest(own.data.root, load_blend(own.data.blend))
            self.parent.check_tokenizer(manifest, f"{self.origin}: {stage}, {name}")
        self._forwards: dict[Round, Forward] = {}

    def following(self, name: str) -> RecipeConfig:
        """Return a recipe that follows, with its paths where it runs."""
        return self.place.moved(following(name, self.origin))

    def _tokens(self, key: str) -> int:
        text = getattr(self.part.local, key)
        return count_of(text, f"hybridise.local.{key}", self.origin) if text else 0

    @cached_property
    def lengths(self) -> Lengths:
        """Return the training of each mixer by itself."""
        local = self.part.local
        return Lengths.of(self._tokens("matrices"), self._tokens("mixers"), local.batch, local.lr)

    def batches(self) -> Callable[[int], np.ndarray]:
        """Return number of a step of a mixer's training -> windows of the training text, int64 [b, l]."""
        tokens = self._tokens("matrices") + self._tokens("mixers")
        return self.text.batches(max(tokens, 1), self.part.local.batch, self.recipe.init_seed)

    def before(self, each: Round) -> Path:
        """Return the checkpoint that a round begins with: the parent's, or the round's before it."""
        if each.number == 1:
            return self.parent.checkpoint
        return Path(self.read(self.rounds[each.number - 2].distil, RESULTS)["child"]["checkpoint"])

    def transplanted(self, each: Round) -> Path:
        """Return the checkpoint of a round before it is distilled."""
        return self.path(each.mixers, TRANSPLANTED)

    def model_of(self, each: Round) -> ModelDefinition:
        """Return the model of a round whose mixers are made."""
        folder = self.transplanted(each)
        return read_definition(read_record(folder), f"checkpoint {folder}")

    def mixers_of(self, each: Round) -> Mixers:
        """Return mixers in the place of all attention layers of the model that a round begins with, as they begin."""
        source = ModelSource(self.before(each))
        layers = attention_layers(source.definition.blocks)
        of_layers = transplants(source.definition.blocks, layers, self.part.groups, "hybridise.groups")
        return Mixers(source, of_layers, self.recipe.init_seed, self.part.start)

    def forward_of(self, each: Round) -> Forward:
        """Return the model that a round begins with, in float32; it is read once until `release`."""
        if each not in self._forwards:
            self.release()
            model = load_model(self.before(each), dtype=torch.float32, device=self.parent.device)
            self._forwards[each] = Forward(model)
        return self._forwards[each]

    def release(self) -> None:
        """Give the memory of weights back."""
        self._forwards.clear()
        self.parent.release()
