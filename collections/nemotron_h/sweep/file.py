"""Read a sweep file: axes, and the combinations of their values."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from nemotron_h.core.errors import UserError
from nemotron_h.core.strict import check_folder, check_name, is_name, nearest, typed
from nemotron_h.core.strict_yaml import read_config
from nemotron_h.recipe.compose import configs_dir, recipes_dir
from nemotron_h.recipe.overrides import is_of_recipe, recipe_keys
from nemotron_h.schema.sweep import MEASURED, TOKENS_SEEN, SweepSchema

SEED, RUN = "seed", "run"
#: recipe keys that a sweep sets itself, and what says them
OWN = {"name": "the name of a point", "log.dir": "`dir`", "overrides": "the keys of a recipe", "stage": "the recipe"}
SEEDS = ("init_seed", "data.seed")
#: ours: no reader sees through more
MOST_POINTS = 10_000


@dataclass(frozen=True)
class Option:
    """A value of an axis: how tables and folders call it, and the recipe keys that it sets."""

    label: Any
    settings: dict[str, Any]


@dataclass(frozen=True)
class Axis:
    """Options of which each point of a sweep has one; `name` is a recipe key, or a name of the file's own."""

    name: str
    options: tuple[Option, ...]

    def part(self, option: Option) -> str:
        """Return what an option adds to the names of its points."""
        if isinstance(option.label, str):
            return slug(option.label)
        return slug(f"{self.name.split('.')[-1]}-{json.dumps(option.label)}")


@dataclass(frozen=True)
class SweepFile:
    """A sweep as its file has it, and the axes of its points."""

    path: Path
    schema: SweepSchema
    axes: tuple[Axis, ...]

    @property
    def name(self) -> str:
        """Return the name of the sweep and of its folder."""
        return self.path.stem

    @property
    def folder(self) -> Path:
        """Return the folder of runs and results."""
        return Path(self.schema.dir) / self.name

    def combinations(self) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
        """Yield the name, the labels by axis and the swept keys of every point, in the order of the file."""
        for options in itertools.product(*(axis.options for axis in self.axes)):
            chosen = list(zip(self.axes, options, strict=True))
            labels = {axis.name: option.label for axis, option in chosen}
            swept = {key: value for _, option in chosen for key, value in option.settings.items()}
            yield "_".join(axis.part(option) for axis, option in chosen) or "run", labels, swept


def locate(name_or_path: str) -> Path:
    """Return the file of a sweep: a shipped one by its name, or a path.

    Errors:
        UserError: there is none.
    """
    path, shipped = Path(name_or_path).expanduser(), recipes_dir() / "sweeps"
    if path.suffix not in (".yaml", ".yml"):
        path = shipped / f"{name_or_path}.yaml"
    if not path.is_file():
        known = sorted(file.stem for file in shipped.glob("*.yaml"))
        raise UserError(
            f"there is no sweep {name_or_path}",
            hint=f"{nearest(name_or_path, known)}Shipped: {', '.join(known)}; or give the path of a YAML file.",
        )
    return path


def read_sweep(path: Path) -> SweepFile:
    """Read a sweep file.

    Errors:
        UserError: names the file and every key that is wrong.
    """
    schema = typed(SweepSchema, read_config(path), str(path))
    check_name("", path.stem, f"{path}: the file's name ")
    check_folder("dir", schema.dir, f"{path}: ")
    problems: list[str] = []
    axes = [] if not schema.runs else [_axis(RUN, schema.runs, problems)]
    axes += [_axis(name, values, problems) for name, values in schema.grid.items()]
    if schema.seeds:
        axes.append(Axis(SEED, tuple(Option(seed, dict.fromkeys(SEEDS, seed)) for seed in schema.seeds)))
    sweep = SweepFile(path, schema, tuple(axes))
    _check(sweep, problems)
    complain(path, problems)
    return sweep


def complain(path: Path, problems: list[str]) -> None:
    """Raise one error with all problems of a sweep file, if there are any."""
    problems = list(dict.fromkeys(problems))
    if len(problems) == 1:
        raise UserError(f"{path}: {problems[0]}")
    if problems:
        raise UserError(f"{path}: {len(problems)} mistakes:\n" + "\n".join(f"  {problem}" for problem in problems))


def slug(text: str) -> str:
    """Return a text as a part of a folder's name; one that loses letters gets some of its hash: names differ."""
    short = re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-._")[:60]
    return short if short == text else f"{short or 'x'}-{hashlib.sha256(text.encode()).hexdigest()[:4]}"


def _axis(name: str, values: Any, problems: list[str]) -> Axis:
    values = OmegaConf.to_container(values) if OmegaConf.is_config(values) else values
    where = "runs" if name == RUN else f"grid.{name}"
    if not isinstance(values, list) or not values:
        problems.append(f"{where} = {values!r} is no list of values")
        return Axis(name, ())
    options = []
    for value in values:
        if isinstance(value, Mapping):
            settings = {key: entry for key, entry in value.items() if key != "name"}
            label = value.get("name", " ".join(f"{key.split('.')[-1]}={_text(v)}" for key, v in settings.items()))
            if "name" in value and not is_name(str(label)):
                problems.append(f"{where}: name = {label!r} is no name: letters, digits, _ . -")
            options.append(Option(label, settings))
        elif name == RUN:
            problems.append(f"runs has {value!r}, which is no mapping of recipe keys: write {{optim.peak_lr: 1e-3}}")
        else:
            options.append(Option(value if isinstance(value, str | int | float) else _text(value), {name: value}))
    return Axis(name, tuple(options))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _check(sweep: SweepFile, problems: list[str]) -> None:
    """Note keys that no recipe has, that are set twice or by the sweep itself, and values that are there twice."""
    schema = sweep.schema
    of_axes = [(axis, key) for axis in sweep.axes for key in {k: None for o in axis.options for k in o.settings}]
    for where, key in [("settings", key) for key in schema.settings] + [(_place(axis), key) for axis, key in of_axes]:
        problem = _problem(key, bool(schema.seeds) and where != SEED)
        if problem:
            problems.append(f"{where}: {problem}" if where != SEED else problem)
    setters: dict[str, str] = {}
    for axis, key in of_axes:
        if setters.setdefault(key, axis.name) != axis.name:
            problems.append(f"{key} is set by {setters[key]} and {axis.name}: keep one")
    for axis in sweep.axes:
        labels = [axis.part(option) for option in axis.options]
        problems += [f"{_place(axis)} has {label} twice" for label in {x: None for x in labels if labels.count(x) > 1}]
        if axis.name in (*MEASURED, TOKENS_SEEN) and not is_of_recipe(axis.name):
            problems.append(f"{_place(axis)}: {axis.name} is a column of what is measured: take another name")
    count = 1
    for axis in sweep.axes:
        count *= max(1, len(axis.options))
    if count > MOST_POINTS:
        problems.append(f"{count:,} points are more than {MOST_POINTS:,}: take a smaller grid")


def _place(axis: Axis) -> str:
    return {RUN: "runs", SEED: SEED}.get(axis.name, f"grid.{axis.name}")


def _problem(key: str, seeds: bool) -> str:
    """Return what is wrong with a recipe key of a sweep, or an empty text."""
    if key in OWN:
        return f"{key} is no key to sweep: {OWN[key]} says it"
    if seeds and key in SEEDS:
        return f"{key} is set by `seeds` too: keep one"
    if is_of_recipe(key) or (configs_dir() / key).is_dir():
        return ""
    return f"unknown recipe key {key}. {nearest(key, recipe_keys())}Keys of a recipe: docs/recipes.md".strip()
