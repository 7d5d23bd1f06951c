"""`nemotron-h completion`: a script by which a shell completes commands, options and values without starting Python."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
from typing import Annotated, Any

import typer

from nemotron_h.core.errors import UserError
from nemotron_h.core.strict import check_one_of

#: shell -> the file in which it looks for the script
SHELLS = {
    "bash": "~/.local/share/bash-completion/completions/nemotron-h",
    "zsh": "a folder of $fpath, as _nemotron-h",
    "fish": "~/.config/fish/completions/nemotron-h.fish",
}
#: names of parameters that take a recipe, a blend, a run or another folder, and a file
RECIPES, BLENDS = ("name", "recipe", "parent", "a", "b"), ("blend",)
FOLDERS = ("checkpoint", "base", "importance", "folder", "root", "tokenizer")
FILES = ("out", "prompts", "png", "python", "template")


def completion(
    context: typer.Context,
    shell: Annotated[str, typer.Argument(help=f"{', '.join(SHELLS)}.")],
) -> None:
    """Print the script that completes this command in a shell: commands, options, recipes, blends, folders.

    bash: nemotron-h completion bash > ~/.local/share/bash-completion/completions/nemotron-h. zsh: the same into a
    folder of $fpath, as _nemotron-h. fish: into ~/.config/fish/completions/nemotron-h.fish. Print it again after an
    upgrade: it has the names of that day.
    """
    check_one_of("shell", shell, SHELLS)
    if importlib.util.find_spec("shtab") is None:
        raise UserError("shtab, which writes the script, is not installed", hint="pip install -e '.[completion]'")
    import shtab

    parser = argparse.ArgumentParser(prog="nemotron-h", add_help=False)
    _add_commands(parser, context.find_root().command, shtab)
    typer.echo(shtab.complete(parser, shell))


def _add_commands(parser: argparse.ArgumentParser, command: Any, shtab: Any) -> None:
    """Add a command's parameters to a parser, and those of the commands in it."""
    parser.add_argument("--help", action="help", help="Show the help.")
    for parameter in command.params:
        if parameter.name != "help":
            _add(parser, command, parameter, shtab)
    if hasattr(command, "commands"):
        parsers = parser.add_subparsers()
        for name, inner in command.commands.items():
            described = _plain(inner.get_short_help_str(80))
            _add_commands(parsers.add_parser(name, help=described, add_help=False), inner, shtab)


def _add(parser: argparse.ArgumentParser, command: Any, parameter: Any, shtab: Any) -> None:
    settings: dict[str, Any] = {"help": _plain(parameter.help or "")}
    if parameter.param_type_name == "argument":
        names = [parameter.name]
        if parameter.nargs == -1:
            settings["nargs"] = "*"
        elif not parameter.required:
            settings["nargs"] = "?"
    else:
        names = [*parameter.opts, *parameter.secondary_opts]
        if parameter.is_flag:
            settings["action"] = "store_true"
        elif parameter.multiple:
            settings["action"] = "append"
    action = parser.add_argument(*names, **settings)
    values = _values(command, parameter, shtab)
    if isinstance(values, list):
        action.choices = values
    elif values is not None:
        action.complete = values


def _values(command: Any, parameter: Any, shtab: Any) -> list[str] | dict[str, Any] | None:
    """Return the values of a parameter: a list, or as shtab's `complete`; None where any text will do."""
    from nemotron_h.data.blend_files import available_blends
    from nemotron_h.planning.gpus import known_gpus
    from nemotron_h.recipe.compose import known_recipes
    from nemotron_h.schema.recipe import PRECISIONS

    is_name = parameter.name == "name" and (parameter.param_type_name == "option" or command.name == "new")
    if parameter.name in RECIPES and not is_name:
        return _names_or_yaml("recipes", known_recipes())
    if parameter.name in BLENDS:
        return _names_or_yaml("blends", sorted(available_blends()))
    if parameter.name in FOLDERS:
        return shtab.DIRECTORY
    if parameter.name in FILES:
        return shtab.FILE
    lists = {"gpu": known_gpus(), "precision": PRECISIONS, "against": PRECISIONS, "shell": SHELLS}
    return list(lists[parameter.name]) if parameter.name in lists else None


def _names_or_yaml(kind: str, names: list[str]) -> dict[str, Any]:
    """Return shtab's `complete` for one of the names, or the path of a YAML file."""
    function, words = f"_nemotron_h_{kind}", " ".join(map(shlex.quote, names))
    return {
        "bash": function,
        "zsh": function,
        "fish": f"({function})",
        "preamble": {
            "bash": f"{function}() {{\n"
            f'  compgen -W "{words}" -- "$1"\n'
            """  compgen -f -X '!*.yaml' -- "$1"\n"""
            '  compgen -d -S / -- "$1"\n}',
            "zsh": f"{function}() {{\n  _alternative '{kind}:{kind}:({words})' 'files:file:_files -g \"*.yaml\"'\n}}",
            "fish": f"function {function}\n  printf '%s\\n' {words}\n  __fish_complete_suffix .yaml\nend",
        },
    }


def _plain(text: str) -> str:
    """Return a help's first sentence, as argparse takes it."""
    return re.split(r"(?<=[.;]) |\n", text.strip())[0].rstrip(".;").replace("%", "%%")
