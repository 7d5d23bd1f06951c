"""The things that the stages of Puzzle share, beside each other's outputs.

<log.dir>/<name>/variants/      the library: weights of each variant
                 importance/    importance.json, importance.safetensors
                 library/       library.json: error of each variant before and after its training
                 score/         layer-N.json as each is scored; scores.json
                 costs/         costs.yaml
                 search/        solutions.json
                 compare/       compared.json: what the children are as wholes
                 refine/        refined.json; the weights are in the library
                 child/         pruned/ (checkpoint): the child before it is healed; child.json
                 heal/          <name> (run): its checkpoint is the child; results.json
                 report/        report.html, result.json, model.yaml
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np

from nemotron_h.architecture.blocks.registry import KINDS
from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.architecture.variants import NO_OP, PARENT, Variant, variants_of
from nemotron_h.compression.child import definition_of_layers
from nemotron_h.compression.forward import Forward
from nemotron_h.compression.pipeline.compression import Compression
from nemotron_h.compression.pipeline.text import CHOICE, named
from nemotron_h.compression.puzzle.library import Library, hash_of
from nemotron_h.compression.puzzle.local import Part, Piece, own_layer
from nemotron_h.core.errors import UserError
from nemotron_h.core.strict import check_one_of
from nemotron_h.core.units import count_of
from nemotron_h.inference.model import GenerationModel, lay_out
from nemotron_h.planning.gpus import gpu

#: variant's name of each layer
Picks = Sequence[str]
#: layer -> name in the library of weights that stand for its variant's own
Refined = Mapping[int, str]


class Context(Compression):
    """A compression whose layers may each become another variant.

    Args:
        arguments: as of `Compression`.
    Errors:
        UserError: as of `Compression`; lengths of variants that there are not, less text than they are trained on, or
            an unknown GPU.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.text.check_samples()
        names = {name: None for of_layer in self.variants for name, each in of_layer.items() if each.trained}
        for name in self.part.local.tokens_of:
            check_one_of("puzzle.local.tokens_of", name, list(names), f"{self.origin}: ")
        with named(f"{self.origin}: puzzle.local.tokens"):
            self.batches(max(map(self.tokens, names), default=1))
        if self.part.refine_tokens:
            with named(f"{self.origin}: puzzle.refine_tokens"):
                self.batches(count_of(self.part.refine_tokens, "puzzle.refine_tokens", self.origin))
        if self.part.costs.gpu:
            with named(f"{self.origin}: puzzle.costs.gpu"):
                gpu(self.part.costs.gpu)

    @cached_property
    def variants(self) -> list[dict[str, Variant]]:
        """Return the variants of each layer by name."""
        return variants_of(self.definition, self.part.library)

    @cached_property
    def library(self) -> Library:
        """Return the variants' weights."""
        return Library(self.folder)

    def tokens(self, variant: str) -> int:
        """Return the tokens that a variant is trained on."""
        local = self.part.local
        text = local.tokens_of.get(variant, local.tokens)
        return count_of(text, "puzzle.local.tokens", self.origin)

    @cached_property
    def _made_by(self) -> dict[str, Any]:
        local = self.part.local
        return {
            **self.parent.inputs(),
            **self.text.inputs("train"),
            **self.text.held_out_inputs(CHOICE),
            "importance": self.importance.settings,
            "merge": self.part.merge,
            "batch": local.batch,
            "lr": local.lr,
            "seed": self.recipe.init_seed,
            "dtype": str(self.parent.dtype),
        }

    def hash(self, layer: int, variant: Variant) -> str:
        """Return the name of a variant in the library."""
        own = {"layer": layer, "variant": variant.name, "tokens": self.tokens(variant.name)}
        return hash_of({**self._made_by, **own})

    def batches(self, tokens: int) -> Callable[[int], np.ndarray]:
        """Return number of a step -> windows of the training text, int64 [b, l], for so many tokens.

        Errors:
            UserError: there is less text.
        """
        return self.text.batches(tokens, self.part.local.batch, self.recipe.init_seed)

    def stored(self, layer: int, name: str, refined: Refined) -> str:
        """Return the name in the library of a variant's weights."""
        return refined.get(layer) or self.hash(layer, self.variants[layer][name])

    def part_of(self, layer: int, name: str, forward: Forward, refined: Refined = MappingProxyType({})) -> Part | None:
        """Return a variant beside the parent's layers, a `Piece` where it has weights of its own; None is no layer."""
        if name == NO_OP:
            return None
        if name == PARENT:
            return own_layer(forward, layer)
        return Piece(self.variants[layer][name].block, self.library.tensors(self.stored(layer, name, refined)), forward)

    def definition_of(self, picks: Picks, name: str) -> ModelDefinition:
        """Return the definition of a child that has these variants.

        Errors:
            UserError: no layer stays.
        """
        blocks = [of_layer[pick].block for of_layer, pick in zip(self.variants, picks, strict=True)]
        stay = [block for block in blocks if block is not None]
        if not stay:
            raise UserError(
                f"{self.origin}: no layer of {self.definition.name} stays",
                hint="name fewer kinds in puzzle.library.no_op",
            )
        layers = [(KINDS[block.letter], {key: getattr(block, key) for key in block.widths}) for block in stay]
        return definition_of_layers(self.definition, layers, self.definition.hidden_size, name)

    def realised(self, picks: Picks, refined: Refined = MappingProxyType({})) -> GenerationModel:
        """Return a child in memory; layers that are the parent's own share its memory.

        Args:
            picks: of each layer the variant's name.
            refined: of layers that were trained further.
        """
        definition, parent = self.definition_of(picks, "child"), self.parent.model
        forward = Forward(parent)
        stay = [(layer, pick) for layer, pick in enumerate(picks) if pick != NO_OP]
        model = GenerationModel(definition, parent.embedding, [], parent.final_norm, parent.output)
        layers = []
        for (layer, pick), running in zip(stay, model.running, strict=True):
            if pick == PARENT:
                layers.append(parent.layers[layer])
                continue
            tensors = self.library.tensors(self.stored(layer, pick, refined))
            layers.append(running.loaded(running.weights(forward.cast(running.block, tensors))))
            lay_out(layers[-1])
        model.layers = layers
        return model

    def trained_variants(self, layer: int) -> Mapping[str, Variant]:
        """Return the variants of a layer that have weights of their own."""
        return {name: variant for name, variant in self.variants[layer].items() if variant.trained}
