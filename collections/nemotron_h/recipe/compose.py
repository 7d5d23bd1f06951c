"""Compose a recipe: name or path and overrides in, a complete `RecipeConfig` out (Hydra's compose API)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import version
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.hydra import Hydra
from hydra._internal.sources_registry import SourcesRegistry
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemotron_h.architecture.definition import definition_from_dict
from nemotron_h.checkpoint.definition import is_path, read_model
from nemotron_h.core.errors import UserError
from nemotron_h.core.strict import check_interpolations, check_one_of, culprit, leaves, nearest, typed
from nemotron_h.core.strict_yaml import as_config, flat_lines, parse_settings, parse_yaml, read_bounded
from nemotron_h.recipe.checks import check
from nemotron_h.recipe.former_keys import FORMER, read_former, without_dropped
from nemotron_h.recipe.overrides import assigned, check_overrides, split, superseded
from nemotron_h.schema.recipe import PIPELINES, ExpectSchema, RecipeConfig
from nemotron_h.schema.vision import VisionSchema

SCHEMA_DEFAULT = "schema default"
OVERRIDE = "override"
#: begins an override that may add a part to a recipe, which others may only exchange
_ADDED = "vision="


def recipes_dir() -> Path:
    """Return the folder of the recipes that ship with the package."""
    return Path(str(files("nemotron_h.recipes")))


def configs_dir() -> Path:
    """Return the folder of what recipes are made of: `model/` and its neighbours."""
    return Path(str(files("nemotron_h.configs")))


def known_recipes(stage: str = "*") -> list[str]:
    """Return shipped recipes, without bases and sweeps: `<model>/<stage>` or `<model>/<stage>_<variant>`.

    Args:
        stage: of these alone; `*` is all.
    """
    root = recipes_dir()
    names = [str(path.relative_to(root).with_suffix("")) for path in root.glob("*/*.yaml")]
    return sorted(
        name for name in names if not name.startswith(("base/", "sweeps/")) and stage in ("*", stage_of(name))
    )


def known_encoders() -> list[str]:
    """Return the image encoders of `configs/vision`."""
    return sorted(file.stem for file in (configs_dir() / "vision").glob("*.yaml"))


def _encoder_file(name: str) -> Path:
    return configs_dir() / "vision" / f"{name}.yaml"


def read_encoder(name: str) -> VisionSchema:
    """Return an image encoder of `known_encoders`."""
    file = _encoder_file(name)
    return typed(VisionSchema, as_config(parse_yaml(read_bounded(file), str(file)), str(file)).vision, str(file))


def stage_of(recipe: str) -> str:
    """Return the stage of a shipped recipe, by its name."""
    return recipe.split("/")[1].split("_")[0]


def factory_of(recipe: str) -> str:
    """Return the `--factory` name of a shipped recipe: its model's, with what tells it from others of the command."""
    model, name = recipe.split("/")
    return f"{model}_{name}" if stage_of(recipe) == "preference" or "_" in name else model


@dataclass(frozen=True)
class Layer:
    """A file of the merge, in Hydra's order (later ones win).

    Attributes:
        file: the YAML file.
        package: the dotted key that its content is put under; empty at the top.
    """

    file: Path
    package: str


@dataclass(frozen=True)
class Origin:
    """Place in which a value was written: the layer's number in the merge, and the line.

    Attributes:
        rank: larger wins; -1 is the schema's default.
        file, line: None for the schema's default and for overrides. Lines count from 1.
    """

    rank: int
    file: Path | None = None
    line: int | None = None


DEFAULT = Origin(-1)


@dataclass(frozen=True)
class Composed:
    """A recipe and where its values come from.

    Attributes:
        recipe: complete and checked.
        layers: the files that it was merged from, in order.
        origins: dotted key -> where the value was written; absent where the schema's default stands.
        sources: dotted key of a value -> the source stated for it (`paper 2.4`), without those of replaced values.
    """

    recipe: RecipeConfig
    layers: list[Layer]
    origins: dict[str, Origin]
    sources: dict[str, str]


def compose(name_or_path: str, overrides: Sequence[str] = (), *, trains: bool = True) -> RecipeConfig:
    """Compose and check a recipe.

    Args:
        name_or_path: a shipped recipe (`nemotron_h_tiny/pretrain`, or `nemotron_h_tiny` for its pretraining), or the
            path of a YAML file.
        overrides: `optim.peak_lr=3e-4` sets a value, `optim.peak_lr*=2` changes it, `model=nemotron_h_8b` exchanges a
            part by name, `vision=internvit_300m` adds one. A recipe or an override may also give `model` as a path (see
            `checkpoint.definition`): a pruned child's checkpoint, or a YAML file.
        trains: False takes models too that can be planned and not trained.
    Returns:
        the recipe with every value set, checked by `check`. Its `sources` are those of the values that stand, its
        `overrides` what no key of it says.
    Errors:
        UserError: unknown recipe, key or group, wrong type, missing or impossible value.
    """
    return trace(name_or_path, overrides, trains=trains).recipe


def trace(name_or_path: str, overrides: Sequence[str] = (), *, trains: bool = True) -> Composed:
    """Compose and check a recipe as `compose` does, with where each value comes from."""
    directory, name, origin = locate(name_or_path)
    groups = {folder.name for folder in configs_dir().iterdir() if folder.is_dir()}
    stored = [override.split("=", 1)[1] for override in overrides if override.startswith("model=")]
    stored = [path for path in stored if is_path(path)]
    model = [f"model={path}" for path in stored]
    overrides = [override for override in overrides if override not in model]
    parts = [override for override in overrides if override.split("=")[0] in groups]
    values = [override for override in overrides if override not in parts]
    composed, layers, added = _merge(directory, name, parts, origin)
    if not stored and isinstance(composed.get("model"), str):
        stored = [composed.model]
    from_record: list[str] = []
    if stored:
        path = Path(stored[-1]).expanduser()
        OmegaConf.set_struct(composed, False)
        composed.model = read_model(path, origin)
        if path.is_file():
            layers.append(Layer(path, "model"))
        else:
            from_record = [f"model.{key}" for key, _ in leaves(OmegaConf.to_container(composed.model))]
    layers += [_add(composed, part, origin) for part in added]
    recipe, settled = _settled(_typed(RecipeConfig, composed, origin), origin)
    overridden: list[str] = []
    if values:
        given = parse_settings(assigned(values, recipe), "override")
        overridden = [key for key, _ in leaves(OmegaConf.to_container(given))]
    if recipe.overrides:
        exchanged = [part.split("=")[0] for part in (*parts, *model)]
        recipe.overrides = superseded(recipe.overrides, [*overridden, *exchanged])
    if values:
        _check_parts(recipe, overridden)
        recipe = _typed(recipe, given, "override")
    check(recipe, origin, trains)
    found = origins(layers, [*from_record, *settled, *overridden])
    sources = current_sources(dataclasses.asdict(recipe), found)
    recipe.sources = {key: text for key, text in sources.items() if not key.startswith("model.")}
    recipe.model.sources = {key[len("model.") :]: text for key, text in sources.items() if key.startswith("model.")}
    return Composed(recipe, layers, found, sources)


def _check_parts(recipe: RecipeConfig, overridden: Sequence[str]) -> None:
    """Refuse keys of a pipeline that the recipe is none of: such a part would lack values that it needs.

    Errors:
        UserError: names the key.
    """
    for key in overridden if "stage" not in overridden else ():
        if (part := key.split(".")[0]) in PIPELINES and getattr(recipe, part) is None:
            raise UserError(
                f"override: {key} is unused: stage is {recipe.stage}", hint=f"leave it out: it is for {part}"
            )


def changed(recipe: RecipeConfig, values: Mapping[str, Any], origin: str) -> RecipeConfig:
    """Return a composed recipe with other values, checked; a model whose keys change has its `expect` counted anew.

    Args:
        values: dotted key -> value, without parts that are exchanged by name.
        origin: to name in errors.
    Errors:
        UserError: unknown key, wrong type, missing or impossible value.
    """
    written = OmegaConf.create({})
    for key, value in values.items():
        OmegaConf.update(written, key, value)
    other = _typed(recipe, written, origin)
    other.overrides = superseded(other.overrides, values)
    other.sources = {key: text for key, text in other.sources.items() if key not in values}
    other.model.sources = {key: text for key, text in other.model.sources.items() if f"model.{key}" not in values}
    if any(key.startswith("model.") for key in values):
        definition = definition_from_dict(OmegaConf.to_container(OmegaConf.structured(other.model)), origin, count=True)
        other.model.expect = ExpectSchema(**dataclasses.asdict(definition.expect))
    check(other, origin)
    return other


def _typed(schema: type[RecipeConfig] | RecipeConfig, written: DictConfig, origin: str) -> RecipeConfig:
    """Return a recipe of what was written, as `typed` does; keys that recipes once had are left out."""
    return typed(schema, without_dropped(written, origin), origin)


def origins(layers: Sequence[Layer], overridden: Sequence[str]) -> dict[str, Origin]:
    """Return dotted key -> place in which the winning value was written; keys that no file writes are absent.

    Args:
        layers: the files in the order of the merge.
        overridden: dotted keys that the command line set.
    """
    found: dict[str, Origin] = {}
    for rank, layer in enumerate(layers):
        prefix = f"{layer.package}." if layer.package else ""
        for key, line in flat_lines(read_bounded(layer.file), str(layer.file)):
            if prefix or key.split(".")[0] not in ("defaults", "hydra"):
                found[FORMER.get(prefix + key, prefix + key)] = Origin(rank, layer.file, line)
    return found | {key: Origin(len(layers)) for key in overridden}


def current_sources(values: Mapping[str, Any], found: Mapping[str, Origin]) -> dict[str, str]:
    """Return dotted key of a value -> the source stated for it, without the stale ones.

    A source speaks of the value that its own file, or a file merged before it, gave: `paper 2.4` in a base says nothing
    about the value that a recipe puts in its place. One stated for a whole part (`optim`) speaks of that part's values
    in its own file that have no source of their own.

    Args:
        values: the recipe as nested containers; `sources` at its top and in its `model` are read.
        found: of `origins`.
    """
    stated = {key: (text, found.get(f"sources.{key}", DEFAULT).rank) for key, text in values["sources"].items()}
    for key, text in values["model"]["sources"].items():
        stated[f"model.{key}"] = (text, found.get(f"model.sources.{key}", DEFAULT).rank)
    current = {}
    for key, _ in leaves(values):
        rank = found.get(key, DEFAULT).rank
        if key in stated and stated[key][1] >= rank:
            current[key] = stated[key][0]
            continue
        parts = key.split(".")
        parents = (".".join(parts[:depth]) for depth in range(len(parts) - 1, 0, -1))
        of_part = next((stated[p][0] for p in parents if p in stated and stated[p][1] == rank), None)
        if of_part:
            current[key] = of_part
    return current


def to_yaml(recipe: Mapping[str, Any]) -> str:
    """Return a whole recipe (nested plain containers) as YAML that composes to the same recipe."""
    return yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True, width=float("inf"))


def names_model(setting: str) -> bool:
    """Tell whether a setting exchanges a recipe's model, `model=NAME` of `configs/model` or a path, or its encoder,
    `vision=NAME` of `configs/vision`.
    """
    key, _, value = setting.partition("=")
    if key == "vision":
        return value in known_encoders()
    return key == "model" and (is_path(value) or (configs_dir() / "model" / f"{value}.yaml").is_file())


def _settled(recipe: RecipeConfig, origin: str) -> tuple[RecipeConfig, list[str]]:
    """Return a recipe with those of its `overrides` in their places that set keys of it, and these keys."""
    if not recipe.overrides:
        return recipe, []
    check_overrides(recipe.overrides, origin)
    values, overrides = split(recipe.overrides)
    if not values:
        return recipe, []
    given = parse_settings(assigned(values, recipe), f"{origin}: overrides")
    recipe = _typed(recipe, given, f"{origin}: overrides")
    recipe.overrides = overrides
    return recipe, [key for key, _ in leaves(OmegaConf.to_container(given))]


def locate(name_or_path: str) -> tuple[Path, str, str]:
    """Return a recipe's folder and name for Hydra, and what to call it in errors.

    Errors:
        UserError: there is no such recipe or file.
    """
    path = Path(name_or_path).expanduser()
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UserError(f"there is no recipe file {path}")
        if path.suffix == ".yml":
            raise UserError(f"{path}: recipes end in .yaml", hint=f"rename it to {path.with_suffix('.yaml')}")
        return path.resolve().parent, path.stem, str(path)
    known = known_recipes()
    name = name_or_path if "/" in name_or_path else f"{name_or_path}/pretrain"
    if name not in known:
        raise UserError(
            f"there is no recipe {name_or_path!r}",
            hint=f"{nearest(name, known)}Known: {', '.join(known)}; or give the path of a YAML file.",
        )
    return recipes_dir(), name, f"recipe {name_or_path}"


class _RecipeFiles(FileConfigSource):
    """A folder of recipes for Hydra, whose files are read as strictly as every other one (`strict_yaml`)."""

    @staticmethod
    def scheme() -> str:
        """Return what a search path of these begins with."""
        return "recipe"

    def load_config(self, config_path: str) -> ConfigResult:
        """Return a file's content.

        Errors:
            UserError: it is not readable YAML, sets Hydra itself, or has defaults that are no list.
        """
        file = Path(self.path, self._normalize_file_name(config_path))
        text = read_bounded(file)
        config = as_config(parse_yaml(text, str(file)), str(file))
        if "hydra" in config:
            raise UserError(f"{file}: unknown key hydra", hint="a recipe sets the keys of docs/recipes.md alone")
        _check_defaults(config.get("defaults"), file)
        read_former(config, str(file))
        return ConfigResult(config=config, path=self.path, provider=self.provider, header=self._get_header_dict(text))


def _check_defaults(defaults: Any, file: Path) -> None:
    """Refuse defaults other than `- name`, `- group: name`."""
    listed = [] if defaults is None else OmegaConf.to_container(defaults) if OmegaConf.is_list(defaults) else [defaults]
    for entry in listed:
        pair = next(iter(entry.items())) if isinstance(entry, dict) and len(entry) == 1 else ("", entry)
        if not OmegaConf.is_list(defaults) or not isinstance(pair[1], str):
            raise UserError(
                f"{file}: defaults has {entry!r}", hint="write a list: [/base/pretrain, /model: nemotron_h_8b, _self_]"
            )


def _merge(directory: Path, name: str, parts: Sequence[str], origin: str) -> tuple[DictConfig, list[Layer], list[str]]:
    """Merge a recipe with what its defaults list names; return the files that took part, in order, and those of `parts`
    that are still to be added.
    """
    SourcesRegistry.instance().register(_RecipeFiles)
    folders = [directory, recipes_dir(), configs_dir()]
    GlobalHydra.instance().clear()
    version.setbase("1.3")
    try:
        search = create_config_search_path(f"recipe://{directory}")
        for folder in reversed(folders[1:]):  # each directly behind the recipe's own
            search.append("nemotron_h", f"recipe://{folder}", SearchPathQuery(provider="main"))
        Hydra.create_main_hydra2("recipe", search)
        loader = GlobalHydra.instance().config_loader()
        added = [part for part in parts if part.startswith(_ADDED)]
        if added:
            defaults = loader.compute_defaults_list(name, [], RunMode.RUN).defaults
            added = [part for part in added if not any(_is_of(each, part) for each in defaults)]
        parts = [part for part in parts if part not in added]
        composed = hydra_compose(name, overrides=list(parts))
        merged = loader.compute_defaults_list(name, list(parts), RunMode.RUN).defaults
        check_interpolations(composed, origin)
        OmegaConf.resolve(composed)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise UserError(f"{origin}: {_culprit(directory / f'{name}.yaml')}{_problem(error)}") from error
    except RecursionError as error:
        raise UserError(
            f"{origin}: its defaults, or its interpolations, lead back to themselves",
            hint="a file of a defaults list must not name, directly or by others, the file that lists it",
        ) from error
    finally:
        GlobalHydra.instance().clear()
    layers = []
    for part in merged:
        file = next((f for d in folders if (f := d / f"{part.config_path}.yaml").is_file()), None)
        if file is not None and not str(part.package or "").startswith("hydra"):
            layers.append(Layer(file, part.package or ""))
    return composed, layers, added


def _is_of(default: Any, part: str) -> bool:
    """Tell whether a file of a defaults list is of the group that an override exchanges."""
    return str(default.config_path).startswith(f"{part.partition('=')[0]}/")


def _add(composed: DictConfig, part: str, origin: str) -> Layer:
    """Add an encoder of `configs/vision` to a recipe whose defaults have none, IN PLACE; return its file.

    Errors:
        UserError: there is no such encoder.
    """
    name = part.removeprefix(_ADDED)
    check_one_of("vision", name, known_encoders(), f"{origin}: ")
    file = _encoder_file(name)
    OmegaConf.set_struct(composed, False)
    composed.model = OmegaConf.merge(composed.model, as_config(parse_yaml(read_bounded(file), str(file)), str(file)))
    return Layer(file, "model")


def _culprit(file: Path) -> str:
    """Return the key of a recipe's own file that no merge can take, such as a list where keys belong; empty if none."""
    content = as_config(parse_yaml(read_bounded(file), str(file)), str(file))
    content.pop("defaults", None)
    key = culprit(RecipeConfig, content)
    return f"{key}: " if key else ""


def _problem(error: Exception) -> str:
    """Return what Hydra or OmegaConf says, on one line, without its search path and the state of its classes."""
    while str(error).strip() == "" and error.__cause__ is not None:
        error = error.__cause__
    text = str(error).split("Config search path")[0].split("Search path:")[0]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(line for line in lines if not line.startswith(("full_key:", "object_type=")))[:500]
