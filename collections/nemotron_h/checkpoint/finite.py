"""Refuse weights and scores that hold NaN or infinity: nothing that is computed with them means anything."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from nemotron_h.core.errors import UserError

_NAMED = 5  # tensors that an error lists


def check_weights(tensors: Mapping[str, Tensor], origin: str) -> None:
    """Refuse weights of which some number is NaN or infinite.

    Args:
        tensors: by the names to tell.
        origin: the checkpoint or folder that they were read from.
    Errors:
        UserError: names the tensors.
    """
    wrong = [name for name, tensor in tensors.items() if not _is_finite(tensor)]
    if wrong:
        more = f" and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
        raise UserError(
            f"{origin}: NaN or infinite weights in {', '.join(wrong[:_NAMED])}{more}",
            hint="the training that wrote them diverged: use an earlier checkpoint",
        )


def check_scores(logits: Tensor) -> None:
    """Refuse scores of the next token, [..., tokens], of which one is NaN or the largest is infinite.

    Errors:
        UserError: the weights are finite (`check_weights`), so activations overflowed.
    """
    if not logits.amax(-1).isfinite().all():  # NaN where any score is
        raise UserError(
            "the model's scores of the next token are not finite: its activations overflow",
            hint="try --dtype float32, or an earlier checkpoint",
        )


def _is_finite(tensor: Tensor) -> bool:
    """Tell whether all numbers are finite, in one pass without memory of its own."""
    low, high = tensor.aminmax()  # both are NaN where any number is
    return bool((low.isfinite() & high.isfinite()).item())
