"""Parts of a model that do not train: kinds of layers by name, the embedding, the output. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from nemotron_h.architecture.definition import ModelDefinition, stage_blocks
from nemotron_h.core.errors import UserError
from nemotron_h.core.strict import nearest

#: names beside those of kinds: the matrix of the tokens; the norm before the output matrix, and that matrix
EMBEDDING, OUTPUT = "embedding", "output"


def parts(definition: ModelDefinition) -> list[str]:
    """Return the parts of a model that can be frozen."""
    return [*(kind.name for kind in definition.kinds), EMBEDDING, OUTPUT]


def check_frozen(frozen: Sequence[str], definition: ModelDefinition, key: str, *, pipeline: int = 1) -> None:
    """Refuse to freeze what a model does not have, or all that a pipeline stage has.

    Args:
        frozen: names of `parts`.
        key: how the error names it, such as `recipe my.yaml: optim.frozen`.
        pipeline: stages that the layers are split into.
    Errors:
        UserError: names the part, and what there is.
    """
    there = parts(definition)
    for name in frozen:
        if name not in there:
            raise UserError(
                f"{key} = {list(frozen)}: {definition.name} has no {name!r}",
                hint=f"{nearest(name, there)}Known: {', '.join(there)}.",
            )
    if len({*frozen}) < len(frozen):
        raise UserError(f"{key} = {list(frozen)} names a part twice", hint="name each once")
    if definition.tied_embeddings and len({EMBEDDING, OUTPUT} & {*frozen}) == 1:
        raise UserError(
            f"{key} = {list(frozen)}: {definition.name} has one matrix as embedding and as output",
            hint=f"name both, {EMBEDDING} and {OUTPUT}, or neither",
        )
    for stage in range(pipeline):
        own = {block.name for block in stage_blocks(definition, pipeline, stage)}
        own |= ({EMBEDDING} if stage == 0 else set()) | ({OUTPUT} if stage == pipeline - 1 else set())
        if own <= {*frozen}:
            where = f"pipeline stage {stage} of {pipeline}" if pipeline > 1 else definition.name
            raise UserError(f"{key} = {list(frozen)} leaves nothing to train of {where}", hint="name fewer parts")


def frozen_parameters(definition: ModelDefinition, frozen: Collection[str]) -> int:
    """Return the number of parameters that do not train."""
    d = definition
    matrix = d.vocab_size * d.hidden_size
    total = sum(block.parameters for block in d.blocks if block.name in frozen)
    total += matrix * (EMBEDDING in frozen) + d.hidden_size * (OUTPUT in frozen)
    return total + matrix * (OUTPUT in frozen and not d.tied_embeddings)
