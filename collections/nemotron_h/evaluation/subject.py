"""The subject of an evaluation: a checkpoint with its record and tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.checkpoint.definition import read_definition
from nemotron_h.checkpoint.folders import step_of
from nemotron_h.checkpoint.reader import find_checkpoint, read_record
from nemotron_h.core.errors import UserError
from nemotron_h.data.tokenizer import META_FILE, Tokenizer, load_tokenizer
from nemotron_h.inference.trained_tokenizer import tokenizer_for


@dataclass(frozen=True)
class Subject:
    """A checkpoint.

    Attributes:
        checkpoint: its folder.
        definition: its model; None where only the tokenizer is here.
        tokenizer: of its run, or the one that was named.
        record: run.json beside its weights.
    """

    checkpoint: Path
    definition: ModelDefinition | None
    tokenizer: Tokenizer
    record: dict[str, Any]

    @property
    def data(self) -> dict[str, Any]:
        """Return what the record says of the data that were read."""
        return self.record.get("data") or {}

    @property
    def recipe_data(self) -> dict[str, Any]:
        """Return the `data` of its recipe."""
        return (self.record.get("recipe") or {}).get("data") or {}

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
        return cls(checkpoint, definition, text, record)

    @classmethod
    def served(cls, tokenizer: Path) -> Subject:
        """Return a model that is elsewhere, by the folder of its tokenizer, Hugging Face's too.

        Errors:
            UserError: there is none.
        """
        kind = None if (tokenizer / META_FILE).exists() else "huggingface"
        return cls(tokenizer, None, load_tokenizer(tokenizer, kind), {})


def names_of(subjects: Sequence[Subject]) -> list[str]:
    """Return the runs' names; where a run takes part with several checkpoints, with their steps.

    Errors:
        UserError: a checkpoint is named twice, or two runs have one name.
    """
    checkpoints = [subject.checkpoint.resolve() for subject in subjects]
    twice = next((path for number, path in enumerate(checkpoints) if path in checkpoints[:number]), None)
    if twice is not None:
        raise UserError(f"{twice} is named twice", hint="name each run or checkpoint once")
    runs = [path.parent.parent if path.parent.name == "checkpoints" else path for path in checkpoints]
    names = [run.name for run in runs]
    several = [names.count(name) > 1 for name in names]
    names = [
        f"{name}-{step_of(path)}" if more else name
        for name, path, more in zip(names, checkpoints, several, strict=True)
    ]
    if len({*names}) < len(names):
        raise UserError(f"two runs have the name {max(names, key=names.count)}", hint="rename the folder of one")
    return names
