"""The statements of the queue in the store, once for every SQL store: see `runs.py`, and `sql.py` for what they may use."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from otelexec.store.runs import (
    AddTags,
    BatchRecord,
    CreateBatch,
    DueRun,
    Enqueued,
    EnqueueRun,
    ForgetRuns,
    HoldKey,
    PutPacket,
    RescheduleRun,
    ResetKey,
    RunKey,
    RunRecord,
    RunRow,
    SetRunMetadata,
    SetRunOutput,
)
from otelexec.store.schema import Transaction
from otelexec.store.writes import (
    CANCELLED,
    FAILED,
    LOST,
    PAUSED,
    QUEUED,
    RETRYING,
    RUNNING,
    SUCCEEDED,
    TIMED_OUT,
    ExecutionRow,
    OpenAttempt,
)

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
    {output}, e.state, e.attempts, e.started_unix_ns, e.ended_unix_ns, {attempt_output}, a.ended_unix_ns, a.classification, a.error_type,
    a.error_message, a.outer_token IS NOT NULL AND a.outer_outcome IS NULL"""


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

# A core may end before the code around it: until that has ended as well, the attempt goes on, and keeps its place.
_GOES_ON = f"(a.state = '{RUNNING}' OR (a.outer_token IS NOT NULL AND a.outer_outcome IS NULL))"
# The runs that have a place in a lane. Found from the attempts that are open: any number of runs may wait.
_AT_WORK = f"""at_work AS MATERIALIZED (
    SELECT o.lane, o.execution_id FROM attempt b JOIN execution x ON x.execution_id = b.execution_id
        JOIN run o ON o.execution_id = b.execution_id
    WHERE b.state = '{RUNNING}' AND x.state = '{RUNNING}' AND o.pending = 1 AND o.lane IS NOT NULL
    UNION SELECT o.lane, o.execution_id FROM attempt b JOIN run o ON o.execution_id = b.execution_id
    WHERE b.outer_token IS NOT NULL AND b.outer_outcome IS NULL AND o.pending = 1 AND o.lane IS NOT NULL)"""
_ROOM = "r.lane_limit - (SELECT COUNT(*) FROM at_work w WHERE w.lane = r.lane AND w.execution_id <> r.execution_id)"

_LAPSED = "p.heartbeat_unix_ns + CAST(p.lease_seconds * 1000000000 AS BIGINT) < ?"


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
    return None if run is None or _has_freed_its_key(run.state, run.classification) else run


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
    prefix = _item(batch_id)
    held = tx.execute("SELECT name, owner FROM run_key WHERE name >= ? AND name < ?", (prefix, prefix[:-1] + chr(ord("/") + 1))).fetchall()
    for name, owner in held:
        places.setdefault(int(name.removeprefix(prefix)), owner)
    return BatchRecord(row[0], row[1], row[2], row[3], tuple(places[place] for place in sorted(places)))


def _item(batch_id: str) -> str:
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
                AND {_LAPSED} AND r.task {task_among} AND NOT r.run_id {but_among} ORDER BY r.due_unix_ns, r.seq LIMIT ?""",
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
            f"""WITH {_AT_WORK} SELECT {_ROOM}, {_WHOLE} {_FROM}
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


# --- How it is written -------------------------------------------------------------------------------------------


def enqueue_run(tx: Transaction, write: EnqueueRun) -> Enqueued:
    """Make a run and its queued record, unless one of its keys has a run already."""
    run, now = write.run, tx.now_unix_ns()
    held = _take_keys(tx, write.keys, run.run_id)
    if held is not None:
        found = find_run(tx, held[0])
        if found is not None:
            if run.batch_id is not None:
                tx.execute(
                    "INSERT INTO run_key (name, owner, expires_unix_ns) VALUES (?, ?, ?) ON CONFLICT (name) DO NOTHING",
                    (f"{_item(run.batch_id)}{run.batch_index}", found.run_id, now + max(key.ttl_ns for key in write.keys)),
                )
            return Enqueued(found.run_id, found.execution_id, cached=not held[1], created=False)
        _hand_over(tx, write.keys, run.run_id)  # its run has been pruned
    if run.batch_id is not None:
        row = tx.execute(
            "SELECT run_id, execution_id FROM run WHERE batch_id = ? AND batch_index = ?", (run.batch_id, run.batch_index)
        ).fetchone()
        if row is not None:
            return Enqueued(row[0], row[1], cached=False, created=False)
    execution, carrier = _choose(tx, write.executions)
    tx.execute(
        f"""INSERT INTO execution (execution_id, name, state, request_id, source, correlation, parent_execution_id, queued_unix_ns)
            VALUES (?, ?, '{QUEUED}', ?, ?, ?, ?, ?)
            ON CONFLICT (execution_id) DO UPDATE SET correlation = excluded.correlation,
                queued_unix_ns = COALESCE(execution.queued_unix_ns, excluded.queued_unix_ns)""",
        (
            execution.execution_id,
            execution.name,
            execution.request_id,
            execution.source,
            execution.correlation,
            execution.parent_execution_id,
            now,
        ),
    )
    due = _due_unix_ns(run, now)
    tx.execute(
        """INSERT INTO run (run_id, execution_id, task, payload, payload_type, carrier, options, tags, metadata, lane, lane_limit,
                            max_attempts, max_seconds, created_unix_ns, updated_unix_ns, due_unix_ns, expires_unix_ns, batch_id,
                            batch_index, pending)
           VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 1)""",
        (
            run.run_id,
            execution.execution_id,
            run.task,
            run.payload,
            run.payload_type,
            carrier,
            run.options,
            run.tags,
            run.metadata,
            run.lane,
            run.lane_limit,
            run.max_attempts,
            run.max_seconds,
            now,
            now,
            due - run.priority_ns,
            None if run.ttl_ns is None else due + run.ttl_ns,
            run.batch_id,
            run.batch_index,
        ),
    )
    return Enqueued(run.run_id, execution.execution_id, cached=False, created=True)


def _due_unix_ns(write: RunRow | RescheduleRun, now: int) -> int:
    return now + write.delay_ns if write.not_before_unix_ns is None else max(now, write.not_before_unix_ns)


def _choose(tx: Transaction, executions: Sequence[tuple[ExecutionRow, str]]) -> tuple[ExecutionRow, str]:
    for execution, carrier in executions[:-1]:
        row = tx.execute(f"SELECT attempts, state FROM execution WHERE execution_id = ? {tx.lock}", (execution.execution_id,)).fetchone()
        if row is not None and (row[0] or row[1] != QUEUED):
            continue
        if tx.execute("SELECT 1 FROM run WHERE execution_id = ?", (execution.execution_id,)).fetchone() is None:
            return execution, carrier
    return executions[-1]


def _take_keys(tx: Transaction, keys: Sequence[RunKey], owner: str) -> tuple[str, bool] | None:
    """Take keys for a run or batch, or give what holds one of them already, and whether that key is an exact one."""
    now = tx.now_unix_ns()
    taken: list[str] = []
    for key in keys:
        made = tx.execute(
            "INSERT INTO run_key (name, owner, expires_unix_ns) VALUES (?, ?, ?) ON CONFLICT (name) DO NOTHING",
            (key.name, owner, now + key.ttl_ns),
        ).rowcount
        if made:
            taken.append(key.name)
            continue
        held = tx.execute(f"SELECT owner, expires_unix_ns FROM run_key WHERE name = ? {tx.lock}", (key.name,)).fetchone()
        if held is not None and held[1] > now and (key.exact or _holds(tx, held[0])):
            for name in taken:
                # The request is one that the same run answers from now on.
                tx.execute("UPDATE run_key SET owner = ? WHERE name = ?", (held[0], name))
            return held[0], key.exact
        _hand_over(tx, (key,), owner)
    return None


def _hand_over(tx: Transaction, keys: Sequence[RunKey], owner: str) -> None:
    for key in keys:
        expires = tx.now_unix_ns() + key.ttl_ns
        tx.execute("UPDATE run_key SET owner = ?, expires_unix_ns = ? WHERE name = ?", (owner, expires, key.name))


def _holds(tx: Transaction, owner: str) -> bool:
    """Tell whether a run still holds its key: one that failed has freed it, one that succeeded or was cancelled has not."""
    run = find_run(tx, owner)
    return run is None or not _has_freed_its_key(run.state, run.classification)


def _has_freed_its_key(state: str, classification: str | None) -> bool:
    return state in _FREES_ITS_KEY or (state == CANCELLED and classification == "expired")


def add_tags(tx: Transaction, write: AddTags) -> bool | None:
    """Add tags to a run; all of them or none."""
    row = tx.execute(f"SELECT tags FROM run WHERE run_id = ? {tx.lock}", (write.run_id,)).fetchone()
    if row is None:
        return None
    tags = list(dict.fromkeys((*json.loads(row[0]), *write.tags)))
    if len(tags) > write.limit:
        return False
    tx.execute("UPDATE run SET tags = ?, updated_unix_ns = ? WHERE run_id = ?", (json.dumps(tags), tx.now_unix_ns(), write.run_id))
    return True


def set_run_metadata(tx: Transaction, write: SetRunMetadata) -> bool | None:
    """Replace a run's metadata by compare-and-set."""
    row = tx.execute(f"SELECT metadata FROM run WHERE run_id = ? {tx.lock}", (write.run_id,)).fetchone()
    if row is None:
        return None
    if row[0] != write.expected:
        return False
    tx.execute("UPDATE run SET metadata = ?, updated_unix_ns = ? WHERE run_id = ?", (write.metadata, tx.now_unix_ns(), write.run_id))
    return True


def reschedule_run(tx: Transaction, write: RescheduleRun) -> bool | None:
    """Give a run that waits for its time another one; how long it may wait after that stays."""
    row = tx.execute(f"SELECT execution_id, due_unix_ns FROM run WHERE run_id = ? {tx.lock}", (write.run_id,)).fetchone()
    if row is None:
        return None
    now = tx.now_unix_ns()
    state = tx.execute(f"SELECT state FROM execution WHERE execution_id = ? {tx.lock}", (row[0],)).fetchone()
    if state is None or state[0] != QUEUED or row[1] <= now:
        return False
    due = _due_unix_ns(write, now)
    tx.execute(
        """UPDATE run SET due_unix_ns = ?, updated_unix_ns = ?, expires_unix_ns = expires_unix_ns + (? - due_unix_ns)
           WHERE run_id = ?""",
        (due, now, due, write.run_id),
    )
    return True


def set_run_output(tx: Transaction, write: SetRunOutput) -> None:
    """Keep a run's output."""
    tx.execute("UPDATE run SET output = ? WHERE execution_id = ?", (write.output, write.execution_id))


def forget_runs(tx: Transaction, write: ForgetRuns) -> None:
    """Take ended runs out of the queue."""
    for execution_id in write.execution_ids:
        tx.execute(
            f"""UPDATE run SET pending = 0 WHERE execution_id = ? AND pending = 1 AND EXISTS (
                SELECT 1 FROM execution e WHERE e.execution_id = run.execution_id
                AND e.state NOT IN ('{QUEUED}', '{RETRYING}', '{RUNNING}', '{PAUSED}'))""",
            (execution_id,),
        )


def reset_key(tx: Transaction, write: ResetKey) -> bool:
    """Free a key."""
    return bool(tx.execute("DELETE FROM run_key WHERE name = ?", (write.name,)).rowcount)


def create_batch(tx: Transaction, write: CreateBatch) -> tuple[str, bool]:
    """Announce a batch."""
    held = _take_keys(tx, write.keys, write.batch_id)
    if held is not None:
        if tx.execute("SELECT 1 FROM run_batch WHERE batch_id = ?", (held[0],)).fetchone() is not None:
            return held[0], not held[1]
        _hand_over(tx, write.keys, write.batch_id)  # its batch has been pruned
    tx.execute(
        "INSERT INTO run_batch (batch_id, run_count, carrier, created_unix_ns) VALUES (?, ?, ?, ?)",
        (write.batch_id, write.run_count, write.carrier, tx.now_unix_ns()),
    )
    return write.batch_id, False


def put_packet(tx: Transaction, write: PutPacket) -> None:
    """Keep what was uploaded."""
    tx.execute(
        """INSERT INTO run_packet (name, content, media_type, at_unix_ns) VALUES (?, ?, ?, ?)
           ON CONFLICT (name) DO UPDATE SET content = excluded.content, media_type = excluded.media_type""",
        (write.name, write.content, write.media_type, tx.now_unix_ns()),
    )


def hold_key(tx: Transaction, write: HoldKey) -> str:
    """Take a key that nobody holds, or whose time is over."""
    held = _take_keys(tx, (RunKey(write.name, write.ttl_ns, exact=True),), write.owner)
    return write.owner if held is None else held[0]


APPLY: Final[Mapping[type, Callable[[Transaction, Any], object]]] = {
    EnqueueRun: enqueue_run,
    AddTags: add_tags,
    SetRunMetadata: set_run_metadata,
    RescheduleRun: reschedule_run,
    SetRunOutput: set_run_output,
    ForgetRuns: forget_runs,
    ResetKey: reset_key,
    CreateBatch: create_batch,
    PutPacket: put_packet,
    HoldKey: hold_key,
}


# --- What the writes of attempts ask -----------------------------------------------------------------------------


def ensure_execution(tx: Transaction, execution: ExecutionRow) -> None:
    """Make the execution's row, without an attempt, if it is not there."""
    tx.execute(
        f"""INSERT INTO execution (execution_id, name, state, request_id, source, correlation, parent_execution_id)
            VALUES (?, ?, '{QUEUED}', ?, ?, ?, ?) ON CONFLICT (execution_id) DO NOTHING""",
        (
            execution.execution_id,
            execution.name,
            execution.request_id,
            execution.source,
            execution.correlation,
            execution.parent_execution_id,
        ),
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
    lapsed = f"AND NOT ({_LAPSED})" if write.takes_lapsed else ""
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
    if tx.lock:
        # Held until the commit, so that two that open runs of one lane count one after the other.
        tx.execute("INSERT INTO run_lane (lane) VALUES (?) ON CONFLICT (lane) DO NOTHING", (lane,))
        tx.execute(f"SELECT 1 FROM run_lane WHERE lane = ? {tx.lock}", (lane,))
    row = tx.execute(f"WITH {_AT_WORK} SELECT COUNT(*) FROM at_work WHERE lane = ? AND execution_id <> ?", (lane, but)).fetchone()
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
