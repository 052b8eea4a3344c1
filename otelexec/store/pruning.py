"""
Deleting what is old: executions that ended, and what outlived them.

One step looks at a bounded number of rows, and goes on where the one before stopped. So none holds a lock for longer than
that takes, however large the store is and however little of it may be deleted. No index on the time is needed, which
every close would have to keep: keys of executions rise with time, and the other tables are gone through as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from otelexec.store.outbox_statements import chunks
from otelexec.store.schema import Transaction
from otelexec.store.upkeep import Prune, Pruned

_PROCESS_IS_IDLE: Final = """heartbeat_unix_ns < ?
    AND NOT EXISTS (SELECT 1 FROM attempt a WHERE a.process_id = process.process_id AND a.state = 'running')
    AND NOT EXISTS (SELECT 1 FROM attempt a WHERE a.process_id = process.process_id
                    AND a.outer_token IS NOT NULL AND a.outer_outcome IS NULL)
    AND NOT EXISTS (SELECT 1 FROM open_span s WHERE s.process_id = process.process_id)
    AND process_id NOT IN (SELECT owner FROM claim)"""
_LANE_IS_EMPTY: Final = "NOT EXISTS (SELECT 1 FROM run r WHERE r.lane = run_lane.lane AND r.pending = 1)"
_BATCH_IS_EMPTY: Final = "created_unix_ns < ? AND NOT EXISTS (SELECT 1 FROM run r WHERE r.batch_id = run_batch.batch_id)"

# By table: its key, and what makes a row old. Executions first, since others may go only once these are gone.
_TABLES: Final[Mapping[str, tuple[str, str]]] = {
    "execution": ("seq", ""),
    "process": ("process_id", _PROCESS_IS_IDLE),
    "run_batch": ("batch_id", _BATCH_IS_EMPTY),
    "run_lane": ("lane", _LANE_IS_EMPTY),
    "run_key": ("name", "expires_unix_ns < ?"),
    "run_packet": ("name", "at_unix_ns < ?"),
    "ingested": ("segment", "at_unix_ns < ?"),
}
TABLES: Final = tuple(_TABLES)
"""What is pruned, in this order."""


def deletions(commit: Callable[[Prune], Pruned], before_unix_ns: int) -> Iterator[tuple[str, int]]:
    """
    Delete everything that is old, step by step.

    Args:
        commit: Commits one step and gives its result.
        before_unix_ns: What ended before this is old, by the store's clock.

    Yields:
        The table of a step, and how many of its rows that deleted.
    """
    for table in TABLES:
        after: int | str | None = None
        while True:
            done = commit(Prune(before_unix_ns, table, after))
            yield table, done.deleted
            after = done.last
            if after is None:
                break


def prune(tx: Transaction, write: Prune) -> Pruned:
    """Delete what is old of a bounded number of rows."""
    key, is_old = _TABLES[write.table]
    after = write.after if write.after is not None else -1 if key == "seq" else ""
    if write.table == "execution":
        return _executions(tx, write, after)
    step = f"SELECT {key} FROM {write.table} WHERE {key} > ? ORDER BY {key} LIMIT ?"
    [last] = tx.execute(f"SELECT MAX({key}) FROM ({step}) AS step", (after, write.limit)).fetchone()
    if last is None:
        return Pruned(0, None)
    deleted = tx.execute(
        f"DELETE FROM {write.table} WHERE {key} > ? AND {key} <= ? AND {is_old}", (after, last, *[write.before_unix_ns] * is_old.count("?"))
    ).rowcount
    return Pruned(deleted, last)


def _executions(tx: Transaction, write: Prune, after: int | str) -> Pruned:
    """Delete old ended executions; what is undelivered, parked or open keeps its execution."""
    last, began = tx.execute(
        """SELECT MAX(seq), MIN(COALESCE(queued_unix_ns, started_unix_ns, 0)) FROM
           (SELECT seq, queued_unix_ns, started_unix_ns FROM execution WHERE seq > ? ORDER BY seq LIMIT ?) AS step""",
        (after, write.limit),
    ).fetchone()
    # Behind rows that all began later there are only such; but for a few of clocks and spools that are far behind,
    # which the next prune finds.
    if last is None or began >= write.before_unix_ns:
        return Pruned(0, None)
    rows = tx.execute(
        f"""SELECT o.execution_id FROM execution o WHERE o.seq > ? AND o.seq <= ? AND o.ended_unix_ns < ?
            AND NOT EXISTS (SELECT 1 FROM attempt a WHERE a.execution_id = o.execution_id
                            AND (a.state = 'running' OR (a.outer_token IS NOT NULL AND a.outer_outcome IS NULL)))
            AND NOT EXISTS (SELECT 1 FROM outbox w WHERE w.execution_id = o.execution_id)
            AND o.execution_id NOT IN (SELECT execution_id FROM parked WHERE execution_id IS NOT NULL)
            ORDER BY o.seq {tx.skip_locked}""",
        (after, last, write.before_unix_ns),
    ).fetchall()
    for among, ids in chunks(tx, [row[0] for row in rows]):
        tx.execute(f"DELETE FROM cancellation WHERE execution_id IN (SELECT token FROM attempt WHERE execution_id {among})", ids)
        for table in ("attempt", "cancellation", "contribution", "run", "execution"):
            tx.execute(f"DELETE FROM {table} WHERE execution_id {among}", ids)
    return Pruned(len(rows), last)


APPLY: Final[Mapping[type, Callable[[Transaction, Any], object]]] = {Prune: prune}
