"""The queries, written once for every SQL store. Like the writes in `sql.py` they use nothing but `execute`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from otelexec.store.records import AttemptRecord, ExecutionRecord, OpenWork, ParkedRow, Statistics
from otelexec.store.schema import Transaction
from otelexec.store.writes import Cancellation, ProcessRow, SpanRow

EXECUTION_COLUMNS = """seq, execution_id, name, state, request_id, source, correlation, parent_execution_id,
    queued_unix_ns, started_unix_ns, ended_unix_ns, error_type, error_message, producer_trace_id, producer_span_id, snapshot"""

_ATTEMPTS = """SELECT a.execution_id, a.attempt, a.state, a.duplicate, a.trace_id, a.span_id, a.started_unix_ns,
    a.ended_unix_ns, a.deadline_unix_ns, a.error_type, a.error_message, a.finalized_by, a.classification,
    a.reconciled_unix_ns, a.progress, a.output, a.observed, a.outer_span_id, a.outer_outcome, a.outer_started_unix_ns,
    a.outer_ended_unix_ns, a.outer_error_type, a.outer_error_message, p.host, p.pid
    FROM attempt a LEFT JOIN process p ON p.process_id = a.process_id
    WHERE a.execution_id IN ({marks}) ORDER BY a.execution_id, a.attempt"""

_OPEN_WORK = """
SELECT 'attempt', process_id, execution_id, token, attempt, trace_id, span_id, span_start, started_unix_ns,
    deadline_unix_ns, last_seen_unix_ns, progress FROM attempt WHERE state = 'running' AND process_id IN ({marks})
UNION ALL
SELECT 'outer', process_id, execution_id, outer_token, attempt, outer_trace_id, outer_span_id, outer_start,
    outer_started_unix_ns, NULL, COALESCE(ended_unix_ns, last_seen_unix_ns), NULL FROM attempt
    WHERE outer_token IS NOT NULL AND outer_outcome IS NULL AND state <> 'running' AND process_id IN ({marks})
UNION ALL
SELECT 'span', process_id, COALESCE(execution_id, ''), '', 0, trace_id, span_id, start, 0, NULL, 0, NULL
    FROM open_span WHERE process_id IN ({marks})
LIMIT ?"""


def read_executions(tx: Transaction, rows: Sequence[Any]) -> list[ExecutionRecord]:
    """Complete rows of `EXECUTION_COLUMNS` with their attempts and the wishes to cancel them."""
    if not rows:
        return []
    ids = [row[1] for row in rows]
    marks = ",".join("?" * len(ids))
    attempts: dict[str, list[AttemptRecord]] = {}
    for execution_id, number, state, duplicate, *rest in tx.execute(_ATTEMPTS.format(marks=marks), ids).fetchall():
        attempts.setdefault(execution_id, []).append(AttemptRecord(number, state, bool(duplicate), *rest))
    wishes = read_cancellations(tx, ids)
    complete: list[Any] = [(*row, wishes.get(row[1]), tuple(attempts.get(row[1], ()))) for row in rows]
    return [ExecutionRecord(*values) for values in complete]


def read_cancellations(tx: Transaction, execution_ids: Sequence[str]) -> dict[str, Cancellation]:
    """Give the wishes to cancel among these executions."""
    marks = ",".join("?" * len(execution_ids))
    rows = tx.execute(
        f"SELECT execution_id, requested_unix_ns, terminate FROM cancellation WHERE execution_id IN ({marks})", execution_ids
    ).fetchall()
    return {row[0]: Cancellation(row[1], None if row[2] is None else bool(row[2])) for row in rows}


def read_open_work(tx: Transaction, process_ids: Sequence[str], limit: int) -> list[OpenWork]:
    """Give what these processes have open, attempts first."""
    marks = ",".join("?" * len(process_ids))
    rows = tx.execute(_OPEN_WORK.format(marks=marks), (*process_ids, *process_ids, *process_ids, limit)).fetchall()
    return [
        OpenWork(
            kind=row[0],
            process_id=row[1],
            execution_id=row[2],
            token=row[3],
            number=row[4],
            span=None if row[6] is None or row[7] is None else SpanRow(row[5], row[6], bytes(row[7])),
            started_unix_ns=row[8],
            deadline_unix_ns=row[9],
            last_seen_unix_ns=row[10],
            progress=row[11],
        )
        for row in rows
    ]


def _busy(name: str, table: str, condition: str) -> str:
    """Give a step through an index from one process id to the next: DISTINCT would visit every entry of it."""
    return f"""{name} (process_id) AS (
    SELECT MIN(process_id) FROM {table} WHERE {condition}
    UNION ALL SELECT (SELECT MIN(t.process_id) FROM {table} t WHERE t.process_id > {name}.process_id AND {condition})
    FROM {name} WHERE {name}.process_id IS NOT NULL)"""


_PROCESSES = f"""
WITH RECURSIVE {_busy("running", "attempt", "state = 'running'")},
{_busy("around", "attempt", "outer_token IS NOT NULL AND outer_outcome IS NULL")},
{_busy("spanning", "open_span", "1 = 1")}
SELECT process_id, host, boot_id, pid_namespace, pid, pid_start, lease_seconds, resource, scope, heartbeat_unix_ns, ended,
    parent_pid, parent_start
FROM process WHERE process_id IN (
    SELECT process_id FROM running UNION SELECT process_id FROM around UNION SELECT process_id FROM spanning
    UNION SELECT owner FROM claim)"""


def read_processes(tx: Transaction) -> list[ProcessRow]:
    """Give the processes that have something open or hold a claim."""
    rows = tx.execute(_PROCESSES).fetchall()
    complete: list[Any] = [(*row[:7], bytes(row[7]), bytes(row[8]), row[9], bool(row[10]), row[11], row[12]) for row in rows]
    return [ProcessRow(*values) for values in complete]


def read_statistics(tx: Transaction, size_bytes: int) -> Statistics:
    """Give what `doctor` shows."""
    states = tx.execute("SELECT state, COUNT(*) FROM execution GROUP BY state ORDER BY state").fetchall()
    rows, spans, oldest = tx.execute("SELECT COUNT(*), COALESCE(SUM(count), 0), MIN(written_unix_ns) FROM outbox").fetchone()
    parked = tx.execute("SELECT id, count, reason, parked_unix_ns FROM parked ORDER BY id LIMIT 100").fetchall()
    unseen = tx.execute(
        """SELECT c.execution_id FROM cancellation c JOIN execution e ON e.execution_id = c.execution_id
           WHERE c.terminate = 1 AND e.state = 'running' ORDER BY c.execution_id LIMIT 100"""
    ).fetchall()
    return Statistics(
        executions=dict(states),
        outbox_rows=rows,
        outbox_spans=spans,
        outbox_oldest_unix_ns=oldest,
        claimed_rows=tx.execute("SELECT COUNT(*) FROM claim").fetchone()[0],
        parked=[ParkedRow(*row) for row in parked],
        processes=tx.execute("SELECT COUNT(*) FROM process WHERE ended = 0").fetchone()[0],
        unseen_cancellations=[row[0] for row in unseen],
        size_bytes=size_bytes,
    )
