"""Token ids to text as they come: whole characters alone, and nothing from a stop string on."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class TextStream:
    """Turn token ids into text as they come; a character spread over several tokens appears once it is complete.

    Args:
        decode: token ids to text, with U+FFFD for bytes that are no character (yet).
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self.decode = decode
        self.ids: list[int] = []
        # ids[shown:] are not shown yet; ids[context:shown] only give a decoder the context that spaces depend on
        self.context = self.shown = 0

    def add(self, token: int) -> str:
        """Return the text that this token completes; empty inside a character."""
        self.ids.append(token)
        text = self._new_text()
        if not text or text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self.context, self.shown = self.shown, len(self.ids)
        return text

    def finish(self) -> str:
        """Return the rest, incomplete characters as U+FFFD."""
        text = self._new_text()
        self.context = self.shown = len(self.ids)
        return text

    def _new_text(self) -> str:
        before = self.decode(self.ids[self.context : self.shown])
        return self.decode(self.ids[self.context :])[len(before) :]


class StoppingText(TextStream):
    """A `TextStream` that ends before the first of some strings; text that may become one is held back.

    Args:
        decode: as `TextStream`'s.
        stops: strings, none empty.

    Attributes:
        stopped_by: the string that ended the text, or None.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        super().__init__(decode)
        self.stops = tuple(stops)
        self.stopped_by: str | None = None
        self._held = ""

    def add(self, token: int) -> str:
        """Return the text that this token completes and that no stop string can take back."""
        return self._pass(super().add(token))

    def finish(self) -> str:
        """Return the rest."""
        if self.stopped_by is not None:
            return ""
        shown = self._pass(super().finish())
        if self.stopped_by is None:
            shown, self._held = shown + self._held, ""
        return shown

    def _pass(self, text: str) -> str:
        self._held += text
        found = [(self._held.find(stop), stop) for stop in self.stops if stop in self._held]
        if found:
            place, self.stopped_by = min(found)
            shown, self._held = self._held[:place], ""
            return shown
        longest = max(
            (n for stop in self.stops for n in range(1, len(stop)) if self._held.endswith(stop[:n])), default=0
        )
        place = len(self._held) - longest
        shown, self._held = self._held[:place], self._held[place:]
        return shown
