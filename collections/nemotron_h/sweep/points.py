"""The points of a sweep: a composed and checked recipe each, before the first of them starts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron_h.core.errors import UserError
from nemotron_h.core.files import read_json_object
from nemotron_h.core.strict import is_name
from nemotron_h.core.units import count_of
from nemotron_h.data.blend import load_blend
from nemotron_h.data.manifest import check_manifest
from nemotron_h.data.phases import Horizon
from nemotron_h.launch.place import Place
from nemotron_h.launch.runs import Run
from nemotron_h.launch.several import check_same
from nemotron_h.planning.flops import flops_per_token
from nemotron_h.recipe.check import check_vocabulary
from nemotron_h.recipe.checks import definition_of
from nemotron_h.recipe.compose import changed, compose, configs_dir
from nemotron_h.schema.recipe import PIPELINES, RecipeConfig
from nemotron_h.sweep.file import SweepFile, complain

#: settings of a built run that would end it elsewhere than its recipe says
FIXED = ("trainer.max_steps", "log.explicit_log_dir")


@dataclass(frozen=True)
class Point:
    """A run of a sweep.

    Attributes:
        labels: axis -> value, as tables have it.
        swept: recipe key -> value, of its axes.
        run: with its whole recipe.
        steps, tokens, parameters, flops: of the whole run.
    """

    labels: dict[str, Any]
    swept: dict[str, Any]
    run: Run
    steps: int
    tokens: int
    parameters: int
    flops: float

    @property
    def name(self) -> str:
        """Return the name of the point and of its folder."""
        return self.run.name

    def is_finished(self) -> bool:
        """Tell whether the run's record says so."""
        record = self.run.folder / "run.json"
        if not record.is_file():
            return False
        content = read_json_object(record)
        return content.get("ended") == "finished" and content.get("step", 0) >= self.steps


def points_of(sweep: SweepFile, place: Place) -> list[Point]:
    """Compose and check every point.

    Errors:
        UserError: all that is wrong with them, each with the sweep's file; data that is not prepared; a folder that
            holds the run of another recipe.
    """
    bases: dict[tuple[str, ...], RecipeConfig] = {}
    problems: dict[str, list[str]] = {}
    points = []
    for name, labels, swept in sweep.combinations():
        try:
            points.append(_point(sweep, name, labels, swept, place, bases))
        except UserError as error:
            problems.setdefault(str(error).replace(f"{sweep.path}: ", "").replace("\n", "; "), []).append(name)
    complain(sweep.path, [f"{problem} ({_several(names)})" for problem, names in problems.items()])
    _check_data(points, str(sweep.path))
    hint = f"rename {sweep.path.name}, which names the sweep's folder; or remove that file and the run's folder"
    for point in points:
        check_same(point.run, hint)
    return points


def folder_of(points: Sequence[Point]) -> Path:
    """Return the folder of runs and results; that of a cluster's jobs is in its `work_dir`."""
    return Path(points[0].run.recipe.log.dir)


def others(points: Sequence[Point]) -> list[str]:
    """Return the runs in the sweep's folder that are no points of its file any more."""
    known = {point.name for point in points}
    return sorted(file.parent.name for file in folder_of(points).glob("*/run.json") if file.parent.name not in known)


def _point(
    sweep: SweepFile,
    name: str,
    labels: dict[str, Any],
    swept: dict[str, Any],
    place: Place,
    bases: dict[tuple[str, ...], RecipeConfig],
) -> Point:
    origin = str(sweep.path)
    if not is_name(name):
        raise UserError(f"{origin}: its name would be too long", hint="give values names: {name: wide, model...: ...}")
    settings = {**sweep.schema.settings, **swept}
    parts = tuple(f"{key}={value}" for key, value in settings.items() if (configs_dir() / key).is_dir())
    values = {key: value for key, value in settings.items() if not (configs_dir() / key).is_dir()}
    if parts not in bases:  # takes most of a second
        bases[parts] = compose(sweep.schema.recipe, parts)
    if bases[parts].stage in PIPELINES:
        raise UserError(f"{origin}: recipe = {sweep.schema.recipe} is of stage {bases[parts].stage}, which is no run")
    if fixed := [setting for setting in bases[parts].overrides if setting.startswith(FIXED)]:
        raise UserError(
            f"{origin}: {sweep.schema.recipe}: overrides has {fixed[0]}", hint="the sweep says that: leave it out"
        )
    recipe = changed(bases[parts], {**values, "name": name, "log.dir": str(sweep.folder)}, origin)
    place.check(recipe, origin)
    recipe = place.moved(recipe)
    definition, data = definition_of(recipe, origin), recipe.data
    per_step = data.seq_length * data.global_batch_size
    steps = Horizon(count_of(recipe.tokens, "tokens", origin), per_step).steps
    flops = flops_per_token(definition, data.seq_length, adapter=recipe.adapter, micro_batch=data.micro_batch_size)
    tokens = steps * per_step
    return Point(labels, swept, Run(name, recipe), steps, tokens, definition.parameters, flops.total * tokens)


def _several(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"point {shown}" if len(names) == 1 else f"points {shown}{f', {len(names) - 3} more' if names[3:] else ''}"


def _check_data(points: list[Point], origin: str) -> None:
    """Refuse data that is not prepared, or has another vocabulary; each blend is read once."""
    seen = set()
    for recipe in (point.run.recipe for point in points):
        key = recipe.data.root, recipe.data.blend, recipe.model.vocab_size
        if key not in seen:
            seen.add(key)
            blend = load_blend(recipe.data.blend)
            check_manifest(recipe.data.root, blend)
            check_vocabulary(recipe, blend, origin)


def planned_row(point: Point) -> dict[str, Any]:
    """Return what a row of the table has of a point before it runs."""
    values = {**point.swept, **point.labels}
    plain = {key: v if isinstance(v, str | int | float) else json.dumps(v) for key, v in values.items()}
    return {"point": point.name, **plain, **{key: getattr(point, key) for key in ("parameters", "tokens", "flops")}}
