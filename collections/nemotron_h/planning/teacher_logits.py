"""Size and dtypes of a teacher's logits on disk, per token. Pure arithmetic."""

from __future__ import annotations

VALUE_BYTES = {"float32": 4, "bfloat16": 2}


def ids_dtype(vocabulary: int) -> str:
    """Return the integer dtype that token numbers are kept in."""
    return "uint16" if vocabulary <= 1 << 16 else "int32"


def value_dtype(precision: str) -> str:
    """Return the dtype of a run's logits, kept as they are, so that a run from the cache is the run without it."""
    return "float32" if precision == "fp32" else "bfloat16"


def token_bytes(top_k: int | None, vocabulary: int, precision: str) -> int:
    """Return the bytes on disk of one token: logits, token numbers, and their log-sum-exp in float32."""
    value = VALUE_BYTES[value_dtype(precision)]
    if top_k is None:
        return vocabulary * value + 4
    return top_k * (value + (2 if ids_dtype(vocabulary) == "uint16" else 4)) + 4
