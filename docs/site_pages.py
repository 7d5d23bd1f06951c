"""Pages of the site that are made of other files: the API of each room, the notebook, CONTRIBUTING. MkDocs calls it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
DOCS, LIBRARY = ROOT / "docs", ROOT / "collections/nemotron_h"
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)")


def rooms() -> list[str]:
    """Return the rooms of the library."""
    return sorted(folder.name for folder in LIBRARY.iterdir() if (folder / "__init__.py").exists())


def api(room: str) -> str:
    """Return the page of a room: its modules, read from their files."""
    return f"# nemotron_h.{room}\n\n::: nemotron_h.{room}\n"


def notebook(file: Path) -> str:
    """Return the cells of a notebook as Markdown."""
    cells = []
    for cell in json.loads(file.read_text())["cells"]:
        text = "".join(cell["source"])
        cells.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    return "\n\n".join(cells) + "\n"


def contributing() -> str:
    """Return CONTRIBUTING with its links as a page of `docs/` has them."""
    return (ROOT / "CONTRIBUTING.md").read_text().replace("](docs/", "](")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List the pages of models and rooms."""
    models = sorted(page.name for page in (DOCS / "models").glob("*.md") if page.name != "index.md")
    listed = {"Models": [f"models/{name}" for name in ("index.md", *models)]}
    listed["API"] = ["api/index.md", *(f"api/{room}.md" for room in rooms())]
    config.nav = [{title: listed.get(title, pages)} for section in config.nav for title, pages in section.items()]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that no file of `docs/` holds."""
    pages = {f"api/{room}.md": api(room) for room in rooms()}
    index = ["# API", "", "What is in each room: [architecture](../architecture.md).", ""]
    pages["api/index.md"] = "\n".join([*index, *(f"- [{room}]({room}.md)" for room in rooms())])
    pages["quickstart.md"] = notebook(DOCS / "quickstart.ipynb")
    pages["contributing.md"] = contributing()
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to files that are no part of the site into their names, and to the notebook into its page."""
    folder = os.path.dirname(page.file.src_uri)

    def inside(match: re.Match[str]) -> str:
        target = match[2].split("#")[0]
        if target.endswith((".ipynb", "../CONTRIBUTING.md")):
            return f"[{match[1]}]({'quickstart' if target.endswith('.ipynb') else 'contributing'}.md)"
        path = os.path.normpath(os.path.join(folder, target))
        return match[1] if path.startswith("..") else match[0]

    return LINK.sub(inside, markdown)
