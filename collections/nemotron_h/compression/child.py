"""A child of a parent model: which of its layers and channels stay, and the ordinary definition that this makes.

Imports no torch. The interface of this part of the package:

    importance.measure(model, windows, ...) -> Importance           what removing would cost; `Importance.save`, `load`
    importance.scores(aggregation) -> Scores                        one number per layer and channel; `.reverse()`,
                                                                    `.shuffle(seed)` are the controls of a report
    candidates.candidates(definition, grid, budget) -> Candidates   lazily, those that fit
    selection.child_of(definition, scores, candidate) -> Child      the most important layers and channels
    child_definition(definition, child, name) -> ModelDefinition    this file
    slicing.slice_model(model, child, name) -> GenerationModel      in memory, to score it
    slicing.write_child(checkpoint, child, out, name)               an ordinary checkpoint, checked before it appears
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from nemotron_h.architecture.definition import (
    ATTENTION,
    FFN,
    LAYER_NAMES,
    MAMBA,
    WIDTHS,
    Expect,
    ModelDefinition,
    family_of,
)
from nemotron_h.core.errors import UserError
from nemotron_h.core.strict import check_name

Indices = np.ndarray


@dataclass(frozen=True)
class Child:
    """What stays of a parent; every list is ascending, in the parent's numbers.

    Attributes:
        layers: the parent's layers.
        hidden: channels of the residual stream.
        neurons: FFN layer of the parent -> its neurons; the same number in every layer.
        heads: Mamba-2 layer of the parent -> its heads; the same number in every layer and group, because a group's
            heads share B and C.
        channels: Mamba-2 layer of the parent -> channels of a head, the same ones in all its heads.
    """

    layers: tuple[int, ...]
    hidden: Indices
    neurons: Mapping[int, Indices]
    heads: Mapping[int, Indices]
    channels: Mapping[int, Indices]

    @classmethod
    def whole(cls, parent: ModelDefinition, layers: tuple[int, ...] | None = None) -> Child:
        """The parent itself, or some of its layers at their whole width."""
        kept = tuple(range(parent.num_layers)) if layers is None else layers

        def of(symbol: str, size: int) -> dict[int, Indices]:
            return {layer: np.arange(size) for layer in kept if parent.pattern[layer] == symbol}

        return cls(
            kept,
            np.arange(parent.hidden_size),
            of(FFN, parent.ffn_hidden_size),
            of(MAMBA, parent.mamba_num_heads),
            of(MAMBA, parent.mamba_head_dim),
        )

    def check(self, parent: ModelDefinition) -> None:
        """Whether this can be a child of `parent`.

        Errors:
            ValueError: numbers that the parent does not have, not ascending, of unequal count, or missing.
        """
        _check_ascending("layers", np.asarray(self.layers, dtype=np.int64), parent.num_layers)
        _check_ascending("hidden", self.hidden, parent.hidden_size)
        for key, symbol, kept, size in (
            ("neurons", FFN, self.neurons, parent.ffn_hidden_size),
            ("heads", MAMBA, self.heads, parent.mamba_num_heads),
            ("channels", MAMBA, self.channels, parent.mamba_head_dim),
        ):
            wanted = [layer for layer in self.layers if parent.pattern[layer] == symbol]
            if sorted(kept) != wanted:
                raise ValueError(f"{key}: given for layers {sorted(kept)}, the kept {LAYER_NAMES[symbol]} are {wanted}")
            for layer, indices in kept.items():
                _check_ascending(f"{key} of layer {layer}", indices, size)
            if len({len(indices) for indices in kept.values()}) > 1:
                raise ValueError(f"{key}: the layers keep different numbers of them")
        per_group = parent.mamba_num_heads // max(parent.mamba_num_groups, 1)
        for layer, heads in self.heads.items():
            counts = np.bincount(heads // per_group, minlength=parent.mamba_num_groups)
            if len(set(counts.tolist())) > 1:
                raise ValueError(f"heads of layer {layer}: the groups keep {counts.tolist()}, not one number")


def _check_ascending(key: str, indices: Indices, size: int) -> None:
    if not len(indices) or indices[0] < 0 or indices[-1] >= size or (np.diff(indices) <= 0).any():
        raise ValueError(f"{key}: not ascending numbers from 0 to {size - 1}, one at least")


def child_definition(parent: ModelDefinition, child: Child, name: str) -> ModelDefinition:
    """The definition of a child: an ordinary one, with its own pattern, widths and `expect`.

    Errors:
        ValueError: see `Child.check`.
    """
    child.check(parent)
    pattern = "".join(parent.pattern[layer] for layer in child.layers)
    values: dict[str, object] = {"hidden_size": len(child.hidden)}
    for key, kept in (
        ("ffn_hidden_size", child.neurons),
        ("mamba_num_heads", child.heads),
        ("mamba_head_dim", child.channels),
    ):
        if kept:
            values[key] = len(next(iter(kept.values())))
    if ATTENTION not in pattern:
        values.update(position_embedding="none", rope_base=0, rope_percent=0.0)
    # widths of layer types that are gone are left out
    values.update({key: 0 for symbol, keys in WIDTHS.items() if symbol not in pattern for key in keys})
    values["pattern"] = pattern
    changed = sorted(key for key, value in values.items() if value != getattr(parent, key))
    sources = {key: text for key, text in parent.sources.items() if key not in changed}
    sources.update({key: f"pruned from {parent.name}" for key in changed if values[key]})
    check_name("the child's name", name)
    made = replace(parent, name=name, family=family_of(pattern), expect=Expect(0, 0, 0, 0), sources=sources, **values)
    made.validate_structure(name)
    counts = Expect(*(made.count(symbol) for symbol in (MAMBA, ATTENTION, FFN)), made.parameters)
    return replace(made, expect=counts)


def check_parent(recorded: ModelDefinition, given: ModelDefinition, what: str) -> None:
    """Refuse what was made from another model.

    Errors:
        UserError: names the first keys that differ.
    """
    differ = [
        f"{key}: {value} there, {getattr(given, key)} here"
        for key, value in vars(recorded).items()
        if value != getattr(given, key) and key not in ("name", "sources", "expect")
    ]
    if not differ:
        return
    said = "; ".join(differ[:3])
    raise UserError(f"{what} is of another model than {given.name}: {said}", hint="measure the importance again")
