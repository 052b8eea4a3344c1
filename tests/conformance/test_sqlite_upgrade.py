"""A SQLite store of an older version is brought up when it is opened, with all that it holds."""

from __future__ import annotations

import resource
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from otelexec.errors import StoreUnavailable, StoreVersionError
from otelexec.store import schema
from otelexec.store.sqlite import SqliteStore
from otelexec.store.writes import AddSpans
from otelexec.testing.rows import beat, closed, opened, opening, outbox, process, record, write
from otelexec.testing.rows import closing as closing_of

V1_SCHEMA = (
    """CREATE TABLE process (
        process_id TEXT PRIMARY KEY, host TEXT NOT NULL, boot_id TEXT NOT NULL, pid_namespace TEXT NOT NULL,
        pid INTEGER NOT NULL, pid_start INTEGER NOT NULL, lease_seconds DOUBLE PRECISION NOT NULL,
        resource BLOB NOT NULL, scope BLOB NOT NULL, heartbeat_unix_ns INTEGER NOT NULL,
        ended INTEGER NOT NULL DEFAULT 0)""",
    """CREATE TABLE execution (
        seq INTEGER PRIMARY KEY, execution_id TEXT NOT NULL UNIQUE, name TEXT NOT NULL, state TEXT NOT NULL,
        sticky INTEGER NOT NULL DEFAULT 0, request_id TEXT NOT NULL, source TEXT NOT NULL, correlation TEXT NOT NULL,
        parent_execution_id TEXT, queued_unix_ns INTEGER, started_unix_ns INTEGER, ended_unix_ns INTEGER,
        error_type TEXT, error_message TEXT, producer_trace_id TEXT, producer_span_id TEXT, snapshot TEXT,
        attempts INTEGER NOT NULL DEFAULT 0, latest INTEGER NOT NULL DEFAULT 0)""",
    """CREATE TABLE attempt (
        execution_id TEXT NOT NULL, attempt INTEGER NOT NULL, token TEXT NOT NULL, process_id TEXT NOT NULL,
        state TEXT NOT NULL, duplicate INTEGER NOT NULL, trace_id TEXT, span_id TEXT, span_start BLOB,
        started_unix_ns INTEGER NOT NULL, deadline_unix_ns INTEGER, last_seen_unix_ns INTEGER NOT NULL DEFAULT 0,
        ended_unix_ns INTEGER, error_type TEXT, error_message TEXT, finalized_by TEXT, classification TEXT,
        reconciled_unix_ns INTEGER, progress TEXT, output TEXT, nonce TEXT, observed TEXT,
        outer_token TEXT, outer_span_id TEXT, outer_trace_id TEXT, outer_start BLOB, outer_started_unix_ns INTEGER,
        outer_outcome TEXT, outer_ended_unix_ns INTEGER, outer_error_type TEXT, outer_error_message TEXT,
        UNIQUE (execution_id, attempt))""",
    "CREATE INDEX attempt_running ON attempt (process_id) WHERE state = 'running'",
    "CREATE INDEX attempt_outer ON attempt (process_id) WHERE outer_token IS NOT NULL AND outer_outcome IS NULL",
    """CREATE TABLE open_span (
        trace_id TEXT NOT NULL, span_id TEXT NOT NULL, process_id TEXT NOT NULL, execution_id TEXT, start BLOB NOT NULL,
        PRIMARY KEY (trace_id, span_id))""",
    "CREATE INDEX open_span_process ON open_span (process_id)",
    """CREATE TABLE outbox (
        id INTEGER PRIMARY KEY AUTOINCREMENT, request BLOB NOT NULL, count INTEGER NOT NULL, execution_id TEXT,
        written_unix_ns INTEGER NOT NULL, failures INTEGER NOT NULL DEFAULT 0)""",
    "CREATE TABLE claim (id INTEGER PRIMARY KEY, owner TEXT NOT NULL, until_unix_ns INTEGER NOT NULL)",
    """CREATE TABLE parked (
        id INTEGER PRIMARY KEY, request BLOB NOT NULL, count INTEGER NOT NULL, execution_id TEXT,
        reason TEXT NOT NULL, parked_unix_ns INTEGER NOT NULL)""",
    "CREATE TABLE cancellation (execution_id TEXT PRIMARY KEY, requested_unix_ns INTEGER NOT NULL, terminate INTEGER)",
    "CREATE TABLE ingested (segment TEXT PRIMARY KEY, upto INTEGER NOT NULL, at_unix_ns INTEGER NOT NULL)",
)


def make_v1(path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        for statement in V1_SCHEMA:
            connection.execute(statement)
        connection.execute("PRAGMA user_version = 1")
        connection.execute(
            """INSERT INTO process (process_id, host, boot_id, pid_namespace, pid, pid_start, lease_seconds, resource, scope,
                                    heartbeat_unix_ns)
               VALUES ('p', 'host', 'boot', 'pid:[1]', 42, 4242, 30.0, ?, ?, 7)""",
            (b"resource", b"scope"),
        )
        connection.execute(
            """INSERT INTO execution (execution_id, name, state, request_id, source, correlation, started_unix_ns, attempts, latest)
               VALUES ('e', 'job', 'running', 'request', 'direct', '{}', 1, 1, 1)"""
        )
        connection.execute(
            """INSERT INTO attempt (execution_id, attempt, token, process_id, state, duplicate, started_unix_ns)
               VALUES ('e', 1, 't', 'p', 'running', 0, 1)"""
        )
        connection.execute("INSERT INTO outbox (request, count, execution_id, written_unix_ns) VALUES (?, 1, 'e', 5)", (b"child",))


def test_a_store_of_version_1_is_brought_up_with_what_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "old.db"
    make_v1(path)
    store = SqliteStore(path)
    found = store.processes()[0]
    assert (found.process_id, found.heartbeat_unix_ns, found.clock_unix_ns) == ("p", 7, 0)
    assert closed(store, closing_of(opening())).won
    for _ in range(2):
        write(store, AddSpans(b"late", 1, nonce="n"))
    assert outbox(store) == [b"child", b"succeeded t", b"late"]
    beat(store)
    assert record(store).state == "succeeded"
    store.close()


def test_an_upgraded_store_has_what_a_new_one_has(tmp_path: Path) -> None:
    make_v1(tmp_path / "old.db")
    described = []
    for name in ("old.db", "new.db"):
        store = SqliteStore(tmp_path / name)
        opened(store, opening("another", "another"))
        store.close()
        with closing(sqlite3.connect(tmp_path / name)) as connection:
            assert connection.execute("PRAGMA user_version").fetchone() == (schema.SCHEMA_VERSION,)
            tables = sorted(row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND sql NOT NULL"))
            columns = {table: sorted(row[1:4] for row in connection.execute(f"PRAGMA table_info({table})")) for table in tables}
            indexes = sorted(row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'index' AND sql NOT NULL"))
            described.append((columns, indexes))
    assert described[0] == described[1]


def test_an_upgrade_that_the_disk_refuses_says_so_and_leaves_the_old_version(tmp_path: Path) -> None:
    path = tmp_path / "old.db"
    make_v1(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with closing(sqlite3.connect(path)) as other:
        other.execute("SELECT * FROM execution").fetchall()  # the -shm is there, so that the -wal is what can't grow
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            with pytest.raises(StoreUnavailable, match=r"disk I/O error|disk is full"):
                opened(SqliteStore(path), opening("another", "another"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert other.execute("PRAGMA user_version").fetchone() == (1,)
        assert other.execute("SELECT COUNT(*) FROM sqlite_master WHERE name = 'written'").fetchone() == (0,)
    store = SqliteStore(path)
    assert closed(store, closing_of(opening())).won
    store.close()


def test_a_newer_store_is_left_alone(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "new.db")
    beat(store)
    store.close()
    with closing(sqlite3.connect(tmp_path / "new.db")) as connection:
        connection.execute(f"PRAGMA user_version = {schema.SCHEMA_VERSION + 1}")
    with pytest.raises(StoreVersionError, match="Upgrade this one"):
        opened(SqliteStore(tmp_path / "new.db"), opening())
    assert process("p").clock_unix_ns == 0
