"""The GGUF file format, version 3 (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): a head of values and of
the tensors' places, then the tensors, written one at a time.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import torch
from torch import Tensor

Value = bool | int | float | str | Sequence[int] | Sequence[str]

ALIGNMENT = 32
BLOCK = 32  # numbers that share a scale in q8_0
_MAGIC, _VERSION = b"GGUF", 3
#: codes of the values' types
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9


@dataclass(frozen=True)
class TensorType:
    """Layout of a tensor's numbers in the file.

    Attributes:
        code: the format's number of the type.
        file_code: the format's number for a file whose matrices are of the type.
        block: numbers that lie together.
        block_bytes: bytes of them.
        torch_dtype: of the numbers before they are written.
    """

    code: int
    file_code: int
    block: int
    block_bytes: int
    torch_dtype: torch.dtype


F32 = TensorType(0, 0, 1, 4, torch.float32)
F16 = TensorType(1, 1, 1, 2, torch.float16)
BF16 = TensorType(30, 32, 1, 2, torch.bfloat16)
Q8_0 = TensorType(8, 7, BLOCK, BLOCK + 2, torch.float32)


@dataclass(frozen=True)
class TensorEntry:
    """A tensor's place in the file. Its shape is PyTorch's; the file names the axes in the other order."""

    name: str
    shape: tuple[int, ...]
    type: TensorType

    @property
    def size(self) -> int:
        """Return the bytes, without what aligns the next tensor."""
        return torch.Size(self.shape).numel() // self.type.block * self.type.block_bytes


def aligned(size: int) -> int:
    """Return the next place where a tensor may begin."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def head(values: Mapping[str, Value], tensors: Sequence[TensorEntry]) -> bytes:
    """Return the bytes before the first tensor's."""
    parts = [_MAGIC, struct.pack("<IQQ", _VERSION, len(tensors), len(values))]
    for key, value in values.items():
        parts += [_string(key), *_value(key, value)]
    offset = 0
    for entry in tensors:
        axes = tuple(reversed(entry.shape))
        parts += [_string(entry.name), struct.pack(f"<I{len(axes)}QIQ", len(axes), *axes, entry.type.code, offset)]
        offset += aligned(entry.size)
    written = b"".join(parts)
    return written + bytes(aligned(len(written)) - len(written))


def write_tensor(file: BinaryIO, entry: TensorEntry, tensor: Tensor) -> None:
    """Write the bytes of the next tensor, and what aligns the one after it."""
    if tuple(tensor.shape) != entry.shape:
        raise ValueError(f"{entry.name} is {tuple(tensor.shape)}, planned as {entry.shape}")
    content = _q8_0(tensor) if entry.type is Q8_0 else tensor.to(entry.type.torch_dtype).contiguous()
    # NumPy knows no bfloat16; bytes it does
    file.write(content.view(torch.uint8).numpy().data)
    file.write(bytes(aligned(entry.size) - entry.size))


def _q8_0(tensor: Tensor) -> Tensor:
    """Quantise blocks of 32 numbers of a row: a float16 scale, then 32 int8. The largest of a block becomes 127."""
    blocks = tensor.float().reshape(-1, BLOCK)
    scale = blocks.abs().amax(dim=1, keepdim=True) / 127
    inverse = torch.where(scale > 0, 1 / scale, 0)
    scaled = blocks * inverse
    # away from zero at a half, as llama.cpp rounds
    numbers = (scaled.sign() * (scaled.abs() + 0.5).floor()).to(torch.int8)
    return torch.cat([scale.half().view(torch.uint8), numbers.view(torch.uint8)], dim=1)


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _value(key: str, value: Value) -> list[bytes]:
    """Return a value's type and bytes; integers are unsigned alone and signed in lists, as llama.cpp reads them."""
    if isinstance(value, bool):
        return [struct.pack("<I?", _BOOL, value)]
    if isinstance(value, int):
        return [struct.pack("<II", _UINT32, value)]
    if isinstance(value, float):
        return [struct.pack("<If", _FLOAT32, value)]
    if isinstance(value, str):
        return [struct.pack("<I", _STRING), _string(value)]
    start = struct.pack("<I", _ARRAY)
    if value and all(isinstance(item, str) for item in value):
        return [start, struct.pack("<IQ", _STRING, len(value)), *map(_string, value)]
    if value and all(isinstance(item, int) for item in value):
        return [start, struct.pack("<IQ", _INT32, len(value)), struct.pack(f"<{len(value)}i", *value)]
    raise TypeError(f"{key}: {value!r} has no form in GGUF")
