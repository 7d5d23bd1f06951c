"""A Hub on this machine that the libraries take for the real one, with an empty cache for each test."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import Hub

from nemotron_h.core import hub as client


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    hub = Hub()
    yield hub
    hub.stop()


@pytest.fixture
def hub(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The server, empty. Its address is what HF_ENDPOINT would have set when the libraries were imported."""
    find = socket.getaddrinfo

    def loopback_alone(host: Any, *arguments: Any, **options: Any) -> Any:
        assert host == "127.0.0.1", f"a test asked for {host}"
        return find(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", loopback_alone)
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # of processes that a test starts: the Hub's is HTTPS
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    from huggingface_hub import HfFileSystem, constants

    for values in (server.repos, server.faults, server.log):
        values.clear()
    HfFileSystem.clear_instance_cache()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", server.url)
    monkeypatch.setattr(
        datasets.config, "HUB_DATASETS_URL", server.url + "/datasets/{repo_id}/resolve/{revision}/{path}"
    )
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf" / "datasets")
    monkeypatch.setattr(client, "WAITS", (0.01, 0.01))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    for name, value in {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "hf")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NEMOTRON_H_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    return server
