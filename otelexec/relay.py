"""
The relay: rows of the outbox -> the OTLP endpoint, at least once, oldest first, and deleted only when accepted.

A request is the concatenation of rows' bytes, which are never decoded or changed, so that a receiver sees one byte
string for one span id. What an answer does to the rows of its request:

    accepted                      deleted; with `rejected_spans` above 0 parked, since OTLP forbids to send them again
    400, 413, 422                 bisected until the poisoned row is alone; it is parked, the others are delivered
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

import contextlib
import logging
import random
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from otelexec import endpoint as endpoints
from otelexec.errors import StoreError, StoreRejected
from otelexec.store.base import ClaimOutbox, ReleaseClaims, SettleOutbox
from otelexec.transport import Verdict, connect

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from opentelemetry.sdk.trace.export import SpanExporter

    from otelexec.settings import Settings
    from otelexec.store.base import OutboxRow, Write
    from otelexec.transport import Reply

logger = logging.getLogger("otelexec.relay")

MAX_ROWS: Final = 512
MAX_BYTES: Final = 4 * 1024 * 1024  # also the largest message that a gRPC server takes by default
# How long a claim outlives a relay that died on another host. It covers at least two requests at their longest
# timeout; the relay gives back what it could not start in time.
LEASE_SECONDS: Final = 60.0
SUSPECT: Final = 3
_FIRST_PAUSE: Final = 0.5
_LONGEST_PAUSE: Final = 8.0
_DENIED_PAUSE: Final = 30.0
_LONGEST_ASKED: Final = 3_600.0  # a Retry-After beyond it is a mistake of the endpoint
_PATIENCE: Final = 3
_MOST_PATIENCE: Final = 24
_GRACE: Final = 5.0
_MAX_NOTES: Final = 4_096
_MAX_MESSAGES: Final = 64
# Not the module's functions: a user's random.seed() must neither govern the jitter nor be disturbed by it.
_jitter: Final = random.SystemRandom()


@dataclass(frozen=True, slots=True)
class Progress:
    """
    What one round did.

    Attributes:
        spans: How many were delivered.
        rows: How many rows these were.
        parked: How many rows were set aside.
        pause: Seconds to wait before the next round; None: go on at once, 0 rows seen: wait for new ones.
        asked: Whether the endpoint named that pause.
        reason: Why there is a pause.
        seen: How many rows were claimed.
    """

    spans: int = 0
    rows: int = 0
    parked: int = 0
    pause: float | None = None
    asked: bool = False
    reason: str = ""
    seen: int = 0


@dataclass(slots=True)
class _Suspicion:
    """What this process saw of a row's failures: deliveries of others before the first one, and how often it was alone."""

    deliveries: int
    alone: int = 0


class _Round:
    """The rows in hand and what has become of them so far."""

    def __init__(self, rows: Sequence[OutboxRow]) -> None:
        self.rows = rows
        self.queue = deque(_groups(rows))
        self.started = time.monotonic()
        self.delivered_rows = 0
        self.delivered_spans = 0
        self.parked = 0
        self.got_through = False

    def left(self) -> list[int]:
        return [row.id for group in self.queue for row in group]

    def progress(self, pause: float | None = None, *, asked: bool = False, reason: str = "") -> Progress:
        return Progress(self.delivered_spans, self.delivered_rows, self.parked, pause, asked, reason, len(self.rows))


class Relay:
    """
    Deliver the rows of an outbox.

    One object belongs to one process: after a fork the child makes its own.

    Args:
        commit: Commits writes in one transaction and gives their results; raises StoreError when it can't.
        settings: `otlp_endpoint` and `relay_interval_seconds` are used; the rest comes from OTEL_EXPORTER_OTLP_*.
        owner: Process id in the store, under which rows are claimed.
        waiting: Gives how many rows the outbox holds, those claimed by others included. Needed by `drain` only.
        dead: Gives the owners of claims that died; asked before a claim, at most once per `relay_interval_seconds`.
            None leaves what they had in hand to the end of its lease.
        on_progress: Called after every round, from the relay's thread.

    Raises:
        SettingsError: The endpoint can't be used as configured.
    """

    def __init__(
        self,
        commit: Callable[[Sequence[Write]], list[Any]],
        settings: Settings,
        owner: str,
        *,
        waiting: Callable[[], int] | None = None,
        dead: Callable[[], Sequence[str]] | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self.endpoint = endpoints.read(settings.otlp_endpoint)
        self._transport = connect(self.endpoint)
        self._commit = commit
        self._owner = owner
        self._waiting = waiting
        self._dead = dead
        self._next_look = 0.0
        self._on_progress = on_progress
        self._interval = settings.relay_interval_seconds
        self._one_round = threading.Lock()
        self._news = threading.Event()
        self._stop = threading.Event()
        self._stop_by = 0.0
        self._thread: threading.Thread | None = None
        # Settlements that the store could not take yet. Nothing else is claimed before they are in.
        self._owed: deque[SettleOutbox] = deque()
        self._deliveries = 0
        self._suspicions: dict[int, _Suspicion] = {}
        self._patience = _PATIENCE
        self._refusals = 0
        self._said: set[str] = set()
        self._messages: set[str] = set()

    def run_once(self, stop: threading.Event | None = None) -> Progress:
        """
        Claim some rows, send them, and settle what became of them.

        Args:
            stop: When set, no further request is begun and the rows left go back; what was accepted is still deleted.
        """
        stop = stop or self._stop
        with self._one_round:
            try:
                self._pay()
                if stop.is_set():
                    return Progress()
                self._free_the_dead()
                [rows] = self._committed(ClaimOutbox(self._owner, LEASE_SECONDS, MAX_ROWS, MAX_BYTES))
            except StoreError as error:
                self._say(logging.WARNING, "otelexec.relay.waiting: the outbox can't be used at the moment: %s", error)
                return self._paused(Progress(), str(error))
            if not rows:
                return Progress()
            current = _Round(rows)
            try:
                progress = self._send_all(current, stop)
            except BaseException:
                # A defect of ours, or an exception out of a signal handler; what is settled is out of the queue.
                self._settle(SettleOutbox(self._owner, released=current.left()))
                raise
            if self._owed:
                return self._paused(progress, "the store can't be written")
            return progress

    def drain(self, timeout: float, stop: threading.Event | None = None) -> bool:
        """
        Deliver everything that can be delivered.

        The work is done in a thread, so that Ctrl-C never falls between an answer and its deletion.

        Args:
            timeout: Seconds after which no further request is begun.
            stop: Ends it early.

        Returns:
            Whether nothing is left but parked rows.
        """
        ended = stop or threading.Event()
        emptied: list[bool] = []
        deadline = time.monotonic() + timeout
        worker = threading.Thread(target=lambda: emptied.append(self._drain(deadline, ended)), name="otelexec-relay-drain")
        worker.start()
        try:
            worker.join(timeout)
        finally:
            ended.set()
            worker.join()
        return any(emptied)

    def _drain(self, deadline: float, ended: threading.Event) -> bool:
        while True:
            progress = self._round(ended)
            if not progress.seen and progress.pause is None and self._is_empty():
                return True
            if ended.is_set() or time.monotonic() >= deadline:
                return False
            pause = progress.pause
            if pause is None:
                # Nothing to claim, but not empty: another relay has the rows in hand.
                pause = 0.0 if progress.seen else 0.1
            elif not progress.asked:
                pause = min(pause, _LONGEST_PAUSE)
            ended.wait(max(0.0, min(pause, deadline - time.monotonic())))

    def start(self) -> None:
        """Start the thread of this process."""
        if self._thread is None:
            self._stop.clear()
            self._thread = threading.Thread(target=self._serve, name="otelexec-relay", daemon=True)
            self._thread.start()

    def wake(self) -> None:
        """Say that there are new rows; costs next to nothing, and never shortens a backoff."""
        self._news.set()

    def stop(self, timeout: float) -> None:
        """
        End the thread: send what is left, as long as all goes well, and settle what was answered.

        Args:
            timeout: Seconds for sending what is left, unless the endpoint is refusing anyway. A request that is under
                way then is waited for as well, at most for OTEL_EXPORTER_OTLP_TIMEOUT: an answer must not fall between
                exit and deletion.
        """
        deadline = time.monotonic() + timeout
        self._stop_by = deadline
        self._stop.set()
        self._news.set()
        if self._thread is not None:
            # Beyond the timeout only name resolution and the store can take time; neither may hang the exit.
            self._thread.join(timeout + self.endpoint.timeout_seconds + _GRACE)
            self._thread = None
        with self._one_round:
            while self._owed:
                with contextlib.suppress(StoreError):
                    self._pay()
                    break
                if time.monotonic() >= deadline:
                    logger.warning("otelexec.relay.unsettled: what became of some rows could not be written: their spans may be sent again")
                    break
                time.sleep(0.05)
        self._transport.close()

    def _serve(self) -> None:
        while not self._stop.is_set():
            self._news.clear()
            progress = self._round(self._stop)
            if progress.pause is not None:
                self._stop.wait(progress.pause)
            elif not progress.seen:
                self._news.wait(self._interval)
        over = _Deadline(self._stop_by)
        while not self._refusals and not over.is_set():
            progress = self._round(over)
            if progress.pause is not None or not progress.seen:
                return

    def _round(self, stop: threading.Event) -> Progress:
        try:
            progress = self.run_once(stop)
        except Exception:
            logger.exception("otelexec.relay.defect: the relay failed, and goes on")
            progress = self._paused(Progress(), "a defect of the relay")
        if self._on_progress is not None:
            self._on_progress(progress)
        return progress

    def _is_empty(self) -> bool:
        try:
            return self._waiting is None or self._waiting() == 0
        except StoreError:
            return False

    def _send_all(self, current: _Round, stop: threading.Event) -> Progress:
        queue = current.queue
        while queue:
            if stop.is_set() or not self._in_time(current):
                self._settle(SettleOutbox(self._owner, released=current.left()))
                queue.clear()
                break
            group = queue[0]
            reply = self._transport.send(group[0].request if len(group) == 1 else b"".join(row.request for row in group))
            if reply.verdict is Verdict.ACCEPTED:
                self._accept(current, reply)
            elif reply.verdict is Verdict.REFUSED:
                self._split_or_park(current, reply)
            elif reply.verdict is not Verdict.FAILED or not self._suspect(current, reply):
                ids = [row.id for row in queue.popleft()]
                kept = SettleOutbox(self._owner, released=current.left())
                self._settle(
                    SettleOutbox(self._owner, released=kept.released, failed=ids)
                    if reply.verdict is Verdict.FAILED
                    else SettleOutbox(self._owner, released=(*ids, *kept.released))
                )
                queue.clear()
                return self._backed_off(current, reply)
        return current.progress()

    def _in_time(self, current: _Round) -> bool:
        """Tell whether the answer to one more request would come before the claim ends."""
        return time.monotonic() - current.started + self.endpoint.timeout_seconds < LEASE_SECONDS

    def _accept(self, current: _Round, reply: Reply) -> None:
        group = current.queue[0]
        ids = [row.id for row in group]
        note = self._suspicions.get(ids[0])
        if len(ids) == 1 and note is not None and note.alone:
            # It failed alone, and now it is accepted: so this endpoint's failures are not about content.
            self._patience = min(2 * self._patience, _MOST_PATIENCE)
        if reply.rejected_spans > 0:
            reason = f"{reply.rejected_spans} of {sum(row.count for row in group)} spans rejected: {reply.reason or 'no message'}"
            self._settle(SettleOutbox(self._owner, parked=[(row_id, reason) for row_id in ids]))
            logger.warning("otelexec.relay.parked: %d rows are set aside, and are not sent again by themselves: %s", len(ids), reason)
            current.parked += len(ids)
        else:
            self._settle(SettleOutbox(self._owner, delivered=ids))
            current.delivered_rows += len(ids)
            current.delivered_spans += sum(row.count for row in group)
            self._deliveries += 1
            current.got_through = True
            if reply.reason and reply.reason not in self._messages and len(self._messages) < _MAX_MESSAGES:
                self._messages.add(reply.reason)
                logger.warning("otelexec.relay.message: %s accepts the spans and says: %s", self.endpoint.shown, reply.reason)
        current.queue.popleft()
        for row_id in ids:
            self._suspicions.pop(row_id, None)
        if self._refusals:
            self._refusals = 0
            self._said.clear()
            logger.info("otelexec.relay.recovered: %s takes spans again", self.endpoint.shown)

    def _split_or_park(self, current: _Round, reply: Reply) -> None:
        group = current.queue[0]
        if len(group) > 1:
            current.queue.popleft()
            middle = len(group) // 2
            current.queue.extendleft((group[middle:], group[:middle]))
            return
        row = group[0]
        self._settle(SettleOutbox(self._owner, parked=[(row.id, reply.reason)]))
        current.queue.popleft()
        current.parked += 1
        self._suspicions.pop(row.id, None)
        logger.error("otelexec.relay.parked: a row of %d spans is set aside, and is not sent again by itself: %s", row.count, reply.reason)

    def _suspect(self, current: _Round, reply: Reply) -> bool:
        """Take a failure of the foremost group into account; tell whether the round goes on."""
        group = current.queue[0]
        if len(self._suspicions) + len(group) > _MAX_NOTES:
            self._suspicions.clear()
        notes = [self._suspicions.setdefault(row.id, _Suspicion(self._deliveries)) for row in group]
        if min(row.failures for row in group) < SUSPECT:
            return False
        if len(group) > 1:
            if current.got_through:
                self._split_or_park(current, reply)
            return current.got_through
        [note] = notes
        note.alone += 1
        if note.alone >= self._patience and self._deliveries > note.deliveries:
            self._split_or_park(current, reply)
            return True
        if current.got_through and note.alone < self._patience and len(current.queue) > 1:
            current.queue.rotate(-1)  # again after the others, which may get through in between
            return True
        return False

    def _backed_off(self, current: _Round, reply: Reply) -> Progress:
        if current.got_through:
            self._refusals = 0
        if reply.verdict is Verdict.DENIED:
            self._say(logging.ERROR, "otelexec.relay.denied: %s refuses all spans; they are kept, correct the endpoint or its headers: %s",
                      self.endpoint.shown, reply.reason)  # fmt: skip
            self._refusals += 1
            return current.progress(_DENIED_PAUSE, reason=reply.reason)
        self._say(
            logging.WARNING, "otelexec.relay.waiting: %s takes no spans at the moment; they are kept: %s", self.endpoint.shown, reply.reason
        )
        if reply.retry_after is not None:
            self._refusals += 1
            return current.progress(min(reply.retry_after, _LONGEST_ASKED), asked=True, reason=reply.reason)
        return self._paused(current.progress(), reply.reason)

    def _paused(self, progress: Progress, reason: str) -> Progress:
        """Add the next pause of the exponential backoff, with full jitter, so that many relays don't come at once."""
        longest = min(_FIRST_PAUSE * 2 ** min(self._refusals, 10), _LONGEST_PAUSE)
        self._refusals += 1
        pause = _jitter.uniform(0, longest)
        return Progress(progress.spans, progress.rows, progress.parked, pause, reason=reason, seen=progress.seen)

    def _settle(self, settlement: SettleOutbox) -> None:
        """Write what became of rows now, or as the first thing when the store is back."""
        self._owed.append(settlement)
        try:
            self._pay()
        except StoreError as error:
            self._say(logging.WARNING, "otelexec.relay.unsettled: what became of some rows can't be written yet: %s", error)

    def _pay(self) -> None:
        while self._owed:
            try:
                self._committed(self._owed[0])
            except StoreRejected:
                logger.exception("otelexec.relay.unsettled: the store refuses what became of some rows: their spans may be sent again")
            self._owed.popleft()

    def _free_the_dead(self) -> None:
        """Take back what dead relays had in hand, so that it goes out now and not when their lease ends."""
        if self._dead is None or time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + self._interval
        dead = self._dead()
        if dead:
            self._committed(ReleaseClaims(dead))

    def _committed(self, *writes: Write) -> list[Any]:
        results = self._commit(writes)
        for result in results:
            if isinstance(result, Exception):
                raise result
        return results

    def _say(self, level: int, message: str, *arguments: object) -> None:
        """Log something once until spans get through again."""
        if message not in self._said:
            self._said.add(message)
            logger.log(level, message, *arguments)


class _Deadline(threading.Event):
    """A stop that comes by itself."""

    def __init__(self, at: float) -> None:
        super().__init__()
        self._at = at

    def is_set(self) -> bool:
        """Tell whether the time has come."""
        return time.monotonic() >= self._at


def stock_exporter(settings: Settings) -> SpanExporter:
    """
    Give the SDK's exporter for the relay's endpoint, for spans that no store holds.

    Raises:
        SettingsError: The endpoint can't be used as configured.
    """
    endpoint = endpoints.read(settings.otlp_endpoint)
    if endpoint.protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

        return GrpcExporter(endpoint=endpoint.url, insecure=not endpoint.secure)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

    return HttpExporter(endpoint=endpoint.url)


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
