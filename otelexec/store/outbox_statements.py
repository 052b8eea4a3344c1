"""The statements of the outbox; as in `sql.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from otelexec.store.schema import Transaction
from otelexec.store.upkeep import ClaimOutbox, DiscardParked, ForgetNonces, OutboxRow, ReleaseClaims, RetryParked, SettleOutbox

MAX_PARAMETERS: Final = 512  # with the others of a statement still below 999, SQLite's limit before 3.32


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
    for among, ids in chunks(tx, wanted):
        mine = tx.execute(
            f"""INSERT INTO claim (id, owner, until_unix_ns) SELECT id, ?, ? FROM outbox WHERE id {among}
                ON CONFLICT (id) DO UPDATE SET owner = excluded.owner, until_unix_ns = excluded.until_unix_ns
                WHERE claim.until_unix_ns < ? RETURNING id""",
            (write.owner, until, *ids, now),
        ).fetchall()
        for which, taken in chunks(tx, [row[0] for row in mine]):
            rows = tx.execute(f"SELECT id, request, count, failures FROM outbox WHERE id {which} ORDER BY id", taken).fetchall()
            claimed += [OutboxRow(row[0], bytes(row[1]), row[2], row[3]) for row in rows]
    return claimed


def settle_outbox(tx: Transaction, write: SettleOutbox) -> None:
    """Delete what was accepted, give back what was not, set aside what never will be."""
    for row_id, request, count in write.reduced:
        tx.execute("UPDATE outbox SET request = ?, count = ? WHERE id = ?", (request, count, row_id))
    for row_id, reason in write.parked:
        tx.execute(
            """INSERT INTO parked (id, request, count, execution_id, reason, parked_unix_ns)
               SELECT id, request, count, execution_id, ?, ? FROM outbox WHERE id = ?""",
            (reason, tx.now_unix_ns(), row_id),
        )
    gone = (*write.delivered, *(row_id for row_id, _ in write.parked))
    for among, ids in chunks(tx, gone):
        tx.execute(f"DELETE FROM outbox WHERE id {among}", ids)
    for among, ids in chunks(tx, write.failed):
        tx.execute(f"UPDATE outbox SET failures = failures + 1 WHERE id {among}", ids)
    for among, ids in chunks(tx, (*gone, *write.released, *write.failed)):
        tx.execute(f"DELETE FROM claim WHERE owner = ? AND id {among}", (write.owner, *ids))


def chunks(tx: Transaction, ids: Sequence[Any]) -> Iterator[tuple[str, Sequence[Any]]]:
    """Give ids in lists that one statement can take, each as the end of a condition with its parameters."""
    for start in range(0, len(ids), MAX_PARAMETERS):
        yield tx.among(ids[start : start + MAX_PARAMETERS])


def release_claims(tx: Transaction, write: ReleaseClaims) -> int:
    """Free what dead relays had in hand."""
    return sum(tx.execute("DELETE FROM claim WHERE owner = ?", (owner,)).rowcount for owner in write.owners)


def last_parked(tx: Transaction) -> int | None:
    """Give the greatest id of a parked row; None where none is parked."""
    [last] = tx.execute("SELECT MAX(id) FROM parked").fetchone()
    return None if last is None else int(last)


def retry_parked(tx: Transaction, write: RetryParked) -> int:
    """Put some parked rows back at the end of the outbox."""
    found = _oldest_parked(tx, write)
    for among, ids in chunks(tx, found):
        tx.execute(
            f"""INSERT INTO outbox (request, count, execution_id, written_unix_ns)
                SELECT request, count, execution_id, ? FROM parked WHERE id {among} ORDER BY id""",
            (tx.now_unix_ns(), *ids),
        )
        tx.execute(f"DELETE FROM parked WHERE id {among}", ids)
    return len(found)


def discard_parked(tx: Transaction, write: DiscardParked) -> int:
    """Delete some parked rows."""
    found = _oldest_parked(tx, write)
    for among, ids in chunks(tx, found):
        tx.execute(f"DELETE FROM parked WHERE id {among}", ids)
    return len(found)


def _oldest_parked(tx: Transaction, write: RetryParked | DiscardParked) -> list[int]:
    """Give the ids of some parked rows; of two that ask at once, each gets what the other has not."""
    rows = tx.execute(
        f"SELECT o.id FROM parked o WHERE o.id <= ? ORDER BY o.id LIMIT ? {tx.skip_locked}",
        (write.upto if write.upto is not None else 2**62, write.limit),
    ).fetchall()
    return [row[0] for row in rows]


def forget_nonces(tx: Transaction, write: ForgetNonces) -> int:
    """Forget some of what nobody repeats any more."""
    step = "SELECT nonce FROM written WHERE nonce < ? ORDER BY nonce LIMIT ?"
    [last] = tx.execute(f"SELECT MAX(nonce) FROM ({step}) AS step", (write.before, write.limit)).fetchone()
    return 0 if last is None else tx.execute("DELETE FROM written WHERE nonce <= ?", (last,)).rowcount


APPLY: dict[type, Callable[[Transaction, Any], object]] = {
    ClaimOutbox: claim_outbox,
    SettleOutbox: settle_outbox,
    ReleaseClaims: release_claims,
    RetryParked: retry_parked,
    DiscardParked: discard_parked,
    ForgetNonces: forget_nonces,
}
