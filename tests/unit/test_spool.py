"""The spool while somebody else has its locks, and between two versions."""

from __future__ import annotations

import fcntl
import os
import sqlite3
import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

import otelexec
from otelexec import runtime
from otelexec.reconcile import Reconciler
from otelexec.store import spool
from otelexec.store.spool import Spool
from otelexec.store.sqlite import SqliteStore
from otelexec.store.writes import AddSpans, ForgetNonces, Heartbeat, NameMessage, ReadContributions
from otelexec.testing import rows
from tests.records import Records, until


@pytest.mark.parametrize("lock", [".lock", "*.jsonl"])
def test_a_process_ends_although_a_suspended_one_holds_a_lock_of_the_spool(
    records: Records, monkeypatch: pytest.MonkeyPatch, lock: str
) -> None:
    monkeypatch.setattr(spool, "PATIENCE_SECONDS", 0.05)
    otelexec.configure(open_timeout_seconds=0.05, finalize_timeout_seconds=0.05, relay=False, reconcile=False)
    otelexec.execution("first")(lambda: None)()
    own = runtime.get()
    with closing(sqlite3.connect(records.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        otelexec.execution("spooled")(lambda: None)()
        (own.journal.spool.folder / ".lock").touch()
        [held] = own.journal.spool.folder.glob(lock)
        descriptor = os.open(held, os.O_RDWR)
        until(lambda: _locked(descriptor))
    try:
        with pytest.raises(TimeoutError):
            own.journal.spool.ingest(own.journal.take_in, lambda _: 0)
        assert not own.journal.recover()
        ending = threading.Thread(target=otelexec.shutdown)
        ending.start()
        ending.join(20)
        assert not ending.is_alive()
        assert own.journal.spool.filled
    finally:
        os.close(descriptor)
    store = runtime.open_store(own.settings)
    assert store is not None
    with closing(store):
        assert Reconciler(store, own.journal.spool).run_once().ingested
    assert [(record.name, record.state) for record in records.all()] == [("first", "succeeded"), ("spooled", "succeeded")]


def test_what_only_a_newer_version_can_read_waits_for_it_and_so_does_all_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker that was upgraded first ends its work in the spool and dies; what reconciles on its host is still the old version."""
    store = SqliteStore(tmp_path / "store.db")
    parent, attempt = replace(rows.process("parent"), lease_seconds=0.0), rows.opening(process_id="parent")
    worker = replace(parent, process_id="worker", pid=43, parent_pid=parent.pid, parent_start=parent.pid_start)
    rows.write(store, *map(Heartbeat, (parent, worker, replace(parent, process_id="another", pid=44))))
    rows.write(store, attempt, rows.opening("u", "own", process_id="worker"), rows.opening("v", "another's", process_id="another"))
    first, second = (Spool(tmp_path / "spool", lambda: worker) for _ in range(2))
    first.append(AddSpans(b"before", 1), durable=True)
    first.append(NameMessage("e", "m"), durable=True)
    first.append(rows.closing(attempt), durable=True)
    [segment] = first.segments()
    os.utime(segment, (0, 0))  # the older one, however coarse the file system's times are
    second.append(AddSpans(b"behind", 1), durable=True)
    older = Spool(tmp_path / "spool", lambda: rows.process("r"))
    reconciler = Reconciler(store, older)
    with monkeypatch.context() as in_the_old_one:
        in_the_old_one.delitem(spool._ROWS, "NameMessage")
        assert [(found.ingested, found.attempts) for found in (reconciler.run_once(), reconciler.run_once())] == [(2, 1), (0, 0)]
        assert [rows.record(store, name).state for name in ("e", "own", "another's")] == ["running", "running", "lost"]
        assert caplog.text.count("otelexec.spool.newer") == 1
    assert len(older.segments()) == 2
    reconciler.run_once()
    assert list(older.folder.iterdir()) == [older.folder / ".lock"]
    assert (rows.record(store).state, '"m"' in rows.record(store).correlation) == ("succeeded", True)
    outbox = rows.outbox(store)
    assert (outbox[0], outbox[2:4]) == (b"before", [b"succeeded t", b"behind"])
    assert rows.record(store, "own").state == "lost"
    store.close()


def test_a_question_that_earlier_versions_kept_stands_in_nobody_s_way(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "store.db")
    earlier = Spool(tmp_path / "spool", rows.process)
    with pytest.raises(TypeError, match="ForgetNonces"):  # it would be one more
        earlier.append(ForgetNonces(""), durable=True)
    for write in (ReadContributions("body"), rows.closing(rows.opening())):
        earlier.append(write, durable=True)
    assert Reconciler(store, earlier).run_once().ingested == 3
    assert list(earlier.folder.iterdir()) == [earlier.folder / ".lock"]
    assert rows.record(store).state == "succeeded"
    store.close()


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
