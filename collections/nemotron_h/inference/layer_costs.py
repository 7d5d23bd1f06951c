"""Measure the latency of one layer, of a kind at several sizes or of a block, through the generation that models run
with.

A stack of a few layers of one kind and a stack of one are timed in prefill and in steps; a layer costs their difference
by the number of layers that they differ in, and embedding, final norm and output matrix what is left.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from nemotron_h.architecture.alike import alike
from nemotron_h.architecture.blocks.block import Block
from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.core.errors import UserError
from nemotron_h.inference.clock import now
from nemotron_h.inference.graph import Stepper
from nemotron_h.inference.model import GenerationModel, column_major, lay_out
from nemotron_h.inference.prefill import pass_tokens
from nemotron_h.inference.states import States
from nemotron_h.model.blocks.registry import running_layers
from nemotron_h.schema.layer_costs import ENDS, Cost, LayerCosts, Machine, Scenario

#: seconds of a prefill and of a step after it
Times = tuple[float, float]
#: ours: layers of the larger stack beyond those of the smaller; timed turns, and steps of each
MORE_LAYERS, TURNS, STEPS = 6, 7, 16
#: ours: measurements of a layer, each of twice the turns, before noise is an error
ATTEMPTS = 4


def random_model(definition: ModelDefinition, dtype: torch.dtype, device: str, seed: int = 0) -> GenerationModel:
    """Return a model with random matrices of deviation 1 / sqrt(inputs) and vectors of ones: speed is that of any."""
    rng = torch.Generator(device=device).manual_seed(seed)
    exact = torch.float64 if dtype == torch.float64 else torch.float32

    def tensor(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=kind, device=device)
        return torch.empty(shape, dtype=kind, device=device).normal_(0, shape[-1] ** -0.5, generator=rng)

    layers = []
    for running in running_layers(definition):
        shapes = [(list(row.ours.values()), row.exact) for row in running.block.tensors("", "")]
        tensors = [
            tensor(sum(rows for rows, *_ in parts), *parts[0][1:], kind=exact if is_exact else dtype)
            for parts, is_exact in shapes
        ]
        layers.append(running.loaded(running.weights(tensors)))
        lay_out(layers[-1])
    rows, hidden = definition.vocab_size, definition.hidden_size
    embedding, final_norm = tensor(rows, hidden), tensor(hidden)
    output = embedding if definition.tied_embeddings else tensor(rows, hidden)
    return GenerationModel(definition, embedding, layers, final_norm, column_major(output))


def seconds(models: Sequence[GenerationModel], scenario: Scenario, turns: int = TURNS) -> list[Times]:
    """Return the seconds of a prefill and of a step after it, for each model: the shortest of turns that they take one
    after the other, as other work on the machine only makes them longer.
    """
    rng = torch.Generator().manual_seed(0)
    prompts = torch.randint(models[0].definition.vocab_size, (scenario.batch, scenario.context), generator=rng)
    best = [(math.inf, math.inf)] * len(models)
    for turn in range(turns + 1):
        for number, model in enumerate(models):
            times = _turn(model, prompts, scenario)
            if turn:  # the first compiles and warms caches
                best[number] = tuple(map(min, best[number], times))
    return best


def _turn(model: GenerationModel, prompts: Tensor, scenario: Scenario) -> Times:
    states = model.new_states(scenario.batch, scenario.context + scenario.output + STEPS + 2)
    began = now(model)
    token = model.logits(_read_all(model, prompts, states)).argmax(-1)
    read = now(model) - began
    states.advance(scenario.decoded_at - scenario.context)  # the cache is 0 there, which takes as long to read
    stepper, step = Stepper(model, states), math.inf
    for number in range(STEPS + 2):
        began = now(model)
        token = stepper.step(token).argmax(-1)
        if number > 1:  # the second is recorded on a GPU
            step = min(step, now(model) - began)
    return read, step


def _read_all(model: GenerationModel, prompts: Tensor, states: States) -> Tensor:
    """Return hidden states after the prompts, in passes as `prefill` has, of all tokens in all layers: `prefill` leaves
    out what no state comes after, which is every layer of a stack without states.
    """
    limit, (batch, length) = pass_tokens(model), prompts.shape
    rows, last = max(1, limit // length), []
    for begin in range(0, batch, rows):
        end = min(begin + rows, batch)
        for part in prompts[begin:end].split(max(1, limit // rows), dim=1):
            hidden = model.extend(part, states.rows(begin, end))
        last.append(hidden[:, -1])
    return torch.cat(last)


def measure(
    like: ModelDefinition,
    hidden_sizes: Sequence[int],
    scenario: Scenario,
    name: str,
    turns: int = TURNS,
    command: str = "",
    advance: Callable[[str], None] = lambda _: None,
) -> LayerCosts:
    """Return the costs of every kind of layer that a model has, on a GPU in BF16 where there is one, else in float32.

    Args:
        like: has the kinds and, at its own hidden size, the widths; numbers of heads and inner widths grow with it.
        hidden_sizes: to measure at; each must give whole heads.
        name: of the machine.
        turns: of which the shortest counts.
        command: to record.
        advance: told of each kind and size after it was timed.
    Errors:
        UserError: a width does not divide as it has to at one of the sizes, or other work hides what a layer costs.
    """
    layers: dict[str, list[Cost]] = {}
    for hidden in hidden_sizes:
        model, ends = alike(like, hidden, like.pattern), []
        model.validate_structure(f"{like.name} at hidden size {hidden}")
        for kind in like.kinds:
            title, block = f"{kind.name} layers of {hidden}", model.block(kind.letter)
            layer, end = time_layer(replace(stack_of(block, model), name=title), scenario, turns)
            ends.append(end)
            layers.setdefault(kind.name, []).append(cost_of(block, layer))
            advance(title)
        layers.setdefault(ENDS, []).append(cost_of_ends(model, median_times(ends)))
    return LayerCosts(this_machine(name, command), scenario, _shared_widths(like), layers)


def time_layer(one: ModelDefinition, scenario: Scenario, turns: int = TURNS) -> tuple[Times, Times]:
    """Return the times of a layer and of a model's ends: what stacks of one and of several differ in, and what
    is left.

    Args:
        one: a stack of one layer; its name is for errors.
        scenario, turns: as of `measure`.
    Errors:
        UserError: other work hides what a layer costs.
    """
    device, dtype = placement()
    stacks = (one, replace(one, pattern=one.pattern * (1 + MORE_LAYERS)))
    models = [random_model(each, dtype, device) for each in stacks]
    for attempt in range(ATTEMPTS):
        short, long = seconds(models, scenario, turns << attempt)
        layer = [(many - few) / MORE_LAYERS for few, many in zip(short, long, strict=True)]
        ends = [few - each for few, each in zip(short, layer, strict=True)]
        if min(*layer, *ends) > 0:
            return (layer[0], layer[1]), (ends[0], ends[1])
    raise UserError(
        f"{one.name}: {1 + MORE_LAYERS} of them take {1e3 * long[0]:.3g} and {1e3 * long[1]:.3g} ms, "
        f"1 takes {1e3 * short[0]:.3g} and {1e3 * short[1]:.3g} ms: no time of one layer comes of that",
        hint="other work disturbs the measurement: run it again on an idle machine, or with more --turns",
    )


def stack_of(block: Block, like: ModelDefinition) -> ModelDefinition:
    """Return a model of one layer, a block with its own widths, and all else as another model has it."""
    widths = {key: getattr(block, key) for key in ("hidden_size", *block.widths)}
    title = f"{block.name} layers of {', '.join(f'{key} {value}' for key, value in widths.items())}"
    return replace(like, name=title, family="pruned", pattern=block.letter, overrides={}, **widths)


def median_times(parts: Sequence[Times]) -> Times:
    """Return the medians of prefill and of decode."""
    prefill, decode = zip(*parts, strict=True)
    return median(prefill), median(decode)


def placement() -> tuple[str, torch.dtype]:
    """Return the device and dtype that layers are measured in: BF16 on a GPU where there is one, else float32."""
    return ("cuda", torch.bfloat16) if on_gpu() else ("cpu", torch.float32)


def this_machine(name: str, command: str = "") -> Machine:
    """Return what a measurement here is of."""
    threads = 0 if on_gpu() else torch.get_num_threads()
    return Machine(name, _processor(), threads, str(placement()[1])[6:], str(torch.__version__), command=command)


def cost_of(block: Block, times: Times, **widths: int) -> Cost:
    """Return the row of a layer."""
    return _cost(block.hidden_size, block.parameters, times, widths)


def cost_of_ends(model: ModelDefinition, times: Times, **widths: int) -> Cost:
    """Return the row of final norm and output matrix."""
    return _cost(model.hidden_size, model.hidden_size * (model.vocab_size + 1), times, widths)


def _cost(hidden: int, parameters: int, times: Times, widths: dict[str, int]) -> Cost:
    """Return a row with the digits that a measurement has."""
    return Cost(hidden, parameters, *(float(f"{part:.3g}") for part in times), widths)


def on_gpu() -> bool:
    """Tell whether layers are measured on a GPU."""
    return torch.cuda.is_available()


def _shared_widths(like: ModelDefinition) -> dict[str, int]:
    keys = {key for kind in like.kinds for key in kind.widths}
    shared = ("head_dim", "mamba_head_dim", "mamba_state_dim", "conv_kernel")
    return {key: getattr(like, key) for key in shared if key in keys}


def _processor() -> str:
    if on_gpu():
        return torch.cuda.get_device_name()
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
