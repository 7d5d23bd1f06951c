"""Candidates of a compression: every combination of the grid's layer counts and widths that the budget allows.

Pure arithmetic on counts; which layers and channels stay is decided when a candidate is realised (`selection`). Imports
no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from itertools import product
from math import ceil, prod
from typing import NamedTuple

import numpy as np

from nemotron_h.architecture.definition import ATTENTION, FFN, LAYER_NAMES, MAMBA, ModelDefinition
from nemotron_h.core.errors import UserError
from nemotron_h.core.sizes import BYTES, GIB
from nemotron_h.data.blend import parse_count
from nemotron_h.planning.inference import InferenceMemory, Serving, memory_by_layer
from nemotron_h.schema.recipe import BudgetSchema, GridSchema

WIDTHS = ("ffn_hidden_size", "hidden_size", "mamba_num_heads", "mamba_head_dim")


class Candidate(NamedTuple):
    """Numbers of layers and widths of a child; as of `GridSchema`."""

    attention: int
    mamba: int
    ffn: int
    ffn_hidden_size: int
    hidden_size: int
    mamba_num_heads: int
    mamba_head_dim: int

    def count(self, symbol: str) -> int:
        """Layers of a type."""
        return getattr(self, LAYER_NAMES[symbol])

    @property
    def name(self) -> str:
        """Its numbers, for files and tables: `a5-m44-f49-ffn30720-h8192-heads256x64`."""
        layers = f"a{self.attention}-m{self.mamba}-f{self.ffn}"
        return (
            f"{layers}-ffn{self.ffn_hidden_size}-h{self.hidden_size}-heads{self.mamba_num_heads}x{self.mamba_head_dim}"
        )

    @property
    def counts(self) -> str:
        """`44M/49-/5*`."""
        return f"{self.mamba}{MAMBA}/{self.ffn}{FFN}/{self.attention}{ATTENTION}"


def whole(parent: ModelDefinition) -> Candidate:
    """The candidate that keeps everything."""
    counts = (parent.count(symbol) for symbol in (ATTENTION, MAMBA, FFN))
    return Candidate(*counts, *(getattr(parent, key) for key in WIDTHS))


@dataclass(frozen=True)
class Cost:
    """What a candidate costs.

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
        parent: what is compressed.
        grid, budget: of the recipe; see the schema. Without `budget.context` memory is that of one token.
        layer_scores: [layers], by which layers stay; `grid.depth` needs them.
    Errors:
        UserError: a width that the parent's groups do not divide; a depth that no layers make; no candidate fits, which
            names the smallest one.
    """

    def __init__(
        self, parent: ModelDefinition, grid: GridSchema, budget: BudgetSchema, layer_scores: np.ndarray | None = None
    ) -> None:
        self.parent, self.budget = parent, budget
        self.layers = _by_depth(parent, grid, layer_scores) if grid.depth else _by_type(parent, grid)
        self.widths = {key: sorted(set(getattr(grid, key) or [getattr(parent, key)])) for key in WIDTHS}
        groups = parent.mamba_num_groups
        for heads in self.widths["mamba_num_heads"]:
            if groups and heads % groups:
                raise UserError(
                    f"grid.mamba_num_heads has {heads}, which is no multiple of the {groups} groups of {parent.name}",
                    hint="every group has to keep as many heads as the others",
                )
        self._parameters = None if budget.parameters is None else parse_count(budget.parameters)
        self._least = 0 if budget.least_parameters is None else parse_count(budget.least_parameters)
        self._memory = None if budget.memory_gib is None else budget.memory_gib * GIB
        modelled = budget.speedup is not None and budget.speedup_by == "modelled"
        self._read = self.cost(whole(parent)).read / budget.speedup if modelled else None
        self._check()

    def __len__(self) -> int:
        """Combinations of the grid, those outside of the budget included."""
        return len(self.layers) * prod(len(values) for values in self.widths.values())

    def __iter__(self) -> Iterator[Candidate]:
        # every cost is linear in the numbers of layers
        given = (self._parameters, self._memory, self._read)
        most, memory, read = (float("inf") if limit is None else limit for limit in given)
        for widths in product(*self.widths.values()):
            fixed, per_a, per_m, per_f = self._linear(widths)
            p0, pa, pm, pf = (part[0] for part in (fixed, per_a, per_m, per_f))
            b0, ba, bm, bf = (part[1] for part in (fixed, per_a, per_m, per_f))
            unread = b0 - fixed[2]
            for a, m, f in self.layers:
                size = b0 + a * ba + m * bm + f * bf
                if self._least <= p0 + a * pa + m * pm + f * pf <= most and size <= memory and size - unread <= read:
                    yield Candidate(a, m, f, *widths)

    def cost(self, candidate: Candidate) -> Cost:
        """What a candidate costs; exact for its parameters."""
        shape = self._shape(candidate[3:])
        parts = self._memory_parts(shape)
        total = [
            sum(candidate.count(symbol) * getattr(parts[symbol], key) for symbol in LAYER_NAMES)
            + getattr(parts[""], key)
            for key in ("weights", "kv_cache", "ssm_states", "conv_states")
        ]
        memory = InferenceMemory(*total)
        return Cost(self._count(shape, candidate), memory, memory.total - self._embedding(shape))

    def smallest(self, by: Callable[[Cost], float]) -> Candidate:
        """The candidate of the grid, within the budget or not, that costs least."""
        widths = [values[0] for values in self.widths.values()]
        return min((Candidate(*layers, *widths) for layers in self.layers), key=lambda made: by(self.cost(made)))

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
        made = self.smallest(by)
        return self.cost(
            made
        ), f"the smallest ({made.counts}, FFN {made.ffn_hidden_size:,}, hidden {made.hidden_size:,})"

    def _shape(self, widths: tuple[int, ...]) -> ModelDefinition:
        """The parent at other widths; its pattern stands for nothing."""
        return replace(self.parent, **dict(zip(WIDTHS, widths, strict=True)))

    def _memory_parts(self, shape: ModelDefinition) -> dict[str, InferenceMemory]:
        budget = self.budget
        return memory_by_layer(
            shape,
            Serving(
                budget.context or 1,
                budget.sequences,
                weight_bytes=BYTES[budget.weights],
                kv_bytes=BYTES[budget.kv_cache],
                ssm_bytes=BYTES[budget.states],
            ),
        )

    def _embedding(self, shape: ModelDefinition) -> float:
        return shape.vocab_size * shape.hidden_size * BYTES[self.budget.weights]

    def _count(self, shape: ModelDefinition, candidate: Candidate) -> int:
        layers = sum(candidate.count(symbol) * shape.layer_parameters(symbol) for symbol in LAYER_NAMES)
        return layers + shape.other_parameters

    def _linear(self, widths: tuple[int, ...]) -> tuple[tuple[float, float, float], ...]:
        """(parameters, memory, read) of what is there anyway, and of one more attention, Mamba-2 and FFN layer."""
        shape = self._shape(widths)
        parts = self._memory_parts(shape)
        fixed = (shape.other_parameters, parts[""].total, parts[""].total - self._embedding(shape))
        per = [(shape.layer_parameters(s), parts[s].total, parts[s].total) for s in (ATTENTION, MAMBA, FFN)]
        return (fixed, *per)


def _by_type(parent: ModelDefinition, grid: GridSchema) -> list[tuple[int, int, int]]:
    """Numbers of attention, Mamba-2 and FFN layers: every combination of the grid's."""
    axes = (sorted(set(getattr(grid, LAYER_NAMES[s]) or [parent.count(s)])) for s in (ATTENTION, MAMBA, FFN))
    return list(product(*axes))


def _by_depth(parent: ModelDefinition, grid: GridSchema, scores: np.ndarray | None) -> list[tuple[int, int, int]]:
    """Numbers of layers where the most important of the types without a list fill up to a depth."""
    if scores is None:
        raise ValueError("grid.depth needs the layers' scores")
    symbols = (ATTENTION, MAMBA, FFN)
    listed = [symbol for symbol in symbols if getattr(grid, LAYER_NAMES[symbol])]
    free = [n for n in np.argsort(-scores, kind="stable") if parent.pattern[n] not in listed]
    found: set[tuple[int, int, int]] = set()
    for depth in sorted(set(grid.depth)):
        for fixed in product(*(getattr(grid, LAYER_NAMES[symbol]) for symbol in listed)):
            rest = depth - sum(fixed)
            if not 0 <= rest <= len(free):
                raise UserError(
                    f"grid.depth = {depth} cannot be made of {sum(fixed)} layers of the types with a list and at most "
                    f"{len(free)} others",
                    hint="change grid.depth, or the numbers of the types",
                )
            kept = "".join(parent.pattern[n] for n in free[:rest])
            counts = {**{symbol: kept.count(symbol) for symbol in symbols}, **dict(zip(listed, fixed, strict=True))}
            found.add((counts[ATTENTION], counts[MAMBA], counts[FFN]))
    return sorted(found)
