"""The subject of an evaluation: a checkpoint with its record and tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.checkpoint.definition import read_definition
from nemotron_h.checkpoint.reader import find_checkpoint, read_record
from nemotron_h.data.tokenizer import Tokenizer
from nemotron_h.inference.trained_tokenizer import tokenizer_for


@dataclass(frozen=True)
class Subject:
    """A checkpoint.

    Attributes:
        checkpoint: its folder.
        definition: its model.
        tokenizer: of its run, or the one that was named.
        data: what its record says of the data that were read.
        recipe_data: the `data` of its recipe.
    """

    checkpoint: Path
    definition: ModelDefinition
    tokenizer: Tokenizer
    data: dict[str, Any]
    recipe_data: dict[str, Any]

    @classmethod
    def of(cls, path: Path, tokenizer: Path | None) -> Subject:
        """Return the checkpoint that `path` means.

        Errors:
            UserError: there is none, it is damaged, or its tokenizer is not there or of another size.
        """
        checkpoint = find_checkpoint(path)
        record = read_record(checkpoint)
        definition = read_definition(record, f"checkpoint {checkpoint}")
        text = tokenizer_for(record, checkpoint, tokenizer, definition.vocab_size)
        written = (record.get("recipe") or {}).get("data") or {}
        return cls(checkpoint, definition, text, record.get("data") or {}, written)
