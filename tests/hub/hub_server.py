"""A Hugging Face Hub on this machine: the requests that huggingface_hub and datasets make, answered from memory."""

from __future__ import annotations

import fnmatch
import hashlib
import http.server
import json
import threading
from dataclasses import dataclass, field
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class Repo:
    """A repository with one commit.

    Args:
        files: path -> content.
        tags, branches: names of the commit.
        needs: the token without which its files are refused.
    """

    files: dict[str, bytes]
    tags: list[str] = field(default_factory=list)
    branches: list[str] = field(default_factory=lambda: ["main"])
    needs: str = ""
    gated: bool = False

    def commit(self) -> str:
        return hashlib.sha1(
            json.dumps([(k, hashlib.sha1(v).hexdigest()) for k, v in sorted(self.files.items())]).encode()
        ).hexdigest()

    def has(self, revision: str) -> bool:
        return revision in (self.commit(), *self.tags, *self.branches)


@dataclass
class Fault:
    """An answer in place of the right one, for paths that match, so many times."""

    pattern: str
    status: int
    times: int
    headers: dict[str, str] = field(default_factory=dict)
    after: int = 0


class Hub(http.server.ThreadingHTTPServer):
    """The server, from `start` to `stop`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, Repo] = {}  # datasets/org/name, or models/org/name
        self.faults: list[Fault] = []
        self.log: list[tuple[str, str, int, str]] = []  # method, path, bytes of the answer, authorization
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self.shutdown()
        self.server_close()

    def downloaded(self, pattern: str) -> int:
        """The bytes of answers to GET for paths that match."""
        return sum(size for method, path, size, _ in self.log if method == "GET" and fnmatch.fnmatch(path, pattern))

    def fault(self, path: str) -> Fault | None:
        for each in self.faults:
            if each.times and fnmatch.fnmatch(path, each.pattern):
                if each.after:
                    each.after -= 1
                    continue
                each.times -= 1
                return each
        return None


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length).decode()
        url = urlsplit(self.path)
        path = unquote(url.path)
        if fault := self.server.fault(path):
            self._send(fault.status, b"broken", fault.headers)
        elif path.startswith("/api/"):
            self._api(path.removeprefix("/api/"), parse_qs(url.query), body)
        else:
            self._file(path.lstrip("/"))

    do_HEAD = do_POST = do_GET

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        headers = headers or {}
        self.server.log.append(
            (self.command, unquote(urlsplit(self.path).path), len(body), self.headers.get("Authorization", ""))
        )
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, content: object) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _refused(self, repo: Repo | None) -> bool:
        """Send a refusal as the Hub does, and return whether there was one."""
        if repo is None:
            self._send(401, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
            return True
        if not repo.needs or self.headers.get("Authorization") == f"Bearer {repo.needs}":
            return False
        code = "GatedRepo" if repo.gated else "RepoNotFound"
        status = 403 if repo.gated and self.headers.get("Authorization") else 401
        self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": "Access is restricted"})
        return True

    def _api(self, path: str, query: dict[str, list[str]], body: str) -> None:
        parts = path.split("/")
        name, what, rest = "/".join(parts[:3]), "/".join(parts[3:4]), parts[4:]
        repo = self.server.repos.get(name)
        public = repo is not None and repo.gated and what != "auth-check"  # facts of a gated one
        if not public and self._refused(repo):
            return
        if what == "auth-check":
            self._json({})
            return
        if what == "refs":
            refs = {
                kind: [{"name": n, "ref": f"refs/{n}", "targetCommit": repo.commit()} for n in names]
                for kind, names in (("branches", repo.branches), ("tags", repo.tags))
            }
            self._json({**refs, "converts": []})
            return
        revision = rest[0] if rest else "main"
        if not repo.has(revision):
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
            return
        if what in ("", "revision"):
            listed = [_entry(path, content) for path, content in repo.files.items()]
            siblings = [{"rfilename": e["path"], "size": e["size"], "blobId": e["oid"], **_lfs(e)} for e in listed]
            self._json(
                {
                    "_id": "1",
                    "id": "/".join(parts[1:3]),
                    "sha": repo.commit(),
                    "siblings": siblings,
                    "private": False,
                    "downloads": 0,
                    "tags": [],
                    "likes": 0,
                }
            )
        elif what == "paths-info":
            wanted = parse_qs(body)["paths"]
            self._json([entry for path in wanted for entry in _entries(repo, path, True) if entry["path"] == path])
        elif what == "tree":
            folder = "/".join(rest[1:])
            found = list(_entries(repo, folder, query.get("recursive", ["False"])[0] == "True"))
            if found:
                self._json(found)
            else:
                self._send(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Error-Message": "not there"})
        else:
            self._send(404, b"{}")

    def _file(self, path: str) -> None:
        kind = "datasets" if path.startswith("datasets/") else "models"
        name, _, rest = path.removeprefix("datasets/").partition("/resolve/")
        revision, _, file = rest.partition("/")
        repo = self.server.repos.get(f"{kind}/{name}")
        if self._refused(repo):
            return
        if not repo.has(revision):
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
            return
        if file not in repo.files:
            self._send(
                404,
                b"{}",
                {"X-Error-Code": "EntryNotFound", "X-Error-Message": "not there", "X-Repo-Commit": repo.commit()},
            )
            return
        content = repo.files[file]
        headers = {"X-Repo-Commit": repo.commit(), "ETag": f'"{_etag(content)}"', "Accept-Ranges": "bytes"}
        if file.endswith((".safetensors", ".parquet")):
            headers |= {"X-Linked-ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Linked-Size": str(len(content))}
        wanted = self.headers.get("Range", "")
        if wanted.startswith("bytes="):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            begin, end = int(first), min(int(last) + 1 if last else len(content), len(content))
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(content)}"
            self._send(206, content[begin:end], headers)
        else:
            self._send(200, content, headers)


def _etag(content: bytes) -> str:
    """The hash that git has of a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _lfs(entry: dict) -> dict[str, object]:
    lfs = entry.get("lfs")
    return {"lfs": {"sha256": lfs["oid"], "size": lfs["size"], "pointerSize": 130}} if lfs else {}


def _entries(repo: Repo, folder: str, recursive: bool):
    prefix = f"{folder}/" if folder else ""
    folders = set()
    for path, content in sorted(repo.files.items()):
        if path == folder:
            yield _entry(path, content)
        if not path.startswith(prefix):
            continue
        inner = path.removeprefix(prefix).split("/")
        for depth in range(1, len(inner) if recursive else min(len(inner), 2)):
            name = prefix + "/".join(inner[:depth])
            if name not in folders:
                folders.add(name)
                yield {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
        if recursive or len(inner) == 1:
            yield _entry(path, content)
    if folder and any(p.startswith(prefix) for p in repo.files):
        yield {"type": "directory", "path": folder, "oid": "0" * 40, "size": 0}


def _entry(path: str, content: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": path, "oid": _etag(content), "size": len(content)}
    if path.endswith((".safetensors", ".parquet")):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return entry
