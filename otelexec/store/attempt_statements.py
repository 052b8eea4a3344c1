"""The statements that open, take over and close attempts, with what that means for their execution; as in `sql.py`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

from otelexec.store import run_admission
from otelexec.store.outbox_statements import add_row
from otelexec.store.rows import CANCELLED, ENDED_STATES, LOST, PAUSED, RETRYING, RUNNING, SPOOL, SUCCEEDED, Cancellation, Outcome
from otelexec.store.schema import Transaction
from otelexec.store.span_statements import add_spans, columns_of, record_open
from otelexec.store.writes import (
    AmendAttempt,
    Busy,
    CloseAttempt,
    Closed,
    CloseLost,
    CloseOuter,
    OpenAttempt,
    Opened,
    RecordObserved,
    RecordProgress,
)


def _is_final(prefix: str = "") -> str:
    """Give the condition under which an execution's state stays; with a prefix where a statement has two rows in sight."""
    return f"{prefix}state = 'succeeded' OR {prefix}sticky = 1"


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
            *columns_of(write.span),
            write.started_unix_ns,
            write.deadline_unix_ns,
            *_outer(write),
        ),
    )
    record_open(tx, write.opened, write.process_id, execution.parent_execution_id)
    # A wish was for what has succeeded since; a redelivery runs as it would without.
    wish = None if requested is None or duplicate else Cancellation.from_columns(requested, terminate)
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
            *columns_of(write.span),
            write.started_unix_ns,
            write.deadline_unix_ns,
            *_outer(write),
            execution.execution_id,
            write.token,
        ),
    ).rowcount
    record_open(tx, write.opened, write.process_id, execution.execution_id)
    if changed:
        tx.execute(
            _RENAME,
            (execution.name, execution.request_id, execution.source, execution.correlation, execution.execution_id),
        )


def _cancellation(tx: Transaction, execution_id: str) -> Cancellation | None:
    row = tx.execute("SELECT requested_unix_ns, terminate FROM cancellation WHERE execution_id = ?", (execution_id,)).fetchone()
    return None if row is None else Cancellation.from_columns(row[0], row[1])


def close_attempt(tx: Transaction, write: CloseAttempt) -> Closed:
    """Close an attempt once; its span goes with whoever wins, the children go in any case."""
    execution_id, token = write.attempt.execution.execution_id, write.attempt.token
    frozen = write.frozen
    _lock(tx, execution_id)
    if write.if_cancelled is not None:
        wish = _cancellation(tx, execution_id)
        # What waited in the spool may be taken in long after the end, and after wishes that came too late for it.
        if wish is not None and (frozen.outcome.finalized_by != SPOOL or wish.requested_unix_ns <= frozen.outcome.ended_unix_ns):
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


def record_progress(tx: Transaction, write: RecordProgress) -> None:
    """Write the progress marker of an attempt that is still running."""
    tx.execute(
        """UPDATE attempt SET progress = ?, last_seen_unix_ns = ?
           WHERE execution_id = ? AND token = ? AND state = 'running'""",
        (write.progress, write.at_unix_ns, write.execution_id, write.token),
    )


APPLY: Final[Mapping[type, Callable[[Transaction, Any], object]]] = {
    OpenAttempt: open_attempt,
    CloseAttempt: close_attempt,
    RecordObserved: record_observed,
    CloseLost: close_lost,
    AmendAttempt: amend_attempt,
    CloseOuter: close_outer,
    RecordProgress: record_progress,
}
