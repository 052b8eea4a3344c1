"""The spool while somebody else has its locks."""

from __future__ import annotations

import fcntl
import os
import sqlite3
import threading
from contextlib import closing

import pytest

import otelexec
from otelexec import runtime
from otelexec.reconcile import Reconciler
from otelexec.store import spool
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


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
