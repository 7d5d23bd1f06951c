"""Candidates of a compression: every combination of the grid's layer counts and widths that the budget allows.

Pure arithmetic on counts; which layers and channels stay is decided when a candidate is realised (`selection`). Imports
no torch.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from itertools import product
from math import ceil, prod
from typing import Any

import numpy as np

from nemotron_h.architecture.blocks.registry import KINDS, kind_named
from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.architecture.pruned_widths import check_width
from nemotron_h.core.errors import UserError
from nemotron_h.core.units import BYTES, GIB, parse_count
from nemotron_h.planning.inference import InferenceMemory, Serving, layer_memory
from nemotron_h.schema.minipuzzle import BudgetSchema, GridSchema

_LISTS = tuple(f.name for f in fields(GridSchema) if f.name != "depth")
#: lists of the grid: numbers of layers, by the names of their kinds, and widths, by their keys in the model; all layers
#: of a kind without a list stay
COUNTS = tuple(name for name in _LISTS if name in {kind.name for kind in KINDS.values()})
WIDTHS = tuple(name for name in _LISTS if name not in COUNTS)
#: letters of `COUNTS`
_LETTERS = tuple(kind_named(name).letter for name in COUNTS)
#: the letters in the order in which counts are written: 44M/49-/5*
_WRITTEN = tuple(sorted(_LETTERS, reverse=True))
#: widths in a candidate's name
_TAGS = {
    "ffn_hidden_size": "-ffn",
    "hidden_size": "-h",
    "mamba_num_heads": "-heads",
    "mamba_head_dim": "x",
    "num_experts": "-experts",
    "expert_hidden_size": "x",
    "shared_expert_hidden_size": "-shared",
}


class Candidate(namedtuple("Candidate", (*COUNTS, *WIDTHS), defaults=(0,) * len(WIDTHS))):
    """Numbers of layers and widths of a child, as of `GridSchema`; a width that the parent lacks is 0."""

    __slots__ = ()

    @property
    def layers(self) -> dict[str, int]:
        """Return letter -> how many layers of the kind stay."""
        return dict(zip(_LETTERS, self, strict=False))

    @property
    def widths(self) -> dict[str, int]:
        """Return key of the model -> width."""
        return dict(zip(WIDTHS, self[len(COUNTS) :], strict=True))

    @property
    def name(self) -> str:
        """Return its numbers, for files and tables: `a5-m44-f49-ffn30720-h8192-heads256x64`."""
        layers = "-".join(f"{kind[0]}{count}" for kind, count in zip(COUNTS, self, strict=False))
        return layers + "".join(f"{_TAGS.get(key, f'-{key}')}{width}" for key, width in self.widths.items() if width)

    @property
    def sizes(self) -> dict[str, int]:
        """Return numbers of layers and widths by key, without the widths that the parent lacks."""
        return {key: size for key, size in self._asdict().items() if size or key in COUNTS}

    @property
    def counts(self) -> str:
        """Return its layers: `44M/49-/5*`."""
        return "/".join(f"{self.layers[letter]}{letter}" for letter in _WRITTEN)


def candidate_of(row: Mapping[str, Any]) -> Candidate:
    """Return the candidate of a row of `candidates.json`, which has its `sizes`."""
    return Candidate(**{key: row[key] for key in Candidate._fields if key in row})


def whole(parent: ModelDefinition) -> Candidate:
    """Return the candidate that keeps everything."""
    return Candidate(*map(parent.count, _LETTERS), *(getattr(parent, key) for key in WIDTHS))


@dataclass(frozen=True)
class Cost:
    """Costs of a candidate.

    Attributes:
        parameters: without vocabulary padding.
        memory: bytes of inference at the budget's context and precisions.
        read: bytes that a step of generation reads, for all of the budget's sequences: all but the embedding. On a GPU
            generation takes about as long as reading them.
    """

    parameters: int
    memory: InferenceMemory
    read: float


class Candidates:
    """The candidates of a grid within a budget: iterate to get them, lazily and in a fixed order.

    Args:
        parent: the model that is compressed.
        grid, budget: of the recipe; see the schema. Without `budget.context` memory is that of one token.
        layer_scores: [layers], by which layers stay; `grid.depth` needs them.
    Errors:
        UserError: a parent whose layers differ in widths; a width that the parent's groups do not divide; a depth that
            no layers make; no candidate fits, which names the smallest one.
    """

    def __init__(
        self, parent: ModelDefinition, grid: GridSchema, budget: BudgetSchema, layer_scores: np.ndarray | None = None
    ) -> None:
        self.parent, self.budget = parent, budget
        if parent.overrides:
            own = ", ".join(map(str, sorted(parent.overrides)))
            raise UserError(
                f"model {parent.name} has widths of their own in layers {own} (model.overrides); a grid states one for "
                "all layers of a kind",
                hint="compress the model that it was pruned from",
            )
        self.layers = _by_depth(parent, grid, layer_scores) if grid.depth else _by_kind(parent, grid)
        self.widths = {key: sorted(set(getattr(grid, key) or [getattr(parent, key)])) for key in WIDTHS}
        for key in WIDTHS:
            for size in getattr(grid, key):
                check_width(parent, key, size, f"grid.{key}")
        self._parameters = None if budget.parameters is None else parse_count(budget.parameters)
        self._least = 0 if budget.least_parameters is None else parse_count(budget.least_parameters)
        self._memory = None if budget.memory_gib is None else budget.memory_gib * GIB
        modelled = budget.speedup is not None and budget.speedup_by == "modelled"
        self._read = self.cost(whole(parent)).read / budget.speedup if modelled else None
        self._check()

    def __len__(self) -> int:
        """Return the combinations of the grid, those outside of the budget included."""
        return len(self.layers) * prod(len(values) for values in self.widths.values())

    def __iter__(self) -> Iterator[Candidate]:
        # every cost is linear in the numbers of layers
        limits = (self._parameters, self._memory, self._read)
        most, memory, read = (float("inf") if limit is None else limit for limit in limits)
        counts = np.array(self.layers)  # [combinations, kinds]
        for widths in product(*self.widths.values()):
            other, per_layer = self._parts(dict(zip(WIDTHS, widths, strict=True)))
            parameters = other.parameters + counts @ [part.parameters for part in per_layer]
            size = other.memory.total + counts @ [part.memory.total for part in per_layer]
            unread = other.memory.total - other.read
            fit = (self._least <= parameters) & (parameters <= most) & (size <= memory) & (size - unread <= read)
            for layers in counts[fit].tolist():
                yield Candidate(*layers, *widths)

    def cost(self, candidate: Candidate) -> Cost:
        """Return what a candidate costs; exact for its parameters."""
        other, per_layer = self._parts(candidate.widths)
        parts = [(1, other), *zip(candidate, per_layer, strict=False)]
        memory = _memory((n, part.memory) for n, part in parts)
        unread = other.memory.total - other.read
        return Cost(sum(n * part.parameters for n, part in parts), memory, memory.total - unread)

    def smallest(self, by: Callable[[Cost], float]) -> Candidate:
        """Return the candidate of the grid, within the budget or not, that costs least."""
        widths = [values[0] for values in self.widths.values()]
        return min((Candidate(*layers, *widths) for layers in self.layers), key=lambda each: by(self.cost(each)))

    def _check(self) -> None:
        budget = self.budget
        cost, said = self._least_of(lambda cost: cost.memory.total)
        if self._memory is not None and cost.memory.total > self._memory:
            memory = cost.memory
            needed = ceil(memory.total / GIB * 100) / 100
            states = (memory.ssm_states + memory.conv_states) / GIB
            raise UserError(
                f"no candidate of the grid fits budget.memory_gib = {budget.memory_gib:g}: {said} needs "
                f"{needed:.2f} GiB for {budget.sequences:,} x {budget.context or 1:,} tokens: {budget.weights} weights "
                f"{memory.weights / GIB:.2f}, {budget.kv_cache} keys and values {memory.kv_cache / GIB:.2f}, states "
                f"{states:.2f}",
                hint=f"raise budget.memory_gib to {needed:.2f} or more, shorten budget.context, or widen the grid",
            )
        cost, said = self._least_of(lambda cost: cost.parameters)
        if self._parameters is not None and cost.parameters > self._parameters:
            raise UserError(
                f"no candidate of the grid fits budget.parameters = {budget.parameters}: {said} has "
                f"{cost.parameters:,}",
                hint=f"raise budget.parameters to {cost.parameters} or more, or widen the grid",
            )
        cost, said = self._least_of(lambda cost: cost.read)
        if self._read is not None and cost.read > self._read:
            best = self._read * budget.speedup / cost.read
            raise UserError(
                f"no candidate of the grid is {budget.speedup:g} times as fast as {self.parent.name}: {said} reads "
                f"{cost.read / GIB:.2f} GiB a step, which makes {best:.3f} times",
                hint=f"lower budget.speedup to {best:.3f} or less, or widen the grid",
            )
        if next(iter(self), None) is None:
            limits = (
                f"budget.{f.name} = {value}" for f in fields(budget) if (value := getattr(budget, f.name)) is not None
            )
            raise UserError(
                f"no candidate of the grid meets all limits at once: {', '.join(limits)}",
                hint="each can be met alone; widen the grid, or the range between least_parameters and the others",
            )

    def _least_of(self, by: Callable[[Cost], float]) -> tuple[Cost, str]:
        """Return the least cost, and the words for the candidate that has it."""
        least = self.smallest(by)
        said = [f"FFN {least.ffn_hidden_size:,}"] if least.ffn_hidden_size else []
        said += [f"{least.num_experts:,} experts of {least.expert_hidden_size:,}"] if least.num_experts else []
        return self.cost(least), f"the smallest ({', '.join([least.counts, *said, f'hidden {least.hidden_size:,}'])})"

    def _parts(self, widths: dict[str, int]) -> tuple[Cost, list[Cost]]:
        """Return what stays in any candidate costs, and one layer of each of `COUNTS`, in a model of these widths."""
        budget, shape = self.budget, replace(self.parent, **widths)
        value = BYTES[budget.weights]
        serving = Serving(
            budget.context or 1,
            budget.sequences,
            weight_bytes=value,
            kv_bytes=BYTES[budget.kv_cache],
            ssm_bytes=BYTES[budget.states],
        )

        def layer(letter: str) -> Cost:
            block = shape.block(letter)
            memory = layer_memory(block, serving)
            return Cost(block.parameters, memory, memory.total)

        stay = [layer(letter) for letter in self.parent.pattern if letter not in _LETTERS]
        outside = InferenceMemory(shape.other_parameters * value, 0.0, 0.0, 0.0)
        memory = _memory((1, part) for part in (outside, *(each.memory for each in stay)))
        unread = (shape.other_parameters - shape.output_parameters) * value  # rows of the embedding are looked up
        parameters = shape.other_parameters + sum(each.parameters for each in stay)
        return Cost(parameters, memory, memory.total - unread), [layer(letter) for letter in _LETTERS]


def _memory(parts: Iterable[tuple[int, InferenceMemory]]) -> InferenceMemory:
    """Return the sum of numbers of parts."""
    counted = list(parts)
    return InferenceMemory(*(sum(n * getattr(part, f.name) for n, part in counted) for f in fields(InferenceMemory)))


def _by_kind(parent: ModelDefinition, grid: GridSchema) -> list[tuple[int, ...]]:
    """Return numbers of layers, in the order of `COUNTS`: every combination of the grid's."""
    axes = (sorted(set(getattr(grid, name) or [n])) for name, n in zip(COUNTS, whole(parent), strict=False))
    return list(product(*axes))


def _by_depth(parent: ModelDefinition, grid: GridSchema, scores: np.ndarray | None) -> list[tuple[int, ...]]:
    """Return numbers of layers where the most important of the kinds without a list fill up to a depth."""
    if scores is None:
        raise ValueError("grid.depth needs the layers' scores")
    listed = {letter: counts for letter, name in zip(_LETTERS, COUNTS, strict=True) if (counts := getattr(grid, name))}
    varied = set(_LETTERS) - set(listed)
    free = [n for n in np.argsort(-scores, kind="stable") if parent.pattern[n] in varied]
    stay = sum(letter not in _LETTERS for letter in parent.pattern)
    combinations: set[tuple[int, ...]] = set()
    for depth in sorted(set(grid.depth)):
        for fixed in product(*listed.values()):
            stated = stay + sum(fixed)
            rest = depth - stated
            if not 0 <= rest <= len(free):
                raise UserError(
                    f"grid.depth = {depth} cannot be made of {stated} layers of the types with a list and at most "
                    f"{len(free)} others",
                    hint="change grid.depth, or the numbers of the types",
                )
            filled = "".join(parent.pattern[n] for n in free[:rest])
            counts = {**{letter: filled.count(letter) for letter in _LETTERS}, **dict(zip(listed, fixed, strict=True))}
            combinations.add(tuple(counts[letter] for letter in _LETTERS))
    return sorted(combinations)
