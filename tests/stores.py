"""Stores of the tests by their URL, whichever database keeps them: made, copied, read as rows, and removed."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import time
import uuid
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from otelexec import runtime
from otelexec.settings import Settings
from otelexec.store.base import Store
from otelexec.store.sqlite import SqliteStore
from tests.patience import PATIENCE

if TYPE_CHECKING:
    import psycopg  # at run time where it is used: most tests need no extra

SCHEMA: Final = "otelexec"
"""Where the tables are in a PostgreSQL database."""

TABLES: Final = ("execution", "attempt", "open_span", "outbox", "claim", "parked")


def is_postgres(url: str) -> bool:
    """Tell whether a URL names a PostgreSQL database."""
    return url.startswith("postgres")


def sqlite_path(url: str) -> Path:
    """Give the file of a SQLite store."""
    return Path(url.removeprefix("sqlite:///"))


class DroppedStore(SqliteStore):
    """Is closed when a test drops it: from Python 3.13 on sqlite3 warns of connections that nobody closes."""

    def __del__(self) -> None:
        """Close it."""
        self.close()


def opened(url: str, *, create: bool = True) -> Store:
    """Open a store as a process of its own would."""
    store = runtime.open_store(Settings(store=url), create=create)
    assert store is not None
    return store


def make(url: str) -> None:
    """Make a store's schema, however long that takes."""
    store = opened(url)
    store.commit([], durable=True, timeout_seconds=20)
    store.close()


@contextlib.contextmanager
def connected(url: str) -> Iterator[psycopg.Connection[Any]]:
    """Connect to a PostgreSQL store's database past otelexec, each statement a transaction of its own."""
    import psycopg

    with psycopg.connect(url, autocommit=True, options=f"-c search_path={SCHEMA}", connect_timeout=10) as connection:
        yield connection


def rows(url: str, statement: str) -> list[tuple[Any, ...]]:
    """Give the rows of a query that both databases understand."""
    if is_postgres(url):
        with connected(url) as connection:
            return connection.execute(statement.encode()).fetchall()
    with closing(sqlite3.connect(sqlite_path(url))) as connection:
        return connection.execute(statement).fetchall()


def execute(url: str, statement: str) -> None:
    """Run one statement in a PostgreSQL store's database, past otelexec."""
    with connected(url) as connection:
        connection.execute(statement.encode())


def rows_or_none(url: str, statement: str) -> list[tuple[Any, ...]] | None:
    """Give the rows of a query; None while there is no store or no such table."""
    if is_postgres(url):
        import psycopg

        with contextlib.suppress(psycopg.errors.UndefinedTable):
            return rows(url, statement)
    elif sqlite_path(url).exists():
        with contextlib.suppress(sqlite3.OperationalError):
            return rows(url, statement)
    return None


@contextlib.contextmanager
def locked(url: str) -> Iterator[None]:
    """Hold everything in a store from another connection's open transaction, until the block ends."""
    if is_postgres(url):
        import psycopg

        with psycopg.connect(url) as connection:
            tables = ", ".join(f"{SCHEMA}.{table}" for table in TABLES)
            connection.execute(f"LOCK TABLE {tables} IN ACCESS EXCLUSIVE MODE".encode())
            yield
            connection.rollback()
        return
    with closing(sqlite3.connect(sqlite_path(url), isolation_level=None, timeout=30)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


@dataclass(frozen=True)
class Place:
    """
    A store, its spool, and the ledger beside them.

    Attributes:
        url: The store's.
        spool: Its folder.
        ledger: A file.
    """

    url: str
    spool: Path
    ledger: Path

    @property
    def name(self) -> str:
        """A name for messages."""
        return self.ledger.stem

    def use(self) -> None:
        """Make it the store of this process and of those that it starts."""
        os.environ["OTELEXEC_STORE"] = self.url
        os.environ["OTELEXEC_SPOOL"] = str(self.spool)


def beside(path: Path) -> Place:
    """Give the place of a SQLite file whose spool is where it is by default."""
    return Place(f"sqlite:///{path}", path.with_name(path.name + ".spool"), path.with_name("ledger"))


class Places:
    """
    Makes stores, each of its own.

    Args:
        folder: For files: the stores themselves or what is beside them.
        server: A PostgreSQL server's URL whose role may make databases; None makes SQLite files.
    """

    def __init__(self, folder: Path, server: str | None = None) -> None:
        self.folder = folder
        self.server = server

    def new(self, name: str) -> Place:
        """Give a store that does not exist yet: no file, or a database without anything in it."""
        if self.server is None:
            url = f"sqlite:///{self.folder / name}.db"
        else:
            database = f"k_{uuid.uuid4().hex[:16]}"
            self._administer(f"CREATE DATABASE {database}")
            url = f"{self.server.rpartition('/')[0]}/{database}"
        return Place(url, self.folder / f"{name}.db.spool", self.folder / f"{name}.ledger")

    def copy(self, place: Place, name: str) -> Place:
        """Give a copy of a store that nobody is connected to, with its spool and its ledger; one of this name before it goes."""
        if self.server is None:
            copy = self.new(name)
            self.remove(copy)
            for path in _files(place.url):
                shutil.copy(path, str(path).replace(str(sqlite_path(place.url)), str(sqlite_path(copy.url)), 1))
        else:
            database = f"k_{uuid.uuid4().hex[:16]}"
            self._administer(f"CREATE DATABASE {database} TEMPLATE {_database(place.url)}")
            url = f"{self.server.rpartition('/')[0]}/{database}"
            copy = Place(url, self.folder / f"{name}.db.spool", self.folder / f"{name}.ledger")
        shutil.rmtree(copy.spool, ignore_errors=True)
        if place.spool.exists():
            shutil.copytree(place.spool, copy.spool)
        shutil.copy(place.ledger, copy.ledger)
        return copy

    def remove(self, place: Place) -> None:
        """Remove a store; its spool and its ledger stay."""
        if is_postgres(place.url):
            self._administer(f"DROP DATABASE IF EXISTS {_database(place.url)} WITH (FORCE)")
        else:
            for path in _files(place.url):
                path.unlink()

    def _administer(self, statement: str) -> None:
        import psycopg

        assert self.server is not None
        deadline = time.monotonic() + PATIENCE * 20
        while True:
            try:
                with psycopg.connect(self.server, autocommit=True) as connection:
                    connection.execute(statement.encode())
            # The connection of a killed process ends when the server sees it, and autovacuum is nobody's to end.
            except (psycopg.errors.ObjectInUse, psycopg.errors.InsufficientPrivilege):
                assert time.monotonic() < deadline
                time.sleep(0.05)
            else:
                return


def _database(url: str) -> str:
    return url.rpartition("/")[2]


def _files(url: str) -> list[Path]:
    path = sqlite_path(url)
    return [side for side in (path, path.with_name(path.name + "-wal"), path.with_name(path.name + "-shm")) if side.exists()]
