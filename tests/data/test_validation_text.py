"""The halves of the held-out text: the same mixture in both, and no token in both."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from nemotron_h.core.errors import UserError
from nemotron_h.data.feed.sampler import ValidationText
from nemotron_h.data.indexed import TokenStream, write_index

LENGTHS = {"web": 1001, "code": 100, "tiny": 31}  # tokens; tiny has less than two windows
SEQ = 16


@pytest.fixture
def held_out(tmp_path: Path) -> tuple[SimpleNamespace, SimpleNamespace]:
    """A blend and its manifest; every token tells its place in its source, and the source by thousands."""
    for number, (name, length) in enumerate(LENGTHS.items()):
        (np.arange(length) + 2000 * number).astype(np.uint16).tofile(tmp_path / f"{name}.bin")
        write_index(tmp_path / f"{name}.idx", np.array([length]), np.dtype(np.uint16))
    shares = {"web": 0.5, "code": 0.4, "tiny": 0.1}
    blend = SimpleNamespace(name="b", sources=LENGTHS, phases=[0], source_shares=lambda _: shares)
    manifest = SimpleNamespace(tokens=lambda _: LENGTHS, stream=lambda name, _: TokenStream(str(tmp_path / name)))
    return blend, manifest


def test_halves_share_no_token(held_out: tuple[SimpleNamespace, SimpleNamespace]) -> None:
    blend, manifest = held_out
    halves = ValidationText.halves(blend, manifest, SEQ)
    first, second = (half.read(manifest, 30) for half in halves)
    assert halves[0].left_out == halves[1].left_out == ["tiny"]
    assert not np.intersect1d(first, second).size
    # the same windows of each source, from where its half begins: 12 windows of `code`, which has three
    places = np.where(first >= 2000, 50, 501)
    assert np.array_equal(second, first + places)
    assert (first >= 2000).any(axis=1).sum() > 3
    whole = ValidationText.of(blend, manifest, SEQ).read(manifest, 30)
    assert np.intersect1d(whole, first).size
    assert np.intersect1d(whole, second).size


def test_windows_go_round_within_their_half(held_out: tuple[SimpleNamespace, SimpleNamespace]) -> None:
    blend, manifest = held_out
    found = ValidationText.halves(blend, manifest, SEQ)[1].read(manifest, 30)
    turns = np.diff(found, axis=1)
    assert set(np.unique(turns)) == {1, -49, -499}  # code goes on at its 50th token, web at its 501st


def test_too_little_for_two_halves(held_out: tuple[SimpleNamespace, SimpleNamespace]) -> None:
    with pytest.raises(UserError, match="no source of blend 'b' has validation text of two windows of 600 tokens"):
        ValidationText.halves(*held_out, 600)
