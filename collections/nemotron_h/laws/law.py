"""A fitted law as a file: coefficients, what they were fitted to, and the range that this covers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.core.errors import UserError
from nemotron_h.core.strict import check_one_of, nearest, typed
from nemotron_h.core.strict_yaml import read_yaml
from nemotron_h.laws.fits import Formula
from nemotron_h.laws.hybrid import NAMES, hybrid_loss, shape_row
from nemotron_h.laws.morph import shape_loss
from nemotron_h.recipe.compose import configs_dir


def _pairs(row: Mapping[str, float]) -> dict[str, float]:
    """Return a row whose layers are pairs of attention and feed-forward, as the published runs count them."""
    return {**row, "layers": row["layers"] / 2}


@dataclass(frozen=True)
class Form:
    """Formula of a law.

    Attributes:
        coefficients: their names.
        formula: loss of a row of `shape_row`.
        counted: the row with layers as the formula counts them.
        of_size: parameters and tokens are in it; without, its losses are those of its runs' size.
    """

    coefficients: tuple[str, ...]
    formula: Formula
    counted: Callable[[Mapping[str, float]], Mapping[str, float]]
    of_size: bool


FORMS = {
    "morph": Form(("E", "A", "B", "alpha", "gamma"), shape_loss, _pairs, True),
    "hybrid": Form(NAMES, hybrid_loss, dict, False),
}


@dataclass
class Law:
    """Law of shape of a family.

    Attributes:
        form: of `FORMS`.
        fitted_to: models, sizes and data, in words.
        source: of runs and coefficients.
        families: of models that it is a law of.
        coefficients: by name.
        error: stated, of predictions of runs that it was not fitted to.
        aspect: least and largest hidden size over layers of the runs, as the form counts layers.
        columns, runs: that it was fitted to; `fits` of the form read them.
    """

    form: str = MISSING
    fitted_to: str = MISSING
    source: str = MISSING
    families: list[str] = field(default_factory=list)
    coefficients: dict[str, float] = field(default_factory=dict)
    error: str = MISSING
    aspect: list[float] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    runs: list[Any] = field(default_factory=list)

    def covers(self, definition: ModelDefinition) -> bool:
        """Tell whether the model's hidden size over layers is in the range of the runs."""
        row = FORMS[self.form].counted(shape_row(definition, 1))
        return self.aspect[0] <= row["hidden_size"] / row["layers"] <= self.aspect[1]

    def loss(self, definition: ModelDefinition, tokens: float) -> float:
        """Return the predicted loss of a model after so many tokens, or, of a form without size, of its shape."""
        form = FORMS[self.form]
        return form.formula(self.coefficients, form.counted(shape_row(definition, tokens)))

    def check_family(self, definition: ModelDefinition, origin: str) -> None:
        """Refuse a model of another family.

        Errors:
            UserError: names both.
        """
        if definition.family not in self.families:
            raise UserError(
                f"{origin} is a law of family {', '.join(self.families)}; {definition.name} is of {definition.family}",
                hint=f"name a law of {definition.family} with --law, or a model of {self.families[0]} with --like",
            )


def known_laws() -> list[str]:
    """Return the names of `configs/laws`."""
    return sorted(file.stem for file in (configs_dir() / "laws").glob("*.yaml"))


def law_named(name: str) -> tuple[Law, str]:
    """Return a law of `configs/laws` or of a file, and its file as errors name it.

    Errors:
        UserError: there is none, or a value is missing, unknown or impossible; names file and key.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = configs_dir() / "laws" / f"{name}.yaml"
        if name not in known_laws():
            hint = f"{nearest(name, known_laws())}Known: {', '.join(known_laws())} (configs/laws), or a YAML file."
            raise UserError(f"there is no law {name!r}", hint=hint)
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a mapping of keys", hint="see the files of configs/laws")
    law = typed(Law, content, str(path))
    check_one_of("form", law.form, FORMS, f"{path}: ")
    names = FORMS[law.form].coefficients
    if sorted(law.coefficients) != sorted(names):
        raise UserError(
            f"{path}: coefficients are {', '.join(law.coefficients) or 'missing'}", hint=f"give {', '.join(names)}"
        )
    if len(law.aspect) != 2 or not 0 < law.aspect[0] <= law.aspect[1] or not law.families:
        raise UserError(
            f"{path}: aspect = {law.aspect}, families = {law.families}",
            hint="give the least and the largest hidden size over layers, and the families that it is a law of",
        )
    return law, path.stem
