"""Downloads: checked, cached, unpacked without installing; every failure is one clear message. A local folder plays
the registry.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from nemotron_h.core.errors import UserError
from nemotron_h.core.files import file_sha256
from nemotron_h.data.blend import Fetch, load_blend
from nemotron_h.data.prepare import fetch as fetching
from nemotron_h.data.prepare import pipeline as preparing
from nemotron_h.data.tokenizer import load_tokenizer


@pytest.fixture
def registry(tmp_path, monkeypatch) -> Path:
    """A folder with one wheel that pip finds, and an empty cache."""
    folder = tmp_path / "registry"
    folder.mkdir()
    with zipfile.ZipFile(folder / "toydata-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("toydata/a.jsonl", '{"text": "hello"}\n')
        wheel.writestr("toydata/tests/b.jsonl", '{"text": "test"}\n')
        wheel.writestr("toydata-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: toydata\nVersion: 1.0\n")
        wheel.writestr("toydata-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("toydata-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("NEMOTRON_H_CACHE", str(tmp_path / "cache"))
    return folder


def spec(registry: Path, **changes) -> Fetch:
    sha256 = file_sha256(next(registry.iterdir()))
    return Fetch(
        **{
            "package": "toydata==1.0",
            "sha256": sha256,
            "members": ["toydata/*.jsonl"],
            "exclude": ["*/tests/*"],
            **changes,
        }
    )


def test_downloads_once_and_reads_members(registry, monkeypatch):
    wanted = spec(registry)
    said = []
    [(name, path)] = fetching.fetch(wanted, said.append)
    assert (name, path.read_text()) == ("toydata/a.jsonl", '{"text": "hello"}\n')
    assert said == ["downloading toydata==1.0"]
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("downloaded again"))
    assert fetching.fetch(wanted, said.append) == [(name, path)]


def test_a_damaged_cache_is_fetched_again(registry):
    wanted = spec(registry)
    fetching.fetch(wanted)
    [archive] = fetching.cache_folder().glob("pip-*/*.whl")
    archive.write_bytes(b"damaged")
    fetching.fetch(wanted)
    assert file_sha256(archive) == wanted.sha256


def test_wrong_hash(registry):
    with pytest.raises(
        UserError, match=r"toydata==1.0: the downloaded file is not the expected one\n  expected sha256 0000"
    ) as error:
        fetching.fetch(spec(registry, sha256="0" * 64))
    assert "got" in error.value.message
    assert file_sha256(next(registry.iterdir())) in error.value.message
    assert not list(fetching.cache_folder().glob("pip-*"))


def test_not_to_be_had(registry):
    with pytest.raises(UserError, match=r"other==2.0: cannot be reached") as error:
        fetching.fetch(spec(registry, package="other==2.0"))
    assert "Check the network" in error.value.hint


def test_no_network(registry, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(UserError, match=r"other==2.0: cannot be reached"):
        fetching.fetch(spec(registry, package="other==2.0"))


def test_no_pip(registry, monkeypatch):
    monkeypatch.setattr(
        fetching, "_pip_command", lambda *_: [sys.executable, "-c", "raise SystemExit('No module named pip')"]
    )
    with pytest.raises(UserError, match="no pip"):
        fetching.fetch(spec(registry))


def test_member_that_is_not_there(registry):
    with pytest.raises(UserError, match=r"no member matches nothing/\*"):
        fetching.fetch(spec(registry, members=["nothing/*"]))


def test_member_that_points_outside(registry):
    [wheel] = registry.iterdir()
    with zipfile.ZipFile(wheel, "a") as content:
        content.writestr("toydata/../../../evil.jsonl", "x")
    with pytest.raises(UserError, match="points outside"):
        fetching.fetch(spec(registry, members=["toydata/*"]))


def test_an_archive_that_fills_the_disk(registry):
    [wheel] = registry.iterdir()
    with zipfile.ZipFile(wheel, "a", zipfile.ZIP_DEFLATED) as content:
        content.writestr("toydata/zeros.jsonl", bytes(1 << 24))
    with pytest.raises(UserError, match=r"toydata==1.0: unpacked it is over 100 times its size"):
        fetching.fetch(spec(registry))
    assert not list((fetching.cache_folder() / "unpacked").iterdir())


@pytest.fixture
def debian(registry, monkeypatch):
    """A package that apt-get would download, made here; links, and a file of another folder beside its text."""
    tree = registry.parent / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN" / "control").write_text(
        "Package: toydoc\nVersion: 1\nArchitecture: all\nMaintainer: us\nDescription: a text\n"
    )
    (tree / "usr/share/doc").mkdir(parents=True)
    (tree / "usr/share/doc/a.txt").write_text("hello")
    (tree / "usr/share/doc/secret.txt").symlink_to("/etc/passwd")
    (tree / "etc").mkdir()
    (tree / "etc/large").write_bytes(bytes(1 << 24))
    package = registry.parent / "toydoc_1_all.deb"
    subprocess.run(["dpkg-deb", "--build", str(tree), str(package)], check=True, capture_output=True)
    monkeypatch.setattr(fetching, "_apt_command", lambda _: ["cp", str(package), "."])
    return package


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")
def test_a_debian_package_is_read_without_unpacking_it(debian):
    wanted = Fetch(package="toydoc", kind="apt", members=["usr/share/doc/*"])
    [(name, path)] = fetching.fetch(wanted)
    assert (name, path.read_text()) == ("usr/share/doc/a.txt", "hello")
    with pytest.raises(UserError, match="100 times its size"):
        fetching.fetch(Fetch(package="toydoc", kind="apt", members=["*"]))
    [archive] = fetching.cache_folder().glob("apt-*/*.deb")
    archive.write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"cannot be read with dpkg-deb: .* unexpected end of file"):
        fetching.fetch(Fetch(package="toydoc", kind="apt", members=["usr/*"]))


def test_nothing_is_installed(registry):
    fetching.fetch(spec(registry))
    run = subprocess.run([sys.executable, "-c", "import toydata"], capture_output=True, check=False)
    assert run.returncode


def test_the_real_vocabulary_from_its_package(tmp_path):
    """The 131,072 vocabulary as `nemotron_h` fetches it: right size, nothing lost. Uses the user's cache and package
    index.
    """
    blend = load_blend("sample")
    try:
        [(_, path)] = fetching.fetch(blend.tokenizer.fetch)
    except UserError as error:
        if "cannot be reached" not in error.message:
            raise
        pytest.skip(f"no package index: {error.message}")
    preparing._copy_tokenizer(blend.tokenizer, [(path.name, path)], tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (131_072, 2)
    assert tokenizer.is_lossless()
    assert tokenizer.text_to_ids("12") == [1049, 1050]  # digits one by one; bytes 49 and 50 after 1,000 special ids
