"""Enumerate model definitions of about one number of parameters: depth, width, and the mix of layers.

Everything but hidden size, pattern and `ffn_hidden_size` is that of a definition which they are alike: sizes of heads,
groups and states, vocabulary; numbers of heads grow with the hidden size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from nemotron_h.architecture.alike import alike
from nemotron_h.architecture.blocks.families import hybrid_pattern
from nemotron_h.architecture.definition import ModelDefinition, definition_from_dict
from nemotron_h.checkpoint.definition import is_path, read_model
from nemotron_h.core.errors import UserError
from nemotron_h.core.strict import nearest, typed
from nemotron_h.recipe.compose import configs_dir
from nemotron_h.schema.recipe import ModelSchema

#: ours: `ffn_hidden_size` over hidden size that a shape aims at; the 8B has 5.25 (paper table 1)
FFN_RATIOS = (2.5, 4.0, 5.25, 8.0)
#: ours: least and largest ratio after the width was fitted to the number of parameters
FFN_RANGE = (2.0, 10.0)
#: ours: Mamba-2 layers for each feed-forward one; the 8B has 1
MAMBA_PER_FFN = (0.5, 1.0, 2.0)
#: ours: share of attention layers; the paper's models have about 8 % (2.1)
ATTENTION_SHARES = (0.0, 0.04, 0.08, 0.16, 0.3)
#: ours: of the number of parameters
TOLERANCE = 0.02
#: ours: `ffn_hidden_size` is a multiple of it times the tensor-parallel ranks
FFN_STEP = 32
#: ours: more layers in a row are never used
MAX_LAYERS = 200


@dataclass(frozen=True)
class Mix:
    """Layers of each kind.

    Attributes:
        mamba, attention, ffn: how many.
    """

    mamba: int
    attention: int
    ffn: int


def model_named(name: str) -> ModelDefinition:
    """Return a definition of `configs/model`, or of a YAML file or checkpoint where a path is named.

    Errors:
        UserError: there is none; names the nearest.
    """
    path = Path(name)
    if not is_path(name):
        path = configs_dir() / "model" / f"{name}.yaml"
        known = sorted(file.stem for file in path.parent.glob("*.yaml"))
        if name not in known:
            raise UserError(
                f"there is no model {name!r}", hint=f"{nearest(name, known)}Known: {', '.join(known)} (configs/model)."
            )
    return definition_from_dict(asdict(typed(ModelSchema, read_model(path, "--like"), str(path))), name)


def enumerate_shapes(like: ModelDefinition, parameters: int, tensor: int = 1) -> Iterator[ModelDefinition]:
    """Yield definitions with the number of parameters, within `TOLERANCE`, each once.

    Args:
        like: has sizes of heads, groups, states and vocabulary; its family's rules hold.
        parameters: embedding and output included.
        tensor: ranks over which every layer has to split.
    Errors:
        UserError: the family has no rule of enumeration, or nothing has so few parameters.
    """
    if like.family not in _MIXES:
        raise UserError(
            f"shapes of family {like.family} are not enumerated",
            hint=f"name a model of family {' or '.join(_MIXES)} with --like",
        )
    patterns = set()
    for hidden in _hidden_sizes(like, parameters):
        for ratio in FFN_RATIOS:
            for mix in _MIXES[like.family](like, hidden, ratio, parameters):
                shape = shaped(like, hidden, mix, parameters, tensor)
                if shape is not None and (hidden, shape.pattern) not in patterns:
                    patterns.add((hidden, shape.pattern))
                    yield shape
    if not patterns:
        raise UserError(
            f"no shape alike {like.name} has {parameters:,} parameters and splits over {tensor} tensor-parallel ranks",
            hint="ask for more parameters, or name another model with --like: its vocabulary and groups count",
        )


def shaped(
    like: ModelDefinition, hidden: int, mix: Mix, parameters: int, tensor: int = 1, name: str = ""
) -> ModelDefinition | None:
    """Return the definition of this hidden size and mix, whose `ffn_hidden_size` makes up the number of parameters.

    None where no width in range does, or a width does not divide as it has to.
    """
    pattern = _pattern(like, mix)
    step = FFN_STEP * tensor
    width = 0
    if mix.ffn:
        none, one = (_parameters(alike(like, hidden, pattern, neurons)) for neurons in (1, 2))
        width = round((parameters - none) / (one - none) / step) * step
        if not FFN_RANGE[0] <= width / hidden <= FFN_RANGE[1]:
            return None
    shape = alike(like, hidden, pattern, width)
    if abs(_parameters(shape) - parameters) > TOLERANCE * parameters:
        return None
    shape = replace(shape, name=name or f"{like.family}_h{hidden}_{len(pattern)}l")
    try:
        shape.validate_structure(shape.name)
        shape.validate_tensor_parallel(tensor, shape.name)
    except UserError:
        return None
    return shape.counted()


def _pattern(like: ModelDefinition, mix: Mix) -> str:
    if like.family == "nemotron_h":
        return hybrid_pattern(mix.mamba, mix.attention, mix.ffn)
    period = like.pattern[: len(set(like.pattern))]  # of families that repeat a few letters
    return period * max(mix.ffn, mix.mamba)


def _hidden_sizes(like: ModelDefinition, parameters: int) -> Iterator[int]:
    """Yield the hidden sizes at which embedding and output leave parameters to layers."""
    step = 64
    hidden = step
    matrices = 1 if like.tied_embeddings else 2
    while matrices * like.vocab_size * hidden < 0.9 * parameters and hidden**2 < parameters:
        yield hidden
        hidden += step * (1 if hidden < 16 * step else 4)


def _parameters(shape: ModelDefinition) -> int:
    """Return its parameters, of one block of each kind: many shapes are counted that are left out."""
    layers = Counter(shape.pattern).items()
    return shape.other_parameters + sum(count * shape.block(letter).parameters for letter, count in layers)


def _hybrid_mixes(like: ModelDefinition, hidden: int, ratio: float, parameters: int) -> Iterator[Mix]:
    whole = alike(like, hidden, "M*-", int(ratio * hidden))
    mamba, attention, ffn = (block.parameters for block in whole.blocks)
    budget = parameters - whole.other_parameters
    for per_ffn in MAMBA_PER_FFN:
        for share in ATTENTION_SHARES:
            each = share / (1 - share) * (1 + per_ffn)  # attention layers for each feed-forward one
            count = round(budget / (ffn + per_ffn * mamba + each * attention))
            mix = Mix(max(round(per_ffn * count), 1), min(round(each * count), count), count)
            if count and sum((mix.mamba, mix.attention, mix.ffn)) <= MAX_LAYERS:
                yield mix


def _repeated_mixes(like: ModelDefinition, hidden: int, ratio: float, parameters: int) -> Iterator[Mix]:
    period = like.pattern[: len(set(like.pattern))]
    whole = alike(like, hidden, period, int(ratio * hidden) if like.ffn_hidden_size else 0)
    count = round((parameters - whole.other_parameters) / sum(block.parameters for block in whole.blocks))
    if 1 <= count <= MAX_LAYERS // len(period):
        counts = whole.layer_counts()
        yield Mix(counts["mamba"] * count, counts["attention"] * count, counts["ffn"] * count)


_MIXES = {"nemotron_h": _hybrid_mixes, "transformer": _repeated_mixes, "mamba2": _repeated_mixes}
