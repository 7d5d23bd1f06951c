"""Records of what a model wrote, a JSON line each, and the settings that all of them were written with."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from nemotron_h.core.errors import UserError, writing
from nemotron_h.core.files import parsed_lines, read_json_object, whole_file, write_json
from nemotron_h.core.strict import from_json

T = TypeVar("T")
#: seconds between writes of records
_WRITE_EVERY = 2.0


class Records(Generic[T]):
    """The records of a model, in `NAME.jsonl`, and the settings that they were made with, in `NAME.json`.

    Args:
        folder: of both files.
        name: the model's.
        kind: dataclass of a record.
    Attributes:
        records: those that were there, and those that are added.
    Errors:
        UserError: the files are damaged. Half a line at the end, of a process that was killed, is removed.
    """

    def __init__(self, folder: Path, name: str, kind: type[T]) -> None:
        self.file, self.settings_file, self._kind = folder / f"{name}.jsonl", folder / f"{name}.json", kind
        self.settings = read_json_object(self.settings_file) if self.settings_file.exists() else {}
        self._waiting: list[T] = []
        self._written = time.monotonic()
        self.records, torn = parsed_lines(self.file, self._record)
        lines = len(self.records) + len(torn)
        if torn not in ([], [lines]):
            raise UserError(
                f"{self.file}, line {torn[0]} is no {kind.__name__.lower()}",
                hint="remove the file to have all written again",
            )
        if torn:
            self._write(self.records)

    def check(self, settings: dict[str, Any]) -> None:
        """Refuse settings other than those of the records that are there, and write them where there are none.

        Errors:
            UserError: names what differs.
        """
        if not self.records:
            self.settings = settings
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.settings_file, settings)
            self._write([])
        elif different := [key for key in settings if self.settings.get(key) != settings[key]]:
            key = different[0]
            raise UserError(
                f"{self.file} was written with {key} = {_short(self.settings.get(key))}, now it is "
                f"{_short(settings[key])}",
                hint=f"name another folder (--out) where that can be, or remove {self.file} to have all written again",
            )

    def __enter__(self) -> Records[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self._append()

    def add(self, record: T) -> None:
        """Add a record, in a `with` block, at whose end all are in the file; most are before."""
        self.records.append(record)
        self._waiting.append(record)
        if time.monotonic() - self._written > _WRITE_EVERY:
            self._append()

    def _append(self) -> None:
        with writing(self.file), self.file.open("a", encoding="utf-8") as opened:
            opened.write("".join(map(_line, self._waiting)))
        self._waiting, self._written = [], time.monotonic()

    def _write(self, records: Sequence[T]) -> None:
        with whole_file(self.file) as temporary:
            temporary.write_text("".join(map(_line, records)), encoding="utf-8")

    def _record(self, line: bytes) -> T:
        try:
            return from_json(self._kind, json.loads(line))
        except UserError as error:
            raise ValueError(str(error)) from error


def _line(record: Any) -> str:
    return json.dumps(dataclasses.asdict(record), ensure_ascii=False) + "\n"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
