"""Find the rows of an input embedding whose norm is far from the others', and give them a norm like the others'.

Released dense checkpoints have rows near zero, of tokens that their training never met. The first RMSNorm divides such
a row by its norm, so its gradient is as many times too large, and continued training diverges once the data have the
token.

Axes: v words, d channels, n rows that are outliers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemotron_h.checkpoint.reader import WeightFile

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
#: ours: times the median norm; the weight decay of a whole training shrinks a row that is never met by less
FAR = 1000.0
_NAMED = 8  # rows that a message lists


@dataclass(frozen=True)
class Outliers:
    """State which rows are far from the others.

    Attributes:
        norms: id of the token -> L2 norm of its row.
        median: norm of all rows.
    """

    norms: dict[int, float]
    median: float

    def described(self, token: Callable[[int], str]) -> str:
        """Return ids, tokens and norms in one line.

        Args:
            token: its text, by the id.
        """
        rows = [f"{number} {token(number)!r} {norm:.1e}" for number, norm in list(self.norms.items())[:_NAMED]]
        more = f" and {len(self.norms) - _NAMED} more" if len(self.norms) > _NAMED else ""
        return f"{', '.join(rows)}{more} (the median is {self.median:.1e})"

    def record(self, repaired: bool) -> dict[str, Any]:
        """Return what a run's record tells of the rows; empty where none is an outlier."""
        if not self.norms:
            return {}
        norms = {str(number): norm for number, norm in self.norms.items()}
        return {"embedding_rows": {"outliers": norms, "median": self.median, "repaired": repaired}}


def find_outliers(embedding: Tensor, words: int) -> Outliers:
    """Return the rows of an embedding [v, d] whose norm is 1,000 times below or above the median.

    Args:
        words: of the vocabulary; rows behind them are padding.
    """
    norms = torch.linalg.vector_norm(embedding[:words], dim=1, dtype=torch.float32)
    median = norms.median()
    far = ((norms * FAR < median) | (norms > median * FAR)).nonzero().flatten()
    return Outliers(dict(zip(far.tolist(), norms[far].tolist(), strict=True)), float(median))


def replacements(outliers: Outliers, head: Tensor) -> Tensor:
    """Return new rows [n, d]: the direction of the token's row in the output layer [v, d], at the median norm.

    A token whose row there is an outlier too gets a random direction, the same on every rank.
    """
    ids = torch.tensor(list(outliers.norms), dtype=torch.long)
    rows, norms = head[ids].float(), torch.linalg.vector_norm(head, dim=1, dtype=torch.float32)
    noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))
    rows = torch.where((norms[ids] * FAR < norms.median())[:, None], noise, rows)
    return torch.nn.functional.normalize(rows, dim=1) * outliers.median


def read_outliers(file: WeightFile, words: int) -> Outliers:
    """Return the outliers of a checkpoint's embedding; errors as of `WeightFile.read`."""
    return find_outliers(_read(file, EMBEDDING), words)


def read_replacements(file: WeightFile, outliers: Outliers) -> Tensor:
    """Return the new rows by a checkpoint's output layer; errors as of `WeightFile.read`."""
    return replacements(outliers, _read(file, HEAD))


def _read(file: WeightFile, name: str) -> Tensor:
    weight = torch.empty(file.shapes.get(name, (0,)), dtype=file.dtypes.get(name))
    file.read({name: weight})
    return weight
