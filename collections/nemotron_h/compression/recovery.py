"""Tell how much of the loss that pruning cost a distillation brought back (as the paper's 3.4 with accuracies)."""

from __future__ import annotations

#: ours: a cost below this share of the parent's loss is mostly the text's noise
LEAST_COST = 2e-3


def recovered(parent: float, pruned: float, child: float) -> float | None:
    """Return the share of pruned - parent that the child no longer has; None where pruning cost nothing.

    Args:
        parent, pruned, child: losses on the same text, in nats per token.
    """
    return (pruned - child) / (pruned - parent) if pruned > parent else None


def sentence(parent: float, pruned: float, child: float) -> str:
    """Return the same in words, which say where the share means little."""
    share, cost = recovered(parent, pruned, child), (pruned - parent) / parent
    if share is None:
        return "pruning cost nothing on this text, so there was nothing to recover"
    said = f"{share:.1%} of the gap recovered"
    if cost >= LEAST_COST:
        return said
    return (
        f"{said}, of a gap of {cost:.2%} of the loss, which is too small to tell: train the parent longer, or cut more"
    )
