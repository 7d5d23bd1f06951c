"""Which matrices adapters can be put on, and what that adds to a model. Imports no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from nemotron_h.architecture.definition import ATTENTION, FFN, LAYER_NAMES, MAMBA, ModelDefinition, pipeline_layers
from nemotron_h.core.errors import UserError
from nemotron_h.core.strict import nearest
from nemotron_h.schema.recipe import ADAPTERS, AdapterSchema

#: name of a matrix -> the layer type that has it; all matrices of the layers
TARGETS = {
    "in_proj": MAMBA,
    "out_proj": MAMBA,
    "linear_qkv": ATTENTION,
    "linear_proj": ATTENTION,
    "linear_fc1": FFN,
    "linear_fc2": FFN,
}
#: those whose inputs, not outputs, are split over the tensor-parallel ranks
ROW_PARALLEL = ("out_proj", "linear_proj", "linear_fc2")


def shape_of(target: str, definition: ModelDefinition) -> tuple[int, int]:
    """Outputs and inputs of a matrix that the model has."""
    d = definition
    queries = d.num_attention_heads * d.head_dim
    return {
        "in_proj": (d.in_proj_size, d.hidden_size),
        "out_proj": (d.hidden_size, d.d_inner),
        "linear_qkv": (queries + 2 * d.num_query_groups * d.head_dim, d.hidden_size),
        "linear_proj": (d.hidden_size, queries),
        "linear_fc1": (d.ffn_hidden_size, d.hidden_size),
        "linear_fc2": (d.hidden_size, d.ffn_hidden_size),
    }[target]


@dataclass(frozen=True)
class Coverage:
    """What an adapter trains of one matrix.

    Attributes:
        target: the matrix.
        layer_type: `mamba`, `attention` or `ffn`.
        layers: how many layers have it.
        weights: numbers of the matrix, over these layers.
        trained: numbers of its adapters; 0 where it is no target.
    """

    target: str
    layer_type: str
    layers: int
    weights: int
    trained: int


def coverage(adapter: AdapterSchema, definition: ModelDefinition) -> list[Coverage]:
    """Every matrix of the model's layers, adapted or not, in the order of `TARGETS`."""
    rows = []
    for target, symbol in TARGETS.items():
        layers = definition.count(symbol)
        if not layers:
            continue
        outputs, inputs = shape_of(target, definition)
        trained = adapter.rank * (outputs + inputs) + (outputs if adapter.kind == "dora" else 0)
        adapted = adapter.kind != "none" and target in adapter.targets
        rows.append(
            Coverage(target, LAYER_NAMES[symbol], layers, layers * outputs * inputs, layers * trained * adapted)
        )
    return rows


def trained_parameters(adapter: AdapterSchema, definition: ModelDefinition) -> int:
    """Numbers that are trained: those of the adapters, or all without one."""
    if adapter.kind == "none":
        return definition.parameters
    return sum(row.trained for row in coverage(adapter, definition))


def check_adapter(adapter: AdapterSchema, definition: ModelDefinition, key: str, *, pipeline: int = 1) -> None:
    """Refuse what cannot be, or would do nothing.

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
    adapted = {TARGETS[target] for target in adapter.targets}
    for stage, layers in enumerate(pipeline_layers(definition.num_layers, pipeline)):
        if adapted.isdisjoint(definition.pattern[layers.start : layers.stop]):
            raise UserError(
                f"{key}.targets = {adapter.targets} are in no layer of pipeline stage {stage} of {pipeline}, which "
                "would train nothing",
                hint="add targets, or use fewer stages: parallel.pipeline",
            )


def _check_targets(adapter: AdapterSchema, definition: ModelDefinition, key: str) -> None:
    has = [target for target, symbol in TARGETS.items() if definition.count(symbol)]
    if not adapter.targets:
        raise UserError(f"{key}.targets is empty", hint=f"{definition.name} has {', '.join(has)}")
    for target in adapter.targets:
        if target not in TARGETS:
            raise UserError(
                f"{key}.targets has {target!r}, which matches nothing",
                hint=f"{nearest(target, TARGETS)}{definition.name} has {', '.join(has)}.",
            )
        if target not in has:
            kind = LAYER_NAMES[TARGETS[target]]
            raise UserError(
                f"{key}.targets has {target!r}, which matches nothing: {definition.name} has no {kind} layers",
                hint=f"it has {', '.join(has)}",
            )
        if adapter.targets.count(target) > 1:
            raise UserError(f"{key}.targets names {target!r} twice", hint="name it once")
        smaller = min(shape_of(target, definition))
        if adapter.rank > smaller:
            raise UserError(
                f"{key}.rank = {adapter.rank} is above the smaller side of {target}, {smaller}: the adapter would be "
                "larger than the matrix",
                hint=f"set a rank of {smaller} or less, or train all weights: adapter.kind=none",
            )
