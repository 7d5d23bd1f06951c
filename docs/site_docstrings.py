"""Let griffe know the heading `Errors:` of this project's docstrings: Google's word for it is `Raises:`."""

from __future__ import annotations

from typing import Any

from griffe import Extension, Object


class Errors(Extension):
    """Rename the heading while the library is read."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Change the text of an object's docstring."""
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("\nErrors:\n", "\nRaises:\n")
