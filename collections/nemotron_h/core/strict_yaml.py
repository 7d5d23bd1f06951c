"""Read YAML from outside: UTF-8, bounded in size and depth, no key twice, words as YAML 1.2 has them.

Every file that the project reads comes through here: recipes with all that their defaults name, blends, cluster files,
tasks, GPU floors. `no`, `007`, `2024_07` and `3:50:00` are text, as they were written; the schema that a file is merged
into turns text into numbers and booleans where it wants them. Of YAML 1.1 only `655_360`, thousands by underscores,
stays.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemotron_h.core.errors import UserError
from nemotron_h.core.files import check_unicode, decode

#: ours: the largest file that ships has 12 kB
MAX_BYTES = 2**20
#: ours: recipes nest four deep
MAX_DEPTH = 32
#: ours: characters of a document with its aliases written out
MAX_EXPANDED = 4 * MAX_BYTES

_TAG = "tag:yaml.org,2002:"
_KINDS = ("null", "bool", "int", "float", "str", "seq", "map")


class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """Text, numbers, true, false, null, lists and mappings with text as keys; any other tag is an error."""

    yaml_implicit_resolvers: ClassVar[dict[str, list]] = {}
    yaml_constructors: ClassVar[dict] = {
        **{f"{_TAG}{kind}": getattr(yaml.SafeLoader, f"construct_yaml_{kind}") for kind in _KINDS},
        None: yaml.SafeLoader.construct_undefined,
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        """Return a mapping whose keys are as they were written, none of them twice."""
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key is not text", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key.value}", key.start_mark)
            seen.add(key.value)
        self.flatten_mapping(node)
        return {key.value: self.construct_object(value, deep=deep) for key, value in node.value}


for _kind, _form, _first in (
    ("bool", "true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", "-?(?:0|[1-9][0-9]*|[1-9][0-9]{0,2}(?:_[0-9]{3})+)", "-0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+", "-+.0123456789"),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+."),
    ("merge", "<<", "<"),
):
    Loader.add_implicit_resolver(_TAG + _kind, re.compile(f"(?:{_form})$"), list(_first))


def read_yaml(path: Path, origin: str = "") -> Any:
    """Return a file's content as plain containers.

    Args:
        path: the file.
        origin: what to call it in an error, where that is not its path.
    Errors:
        UserError: the file cannot be read, or as `parse_yaml`.
    """
    return parse_yaml(read_bounded(path, origin), origin or str(path))


def read_bounded(path: Path, origin: str = "") -> str:
    """Return the text of a file of at most `MAX_BYTES`; arguments and errors as of `read_yaml`."""
    origin = origin or str(path)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{origin}: {error.strerror or error}") from error
    if len(data) > MAX_BYTES:
        raise UserError(
            f"{origin} is larger than {MAX_BYTES:,} bytes",
            hint="this is no file of settings; name the one that you mean",
        )
    return decode(data, origin)


def read_config(path: Path) -> DictConfig:
    """Return a file's content, which has to be a mapping; errors as of `read_yaml`."""
    return as_config(read_yaml(path), str(path))


def as_config(content: Any, origin: str) -> DictConfig:
    """Return plain containers as an OmegaConf mapping; a document without content is an empty one.

    Errors:
        UserError: not a mapping, or a `${` that is no interpolation.
    """
    if content is not None and not isinstance(content, dict):
        raise UserError(f"{origin} is not a mapping of keys", hint="write `key: value` lines")
    try:
        return OmegaConf.create(content or {})
    except OmegaConfBaseException as error:
        raise UserError(f"{origin}: {error.full_key or 'value'}: {str(error).splitlines()[0]}") from error


def parse_yaml(text: str, origin: str) -> Any:
    """Return a document's content as plain containers.

    Errors:
        UserError: not YAML; too long, too deep or too long with its aliases written out; a key twice. Names the line.
    """
    node, loader = parse_node(text, origin), Loader("")
    try:
        return None if node is None else loader.construct_document(node)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{origin}: {_reason(error)}") from error
    finally:
        loader.dispose()


@functools.lru_cache(maxsize=256)  # composing a recipe asks for each of its files several times
def parse_node(text: str, origin: str) -> yaml.Node | None:
    """Return a document's root with the line of every value, or None where there is none; errors as of `parse_yaml`.

    The nodes are shared between calls: nothing may change them but `flatten_mapping`, which does so once.
    """
    check_unicode(text, origin)
    try:
        if len(text) > MAX_BYTES:
            raise UserError(f"{origin} is longer than {MAX_BYTES:,} characters")
        _check_depth(text, origin)
        node = yaml.compose(text, Loader=Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{origin}: {_reason(error)}", hint=_HINT) from error
    if node is not None:
        _check_expanded(node, {}, set(), origin)
    return node


_HINT = "quote text that has : # [ ] { } , & * ? | > ! % @ ` in it"


def flat_lines(text: str, origin: str) -> Iterator[tuple[str, int]]:
    """Yield dotted key and line (from 1) of every value of a mapping, merge keys (`<<`) resolved."""
    root = parse_node(text, origin)
    loader = Loader("")
    try:
        if isinstance(root, yaml.MappingNode):
            yield from _flat(loader, root, "")
    finally:
        loader.dispose()


def _flat(loader: Loader, node: yaml.MappingNode, prefix: str) -> Iterator[tuple[str, int]]:
    loader.flatten_mapping(node)
    for key, value in node.value:
        dotted = f"{prefix}.{key.value}" if prefix else str(key.value)
        if isinstance(value, yaml.MappingNode) and value.value:
            yield from _flat(loader, value, dotted)
        else:
            yield dotted, key.start_mark.line + 1


def parse_settings(written: Sequence[str], origin: str) -> DictConfig:
    """Return `key=value` texts as a nested mapping; values are YAML, later ones win.

    Errors:
        UserError: not of that form, or a value that is not YAML, naming it.
    """
    settings = OmegaConf.create({})
    for text in written:
        key, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"[\w-]+(\.[\w-]+|\[\w+\])*", key):
            raise UserError(f"{origin}: {text[:100]!r} is not a setting", hint="write key=value: optim.peak_lr=3e-4")
        content = parse_yaml(value, f"{origin}: {text[:100]}")
        try:
            OmegaConf.update(settings, key, content)
        except OmegaConfBaseException as error:
            raise UserError(f"{origin}: {text[:100]}: {str(error).splitlines()[0]}") from error
    return settings


def _check_depth(text: str, origin: str) -> None:
    """Refuse deep nesting before anything recurses over it: a parser's events are flat."""
    depth = 0
    for event in yaml.parse(text, Loader=Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            raise UserError(f"{origin}: line {event.start_mark.line + 1} is nested deeper than {MAX_DEPTH}")


def _check_expanded(node: yaml.Node, sizes: dict[int, tuple[int, int]], inside: set[int], origin: str) -> None:
    """Refuse what aliases make of a short text: a value within itself, too much text, too deep nesting.

    Args:
        node: to look at.
        sizes: id of a node -> characters and depth with its aliases written out; of all nodes that were looked at.
        inside: ids of the nodes that this one lies in.
    """
    where = f"{origin}: line {node.start_mark.line + 1}"
    if id(node) in inside:
        raise UserError(f"{where}: an anchor (&) contains itself", hint="write the value out in place of its alias (*)")
    if id(node) in sizes:
        return
    parts = [] if isinstance(node, yaml.ScalarNode) else node.value
    parts = [part for pair in parts for part in pair] if isinstance(node, yaml.MappingNode) else parts
    size, depth = (len(node.value) if isinstance(node, yaml.ScalarNode) else 0) + 1, 0
    for part in parts:
        _check_expanded(part, sizes, inside | {id(node)}, origin)
        size, depth = size + sizes[id(part)][0], max(depth, sizes[id(part)][1] + 1)
    if size > MAX_EXPANDED or depth > MAX_DEPTH:
        raise UserError(f"{where}: aliases (*) make too much of it", hint="write out what you need, without aliases")
    sizes[id(node)] = size, depth


def _reason(error: Exception) -> str:
    """Return what YAML dislikes, on one line, with its line and column from 1."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return f"not valid YAML: {place}{problem}"
