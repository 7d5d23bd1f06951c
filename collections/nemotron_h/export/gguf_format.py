"""A GGUF file by llama.cpp's own package `gguf`: first a head of values and of the tensors' places, then the tensors,
one at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, GGUFWriter, LlamaFileType, quants
from torch import Tensor

Value = bool | int | float | str | list[int] | list[str]


@dataclass(frozen=True)
class TensorType:
    """Layout of a tensor's numbers in the file.

    Attributes:
        code: the format's number of the type.
        file_code: the format's number for a file whose matrices are of the type.
    """

    code: GGMLQuantizationType
    file_code: LlamaFileType

    @property
    def block(self) -> int:
        """Numbers of a row that lie together."""
        return GGML_QUANT_SIZES[self.code][0]


F32 = TensorType(GGMLQuantizationType.F32, LlamaFileType.ALL_F32)
F16 = TensorType(GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16)
BF16 = TensorType(GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16)
Q8_0 = TensorType(GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0)


@dataclass(frozen=True)
class TensorEntry:
    """A tensor's place in the file. Its shape is PyTorch's; the file names the axes in the other order."""

    name: str
    shape: tuple[int, ...]
    type: TensorType

    @property
    def size(self) -> int:
        """Bytes, without what aligns the next tensor."""
        numbers, size = GGML_QUANT_SIZES[self.type.code]
        return prod(self.shape) // numbers * size


def begin(path: Path, values: Mapping[str, Value], tensors: Sequence[TensorEntry]) -> GGUFWriter:
    """Write everything before the first tensor's bytes; the tensors follow in this order, by `write_tensor_data`.

    Args:
        path: the file to write.
        values: `general.architecture` and all others. Whole numbers are unsigned where alone and signed in lists, as
            llama.cpp reads them.
    """
    writer = GGUFWriter(path, str(values["general.architecture"]))
    for key, value in values.items():
        alone = isinstance(value, int) and not isinstance(value, bool)
        kind = GGUFValueType.UINT32 if alone else GGUFValueType.get_type(value)
        if key != "general.architecture":  # the writer's own first
            writer.add_key_value(key, value, kind)
    for entry in tensors:
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), entry.size, entry.type.code)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return writer


def numbers_of(tensor: Tensor, kind: TensorType) -> np.ndarray:
    """Return a tensor's bytes in a file."""
    if kind is BF16:  # NumPy knows no bfloat16; bytes it does
        return tensor.bfloat16().contiguous().view(torch.uint8).numpy()
    return quants.quantize(tensor.float().contiguous().numpy(), kind.code)
