"""
The statements that write, once for every SQL store.

Each write of `writes.py` has one function here. The functions run inside the transaction of the store that calls them
and use nothing but `execute` and the store's clock; placeholders are `?`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from otelexec import semconv
from otelexec.store import outbox_statements, pruning, run_admission, run_statements
from otelexec.store.outbox_statements import add_row
from otelexec.store.rows import CANCELLED, ENDED_STATES, LOST, PAUSED, QUEUED, RETRYING, RUNNING, SUCCEEDED, Cancellation, Outcome, SpanRow
from otelexec.store.schema import Transaction
from otelexec.store.writes import (
    NO_SPANS,
    AddSpans,
    AmendAttempt,
    Busy,
    CloseAttempt,
    Closed,
    CloseLost,
    CloseOuter,
    Contribute,
    Heartbeat,
    Ingested,
    NameMessage,
    OpenAttempt,
    Opened,
    ReadContributions,
    RecordObserved,
    RecordProgress,
    RecordQueued,
    RefuseQueued,
    RequestCancel,
    Write,
)


def _is_final(prefix: str = "") -> str:
    """Give the condition under which an execution's state stays; with a prefix where a statement has two rows in sight."""
    return f"{prefix}state = 'succeeded' OR {prefix}sticky = 1"


# Of the texts in capitals without an underscore, each is a part of a statement that has another form in `postgres_schema.py`.

OPENED = f"""ON CONFLICT (execution_id) DO UPDATE SET
    attempts = execution.attempts + 1,
    latest = CASE WHEN execution.state = 'succeeded' THEN execution.latest ELSE execution.attempts + 1 END,
    name = CASE WHEN execution.attempts = 0 THEN excluded.name ELSE execution.name END,
    started_unix_ns = COALESCE(execution.started_unix_ns, excluded.started_unix_ns),
    error_type = NULL, error_message = NULL,
    ended_unix_ns = CASE WHEN {_is_final("execution.")} THEN execution.ended_unix_ns END,
    state = CASE WHEN {_is_final("execution.")} THEN execution.state ELSE 'running' END
RETURNING attempts, state, snapshot,
    (SELECT requested_unix_ns FROM cancellation c WHERE c.execution_id = execution.execution_id) AS requested_unix_ns,
    (SELECT terminate FROM cancellation c WHERE c.execution_id = execution.execution_id) AS terminate"""

_OPEN_EXECUTION = f"""
INSERT INTO execution (execution_id, name, state, request_id, source, correlation, parent_execution_id,
                       started_unix_ns, attempts, latest)
VALUES (?, ?, 'running', ?, ?, ?, ?, ?, 1, 1)
{OPENED}"""

_OPEN_ATTEMPT = """
INSERT INTO attempt (execution_id, attempt, token, process_id, state, duplicate, trace_id, span_id, span_start,
                     started_unix_ns, deadline_unix_ns, outer_token, outer_span_id, outer_trace_id,
                     outer_start, outer_started_unix_ns)
VALUES (?, ?, ?, ?, 'running', ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"""

_TAKE_OVER = """
UPDATE attempt SET process_id = ?, trace_id = ?, span_id = ?, span_start = ?, started_unix_ns = ?, deadline_unix_ns = ?,
    outer_token = ?, outer_span_id = ?, outer_trace_id = ?, outer_start = ?, outer_started_unix_ns = ?
WHERE execution_id = ? AND token = ? AND state = 'running'"""

_RENAME = "UPDATE execution SET name = ?, request_id = ?, source = ?, correlation = ? WHERE execution_id = ?"

_FIND_ATTEMPT = "SELECT attempt, duplicate, state, finalized_by, nonce, span_id FROM attempt WHERE execution_id = ? AND token = ?"

_FIND_OPENED = """
SELECT a.attempt, a.duplicate, e.snapshot FROM attempt a JOIN execution e ON e.execution_id = a.execution_id
WHERE a.execution_id = ? AND a.token = ?"""

_CLOSE_ATTEMPT = """
UPDATE attempt SET state = ?, ended_unix_ns = ?, error_type = ?, error_message = ?, finalized_by = ?,
    classification = ?, reconciled_unix_ns = ?, progress = COALESCE(?, progress), output = ?, nonce = ?, span_start = NULL
WHERE execution_id = ? AND token = ? AND state = 'running'
RETURNING attempt, duplicate, span_id"""

_SUCCEED = f"""
UPDATE execution SET state = 'succeeded', ended_unix_ns = ?, snapshot = NULL
WHERE execution_id = ? AND state <> '{SUCCEEDED}'"""

_END = f"""
UPDATE execution SET state = ?, ended_unix_ns = ?, sticky = ?, snapshot = COALESCE(?, snapshot)
WHERE execution_id = ? AND latest = ? AND NOT ({_is_final()})"""

QUEUED_AGAIN = """ON CONFLICT (execution_id) DO UPDATE SET
    queued_unix_ns = COALESCE(execution.queued_unix_ns, excluded.queued_unix_ns),
    producer_trace_id = COALESCE(execution.producer_trace_id, excluded.producer_trace_id),
    producer_span_id = COALESCE(execution.producer_span_id, excluded.producer_span_id)"""


def _span(span: SpanRow | None) -> tuple[str | None, str | None, bytes | None]:
    return (None, None, None) if span is None else (span.trace_id, span.span_id, span.start)


def _outer(write: OpenAttempt) -> tuple[str | None, str | None, str | None, bytes | None, int | None]:
    outer = write.outer
    if outer is None:
        return write.outer_token, None, None, None, write.outer_started_unix_ns
    return write.outer_token, outer.span_id, outer.trace_id, outer.start, write.outer_started_unix_ns


def open_attempt(tx: Transaction, write: OpenAttempt) -> Opened | Busy:
    """Open an attempt, or hand an open one over to its core, or to the process that runs it."""
    execution = write.execution
    if write.takes_over:
        _take_over(tx, write)
    if write.takes_over or write.repeated:
        found = tx.execute(_FIND_OPENED, (execution.execution_id, write.token)).fetchone()
        if found is not None:
            return Opened(found[0], bool(found[1]), _cancellation(tx, execution.execution_id), found[2])
    if write.exclusive and (reason := run_admission.hindrance(tx, write)) is not None:
        return Busy(reason)
    if write.number is not None:
        run_admission.ensure_execution(tx, execution)
        before = write.number - 1
        tx.execute("UPDATE execution SET attempts = ? WHERE execution_id = ? AND attempts < ?", (before, execution.execution_id, before))
    opening = (*execution.values, write.started_unix_ns)
    number, state, snapshot, requested, terminate = tx.execute(_OPEN_EXECUTION, opening).fetchone()
    duplicate = state == SUCCEEDED
    tx.execute(
        _OPEN_ATTEMPT,
        (
            execution.execution_id,
            number,
            write.token,
            write.process_id,
            int(duplicate),
            *_span(write.span),
            write.started_unix_ns,
            write.deadline_unix_ns,
            *_outer(write),
        ),
    )
    _record_open(tx, write.opened, write.process_id, execution.parent_execution_id)
    # A wish was for what has succeeded since; a redelivery runs as it would without.
    wish = None if requested is None or duplicate else Cancellation(requested, None if terminate is None else bool(terminate))
    return Opened(number, duplicate, wish, snapshot)


def _lock(tx: Transaction, execution_id: str) -> None:
    """Hold the execution's row before the attempt's, so that two transactions never wait for each other crosswise."""
    if tx.lock:
        tx.execute(f"SELECT 1 FROM execution WHERE execution_id = ? {tx.lock}", (execution_id,))


def _take_over(tx: Transaction, write: OpenAttempt) -> None:
    execution = write.execution
    _lock(tx, execution.execution_id)
    changed = tx.execute(
        _TAKE_OVER,
        (
            write.process_id,
            *_span(write.span),
            write.started_unix_ns,
            write.deadline_unix_ns,
            *_outer(write),
            execution.execution_id,
            write.token,
        ),
    ).rowcount
    _record_open(tx, write.opened, write.process_id, execution.execution_id)
    if changed:
        tx.execute(
            _RENAME,
            (execution.name, execution.request_id, execution.source, execution.correlation, execution.execution_id),
        )


def _cancellation(tx: Transaction, execution_id: str) -> Cancellation | None:
    row = tx.execute("SELECT requested_unix_ns, terminate FROM cancellation WHERE execution_id = ?", (execution_id,)).fetchone()
    return None if row is None else Cancellation(row[0], None if row[1] is None else bool(row[1]))


def close_attempt(tx: Transaction, write: CloseAttempt) -> Closed:
    """Close an attempt once; its span goes with whoever wins, the children go in any case."""
    execution_id, token = write.attempt.execution.execution_id, write.attempt.token
    frozen = write.frozen
    _lock(tx, execution_id)
    if write.if_cancelled is not None and _cancellation(tx, execution_id) is not None:
        frozen = write.if_cancelled
    outcome = frozen.outcome
    parameters = (*_closing_values(outcome), write.nonce, execution_id, token)
    row = tx.execute(_CLOSE_ATTEMPT, parameters).fetchone()
    if row is None:
        found = tx.execute(_FIND_ATTEMPT, (execution_id, token)).fetchone()
        if found is not None:
            return _lost_race(tx, write, found)
        # The store lost the open (an unsynced commit, a replaced file): the row comes back whole, closed.
        open_attempt(tx, replace(write.attempt, exclusive=False))
        row = tx.execute(_CLOSE_ATTEMPT, parameters).fetchone()
    number, duplicate, span_id = row
    _end_execution(tx, execution_id, number, outcome, duplicate=bool(duplicate))
    spans = write.spans
    if frozen.request:
        add_row(tx, frozen.request + spans.request, 1 + spans.count, execution_id)
        add_spans(tx, spans, counted=True)
    else:
        add_spans(tx, spans)
    return Closed(True, outcome.state, outcome.finalized_by, number, bool(duplicate), span_id)  # noqa: FBT003 (won)


def _closing_values(outcome: Outcome) -> tuple[object, ...]:
    return (
        outcome.state,
        outcome.ended_unix_ns,
        outcome.error_type,
        outcome.error_message,
        outcome.finalized_by,
        outcome.classification,
        outcome.reconciled_unix_ns,
        outcome.progress,
        outcome.output,
    )


def _lost_race(tx: Transaction, write: CloseAttempt, found: Any) -> Closed:
    number, duplicate, state, finalized_by, nonce, span_id = found
    mine = nonce == write.nonce
    if not mine:
        add_spans(tx, write.spans)
        if state == LOST and write.observed is not None:
            record_observed(tx, write.observed)
    return Closed(mine, state, finalized_by, number, bool(duplicate), span_id)


def _end_execution(tx: Transaction, execution_id: str, number: int, outcome: Outcome, *, duplicate: bool) -> None:
    if outcome.state == SUCCEEDED:
        tx.execute(_SUCCEED, (outcome.ended_unix_ns, execution_id))
        return
    if not duplicate:
        tx.execute(_END, (*execution_end(outcome), execution_id, number))


def execution_end(outcome: Outcome) -> tuple[str, int | None, int, str | None]:
    """Give what an attempt's outcome means for its execution: state, end, whether that sticks, snapshot to keep."""
    # What was asked to be cancelled is not retried, even if a message for another attempt is out already.
    state = RETRYING if outcome.retrying and not outcome.sticky else outcome.state
    ended = outcome.ended_unix_ns if state in ENDED_STATES else None
    return state, ended, int(outcome.sticky), outcome.snapshot if state == PAUSED else None


def record_observed(tx: Transaction, write: RecordObserved) -> None:
    """Note what a lost attempt observed itself, and ship its span under the new id."""
    outcome = write.frozen.outcome
    observed = {
        "state": outcome.state,
        "ended_unix_ns": outcome.ended_unix_ns,
        "error_type": outcome.error_type,
        "error_message": outcome.error_message,
        "span_id": write.span_id,
    }
    execution_id = write.attempt.execution.execution_id
    changed = tx.execute(
        "UPDATE attempt SET observed = ? WHERE execution_id = ? AND token = ? AND observed IS NULL",
        (json.dumps(observed), execution_id, write.attempt.token),
    ).rowcount
    if changed and write.frozen.request:
        add_row(tx, write.frozen.request, 1, execution_id)


def close_lost(tx: Transaction, write: CloseLost) -> bool:
    """Close what a dead process left running, unless it or somebody else was first."""
    outcome = write.frozen.outcome
    _lock(tx, write.execution_id)
    row = tx.execute(_CLOSE_ATTEMPT, (*_closing_values(outcome), None, write.execution_id, write.token)).fetchone()
    if row is None:
        return False
    if outcome.state == LOST and run_admission.is_cancelled(tx, write.execution_id):
        outcome = replace(outcome, state=CANCELLED, sticky=True)  # the attempt stays lost
    elif outcome.state == LOST and run_admission.is_retried(tx, write.execution_id, row[0]):
        outcome = replace(outcome, retrying=True)
    _end_execution(tx, write.execution_id, row[0], outcome, duplicate=bool(row[1]))
    if write.frozen.request:
        add_row(tx, write.frozen.request, 1, write.execution_id)
    return True


def amend_attempt(tx: Transaction, write: AmendAttempt) -> bool:
    """Note what was found out about a closed attempt after its close."""
    changed = tx.execute(
        f"""UPDATE attempt SET classification = ?
            WHERE execution_id = ? AND token = ? AND state <> '{RUNNING}' AND classification IS NULL""",
        (write.classification, write.execution_id, write.token),
    ).rowcount
    return bool(changed)


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


def close_outer(tx: Transaction, write: CloseOuter) -> bool:
    """Record how the code around the cores ended; once, whoever comes first."""
    outcome = write.frozen.outcome
    _lock(tx, write.execution_id)
    # COALESCE, so that the way to the row never leads through the index of all that are open.
    rows = tx.execute(
        """UPDATE attempt SET outer_outcome = ?, outer_ended_unix_ns = ?, outer_error_type = ?,
               outer_error_message = ?, outer_start = NULL
           WHERE execution_id = ? AND outer_token = ? AND COALESCE(outer_outcome, '') = '' RETURNING attempt""",
        (
            outcome.state,
            outcome.ended_unix_ns,
            outcome.error_type,
            outcome.error_message,
            write.execution_id,
            write.outer_token,
        ),
    ).fetchall()
    if rows and write.frozen.request:
        add_row(tx, write.frozen.request, 1, write.execution_id)
    if rows and write.retrying:
        tx.execute(
            f"""UPDATE execution SET state = '{RETRYING}', ended_unix_ns = NULL
                WHERE execution_id = ? AND latest = ? AND NOT ({_is_final()}) AND state <> '{RUNNING}'""",
            (write.execution_id, max(row[0] for row in rows)),
        )
    add_spans(tx, write.spans)
    return bool(rows)


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
        (*execution.values, write.queued_unix_ns, *_span(span)[:2]),
    )
    if span is not None:
        _record_open(tx, (span,), write.process_id, execution.execution_id)
    _record_open(tx, write.opened, write.process_id, execution.parent_execution_id)


def refuse_queued(tx: Transaction, write: RefuseQueued) -> None:
    """Close an execution whose message was refused or taken back, unless it got further by another way."""
    outcome = write.outcome
    tx.execute(
        f"""UPDATE execution SET state = ?, sticky = ?, ended_unix_ns = ?, error_type = ?, error_message = ?
            WHERE execution_id = ? AND state = '{QUEUED}'""",
        (outcome.state, int(outcome.sticky), outcome.ended_unix_ns, outcome.error_type, outcome.error_message, write.execution_id),
    )
    add_spans(tx, write.spans)


def _record_open(tx: Transaction, spans: Iterable[SpanRow], process_id: str, execution_id: str | None) -> None:
    for span in spans:
        tx.execute(
            """INSERT INTO open_span (trace_id, span_id, process_id, execution_id, start) VALUES (?, ?, ?, ?, ?)
               ON CONFLICT (trace_id, span_id) DO NOTHING""",
            (span.trace_id, span.span_id, process_id, execution_id, span.start),
        )


def add_spans(tx: Transaction, write: AddSpans, *, counted: bool = False) -> None:
    """Put ended spans into the outbox; `counted` when the plain ones went in with their execution."""
    if write is NO_SPANS:
        return
    first = counted or _is_first(tx, write.nonce)
    if write.count and not counted and first:
        add_row(tx, write.request, write.count, write.execution_id)
    for span, request in write.recorded:
        if tx.execute("DELETE FROM open_span WHERE trace_id = ? AND span_id = ?", (span.trace_id, span.span_id)).rowcount:
            add_row(tx, request, 1, write.execution_id)
    if first:
        _record_open(tx, write.opened, write.process_id, write.execution_id)
    if write.last_end_unix_ns and write.execution_id is not None:
        tx.execute(
            """UPDATE attempt SET last_seen_unix_ns = ?
               WHERE execution_id = ? AND process_id = ? AND state = 'running' AND last_seen_unix_ns < ?""",
            (write.last_end_unix_ns, write.execution_id, write.process_id, write.last_end_unix_ns),
        )


def _is_first(tx: Transaction, nonce: str) -> bool:
    return not nonce or bool(tx.execute("INSERT INTO written (nonce) VALUES (?) ON CONFLICT (nonce) DO NOTHING", (nonce,)).rowcount)


def record_progress(tx: Transaction, write: RecordProgress) -> None:
    """Write the progress marker of an attempt that is still running."""
    tx.execute(
        """UPDATE attempt SET progress = ?, last_seen_unix_ns = ?
           WHERE execution_id = ? AND token = ? AND state = 'running'""",
        (write.progress, write.at_unix_ns, write.execution_id, write.token),
    )


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
    OpenAttempt: open_attempt,
    CloseAttempt: close_attempt,
    RecordObserved: record_observed,
    CloseLost: close_lost,
    AmendAttempt: amend_attempt,
    Contribute: contribute,
    ReadContributions: read_contributions,
    CloseOuter: close_outer,
    RecordQueued: record_queued,
    RefuseQueued: refuse_queued,
    NameMessage: name_message,
    AddSpans: add_spans,
    RecordProgress: record_progress,
    Heartbeat: heartbeat,
    RequestCancel: request_cancel,
    Ingested: ingested,
    **outbox_statements.APPLY,
    **pruning.APPLY,
    **run_statements.APPLY,
}


def apply(tx: Transaction, write: Write) -> object:
    """Run one write inside the transaction and give its result."""
    return _APPLY[type(write)](tx, write)
