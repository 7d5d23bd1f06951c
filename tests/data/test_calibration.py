"""Windows to measure a model on: of the training text, in the blend's shares, never one twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from local_corpus import Corpus

from nemotron_h.core.errors import UserError
from nemotron_h.data.blend import load_blend
from nemotron_h.data.feed.calibration import calibration_windows, text_record
from nemotron_h.data.indexed import TokenStream
from nemotron_h.data.manifest import Manifest, load_manifest
from nemotron_h.data.prepare.pipeline import prepare


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    corpus = Corpus(tmp_path_factory.mktemp("corpus"))
    path = corpus.write()
    prepare(load_blend(str(path)), str(corpus.root), workers=1)
    return path, load_manifest(corpus.root, "local")


def test_windows_of_the_training_text(prepared: tuple[Path, Manifest]) -> None:
    blend, manifest = load_blend(str(prepared[0])), prepared[1]
    found = calibration_windows(blend, manifest, 40, 16)
    assert found.shape == (40, 16)
    assert np.array_equal(calibration_windows(blend, manifest, 10, 16), found[:10])
    assert not np.array_equal(calibration_windows(blend, manifest, 40, 16, seed=1), found)
    streams = [TokenStream(manifest.prefix(name, "train")) for name in blend.sources]
    texts = [np.concatenate([s.read(0, s.tokens), s.read(0, 16)]) for s in streams]
    places = set()
    for window in found:
        hits = [
            (source, int(start))
            for source, text in enumerate(texts)
            for start in np.flatnonzero((np.lib.stride_tricks.sliding_window_view(text, 16) == window).all(1))
        ]
        assert hits
        places.add(hits[0])
    assert len(places) == 40
    record = text_record(blend, manifest)
    assert record["blend"] == "local"
    assert set(record["sources"]) == set(blend.sources)


def test_too_little_text(prepared: tuple[Path, Manifest]) -> None:
    blend, manifest = load_blend(str(prepared[0])), prepared[1]
    with pytest.raises(
        UserError, match=r"too little training text for 5,000 samples of 16 tokens: .*code has \d+ of the"
    ):
        calibration_windows(blend, manifest, 5000, 16)
    with pytest.raises(UserError, match="fewer tokens than one window of 100,000"):
        calibration_windows(blend, manifest, 1, 100_000)
