"""The file of the embedded store: how it is made, opened, missed, found damaged and set aside."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import sqlite3
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from otelexec.clock import monotonic
from otelexec.errors import StoreNotFound, StoreUnavailable, StoreVersionError
from otelexec.store import schema

logger = logging.getLogger("otelexec.store")

DAMAGE = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})

_BUSY_PAUSE_SECONDS = 0.002

_SIDES = ("-wal", "-shm")

_TYPES = {"key": "INTEGER PRIMARY KEY", "serial": "INTEGER PRIMARY KEY AUTOINCREMENT", "name": "TEXT", "blob": "BLOB", "bigint": "INTEGER"}

unusable: set[Path] = set()
"""Files that a forked child must leave alone: its parent was in the middle of a commit."""


class SqliteFile:
    """
    One database file and what lies beside it.

    Args:
        path: The file; it and its folder are made when missing, readable by their owner only.
        create: Whether to make one where none is; readers don't.
    """

    def __init__(self, path: Path, *, create: bool) -> None:
        self.path = path
        self.url = f"sqlite:///{path}"
        self._create = create
        self._opened: tuple[int, int] | None = None
        self._sides: dict[str, tuple[int, int] | None] = {}

    def open(self, timeout_seconds: float) -> sqlite3.Connection:
        """
        Connect, and make or mend the file where that is needed.

        Args:
            timeout_seconds: How long statements of this connection wait for other processes.

        Raises:
            StoreNotFound: There is none, and none is to be made.
            StoreVersionError: Its schema is newer than this library.
            OSError: It can't be made or written.
            sqlite3.Error: SQLite can't use it at this time.
        """
        if self.path in unusable:
            raise StoreUnavailable(f"{self.url}: this process was forked in the middle of a commit of its parent; it uses the spool")
        if self._create:
            self._clear_leftovers()
        if not self.path.exists():
            if not self._create:
                raise StoreNotFound(f"No store at {self.path}. Run an execution first, or set OTELEXEC_STORE to where it is.")
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with self._locked():
                if not self.path.exists():
                    for suffix in _SIDES:
                        self._move_away(suffix)
                    # Made with these rights, not changed to them afterwards; SQLite gives -wal and -shm the same.
                    os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        if not os.access(self.path, os.W_OK):
            # SQLite would open it all the same and make a -wal and a -shm with the file's rights, in which nobody could
            # write once the file itself is writable again.
            raise PermissionError(errno.EACCES, "not writable by this user", str(self.path))
        try:
            connection = self._connect(timeout_seconds)
        except sqlite3.DatabaseError as error:
            if code(error) not in DAMAGE or not self._create:
                raise
            self.set_aside(error)
            return self.open(timeout_seconds)
        self._opened = identity(self.path)
        self._sides = {suffix: identity(f"{self.path}{suffix}") for suffix in _SIDES}
        return connection

    def open_wal(self) -> int | None:
        """
        Open the -wal of an open database, for fsync only.

        SQLite makes it when it opens the file, and it is the same one for as long as any connection is open.

        Returns:
            The descriptor; None where the file system can't have a -wal, and SQLite keeps a rollback journal.
        """
        try:
            return os.open(f"{self.path}-wal", os.O_RDONLY)
        except FileNotFoundError:
            return None

    def _clear_leftovers(self) -> None:
        """
        Move away the side files of a store that was deleted or replaced without them.

        SQLite would take an old -wal for the new file's, and truncate an old -shm under the connections that have it
        mapped, which kills their process.
        """
        sides, self._sides = self._sides, {}
        if self._opened in (None, identity(self.path)) or not self.path.parent.exists():
            return
        with self._locked():
            for suffix, known in sides.items():
                if known is not None and identity(f"{self.path}{suffix}") == known:
                    self._move_away(suffix)

    def _move_away(self, suffix: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            Path(f"{self.path}{suffix}").rename(f"{self.path}.left-{time.strftime('%Y%m%dT%H%M%S')}-{uuid.uuid4().hex[:8]}{suffix}")

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock under which processes make the file or set it aside."""
        descriptor = os.open(f"{self.path}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _connect(self, timeout_seconds: float) -> sqlite3.Connection:
        connection = sqlite3.connect(
            f"{self.path.as_uri()}?mode=rw", uri=True, timeout=timeout_seconds, isolation_level=None, check_same_thread=False
        )
        try:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version and not self._is_ours(connection):  # many programs count their versions there
                raise self._not_ours()
            if version != schema.SCHEMA_VERSION:
                self._migrate(connection, timeout_seconds)
            connection.execute("SELECT 1 FROM execution LIMIT 1").fetchone()
        except BaseException:
            connection.close()
            raise
        return connection

    def _migrate(self, connection: sqlite3.Connection, timeout_seconds: float) -> None:
        found = connection.execute("PRAGMA user_version").fetchone()[0]
        if found == 0 and not self._create:
            raise StoreNotFound(f"{self.path} is no store yet. Run an execution first, or set OTELEXEC_STORE to where it is.")
        if found == 0:
            # Our tables: another process may have made the schema since the version was read.
            if connection.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone() is not None and not self._is_ours(connection):
                raise self._not_ours()
            self._use_wal(connection, timeout_seconds)
        connection.execute("BEGIN IMMEDIATE")
        try:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version > schema.SCHEMA_VERSION:
                raise StoreVersionError(
                    f"{self.url} has schema {version}, this otelexec knows {schema.SCHEMA_VERSION}. "
                    "Upgrade this one: `pip install -U otelexec`."
                )
            if version != schema.SCHEMA_VERSION:
                steps = schema.SCHEMA if version == 0 else schema.upgrade_from(version)
                for statement in steps:
                    connection.execute(statement.format(**_TYPES))
                connection.execute(f"PRAGMA user_version = {schema.SCHEMA_VERSION}")
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:  # SQLite has ended it by itself when the disk is full
                connection.execute("ROLLBACK")
            raise

    @staticmethod
    def _use_wal(connection: sqlite3.Connection, timeout_seconds: float) -> None:
        # SQLite refuses at once, whatever the connection's timeout, when another process opens the new file at the same moment.
        deadline = monotonic() + timeout_seconds
        while True:
            try:
                connection.execute("PRAGMA journal_mode = WAL")
            except sqlite3.OperationalError as error:
                if code(error) != sqlite3.SQLITE_BUSY or monotonic() >= deadline:
                    raise
            else:
                return
            time.sleep(_BUSY_PAUSE_SECONDS)

    @staticmethod
    def _is_ours(connection: sqlite3.Connection) -> bool:
        tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        return {("execution",), ("attempt",)} <= set(tables)

    def _not_ours(self) -> StoreUnavailable:
        return StoreUnavailable(f"{self.path} is another program's SQLite file. Set OTELEXEC_STORE to a file of its own.")

    def set_aside(self, error: sqlite3.Error) -> None:
        """
        Put a damaged file away under a name that says so.

        Args:
            error: What was wrong with it.
        """
        damaged = identity(self.path)
        with self._locked():
            if identity(self.path) != damaged:  # another process was first, and the file is already a new one
                return
            aside = self.path.with_name(f"{self.path.name}.corrupt-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}")
            for suffix in (*_SIDES, ""):
                with contextlib.suppress(FileNotFoundError):
                    Path(f"{self.path}{suffix}").rename(f"{aside}{suffix}")
        logger.error("otelexec.store.corrupt: %s was set aside as %s: %s", self.path, aside, error)


def identity(path: str | Path) -> tuple[int, int] | None:
    """Give device and inode of a file; None when it is not there."""
    try:
        status = os.stat(path)  # noqa: PTH116 (also for names that are no Path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def code(error: BaseException) -> int:
    """Give the primary SQLite result code; 0 for an error that Python raised itself."""
    return (getattr(error, "sqlite_errorcode", 0) or 0) & 0xFF
