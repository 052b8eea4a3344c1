"""
The statements that write, once for every SQL store.

Each write has one function, here or in the modules that `_APPLY` brings together. The functions run inside the transaction
of the store that calls them and use nothing but `execute` and the store's clock; placeholders are `?`. Of the texts in
capitals without an underscore, each is a part of a statement that has another form in `postgres_schema.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from otelexec import semconv
from otelexec.store import attempt_statements, outbox_statements, pruning, run_statements
from otelexec.store.rows import QUEUED, SUCCEEDED
from otelexec.store.schema import Transaction
from otelexec.store.span_statements import add_spans, columns_of, record_open
from otelexec.store.writes import (
    AddSpans,
    Contribute,
    Heartbeat,
    Ingested,
    NameMessage,
    ReadContributions,
    RecordQueued,
    RefuseQueued,
    RequestCancel,
    Write,
)

QUEUED_AGAIN = """ON CONFLICT (execution_id) DO UPDATE SET
    queued_unix_ns = COALESCE(execution.queued_unix_ns, excluded.queued_unix_ns),
    producer_trace_id = COALESCE(execution.producer_trace_id, excluded.producer_trace_id),
    producer_span_id = COALESCE(execution.producer_span_id, excluded.producer_span_id)"""


def contribute(tx: Transaction, write: Contribute) -> None:
    """Note the span of an execution that something waits for."""
    tx.execute(
        """INSERT INTO contribution (join_key, execution_id, trace_id, span_id) VALUES (?, ?, ?, ?)
           ON CONFLICT (join_key, execution_id) DO UPDATE SET trace_id = excluded.trace_id, span_id = excluded.span_id""",
        (write.key, write.execution_id, write.trace_id, write.span_id),
    )


def read_contributions(tx: Transaction, write: ReadContributions) -> list[tuple[str, str]]:
    """Give the spans of all that contributed."""
    rows = tx.execute(
        """SELECT c.trace_id, c.span_id FROM contribution c JOIN execution e ON e.execution_id = c.execution_id
           WHERE c.join_key = ? ORDER BY e.seq""",
        (write.key,),
    ).fetchall()
    return [(row[0], row[1]) for row in rows]


def record_queued(tx: Transaction, write: RecordQueued) -> None:
    """Record an execution as queued unless it is further along, and its PRODUCER span as open."""
    execution, span = write.execution, write.span
    if write.repeated and span is not None:
        row = tx.execute("SELECT producer_span_id FROM execution WHERE execution_id = ?", (execution.execution_id,)).fetchone()
        if row is not None and row[0] == span.span_id:
            return
    tx.execute(
        f"""INSERT INTO execution (execution_id, name, state, request_id, source, correlation, parent_execution_id,
                                   queued_unix_ns, producer_trace_id, producer_span_id)
            VALUES (?, ?, '{QUEUED}', ?, ?, ?, ?, ?, ?, ?)
            {QUEUED_AGAIN}""",
        (*execution.values, write.queued_unix_ns, *columns_of(span)[:2]),
    )
    if span is not None:
        record_open(tx, (span,), write.process_id, execution.execution_id)
    record_open(tx, write.opened, write.process_id, execution.parent_execution_id)


def refuse_queued(tx: Transaction, write: RefuseQueued) -> None:
    """Close an execution whose message was refused or taken back, unless it got further by another way."""
    outcome = write.outcome
    tx.execute(
        f"""UPDATE execution SET state = ?, sticky = ?, ended_unix_ns = ?, error_type = ?, error_message = ?
            WHERE execution_id = ? AND state = '{QUEUED}'""",
        (outcome.state, int(outcome.sticky), outcome.ended_unix_ns, outcome.error_type, outcome.error_message, write.execution_id),
    )
    add_spans(tx, write.spans)


def heartbeat(tx: Transaction, write: Heartbeat) -> None:
    """Say that a process lives, or that it has ended well."""
    process = write.process
    tx.execute(
        """INSERT INTO process (process_id, host, boot_id, pid_namespace, pid, pid_start, lease_seconds, resource,
                                scope, heartbeat_unix_ns, ended, clock_unix_ns, parent_pid, parent_start)
           VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
           ON CONFLICT (process_id) DO UPDATE SET heartbeat_unix_ns = excluded.heartbeat_unix_ns,
               ended = excluded.ended, clock_unix_ns = excluded.clock_unix_ns""",
        (
            process.process_id,
            process.host,
            process.boot_id,
            process.pid_namespace,
            process.pid,
            process.pid_start,
            process.lease_seconds,
            process.resource,
            process.scope,
            tx.now_unix_ns(),
            int(write.ended),
            write.clock_unix_ns,
            process.parent_pid,
            process.parent_start,
        ),
    )


def request_cancel(tx: Transaction, write: RequestCancel) -> str | None:
    """
    Record the wish to cancel; a later `terminate` makes an earlier wish stronger, never weaker.

    One that comes after the success changes nothing: a redelivery then runs as a duplicate, as it would without.
    """
    row = tx.execute(f"SELECT state FROM execution WHERE execution_id = ? {tx.lock}", (write.execution_id,)).fetchone()
    if row is not None and row[0] == SUCCEEDED:
        return SUCCEEDED
    wish = write.cancellation
    tx.execute(
        """INSERT INTO cancellation (execution_id, requested_unix_ns, terminate) VALUES (?, ?, ?)
           ON CONFLICT (execution_id) DO UPDATE SET terminate =
               CASE WHEN excluded.terminate = 1 THEN 1 ELSE COALESCE(cancellation.terminate, excluded.terminate) END""",
        (write.execution_id, wish.requested_unix_ns, None if wish.terminate is None else int(wish.terminate)),
    )
    return None if row is None else str(row[0])


def ingested(tx: Transaction, write: Ingested) -> None:
    """Note how far a spool segment is in."""
    tx.execute(
        """INSERT INTO ingested (segment, upto, at_unix_ns) VALUES (?, ?, ?)
           ON CONFLICT (segment) DO UPDATE SET upto = excluded.upto, at_unix_ns = excluded.at_unix_ns""",
        (write.segment, write.offset, tx.now_unix_ns()),
    )


def name_message(tx: Transaction, write: NameMessage) -> None:
    """Note the id of an execution's message among the fields of its correlation."""
    row = tx.execute(f"SELECT correlation FROM execution WHERE execution_id = ? {tx.lock}", (write.execution_id,)).fetchone()
    if row is not None:
        named = {**json.loads(row[0]), semconv.MESSAGING_MESSAGE_ID: write.message_id}
        tx.execute("UPDATE execution SET correlation = ? WHERE execution_id = ?", (json.dumps(named), write.execution_id))


_APPLY: dict[type, Callable[[Transaction, Any], object]] = {
    Contribute: contribute,
    ReadContributions: read_contributions,
    RecordQueued: record_queued,
    RefuseQueued: refuse_queued,
    NameMessage: name_message,
    AddSpans: add_spans,
    Heartbeat: heartbeat,
    RequestCancel: request_cancel,
    Ingested: ingested,
    **attempt_statements.APPLY,
    **outbox_statements.APPLY,
    **pruning.APPLY,
    **run_statements.APPLY,
}


def apply(tx: Transaction, write: Write) -> object:
    """Run one write inside the transaction and give its result."""
    return _APPLY[type(write)](tx, write)
