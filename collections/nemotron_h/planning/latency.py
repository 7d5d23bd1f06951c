"""Latency of generation: of a GPU's peak rates by arithmetic, or of layers that were measured one kind at a time.

A prompt is read (prefill), then tokens are generated one after the other (decode). Peak rates give a lower bound: a
kernel's start costs nothing in it, which is what deep, narrow models pay. Measured layers have it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import yaml

from nemotron_h.architecture.blocks.block import Block
from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.core.errors import UserError
from nemotron_h.core.files import whole_file
from nemotron_h.core.strict import typed
from nemotron_h.core.strict_yaml import read_yaml
from nemotron_h.core.units import BYTES
from nemotron_h.planning.flops import CHUNK
from nemotron_h.planning.gpus import Gpu
from nemotron_h.planning.inference import Serving, layer_memory
from nemotron_h.recipe.compose import configs_dir
from nemotron_h.schema.layer_costs import ENDS, Cost, LayerCosts, Scenario

#: ours: how far beyond the smallest and largest measured layer a latency is read off, as a factor of parameters
BEYOND = 1.5


@dataclass(frozen=True)
class Latency:
    """Seconds.

    Attributes:
        prefill: from the prompts to the scores of their first new tokens.
        decode: for one more token of every sequence.
    """

    prefill: float
    decode: float


def roofline(definition: ModelDefinition, gpu: Gpu, scenario: Scenario) -> Latency:
    """Return the least latency of a BF16 model on a GPU: of each layer the longer of matmuls at the peak rate and of
    reading weights and states at the memory's.
    """
    ends = ends_roofline(definition, gpu, scenario)
    prefill, decode = ends.prefill, ends.decode
    for (block, whole_prompt), count in _layers(definition).items():
        layer = layer_roofline(block, gpu, scenario)
        decode += count * layer.decode
        prefill += count * (layer.prefill if whole_prompt else layer.decode)
    return Latency(prefill, decode)


def layer_roofline(block: Block, gpu: Gpu, scenario: Scenario) -> Latency:
    """Return the least latency of one layer in BF16, of which the whole prompt is read."""
    memory = layer_memory(block, Serving(scenario.decoded_at, scenario.batch))
    peak, bandwidth = gpu.bf16 * 1e12, gpu.bandwidth_gb_s * 1e9
    # keys and values are read; states of Mamba-2 are read and written
    moved = memory.weights + memory.kv_cache + 2 * (memory.ssm_states + memory.conv_states)
    one = scenario.batch * _flops(block, 2 * scenario.decoded_at - 1, 1)  # a causal average of that many keys
    whole = scenario.batch * scenario.context * _flops(block, scenario.context, CHUNK)
    return Latency(max(whole / peak, memory.weights / bandwidth), max(one / peak, moved / bandwidth))


def ends_roofline(definition: ModelDefinition, gpu: Gpu, scenario: Scenario) -> Latency:
    """Return the least latency of the output matrix in BF16."""
    size = definition.hidden_size * definition.vocab_size
    step = max(2 * scenario.batch * size / (gpu.bf16 * 1e12), size * BYTES["bf16"] / (gpu.bandwidth_gb_s * 1e9))
    return Latency(step, step)


def _layers(definition: ModelDefinition) -> Counter[tuple[Block, bool]]:
    """Return (layer, whether it reads the whole prompt) -> how many; behind the last state the last token is enough."""
    stateful = [bool(block.states(1)) for block in definition.blocks]
    last = max((number for number, has in enumerate(stateful) if has), default=-1)
    return Counter((block, number <= last) for number, block in enumerate(definition.blocks))


def _flops(block: Block, seq_length: int, chunk: int) -> float:
    return sum(step.forward for step in block.operations(seq_length, chunk))


def check_costs(costs: LayerCosts, definition: ModelDefinition, scenario: Scenario, origin: str) -> None:
    """Refuse another scenario, kinds of layers that were not measured, and other widths than were.

    Errors:
        UserError: names the file, and what it has; also of a table of blocks.
    """
    if any(row.widths for rows in costs.layers.values() for row in rows):
        raise UserError(
            f"{origin} is a table of blocks, each of its own widths; nothing between them can be read off",
            hint="name a file of nemotron-h layer-costs",
        )
    if scenario != costs.scenario:
        raise UserError(
            f"{origin} was measured with {costs.scenario}, not with {scenario}",
            hint="ask for its scenario, or measure yours: nemotron-h layer-costs --batch ... --context ...",
        )
    if missing := [kind.name for kind in definition.kinds if kind.name not in costs.layers]:
        raise UserError(
            f"{origin} has no {', '.join(missing)} layers, which {definition.name} has",
            hint="measure them: nemotron-h layer-costs --like MODEL",
        )
    for key, value in costs.widths.items():
        if getattr(definition, key) not in (0, value):
            raise UserError(
                f"{origin} was measured with {key} = {value}; {definition.name} has {getattr(definition, key)}",
                hint="measure layers like its own: nemotron-h layer-costs --like MODEL",
            )


def measured_latency(costs: LayerCosts, definition: ModelDefinition) -> Latency | None:
    """Return the sum over a model's layers, each read off between measured sizes; None where one is smaller or
    larger than those were.
    """
    parts = Counter({(ENDS, definition.output_parameters, True): 1})
    for (block, whole_prompt), count in _layers(definition).items():
        parts[block.name, block.parameters, whole_prompt] += count
    prefill = decode = 0.0
    for (kind, parameters, whole_prompt), count in parts.items():
        sizes = sorted(costs.layers[kind], key=lambda cost: cost.parameters)
        if not sizes[0].parameters / BEYOND <= parameters <= sizes[-1].parameters * BEYOND:
            return None
        prefill += count * _between(sizes, parameters, "prefill" if whole_prompt else "decode")
        decode += count * _between(sizes, parameters, "decode")
    return Latency(prefill, decode)


def _between(costs: list[Cost], parameters: int, part: str) -> float:
    """Return seconds on straight lines between measured sizes, in logarithms; beyond the ends in proportion."""
    sizes = [cost.parameters for cost in costs]
    inside = min(max(parameters, sizes[0]), sizes[-1])
    seconds = np.interp(np.log(inside), np.log(sizes), np.log([getattr(cost, part) for cost in costs]))
    return float(np.exp(seconds)) * parameters / inside


def read_layer_costs(path: Path) -> LayerCosts:
    """Return the content of a file that `write_layer_costs` wrote.

    Errors:
        UserError: it cannot be read, or a value is missing, unknown or impossible.
    """
    content = read_yaml(path)
    rows = content.pop("layers", None) if isinstance(content, dict) else None
    if not isinstance(rows, dict) or not all(isinstance(sizes, list) and sizes for sizes in rows.values()):
        raise UserError(f"{path} has no lists of layers", hint="name a file of nemotron-h layer-costs")
    costs = typed(LayerCosts, content, str(path))
    for kind, sizes in rows.items():
        # OmegaConf leaves a list in a mapping as it is
        costs.layers[kind] = [typed(Cost, size, f"{path}: layers.{kind}") for size in sizes]
        each = {(size.parameters, *sorted(size.widths.items())) for size in costs.layers[kind]}
        if len(each) != len(sizes) and kind != ENDS:  # of a table of blocks, each block has measured those
            raise UserError(f"{path}: layers.{kind} has a size twice", hint="measure again")
    if ENDS not in costs.layers:
        raise UserError(f"{path}: layers.{ENDS} is missing", hint="measure again")
    return costs


def write_layer_costs(path: Path, costs: LayerCosts) -> None:
    """Write costs as `read_layer_costs` reads them.

    Errors:
        UserError: the file cannot be written.
    """
    content = asdict(costs)
    for rows in content["layers"].values():
        rows[:] = [{key: value for key, value in row.items() if value != {}} for row in rows]
    text = yaml.safe_dump(content, sort_keys=False, width=120)
    try:
        with whole_file(path) as temporary:
            temporary.write_text(f"# Measured by this project's generation: seconds of one layer.\n{text}", "utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error


def known_machines() -> list[str]:
    """Return the machines of `configs/layer_costs`, whose files begin with their names."""
    return sorted({file.stem.split("_")[0] for file in _shipped("*")})


def shipped_layer_costs(name: str, scenario: Scenario) -> tuple[LayerCosts, str]:
    """Return the shipped costs of a machine in a scenario, and their file.

    Errors:
        UserError: it was measured in other scenarios; names these.
    """
    of_machine = [(read_layer_costs(file), file.name) for file in _shipped(name)]
    shipped = next(
        ((costs, f"configs/layer_costs/{file}") for costs, file in of_machine if costs.scenario == scenario), None
    )
    if shipped is None:
        known = "; ".join(str(costs.scenario) for costs, _ in of_machine)
        raise UserError(
            f"{name} was not measured with {scenario}",
            hint=f"measured: {known}; or measure yours: nemotron-h layer-costs --batch ... --context ... --out FILE",
        )
    return shipped


def _shipped(name: str) -> Iterator[Path]:
    yield from sorted((configs_dir() / "layer_costs").glob(f"{name}_*.yaml"))
