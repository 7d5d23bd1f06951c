"""Put an image encoder and a fresh projector in front of a language model's checkpoint, one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.architecture.vision import VISION, text_only
from nemotron_h.checkpoint.finite import check_weights
from nemotron_h.checkpoint.names import Weight, weights
from nemotron_h.checkpoint.reader import read_record
from nemotron_h.checkpoint.writer import Advance, finish, size, write_weights
from nemotron_h.core.files import read_json_object
from nemotron_h.export.config import definition_name
from nemotron_h.export.folder import new_folder
from nemotron_h.export.hf_reader import TensorFolder, compare
from nemotron_h.export.source import ModelSource
from nemotron_h.export.vision_config import from_config, stored_names
from nemotron_h.inference.trained_tokenizer import inherit_data
from nemotron_h.model import init
from nemotron_h.model.vision_init import distribution
from nemotron_h.schema.vision import ProjectorSchema, VisionSchema


@dataclass(frozen=True)
class Composition:
    """Plan of a model that reads images.

    Attributes:
        source: the language model's checkpoint.
        definition: of the whole.
        vision: the encoder's folder; None begins it anew.
        names: tensor of the encoder -> those of the folder that it is made of.
        origin: of the encoder, for the record.
        size: bytes of the checkpoint's tensors.
    """

    source: ModelSource
    definition: ModelDefinition
    vision: Path | None
    names: Mapping[str, list[str]]
    origin: str
    size: int


def plan(
    checkpoint: Path,
    vision: Path | VisionSchema,
    projector: ProjectorSchema,
    name: str | None = None,
    origin: str | None = None,
    shipped: Iterable[VisionSchema] = (),
) -> Composition:
    """Look at a language model and an encoder; reads no weights.

    Args:
        checkpoint: as `find_checkpoint` returns it; an encoder that it has is replaced.
        vision: folder of a released encoder, or the widths of one that begins anew.
        projector: its widths.
        name: of the model definition; None is the language model's, and `_vlm`.
        origin: of the encoder, for the record; None is its folder or name.
        shipped: encoders of which the folder's takes the name, and what it begins from, where it is one of them.
    Errors:
        UserError: the checkpoint is damaged; the folder is no encoder, or its tensors are not those of its
            configuration; widths that cannot be.
    """
    source = ModelSource(checkpoint)
    folder = None if isinstance(vision, VisionSchema) else vision
    names: dict[str, list[str]] = {}
    if folder is not None:
        path = folder / "config.json"
        config = read_json_object(path)
        vision = from_config(config, definition_name(folder.absolute().name), str(path))
        begun = ("name", "init_std", "layer_scale")
        same = (each for each in shipped if replace(vision, **{key: getattr(each, key) for key in begun}) == each)
        vision = next(same, vision)
    language = text_only(source.definition)
    own = name or f"{language.name.removesuffix('_vlm')}_vlm"
    definition = replace(language, name=own, vision=vision, projector=projector)
    definition.validate_structure(f"model {own}")
    definition = definition.counted()
    if folder is not None:
        expected: dict[str, tuple[int, ...]] = {}
        for row in definition.encoder.tensors():
            ours, stored = next(iter(row.ours)), stored_names(row.theirs, config["model_type"])
            if not ours.startswith(f"{VISION}."):
                continue
            names[ours], each = stored, len(row.theirs) // len(stored)
            for their, shape in zip(stored, list(row.theirs.values())[::each], strict=True):
                expected[their] = (shape[0] * each, *shape[1:])
        with TensorFolder(folder) as tensors:
            compare(folder, tensors, expected)
    origin = origin or (str(folder.absolute()) if folder is not None else vision.name)
    return Composition(source, definition, folder, names, origin, size(definition, source.dtype))


def write(composition: Composition, out: Path, seed: int, advance: Advance = lambda _: None) -> None:
    """Write the checkpoint.

    Args:
        composition: what to write.
        out: the checkpoint's folder; must not exist.
        seed: of the weights that begin anew.
        advance: told the bytes of each written tensor.
    Errors:
        UserError: `out` exists, the disk is full, or weights are damaged, NaN or infinite.
    """
    source, definition = composition.source, composition.definition
    language = {name for row in weights(text_only(definition)) for name in row.ours}
    with new_folder(out, composition.size) as folder, ExitStack() as stack:
        tensors = composition.vision and stack.enter_context(TensorFolder(composition.vision))

        def read(row: Weight) -> Mapping[str, Tensor]:
            name, shape = next(iter(row.ours.items()))
            if name in language:
                theirs = source.read(set(row.theirs), source.dtype)
                whole = torch.cat([theirs[each] for each in row.theirs])
            elif name in composition.names:
                theirs = {each: tensors.read(each) for each in composition.names[name]}
                check_weights(theirs, str(composition.vision))
                whole = torch.cat(list(theirs.values())).to(source.dtype)
            else:
                drawn = torch.empty(shape)
                init.fill(drawn, name, distribution(name, definition), seed)
                return {name: drawn.to(source.dtype)}
            return {key: tensor.contiguous() for key, tensor in row.to_ours(whole).items()}

        write_weights(folder, definition, source.dtype, read, advance)
        record = {
            "data": inherit_data(source.checkpoint, read_record(source.checkpoint), folder),
            "composed": {
                "language": str(source.checkpoint.absolute()),
                "vision": composition.origin,
                "seed": seed,
            },
        }
        finish(folder, definition, record, "Composed of a language model and an image encoder.")
