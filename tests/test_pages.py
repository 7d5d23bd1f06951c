"""README and pages are short, what scripts write of them is current, the site builds, the notebook runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
#: a table of every value of every model, which a script writes and nobody reads from its top to its end
EXEMPT = {DOCS / "results" / "fidelity.md"}


@pytest.fixture(scope="module")
def writers() -> Iterator[None]:
    """Let the scripts of `docs/` be imported, which stand beside each other."""
    sys.path.insert(0, str(DOCS))
    yield
    sys.path.remove(str(DOCS))


def test_readme_is_a_page() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 120
    assert not [line for line in lines if len(line) > 100]


def test_pages_are_short() -> None:
    lengths = {page.relative_to(DOCS): len(page.read_text().splitlines()) for page in {*DOCS.rglob("*.md")} - EXEMPT}
    assert len(lengths) > 40
    assert not {page: lines for page, lines in lengths.items() if lines > 150}


def test_a_picture_of_readme_is_there() -> None:
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", (ROOT / "README.md").read_text())
    assert pictures
    assert all((ROOT / picture).is_file() for picture in pictures)


def test_links_of_readme_lead_to_headings() -> None:
    """Links between pages of `docs/` are checked when the site is built, which README is no part of."""
    anchors = re.findall(r"\]\(([^)#:]+)#([^)]+)\)", (ROOT / "README.md").read_text())
    assert anchors
    for page, anchor in anchors:
        headings = re.findall(r"^#+ (.+)$", (ROOT / page).read_text(), re.MULTILINE)
        assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_index_has_every_page() -> None:
    linked = {(DOCS / link).resolve() for link in re.findall(r"\]\(([^)#]+)", (DOCS / "index.md").read_text())}
    models = {*(DOCS / "models").glob("*.md")} - {DOCS / "models" / "index.md"}
    assert {*DOCS.rglob("*.md")} - models - {DOCS / "index.md"} <= linked


@pytest.mark.usefixtures("writers")
def test_pages_of_models_are_current() -> None:
    import write_models

    stale = [file.name for file, content in write_models.pages().items() if file.read_text() != content]
    assert not stale, "run: python docs/write_models.py"
    pages = {page.stem for page in (DOCS / "models").glob("*.md")}
    assert pages == {*write_models.models(), "index"}


@pytest.mark.usefixtures("writers")
def test_the_page_of_cards_is_current() -> None:
    import write_cards

    assert write_cards.PAGE.read_text() == write_cards.page(), "run: python docs/write_cards.py"


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    """No broken link or anchor, and no page outside of the navigation; API pages are read from files, not imported."""
    pytest.importorskip("material", reason="mkdocs-material is not installed: pip install -e '.[docs]'")
    pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed: pip install -e '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    page = (tmp_path / "site" / "api" / "recipe.html").read_text()
    assert "nemotron_h.recipe.compose.compose" in page
    assert "Raises:" in page
    assert "Errors" not in page  # docs/site_docstrings.py
    assert not re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="https?:[^"]*"', page)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed: pip install -e '.[dev]'")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: pip install -e '.[dev]'")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed: pip install -e '.[dev]'")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    book = nbformat.read(DOCS / "quickstart.ipynb", as_version=4)
    assert not [cell for cell in book.cells if cell.get("outputs")]
    nbclient.NotebookClient(book, timeout=600, kernel_name="python3").execute()
    output = "".join(text.get("text", "") for cell in book.cells for text in cell.get("outputs", []))
    assert "checkpoint" in output
    assert "8,100,852,736 parameters" in output
    last = next(cell for cell in book.cells if cell.source.endswith("\nlosses"))
    losses = [float(loss) for loss in re.findall(r": ([\d.]+)", last.outputs[0]["data"]["text/plain"])]
    assert losses[-1] < losses[0] - 0.5
