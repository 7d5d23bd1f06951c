"""Tokens to text as they come, and stop strings."""

from __future__ import annotations

import pytest

from nemotron_h.inference.text import StoppingText, TextStream


def decode(ids) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


@pytest.mark.parametrize("text", ["plain", "Größe 日本語 🙂\U0001f469\u200d\U0001f680 x", "\ufffd kept", "end 🙂"])
def test_stream_shows_whole_characters(text: str) -> None:
    shown = TextStream(decode)
    pieces = [shown.add(byte) for byte in text.encode()]
    assert "".join(pieces) + shown.finish() == text
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(pieces)
        assert len([piece for piece in pieces if piece]) == len(text)


def test_stream_shows_broken_bytes_in_the_end() -> None:
    data = [0x41, 0xE6, 0x97, 0x42, 0xF0, 0x9F]
    shown = TextStream(decode)
    assert "".join(shown.add(byte) for byte in data) == "A\ufffdB"
    assert shown.finish() == "\ufffd"


def stopping(text: str, *stops: str) -> tuple[list[str], str | None]:
    """The pieces that are shown of a text that comes byte by byte, and what stopped it."""
    shown = StoppingText(decode, stops)
    pieces = []
    for byte in text.encode():
        pieces.append(shown.add(byte))
        if shown.stopped_by is not None:
            break
    return [*pieces, shown.finish()], shown.stopped_by


@pytest.mark.parametrize(
    ("text", "stops", "expected", "by"),
    [
        ("one\n\ntwo", ["\n\n"], "one", "\n\n"),
        ("one\ntwo", ["\n\n"], "one\ntwo", None),
        ("aab", ["ab"], "a", "ab"),  # the first a begins a stop string that does not come
        ("say END. END", ["END"], "say ", "END"),
        ("ends with a part: EN", ["END"], "ends with a part: EN", None),
        ("first of two", ["two", "of"], "first ", "of"),
        ("größe", ["ß"], "grö", "ß"),
        ("nothing", [], "nothing", None),
    ],
)
def test_stop_strings(text: str, stops: list[str], expected: str, by: str | None) -> None:
    pieces, stopped_by = stopping(text, *stops)
    assert "".join(pieces) == expected
    assert stopped_by == by


def test_text_that_cannot_stop_is_shown_at_once() -> None:
    pieces, _ = stopping("a\nb", "\n\n")
    assert pieces == ["a", "", "\nb", ""]
