"""Text from outside: one decoding for every file, prompt and JSON document."""

import pytest

from nemotron_h.core.errors import UserError
from nemotron_h.core.files import check_unicode, decode, parse_json, read_json, read_text

MARK = b"\xef\xbb\xbf"


def test_a_leading_mark_is_no_text_and_files_have_plain_line_ends(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(MARK + "é\r\nb\rc \ufeff".encode())
    assert read_text(path) == "é\nb\nc \ufeff"
    assert decode(MARK + b"a\r\n", "p") == "a\r\n"
    path.write_bytes(MARK + b'{"a": [1]}')
    assert read_json(path) == {"a": [1]}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: decode(b"ab\ncaf\xe9", "p.txt"), "p.txt: byte 6 (0xe9, line 2)"),
        (lambda: decode(MARK + b"\xff", "p.txt"), "p.txt: byte 3 (0xff)"),
        (lambda: decode("a".encode("utf-16"), "p.txt"), "p.txt: UTF-16"),
        (lambda: decode("a".encode("utf-32"), "p.txt"), "p.txt: UTF-32"),
        (lambda: read_text("/no/such/file"), "/no/such/file: No such file"),
        (lambda: check_unicode(b"caf\xe9".decode("utf-8", "surrogateescape"), "PROMPT"), "byte 0xe9 at character 3"),
        (lambda: check_unicode("a\ud800", "turn 2"), "turn 2: lone surrogate U+D800"),
        (lambda: parse_json(b"[1", "c.json"), "c.json is not JSON"),
        (lambda: parse_json("[" * 200_000, "c.json"), "c.json: the JSON is nested too deep"),
    ],
)
def test_an_error_names_the_origin_and_the_place(call, words):
    with pytest.raises(UserError) as error:
        call()
    assert words in error.value.message


def test_good_text_passes_unchanged():
    assert check_unicode("naïve \U0001f642", "p") == "naïve \U0001f642"
