"""The files of blends: those that ship, and how one is written as a difference to another."""

from __future__ import annotations

import importlib.resources
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemotron_h.core.errors import UserError
from nemotron_h.core.strict import is_name, nearest
from nemotron_h.core.strict_yaml import read_config


def available_blends() -> dict[str, Path]:
    """Return name -> file of the blends that ship with the package."""
    folder = importlib.resources.files("nemotron_h.data_blends")
    return {Path(str(f)).stem: Path(str(f)) for f in sorted(folder.iterdir(), key=str) if f.name.endswith(".yaml")}


def find_blend(name_or_path: str | Path) -> Path:
    """Return the file of a shipped blend, or the path as it is.

    Errors:
        UserError: there is neither; suggests the nearest name.
    """
    shipped = available_blends()
    path = shipped.get(str(name_or_path)) or Path(name_or_path).expanduser()
    if not path.is_file():
        raise UserError(
            f"no blend named {str(name_or_path)!r} and no such file",
            f"{nearest(str(name_or_path), shipped)}Shipped blends: {', '.join(shipped) or 'none'}. "
            "Or give the path of a YAML file.",
        )
    return path


def layers_of(path: Path, inside: Sequence[Path] = ()) -> list[tuple[DictConfig, str]]:
    """Read a blend's file and the blends that its `defaults` name.

    Args:
        path: the file.
        inside: files that name this one.
    Returns:
        contents and files, to be merged in this order: mappings key by key, lists (`phases`) replaced.
    Errors:
        UserError: unreadable YAML; `defaults` that are no list of shipped names and files beside this one, or lead back
            to themselves.
    """
    content, inside = read_config(path), [*inside, path.resolve()]
    if inside.count(inside[-1]) > 1:
        raise UserError(f"{path}: its defaults lead back to itself")
    bases = [layer for name in _names(path, content) for layer in layers_of(_base(path, name), inside)]
    return [*bases, (content, str(path))]


def _names(path: Path, content: DictConfig) -> list[Any]:
    names = OmegaConf.to_container(OmegaConf.create({"defaults": content.pop("defaults", [])}))["defaults"]
    if not isinstance(names, list) or "_self_" in names[:-1]:
        raise UserError(f"{path}: defaults = {names}", hint="write a list, `_self_` last: [nemotron_h, _self_]")
    return [name for name in names if name != "_self_"]


def _base(path: Path, name: Any) -> Path:
    """Return the file of a blend that `defaults` name: beside the one that names it, so that relative paths in both
    start at the same folder, or shipped.
    """
    beside, shipped = path.parent / f"{name}.yaml", available_blends()
    if is_name(name) and (beside.is_file() or name in shipped):
        return beside if beside.is_file() else shipped[name]
    known = ", ".join(shipped)
    raise UserError(
        f"{path}: defaults: there is no blend {name!r}",
        hint=f"{nearest(str(name), shipped)}Shipped blends: {known}; or the name of a file beside this one.",
    )
