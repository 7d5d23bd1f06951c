"""Fits over the rows of a sweep: plug-ins by name, tried before the first run.

A fit is a function of rows, each a mapping with `parameters`, `tokens`, `flops`, `loss` and the swept keys; its result
says itself in words (`str`). It refuses too few points with a `UserError`. `laws/fits.py` has them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from nemotron_h.core.errors import UserError
from nemotron_h.core.strict import nearest
from nemotron_h.laws.fits import FITS
from nemotron_h.schema.sweep import FitSchema

Row = dict[str, Any]


def problem(fit: FitSchema, rows: Sequence[Row]) -> str:
    """Return why a fit could not be made of a sweep, or an empty text.

    Args:
        rows: planned, without losses: the fit is tried on losses that fall with the operations of a run.
    """
    if fit.name not in FITS:
        return f"fits: there is no fit {fit.name!r}. {nearest(fit.name, FITS)}Known: {', '.join(sorted(FITS))}"
    columns = {key: None for row in rows for key in row} | {"loss": None}
    for key in (*fit.columns.values(), *([fit.line] if fit.line else [])):
        if key not in columns:
            return f"fits: {fit.name}: there is no column {key!r}. {nearest(key, columns)}Columns: {', '.join(columns)}"
    tried = [{**row, "loss": 1 + (row["flops"] / 1e9) ** -0.1} for row in rows]
    try:
        for _ in fitted(fit, tried):
            pass
    except UserError as error:
        return f"fits: {fit.name}: {error.message}. {error.hint}".rstrip(" .")
    return ""


def fitted(fit: FitSchema, rows: Sequence[Row]) -> Iterator[tuple[str, Any]]:
    """Yield the title and the result of a fit, for each value of its `line`.

    Errors:
        UserError: as of the fit.
    """
    values = dict.fromkeys(row.get(fit.line) for row in rows) if fit.line else {None: None}
    for value in values:
        chosen = [row for row in rows if fit.line is None or row.get(fit.line) == value]
        named = [{**row, **{name: row[column] for name, column in fit.columns.items()}} for row in chosen]
        title = fit.name if fit.line is None else f"{fit.name}, {fit.line} = {value}"
        yield title, FITS[fit.name](named)
