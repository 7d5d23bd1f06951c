"""Costs of blocks in one scenario: seconds, measured on this machine or modelled of a GPU's rates; parameters, bytes.

The table of measured blocks is a file that grows row by row, so that a search that was stopped goes on; a row is of a
block's widths, and serves every layer that has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

from nemotron_h.architecture.blocks.block import Block
from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.core.errors import UserError
from nemotron_h.core.units import BYTES
from nemotron_h.inference.layer_costs import (
    TURNS,
    cost_of,
    cost_of_ends,
    median_times,
    placement,
    stack_of,
    this_machine,
    time_layer,
)
from nemotron_h.planning.gpus import Gpu
from nemotron_h.planning.inference import Serving, layer_memory
from nemotron_h.planning.latency import (
    Latency,
    ends_roofline,
    layer_roofline,
    read_layer_costs,
    write_layer_costs,
)
from nemotron_h.schema.layer_costs import ENDS, Cost, LayerCosts, Machine, Scenario

#: dtypes of PyTorch by the names of `BYTES`
_BYTES = {"float32": "fp32", "bfloat16": "bf16"}
#: of a machine, what says nothing of its speed
_NOTES = ("command", "note")


@dataclass(frozen=True)
class BlockCost:
    """Costs of a block in a scenario, for all of its sequences; they add up to those of a model.

    Attributes:
        prefill: seconds to read the prompts, each token of them.
        decode: seconds of a step at the middle of the answers.
        parameters: of the block; of `ends`, embedding, output matrix and final norm.
        kv_bytes: keys and values at the end of the answers.
        state_bytes: states of Mamba-2, convolutions included.
    """

    prefill: float
    decode: float
    parameters: int
    kv_bytes: float
    state_bytes: float


def total(costs: Iterable[BlockCost]) -> BlockCost:
    """Return the costs of a model of these blocks and `ends`."""
    rows = list(costs)
    return BlockCost(*(sum(getattr(row, part.name) for row in rows) for part in fields(BlockCost)))


def measure_blocks(
    blocks: Mapping[str, Block],
    like: ModelDefinition,
    scenario: Scenario,
    path: Path,
    advance: Callable[[str], None] = lambda _: None,
    turns: int = TURNS,
    command: str = "",
) -> dict[str, BlockCost]:
    """Return the costs of blocks and, as `ends`, of what is outside of the layers; measure those that a table lacks.

    Args:
        blocks: name -> block; equal ones are measured once.
        like: a model that has all but the blocks' widths as theirs has.
        path: of the table; it is begun, or extended after each block.
        advance: told of each name when its block has a row.
        turns: timed, of which the shortest counts.
        command: to record in a new table.
    Errors:
        UserError: the table is of another machine or scenario, or no table of blocks; other work hides what a block
            costs.
    """
    if ENDS in blocks:
        raise UserError(f"a block is called {ENDS}, as what is outside of the layers is", hint="give it another name")
    machine = this_machine(placement()[0], command)
    table = read_table(path, machine, scenario) if path.exists() else LayerCosts(machine, scenario)
    ends = {"hidden_size": like.hidden_size, "vocab_size": like.vocab_size}
    for name, block in blocks.items():
        measured = _rows(table, block.name, widths_of(block))
        if not measured or not _rows(table, ENDS, ends):
            layer, rest = time_layer(_stack(name, block, like), scenario, turns)
            if not measured:
                table.layers.setdefault(block.name, []).append(cost_of(block, layer, **widths_of(block)))
            # every block's measurement has one; they differ by noise
            table.layers.setdefault(ENDS, []).append(cost_of_ends(like, rest, **ends))
            write_layer_costs(path, table)
        advance(name)
    times = {name: _seconds(_rows(table, block.name, widths_of(block))) for name, block in blocks.items()}
    costs = {name: _cost(block, times[name], scenario, BYTES[_BYTES[machine.dtype]]) for name, block in blocks.items()}
    return {**costs, ENDS: _cost_of_ends(like, _seconds(_rows(table, ENDS, ends)))} if blocks else {}


def scaled_to(costs: Mapping[str, BlockCost], parts: BlockCost, whole: Latency) -> dict[str, BlockCost]:
    """Return measured costs with all seconds multiplied so that those of a model's layers and ends make the model's.

    Layers find other data in the caches than in a stack of their like, and share what a step has beside them.

    Args:
        parts: total of the model's layers and ends.
        whole: measured of it.
    """
    prefill, decode = whole.prefill / parts.prefill, whole.decode / parts.decode
    return {
        name: replace(each, prefill=each.prefill * prefill, decode=each.decode * decode) for name, each in costs.items()
    }


def model_blocks(
    blocks: Mapping[str, Block], like: ModelDefinition, scenario: Scenario, gpu: Gpu
) -> dict[str, BlockCost]:
    """Return the costs of blocks and of `ends` with the least seconds that a GPU's peak rates allow, in BF16."""
    modelled = {
        name: _cost(block, layer_roofline(block, gpu, scenario), scenario, BYTES["bf16"])
        for name, block in blocks.items()
    }
    return {**modelled, ENDS: _cost_of_ends(like, ends_roofline(like, gpu, scenario))}


def read_table(path: Path, machine: Machine, scenario: Scenario) -> LayerCosts:
    """Return the table of a file.

    Errors:
        UserError: it is of another machine or scenario, the first differing key of which it names; it is no table of
            blocks.
    """
    table = read_layer_costs(path)
    if not all(row.widths for rows in table.layers.values() for row in rows):
        raise UserError(
            f"{path} has layers of a model's widths, as nemotron-h layer-costs writes them; a table of blocks states "
            "those of each",
            hint="name another file, to be begun",
        )
    for part, there, here in (("machine", table.machine, machine), ("scenario", table.scenario, scenario)):
        for key in fields(here):
            old, new = getattr(there, key.name), getattr(here, key.name)
            if old != new and key.name not in _NOTES:
                raise UserError(
                    f"{path}: {part}.{key.name} is {old} there and {new} here; times of both do not go together",
                    hint=f"measure into another file, or with {part}.{key.name} = {old}",
                )
    return table


def widths_of(block: Block) -> dict[str, int]:
    """Return the whole numbers of a block by key, and what is true of it: all that its time depends on."""
    values = {each.name: getattr(block, each.name) for each in fields(block)}
    return {key: int(value) for key, value in values.items() if isinstance(value, int) and value is not False}


def _stack(name: str, block: Block, like: ModelDefinition) -> ModelDefinition:
    """Return the stack of one layer that is timed.

    Errors:
        UserError: other keys of `like`, such as its positions, make another layer of it.
    """
    stack = stack_of(block, like)
    own, there = widths_of(block), widths_of(stack.blocks[0])
    if own != there:
        key = next(key for key in {**own, **there} if own.get(key) != there.get(key))
        raise UserError(
            f"block {name} has {key} = {own.get(key)}; with all else as {like.name} has it, it would have "
            f"{there.get(key)}",
            hint="measure blocks like a model that they can be layers of",
        )
    return stack


def _rows(table: LayerCosts, kind: str, widths: Mapping[str, int]) -> list[Cost]:
    return [row for row in table.layers.get(kind, []) if row.widths == widths]


def _seconds(rows: Iterable[Cost]) -> Latency:
    return Latency(*median_times([(row.prefill, row.decode) for row in rows]))


def _cost(block: Block, latency: Latency, scenario: Scenario, value: float) -> BlockCost:
    """Return the costs of a block whose weights and activations have `value` bytes a number."""
    last = scenario.context + scenario.output
    memory = layer_memory(block, Serving(last, scenario.batch, value, kv_bytes=value, conv_bytes=value))
    states = memory.ssm_states + memory.conv_states
    return BlockCost(latency.prefill, latency.decode, block.parameters, memory.kv_cache, states)


def _cost_of_ends(like: ModelDefinition, latency: Latency) -> BlockCost:
    return BlockCost(latency.prefill, latency.decode, like.other_parameters, 0.0, 0.0)
