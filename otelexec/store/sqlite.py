"""
The embedded store: one SQLite file in WAL mode, for the processes of one machine.

What SQLite alone needs stands here: one connection that writes and one that reads, an fsync that holds no other process
up, a file that may be deleted, replaced or damaged under a running process, and the connection that a forked child must
not touch.

A commit with `synchronous=NORMAL` survives the process, and power loss once its -wal is synced
(https://sqlite.org/pragma.html#pragma_synchronous). With FULL, SQLite syncs it inside of the write lock, and all processes
together get as many commits as the disk has fsyncs. Here a process syncs after the lock is free, while others commit.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import random
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from otelexec.clock import monotonic
from otelexec.errors import StoreBusy, StoreRejected, StoreUnavailable
from otelexec.store import sql
from otelexec.store.base import Receipt
from otelexec.store.reading import SqlReader
from otelexec.store.schema import Transaction
from otelexec.store.sqlite_file import DAMAGE, SqliteFile, code, identity, unusable
from otelexec.store.upkeep import ClaimOutbox
from otelexec.store.writes import Write

logger = logging.getLogger("otelexec.store")

# Result codes that are the write's own fault; with any other the store could not do its work at this time.
_REFUSALS = frozenset({sqlite3.SQLITE_TOOBIG, sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH, sqlite3.SQLITE_RANGE})
_LOCKED = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})

# A transaction takes a tenth of a millisecond; SQLite's own wait for another process's begins with a whole one.
_LEAST_PAUSE_SECONDS = 0.0001
_MOST_PAUSE_SECONDS = 0.002
# Of its own, as in `finalize`.
_jitter = random.SystemRandom()

# macOS has no fdatasync.
_sync = getattr(os, "fdatasync", os.fsync)

# How long a fork waits for the commit of another thread.
_FORK_PATIENCE_SECONDS = 2.0

_stores: weakref.WeakSet[SqliteStore] = weakref.WeakSet()
# Connections that were in use during a fork; kept, so that the child never closes them.
_inherited: list[sqlite3.Connection] = []


class _Transaction:
    __slots__ = ("execute", "lock", "skip_locked")

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.execute = connection.execute
        self.lock = self.skip_locked = ""  # BEGIN IMMEDIATE took the one lock that there is

    def read_whole_tables(self) -> None:
        pass

    def among(self, values: Sequence[Any]) -> tuple[str, Sequence[Any]]:
        return f"IN ({','.join('?' * len(values))})", values

    def now_unix_ns(self) -> int:
        return time.time_ns()


class SqliteStore(SqlReader):
    """
    A store in one SQLite file.

    Args:
        path: The file; it and its folder are made when missing, readable by their owner only.
        create: Whether to make a store where none is; readers don't.
    """

    def __init__(self, path: Path, *, create: bool = True) -> None:
        self.path = path
        self.announce: Callable[[], Sequence[Write]] = tuple
        self._create = create
        self._database = SqliteFile(path, create=create)
        self._reset()
        _stores.add(self)

    def _reset(self) -> None:
        self._writer: sqlite3.Connection | None = None
        self._wal: int | None = None
        self._reader: sqlite3.Connection | None = None
        self._write_lock = threading.Lock()
        self._read_lock = threading.Lock()
        self._file: tuple[int, int] | None = None
        self._read_file: tuple[int, int] | None = None
        self._announced = False
        self._in_doubt = False
        self._quiet = False

    @property
    def url(self) -> str:
        """Give the store's URL."""
        return f"sqlite:///{self.path}"

    @property
    def spool_folder(self) -> Path:
        """Give the folder for what could not be written here: beside the file."""
        return self.path.with_name(self.path.name + ".spool")

    # Writing

    def commit(self, writes: Sequence[Write], *, durable: bool, timeout_seconds: float, receipt: Receipt | None = None) -> list[object]:
        """
        Commit all writes in one transaction; see `base.Store.commit`.

        Args:
            writes: What to write.
            durable: Whether it must survive power loss.
            timeout_seconds: How long to wait for another thread or process that writes.
            receipt: A new one to fill in; None: nobody asks.
        """
        receipt = receipt or Receipt()
        taken: list[bool] = []
        try:
            # One call into C takes the lock and notes it, so that no signal handler can raise in between.
            taken.extend(map(self._write_lock.acquire, (timeout_seconds > 0,), (timeout_seconds if timeout_seconds > 0 else -1,)))
            if not taken[0]:
                raise StoreBusy(f"{self.url}: another thread is writing")
            self._commit(writes, durable, timeout_seconds, receipt)
        finally:
            if taken and taken[0]:
                self._write_lock.release()
        return receipt.results

    def check_writable(self, *, timeout_seconds: float) -> None:
        """Begin to write, and end it; see `base.Store.check_writable`."""
        self.commit([], durable=False, timeout_seconds=timeout_seconds)

    def _commit(self, writes: Sequence[Write], durable: bool, timeout_seconds: float, receipt: Receipt) -> None:  # noqa: FBT001 (internal)
        try:
            connection = self._writable(timeout_seconds)
            if not receipt.committed:
                try:
                    self._transact(connection, writes, receipt, timeout_seconds)
                except (sqlite3.Error, ValueError, OverflowError, TypeError) as error:
                    if receipt.committed or not _is_refusal(error):
                        raise
                    receipt.results.clear()
                    self._transact(connection, writes, receipt, timeout_seconds, apart=True)
            # What a relay claims leaves, and another process may not have synced it yet.
            if self._wal is not None and (durable or any(isinstance(write, ClaimOutbox) for write in writes)):
                self._make_durable(connection, self._wal)
        except (sqlite3.Error, OSError) as error:
            if isinstance(error, TimeoutError) or (isinstance(error, OSError) and error.errno is None):  # a signal handler's
                raise
            self._after(error)
            unavailable = StoreBusy if code(error) in _LOCKED else StoreUnavailable
            raise unavailable(f"{self.url}: {error}") from error

    def _make_durable(self, connection: sqlite3.Connection, wal: int) -> None:
        if self._in_doubt:
            # After a failed fsync the kernel takes the pages for written (https://lwn.net/Articles/752063/), and the next one
            # succeeds. A checkpoint writes them anew, into the database, and leaves no -wal with a hole, which would be played back.
            connection.execute("PRAGMA busy_timeout = 1000")
            try:
                busy = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
            finally:
                connection.execute("PRAGMA busy_timeout = 0")
            if busy:
                raise OSError(errno.EIO, "an fsync has failed, and others keep what was written from being written again")
            self._in_doubt = False
        try:
            _sync(wal)
        except OSError as error:
            if error.errno is not None and not isinstance(error, TimeoutError):
                self._in_doubt = True
            raise

    def _begin(self, connection: sqlite3.Connection, timeout_seconds: float) -> None:
        if self._wal is None:  # a rollback journal: COMMIT waits for readers, and must not let go of its PENDING lock
            connection.execute(f"PRAGMA busy_timeout = {max(0, int(timeout_seconds * 1000))}")
        deadline = monotonic() + timeout_seconds
        pause = _LEAST_PAUSE_SECONDS
        while True:
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                if code(error) not in _LOCKED or monotonic() >= deadline:
                    raise
            else:
                return
            time.sleep(pause * _jitter.uniform(0.5, 1.5))  # so that two who wait don't meet again
            pause = min(pause * 1.5, _MOST_PAUSE_SECONDS)

    def _transact(
        self, connection: sqlite3.Connection, writes: Sequence[Write], receipt: Receipt, timeout_seconds: float, *, apart: bool = False
    ) -> None:
        execute = connection.execute
        try:
            self._begin(connection, timeout_seconds)
            tx = _Transaction(connection)
            if not self._announced:
                for write in self.announce():
                    sql.apply(tx, write)
            for write in writes:
                receipt.results.append(self._apart(tx, write) if apart else sql.apply(tx, write))
            # One call into C commits and notes it: a signal handler that raises after it can't make anybody repeat it.
            receipt.committed.extend(map(execute, ("COMMIT",)))
        except BaseException:
            if not receipt.committed:
                receipt.results.clear()
                if connection.in_transaction:
                    execute("ROLLBACK")
            raise
        self._announced = True

    def _apart(self, tx: _Transaction, write: Write) -> object:
        """Make a write that the store may refuse, without taking the others with it."""
        tx.execute("SAVEPOINT apart")
        try:
            result: object = sql.apply(tx, write)
        except (sqlite3.Error, ValueError, OverflowError, TypeError) as error:
            if not _is_refusal(error):
                raise
            tx.execute("ROLLBACK TO apart")
            result = StoreRejected(f"{self.url} refused {type(write).__name__}: {error}", reason=str(error))
        tx.execute("RELEASE apart")
        return result

    def _writable(self, timeout_seconds: float) -> sqlite3.Connection:
        if self._writer is not None and identity(self.path) != self._file:
            # Deleted or replaced under us: what is committed from here on goes to the file that is there now.
            logger.warning("otelexec.store.replaced: %s is another file than before, or gone", self.path)
            self._drop_writer()
        if self._writer is None:
            self._announced = False
            self._file = None
            writer = self._writer = self._database.open(timeout_seconds)
            try:
                self._wal = self._database.open_wal()
                writer.execute("PRAGMA synchronous = " + ("FULL" if self._wal is None else "NORMAL"))
                writer.execute("PRAGMA busy_timeout = 0")
            except BaseException:
                self._drop_writer()
                raise
            self._file = identity(self.path)
        return self._writer

    def _after(self, error: Exception) -> None:
        """Drop the connection after anything but a lock, so that the next commit looks at the file anew."""
        if code(error) in _LOCKED:
            return
        connection = self._writer
        if connection is not None and code(error) in DAMAGE and self._create:
            with contextlib.suppress(sqlite3.Error, OSError):
                if connection.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
                    self._drop_writer()
                    self._database.set_aside(sqlite3.DatabaseError(str(error)))
        self._drop_writer()

    def _drop_reader(self) -> None:
        if self._reader is not None:
            with contextlib.suppress(sqlite3.Error):
                self._reader.close()
        self._reader = None

    def _drop_writer(self) -> None:
        if self._writer is not None:
            with contextlib.suppress(sqlite3.Error):
                self._writer.close()
        self._writer = None
        self._close_wal()

    def _close_wal(self) -> None:
        # Forgotten first: after a signal handler that raises in between, its number may be another file's.
        wal, self._wal = self._wal, None
        if wal is not None:
            with contextlib.suppress(OSError):
                os.close(wal)

    # Reading

    def now_unix_ns(self) -> int:
        """Give the machine's clock: one machine has one."""
        return time.time_ns()

    def up_since_unix_ns(self) -> int:
        """Give 0: a file needs no server that could have been away."""
        return 0

    def ingested(self, segment: str) -> int:
        """Give how far a spool segment has been taken in, as far as power loss can't take it back: the segment is deleted then."""
        done = super().ingested(segment)
        if done:
            self.commit([], durable=True, timeout_seconds=5.0)
        return done

    @contextlib.contextmanager
    def _reading(self) -> Iterator[_Transaction]:
        with self._read_lock:
            try:
                if self._reader is not None and identity(self.path) != self._read_file:
                    self._reader.close()
                    self._reader = None
                if self._reader is None:
                    self._reader = self._database.open(timeout_seconds=5)
                    self._read_file = identity(self.path)
                reader = self._reader
                reader.rollback()  # a signal handler may have thrown the one before out on its way to the end
                reader.execute("BEGIN")
                try:
                    yield _Transaction(reader)
                finally:
                    reader.rollback()
            except (sqlite3.Error, OSError) as error:
                if self._reader is not None:
                    self._reader.close()
                    self._reader = None
                raise StoreUnavailable(f"{self.url}: {error}") from error

    def _sizes(self, _: Transaction) -> tuple[int, Mapping[str, int]]:
        return sum(path.stat().st_size for path in self.path.parent.glob(self.path.name + "*") if path.is_file()), {}

    # Connections

    def _abandon(self) -> None:
        """Forget inherited connections without closing them, in a forked child."""
        _inherited.extend(connection for connection in (self._writer, self._reader) if connection is not None)
        self._close_wal()
        self._reset()

    def _before_fork(self) -> None:
        """
        Close both connections and let no thread open another until the fork is done.

        SQLite keeps what it knows of a file's locks in the process's memory, and the locks themselves are not
        inherited. A child of a process with an open connection would count on locks that it does not have (and lose its
        writes when the parent, the last one to leave as far as anybody can see, deletes the -wal under it), or wait for
        ever for those of a transaction that goes on in the parent only (https://sqlite.org/howtocorrupt.html, 2.6).
        """
        deadline = monotonic() + _FORK_PATIENCE_SECONDS
        self._quiet = self._write_lock.acquire(timeout=_FORK_PATIENCE_SECONDS)
        if self._quiet and not self._read_lock.acquire(timeout=max(0.0, deadline - monotonic())):
            self._write_lock.release()
            self._quiet = False
        if self._quiet:
            self._drop_writer()
            self._drop_reader()

    def _after_fork(self, *, child: bool) -> None:
        if self._quiet:
            self._quiet = False
            self._read_lock.release()
            self._write_lock.release()
        elif child and (self._writer is not None or self._reader is not None):
            self._abandon()
            unusable.add(self.path)

    def close(self) -> None:
        """Close both connections; the next call opens new ones."""
        with self._write_lock:
            self._drop_writer()
        with self._read_lock:
            self._drop_reader()


def _is_refusal(error: BaseException) -> bool:
    # A value that Python can't bind (a lone surrogate, an integer over 64 bits) never reaches SQLite and has no code.
    return not isinstance(error, sqlite3.Error) or code(error) in _REFUSALS or isinstance(error, sqlite3.InterfaceError)


def _all_stores() -> list[SqliteStore]:
    while True:
        try:
            return list(_stores)
        except RuntimeError:  # another thread made one meanwhile
            continue


def _before_fork() -> None:
    for store in _all_stores():
        store._before_fork()  # noqa: SLF001 (the class's own hook)


def _after_fork_in_parent() -> None:
    for store in _all_stores():
        store._after_fork(child=False)  # noqa: SLF001 (the class's own hook)


def _after_fork_in_child() -> None:
    for store in _all_stores():
        store._after_fork(child=True)  # noqa: SLF001 (the class's own hook)


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
