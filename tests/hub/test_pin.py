"""`nemotron-h data pin`: commits of the Hub written into a blend, and nothing else of it changed."""

from __future__ import annotations

from pathlib import Path

import pytest
from hub_server import Hub, Repo
from typer.testing import CliRunner

from nemotron_h.cli.main import app
from nemotron_h.core.errors import UserError
from nemotron_h.data.blend import load_blend
from nemotron_h.data.blend_files import available_blends
from nemotron_h.data.pin import pin

BLEND = """# mine
name: mine
tokenizer: {kind: bpe, vocab_size: 265}   # small
sources:
  a:
    category: web
    fetch: {kind: hub, repo: org/a, revision: unpinned, split: train}  # with a comment
  b:
    category: web
    fetch:
      kind: hub
      repo: org/b
      revision: 'main'
      split: train
  c: {category: web, fetch: {kind: hub, repo: org/b, revision: 0123456789012345678901234567890123456789, split: x}}
phases: [{name: all, weights: {web: 100}}]
"""


@pytest.fixture
def repos(hub: Hub) -> dict[str, Repo]:
    repos = {name: Repo({"a.jsonl": name.encode()}, branches=["main", "next"]) for name in ("org/a", "org/b")}
    hub.repos |= {f"datasets/{name}": repo for name, repo in repos.items()}
    return repos


def test_commits_are_written_where_the_revisions_stand(repos: dict[str, Repo], tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(BLEND)
    result = CliRunner().invoke(app, ["data", "pin", str(path)])
    assert result.exit_code == 0, result.output
    a, b = (repos[name].commit() for name in ("org/a", "org/b"))
    assert path.read_text() == BLEND.replace("unpinned", f'"{a}"').replace("'main'", f'"{b}"')
    assert f"a: org/a was unpinned, is now {a}" in result.output
    assert [s.fetch.revision for s in load_blend(path).sources.values()] == [a, b, "0123456789" * 4]


def test_a_shipped_blend_is_pinned_by_a_difference_to_it(hub: Hub, tmp_path: Path) -> None:
    name = "nemotron_open"
    with pytest.raises(UserError, match=r"is a shipped blend\nName the file to write: --out my_nemotron_open\.yaml"):
        pin(name, None, print)
    sources = load_blend(name).sources
    fetches = {key: source.fetch for key, source in sources.items() if source.fetch and source.fetch.kind == "hub"}
    hub.repos |= {f"datasets/{each.repo}": Repo({"x": each.repo.encode()}) for each in fetches.values()}
    out = tmp_path / "mine.yaml"
    pin(name, out, print)
    mine = load_blend(out)
    assert mine.name == "mine"
    for key, each in fetches.items():
        assert mine.sources[key].fetch.revision == hub.repos[f"datasets/{each.repo}"].commit()
        assert mine.sources[key].fetch.repo == each.repo
    with pytest.raises(UserError, match=r"mine.yaml exists"):
        pin(name, out, print)


def test_what_cannot_be_pinned(repos: dict[str, Repo], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no source is of the Hub"):
        pin("sample_small", tmp_path / "x.yaml", print)
    (tmp_path / "base.yaml").write_text(BLEND)
    path = tmp_path / "mine.yaml"
    path.write_text("defaults: [base, _self_]\nname: mine\nsources: {b: {fetch: {revision: next}}}\n")
    with pytest.raises(UserError, match=r"sources.a.fetch.revision stands in a blend that its defaults name or"):
        pin(str(path), None, print)
    path.write_text(path.read_text().replace("{b:", "{a: {fetch: {revision: unpinned}}, b:"))
    assert pin(str(path), None, print) == {"a": repos["org/a"].commit(), "b": repos["org/b"].commit()}
    (tmp_path / "base.yaml").write_text(BLEND.replace("org/b", "org/none"))
    path.write_text(BLEND.replace("org/a", "org/none"))
    with pytest.raises(UserError, match=r"sources.a.fetch: org/none@unpinned: there is no such dataset"):
        pin(str(path), None, print)
    assert path.read_text() == BLEND.replace("org/a", "org/none")


def test_every_source_of_the_hub_that_ships_is_unpinned_or_pinned_to_a_commit() -> None:
    """A branch or tag in a shipped blend would move under its users."""
    shipped = [source.fetch for name in available_blends() for source in load_blend(name).sources.values()]
    revisions = {fetch.revision for fetch in shipped if fetch is not None and fetch.kind == "hub"}
    assert revisions == {"unpinned"}
