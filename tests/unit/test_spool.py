"""The spool while somebody else has its locks, or has put there what is none of ours, and between two versions."""

from __future__ import annotations

import fcntl
import os
import sqlite3
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import otelexec
from otelexec import runtime
from otelexec.reconcile import Reconciler
from otelexec.store import spool
from otelexec.store.rows import SPOOL, Cancellation, ProcessRow
from otelexec.store.spool import Spool
from otelexec.store.sqlite import SqliteStore
from otelexec.store.upkeep import ForgetNonces
from otelexec.store.writes import AddSpans, Heartbeat, NameMessage, ReadContributions, RequestCancel, Write
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


def test_a_wish_is_taken_in_before_an_end_that_came_after_it_in_another_process(tmp_path: Path) -> None:
    """Also where the process that wrote the wish goes on writing."""
    store = SqliteStore(tmp_path / "store.db")
    attempt = rows.opening()
    rows.write(store, attempt)
    parent, child = (Spool(tmp_path / "spool", lambda: rows.process("r")) for _ in range(2))
    close = rows.closing(attempt, "failed", if_asked=True)
    close.frozen.outcome.finalized_by = SPOOL
    appended: tuple[tuple[Spool, Write], ...] = (
        (parent, RequestCancel("e", Cancellation(5, terminate=True))),
        (child, close),
        (parent, AddSpans(b"later", 1)),
    )
    for second, (own, write) in enumerate(appended):
        before = {path: path.read_bytes() for path in own.segments()}
        own.append(write, durable=False)
        [changed] = [path for path in own.segments() if path.read_bytes() != before.get(path)]
        os.utime(changed, (second, second))  # however coarse the file system's times are
    Reconciler(store, child).run_once()
    assert rows.record(store).state == "cancelled"
    assert rows.outbox(store) == [b"cancelled t", b"later"]
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


def test_an_append_may_be_interrupted_by_another_one_at_every_line(tmp_path: Path) -> None:
    """As a signal handler's does that runs an execution while the store is away."""
    process = ProcessRow("p", "host", "", "", 1, 0, 30.0, b"", b"")
    codes = {Spool.append.__code__, Spool._segment.__wrapped__.__code__}  # type: ignore[attr-defined]
    lines = 0

    def append(own: Spool, at: int) -> None:
        """Append, and once more at a certain line of that."""
        nonlocal lines
        lines = 0

        def trace(frame: FrameType, event: str, _: object) -> Any:
            nonlocal lines
            if frame.f_code in codes and event == "line":
                lines += 1
                if lines == at:
                    own.append(Heartbeat(process), durable=False)
            return trace

        sys.settrace(trace)
        try:
            own.append(Heartbeat(process), durable=False)
        finally:
            sys.settrace(None)

    at = 1
    while at == 1 or at <= lines + 1:
        own = Spool(tmp_path / str(at), lambda: process)
        own.append(Heartbeat(process), durable=False)
        own.segments()[0].unlink()  # taken in meanwhile: the next append makes a new one
        append(own, at)
        segments = own.segments()
        written = sum(segment.read_bytes().count(b"\n") - 1 for segment in segments)  # but for the process, which goes first
        assert written == 1 + (at <= lines), f"interrupted at line {at}"
        at += 1
    assert at > 10


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _deep(path: Path) -> None:
    path.write_bytes(spool._frame("[" * 100_000))


def _number(path: Path) -> None:
    path.write_bytes(spool._frame("5"))


@pytest.mark.parametrize(
    "put",
    [_deep, _number, Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/nowhere"), lambda path: path.symlink_to(__file__)],
    ids=["too deep", "no write", "folder", "pipe", "dangling link", "link"],
)
def test_what_somebody_else_put_there_is_neither_taken_in_nor_in_the_way(tmp_path: Path, put: Callable[[Path], None]) -> None:
    """A process of its own would wait at the pipe for ever."""
    own = spool.Spool(tmp_path, lambda: runtime.get().process)
    put(tmp_path / "0.jsonl")
    own.append(AddSpans(execution_id="mine"), durable=False)
    committed: list[Write] = []
    ingesting = threading.Thread(target=own.ingest, args=(committed.extend, lambda _: 0), daemon=True)
    ingesting.start()
    ingesting.join(20)
    assert not ingesting.is_alive()
    assert [write.execution_id for write in committed if isinstance(write, AddSpans)] == ["mine"]
    assert not own.filled


def test_damaged_lines_are_not_written_through_a_link(tmp_path: Path) -> None:
    """Else whoever may write in the folder could write anywhere as this user."""
    precious, folder = tmp_path / "precious", tmp_path / "spool"
    precious.write_text("precious", encoding="utf-8")
    folder.mkdir()
    (folder / "0.jsonl").write_bytes(b"somebody's line\n")
    (folder / "0.damaged").symlink_to(precious)
    (folder / ".lock").symlink_to(tmp_path / "made")
    own = spool.Spool(folder, lambda: runtime.get().process)
    with pytest.raises(OSError, match="symbolic links"):
        own.ingest(lambda _: None, lambda _: 0)
    assert not (tmp_path / "made").exists()
    (folder / ".lock").unlink()
    own.ingest(lambda _: None, lambda _: 0)
    assert precious.read_text(encoding="utf-8") == "precious"
    assert (folder / "0.damaged").read_bytes() == b"somebody's line\n"


def test_what_another_user_left_keeps_nothing_behind_it_from_being_taken_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = tmp_path / "0.jsonl"
    theirs.touch()
    os.utime(theirs, (0, 0))
    open_ = os.open

    def refusing(path: str | Path, *arguments: int) -> int:
        if path == theirs:  # by hand: root, which tests may run as, can read everything
            raise PermissionError(13, "Permission denied", str(path))
        return open_(path, *arguments)

    monkeypatch.setattr(os, "open", refusing)
    own = spool.Spool(tmp_path, lambda: runtime.get().process)
    own.append(AddSpans(execution_id="mine"), durable=False)
    committed: list[Write] = []
    for _ in range(2):
        with pytest.raises(PermissionError):
            own.ingest(committed.extend, lambda _: 0)
    assert [write.execution_id for write in committed if isinstance(write, AddSpans)] == ["mine"]
    assert not own.filled
    assert caplog.text.count("otelexec.spool.unreadable") == 1
