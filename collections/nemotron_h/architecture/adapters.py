"""Matrices that adapters can be put on, and the parameters that adapters add to a model. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from nemotron_h.architecture.blocks.block import Block, Matrix
from nemotron_h.architecture.blocks.registry import KINDS
from nemotron_h.architecture.definition import ModelDefinition, pipeline_layers
from nemotron_h.architecture.multipliers import ONES
from nemotron_h.core.errors import UserError
from nemotron_h.core.strict import nearest
from nemotron_h.schema.recipe import ADAPTERS, AdapterSchema


def targets(definition: ModelDefinition) -> dict[str, list[Matrix]]:
    """Return the matrices that may have adapters by name, one of each layer that has it; kinds as in the registry."""
    ordered = sorted(definition.blocks, key=lambda block: list(KINDS).index(block.letter))
    matrices: dict[str, list[Matrix]] = {}
    for block in ordered:
        for matrix in block.matrices():
            if matrix.adapts:
                matrices.setdefault(matrix.name, []).append(matrix)
    return matrices


def owners(first: Iterable[type[Block]] = ()) -> dict[str, type[Block]]:
    """Return the kind that has a matrix of each name, of all kinds that there are; of several, one of `first`."""
    kinds = list(dict.fromkeys((*first, *KINDS.values())))
    widths = dict.fromkeys((key for kind in kinds for key in kind.widths), 1)
    switches = dict.fromkeys((key for kind in kinds for key in kind.switches), True)
    others = {"hidden_size": 1, "rope_percent": 0.0, "multipliers": ONES, **switches}
    found: dict[str, type[Block]] = {}
    for kind in kinds:
        for matrix in kind.of({**others, **widths}).matrices():
            if matrix.adapts:
                found.setdefault(matrix.name, kind)
    return found


@dataclass(frozen=True)
class Coverage:
    """Parameters of one matrix over all layers, and those that its adapters train.

    Attributes:
        target: the matrix.
        layer_type: name of the kind of layers.
        layers: how many layers have it.
        weights: parameters of the matrix, over these layers.
        trained: parameters of its adapters; 0 where it is no target.
    """

    target: str
    layer_type: str
    layers: int
    weights: int
    trained: int


def coverage(adapter: AdapterSchema, definition: ModelDefinition) -> list[Coverage]:
    """Return every matrix of the model's layers, adapted or not, kinds in the order of the registry."""
    kinds, rows = owners(definition.kinds), []
    for target, matrices in targets(definition).items():
        trained = sum(matrix.adapter_size(adapter.rank, adapter.kind == "dora") for matrix in matrices)
        adapted = adapter.kind != "none" and target in adapter.targets
        weights = sum(matrix.size for matrix in matrices)
        rows.append(Coverage(target, kinds[target].name, len(matrices), weights, trained * adapted))
    return rows


def trained_parameters(adapter: AdapterSchema, definition: ModelDefinition) -> int:
    """Return the number of trained parameters: those of the adapters, or all of the model's without adapters."""
    if adapter.kind == "none":
        return definition.parameters + definition.mtp_parameters + definition.vision_parameters
    return sum(row.trained for row in coverage(adapter, definition))


def check_adapter(adapter: AdapterSchema, definition: ModelDefinition, key: str, *, pipeline: int = 1) -> None:
    """Refuse an adapter that cannot be trained, or that would do nothing.

    Args:
        adapter: of a recipe, or of the built task.
        key: how the error names it, such as `recipe my.yaml: adapter`.
        pipeline: stages; each has to have something to train.
    Errors:
        UserError: names the key and what would fit.
    """
    if adapter.kind not in ADAPTERS:
        raise UserError(
            f"{key}.kind = {adapter.kind!r}", hint=f"{nearest(adapter.kind, ADAPTERS)}Known: none, lora, dora."
        )
    if adapter.kind == "none":
        unused = AdapterSchema()
        for name, value in dataclasses.asdict(adapter).items():
            if value != getattr(unused, name):
                raise UserError(
                    f"{key}.{name} is unused: {key.split()[-1]}.kind is none", hint="set kind: lora or dora"
                )
        return
    if adapter.rank < 1:
        raise UserError(f"{key}.rank = {adapter.rank} is not positive", hint="usual ranks are 8 to 64")
    if adapter.alpha <= 0:
        raise UserError(f"{key}.alpha = {adapter.alpha} is not positive", hint=f"usual is the rank, {adapter.rank}")
    if not 0 <= adapter.dropout < 1:
        raise UserError(f"{key}.dropout = {adapter.dropout} is not in [0, 1)")
    _check_targets(adapter, definition, key)
    for stage, layers in enumerate(pipeline_layers(definition.num_layers, pipeline)):
        matrices = {matrix.name for layer in layers for matrix in definition.blocks[layer].matrices()}
        if matrices.isdisjoint(adapter.targets):
            raise UserError(
                f"{key}.targets = {adapter.targets} are in no layer of pipeline stage {stage} of {pipeline}, which "
                "would train nothing",
                hint="add targets, or use fewer stages: parallel.pipeline",
            )


def _check_targets(adapter: AdapterSchema, definition: ModelDefinition, key: str) -> None:
    matrices, kinds = targets(definition), owners()
    has = ", ".join(matrices)
    if not adapter.targets:
        raise UserError(f"{key}.targets is empty", hint=f"{definition.name} has {has}")
    for target in adapter.targets:
        if target not in kinds:
            raise UserError(
                f"{key}.targets has {target!r}, which matches nothing",
                hint=f"{nearest(target, kinds)}{definition.name} has {has}.",
            )
        if target not in matrices:
            raise UserError(
                f"{key}.targets has {target!r}, which matches nothing: {definition.name} has no {kinds[target].name} "
                "layers",
                hint=f"it has {has}",
            )
        if adapter.targets.count(target) > 1:
            raise UserError(f"{key}.targets names {target!r} twice", hint="name it once")
        smaller = min(min(matrix.outputs, matrix.inputs) for matrix in matrices[target])
        if adapter.rank > smaller:
            raise UserError(
                f"{key}.rank = {adapter.rank} is above the smaller side of {target}, {smaller}: the adapter would be "
                "larger than the matrix",
                hint=f"set a rank of {smaller} or less, or train all weights: adapter.kind=none",
            )
