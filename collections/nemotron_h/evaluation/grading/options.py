"""Options of multiple-choice questions: the right one of a record, and the one that a model finds likeliest."""

from __future__ import annotations

import string
from collections.abc import Sequence

LETTERS = string.ascii_uppercase


def option_of(key: str, labels: Sequence[str]) -> int:
    """Return the number, from 0, of the option that a key names.

    ARC's records have the labels A to E or 1 to 5, and three to five of them; all are shown as letters.

    Errors:
        ValueError: no label is the key.
    """
    return [label.strip() for label in labels].index(key.strip())


def likeliest(nats: Sequence[float], texts: Sequence[str] | None = None) -> int:
    """Return the number of the option whose text is the likeliest, the first of equal ones.

    Args:
        nats: the negative log-likelihood of each.
        texts: of the options: the log-likelihood is divided by their characters, as lm-evaluation-harness' acc_norm
            does; None leaves it whole (acc).
    """
    lengths = [max(1, len(text)) for text in texts] if texts else [1] * len(nats)
    scores = [loss / length for loss, length in zip(nats, lengths, strict=True)]
    return scores.index(min(scores))
