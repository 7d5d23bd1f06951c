"""Packages that graders take where they are installed, of the extra `tables`."""

from __future__ import annotations

import functools
from importlib import metadata

MATH_VERIFY = "math-verify"
#: of IFEval: the language of a text, and its sentences
LANGUAGE = ("langdetect", "nltk")
INSTALL = "pip install -e '.[tables]'"


@functools.cache
def version(package: str) -> str | None:
    """Return the version of a package; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
