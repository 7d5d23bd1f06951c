"""Register every shipped recipe with `nemo` (entry point group `nemo_run.cli`), under the name of `factory_of`."""

from __future__ import annotations

from nemotron_h.runtime import quiet

quiet.hush()

import nemo_run as run  # noqa: E402
from nemo.collections import llm  # noqa: E402

from nemotron_h.compose import compose, factory_of, known_recipes, stage_of  # noqa: E402
from nemotron_h.errors import UserError  # noqa: E402
from nemotron_h.runtime import cluster_cli, nemo_cli  # noqa: E402
from nemotron_h.schema import STAGES, command_of  # noqa: E402
from nemotron_h.training import preference, pretrain, sft  # noqa: E402
from nemotron_h.training.callbacks import run_record  # noqa: E402

BUILDERS = {
    "pretrain": (llm.pretrain, pretrain.build),
    "sft": (llm.finetune, sft.build),
    "preference": (llm.finetune, preference.build),
}


def _register(name: str) -> None:
    target, build = BUILDERS[stage_of(name)]

    def factory() -> run.Partial:
        return build(compose(name))

    factory.__name__ = factory.__qualname__ = factory_of(name)
    factory.__doc__ = f"The recipe {name}."
    run.cli.factory(target=target, name=factory_of(name))(factory)


for _stage in BUILDERS:
    for _name in known_recipes(_stage):
        _register(_name)


def _register_files(command: str) -> None:
    target = getattr(llm, command)

    def nemotron_h_recipe(path: str) -> run.Partial:
        """A recipe file of your own: `--factory "nemotron_h_recipe(path=my.yaml)"`."""
        recipe = compose(path)
        if STAGES.get(recipe.stage) != command:
            hint = f"run it with: {command_of(recipe, path)}"
            raise UserError(f"{path} is a recipe of stage {recipe.stage}", hint=hint)
        return BUILDERS[recipe.stage][1](recipe)

    run.cli.factory(target=target, name="nemotron_h_recipe")(nemotron_h_recipe)


for _command in sorted(set(STAGES.values())):
    _register_files(_command)


nemo_cli.install(run_record.note)
cluster_cli.install()
