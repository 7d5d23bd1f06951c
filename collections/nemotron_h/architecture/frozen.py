"""Parts of a model that do not train: kinds of layers by name, the embedding, the output; of a model that reads images
the encoder, the projector, or all of the language model. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from nemotron_h.architecture.definition import ModelDefinition, stage_blocks
from nemotron_h.architecture.vision import PROJECTOR, VISION
from nemotron_h.core.errors import UserError
from nemotron_h.core.strict import nearest

#: names beside those of kinds: the matrix of the tokens; the norm before the output matrix, and that matrix
EMBEDDING, OUTPUT = "embedding", "output"
#: all parts but encoder and projector, in a word
LANGUAGE = "language"


def parts(definition: ModelDefinition) -> list[str]:
    """Return the parts of a model that can be frozen."""
    vision = [VISION, PROJECTOR, LANGUAGE] if definition.encoder else []
    return [*_language(definition), *vision]


def _language(definition: ModelDefinition) -> list[str]:
    return [*(kind.name for kind in definition.kinds), EMBEDDING, OUTPUT]


def frozen_parts(frozen: Collection[str], definition: ModelDefinition) -> tuple[str, ...]:
    """Return the parts that do not train, `language` as those that it stands for."""
    written_out = (_language(definition) if name == LANGUAGE else [name] for name in frozen)
    return tuple(dict.fromkeys(part for names in written_out for part in names))


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
    if LANGUAGE in frozen and (twice := set(_language(definition)).intersection(frozen)):
        raise UserError(
            f"{key} = {list(frozen)}: {', '.join(sorted(twice))} is part of {LANGUAGE}", hint="leave it out"
        )
    still = {*frozen_parts(frozen, definition)}
    if definition.tied_embeddings and len({EMBEDDING, OUTPUT} & still) == 1:
        raise UserError(
            f"{key} = {list(frozen)}: {definition.name} has one matrix as embedding and as output",
            hint=f"name both, {EMBEDDING} and {OUTPUT}, or neither",
        )
    for stage in range(pipeline):
        own = {block.name for block in stage_blocks(definition, pipeline, stage)}
        own |= ({EMBEDDING} if stage == 0 else set()) | ({OUTPUT} if stage == pipeline - 1 else set())
        own |= {VISION, PROJECTOR} if stage == 0 and definition.encoder else set()
        if own <= still:
            where = f"pipeline stage {stage} of {pipeline}" if pipeline > 1 else definition.name
            raise UserError(f"{key} = {list(frozen)} leaves nothing to train of {where}", hint="name fewer parts")


def frozen_parameters(definition: ModelDefinition, frozen: Collection[str]) -> int:
    """Return the number of parameters that do not train."""
    d, frozen = definition, frozen_parts(frozen, definition)
    matrix = d.vocab_size * d.hidden_size
    total = sum(block.parameters for block in d.blocks if block.name in frozen)
    total += matrix * (EMBEDDING in frozen) + d.hidden_size * (OUTPUT in frozen)
    total += matrix * (OUTPUT in frozen and not d.tied_embeddings)
    if d.encoder:
        total += d.encoder.parameters * (VISION in frozen) + d.encoder.projector.parameters * (PROJECTOR in frozen)
    return total
