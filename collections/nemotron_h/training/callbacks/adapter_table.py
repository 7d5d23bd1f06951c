"""Print what an adapter trains before the model is built."""

from __future__ import annotations

import lightning.pytorch as pl
from rich.console import Console
from rich.table import Table

from nemotron_h.architecture.adapters import coverage, trained_parameters
from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.schema.recipe import AdapterSchema


def summary(adapter: AdapterSchema, definition: ModelDefinition) -> str:
    """Return a summary on one line."""
    total = trained_parameters(adapter, definition)
    return (
        f"{adapter.kind}, rank {adapter.rank}, alpha {adapter.alpha:g}: trains {total:,} parameters beside "
        f"{definition.parameters:,} frozen ones ({total / definition.parameters:.2%})"
    )


def as_table(adapter: AdapterSchema, definition: ModelDefinition) -> Table:
    """Return a row per matrix of the layers, those without adapters too."""
    total = trained_parameters(adapter, definition)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading, justify in (
        ("layers", "left"),
        ("matrix", "left"),
        ("adapted", "right"),
        ("trained", "right"),
        ("of its weights", "right"),
        ("share of all", "right"),
    ):
        table.add_column(heading, justify=justify, no_wrap=True)
    for row in coverage(adapter, definition):
        adapted = row.layers if row.trained else 0
        table.add_row(
            row.layer_type,
            row.target,
            f"{adapted} of {row.layers}",
            f"{row.trained:,}",
            f"{row.trained / row.weights:.2%}",
            f"{row.trained / total:.1%}",
        )
    return table


class AdapterTable(pl.Callback):
    """Print which matrices have adapters, in how many layers, and what share is trained."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Print the table before the model is built."""
        adapter, definition = pl_module.config.adapter, pl_module.config.definition()
        if adapter is not None and trainer.is_global_zero:
            # a row stays one line, in a log file too
            console = Console(width=max(Console().width, 120), highlight=False)
            console.print(summary(adapter, definition), as_table(adapter, definition), sep="\n")
