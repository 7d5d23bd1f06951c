"""megatron-core imports where no GPU is visible, whatever PyTorch and CUDA toolkit are; tuned kernels are kept."""

from __future__ import annotations

import gc
import importlib.util
import os
import sys

import pytest
from lightning_utilities.core.imports import RequirementCache
from torch.utils import cpp_extension

from nemotron_h.platform import imports

MODULE = "megatron.core.inference.unified_memory"


def test_the_allocator_of_megatron_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_architecture(*_: object, **__: object) -> None:
        raise IndexError("list index out of range")

    module = importlib.import_module(MODULE)
    monkeypatch.setattr(cpp_extension, "load_inline", no_architecture)
    monkeypatch.delitem(sys.modules, MODULE)
    try:
        with imports.without_gpu_builds():
            again = importlib.import_module(MODULE)
        assert again is not module
        assert not again.has_unified_memory
        assert cpp_extension.load_inline is no_architecture
    finally:
        importlib.import_module("megatron.core.inference").unified_memory = module


def test_a_visible_gpu_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imports.torch.cuda, "is_available", lambda: True)
    before = cpp_extension.load_inline
    with imports.without_gpu_builds():
        assert cpp_extension.load_inline is before


@pytest.mark.parametrize(
    ("variables", "after"),
    [
        ({}, "1"),
        ({"TRITON_CACHE_AUTOTUNING": "0"}, "0"),
        ({"MAMBA_DETERMINISTIC": "0"}, "1"),
        ({"MAMBA_DETERMINISTIC": "1"}, None),
        ({"MAMBA_DETERMINISTIC": "1", "TRITON_CACHE_AUTOTUNING": "1"}, "1"),
    ],
)
def test_tuned_kernels_are_kept_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], after: str | None
) -> None:
    for name in ("TRITON_CACHE_AUTOTUNING", "MAMBA_DETERMINISTIC"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    imports.keep_tuned_kernels()
    assert os.environ.get("TRITON_CACHE_AUTOTUNING") == after


def test_unused_packages_are_hidden_while_nemo_is_imported_and_come_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def function() -> None: ...

    monkeypatch.setattr(imports.torch.cuda, "is_available", lambda: False)
    compiler = imports.torch.compile
    with imports.without_unused():
        hidden = [name for name in imports.UNUSED if sys.modules.get(name, ...) is None]
        assert not any(RequirementCache(name) for name in hidden)
        assert not any(importlib.util.find_spec(name) for name in hidden)
        assert imports.torch.compile(function) is imports.torch.compile()(function) is function
        assert RequirementCache("torch>=2")
        assert not gc.isenabled()
    assert imports.torch.compile is compiler
    assert gc.isenabled()
    assert all(importlib.util.find_spec(name) for name in imports.UNUSED)
    assert RequirementCache("matplotlib")
