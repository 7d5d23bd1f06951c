"""Law of shape with a term for each kind of layer, at one number of parameters and tokens.

    log L = level + aspect x + aspect2 x^2 + sum over kinds of term * share,    x = log(hidden size / layers)

A kind's share is that of the parameters of all layers; FFNs have what is left and no term of their own. The law says
which shape is better, not what more parameters or tokens bring.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.core.strict_yaml import read_yaml
from nemotron_h.laws.fits import Coefficients, Fit, Row, fit_law
from nemotron_h.recipe.compose import configs_dir

#: kinds with a term
TERMS = ("mamba", "attention")
COLUMNS = ("hidden_size", "layers", "ffn")
NAMES = ("level", "aspect", "aspect2", *TERMS)


def shape_row(definition: ModelDefinition, tokens: float) -> dict[str, float]:
    """Return what laws read of a model: parameters, tokens, hidden size, layers, and the parameters of each kind."""
    kinds: dict[str, float] = dict.fromkeys(definition.layer_counts(), 0)
    for block in definition.blocks:
        kinds[block.name] += block.parameters
    sizes = {"parameters": definition.parameters, "tokens": tokens, "hidden_size": definition.hidden_size}
    return {**sizes, "layers": definition.num_layers, **kinds}


def hybrid_runs(file: Path | None = None) -> list[dict[str, Any]]:
    """Return our own runs as rows with the columns of `configs/laws/hybrid_tiny.yaml` and `layers`."""
    content = read_yaml(file or configs_dir() / "laws" / "hybrid_tiny.yaml")
    rows = [dict(zip(content["columns"], values, strict=True)) for values in content["runs"]]
    return [{**row, "layers": len(row["pattern"])} for row in rows]


def features(row: Row) -> list[float]:
    """Return what each coefficient is multiplied by."""
    aspect = math.log(row["hidden_size"] / row["layers"])
    whole = sum(row[kind] for kind in (*TERMS, "ffn"))
    return [1.0, aspect, aspect**2, *(row[kind] / whole for kind in TERMS)]


def hybrid_loss(c: Coefficients, row: Row) -> float:
    """Return the law's loss."""
    return math.exp(sum(c[name] * value for name, value in zip(NAMES, features(row), strict=True)))


def fit_hybrids(rows: Sequence[Row]) -> Fit:
    """Return the law fitted to rows of `shape_row` with their `loss`, by least squares of its logarithm.

    Errors:
        UserError: as of `fit_law`.
    """

    def solve(some: Sequence[Row], _: Coefficients | None) -> Coefficients:
        solved, *_ = np.linalg.lstsq(
            np.array([features(row) for row in some]), np.log([row["loss"] for row in some]), None
        )
        return dict(zip(NAMES, map(float, solved), strict=True))

    return fit_law("hybrid", rows, COLUMNS, solve, hybrid_loss, len(NAMES))
