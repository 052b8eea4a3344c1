"""Whether an exclusive attempt may begin, and what becomes of a lost one: what `attempt_statements.py` asks of the queue."""

from __future__ import annotations

from otelexec.store.rows import PAUSED, QUEUED, RETRYING, RUNNING, ExecutionRow
from otelexec.store.schema import Transaction
from otelexec.store.writes import OpenAttempt

# A core may end before the code around it: until that has ended as well, the attempt goes on, and keeps its place.
_GOES_ON = f"(a.state = '{RUNNING}' OR (a.outer_token IS NOT NULL AND a.outer_outcome IS NULL))"
# The runs that have a place in a lane. Found from the attempts that are open: any number of runs may wait.
AT_WORK = f"""at_work AS MATERIALIZED (
    SELECT o.lane, o.execution_id FROM attempt b JOIN execution x ON x.execution_id = b.execution_id
        JOIN run o ON o.execution_id = b.execution_id
    WHERE b.state = '{RUNNING}' AND x.state = '{RUNNING}' AND o.pending = 1 AND o.lane IS NOT NULL
    UNION SELECT o.lane, o.execution_id FROM attempt b JOIN run o ON o.execution_id = b.execution_id
    WHERE b.outer_token IS NOT NULL AND b.outer_outcome IS NULL AND o.pending = 1 AND o.lane IS NOT NULL)"""

# Whether process p has lost its lease at a time.
LAPSED = "p.heartbeat_unix_ns + CAST(p.lease_seconds * 1000000000 AS BIGINT) < ?"


def ensure_execution(tx: Transaction, execution: ExecutionRow) -> None:
    """Make the execution's row, without an attempt, if it is not there."""
    tx.execute(
        f"""INSERT INTO execution (execution_id, name, state, request_id, source, correlation, parent_execution_id)
            VALUES (?, ?, '{QUEUED}', ?, ?, ?, ?) ON CONFLICT (execution_id) DO NOTHING""",
        execution.values,
    )


def hindrance(tx: Transaction, write: OpenAttempt) -> str | None:
    """
    Tell what stands in the way of an exclusive attempt; None when nothing does.

    The execution's row is made, if need be, and held: of two that ask at the same time, the second sees the first's answer.
    """
    execution = write.execution
    ensure_execution(tx, execution)
    state, attempts = tx.execute(
        f"SELECT state, attempts FROM execution WHERE execution_id = ? {tx.lock}", (execution.execution_id,)
    ).fetchone()
    run = tx.execute("SELECT lane, lane_limit, max_attempts FROM run WHERE execution_id = ?", (execution.execution_id,)).fetchone()
    if run is not None and state not in (QUEUED, RETRYING, RUNNING, PAUSED):
        return f"it is {state}"
    if write.expected_attempts is not None and attempts != write.expected_attempts:
        return f"it has had {attempts} attempts, not {write.expected_attempts}"
    lapsed = f"AND NOT ({LAPSED})" if write.takes_lapsed else ""
    running = tx.execute(
        f"""SELECT a.attempt FROM attempt a LEFT JOIN process p ON p.process_id = a.process_id
            WHERE a.execution_id = ? AND {_GOES_ON} {lapsed}""",
        (execution.execution_id, *((tx.now_unix_ns(),) if write.takes_lapsed else ())),
    ).fetchone()
    if running is not None:
        return f"attempt {running[0]} runs"
    if run is not None and state == RUNNING and attempts >= run[2]:
        return "it has no attempt left"
    if (
        run is not None
        and run[0] is not None
        and not _is_hopeless(tx, execution.execution_id)
        and _is_full(tx, run[0], run[1], execution.execution_id)
    ):
        return f"{run[0]} has {run[1]} running already"
    return None


def _is_hopeless(tx: Transaction, execution_id: str) -> bool:
    """Tell whether an attempt at it would only close it: then it takes no place from anybody."""
    row = tx.execute(
        """SELECT 1 FROM run r JOIN execution e ON e.execution_id = r.execution_id
           WHERE r.execution_id = ? AND ((e.attempts = 0 AND r.expires_unix_ns < ?)
               OR EXISTS (SELECT 1 FROM cancellation c WHERE c.execution_id = r.execution_id))""",
        (execution_id, tx.now_unix_ns()),
    ).fetchone()
    return row is not None


def _is_full(tx: Transaction, lane: str, limit: int, but: str) -> bool:
    # Held until the commit, so that two that open runs of one lane count one after the other. A prune may take it away meanwhile.
    while tx.lock and tx.execute(f"SELECT 1 FROM run_lane WHERE lane = ? {tx.lock}", (lane,)).fetchone() is None:
        tx.execute("INSERT INTO run_lane (lane) VALUES (?) ON CONFLICT (lane) DO NOTHING", (lane,))
    row = tx.execute(f"WITH {AT_WORK} SELECT COUNT(*) FROM at_work WHERE lane = ? AND execution_id <> ?", (lane, but)).fetchone()
    return int(row[0]) >= limit


def is_retried(tx: Transaction, execution_id: str, attempt: int) -> bool:
    """Tell whether the execution of a lost attempt is a run that may be attempted again."""
    row = tx.execute("SELECT max_attempts FROM run WHERE execution_id = ?", (execution_id,)).fetchone()
    return row is not None and attempt < row[0]


def is_cancelled(tx: Transaction, execution_id: str) -> bool:
    """Tell whether the execution is a run that somebody asked to be cancelled."""
    row = tx.execute(
        "SELECT 1 FROM run r JOIN cancellation c ON c.execution_id = r.execution_id WHERE r.execution_id = ?", (execution_id,)
    ).fetchone()
    return row is not None
