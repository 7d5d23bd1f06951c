"""The `nemo` command: compose the recipe that it names, which takes a second, then load NeMo and hand over to nemo-run.

The commands and their options are nemo-run's (`nemo_run.__main__`). NeMo is loaded before nemo-run asks for it, since
the entry points that it goes through come in any order and only one of them is `launch.factories`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

from nemotron_h.core.errors import UserError, report
from nemotron_h.recipe.compose import compose, factory_of, known_recipes, stage_of
from nemotron_h.schema.recipe import STAGES, file_of_factory

_FACTORY = re.compile(r"(?:--factory|-f)(?:=|$)")
_FILE = re.compile(r"nemotron_h_recipe\(\s*path\s*=\s*(['\"]?)(.+?)\1\s*\)")


def recipe_of(arguments: Sequence[str]) -> str | None:
    """Return the recipe that a command line of `nemo` names, as `compose` takes it; None if it is not one of ours.

    Args:
        arguments: without the name of the program: `llm pretrain --factory NAME ...`.
    """
    at = next((i for i, argument in enumerate(arguments) if _FACTORY.match(argument)), None)
    if at is None:
        return None
    _, equals, factory = arguments[at].partition("=")
    factory = factory if equals else "".join(arguments[at + 1 : at + 2])
    if file := _FILE.fullmatch(factory):
        return file_of_factory(file[2])
    shipped = {(STAGES.get(stage_of(name)), factory_of(name)): name for name in known_recipes()}
    return shipped.get(("".join(arguments[1:2]), factory.split("(")[0]))


def main() -> None:
    """Run the command; a mistake in its recipe is one message, before NeMo is imported."""
    try:
        recipe = recipe_of(sys.argv[1:])
        if recipe is not None:
            compose(recipe)
    except UserError as error:
        report(error)
        sys.exit(error.EXIT_CODE)
    from nemotron_h.platform import quiet

    quiet.hush()
    from nemo_run.__main__ import app

    app()


if __name__ == "__main__":
    main()
