"""Read what Weights & Biases writes offline: a log of records in blocks (the format of LevelDB's logs)."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HEADER, BLOCK, WHOLE, LAST = 7, 32768, 1, 4


def records(file: Path) -> Iterator[Any]:
    """Yield the records of a `.wandb` file."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, record = file.read_bytes(), HEADER, b""
    while place + HEADER <= len(data):
        left = BLOCK - place % BLOCK
        if left < HEADER:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        record += data[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind in (WHOLE, LAST):
            yield Record.FromString(record)
            record = b""


def history(file: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics."""
    rows = (record.history.item for record in records(file) if record.HasField("history"))
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row} for row in rows]


def config(file: Path) -> dict[str, Any]:
    """Return the run's config, by first keys."""
    updates = (record.config.update for record in records(file) if record.HasField("config"))
    return {entry.key: json.loads(entry.value_json) for update in updates for entry in update}


def run(file: Path) -> Any:
    """Return the newest record of the run itself."""
    return [record.run for record in records(file) if record.HasField("run")][-1]
