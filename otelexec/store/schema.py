"""The schema of every SQL store, and what a statement needs of the transaction that it runs in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

SCHEMA_VERSION = 1

# {key}, {serial}, {blob} and {bigint} are the store's own types; a {serial} key is never given twice, since a relay
# may settle a row that is gone. `claim` and `parked` are tables of their own so that
# neither a claim nor a parked row rewrites or hides encoded spans.
SCHEMA = (
    """CREATE TABLE process (
        process_id TEXT PRIMARY KEY, host TEXT NOT NULL, boot_id TEXT NOT NULL, pid_namespace TEXT NOT NULL,
        parent_pid {bigint} NOT NULL DEFAULT 0, parent_start {bigint} NOT NULL DEFAULT 0,
        pid {bigint} NOT NULL, pid_start {bigint} NOT NULL, lease_seconds DOUBLE PRECISION NOT NULL,
        resource {blob} NOT NULL, scope {blob} NOT NULL, heartbeat_unix_ns {bigint} NOT NULL,
        ended INTEGER NOT NULL DEFAULT 0)""",
    """CREATE TABLE execution (
        seq {key}, execution_id TEXT NOT NULL UNIQUE, name TEXT NOT NULL, state TEXT NOT NULL,
        sticky INTEGER NOT NULL DEFAULT 0, request_id TEXT NOT NULL, source TEXT NOT NULL, correlation TEXT NOT NULL,
        parent_execution_id TEXT, queued_unix_ns {bigint}, started_unix_ns {bigint}, ended_unix_ns {bigint},
        error_type TEXT, error_message TEXT, producer_trace_id TEXT, producer_span_id TEXT, snapshot TEXT,
        attempts INTEGER NOT NULL DEFAULT 0, latest INTEGER NOT NULL DEFAULT 0)""",
    """CREATE TABLE attempt (
        execution_id TEXT NOT NULL, attempt INTEGER NOT NULL, token TEXT NOT NULL, process_id TEXT NOT NULL,
        state TEXT NOT NULL, duplicate INTEGER NOT NULL, trace_id TEXT, span_id TEXT, span_start {blob},
        started_unix_ns {bigint} NOT NULL, deadline_unix_ns {bigint}, last_seen_unix_ns {bigint} NOT NULL DEFAULT 0,
        ended_unix_ns {bigint}, error_type TEXT, error_message TEXT, finalized_by TEXT, classification TEXT,
        reconciled_unix_ns {bigint}, progress TEXT, output TEXT, nonce TEXT, observed TEXT,
        outer_token TEXT, outer_span_id TEXT, outer_trace_id TEXT, outer_start {blob}, outer_started_unix_ns {bigint},
        outer_outcome TEXT, outer_ended_unix_ns {bigint}, outer_error_type TEXT, outer_error_message TEXT,
        UNIQUE (execution_id, attempt))""",
    "CREATE INDEX attempt_running ON attempt (process_id) WHERE state = 'running'",
    "CREATE INDEX attempt_outer ON attempt (process_id) WHERE outer_token IS NOT NULL AND outer_outcome IS NULL",
    """CREATE TABLE open_span (
        trace_id TEXT NOT NULL, span_id TEXT NOT NULL, process_id TEXT NOT NULL, execution_id TEXT, start {blob} NOT NULL,
        PRIMARY KEY (trace_id, span_id))""",
    "CREATE INDEX open_span_process ON open_span (process_id)",
    """CREATE TABLE outbox (
        id {serial}, request {blob} NOT NULL, count INTEGER NOT NULL, execution_id TEXT,
        written_unix_ns {bigint} NOT NULL, failures INTEGER NOT NULL DEFAULT 0)""",
    """CREATE TABLE contribution (
        join_key TEXT NOT NULL, execution_id TEXT NOT NULL, trace_id TEXT NOT NULL, span_id TEXT NOT NULL,
        PRIMARY KEY (join_key, execution_id))""",
    "CREATE INDEX contribution_execution ON contribution (execution_id)",
    "CREATE TABLE claim (id {bigint} PRIMARY KEY, owner TEXT NOT NULL, until_unix_ns {bigint} NOT NULL)",
    """CREATE TABLE parked (
        id {bigint} PRIMARY KEY, request {blob} NOT NULL, count INTEGER NOT NULL, execution_id TEXT,
        reason TEXT NOT NULL, parked_unix_ns {bigint} NOT NULL)""",
    "CREATE TABLE cancellation (execution_id TEXT PRIMARY KEY, requested_unix_ns {bigint} NOT NULL, terminate INTEGER)",
    "CREATE TABLE ingested (segment TEXT PRIMARY KEY, upto {bigint} NOT NULL, at_unix_ns {bigint} NOT NULL)",
)


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
    """What a write needs of the transaction that it runs in."""

    def execute(self, statement: str, parameters: Sequence[Any] = (), /) -> Cursor:
        """Run one statement."""
        ...

    def now_unix_ns(self) -> int:
        """Give the store's clock."""
        ...
