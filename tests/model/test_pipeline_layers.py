"""Pipeline stages cover every layer once, also where the layers do not divide."""

from __future__ import annotations

import pytest

from nemotron_h.architecture.definition import pipeline_layers

SHAPES = [(layers, stages) for layers in (1, 2, 5, 13, 52, 98, 118) for stages in (1, 2, 3, 4, 8) if stages <= layers]


@pytest.mark.parametrize(("layers", "stages"), SHAPES)
def test_cover(layers: int, stages: int) -> None:
    split = pipeline_layers(layers, stages)
    assert len(split) == stages
    assert [layer for stage in split for layer in stage] == list(range(layers))
    sizes = [len(stage) for stage in split]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)
