"""The statements of the outbox, and those that delete what nobody needs any more; as in `sql.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from otelexec.store.schema import Transaction
from otelexec.store.writes import ClaimOutbox, ForgetNonces, OutboxRow, Prune, ReleaseClaims, RetryParked, SettleOutbox

_MAX_PARAMETERS = 512  # with the others of a statement still below 999, SQLite's limit before 3.32


def add_row(tx: Transaction, request: bytes, count: int, execution_id: str | None) -> None:
    """Add spans that wait for a relay."""
    tx.execute(
        "INSERT INTO outbox (request, count, execution_id, written_unix_ns) VALUES (?, ?, ?, ?)",
        (request, count, execution_id, tx.now_unix_ns()),
    )


def claim_outbox(tx: Transaction, write: ClaimOutbox) -> list[OutboxRow]:
    """Claim the oldest rows that nobody has in hand; of two that claim one row at once, the second goes without."""
    now = tx.now_unix_ns()
    found = tx.execute(
        f"""SELECT o.id, LENGTH(o.request) FROM outbox o LEFT JOIN claim c ON c.id = o.id
            WHERE (c.id IS NULL OR c.until_unix_ns < ?) AND o.id <= ? ORDER BY o.id LIMIT ? {tx.skip_locked}""",
        (now, write.not_after if write.not_after is not None else 2**62, write.max_rows),
    ).fetchall()
    wanted: list[int] = []
    size = 0
    for row_id, length in found:
        size += length
        if wanted and size > write.max_bytes:
            break
        wanted.append(row_id)
    until = now + int(write.lease_seconds * 1e9)
    claimed: list[OutboxRow] = []
    for among, ids in _chunks(tx, wanted):
        mine = tx.execute(
            f"""INSERT INTO claim (id, owner, until_unix_ns) SELECT id, ?, ? FROM outbox WHERE id {among}
                ON CONFLICT (id) DO UPDATE SET owner = excluded.owner, until_unix_ns = excluded.until_unix_ns
                WHERE claim.until_unix_ns < ? RETURNING id""",
            (write.owner, until, *ids, now),
        ).fetchall()
        for which, taken in _chunks(tx, [row[0] for row in mine]):
            rows = tx.execute(f"SELECT id, request, count, failures FROM outbox WHERE id {which} ORDER BY id", taken).fetchall()
            claimed += [OutboxRow(row[0], bytes(row[1]), row[2], row[3]) for row in rows]
    return claimed


def settle_outbox(tx: Transaction, write: SettleOutbox) -> None:
    """Delete what was accepted, give back what was not, set aside what never will be."""
    for row_id, reason in write.parked:
        tx.execute(
            """INSERT INTO parked (id, request, count, execution_id, reason, parked_unix_ns)
               SELECT id, request, count, execution_id, ?, ? FROM outbox WHERE id = ?""",
            (reason, tx.now_unix_ns(), row_id),
        )
    gone = (*write.delivered, *(row_id for row_id, _ in write.parked))
    for among, ids in _chunks(tx, gone):
        tx.execute(f"DELETE FROM outbox WHERE id {among}", ids)
    for among, ids in _chunks(tx, write.failed):
        tx.execute(f"UPDATE outbox SET failures = failures + 1 WHERE id {among}", ids)
    for among, ids in _chunks(tx, (*gone, *write.released, *write.failed)):
        tx.execute(f"DELETE FROM claim WHERE owner = ? AND id {among}", (write.owner, *ids))


def _chunks(tx: Transaction, ids: Sequence[Any]) -> Iterator[tuple[str, Sequence[Any]]]:
    """Give ids in lists that one statement can take, each as the end of a condition with its parameters."""
    for start in range(0, len(ids), _MAX_PARAMETERS):
        yield tx.among(ids[start : start + _MAX_PARAMETERS])


def release_claims(tx: Transaction, write: ReleaseClaims) -> int:
    """Free what dead relays had in hand."""
    return sum(tx.execute("DELETE FROM claim WHERE owner = ?", (owner,)).rowcount for owner in write.owners)


def retry_parked(tx: Transaction, _: RetryParked) -> int:
    """Put parked rows back at the end of the outbox; of two that do so at once, each takes what the other has not."""
    moved = 0
    while True:
        rows = tx.execute(
            "DELETE FROM parked WHERE id IN (SELECT id FROM parked ORDER BY id LIMIT ?) RETURNING id, request, count, execution_id",
            (_MAX_PARAMETERS,),
        ).fetchall()
        if not rows:
            return moved
        for _id, request, count, execution_id in sorted(rows, key=lambda row: row[0]):
            add_row(tx, bytes(request), count, execution_id)
        moved += len(rows)


def forget_nonces(tx: Transaction, write: ForgetNonces) -> None:
    """Forget what nobody repeats any more."""
    tx.execute("DELETE FROM written WHERE nonce < ?", (write.before,))


def prune(tx: Transaction, write: Prune) -> int:
    """Delete a batch of old ended executions; what is undelivered, parked or open keeps its execution."""
    rows = tx.execute(
        f"""SELECT o.execution_id FROM execution o WHERE o.ended_unix_ns < ?
            AND NOT EXISTS (SELECT 1 FROM attempt a WHERE a.execution_id = o.execution_id
                            AND (a.state = 'running' OR (a.outer_token IS NOT NULL AND a.outer_outcome IS NULL)))
            AND NOT EXISTS (SELECT 1 FROM outbox w WHERE w.execution_id = o.execution_id)
            AND NOT EXISTS (SELECT 1 FROM parked w WHERE w.execution_id = o.execution_id)
            ORDER BY o.ended_unix_ns LIMIT ? {tx.skip_locked}""",
        (write.ended_before_unix_ns, write.limit),
    ).fetchall()
    for among, ids in _chunks(tx, [row[0] for row in rows]):
        tx.execute(f"DELETE FROM cancellation WHERE execution_id IN (SELECT token FROM attempt WHERE execution_id {among})", ids)
        for table in ("attempt", "cancellation", "contribution", "run", "execution"):
            tx.execute(f"DELETE FROM {table} WHERE execution_id {among}", ids)
    tx.execute(
        """DELETE FROM process WHERE heartbeat_unix_ns < ?
           AND NOT EXISTS (SELECT 1 FROM attempt a WHERE a.process_id = process.process_id AND a.state = 'running')
           AND NOT EXISTS (SELECT 1 FROM attempt a WHERE a.process_id = process.process_id
                           AND a.outer_token IS NOT NULL AND a.outer_outcome IS NULL)
           AND NOT EXISTS (SELECT 1 FROM open_span s WHERE s.process_id = process.process_id)
           AND NOT EXISTS (SELECT 1 FROM claim c WHERE c.owner = process.process_id)""",
        (write.ended_before_unix_ns,),
    )
    tx.execute("DELETE FROM ingested WHERE at_unix_ns < ?", (write.ended_before_unix_ns,))
    tx.execute("DELETE FROM run_packet WHERE at_unix_ns < ?", (write.ended_before_unix_ns,))
    tx.execute("DELETE FROM run_key WHERE expires_unix_ns < ?", (write.ended_before_unix_ns,))
    tx.execute(
        """DELETE FROM run_batch WHERE created_unix_ns < ?
           AND NOT EXISTS (SELECT 1 FROM run r WHERE r.batch_id = run_batch.batch_id)""",
        (write.ended_before_unix_ns,),
    )
    return len(rows)


APPLY: dict[type, Callable[[Transaction, Any], object]] = {
    ClaimOutbox: claim_outbox,
    SettleOutbox: settle_outbox,
    ReleaseClaims: release_claims,
    RetryParked: retry_parked,
    ForgetNonces: forget_nonces,
    Prune: prune,
}
