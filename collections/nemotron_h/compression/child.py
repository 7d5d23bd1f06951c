"""A child of a parent model: which of its layers and channels stay, and the ordinary definition that this makes.

Imports no torch. The interface of this part of the package:

    importance.measure(model, windows, ...) -> Importance           what removing would cost; `Importance.save`, `load`
    importance.scores() -> Scores                                   one number per layer and channel; `.reverse()`,
                                                                    `.shuffle(seed)` are the controls of a report
    candidates.candidates(definition, grid, budget) -> Candidates   lazily, those that fit
    selection.child_of(definition, scores, candidate) -> Child      the most important layers and channels
    child_definition(definition, child, name) -> ModelDefinition    this file
    slicing.slice_model(model, child, name) -> GenerationModel      in memory, to score it
    slicing.write_child(checkpoint, child, out, name)               an ordinary checkpoint, checked before it appears
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from nemotron_h.architecture.blocks.block import Axis, Block, Indices
from nemotron_h.architecture.blocks.families import family_of
from nemotron_h.architecture.blocks.registry import KINDS
from nemotron_h.architecture.definition import SWITCHES, Expect, ModelDefinition
from nemotron_h.architecture.multipliers import OF_ENDS
from nemotron_h.architecture.positions import ROPE_KEYS
from nemotron_h.core.errors import UserError
from nemotron_h.core.strict import check_name
from nemotron_h.schema.multipliers import MultipliersSchema


@dataclass(frozen=True)
class Child:
    """The part of a parent that stays; every list is ascending, in the parent's numbers.

    Attributes:
        layers: the parent's layers.
        hidden: channels of the residual stream.
        kept: layer of the parent -> axis of its block -> what stays of it. Layers may keep different numbers; the
            groups of a layer keep one number (a group's heads share B and C), and so do its experts, with a row of
            neurons for each expert that stays.
    """

    layers: tuple[int, ...]
    hidden: Indices
    kept: Mapping[int, Mapping[str, Indices]]

    @classmethod
    def whole(cls, parent: ModelDefinition, layers: tuple[int, ...] | None = None) -> Child:
        """Return the parent itself, or some of its layers at their whole width."""
        layers = tuple(range(parent.num_layers)) if layers is None else layers
        kept = {layer: whole_axes(parent.blocks[layer]) for layer in layers}
        return cls(layers, np.arange(parent.hidden_size), kept)

    def check(self, parent: ModelDefinition) -> None:
        """Check that this can be a child of `parent`.

        Errors:
            ValueError: numbers that the parent does not have, not ascending, missing, or unequal among groups.
        """
        _check_ascending("layers", np.asarray(self.layers, dtype=np.int64), parent.num_layers)
        _check_ascending("hidden", self.hidden, parent.hidden_size)
        having = _by_axis({layer: tuple(axes) for layer, axes in self.kept.items()})
        wanted = _by_axis({layer: tuple(axis.name for axis in parent.blocks[layer].axes()) for layer in self.layers})
        for name in sorted({*having, *wanted}):
            if having.get(name) != wanted.get(name):
                layers = wanted.get(name, [])
                kinds = " and ".join(dict.fromkeys(parent.blocks[layer].name for layer in layers)) or "layers with it"
                raise ValueError(f"{name}: given for layers {having.get(name, [])}, the kept {kinds} are {layers}")
        for layer in self.layers:
            for axis in parent.blocks[layer].axes():
                _check_axis(axis, layer, self.kept[layer])


def whole_axes(block: Block) -> dict[str, Indices]:
    """Return all places of every axis, by its name."""
    kept: dict[str, Indices] = {}
    for axis in block.axes():
        places = np.arange(axis.size)
        kept[axis.name] = np.tile(places, (len(kept[axis.each]), 1)) if axis.each else places
    return kept


def _by_axis(axes: Mapping[int, tuple[str, ...]]) -> dict[str, list[int]]:
    """Return name of an axis -> the layers that have it, of layer -> names of its axes."""
    layers: dict[str, list[int]] = {}
    for layer in sorted(axes):
        for name in axes[layer]:
            layers.setdefault(name, []).append(layer)
    return layers


def _check_axis(axis: Axis, layer: int, kept: Mapping[str, Indices]) -> None:
    indices = kept[axis.name]
    if axis.each:
        if indices.ndim != 2 or len(indices) != len(kept[axis.each]):
            raise ValueError(f"{axis.name} of layer {layer}: not a row for each of the {axis.each} that stay")
        for row in indices:
            _check_ascending(f"{axis.name} of layer {layer}", row, axis.size)
        return
    _check_ascending(f"{axis.name} of layer {layer}", indices, axis.size)
    counts = np.bincount(indices // (axis.size // axis.groups), minlength=axis.groups).tolist()
    if len(set(counts)) > 1:
        raise ValueError(f"{axis.name} of layer {layer}: the groups keep {counts}, not one number")


def _check_ascending(key: str, indices: Indices, size: int) -> None:
    if not len(indices) or indices[0] < 0 or indices[-1] >= size or (np.diff(indices) <= 0).any():
        raise ValueError(f"{key}: not ascending numbers from 0 to {size - 1}, one at least")


def child_definition(parent: ModelDefinition, child: Child, name: str) -> ModelDefinition:
    """Return the definition of a child: an ordinary one, with its own pattern, widths and `expect`.

    Errors:
        ValueError: see `Child.check`.
    """
    child.check(parent)
    layers = [(type(parent.blocks[layer]), _widths(parent, child, layer)) for layer in child.layers]
    return definition_of_layers(parent, layers, len(child.hidden), name)


def definition_of_layers(
    parent: ModelDefinition,
    layers: Sequence[tuple[type[Block], Mapping[str, int]]],
    hidden_size: int,
    name: str,
    origin: str = "pruned",
) -> ModelDefinition:
    """Return the definition of a model of these layers, each a kind with its widths, which is its parent's otherwise.

    The model's widths are those that most layers have; the other layers state theirs in `overrides`.

    Args:
        origin: what was done to the parent, for `sources`.
    """
    pattern = "".join(kind.letter for kind, _ in layers)
    of_layers = [widths for _, widths in layers]
    # widths of kinds that are gone are left out
    values: dict[str, object] = {key: 0 for kind in KINDS.values() for key in kind.widths}
    for key in {key for widths in of_layers for key in widths}:
        # of equally common ones the first layer's
        ((values[key], _),) = Counter(widths[key] for widths in of_layers if key in widths).most_common(1)
    own = {n: {k: w for k, w in widths.items() if w != values[k]} for n, widths in enumerate(of_layers)}
    values["overrides"] = {n: widths for n, widths in own.items() if widths}
    kinds = {kind for kind, _ in layers}
    if not any(kind.attends for kind in kinds):
        values.update(position_embedding="none", **dict.fromkeys(ROPE_KEYS, 0))
    # the parent's, as numbers: a rule would compute others of the child's widths
    scales = {name: getattr(parent.scales, name) for kind in kinds for name in (*kind.multipliers, *OF_ENDS)}
    values["multipliers"] = MultipliersSchema(**{name: scale for name, scale in scales.items() if scale != 1})
    switches = {key for kind in kinds for key in kind.switches}
    values.update({key: default for key, default in SWITCHES.items() if key not in switches})
    values.update(hidden_size=hidden_size, pattern=pattern)
    changed = sorted(key for key, value in values.items() if value != getattr(parent, key))
    sources = {key: text for key, text in parent.sources.items() if key not in changed}
    sources.update({key: f"{origin} from {parent.name}" for key in changed if values[key]})
    check_name("the child's name", name)
    family = family_of(pattern, values.get("position_embedding", parent.position_embedding) != "none")
    definition = replace(parent, name=name, family=family, expect=Expect(), sources=sources, **values)
    definition.validate_structure(name)
    return definition.counted()


def _widths(parent: ModelDefinition, child: Child, layer: int) -> dict[str, int]:
    """Return the widths of a layer in the child, by their keys in the model."""
    block = parent.blocks[layer]
    widths = {key: getattr(block, key) for key in block.widths}
    return {**widths, **{axis.key: child.kept[layer][axis.name].shape[-1] for axis in block.axes()}}


def check_parent(recorded: ModelDefinition, model: ModelDefinition, what: str) -> None:
    """Refuse an artefact of another model.

    Errors:
        UserError: names the first keys that differ.
    """
    differ = "; ".join(recorded.differences(model, "there", "here", but=("name",))[:3])
    if differ:
        raise UserError(f"{what} is of another model than {model.name}: {differ}", hint="measure the importance again")
