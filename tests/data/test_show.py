"""`data show`: shares, switches, tokens, epochs, disk and the picture."""

import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from local_corpus import Corpus
from typer.testing import CliRunner

from nemotron_h.cli.main import app
from nemotron_h.core.errors import UserError
from nemotron_h.core.units import short_count
from nemotron_h.data.blend import load_blend
from nemotron_h.data.show import overview

STEP = 8192 * 768  # paper 2.4: tokens of a step


@pytest.mark.parametrize(
    ("tokens", "begins", "steps", "total"),
    [
        (15 * 10**12, [0, 9, 12, 14.62], [0, 1_430_511, 1_907_349, 2_323_786], 2_384_186),
        (20 * 10**12, [0, 12, 16, 19.62], [0, 1_907_349, 2_543_132, 3_118_515], 3_178_914),
    ],
)
def test_the_papers_blend(tmp_path: Path, tokens: int, begins: list, steps: list, total: int) -> None:
    view = overview(load_blend("nemotron_h"), tmp_path, tokens, STEP)
    assert [p.begin for p in view.phases] == [Fraction(str(b)) * 10**12 for b in begins]
    assert view.phases[-1].tokens == 380 * 10**9
    assert [p.span.first_step for p in view.phases] == steps
    assert view.phases[-1].span.end_step == total
    assert [p.written_sum for p in view.phases] == pytest.approx([100, 99.1, 99.9, 99.9])
    assert [p.normalised for p in view.phases] == [False, True, True, True]
    assert view.phases[1].categories["web_crawl"] == pytest.approx(40.7 / 99.1)
    assert sum(view.run_share(c) for c in view.categories) == pytest.approx(1)
    third, fourth = tokens * 0.2 - 380e9, 380e9
    sft = 12.6 / 99.9 * third + 31.8 / 99.9 * fourth
    assert {s.name: s.tokens for s in view.sources}["sft"] == pytest.approx(sft)
    assert all(s.prepared is None and s.epochs is None and s.disk == 0 for s in view.sources)
    assert "not prepared" in view.state


def test_prepared_sources(corpus: Corpus) -> None:
    corpus.content["sources"]["code"]["max_epochs"] = 2
    manifest = corpus.prepare()
    tokens = 100_000
    view = overview(corpus.blend(), corpus.root, tokens)
    # one: 70/10/20 % for 60 %, two: 50/30/20 % for 40 %; two web sources share equally
    taken = {"web": 0.31 * tokens, "more": 0.31 * tokens, "wiki": 0.18 * tokens, "code": 0.2 * tokens}
    for source in view.sources:
        assert source.tokens == pytest.approx(taken[source.name])
        assert source.prepared == manifest.tokens()[source.name]
        assert source.epochs == pytest.approx(taken[source.name] / source.prepared)
        files = [p for p in (corpus.prepared / source.name).iterdir() if p.suffix in (".bin", ".idx")]
        assert source.disk == sum(p.stat().st_size for p in files) > 0
    assert [s.name for s in view.sources if s.too_many] == ["code"]
    (line,) = view.warnings()
    assert line.startswith("code: ")
    assert "limit is 2 (sources.code.max_epochs)" in line
    assert "prepared in" in view.state
    assert not view.problem
    assert not overview(corpus.blend(), corpus.root).warnings()  # without a length there are no epochs


def test_what_a_run_would_refuse_is_said(corpus: Corpus) -> None:
    corpus.prepare()
    corpus.content["sources"]["web"]["text_fields"] = ["id"]
    assert "sources.web was edited" in overview(corpus.blend(), corpus.root).problem
    corpus.content["sources"]["new"] = {**corpus.content["sources"]["code"], "category": "code"}
    view = overview(corpus.blend(), corpus.root)
    assert "new" in view.problem
    assert {s.name: s.prepared for s in view.sources}["new"] is None


def test_a_damaged_manifest_is_an_error(corpus: Corpus) -> None:
    corpus.prepared.mkdir(parents=True)
    (corpus.prepared / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        overview(corpus.blend(), corpus.root)


def test_the_command_and_its_picture(tmp_path: Path) -> None:
    from matplotlib.image import imread

    picture = tmp_path / "blend.png"
    line = ["data", "show", "nemotron_h", "--tokens", "15T", "--root", str(tmp_path), "--png", str(picture)]
    result = CliRunner().invoke(app, [*line, "--seq-length", "8192", "--global-batch", "768"])
    assert result.exit_code == 0, result.output
    for text in ("41.07", "sum to 99.1 as written", "14.62T", "2,323,786", "not prepared"):
        assert text in result.output
    assert "…" not in result.output  # nothing is cut off in 80 columns
    pixels = imread(picture)
    assert pixels.shape[1] > 1000
    # Down the middle of phase 1, web crawl's blue (the first colour) takes 59 % of the bars.
    column = pixels[:, int(pixels.shape[1] * 0.2), :3]
    blue = (abs(column - [0, 0x72 / 255, 0xB2 / 255]) < 0.02).all(axis=1).sum()
    bars = (column.min(axis=1) < 0.9).sum()
    assert blue / bars == pytest.approx(0.59, abs=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--png", "x.png"], "--tokens 15T"),
        (["--tokens", "15T", "--seq-length", "8192"], "--global-batch"),
        (["--tokens", "15T", "--png", "x.jpg"], "ends in .png"),
        (["--tokens", "1B"], "last|phase"),  # the last 380 B tokens of a run of 1 B
    ],
)
def test_mistakes(tmp_path: Path, options: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["data", "show", "nemotron_h", "--root", str(tmp_path), *options])
    assert isinstance(result.exception, UserError)
    assert any(part in str(result.exception) for part in message.split("|"))


def test_it_imports_neither_torch_nor_nemo() -> None:
    code = (
        "import sys\nimport nemotron_h.cli.main\n"
        "import nemotron_h.data.show, nemotron_h.data.plot, nemotron_h.data.feed.peek\n"
        "assert not {'torch', 'nemo', 'megatron', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": ""})


@pytest.mark.parametrize(
    ("tokens", "text"),
    [(15 * 10**12, "15T"), (14_620 * 10**9, "14.62T"), (999_999, "1M"), (983_040, "983k"), (12, "12")],
)
def test_short_count(tokens: int, text: str) -> None:
    assert short_count(tokens) == text
