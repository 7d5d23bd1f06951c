"""The `nemo` command: compose the recipe that it names, which takes a second, then load NeMo and hand over to nemo-run.

The commands and their options are nemo-run's (`nemo_run.__main__`). NeMo is loaded before nemo-run asks for it, since
the entry points that it goes through come in any order and only one of them is `launch.factories`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

from nemotron_h.core.ending import run_to_the_end
from nemotron_h.core.errors import UserError, report
from nemotron_h.launch.place import take
from nemotron_h.platform.trackers import check_trackers
from nemotron_h.recipe.compose import compose, factory_of, known_recipes, names_model, stage_of
from nemotron_h.recipe.overrides import split
from nemotron_h.schema.recipe import STAGES, RecipeConfig, file_of_factory

#: `key=@FILE.yaml`, as nemo-run takes it
FILE = re.compile(r"=@[\w./\\-]+\.(ya?ml|json|toml)(:\w+)?$", re.IGNORECASE)
_YAML = re.compile(r"--yaml(=|$)")
_FACTORY = re.compile(r"(?:--factory|-f)(?:=|$)")
#: (recipe, values) -> what `main` composed of them
_COMPOSED: dict[tuple[str, tuple[str, ...]], RecipeConfig] = {}
_PATH = re.compile(r"nemotron_h_recipe\(\s*path\s*=\s*(['\"]?)(.+?)\1\s*\)")


def of_recipe(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the settings of a recipe, `model=NAME` among them, and those of the built task.

    Errors:
        UserError: as of `split`.
    """
    models = [argument for argument in arguments if names_model(argument)]
    values, others = split([argument for argument in arguments if argument not in models])
    return [*models, *values], others


def recipe_of(arguments: Sequence[str]) -> tuple[str, list[str]] | None:
    """Return the recipe that a command line of `nemo` names and its values there, as `compose` takes them.

    Args:
        arguments: without the name of the program: `llm pretrain --factory NAME ...`.
    Returns:
        None where it names none of ours, or where a file (`--yaml`) or the factory (`NAME(student=...)`) changes it.
    Errors:
        UserError: as of `split` and `take`.
    """
    at = next((i for i, argument in enumerate(arguments) if _FACTORY.match(argument)), None)
    settings = [argument for argument in arguments[2:] if "=" in argument and not argument.startswith("-")]
    if at is None or any(map(_YAML.match, arguments)) or any(FILE.search(setting) for setting in settings):
        return None
    _, equals, factory = arguments[at].partition("=")
    factory = factory if equals else "".join(arguments[at + 1 : at + 2])
    shipped = {(STAGES.get(stage_of(name)), factory_of(name)): name for name in known_recipes()}
    file = _PATH.fullmatch(factory)
    recipe = file_of_factory(file[2]) if file else shipped.get((arguments[1], factory))
    if recipe is None:
        return None
    _, _, settings = take([setting for setting in settings if setting != factory])
    return recipe, of_recipe(settings)[0]


def composed(recipe: str, values: Sequence[str]) -> RecipeConfig:
    """Return a composed recipe: the command's own where it is that, else anew."""
    return _COMPOSED.pop((recipe, tuple(values)), None) or compose(recipe, values)


def main() -> None:
    """Run the command, and end the process."""
    run_to_the_end(_main)


def _main() -> None:
    try:  # a mistake in the recipe is one message, before NeMo is imported
        recipe = recipe_of(sys.argv[1:])
        if recipe is not None:
            name, values = recipe
            resolved = _COMPOSED[name, tuple(values)] = compose(name, values)
            if take(sys.argv[1:])[0] is None and "--dryrun" not in sys.argv:  # it runs here
                check_trackers(resolved.log.trackers)
    except UserError as error:
        report(error)
        sys.exit(error.EXIT_CODE)
    from nemotron_h.platform import quiet

    quiet.hush()
    from nemo_run.__main__ import app

    app()


if __name__ == "__main__":
    main()
