"""What is written to look after a store: by the relay about the outbox, by the reconciler, and by who prunes it; see `writes.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ClaimOutbox:
    """
    Claim the oldest unclaimed outbox rows. Gives a list of `OutboxRow`.

    Attributes:
        owner: Process id of the relay.
        lease_seconds: How long the claim holds, on the store's clock.
        max_rows: At most so many rows.
        max_bytes: At most so many bytes, but always one row.
        not_after: Only rows with an id up to this one; None means all.
    """

    owner: str
    lease_seconds: float
    max_rows: int = 512
    max_bytes: int = 4 * 1024 * 1024
    not_after: int | None = None


@dataclass(frozen=True, slots=True)
class OutboxRow:
    """
    Encoded spans waiting for the relay.

    Attributes:
        id: Rises with time.
        request: Encoded OTLP request; requests concatenate into one valid request.
        count: How many spans it holds.
        failures: How often a request with it was answered with a failure.
    """

    id: int
    request: bytes
    count: int
    failures: int = 0


@dataclass(frozen=True, slots=True)
class SettleOutbox:
    """
    Say what became of claimed rows. Gives None.

    Attributes:
        owner: The relay that holds the claim.
        delivered: Ids to delete.
        released: Ids that go back, unchanged.
        failed: Ids that go back with one more failure counted.
        parked: (id, reason) of rows that are kept, but not sent again by themselves.
        reduced: (id, request, count) of rows, among those not delivered, that keep only some of their spans: the others were delivered.
    """

    owner: str
    delivered: Sequence[int] = ()
    released: Sequence[int] = ()
    failed: Sequence[int] = ()
    parked: Sequence[tuple[int, str]] = ()
    reduced: Sequence[tuple[int, bytes, int]] = ()


@dataclass(frozen=True, slots=True)
class ReleaseClaims:
    """Release every claim of relays that are dead. Gives how many rows that freed."""

    owners: Sequence[str]


@dataclass(frozen=True, slots=True)
class RetryParked:
    """
    Let parked rows go out again, the oldest first. Gives how many.

    Attributes:
        upto: Only rows with this id or a smaller one: those that are parked anew meanwhile have greater ones. None: any.
        limit: At most so many: others wait no longer than that takes.
    """

    upto: int | None = None
    limit: int = 500


@dataclass(frozen=True, slots=True)
class DiscardParked:
    """
    Delete parked rows, the oldest first. Gives how many.

    Attributes:
        upto: Only rows with this id or a smaller one. None: any.
        limit: At most so many: others wait no longer than that takes.
    """

    upto: int | None = None
    limit: int = 500


@dataclass(frozen=True, slots=True)
class ForgetNonces:
    """
    Forget nonces of writes that nobody repeats any more. Gives how many.

    Attributes:
        before: Nonces that sort before this text; they sort by time.
        limit: At most so many: others wait no longer than that takes.
    """

    before: str
    limit: int = 5_000


@dataclass(frozen=True, slots=True)
class Prune:
    """
    Look at some rows of a table, in the order of its key, and delete what is old and needed by nobody. Gives `Pruned`.

    What it costs depends on how many rows it looks at, and not on how many there are; see `pruning.deletions`.

    Attributes:
        before_unix_ns: Only what ended, expired or gave its last sign of life before this.
        table: One of `pruning.TABLES`.
        after: Only rows behind this key; None: from the first one on.
        limit: At how many rows to look.
    """

    before_unix_ns: int
    table: str = "execution"
    after: int | str | None = None
    limit: int = 500


@dataclass(frozen=True, slots=True)
class Pruned:
    """
    What a `Prune` did.

    Attributes:
        deleted: How many rows of the table it deleted, beside what belongs to them.
        last: The last key that it looked at; None when there is nothing behind it that is old enough.
    """

    deleted: int
    last: int | str | None
