"""Write commits of the Hub's data sets into a blend, so that it means the same text from then on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import yaml

from nemotron_h.core import hub
from nemotron_h.core.errors import UserError
from nemotron_h.core.files import whole_file
from nemotron_h.core.strict_yaml import read_bounded
from nemotron_h.data.blend import load_blend
from nemotron_h.data.blend_files import available_blends
from nemotron_h.data.fetch_spec import HUB


def pin(name_or_path: str, out: Path | None, say: Callable[[str], None]) -> dict[str, str]:
    """Ask the Hub where unpinned sources, branches and tags are now, and write those commits.

    Args:
        name_or_path: a file, in which they are replaced; or the name of a shipped blend.
        out: of a shipped blend: a new file, a difference to it that has the commits.
        say: is told of each commit.
    Returns:
        source -> commit, of those that were not pinned to one.
    Errors:
        UserError: nothing to pin; a shipped blend without `out`; a revision that stands in another file; the Hub's, as
            of `hub.current_commit`.
    """
    blend = load_blend(name_or_path)
    sources = {
        name: source.fetch for name, source in blend.sources.items() if source.fetch and source.fetch.kind == HUB
    }
    if not sources:
        raise UserError(f"{blend.path}: no source is of the Hub", "Only sources with `fetch: {kind: hub}` are pinned.")
    shipped = name_or_path in available_blends()
    if shipped != (out is not None):
        raise UserError(
            f"{name_or_path} is {'a shipped blend' if shipped else 'a file, which is changed where it is'}",
            f"Name the file to write: --out my_{name_or_path}.yaml" if shipped else "Leave --out away.",
        )
    if out is not None and out.exists():
        raise UserError(f"--out {out} exists", f"Give another name, or pin that file: nemotron-h data pin {out}")
    places = {} if shipped else _places(Path(blend.path))
    unpinned = [name for name, fetch in sources.items() if not hub.is_commit(fetch.revision)]
    elsewhere = next((name for name in unpinned if not shipped and name not in places), None)
    if elsewhere:
        raise UserError(
            f"{blend.path}: sources.{elsewhere}.fetch.revision stands in a blend that its defaults name or in an alias",
            f"Write it here too: sources: {{{elsewhere}: {{fetch: {{revision: {hub.UNPINNED}}}}}}}",
        )
    known: dict[tuple[str, str], str] = {}
    commits = {}
    for name, fetch in sources.items():
        if hub.is_commit(fetch.revision):
            say(f"{name}: {fetch.repo} is pinned to {fetch.revision}")
            continue
        asked = (fetch.repo, fetch.revision)
        if asked not in known:
            key = f"{blend.path}: sources.{name}.fetch"
            known[asked] = hub.current_commit(hub.Repository(*asked, "dataset", key), say)
        commits[name] = known[asked]
        say(f"{name}: {fetch.repo} was {fetch.revision}, is now {known[asked]}")
    if out is not None:
        _write(out, _difference(name_or_path, out.stem, commits))
    elif commits:
        text = read_bounded(Path(blend.path))
        texts = {places[name]: commit for name, commit in commits.items()}  # an alias has the place of its anchor
        for (begin, end), commit in sorted(texts.items(), reverse=True):
            text = f'{text[:begin]}"{commit}"{text[end:]}'
        _write(Path(blend.path), text)
    say(f"wrote {out or blend.path}" if commits or out else "nothing to write")
    return commits


def _write(path: Path, text: str) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _difference(base: str, name: str, commits: dict[str, str]) -> str:
    lines = [f'  {source}: {{fetch: {{revision: "{commit}"}}}}' for source, commit in commits.items()]
    return "\n".join([f"defaults: [{base}, _self_]", f"name: {name}", "sources:" if lines else "", *lines, ""])


def _places(path: Path) -> dict[str, tuple[int, int]]:
    """Return source -> where the characters of its revision begin and end, for those that the file itself states."""
    places = {}
    root = yaml.compose(read_bounded(path), Loader=yaml.SafeLoader)
    for name, source in _entries(_entries(root).get("sources")).items():
        revision = _entries(_entries(source).get("fetch")).get("revision")
        if isinstance(revision, yaml.ScalarNode):
            places[name] = (revision.start_mark.index, revision.end_mark.index)
    return places


def _entries(node: yaml.Node | None) -> dict[str, yaml.Node]:
    return {key.value: value for key, value in node.value} if isinstance(node, yaml.MappingNode) else {}
