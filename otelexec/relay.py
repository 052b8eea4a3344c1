"""
The relay: rows of the outbox -> the OTLP endpoint, at least once, oldest first, and deleted only when accepted.

A request is the concatenation of rows' bytes, which are never decoded or changed, so that a receiver sees one byte
string for one span id. `delivery.py` says what each answer does to the rows of its request; here is who claims them,
when, and how long to wait after a refusal.
"""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from otelexec import endpoint as endpoints
from otelexec.clock import monotonic
from otelexec.delivery import Delivery
from otelexec.errors import StoreError, StoreRejected
from otelexec.store.upkeep import ClaimOutbox, ReleaseClaims, SettleOutbox
from otelexec.transport import Verdict, connect

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from otelexec.delivery import Tally
    from otelexec.settings import Settings
    from otelexec.store.writes import Write

logger = logging.getLogger("otelexec.relay")

MAX_ROWS: Final = 512
MAX_BYTES: Final = 4 * 1024 * 1024  # also the largest message that a gRPC server takes by default
# How long a claim outlives a relay that died on another host. Rows that could not be sent well before are given back.
LEASE_SECONDS: Final = 60.0
_MARGIN: Final = 10.0  # for connecting, and for writing down what became of the rows
_FIRST_PAUSE: Final = 0.5
_LONGEST_PAUSE: Final = 8.0
_DENIED_PAUSE: Final = 30.0
_LONGEST_ASKED: Final = 3_600.0  # a Retry-After beyond it is a mistake of the endpoint
_GRACE: Final = 5.0
_LEAST_TIMEOUT: Final = 0.1
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
        self._delivery = Delivery(self._transport, self._settle, owner, self.endpoint.shown)
        # Whether a claim was made whose answer never came: it may hold rows that nobody has in hand.
        self._unsure = False
        self._refusals = 0
        self._said: set[str] = set()

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
                if self._unsure:
                    self._committed(ReleaseClaims([self._owner]))
                    self._unsure = False
                self._free_the_dead()
                self._unsure = True
                [rows] = self._committed(ClaimOutbox(self._owner, LEASE_SECONDS, MAX_ROWS, MAX_BYTES))
            except StoreError as error:
                self._say(logging.WARNING, "otelexec.relay.waiting: the outbox can't be used at the moment: %s", error)
                return self._paused(Progress(), str(error))
            self._unsure = False
            if not rows:
                return Progress()
            # No request is begun whose answer could come after the claim.
            begin_by = monotonic() + LEASE_SECONDS - self.endpoint.timeout_seconds - _MARGIN
            tally = self._delivery.deliver(rows, lambda: stop.is_set() or bool(self._owed) or monotonic() >= begin_by)
            return self._concluded(tally, len(rows))

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
        deadline = monotonic() + timeout
        # Not join(): interrupted by a signal handler's exception, Python 3.11's takes a running thread for a stopped one.
        finished = threading.Event()

        def work() -> None:
            try:
                emptied.append(self._drain(deadline, ended))
            finally:
                finished.set()

        threading.Thread(target=work, name="otelexec-relay-drain").start()
        try:
            finished.wait(timeout)
        finally:
            ended.set()
            finished.wait()
        return any(emptied)

    def _drain(self, deadline: float, ended: threading.Event) -> bool:
        while True:
            progress = self._round(ended)
            if not progress.seen and progress.pause is None and self._is_empty():
                return True
            if ended.is_set() or monotonic() >= deadline:
                return False
            pause = progress.pause
            if pause is None:
                # Nothing to claim, but not empty: another relay has the rows in hand.
                pause = 0.0 if progress.seen else 0.1
            elif not progress.asked:
                pause = min(pause, _LONGEST_PAUSE)
            ended.wait(max(0.0, min(pause, deadline - monotonic())))

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
        deadline = monotonic() + timeout
        self._stop_by = deadline
        self._stop.set()
        self._news.set()
        if self._thread is not None:
            # Beyond the timeout only name resolution and the store can take time; neither may hang the exit.
            self._thread.join(timeout + self.endpoint.timeout_seconds + _GRACE)
            self._thread = None
        if not self._one_round.acquire(timeout=_GRACE):
            logger.warning("otelexec.relay.unsettled: a request never ended: its spans may be sent again")
            return
        try:
            while self._owed:
                with contextlib.suppress(StoreError):
                    self._pay()
                    break
                if monotonic() >= deadline:
                    logger.warning("otelexec.relay.unsettled: what became of some rows could not be written: their spans may be sent again")
                    break
                time.sleep(0.05)
        finally:
            self._one_round.release()
        self._transport.close()

    def send_rest(self, deadline: float) -> None:
        """
        Send what is left, in this thread and as long as all goes well.

        Args:
            deadline: When to begin no further request, by `clock.monotonic()`, and to wait no longer for one begun here.
        """
        over = _Deadline(deadline)
        left = max(_LEAST_TIMEOUT, deadline - monotonic())
        self._transport.timeout_seconds = min(self.endpoint.timeout_seconds, left)
        try:
            while not self._refusals and not over.is_set():
                progress = self._round(over)
                if progress.pause is not None or not progress.seen:
                    return
        finally:
            self._transport.timeout_seconds = self.endpoint.timeout_seconds

    def _serve(self) -> None:
        while not self._stop.is_set():
            self._news.clear()
            progress = self._round(self._stop)
            if progress.pause is not None:
                self._stop.wait(progress.pause)
            elif not progress.seen:
                self._news.wait(self._interval)
        self.send_rest(self._stop_by)

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

    def _concluded(self, tally: Tally, seen: int) -> Progress:
        """Say what a round did, and how long to wait after it."""
        progress = Progress(tally.spans, tally.rows, tally.parked, seen=seen)
        if tally.accepted and self._refusals:
            self._refusals = 0
            self._said.clear()
            logger.info("otelexec.relay.recovered: %s takes spans again", self.endpoint.shown)
        reply = tally.ended_by
        if reply is None:
            return self._paused(progress, "the store can't be written") if self._owed else progress
        if reply.verdict is Verdict.DENIED:
            text = "otelexec.relay.denied: %s refuses all spans; they are kept, correct the endpoint or its headers: %s"
            self._say(logging.ERROR, text, self.endpoint.shown, reply.reason)
            self._refusals += 1
            return replace(progress, pause=_DENIED_PAUSE, reason=reply.reason)
        text = "otelexec.relay.waiting: %s takes no spans at the moment; they are kept: %s"
        self._say(logging.WARNING, text, self.endpoint.shown, reply.reason)
        if reply.retry_after is not None and reply.retry_after >= _FIRST_PAUSE:
            self._refusals += 1
            return replace(progress, pause=min(reply.retry_after, _LONGEST_ASKED), asked=True, reason=reply.reason)
        # Also where it asks for less, or for a moment that is over by our clock: else it would be asked without a pause.
        return self._paused(progress, reply.reason)

    def _paused(self, progress: Progress, reason: str) -> Progress:
        """Add the next pause of the exponential backoff, with full jitter, so that many relays don't come at once."""
        longest = min(_FIRST_PAUSE * 2 ** min(self._refusals, 10), _LONGEST_PAUSE)
        self._refusals += 1
        return replace(progress, pause=_jitter.uniform(0, longest), reason=reason)

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
        if self._dead is None or monotonic() < self._next_look:
            return
        self._next_look = monotonic() + self._interval
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
        return monotonic() >= self._at
