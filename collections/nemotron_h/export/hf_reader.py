"""Read a Hugging Face folder into a checkpoint, one tensor at a time; `hf_types` has the types of models."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.architecture.frozen import LANGUAGE
from nemotron_h.architecture.vision import PROJECTOR, VISION
from nemotron_h.checkpoint.definition import check_repairable
from nemotron_h.checkpoint.embedding_rows import (
    EMBEDDING,
    HEAD,
    Outliers,
    find_outliers,
    replacements,
)
from nemotron_h.checkpoint.finite import check_weights
from nemotron_h.checkpoint.names import HF_HEAD, Weight, weights
from nemotron_h.checkpoint.writer import TOKENIZER, Advance, finish, size, write_weights
from nemotron_h.core.errors import UserError
from nemotron_h.core.files import read_json_object
from nemotron_h.data.tokenizer import HuggingFaceTokenizer
from nemotron_h.export import tokenizer as tokenizers
from nemotron_h.export import vision_config
from nemotron_h.export.config import definition_name, max_positions_of
from nemotron_h.export.folder import new_folder
from nemotron_h.export.hf_types import from_config
from nemotron_h.export.hf_writer import INDEX
from nemotron_h.export.vision_config import WHOLE_TYPE
from nemotron_h.inference.trained_tokenizer import identity

SINGLE = "model.safetensors"
#: float32 holds every number of each
_DTYPES = ("F32", "BF16", "F16")
_NAMED = 5  # tensors that an error lists


class _Open:
    """Base of what is open in a `with` block."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


class TensorFolder(_Open):
    """The tensors of a Hugging Face folder, over all of its files.

    Args:
        folder: holds `model.safetensors`, or files and their index.
    Errors:
        UserError: files are missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self._files: dict[str, Any] = {}
        names = self._file_names()
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise UserError(
                f"{folder}: {len(missing)} of {len(names)} weight files are missing: {', '.join(missing[:_NAMED])}",
                hint="download or copy the folder again",
            )
        for name in names:
            try:
                file = self._stack.enter_context(safe_open(folder / name, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise UserError(f"{folder / name} is damaged: {error}", hint="download or copy it again") from error
            self._files.update(dict.fromkeys(file.keys(), file))
        self.shapes = {name: tuple(file.get_slice(name).get_shape()) for name, file in self._files.items()}
        self.dtypes = {name: file.get_slice(name).get_dtype() for name, file in self._files.items()}

    def _file_names(self) -> list[str]:
        index = self.folder / INDEX
        if not index.is_file():
            if not (self.folder / SINGLE).is_file():
                raise UserError(
                    f"{self.folder} has neither {SINGLE} nor {INDEX}",
                    hint="only safetensors are read; other formats have to be saved again as such by transformers",
                )
            return [SINGLE]
        names = read_json_object(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise UserError(f"{index}: weight_map does not map tensors to files", hint="download or copy it again")
        if outside := [name for name in names.values() if Path(name).name != name]:
            raise UserError(
                f"{index} names a file outside of its folder: {outside[0]}",
                hint="weights are read from the folder alone; put the files into it, and their names into the index",
            )
        return sorted(set(names.values()))

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        return self._files[name].get_tensor(name)


class WholeFolder(_Open):
    """The tensors of a model that reads images, of a folder for each part, under the names of the table of weights.

    Args:
        folder: as `hf_writer` writes it.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        parts = {"": LANGUAGE, **{f"{part}.": part for part in (VISION, PROJECTOR)}}
        opened = {prefix: self._stack.enter_context(TensorFolder(folder / part)) for prefix, part in parts.items()}
        self._places = {prefix + name: (part, name) for prefix, part in opened.items() for name in part.shapes}
        self.shapes = {name: part.shapes[own] for name, (part, own) in self._places.items()}
        self.dtypes = {name: part.dtypes[own] for name, (part, own) in self._places.items()}

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        part, own = self._places[name]
        return part.read(own)


def _opened(folder: Path, definition: ModelDefinition) -> TensorFolder | WholeFolder:
    return WholeFolder(folder) if definition.encoder else TensorFolder(folder)


@dataclass(frozen=True)
class Source:
    """A Hugging Face folder that was looked at and can be imported.

    Attributes:
        folder: where it is.
        definition: of its model.
        dtype: of the checkpoint's weights.
        max_positions: what its configuration tells, for a later export.
        size: bytes of the checkpoint's tensors.
        tokenizer: the folder's, or None where it has none.
        origin: name and commit of the Hub, where it was downloaded.
    """

    folder: Path
    definition: ModelDefinition
    dtype: torch.dtype
    max_positions: int | None
    size: int
    tokenizer: HuggingFaceTokenizer | None
    origin: str = ""


def examine(folder: Path, name: str | None = None) -> Source:
    """Check a folder before any work.

    Args:
        folder: as `nemotron-h export hf` or transformers writes it.
        name: of the model definition; None makes one of the folder's name.
    Errors:
        UserError: another architecture, missing files or tensors, tensors too many, or of a wrong shape or dtype; a
            tokenizer that cannot be loaded, or has more tokens than the model.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    path = folder / "config.json"
    config = read_json_object(path)
    name = name or definition_name(folder.absolute().name)
    language = folder
    if config.get("model_type") == WHOLE_TYPE:
        language = folder / LANGUAGE
        definition, config = _whole(folder, config, name)
    else:
        definition = from_config(config, name, str(path))
    max_positions = max_positions_of(config, str(path))
    with _opened(folder, definition) as tensors:
        rows = list(weights(definition))
        expected = {their: shape for row in rows for their, shape in row.theirs.items()}
        if definition.tied_embeddings and HF_HEAD in tensors.shapes:
            embedding = next(iter(rows[0].theirs))
            _compare_ends(folder, tensors, embedding)
            expected[HF_HEAD] = expected[embedding]
        compare(folder, tensors, expected)
        dtype = _dtype(folder, tensors, rows)
    tokenizer = tokenizers.find(language)
    if tokenizer is not None and tokenizer.vocab_size > definition.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size:,} tokens, the model a vocabulary of "
            f"{definition.vocab_size:,}",
            hint="config.json and the tokenizer belong to different models",
        )
    return Source(folder, definition, dtype, max_positions, size(definition, dtype), tokenizer)


def _whole(folder: Path, config: Mapping[str, Any], name: str) -> tuple[ModelDefinition, dict[str, Any]]:
    """Return the definition of a folder of parts, and the configuration of its language model."""
    paths = {part: folder / part / "config.json" for part in (LANGUAGE, VISION, PROJECTOR)}
    configs = {part: read_json_object(path) for part, path in paths.items()}
    encoder = config.get("encoder") if isinstance(config.get("encoder"), str) else VISION
    definition = from_config(configs[LANGUAGE], name, str(paths[LANGUAGE]))
    projector = vision_config.projector_from_config(configs[PROJECTOR], str(paths[PROJECTOR]))
    if projector.ffn_hidden_size == definition.ffn_hidden_size:
        projector = replace(projector, ffn_hidden_size=0)  # as a recipe says it
    vision = vision_config.from_config(configs[VISION], encoder, str(paths[VISION]))
    definition = replace(definition, vision=vision, projector=projector)
    definition.validate_structure(str(folder / "config.json"))
    return definition.counted(), configs[LANGUAGE]


def compare(folder: Path, tensors: TensorFolder | WholeFolder, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Compare the tensors of a folder with those of the model that its configuration describes.

    Errors:
        UserError: some are missing, too many, or of a wrong shape.
    """

    def listed(names: list[str]) -> str:
        return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")

    if missing := [name for name in expected if name not in tensors.shapes]:
        raise UserError(f"{folder}: {len(missing)} tensors are missing: {listed(missing)}")
    if extra := [name for name in tensors.shapes if name not in expected]:
        raise UserError(
            f"{folder}: {len(extra)} tensors have no place in the model of its config.json: {listed(extra)}",
            hint="config.json and the weights belong to different models",
        )
    wrong = [
        f"{name} is {list(tensors.shapes[name])}, config.json asks for {list(shape)}"
        for name, shape in expected.items()
        if tensors.shapes[name] != shape
    ]
    if wrong:
        raise UserError(f"{folder}: {len(wrong)} tensors have a wrong shape: {listed(wrong)}")


def _compare_ends(folder: Path, tensors: TensorFolder | WholeFolder, embedding: str) -> None:
    """Refuse an output matrix beside tied embeddings, unless it is the embedding once more."""
    if not torch.equal(tensors.read(HF_HEAD), tensors.read(embedding)):
        raise UserError(
            f"{folder}: config.json ties the embeddings (tie_word_embeddings), and {HF_HEAD} is not {embedding}",
            hint="set tie_word_embeddings to false for the output matrix that is there, or remove the tensor",
        )


def _dtype(folder: Path, tensors: TensorFolder | WholeFolder, rows: list[Weight]) -> torch.dtype:
    """Return the dtype that holds all weights exactly: bfloat16 where all are, else float32."""
    if unknown := sorted(set(tensors.dtypes.values()) - set(_DTYPES)):
        raise UserError(
            f"{folder}: weights of dtype {', '.join(unknown)}; {', '.join(_DTYPES)} are read",
            hint="save the model anew in bfloat16 by transformers: from_pretrained(DIR, dtype='bfloat16')"
            ".save_pretrained(OUT)",
        )
    dtypes = {tensors.dtypes[name] for row in rows if not row.exact for name in row.theirs}
    return torch.bfloat16 if dtypes == {"BF16"} else torch.float32


def write(source: Source, out: Path, advance: Advance = lambda _: None, repair_embeddings: bool = False) -> Outliers:
    """Write the checkpoint: weights, record, model definition, and the tokenizer where the folder has one.

    Args:
        source: of `examine`.
        out: the checkpoint's folder; must not exist.
        advance: told the bytes of each written tensor.
        repair_embeddings: give outliers among the embedding's rows new ones; the record tells of them in any case.
    Returns:
        the outliers of the folder's embedding.
    Errors:
        UserError: `out` exists, the disk is full, weights are NaN or infinite, or rows cannot be repaired.
    """
    check_repairable(repair_embeddings and source.definition.tied_embeddings, "--repair-embeddings")
    theirs_of = {next(iter(row.ours)): next(iter(row.theirs)) for row in weights(source.definition)}
    with new_folder(out, source.size) as folder, _opened(source.folder, source.definition) as tensors:
        outliers = Outliers({}, 0.0)

        def read(row: Weight) -> dict[str, Tensor]:
            nonlocal outliers
            theirs = {name: tensors.read(name) for name in row.theirs}
            check_weights(theirs, str(source.folder))
            if EMBEDDING in row.ours:
                (embedding,) = theirs.values()
                outliers = find_outliers(embedding, source.definition.vocab_size)
                if repair_embeddings and outliers.norms:
                    rows = replacements(outliers, tensors.read(theirs_of[HEAD]))
                    embedding[list(outliers.norms)] = rows.to(embedding)
            return row.to_ours(torch.cat([tensor.to(row.dtype(source.dtype)) for tensor in theirs.values()]))

        write_weights(folder, source.definition, source.dtype, read, advance)
        data: dict[str, Any] = {"tokenizer": None, "seq_length": source.max_positions}
        if source.tokenizer is not None:
            # relative to the checkpoint, so that the folder can be moved
            data |= {"tokenizer": TOKENIZER, **identity(tokenizers.copy(source.tokenizer, folder / TOKENIZER))}
        record = {
            "data": data,
            **outliers.record(repair_embeddings),
            "imported": {"from": str(source.folder.absolute()), **({"hub": source.origin} if source.origin else {})},
        }
        finish(folder, source.definition, record, "Imported; counts and parameters are checked when it is loaded.")
    return outliers
