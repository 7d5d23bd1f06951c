"""Catalogue of the shipped recipes: what each trains, how long, on how few GPUs, and who says so."""

from __future__ import annotations

import re
from dataclasses import dataclass

from nemotron_h.core.units import count_of
from nemotron_h.planning.gpus import gpu
from nemotron_h.planning.layouts import fewest_gpus, layout_of
from nemotron_h.recipe.checks import definition_of
from nemotron_h.recipe.compose import known_recipes
from nemotron_h.recipe.shipped import read_shipped
from nemotron_h.schema.recipe import PIPELINES, STAGES


@dataclass(frozen=True)
class Entry:
    """A shipped recipe.

    Attributes:
        recipe: its name.
        model: of the architecture that it trains; of a compression, the parent.
        parameters: of that model.
        stage: a stage or a pipeline.
        tokens: length of the run.
        gpus: the fewest on which `nemotron-h plan --sweep` has a layout that fits; None where it has none.
        source: what states the length, or `ours`.
        stated: the same in full.
    """

    recipe: str
    model: str
    parameters: int
    stage: str
    tokens: int
    gpus: int | None
    source: str
    stated: str

    @property
    def folder(self) -> str:
        """Return the recipe's folder: the model that comes out."""
        return self.recipe.split("/")[0]


def catalogue(gpu_name: str) -> list[Entry]:
    """Return the shipped recipes by size of the model that comes out, then by stage.

    Args:
        gpu_name: a name of `configs/gpus.yaml`.
    Errors:
        UserError: unknown GPU.
    """
    stages, entries = [*STAGES, *PIPELINES], [_entry(name, gpu_name) for name in known_recipes()]
    sizes: dict[str, int] = {}
    for entry in entries:  # a compression's model is the parent, which is larger
        sizes[entry.folder] = min(entry.parameters, sizes.get(entry.folder, entry.parameters))
    return sorted(entries, key=lambda each: (sizes[each.folder], each.folder, stages.index(each.stage), each.recipe))


def _entry(name: str, gpu_name: str) -> Entry:
    recipe = read_shipped(name)
    definition, stated = definition_of(recipe, name), recipe.sources.get("tokens", "")
    return Entry(
        recipe=name,
        model=definition.name,
        parameters=definition.parameters,
        stage=recipe.stage,
        tokens=count_of(recipe.tokens, "tokens", name),
        gpus=fewest_gpus(definition, layout_of(recipe), gpu(gpu_name)),
        source=re.split("[:;]", stated)[0],
        stated=stated,
    )
