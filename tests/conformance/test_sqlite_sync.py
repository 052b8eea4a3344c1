"""What SQLite's own fsync would do, done after the lock is free: nothing is called durable that is not, and nobody waits for it."""

from __future__ import annotations

import errno
import os
import random
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing as closing_now
from pathlib import Path

import pytest

from otelexec.errors import StoreBusy, StoreUnavailable
from otelexec.store import sqlite as sqlite_store
from otelexec.store.group_commit import Entry, GroupCommit
from otelexec.store.sqlite import SqliteStore
from otelexec.store.sqlite_file import SqliteFile
from otelexec.store.upkeep import ClaimOutbox
from otelexec.store.writes import AddSpans, Closed, Ingested, Opened
from otelexec.testing.rows import closed, closing, opened, opening, outbox, record, write


class Disk:
    """Counts the fsyncs of a store's -wal, and does what a test wants to happen at them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.synced = 0
        self.at_next: list[Callable[[], object]] = []

    def sync(self, descriptor: int) -> None:
        """Stand in for fdatasync."""
        assert os.path.samestat(os.fstat(descriptor), Path(f"{self._path}-wal").stat())
        if self.at_next:
            self.at_next.pop(0)()
        os.fsync(descriptor)
        self.synced += 1

    def fail(self) -> None:
        """Fail as a disk does."""
        raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "sync.db"


@pytest.fixture
def disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk(path)
    monkeypatch.setattr(sqlite_store, "_sync", disk.sync)
    return disk


@pytest.fixture
def store(path: Path) -> Iterator[SqliteStore]:
    store = SqliteStore(path)
    yield store
    store.close()


def test_a_close_is_synced_and_an_open_is_not(store: SqliteStore, disk: Disk) -> None:
    row = opening()
    store.commit([row], durable=False, timeout_seconds=10)
    assert disk.synced == 0
    store.commit([closing(row)], durable=True, timeout_seconds=10)
    assert disk.synced == 1


def test_other_processes_commit_while_one_syncs(store: SqliteStore, path: Path, disk: Disk) -> None:
    other = SqliteStore(path)
    opened(other, opening("before", "before"))
    disk.at_next.append(lambda: opened(other, opening("meanwhile", "meanwhile")))
    row = opening()
    opened(store, row)
    store.commit([closing(row)], durable=True, timeout_seconds=10)
    assert record(store, "meanwhile").state == "running"
    other.close()


def test_what_a_relay_claims_is_on_the_disk_before_it_leaves(store: SqliteStore, path: Path, disk: Disk) -> None:
    other = SqliteStore(path)
    write(other, AddSpans(b"spans", 1))
    other.close()
    assert disk.synced == 0
    [rows] = store.commit([ClaimOutbox("relay", lease_seconds=10)], durable=False, timeout_seconds=10)
    assert rows
    assert disk.synced == 1


def test_a_close_that_could_not_be_synced_is_no_durable_one_and_the_next_try_is_the_same(store: SqliteStore, disk: Disk) -> None:
    row = opening()
    opened(store, row)
    close = closing(row)
    disk.at_next.append(disk.fail)
    with pytest.raises(StoreUnavailable, match="Input/output error"):
        store.commit([close], durable=True, timeout_seconds=10)
    [again] = store.commit([close], durable=True, timeout_seconds=10)
    assert isinstance(again, Closed)
    assert again.won
    assert outbox(store) == [b"succeeded t"]


def test_after_a_failed_fsync_the_next_one_is_not_believed(store: SqliteStore, path: Path, disk: Disk, tmp_path: Path) -> None:
    row = opening()
    opened(store, row)
    disk.at_next.append(disk.fail)
    with pytest.raises(StoreUnavailable):
        store.commit([closing(row)], durable=True, timeout_seconds=10)
    reader = sqlite3.connect(path)
    reader.execute("BEGIN")
    assert reader.execute("SELECT state FROM attempt").fetchone() == ("succeeded",)
    opened(store, opening("later", "later"))
    with pytest.raises(StoreUnavailable, match="others keep"):
        store.commit([closing(row)], durable=True, timeout_seconds=10)
    reader.close()
    assert closed(store, closing(row)).won
    # What was in the -wal and in doubt is in the database now, and no -wal is left to be played back over it.
    assert Path(f"{path}-wal").stat().st_size == 0
    shutil.copy(path, tmp_path / "alone.db")
    alone = SqliteStore(tmp_path / "alone.db")
    assert record(alone).state == "succeeded"
    alone.close()


def test_a_spool_segment_counts_as_taken_in_when_that_is_on_the_disk(store: SqliteStore, path: Path, disk: Disk) -> None:
    other = SqliteStore(path)
    write(other, Ingested("segment", 7))
    other.close()
    assert (store.ingested("unknown"), disk.synced) == (0, 0)
    assert (store.ingested("segment"), disk.synced) == (7, 1)


def test_who_asked_for_no_fsync_has_its_answer_although_the_groups_failed(store: SqliteStore, disk: Disk) -> None:
    group = GroupCommit(store)
    row = opening()
    opened(store, row)
    told: list[Entry] = []
    group.leave(opening("other", "other"), told.append, durable=False, timeout_seconds=10)
    disk.at_next.append(disk.fail)
    with pytest.raises(StoreUnavailable):
        group.commit(closing(row), durable=True, timeout_seconds=10)
    [entry] = told
    assert entry.answer() == Opened(1)
    group.close()


def test_a_signal_on_the_way_to_the_disk_leaves_it_to_be_synced(store: SqliteStore, disk: Disk) -> None:
    class Interrupt(BaseException):
        pass

    def interrupt() -> None:
        raise Interrupt

    group = GroupCommit(store)
    row = opening()
    opened(store, row)
    disk.at_next.append(interrupt)
    with pytest.raises(Interrupt):
        group.commit(closing(row), durable=True, timeout_seconds=10)
    assert disk.synced == 1
    assert outbox(store) == [b"succeeded t"]
    group.close()


def test_an_os_error_of_a_signal_handlers_is_not_the_stores(store: SqliteStore, disk: Disk) -> None:
    def time_out() -> None:
        raise TimeoutError("soft limit")

    row = opening()
    opened(store, row)
    disk.at_next.append(time_out)
    with pytest.raises(TimeoutError, match="soft limit"):
        store.commit([closing(row)], durable=True, timeout_seconds=10)


def test_where_there_is_no_wal_sqlite_syncs_by_itself(store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SqliteFile, "open_wal", lambda _: None)
    opened(store, opening())
    connection = store._writer
    assert isinstance(connection, sqlite3.Connection)
    assert connection.execute("PRAGMA synchronous").fetchone() == (2,)


def test_a_closed_store_has_no_file_open(store: SqliteStore, path: Path) -> None:
    def files() -> set[str]:
        """Give the ends of the names of the store's files that this process has open, also for reading only."""
        found = {os.fspath(name.readlink()) for name in Path("/proc/self/fd").iterdir() if name.is_symlink()}
        return {name.removeprefix(str(path)) for name in found if name.startswith(str(path))}

    assert closed(store, closing(opening())).won
    assert "-wal" in files()
    store.close()
    assert files() == set()


def test_waiting_for_another_process_draws_nothing_from_the_random_module(path: Path) -> None:
    """The user's code that seeds it gives the same numbers, whoever else writes."""
    store = SqliteStore(path)
    store.commit([], durable=False, timeout_seconds=5)
    random.seed(7)
    before = random.getstate()
    with closing_now(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreBusy):
            store.commit([opening()], durable=False, timeout_seconds=0.05)
    assert random.getstate() == before
    store.close()
