"""A checkpoint's index is read as data: no pickle in it runs code or touches a file, through any command."""

from __future__ import annotations

import ctypes
import importlib
import operator
import os
import pickle
import re
import runpy
import shutil
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, filesystem
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from nemotron_h.checkpoint import torch_dist
from nemotron_h.checkpoint.index import check_weights, parse_index, safe_reads
from nemotron_h.core.errors import UserError

FILE = Path("run/step-000001/weights/.metadata")


class Call:
    """A pickle that calls a function when it is read."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def calls(marker: Path) -> dict[str, Any]:
    """Return payloads that make the file `marker`, or empty it, when they are read."""
    touch, code = f"touch {marker}", f"open({str(marker)!r}, 'w')"
    return {
        "os.system": Call(os.system, touch),
        "os.popen": Call(os.popen, touch),
        "os.mkdir": Call(os.mkdir, str(marker)),
        "os.open": Call(os.open, str(marker), os.O_CREAT),
        "subprocess.run": Call(subprocess.run, ["touch", str(marker)]),
        "subprocess.Popen": Call(subprocess.Popen, ["touch", str(marker)]),
        "subprocess.getoutput": Call(subprocess.getoutput, touch),
        "builtins.exec": Call(exec, code),
        "builtins.eval": Call(eval, code),
        "builtins.open": Call(open, str(marker), "w"),
        "builtins.getattr": Call(getattr, marker, "touch"),
        "runpy.run_path": Call(runpy.run_path, str(marker)),
        "importlib.import_module": Call(importlib.import_module, "antigravity"),
        "ctypes.CDLL": Call(ctypes.CDLL, str(marker)),
        "operator.methodcaller": Call(operator.methodcaller, "touch"),
        "functools.partial": Call(partial, os.system, touch),
        "shutil.rmtree": Call(shutil.rmtree, str(marker.parent)),
        "pickle.loads": Call(pickle.loads, pickle.dumps(Call(os.system, touch))),
        "torch.load": Call(torch.load, str(marker)),
        "torch.PyTorchFileWriter": Call(torch.PyTorchFileWriter, str(marker)),
        "torch._load_from_bytes": Call(torch.storage._load_from_bytes, b""),
        "torch.Tensor": Call(torch.Tensor, 3),
        "FileSystem": Call(filesystem.FileSystem),
        "FileSystemWriter": Call(filesystem.FileSystemWriter, str(marker)),
        "FileSystemReader": Call(filesystem.FileSystemReader, str(marker)),
    }


@pytest.mark.parametrize("place", ["alone", "field", "key"])
@pytest.mark.parametrize("name", sorted(calls(Path("/"))))
def test_nothing_but_an_index_is_built(tmp_path: Path, name: str, place: str) -> None:
    marker = tmp_path / "marker"
    attack = calls(marker)[name]
    content = {
        "alone": attack,
        "field": Metadata({}, planner_data=attack, storage_data={}),
        "key": Metadata({}, storage_data={MetadataIndex("a", index=attack): None}),
    }[place]
    with pytest.raises(UserError, match=r"is damaged: weights/\.metadata: UnpicklingError\('it names ") as raised:
        parse_index(pickle.dumps(content), FILE)
    assert "which is no part of an index" in raised.value.message
    assert not marker.exists()


@pytest.mark.parametrize("name", ["../../secret.distcp", "/etc/passwd", "", 5, "a/b.distcp", ".metadata"])
def test_no_tensor_lies_elsewhere(name: Any) -> None:
    index = Metadata({}, storage_data={MetadataIndex("a"): filesystem._StorageInfo(name, 0, 1)})
    with pytest.raises(UserError, match="outside of the folder"):
        parse_index(pickle.dumps(index), FILE)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80",
        bytes(100),
        b"(" * 100_000,
        pickle.dumps({}),
        pickle.dumps(Metadata(None)),
        pickle.dumps(Metadata({1: 2})),
    ],
)
def test_what_is_no_index_is_one_error(content: bytes) -> None:
    with pytest.raises(UserError, match="is damaged"):
        parse_index(content, FILE)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    folder = tmp_path / "step-000001" / "weights"
    torch_dist.save(folder, {"a": torch.empty(2, device="meta")}, lambda _: torch.ones(2))
    return folder


def test_torch_loads_weights_only_while_a_checkpoint_is_read(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    before = FileSystemReader.read_metadata
    attack = Call(os.system, f"touch {tmp_path / 'marker'}")
    torch.save(attack, tmp_path / "attack.pt")
    with safe_reads(weights):
        for arguments in ({}, {"weights_only": False}):
            with pytest.raises(pickle.UnpicklingError):
                torch.load(tmp_path / "attack.pt", **arguments)
        reader = FileSystemReader(weights)
        assert reader.read_metadata().state_dict_metadata["a"].size == (2,)
        (weights / ".metadata").write_bytes(pickle.dumps(attack))  # after the check
        with pytest.raises(UserError, match=r"names posix\.system"):
            reader.read_metadata()
    assert not (tmp_path / "marker").exists()
    assert FileSystemReader.read_metadata is before
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("common.pt", Call(os.system, "true"), "weights/common.pt: Trying to load unsupported GLOBAL posix.system"),
        ("common.pt", b"x", "weights/common.pt: "),
        ("metadata.json", b"[]", "weights/metadata.json: "),
        ("metadata.json", b'{"sharded_backend": "zarr", "common_backend": "torch"}', "its format is zarr"),
        ("modelopt_run_config.yaml", b"", "weights/modelopt_run_config.yaml is no file that training writes"),
    ],
)
def test_what_else_lies_beside_the_index_is_checked(weights: Path, name: str, content: Any, said: str) -> None:
    check_weights(weights)
    if isinstance(content, bytes):
        (weights / name).write_bytes(content)
    else:
        torch.save(content, weights / name)
    with pytest.raises(UserError, match=re.escape(said)):
        check_weights(weights)
