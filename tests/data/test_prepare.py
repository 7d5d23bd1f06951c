"""Preparation: the right tokens, the same bytes however it is run, and only the work that is needed."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from local_corpus import sentences, snapshot, write_jsonl
from rich.console import Console

from nemotron_h.core import worker_pool
from nemotron_h.core.errors import UserError
from nemotron_h.core.locks import locked
from nemotron_h.data.indexed import read_lengths
from nemotron_h.data.manifest import load_manifest
from nemotron_h.data.prepare import pipeline as preparing
from nemotron_h.data.prepare import shards
from nemotron_h.data.tokenizer import load_tokenizer

SCRIPT = Path(__file__).with_name("prepare_local.py")


def documents(manifest, source: str, split: str) -> list[str]:
    tokenizer = load_tokenizer(manifest.tokenizer_path())
    prefix = manifest.prefix(source, split)
    tokens = np.fromfile(prefix + ".bin", dtype=manifest.sources[source].splits[split].dtype)
    parts = np.split(tokens, np.cumsum(read_lengths(prefix + ".idx"))[:-1])
    assert all(part[-1] == tokenizer.eod_id for part in parts)
    return [tokenizer.ids_to_text(part[:-1]) for part in parts]


def run(corpus, root: Path, **environment: str) -> subprocess.Popen:
    command = [sys.executable, str(SCRIPT), str(corpus.write()), str(root), "2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=os.environ | environment, start_new_session=True, **pipes)


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    return output


def test_every_document_lands_in_one_split(corpus):
    manifest = corpus.prepare()
    expected = sentences(1, 6000)
    train, validation = documents(manifest, "web", "train"), documents(manifest, "web", "validation")
    assert sorted(train + validation) == sorted(expected)
    assert train == [t for t in expected if t in set(train)]  # in order
    assert 0.03 < len(validation) / len(expected) < 0.07  # 5 % asked for
    entry = manifest.sources["web"].splits["train"]
    assert (entry.documents, entry.bytes) == (len(train), sum(len(t.encode()) for t in train))
    assert entry.tokens == int(read_lengths(manifest.prefix("web", "train") + ".idx").sum())
    assert manifest == load_manifest(corpus.root, "local")


def test_the_split_is_a_property_of_the_text(corpus):
    held_out = set(documents(corpus.prepare(), "web", "validation"))
    texts = sentences(1, 6000)
    random.Random(0).shuffle(texts)
    write_jsonl(corpus.folder / "web.jsonl", [t for t in texts if t.endswith("0") or t in held_out])
    assert set(documents(corpus.prepare(), "web", "validation")) == held_out


def test_running_again_does_nothing(corpus):
    corpus.prepare()
    before = {p: p.stat().st_mtime_ns for p in corpus.prepared.rglob("*.*") if p.suffix in (".bin", ".idx")}
    corpus.prepare()
    assert "up to date" in corpus.log
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_a_changed_source_rebuilds_only_itself(corpus):
    corpus.prepare()
    before = snapshot(corpus.prepared)
    with open(corpus.folder / "more.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"text": "one more document"}) + "\n")
    manifest = corpus.prepare()
    assert "built more; 3 up to date" in corpus.log
    after = snapshot(corpus.prepared)
    changed = {name for name in before if before[name] != after[name]}
    assert {name.split("/")[0] for name in changed} == {"more", "manifest.json"}
    assert "one more document" in documents(manifest, "more", "train") + documents(manifest, "more", "validation")


def test_a_changed_weight_rebuilds_nothing(corpus):
    corpus.prepare()
    corpus.content["phases"][0]["weights"] = {"web": 60, "wiki": 20, "code": 20}
    manifest = corpus.prepare()
    assert "up to date" in corpus.log
    assert manifest.blend_hash == corpus.blend().hash()


@pytest.mark.parametrize("edit", [{"train_bytes": "20k"}, {"vocab_size": 390}])
def test_a_changed_tokenizer_rebuilds_everything(corpus, edit):
    first = corpus.prepare()
    corpus.content["tokenizer"].update(edit)
    second = corpus.prepare()
    assert "built web, more, wiki, code" in corpus.log
    assert first.tokenizer.sha256 != second.tokenizer.sha256
    assert all(first.sources[n].hash_of_inputs != second.sources[n].hash_of_inputs for n in first.sources)


def test_the_text_that_trains_the_tokenizer_is_a_dependency(corpus):
    corpus.prepare()
    (corpus.folder / "wiki.txt").write_text("\n".join(sentences(30, 500)), encoding="utf-8")
    corpus.prepare()
    assert "built web, more, wiki, code" in corpus.log


def test_same_bytes_for_any_number_of_workers(corpus, monkeypatch):
    monkeypatch.setattr(preparing.reading, "MIN_SHARD_BYTES", 1 << 16)  # several shards per source
    results = []
    for workers in (1, 2, 3):
        corpus.prepare(root=corpus.folder / f"w{workers}", workers=workers)
        results.append(snapshot(corpus.folder / f"w{workers}" / "local"))
    assert len(results[0]) > 12
    assert results[0] == results[1] == results[2]


def test_killed_at_random_points_then_finished(corpus):
    """kill -9 of all processes at 8 points, each the moment before a file is opened, renamed or removed."""
    finish(run(corpus, corpus.folder / "straight"))
    expected = snapshot(corpus.folder / "straight" / "local")
    rng, kills, rounds = random.Random(0), 0, 0
    while kills < 8:
        rounds += 1
        root = corpus.folder / f"killed{rounds}"
        for _ in range(rng.randint(2, 5)):
            process = run(corpus, root, KILL_AT=str(rng.choice((rng.randint(3, 40), rng.randint(10, 200)))))
            output, _ = process.communicate(timeout=60)
            kills += process.returncode == -signal.SIGKILL
            assert process.returncode in (0, -signal.SIGKILL), output
            if (root / "local" / "manifest.json").exists():  # never there before all is whole
                assert snapshot(root / "local") == expected
        finish(run(corpus, root))
        assert snapshot(root / "local") == expected
        shutil.rmtree(root)
    assert rounds <= 5  # else most runs finished before they were killed


def test_workers_do_not_outlive_a_killed_parent(corpus):
    process = run(corpus, corpus.root)
    time.sleep(1.0)
    process.kill()
    process.communicate(timeout=10)  # returns when the last worker has closed the pipe


def test_finished_shards_are_not_done_again(corpus, monkeypatch):
    monkeypatch.setattr(preparing.reading, "MIN_SHARD_BYTES", 1 << 16)

    def stop(self, plan, merged):
        raise KeyboardInterrupt

    finish_source = preparing._Preparation._finish_source
    monkeypatch.setattr(preparing._Preparation, "_finish_source", stop)
    out = io.StringIO()
    with pytest.raises(KeyboardInterrupt):
        preparing.prepare(corpus.blend(), corpus.root, workers=2, console=Console(file=out, width=200))
    assert "ctrl-c: the same command continues; finished shards are kept" in out.getvalue()
    monkeypatch.setattr(preparing._Preparation, "_finish_source", finish_source)
    done = {
        p: p.stat().st_mtime_ns
        for p in corpus.prepared.glob("*/.build-*/*.tokens")
        if p.with_name(p.name[:12] + ".json").exists()
    }
    assert done
    stamps = {}
    monkeypatch.setattr(
        preparing.shutil,
        "rmtree",
        lambda folder, **_: stamps.update({p: p.stat().st_mtime_ns for p in Path(folder).glob("*")}),
    )
    corpus.prepare()
    assert {p: stamps[p] for p in done} == done


def test_duplicates_are_dropped_within_a_source(corpus):
    texts = sentences(9, 50)
    write_jsonl(corpus.folder / "more.jsonl", [*texts, *texts[:20], texts[3], *sentences(1, 10)])
    corpus.content["sources"]["more"]["deduplicate"] = True
    manifest = corpus.prepare()
    kept = documents(manifest, "more", "train") + documents(manifest, "more", "validation")
    assert sorted(kept) == sorted([*texts, *sentences(1, 10)])  # those of source web stay: other sources do not matter
    assert manifest.sources["more"].duplicates_dropped == 21
    train = documents(manifest, "more", "train")
    assert train == [
        t for t in [*texts, *sentences(1, 10)] if t in set(train)
    ]  # the first of equal ones stays in place


def test_bad_records_are_counted_and_kept_aside(corpus):
    lines = (corpus.folder / "web.jsonl").read_text(encoding="utf-8").splitlines()
    lines[10], lines[4000], lines[5000] = '{"text": "cut', '{"txt": "x"}', '{"text": " \\n "}'
    (corpus.folder / "web.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    manifest = corpus.prepare(workers=2)
    entry = manifest.sources["web"]
    assert (entry.quarantined, entry.empty_dropped) == (2, 1)
    assert sum(s.documents for s in entry.splits.values()) == 5997
    quarantined = [json.loads(line) for line in (corpus.prepared / "web" / "quarantine.jsonl").open(encoding="utf-8")]
    assert [q["position"] for q in quarantined] == ["line 11", "line 4001"]
    assert all(q["file"].endswith("web.jsonl") for q in quarantined)
    assert "2 quarantined" in corpus.log


def test_too_many_bad_records_stop(corpus):
    corpus.content["sources"]["web"]["text_fields"] = ["body"]
    with pytest.raises(
        UserError,
        match=r"sources.web: 6,000 of 6,000 records cannot be read(.|\n)*no field 'body'; the record has text, id",
    ):
        corpus.prepare()
    assert not (corpus.prepared / "manifest.json").exists()


def test_missing_paths_are_all_named_before_any_work(corpus):
    corpus.content["sources"]["web"]["path"] = "nowhere/*.jsonl"
    corpus.content["sources"]["code"]["path"] = "nothing"
    with pytest.raises(UserError, match=r"sources.web.path: no file(.|\n)*sources.code.path: no file"):
        corpus.prepare()


def test_a_source_without_rows_is_named_before_any_work(corpus):
    schema = pyarrow.schema([("text", pyarrow.string())])
    pyarrow.parquet.ParquetWriter(corpus.folder / "empty.parquet", schema).close()
    corpus.content["sources"]["more"] |= {"format": "parquet", "path": "empty.parquet"}
    with pytest.raises(UserError, match=r"sources.more: no document to train on in 1 files, such as .*empty.parquet"):
        corpus.prepare()
    (corpus.folder / "more.jsonl").write_text("")
    corpus.content["sources"]["more"] |= {"format": "jsonl", "path": "more.jsonl"}
    with pytest.raises(UserError, match=r"sources.more: no document to train on in 1 files"):
        corpus.prepare()
    assert not (corpus.prepared / "web").exists()


def test_two_sources_of_one_file_are_told(corpus):
    (corpus.folder / "again.jsonl").symlink_to("more.jsonl")
    corpus.content["sources"]["more2"] = {**corpus.content["sources"]["more"], "path": "again.jsonl"}
    corpus.prepare()
    assert f"Note: sources more and more2 both read {corpus.folder}/again.jsonl" in corpus.log


def test_two_preparations_of_one_folder(corpus):
    with locked(corpus.prepared, "prepared", ""), pytest.raises(UserError, match="being prepared by another process"):
        corpus.prepare()


def test_too_little_space_is_said_before_any_work(corpus, monkeypatch):
    usage = shutil.disk_usage(corpus.folder)._replace(free=1000)
    monkeypatch.setattr(preparing.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"GB are needed and 1e-06 GB are free"):
        corpus.prepare()
    assert not list(corpus.prepared.glob("*/.build-*"))


def test_full_disk(corpus):
    """A real full disk: a small tmpfs in a mount namespace of its own. Nothing half-written counts, and the run can
    be finished.
    """
    if (
        not shutil.which("unshare")
        or subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip("needs a mount namespace of its own (unshare -rm)")
    root = corpus.folder / "small"
    root.mkdir()
    script = f"""
        mount -t tmpfs -o size=1500k none {root} || exit 77
        {sys.executable} -c "import sys, shutil, runpy
from nemotron_h.data.prepare import pipeline
pipeline.shutil.disk_usage = lambda path: shutil._ntuple_diskusage(1, 1, 10**12)
sys.argv[1:] = ['{corpus.write()}', '{root}', '2']
runpy.run_path('{SCRIPT}', run_name='__main__')"
        echo "rc=$?"
        test -e {root}/local/manifest.json && echo "manifest exists"
        mount -o remount,size=50m {root}
        {sys.executable} {SCRIPT} {corpus.folder / "local.yaml"} {root} 2 && cp -r {root}/local {corpus.folder}/copied
    """
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, check=False, timeout=60
    )
    if done.returncode == 77:
        pytest.skip("cannot mount a tmpfs here")
    output = done.stdout + done.stderr
    assert "is full" in output, output
    assert "rc=1" in output, output
    assert "manifest exists" not in output
    finish(run(corpus, corpus.folder / "straight"))
    assert snapshot(corpus.folder / "copied") == snapshot(corpus.folder / "straight" / "local")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk of FOLDER is full"),
        (OSError(errno.ENOSPC, "No space left on device", "/cache/x"), "the disk of /cache/x is full"),
        (PermissionError(errno.EACCES, "Permission denied", "/data/a.jsonl"), "/data/a.jsonl: Permission denied"),
        (OSError(errno.EIO, "Input/output error"), "preparing FOLDER: Input/output error"),
    ],
)
def test_an_error_of_the_system_names_its_own_file(corpus, error, message):
    assert preparing._system_error(error, corpus.folder).message == message.replace("FOLDER", str(corpus.folder))


#: of `worker_pool`: a start that readies nothing, and words of a preparation
START = (abs, (0,), "finished shards are kept", "--workers")


@pytest.mark.parametrize(
    ("end", "argument", "message"),
    [
        (os._exit, 3, "ended with exit code 3"),
        (signal.raise_signal, signal.SIGKILL, "was killed (SIGKILL), as the system does when memory runs out"),
        (signal.raise_signal, signal.SIGSEGV, "was ended by SIGSEGV"),
    ],
)
def test_the_cause_of_a_worker_s_death_is_read_off_its_exit_code(end, argument, message):
    with pytest.raises(UserError) as caught, worker_pool.worker_pool(2, *START) as processes:
        processes.submit(end, argument).result()
    assert message in caught.value.message


def test_shared_memory_without_room_is_named(monkeypatch):
    def no_room(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")  # as sem_open: without a file

    monkeypatch.setattr(worker_pool, "ProcessPoolExecutor", no_room)
    with pytest.raises(UserError, match=r"no semaphore(.|\n)*/dev/shm"), worker_pool.worker_pool(1, *START):
        pass


def test_ready_made_pairs_are_used_in_place(corpus):
    first = corpus.prepare()
    shutil.copytree(corpus.prepared, corpus.folder / "elsewhere")
    corpus.content["tokenizer"] = {"kind": "huggingface", "path": "elsewhere/tokenizer"}
    ready = {"path": "elsewhere/web/train", "validation_path": "elsewhere/web/validation"}
    corpus.content["sources"]["web"] = {"category": "web", "format": "megatron", **ready}
    second = corpus.prepare()
    assert second.prefix("web", "train") == str(corpus.folder / "elsewhere/web/train")
    assert not list((corpus.prepared / "web").glob("*.bin.tmp"))
    for split, entry in second.sources["web"].splits.items():
        old = first.sources["web"].splits[split]
        assert (entry.documents, entry.tokens, entry.sha256_bin) == (old.documents, old.tokens, old.sha256_bin)
    corpus.prepare()
    assert "up to date" in corpus.log


def test_ready_made_pairs_that_do_not_fit(corpus):
    corpus.prepare()
    shutil.copytree(corpus.prepared, corpus.folder / "elsewhere")
    corpus.content["tokenizer"]["vocab_size"] = 300
    corpus.content["sources"]["web"] = {"category": "web", "format": "megatron", "path": "elsewhere/web/train"}
    with pytest.raises(UserError, match=r"has token 3\d\d, the tokenizer has 300 ids"):
        corpus.prepare()
    corpus.content["sources"]["web"]["path"] = "elsewhere/web/nothing"
    with pytest.raises(UserError, match=r"there is no .*nothing\.bin"):
        corpus.prepare()


def test_validation_share():
    hashes = [shards.document_hash(f"document {n}") for n in range(20_000)]
    share = sum(shards.is_validation(h, 0.1) for h in hashes) / len(hashes)
    assert share == pytest.approx(0.1, abs=0.01)
    assert not any(shards.is_validation(h, 0.0) for h in hashes)
