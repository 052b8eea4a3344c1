"""The writes of the queue in the store, once for every SQL store: see `runs.py`, and `sql.py` for what they may use."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from otelexec.store.rows import PAUSED, QUEUED, RETRYING, RUNNING, ExecutionRow
from otelexec.store.run_queries import find_run, has_freed_its_key, item_prefix
from otelexec.store.runs import (
    AddTags,
    CreateBatch,
    Enqueued,
    EnqueueRun,
    ForgetRuns,
    HoldKey,
    PutPacket,
    RescheduleRun,
    ResetKey,
    RunKey,
    RunRow,
    SetRunMetadata,
    SetRunOutput,
)
from otelexec.store.schema import Transaction


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
                    (f"{item_prefix(run.batch_id)}{run.batch_index}", found.run_id, now + max(key.ttl_ns for key in write.keys)),
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
        (*execution.values, now),
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
    return run is None or not has_freed_its_key(run.state, run.classification)


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
