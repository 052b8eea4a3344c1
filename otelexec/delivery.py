"""
What an answer does to the rows of its request.

    accepted                      deleted; with `rejected_spans` above 0 parked, since OTLP forbids to send them again
    400, 413, 422                 bisected until the poisoned row is alone, and then its spans; where some are refused, the row is parked
    500 and the like, cut off     kept and tried again with backoff; see below
    429, Retry-After, no contact  kept and tried again with backoff, or when the endpoint says
    401, 403, 404 and the like    kept and tried again slowly: the configuration is wrong, not the rows

A row may also break the endpoint each time it gets there (500, or the connection is cut). It must block nothing, but an
outage must not park good rows. So every such failure is counted in the row. From the third on the row is a suspect:
rows without that mark go first, suspects follow in ever smaller requests, those with the fewest failures first. Only a
row that failed three times and then three times alone, with others delivered in between, is parked; more often alone,
where other rows have failed alone and were accepted later.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from otelexec.decoded import halves
from otelexec.store.upkeep import SettleOutbox
from otelexec.transport import Reply, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from otelexec.store.upkeep import OutboxRow
    from otelexec.transport import Transport

logger = logging.getLogger("otelexec.relay")

SUSPECT: Final = 3
_PATIENCE: Final = 3
_MOST_PATIENCE: Final = 24
_MAX_NOTES: Final = 4_096
_MAX_MESSAGES: Final = 64
_MAX_REFUSALS: Final = 32  # of parts of one row, whose division must end within its claim though each answer takes a second


@dataclass(slots=True)
class Tally:
    """
    What became of the rows of one claim.

    Attributes:
        spans: How many were delivered.
        rows: How many rows these were.
        parked: How many rows were set aside.
        accepted: Whether any request was accepted.
        ended_by: The answer after which nothing else was tried; None when everything was.
    """

    spans: int = 0
    rows: int = 0
    parked: int = 0
    accepted: bool = False
    ended_by: Reply | None = None


@dataclass(slots=True)
class _Suspicion:
    """What this process saw of a row's failures: deliveries before the first one, and how often the row was alone."""

    deliveries: int
    alone: int = 0


class Delivery:
    """
    Send claimed rows, and settle each as soon as its answer is there.

    Args:
        transport: Sends the requests.
        settle: Writes what became of rows; never raises because of the store.
        owner: Who holds the claims.
        shown: The endpoint's name for the log.
    """

    def __init__(self, transport: Transport, settle: Callable[[SettleOutbox], None], owner: str, shown: str) -> None:
        self._transport = transport
        self._settle = settle
        self._owner = owner
        self._shown = shown
        self._queue: deque[Sequence[OutboxRow]] = deque()
        self._tally = Tally()
        self._deliveries = 0
        self._suspicions: dict[int, _Suspicion] = {}
        self._patience = _PATIENCE
        self._messages: set[str] = set()
        self._ended: Callable[[], bool] = bool

    def deliver(self, rows: Sequence[OutboxRow], ended: Callable[[], bool]) -> Tally:
        """
        Send rows in as few requests as their past allows.

        Args:
            rows: The rows of one claim; all of them are settled when this returns.
            ended: Asked before each request; when true the rows left are given back.
        """
        self._tally = tally = Tally()
        self._ended = ended
        self._queue = queue = deque(_groups(rows))
        try:
            while queue and tally.ended_by is None and not ended():
                group = queue[0]
                self._take(self._transport.send(group[0].request if len(group) == 1 else b"".join(row.request for row in group)))
        finally:
            # Also after a defect of ours; what is settled is out of the queue.
            left = [row.id for group in queue for row in group]
            if left:
                self._settle(SettleOutbox(self._owner, released=left))
        return tally

    def _take(self, reply: Reply) -> None:
        """Do to the foremost group what its answer says."""
        if reply.verdict is Verdict.ACCEPTED:
            self._accept(reply)
        elif reply.verdict is Verdict.REFUSED:
            if len(self._queue[0]) > 1:
                self._split()
            else:
                self._divide(reply)
        elif reply.verdict is not Verdict.FAILED:
            self._tally.ended_by = reply
        elif not self._suspect(reply):
            self._settle(SettleOutbox(self._owner, failed=[row.id for row in self._queue.popleft()]))
            self._tally.ended_by = reply

    def _accept(self, reply: Reply) -> None:
        group, tally = self._queue[0], self._tally
        ids = [row.id for row in group]
        note = self._suspicions.get(ids[0])
        if len(ids) == 1 and note is not None and note.alone:
            # It failed alone, and now it is accepted: so this endpoint's failures are not about content.
            self._patience = min(2 * self._patience, _MOST_PATIENCE)
        tally.accepted = True
        if reply.rejected_spans > 0:
            reason = f"{reply.rejected_spans} of {sum(row.count for row in group)} spans rejected: {reply.reason or 'no message'}"
            self._settle(SettleOutbox(self._owner, parked=[(row_id, reason) for row_id in ids]))
            tally.parked += len(ids)
            logger.warning("otelexec.relay.parked: %d rows are set aside, and are not sent again by themselves: %s", len(ids), reason)
        else:
            self._settle(SettleOutbox(self._owner, delivered=ids))
            tally.rows += len(ids)
            tally.spans += sum(row.count for row in group)
            self._deliveries += 1
            if reply.reason and reply.reason not in self._messages and len(self._messages) < _MAX_MESSAGES:
                self._messages.add(reply.reason)
                logger.warning("otelexec.relay.message: %s accepts the spans and says: %s", self._shown, reply.reason)
        self._queue.popleft()
        for row_id in ids:
            self._suspicions.pop(row_id, None)

    def _split(self) -> None:
        """Have the foremost group sent in halves."""
        group = self._queue.popleft()
        middle = len(group) // 2
        self._queue.extendleft((group[middle:], group[:middle]))

    def _divide(self, refusal: Reply) -> None:
        """
        Send the spans of a row that is refused as a whole in ever smaller requests; it keeps those that were not accepted.

        An execution's own span is not to be kept back because one of its children is refused, or because all of them
        together are larger than what the endpoint takes.
        """
        [row] = self._queue[0]
        left, refused = deque(halves(row.request)), list[tuple[bytes, int]]()
        if not left:
            self._park(row, refusal.reason)
            return
        answer = self._send_parts(left, refused) or refusal
        rest = [*refused, *left]
        if not rest:
            self._accept(Reply(Verdict.ACCEPTED))
            return
        kept = replace(row, request=b"".join(request for request, _ in rest), count=sum(count for _, count in rest))
        if kept.count < row.count:
            self._settle(SettleOutbox(self._owner, reduced=[(kept.id, kept.request, kept.count)]))
            self._tally.spans += row.count - kept.count
            self._queue[0] = [kept]
            self._suspicions.pop(row.id, None)
        if not left:
            self._park(kept, f"{kept.count} of {row.count} spans refused: {answer.reason}")
        elif answer.verdict not in (Verdict.ACCEPTED, Verdict.REFUSED):
            self._take(answer)

    def _send_parts(self, left: deque[tuple[bytes, int]], refused: list[tuple[bytes, int]]) -> Reply | None:
        """
        Send parts of a row, and halves of those that are refused, the larger ones first.

        Args:
            left: The parts, each with the number of its spans; what was not answered stays in it.
            refused: Takes those that are set aside.

        Returns:
            The last answer that was not to accept all; None where each was.
        """
        refusals, last = 0, None
        while left and not self._ended():
            request, count = left[0]
            answer = self._transport.send(request)
            refused_whole = answer.verdict is Verdict.REFUSED
            if not refused_whole and answer.verdict is not Verdict.ACCEPTED:
                return answer
            left.popleft()
            self._tally.accepted |= not refused_whole
            refusals += refused_whole
            smaller = halves(request) if refused_whole and refusals < _MAX_REFUSALS else ()
            left.extend(smaller)
            if refused_whole or answer.rejected_spans:
                last = answer
                if not smaller:
                    refused.append((request, count))
        return last

    def _park(self, row: OutboxRow, reason: str) -> None:
        """Set the foremost row aside."""
        self._settle(SettleOutbox(self._owner, parked=[(row.id, reason)]))
        self._queue.popleft()
        self._tally.parked += 1
        self._suspicions.pop(row.id, None)
        text = "otelexec.relay.parked: a row of %d spans is set aside, and is not sent again by itself: %s"
        logger.error(text, row.count, reason)

    def _suspect(self, reply: Reply) -> bool:
        """Take a failure of the foremost group into account; tell whether the round goes on."""
        group, got_through = self._queue[0], self._tally.rows > 0
        if len(self._suspicions) + len(group) > _MAX_NOTES:
            self._suspicions.clear()
        notes = [self._suspicions.setdefault(row.id, _Suspicion(self._deliveries)) for row in group]
        if min(row.failures for row in group) < SUSPECT:
            return False
        if len(group) > 1:
            if got_through:
                self._split()
            return got_through
        [note] = notes
        note.alone += 1
        if note.alone >= self._patience and self._deliveries > note.deliveries:
            self._park(group[0], reply.reason)
            return True
        if got_through and note.alone < self._patience and len(self._queue) > 1:
            self._queue.rotate(-1)  # again after the others, which may get through in between
            return True
        return False


def _groups(rows: Sequence[OutboxRow]) -> Iterator[Sequence[OutboxRow]]:
    """Give the requests to try: all rows without suspicion, then suspects, the more failures the smaller."""
    clean = [row for row in rows if row.failures < SUSPECT]
    if clean:
        yield clean
    suspects = sorted((row for row in rows if row.failures >= SUSPECT), key=lambda row: (row.failures, row.id))
    at = 0
    while at < len(suspects):
        halvings = min(suspects[at].failures - SUSPECT + 1, 10)
        size = max(1, len(suspects) >> halvings)
        yield suspects[at : at + size]
        at += size
