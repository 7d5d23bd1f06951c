"""Sources of the Hub: what is streamed, how it goes on, what is recorded, and every refusal."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hub_server import Fault, Hub, Repo

from nemotron_h.core.errors import UserError
from nemotron_h.data.blend import load_blend
from nemotron_h.data.messages import read_conversation
from nemotron_h.data.prepare import hub_stream
from nemotron_h.data.prepare.pipeline import prepare

ROWS = [{"text": f"document {n} of the web", "other": "x" * 50, "id": n} for n in range(400)]
README = b"""---
configs:
- config_name: high
  data_files: [{split: train, path: high/*.parquet}, {split: test, path: low/*}]
- config_name: low
  data_files: low/*.parquet
---
"""


def parquet(rows: list[dict], group: int = 50) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out, row_group_size=group)
    return out.getvalue()


def jsonl(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture
def web(hub: Hub) -> Repo:
    """A data set of two configurations, in Parquet and JSON lines."""
    files = {"high/a.parquet": parquet(ROWS[:200]), "high/b.parquet": parquet(ROWS[200:])}
    repo = Repo(
        {"README.md": README, **files, "low/c.parquet": parquet(ROWS[:30]), "more/d.jsonl": jsonl(ROWS[:30])},
        tags=["v1"],
    )
    hub.repos["datasets/org/web"] = repo
    return repo


def blend(web: Repo, folder: Path, source: dict | None = None, **fetch: object) -> Path:
    """Write a blend of the data set; None takes a key out."""
    keys = {"kind": "hub", "repo": "org/web", "revision": web.commit(), "config": "high", "split": "train", **fetch}
    content = {
        "name": "local",
        "tokenizer": {"kind": "bpe", "vocab_size": 265},
        "sources": {
            "web": {"category": "web", "fetch": {k: v for k, v in keys.items() if v is not None}, **(source or {})}
        },
        "phases": [{"name": "all", "weights": {"web": 100}}],
    }
    path = folder / "local.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def streamed(path: Path, said: list[str] | None = None) -> list[dict]:
    parts = hub_stream.stream(load_blend(path), "web", (said if said is not None else []).append)
    return [json.loads(line) for _, part in parts for line in part.read_text().splitlines()]


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as error:
        streamed(path)
    return str(error.value)


def test_prepared_as_from_a_folder_of_the_same_files(hub: Hub, web: Repo, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    manifest = prepare(load_blend(blend(web, tmp_path)), tmp_path / "data", workers=1)
    folder = tmp_path / "local_files"
    for name, content in web.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    content = yaml.safe_load((tmp_path / "local.yaml").read_text())
    del content["sources"]["web"]["fetch"]
    content["sources"]["web"] |= {"path": str(folder / "high"), "format": "parquet"}
    (tmp_path / "files.yaml").write_text(yaml.safe_dump(content))
    again = prepare(load_blend(tmp_path / "files.yaml"), tmp_path / "data2", workers=1)
    assert manifest.texts("train") == again.texts("train")
    assert manifest.sources["web"].origin == f"org/web@{web.commit()}, config high, split train"
    assert {authorization for *_, authorization in hub.log} == {"Bearer hf_secret"}
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and b"hf_secret" in p.read_bytes()]
    hub.log.clear()
    prepare(load_blend(tmp_path / "local.yaml"), tmp_path / "data", workers=1)
    assert not hub.log, "what is in the cache needs no network"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert len(streamed(tmp_path / "local.yaml")) == 400
    assert "HF_HUB_OFFLINE is set" in refusal(blend(web, tmp_path, split="test"))


def test_columns(hub: Hub, web: Repo, tmp_path: Path) -> None:
    assert streamed(blend(web, tmp_path)) == [{"text": row["text"]} for row in ROWS]
    renamed = blend(web, tmp_path, columns={"text": "other", "n": "id"}, split="test", config="high")
    assert streamed(renamed) == [{"text": row["other"], "n": row["id"]} for row in ROWS[:30]]


def test_other_columns_of_parquet_are_not_downloaded(hub: Hub, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("fsspec.spec.AbstractBufferedFile.DEFAULT_BLOCK_SIZE", 4096)  # it reads ahead by 5 MB
    rng = random.Random(0)
    rows = [{"text": f"text {n}", "other": rng.randbytes(2000).hex()} for n in range(800)]
    repo = hub.repos["datasets/org/web"] = Repo({"data.parquet": parquet(rows, 800)})
    assert streamed(blend(repo, tmp_path, config=None)) == [{"text": row["text"]} for row in rows]
    assert hub.downloaded("*/data.parquet") < len(repo.files["data.parquet"]) / 3


def test_all_sources_are_looked_up_before_one_is_read(hub: Hub, web: Repo, tmp_path: Path) -> None:
    path = blend(web, tmp_path)
    content = yaml.safe_load(path.read_text())
    content["sources"]["other"] = {"category": "web", "fetch": {**content["sources"]["web"]["fetch"], "split": "none"}}
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=r"sources\.other\.fetch\.split: org/web has no split 'none'"):
        prepare(load_blend(path), tmp_path / "data", workers=1)
    assert not list((tmp_path / "cache").rglob("part-*"))
    assert hub.downloaded("*/b.parquet") == 0


def test_a_token_that_is_stored_stays_there(hub: Hub, web: Repo, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "token").write_text("hf_stored")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    assert len(streamed(blend(web, tmp_path, max_documents=3))) == 3
    assert {authorization for *_, authorization in hub.log} == {""}


def test_a_disk_that_is_too_small(hub: Hub, web: Repo, tmp_path: Path) -> None:
    assert "max_bytes asks for 1e+09 GB more" in refusal(blend(web, tmp_path, max_bytes="1000000T"))


def test_limits_and_files(hub: Hub, web: Repo, tmp_path: Path) -> None:
    assert streamed(blend(web, tmp_path, max_documents=7)) == [{"text": row["text"]} for row in ROWS[:7]]
    assert hub.downloaded("*/high/b.parquet") == 0
    some = streamed(blend(web, tmp_path, max_bytes="1K"))
    assert 1000 <= len(jsonl(some)) < 1100
    assert len(streamed(blend(web, tmp_path, config=None, files=["more/*.jsonl"]))) == 30


#: the form of the card of nvidia/Nemotron-Post-Training-Dataset-v1, whose sizes are those of this test
CARD = b"""---
dataset_info:
  features:
    - {name: uuid, dtype: string}
    - name: messages
      list:
        - {name: role, dtype: string}
        - {name: content, dtype: string}
        - name: tool_calls
          list:
            - {name: id, dtype: string}
            - {name: type, dtype: string}
  splits:
    - {name: chat, num_bytes: 1000, num_examples: 3}
    - {name: tool_calling, num_bytes: 1000, num_examples: 3}
  download_size: 2000
  dataset_size: 2000
configs:
  - config_name: default
    data_files: [{split: chat, path: data/chat-*}, {split: tool_calling, path: data/tool-*}]
license: cc-by-4.0
---
"""


def test_conversations(hub: Hub, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    rows = [{"uuid": str(n), "messages": [{**turn, "tool_calls": None} for turn in talk]} for n in range(300)]
    schema = pa.schema(
        {
            "uuid": pa.string(),
            "messages": pa.list_(
                pa.struct(
                    {
                        "role": pa.string(),
                        "content": pa.string(),
                        "tool_calls": pa.list_(pa.struct({"id": pa.string(), "type": pa.string()})),
                    }
                )
            ),
        }
    )
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema), out)
    files = {f"data/{split}-00000-of-00001.parquet": out.getvalue() for split in ("chat", "tool")}
    repo = hub.repos["datasets/org/web"] = Repo({"README.md": CARD, **files})
    path = blend(repo, tmp_path, source={"chat": "messages"}, config=None, split="chat")
    content = yaml.safe_load(path.read_text()) | {"chat_template": "nemotron_h"}
    path.write_text(yaml.safe_dump(content))
    assert streamed(path) == rows, "all columns"
    content["sources"]["web"]["fetch"]["columns"] = {"messages": "messages"}
    path.write_text(yaml.safe_dump(content))
    assert streamed(path) == [{"messages": row["messages"]} for row in rows]
    source = load_blend(path).sources["web"]
    assert all(read_conversation(record, source.chat) for record in streamed(path))


def test_a_killed_preparation_goes_on(hub: Hub, web: Repo, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(hub_stream, "PART_BYTES", 3000)
    path = blend(web, tmp_path)
    straight = prepare(load_blend(path), tmp_path / "straight", workers=1)
    whole = [part.read_bytes() for part in sorted((tmp_path / "cache").rglob("part-*"))]
    assert len(whole) > 4
    monkeypatch.setenv("NEMOTRON_H_CACHE", str(tmp_path / "killed"))
    script = Path(__file__).parent / "kill_after_parts.py"
    run = subprocess.run([sys.executable, script, path, "3"], capture_output=True, text=True, timeout=120)
    assert run.returncode == -9, run.stderr
    [state] = (tmp_path / "killed").rglob("state.json")
    finished = {part: part.stat().st_mtime_ns for part in sorted(state.parent.glob("part-*"))}
    assert len(finished) == 3
    resumed = prepare(load_blend(path), tmp_path / "resumed", workers=1)
    assert [part.read_bytes() for part in sorted(state.parent.glob("part-*"))] == whole
    assert {part: part.stat().st_mtime_ns for part in finished} == finished
    assert resumed.texts("train") == straight.texts("train")
    assert not list(state.parent.glob(".part-*")), "what the killed process left is removed"


def test_a_server_that_fails_for_a_while(hub: Hub, web: Repo, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(hub_stream, "PART_BYTES", 3000)
    said: list[str] = []
    hub.faults += [
        Fault("*/auth-check", 429, 1, {"Retry-After": "0"}),
        Fault("*/revision/*", 502, 2),
        Fault("*/b.parquet", 503, 7),  # after some parts; 6 of them are the library's own attempts
    ]
    assert streamed(blend(web, tmp_path), said) == [{"text": row["text"]} for row in ROWS]
    assert not any(fault.times for fault in hub.faults)
    assert [line for line in said if "HTTP 429" in line]
    assert [line for line in said if "HTTP 502" in line]
    assert [line for line in said if "HTTP 503" in line]


@pytest.mark.parametrize(("status", "words"), [(503, "the Hub fails (HTTP 503)"), (429, "refuses more requests")])
def test_a_server_that_goes_on_failing(hub: Hub, web: Repo, tmp_path: Path, status: int, words: str) -> None:
    hub.faults.append(Fault("*/auth-check", status, 99))
    text = refusal(blend(web, tmp_path))
    assert words in text
    assert "local.yaml: sources.web.fetch: org/web@" in text
    assert "it goes on" in text


def test_no_network(hub: Hub, web: Repo, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9 cannot be reached\nCheck the network" in refusal(blend(web, tmp_path))


def test_a_gated_data_set(hub: Hub, web: Repo, tmp_path: Path, monkeypatch) -> None:
    web.needs, web.gated = "hf_right", True
    text = refusal(blend(web, tmp_path))
    assert "access is restricted (HTTP 401), and HF_TOKEN is not set\nAccept its terms on" in text
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    text = refusal(blend(web, tmp_path))
    assert "access is restricted (HTTP 403), and the token of HF_TOKEN has no access" in text
    assert "hf_wrong" not in text
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert len(streamed(blend(web, tmp_path))) == 400


def test_revisions(hub: Hub, web: Repo, tmp_path: Path) -> None:
    text = refusal(blend(web, tmp_path, revision="main"))
    assert "main is a branch, which moves" in text
    assert web.commit() in text
    assert "there is no such revision" in refusal(blend(web, tmp_path, revision="0" * 40))
    text = refusal(blend(web, tmp_path, revision="v2"))
    assert "there is no such revision" in text
    assert "its tags: v1" in text
    path = blend(web, tmp_path, revision="v1", max_documents=1)
    assert len(streamed(path)) == 1
    assert hub_stream.origin(load_blend(path).sources["web"]).startswith(f"org/web@{web.commit()}")
    hub.log.clear()
    assert "nemotron-h data pin" in refusal(blend(web, tmp_path, revision="unpinned"))
    assert not hub.log


def test_names_that_are_not_there(hub: Hub, web: Repo, tmp_path: Path) -> None:
    text = refusal(blend(web, tmp_path, config="higher"))
    assert "sources.web.fetch.config: org/web has no configuration 'higher'\nDid you mean high? Its" in text
    assert "org/web has several configurations\nIts configurations: high, low" in refusal(
        blend(web, tmp_path, config=None)
    )
    text = refusal(blend(web, tmp_path, split="trian"))
    assert "sources.web.fetch.split: org/web has no split 'trian'\nDid you mean train? Its splits: train, test" in text
    text = refusal(blend(web, tmp_path, source={"text_fields": ["txt"]}))
    assert "sources.web.text_fields: org/web has no column txt\nDid you mean text? Its columns: text, other, id" in text
    assert "fetch.columns: org/web has no column words" in refusal(blend(web, tmp_path, columns={"text": "words"}))
    assert "no file matches none/*" in refusal(blend(web, tmp_path, config=None, files=["none/*"]))
    assert "there is no such dataset" in refusal(blend(web, tmp_path, repo="org/wbe"))
    assert not [size for method, path, size, _ in hub.log if method == "GET" and path.endswith("b.parquet")]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"repo": "web"}, "fetch.repo: 'web' is not organisation/name"),
        ({"revision": None}, "fetch.revision: missing"),
        ({"split": ""}, "fetch.split: '' is not the name of a split"),
        ({"package": "a==1"}, "fetch.package: not for kind hub"),
        ({"files": ["../x"], "config": None}, "fetch.files: '../x' is not a path in the data set"),
        ({"files": ["x"]}, "fetch.files: not with config"),
        ({"max_bytes": "much"}, "fetch.max_bytes: 'much' is not a count"),
        ({"columns": {"body": "text"}}, "text_fields: fetch.columns gives no field text"),
        ({"kind": "pip", "package": "a==1", "sha256": "0" * 64, "members": ["*"]}, "fetch.repo: not for kind pip"),
    ],
)
def test_keys_that_cannot_be(tmp_path: Path, keys: dict, words: str) -> None:
    path = blend(Repo({}), tmp_path, {} if keys.get("kind") != "pip" else {"format": "jsonl"}, **keys)
    with pytest.raises(UserError) as error:
        load_blend(path)
    assert words in str(error.value)


@pytest.mark.parametrize("package", ["datasets", "huggingface_hub"])
def test_a_package_that_is_not_installed(hub: Hub, web: Repo, tmp_path: Path, monkeypatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    text = refusal(blend(web, tmp_path))
    assert f"the Python package {package} is needed and not installed\nRun: pip install {package}" in text


def test_a_file_that_is_damaged(hub: Hub, web: Repo, tmp_path: Path) -> None:
    web.files["more/d.jsonl"] = b'{"text": "a"}\n{"text": "b\n'
    text = refusal(blend(web, tmp_path, config=None, files=["more/*"]))
    assert "cannot be read: " in text
    assert "local.yaml: sources.web.fetch: org/web@" in text
