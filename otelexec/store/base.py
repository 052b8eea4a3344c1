"""
The contract of a store.

A store commits a sequence of writes (`writes.py`) in one transaction and gives one result for each, so that many
executions share a commit; readers get records (`records.py`). Nothing here knows which database runs it, who waits for
the commit, or where a write goes when the database is away: those are `sqlite.py`, `group_commit.py` and `spool.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypeVar, Unpack

from otelexec.store.records import ExecutionRecord, OpenWork, Statistics, Wanted
from otelexec.store.rows import Cancellation, ProcessRow
from otelexec.store.schema import Transaction
from otelexec.store.writes import Write

Found = TypeVar("Found")


class Receipt:
    """
    Whether a transaction got through, for callers that a signal handler may stop between its commit and its return.

    Attributes:
        results: One result per write; they count once `committed` holds something.
        committed: Empty until the transaction is through; filled in the same instant.
    """

    __slots__ = ("committed", "results")

    def __init__(self) -> None:
        self.results: list[object] = []
        self.committed: list[object] = []


class Store(Protocol):
    """
    A durable execution log.

    Every method may be called from any thread. None of them keeps a transaction or a connection for itself while
    user code runs.
    """

    announce: Callable[[], Sequence[Write]]
    """Gives the writes (the process row) that go first in the first transaction of every new connection."""

    @property
    def url(self) -> str:
        """Give the store's URL without credentials."""
        ...

    @property
    def spool_folder(self) -> Path:
        """Give the folder for what could not be written here, unless a setting names another."""
        ...

    def commit(self, writes: Sequence[Write], *, durable: bool, timeout_seconds: float, receipt: Receipt | None = None) -> list[object]:
        """
        Commit all writes in one transaction, in order.

        Args:
            writes: What to write.
            durable: Whether the transaction must survive power loss; all of them survive the process.
            timeout_seconds: How long to wait for other writers; 0: not at all, not even for other threads.
            receipt: A new one to fill in; None: nobody asks. With one that is filled in, the transaction is not made
                again, but as durable as is asked; an error that leaves it filled in says: committed, not durably.

        Returns:
            One result per write; a write that the store refused by itself has a StoreRejected in its place, and the
            others are committed.

        Raises:
            StoreBusy: Other writers were at it all the time; nothing was committed.
            StoreUnavailable: Nothing was committed, and another try may succeed.
            StoreVersionError: The schema is newer than this library.
        """
        ...

    def check_writable(self, *, timeout_seconds: float) -> None:
        """
        Check that this process could write, without writing anything.

        Args:
            timeout_seconds: As for `commit`.

        Raises:
            StoreError: It could not; the message says why.
        """
        ...

    def read(self, query: Callable[[Transaction], Found]) -> Found:
        """Run queries (as those in `run_queries.py`) in one reading transaction, and give what they found."""
        ...

    def now_unix_ns(self) -> int:
        """Give the store's clock, which leases are counted on."""
        ...

    def up_since_unix_ns(self) -> int:
        """Give since when on its clock the store's server is known to be up, so that leases could be renewed; 0: always."""
        ...

    def executions(self, *, limit: int | None = None, before: int | None = None, **wanted: Unpack[Wanted]) -> Iterator[ExecutionRecord]:
        """Give executions, the newest first, in pages; `before` is the `seq` after which to go on."""
        ...

    def executions_of(self, known_as: str, *, limit: int) -> list[str]:
        """Give the ids of executions whose request, or whose message, has this id, the newest first."""
        ...

    def execution(self, execution_id: str) -> ExecutionRecord | None:
        """Give one execution; None when it is not there."""
        ...

    def ids_with_prefix(self, prefix: str, *, limit: int) -> list[str]:
        """Give the ids of executions that begin like this, in order."""
        ...

    def outbox_rows(self) -> int:
        """Give how many rows wait for a relay or are in the hands of one; parked ones don't count."""
        ...

    def processes(self) -> list[ProcessRow]:
        """Give the processes that have something open or hold a claim."""
        ...

    def open_work(self, process_ids: Sequence[str], *, limit: int) -> list[OpenWork]:
        """Give what these processes have open, attempts first."""
        ...

    def claim_owners(self) -> list[str]:
        """Give the process ids that hold claims on outbox rows."""
        ...

    def ingested(self, segment: str) -> int:
        """Give how far a spool segment has been taken in, in bytes."""
        ...

    def cancellations(self, execution_ids: Sequence[str]) -> dict[str, Cancellation]:
        """Give the wishes to cancel among these executions."""
        ...

    def held_requests(self, execution: ExecutionRecord) -> list[bytes]:
        """Give the encoded requests of this execution that are still in the outbox or parked."""
        ...

    def statistics(self) -> Statistics:
        """Give what `doctor` shows."""
        ...

    def close(self) -> None:
        """Close every connection; the store may be used again."""
        ...
