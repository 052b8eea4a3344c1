"""The schema of every SQL store, and what a statement needs of the transaction that it runs in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

SCHEMA_VERSION = 4

# {key}, {serial}, {name}, {blob} and {bigint} are the store's own types; a {name} sorts by its bytes, and a {serial} key
# is never given twice, since a relay may settle a row that is gone.
_RUNS = (
    """CREATE TABLE run (
        seq {key}, run_id {name} NOT NULL UNIQUE, execution_id {name} NOT NULL UNIQUE, task {name} NOT NULL, payload TEXT,
        payload_type TEXT NOT NULL, carrier TEXT NOT NULL, options TEXT NOT NULL, tags TEXT NOT NULL, metadata TEXT,
        lane {name}, lane_limit INTEGER NOT NULL, max_attempts INTEGER NOT NULL, max_seconds DOUBLE PRECISION,
        created_unix_ns {bigint} NOT NULL, updated_unix_ns {bigint} NOT NULL, due_unix_ns {bigint} NOT NULL,
        expires_unix_ns {bigint}, batch_id {name}, batch_index INTEGER, output TEXT, pending INTEGER NOT NULL)""",
    "CREATE INDEX run_due ON run (due_unix_ns, seq) WHERE pending = 1",
    "CREATE INDEX run_lane_pending ON run (lane) WHERE pending = 1 AND lane IS NOT NULL",
    "CREATE UNIQUE INDEX run_batch_index ON run (batch_id, batch_index) WHERE batch_id IS NOT NULL",
    "CREATE TABLE run_key (name {name} PRIMARY KEY, owner {name} NOT NULL, expires_unix_ns {bigint} NOT NULL)",
    """CREATE TABLE run_batch (
        batch_id {name} PRIMARY KEY, run_count INTEGER NOT NULL, carrier TEXT NOT NULL, created_unix_ns {bigint} NOT NULL)""",
    "CREATE TABLE run_lane (lane {name} PRIMARY KEY)",
    """CREATE TABLE run_packet (
        name {name} PRIMARY KEY, content TEXT NOT NULL, media_type TEXT NOT NULL, at_unix_ns {bigint} NOT NULL)""",
)

# `claim` and `parked` are tables of their own so that neither a claim nor a parked row rewrites or hides encoded spans.
# `written` keeps a write that may be repeated from putting the same spans into the outbox twice.
SCHEMA = (
    """CREATE TABLE process (
        process_id {name} PRIMARY KEY, host TEXT NOT NULL, boot_id TEXT NOT NULL, pid_namespace TEXT NOT NULL,
        pid {bigint} NOT NULL, pid_start {bigint} NOT NULL, lease_seconds DOUBLE PRECISION NOT NULL,
        resource {blob} NOT NULL, scope {blob} NOT NULL, heartbeat_unix_ns {bigint} NOT NULL,
        ended INTEGER NOT NULL DEFAULT 0, clock_unix_ns {bigint} NOT NULL DEFAULT 0,
        parent_pid {bigint} NOT NULL DEFAULT 0, parent_start {bigint} NOT NULL DEFAULT 0)""",
    """CREATE TABLE execution (
        seq {key}, execution_id {name} NOT NULL UNIQUE, name TEXT NOT NULL, state TEXT NOT NULL,
        sticky INTEGER NOT NULL DEFAULT 0, request_id TEXT NOT NULL, source TEXT NOT NULL, correlation TEXT NOT NULL,
        parent_execution_id TEXT, queued_unix_ns {bigint}, started_unix_ns {bigint}, ended_unix_ns {bigint},
        error_type TEXT, error_message TEXT, producer_trace_id TEXT, producer_span_id TEXT, snapshot TEXT,
        attempts INTEGER NOT NULL DEFAULT 0, latest INTEGER NOT NULL DEFAULT 0)""",
    """CREATE TABLE attempt (
        execution_id {name} NOT NULL, attempt INTEGER NOT NULL, token {name} NOT NULL, process_id {name} NOT NULL,
        state TEXT NOT NULL, duplicate INTEGER NOT NULL, trace_id TEXT, span_id TEXT, span_start {blob},
        started_unix_ns {bigint} NOT NULL, deadline_unix_ns {bigint}, last_seen_unix_ns {bigint} NOT NULL DEFAULT 0,
        ended_unix_ns {bigint}, error_type TEXT, error_message TEXT, finalized_by TEXT, classification TEXT,
        reconciled_unix_ns {bigint}, progress TEXT, output TEXT, nonce TEXT, observed TEXT,
        outer_token TEXT, outer_span_id TEXT, outer_trace_id TEXT, outer_start {blob}, outer_started_unix_ns {bigint},
        outer_outcome TEXT, outer_ended_unix_ns {bigint}, outer_error_type TEXT, outer_error_message TEXT)""",
    "CREATE UNIQUE INDEX attempt_token ON attempt (execution_id, token)",
    "CREATE INDEX attempt_running ON attempt (process_id) WHERE state = 'running'",
    "CREATE INDEX attempt_outer ON attempt (process_id) WHERE outer_token IS NOT NULL AND outer_outcome IS NULL",
    """CREATE TABLE open_span (
        trace_id {name} NOT NULL, span_id {name} NOT NULL, process_id {name} NOT NULL, execution_id {name},
        start {blob} NOT NULL,
        PRIMARY KEY (trace_id, span_id))""",
    "CREATE INDEX open_span_process ON open_span (process_id)",
    """CREATE TABLE outbox (
        id {serial}, request {blob} NOT NULL, count INTEGER NOT NULL, execution_id {name},
        written_unix_ns {bigint} NOT NULL, failures INTEGER NOT NULL DEFAULT 0)""",
    "CREATE INDEX outbox_execution ON outbox (execution_id) WHERE execution_id IS NOT NULL",
    """CREATE TABLE contribution (
        join_key {name} NOT NULL, execution_id {name} NOT NULL, trace_id TEXT NOT NULL, span_id TEXT NOT NULL,
        PRIMARY KEY (join_key, execution_id))""",
    "CREATE INDEX contribution_execution ON contribution (execution_id)",
    "CREATE TABLE claim (id {bigint} PRIMARY KEY, owner {name} NOT NULL, until_unix_ns {bigint} NOT NULL)",
    """CREATE TABLE parked (
        id {bigint} PRIMARY KEY, request {blob} NOT NULL, count INTEGER NOT NULL, execution_id {name},
        reason TEXT NOT NULL, parked_unix_ns {bigint} NOT NULL)""",
    "CREATE TABLE cancellation (execution_id {name} PRIMARY KEY, requested_unix_ns {bigint} NOT NULL, terminate INTEGER)",
    "CREATE TABLE ingested (segment {name} PRIMARY KEY, upto {bigint} NOT NULL, at_unix_ns {bigint} NOT NULL)",
    "CREATE TABLE written (nonce {name} PRIMARY KEY)",
    *_RUNS,
)

UPGRADES: Mapping[int, Sequence[str]] = {
    1: (
        "ALTER TABLE process ADD COLUMN clock_unix_ns {bigint} NOT NULL DEFAULT 0",
        "ALTER TABLE process ADD COLUMN parent_pid {bigint} NOT NULL DEFAULT 0",
        "ALTER TABLE process ADD COLUMN parent_start {bigint} NOT NULL DEFAULT 0",
        """CREATE TABLE contribution (
            join_key {name} NOT NULL, execution_id {name} NOT NULL, trace_id TEXT NOT NULL, span_id TEXT NOT NULL,
            PRIMARY KEY (join_key, execution_id))""",
        "CREATE INDEX contribution_execution ON contribution (execution_id)",
        "CREATE UNIQUE INDEX attempt_token ON attempt (execution_id, token)",
        "CREATE INDEX outbox_execution ON outbox (execution_id) WHERE execution_id IS NOT NULL",
        "CREATE TABLE written (nonce {name} PRIMARY KEY)",
    ),
    2: _RUNS,
    3: (),  # PostgreSQL's functions alone had changed
}
"""What makes a store of one version one of the next; PostgreSQL's functions are made anew by each."""


def upgrade_from(version: int) -> list[str]:
    """Give the statements that bring a store of an older version up to this one."""
    return [statement for old in range(version, SCHEMA_VERSION) for statement in UPGRADES[old]]


class Cursor(Protocol):
    """The rows of a statement."""

    @property
    def rowcount(self) -> int:
        """Give how many rows the statement changed."""
        ...

    def fetchone(self) -> Any:
        """Give the next row; None at the end."""
        ...

    def fetchall(self) -> list[Any]:
        """Give all rows that are left."""
        ...


class Transaction(Protocol):
    """
    What a write needs of the transaction that it runs in.

    Attributes:
        skip_locked: What a SELECT of rows `o` ends with, so that it takes them for itself and passes over those that
            another transaction is taking; empty where there is one writer at a time.
        lock: What a SELECT ends with that holds its rows for itself until the end; empty likewise.
    """

    skip_locked: str
    lock: str

    def execute(self, statement: str, parameters: Sequence[Any] = (), /) -> Cursor:
        """Run one statement; placeholders are `?`."""
        ...

    def read_whole_tables(self) -> None:
        """Let the following statements read tables from end to end, which is never right for one that looks something up."""
        ...

    def among(self, values: Sequence[Any]) -> tuple[str, Sequence[Any]]:
        """Give the end of a condition that is true for any of these values, and its parameters."""
        ...

    def now_unix_ns(self) -> int:
        """Give the store's clock."""
        ...
