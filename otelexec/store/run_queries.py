"""What is asked of the queue in the store, once for every SQL store: see `runs.py`, and `sql.py` for what it may use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

from otelexec.store.rows import CANCELLED, FAILED, LOST, PAUSED, QUEUED, RETRYING, RUNNING, SUCCEEDED, TIMED_OUT
from otelexec.store.run_admission import AT_WORK, LAPSED
from otelexec.store.runs import EXPIRED, BatchRecord, DueRun, RunRecord
from otelexec.store.schema import Transaction

FIRST_RETRY_SECONDS: Final = 1
"""How long after the end of the first attempt the second may begin; each further one waits twice as long."""
LAST_RETRY_SECONDS: Final = 60
"""The longest wait between two attempts."""

_FREES_ITS_KEY: Final = frozenset({FAILED, LOST, TIMED_OUT})
_NANOSECONDS: Final = 1_000_000_000

# What is told of a run is that of its latest attempt, or of the one that succeeded: it may not be the latest, when a worker hung.
_LAST = f"""a.attempt = CASE WHEN e.state = '{SUCCEEDED}' THEN
        (SELECT MIN(o.attempt) FROM attempt o WHERE o.execution_id = e.execution_id AND o.state = '{SUCCEEDED}')
        WHEN e.latest > 0 THEN e.latest ELSE e.attempts END"""


def _columns(payload: str, output: str, attempt_output: str) -> str:
    return f"""r.seq, r.run_id, r.execution_id, r.task, {payload}, r.payload_type, r.carrier, r.options, r.tags, r.metadata, r.lane,
    r.max_attempts, r.max_seconds, r.created_unix_ns, r.updated_unix_ns, r.due_unix_ns, r.expires_unix_ns, r.batch_id, r.batch_index,
    {output}, e.state, e.attempts, e.started_unix_ns, e.ended_unix_ns, {attempt_output}, a.ended_unix_ns, a.state, a.classification,
    a.error_type, a.error_message, a.outer_token IS NOT NULL AND a.outer_outcome IS NULL"""


_WHOLE = _columns("r.payload", "r.output", "a.output")
_FROM = f"""FROM run r JOIN execution e ON e.execution_id = r.execution_id
    LEFT JOIN attempt a ON a.execution_id = r.execution_id AND {_LAST}"""
_RUN = f"SELECT {_WHOLE} {_FROM}"
# Hundreds of runs are read for a list, which shows neither what they were given nor what they gave.
_LISTED = f"SELECT {_columns('NULL', 'NULL', 'NULL')} {_FROM}"

# When a `retrying` run may be attempted again: at once after a first attempt that was lost, since that says little of the next one.
# An attempt ends on the clock of its process, whose heartbeats tell how far that is from the store's.
# Both stores shift integers; neither has the other's LEAST.
_RETRIED = f"""(a.ended_unix_ns IS NULL OR (a.state = '{LOST}' AND e.attempts = 1)
    OR a.ended_unix_ns + COALESCE(p.heartbeat_unix_ns - p.clock_unix_ns, 0)
        + CASE WHEN e.attempts > 6 THEN CAST({LAST_RETRY_SECONDS * _NANOSECONDS} AS BIGINT)
          ELSE CAST({FIRST_RETRY_SECONDS * _NANOSECONDS} AS BIGINT) << (e.attempts - 1) END <= ?)"""


def retry_wait_ns(attempts: int) -> int:
    """Give how long after the end of the last of so many attempts the next one may begin: what `_RETRIED` says in SQL."""
    return min(FIRST_RETRY_SECONDS << (attempts - 1), LAST_RETRY_SECONDS) * _NANOSECONDS


_ROOM = "r.lane_limit - (SELECT COUNT(*) FROM at_work w WHERE w.lane = r.lane AND w.execution_id <> r.execution_id)"


def _record(tx: Transaction, row: Any) -> RunRecord:
    values: tuple[Any, ...] = (*row, tx.now_unix_ns())
    return RunRecord(*values)


def find_run(tx: Transaction, run_id: str) -> RunRecord | None:
    """Give one run; None when it is not there."""
    row = tx.execute(f"{_RUN} WHERE r.run_id = ?", (run_id,)).fetchone()
    return None if row is None else _record(tx, row)


def find_key(tx: Transaction, name: str) -> RunRecord | None:
    """Give the run that holds a key; None when no run does, or it has freed it."""
    now = tx.now_unix_ns()
    row = tx.execute("SELECT owner, expires_unix_ns FROM run_key WHERE name = ?", (name,)).fetchone()
    run = None if row is None or row[1] <= now else find_run(tx, row[0])
    return None if run is None or has_freed_its_key(run.state, run.classification) else run


def list_runs(
    tx: Transaction,
    *,
    limit: int,
    before: int | None = None,
    after: int | None = None,
    tasks: Sequence[str] = (),
    batch_id: str | None = None,
) -> list[RunRecord]:
    """
    Give runs without payload and output, the newest first.

    Args:
        tx: The transaction.
        limit: At most so many.
        before: Only runs older than the one with this `seq`; None: from the newest.
        after: Only runs newer than the one with this `seq`, the oldest of them; None: no limit.
        tasks: Only runs of these tasks; empty: of any.
        batch_id: Only runs of this batch; None: of any and none.
    """
    conditions = ["r.seq < ?", "r.seq > ?"]
    parameters: list[Any] = [2**62 if before is None else before, -1 if after is None else after]
    if tasks:
        among, values = tx.among(tasks)
        conditions.append(f"r.task {among}")
        parameters += values
    if batch_id is not None:
        conditions.append("r.batch_id = ?")
        parameters.append(batch_id)
    order = "DESC" if after is None else "ASC"
    rows = tx.execute(f"{_LISTED} WHERE {' AND '.join(conditions)} ORDER BY r.seq {order} LIMIT ?", (*parameters, limit)).fetchall()
    found = [_record(tx, row) for row in rows]
    return found if after is None else found[::-1]


def find_batch(tx: Transaction, batch_id: str) -> BatchRecord | None:
    """Give one batch; None when it is not there."""
    row = tx.execute("SELECT batch_id, run_count, carrier, created_unix_ns FROM run_batch WHERE batch_id = ?", (batch_id,)).fetchone()
    if row is None:
        return None
    places = dict(tx.execute("SELECT batch_index, run_id FROM run WHERE batch_id = ?", (batch_id,)).fetchall())
    # Items whose key another run held already.
    prefix = item_prefix(batch_id)
    held = tx.execute("SELECT name, owner FROM run_key WHERE name >= ? AND name < ?", (prefix, prefix[:-1] + chr(ord("/") + 1))).fetchall()
    for name, owner in held:
        places.setdefault(int(name.removeprefix(prefix)), owner)
    return BatchRecord(row[0], row[1], row[2], row[3], tuple(places[place] for place in sorted(places)))


def item_prefix(batch_id: str) -> str:
    """Give how the names begin under which a batch keeps its items whose key another run held already."""
    return f"item/{batch_id}/"


def find_packet(tx: Transaction, name: str) -> tuple[str, str] | None:
    """Give content and media type of what was uploaded under a name; None when nothing was."""
    row = tx.execute("SELECT content, media_type FROM run_packet WHERE name = ?", (name,)).fetchone()
    return None if row is None else (row[0], row[1])


def due_runs(tx: Transaction, tasks: Sequence[str], *, limit: int, lapsed_too: bool, but: Sequence[str] = ()) -> list[DueRun]:
    """
    Give runs that may be attempted now: those whose worker's lease has lapsed, then those due first, of each lane as many as have room.

    Args:
        tx: The transaction.
        tasks: Of which tasks.
        limit: At most so many of each kind.
        lapsed_too: Whether leases count at this time.
        but: The ids of runs that are not meant.
    """
    found = [DueRun(run, lapsed=lapsed_too) for run in _waiting(tx, tasks, limit, but)]
    if lapsed_too:
        # Ahead of those that wait, of which there may be any number.
        task_among, values = tx.among(tasks)
        but_among, but_values = tx.among(but)
        rows = tx.execute(
            f"""{_RUN} JOIN process p ON p.process_id = a.process_id
                WHERE r.pending = 1 AND e.state = '{RUNNING}' AND a.state = '{RUNNING}' AND e.attempts < r.max_attempts
                AND {LAPSED} AND r.task {task_among} AND NOT r.run_id {but_among} ORDER BY r.due_unix_ns, r.seq LIMIT ?""",
            (tx.now_unix_ns(), *values, *but_values, limit),
        ).fetchall()
        found = [DueRun(_record(tx, row), lapsed=True) for row in rows] + found
    return found


def _waiting(tx: Transaction, tasks: Sequence[str], limit: int, but: Sequence[str]) -> list[RunRecord]:
    now = tx.now_unix_ns()
    task_among, values = tx.among(tasks)
    but_among, but_values = tx.among(but)
    found: list[RunRecord] = []
    taken: Counter[str] = Counter()
    full: set[str] = set()
    place = (-1, -1)
    while True:
        full_among, full_values = tx.among(sorted(full))
        rows = tx.execute(
            f"""WITH {AT_WORK} SELECT {_ROOM}, {_WHOLE} {_FROM}
                LEFT JOIN process p ON p.process_id = a.process_id AND p.clock_unix_ns > 0
                WHERE r.pending = 1 AND (r.due_unix_ns, r.seq) > (?, ?) AND r.due_unix_ns <= ? AND r.task {task_among}
                AND (r.lane IS NULL OR (NOT r.lane {full_among} AND {_ROOM} > 0)) AND NOT r.run_id {but_among}
                AND (e.state = '{QUEUED}' OR (e.state = '{RETRYING}' AND {_RETRIED}))
                AND (e.attempts > 0 OR r.expires_unix_ns IS NULL OR r.expires_unix_ns >= ?)
                ORDER BY r.due_unix_ns, r.seq LIMIT ?""",
            (*place, now, *values, *full_values, *but_values, now, now, limit),
        ).fetchall()
        for room, *row in rows:
            run = _record(tx, row)
            place = (run.due_unix_ns, run.seq)
            if run.lane is not None and taken[run.lane] >= room:
                full.add(run.lane)
                continue
            found.append(run)
            if run.lane is not None and not run.goes_on:  # what goes on has its place already
                taken[run.lane] += 1
        if len(rows) < limit or len(found) >= limit:
            return found[:limit]


def hopeless_runs(tx: Transaction, *, limit: int) -> list[RunRecord]:
    """Give runs of any task that wait and won't be run: they have expired, or somebody asked for them to be cancelled."""
    rows = tx.execute(
        f"""{_RUN} WHERE r.pending = 1 AND e.state IN ('{QUEUED}', '{RETRYING}', '{PAUSED}')
            AND ((e.attempts = 0 AND r.expires_unix_ns < ?)
                 OR EXISTS (SELECT 1 FROM cancellation c WHERE c.execution_id = r.execution_id)) LIMIT ?""",
        (tx.now_unix_ns(), limit),
    ).fetchall()
    return [_record(tx, row) for row in rows]


def ended_runs(tx: Transaction, *, limit: int) -> list[str]:
    """Give the execution ids of runs that have ended and still stand in the queue."""
    rows = tx.execute(
        f"""SELECT r.execution_id FROM run r JOIN execution e ON e.execution_id = r.execution_id
            WHERE r.pending = 1 AND e.state NOT IN ('{QUEUED}', '{RETRYING}', '{RUNNING}', '{PAUSED}')
            AND NOT EXISTS (SELECT 1 FROM attempt a WHERE a.execution_id = r.execution_id
                            AND a.outer_token IS NOT NULL AND a.outer_outcome IS NULL) LIMIT ?""",
        (limit,),
    ).fetchall()
    return [row[0] for row in rows]


def has_freed_its_key(state: str, classification: str | None) -> bool:
    """Tell whether a run in this state holds its key no longer."""
    return state in _FREES_ITS_KEY or (state == CANCELLED and classification == EXPIRED)
