"""Register every shipped recipe with `nemo` (entry point group `nemo_run.cli`), under the name of `factory_of`."""

from __future__ import annotations

import importlib
import json

from nemotron_h.platform import quiet

quiet.hush()

import nemo_run as run  # noqa: E402
from nemo.collections import llm  # noqa: E402

from nemotron_h.checkpoint.definition import is_path  # noqa: E402
from nemotron_h.core.errors import UserError  # noqa: E402
from nemotron_h.launch import nemo_cli  # noqa: E402
from nemotron_h.launch.command import composed  # noqa: E402
from nemotron_h.recipe.compose import compose, factory_of, known_recipes, stage_of  # noqa: E402
from nemotron_h.schema.recipe import STAGES, RecipeConfig, command_of, file_of_factory  # noqa: E402
from nemotron_h.training.stages.distillation.command import distill  # noqa: E402

#: stage -> what `nemo` calls, and the module of `training/stages` that builds its task: a run loads its own alone
BUILDERS = {
    "pretrain": (llm.pretrain, "pretrain"),
    "sft": (llm.finetune, "sft"),
    "preference": (llm.finetune, "preference.stage"),
    "distill": (distill, "distillation.stage"),
}
run.cli.entrypoint(distill, namespace="llm")  # after NeMo's of that name, whose place it takes


def build(recipe: RecipeConfig) -> run.Partial:
    """Build the task of a recipe with its stage's `build`."""
    return importlib.import_module(f"nemotron_h.training.stages.{BUILDERS[recipe.stage][1]}").build(recipe)


def _register(recipe: str) -> None:
    name, stage = factory_of(recipe), stage_of(recipe)
    target, _ = BUILDERS[stage]

    def factory() -> run.Partial:
        return build(composed(recipe, nemo_cli.recipe_values()))

    def distillation(student: str | None = None, teacher: str | None = None) -> run.Partial:
        """Take checkpoints: `--factory "NAME(student=runs/CHILD, teacher=runs/PARENT)"`, and the student's model."""
        changes = [f"distill.teacher={json.dumps(teacher)}"] if teacher else []
        if student:
            changes += [
                f"model={student if is_path(student) else f'./{student}'}",
                f"init.checkpoint={json.dumps(student)}",
            ]
        return build(compose(recipe, [*changes, *nemo_cli.recipe_values()]))

    made = distillation if stage == "distill" else factory
    made.__name__ = made.__qualname__ = name
    made.arguments_are_data = True
    made.__doc__ = f"The recipe {recipe}. {made.__doc__ or ''}".strip()
    run.cli.factory(target=target, name=name)(made)


for _recipe in known_recipes():
    if stage_of(_recipe) in BUILDERS:  # the others are run by commands of `nemotron-h`
        _register(_recipe)


def _register_files(command: str) -> None:
    target = next(entry for stage, (entry, _) in BUILDERS.items() if STAGES[stage] == command)

    def nemotron_h_recipe(path: str) -> run.Partial:
        """Build a recipe file of your own: `--factory "nemotron_h_recipe(path=my.yaml)"`."""
        path = file_of_factory(path)
        recipe = composed(path, nemo_cli.recipe_values())
        if STAGES.get(recipe.stage) != command:
            hint = f"run it with: {command_of(recipe.stage, path)}"
            raise UserError(f"{path} is a recipe of stage {recipe.stage}", hint=hint)
        return build(recipe)

    nemotron_h_recipe.arguments_are_data = True
    run.cli.factory(target=target, name="nemotron_h_recipe")(nemotron_h_recipe)


for _command in sorted(set(STAGES.values())):
    _register_files(_command)


for _entry in {entry for entry, _ in BUILDERS.values()}:
    _entry.cli_entrypoint.help_str += nemo_cli.HELP
nemo_cli.install()
