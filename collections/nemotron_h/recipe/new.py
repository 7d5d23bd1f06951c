"""Write a new recipe as a small diff to another one."""

from __future__ import annotations

from pathlib import Path

from nemotron_h.core.errors import UserError
from nemotron_h.core.strict import check_name
from nemotron_h.recipe.compose import DEFAULT, Composed, locate, recipes_dir, trace
from nemotron_h.recipe.text import origin_text, scalar

READY = {
    "": ("tokens", "precision"),
    "data": ("blend", "seq_length", "global_batch_size", "micro_batch_size"),
    "optim": ("peak_lr", "final_lr", "warmup_tokens"),
    "parallel": ("nodes", "devices", "tensor"),
}
"""Part -> the keys that a new recipe lists, commented out."""


def write(name: str, parent: str, out: Path | None) -> Path:
    """Write a recipe that differs from its parent in its name, with a few keys ready to edit.

    Args:
        name: of the recipe, and of its run's folder.
        parent: a shipped recipe, or the path of one (then the new file has to lie beside it).
        out: the file; None is `NAME.yaml` here, or beside a parent that is a file.
    Errors:
        UserError: the file exists, the name is not one, there is no such parent or folder.
    """
    check_name("", name)
    folder, stem, _ = locate(parent)
    composed = trace(parent)
    shipped = folder == recipes_dir()
    path = out or (Path() if shipped or folder == Path.cwd() else folder) / f"{name}.yaml"
    if path.suffix != ".yaml":
        raise UserError(f"{path}: recipes end in .yaml", hint=f"--out {path}.yaml")
    if not path.parent.is_dir():
        raise UserError(f"there is no folder {path.parent}")
    if not shipped and path.resolve().parent != folder:
        raise UserError(
            f"{path} has to lie beside its parent, in {folder}", hint="a defaults list names files of its folder"
        )
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(content(name, f"/{stem}" if shipped else stem, composed))
    except FileExistsError:
        raise UserError(f"{path} exists already", hint="give another NAME or --out; nothing was written") from None
    return path


def content(name: str, parent: str, composed: Composed) -> str:
    """Return the new file's text.

    Args:
        parent: as the defaults list names it.
        composed: the parent.
    """
    body = [
        "# @package _global_",
        f"# What {name} changes of its parent: remove the # before a part and its keys, and edit.",
        "defaults:",
        f"  - {parent}",
        "  - _self_",
        "",
        f"name: {scalar(name)} # the run goes to {composed.recipe.log.dir}/{name}",
    ]
    for part, keys in READY.items():
        values = getattr(composed.recipe, part) if part else composed.recipe
        if part:
            body.append(f"# {part}:")
        for key in keys:
            dotted = f"{part}.{key}" if part else key
            notes = [origin_text(composed.origins.get(dotted, DEFAULT)), composed.sources.get(dotted, "")]
            value = f"{'  ' if part else ''}{key}: {scalar(getattr(values, key))}"
            body.append(f"# {value:<36} # {'; '.join(note for note in notes if note)}")
    body += ["# sources:", '#   tokens: "ours: why"', ""]
    return "\n".join(body)
