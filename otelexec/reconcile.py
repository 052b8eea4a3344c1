"""
The reconciler: it closes the attempts of dead workers and writes the spans that they could not end.

A process of this host is looked at: its pid and start time tell. Any other lives as long as its lease on the store's
clock. What a dead one has open is closed under the ids that it recorded, with the fields that it wrote at the start, so
that the trace is whole; nothing is decoded for that, and nothing can be closed twice.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from opentelemetry.proto.trace.v1.trace_pb2 import Span as SpanMessage

from otelexec import identity, metrics, otlp, semconv
from otelexec.clock import monotonic
from otelexec.endings import Ending
from otelexec.errors import StoreError
from otelexec.freeze import outcome_attributes, status_of
from otelexec.ids import nonce_at
from otelexec.store.base import Store
from otelexec.store.records import OpenWork
from otelexec.store.rows import CANCELLED, LOST, Frozen, Outcome, ProcessRow
from otelexec.store.spool import Spool, encode, log_homeless
from otelexec.store.upkeep import ForgetNonces, ReleaseClaims
from otelexec.store.writes import AddSpans, CloseLost, CloseOuter, Write

logger = logging.getLogger("otelexec.reconcile")

BATCH = 500
"""Attempts closed in one transaction: finalizers of other processes wait no longer than that takes."""

MAX_LINES = 20
"""Lost attempts that are named in the log one by one, for each batch."""

NONCE_SECONDS = 86_400.0
"""How long the nonce of a write is kept: what waits in a spool for longer may put equal spans into the outbox once more."""

KILLED = "killed"
OOM = "oom"
WORKER_LOST = "worker_lost"
DEADLINE_EXCEEDED = "deadline_exceeded"


@dataclass(frozen=True, slots=True)
class Death:
    """
    How a child process died, as its parent saw it.

    Attributes:
        seen_unix_ns: When, in nanoseconds since 1970.
        signal: The signal that killed it; None without one.
        exit_code: Its exit code; None when a signal killed it.
        oom: Whether the kernel killed it for want of memory.
        endings: How attempts ended that the parent knows more of, such as that it stopped them at a limit: by fencing
            token. All others are `lost`.
    """

    seen_unix_ns: int
    signal: int | None = None
    exit_code: int | None = None
    oom: bool = False
    endings: Mapping[str, Ending] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reconciled:
    """
    What a round of the reconciler did.

    Attributes:
        attempts: Attempts that it closed as `lost`.
        outers: Outer executors that it closed.
        spans: Other spans that it ended.
        ingested: Writes that it took in from the spool.
        processes: Dead processes that it found.
    """

    attempts: int = 0
    outers: int = 0
    spans: int = 0
    ingested: int = 0
    processes: int = 0

    def __bool__(self) -> bool:
        """Tell whether it did anything."""
        return bool(self.attempts or self.outers or self.spans or self.ingested)


def dead_relays(store: Store, own: str | None) -> list[str]:
    """
    Give the process ids of relays of this host that died with outbox rows in hand.

    Their claims need not be waited for; those of other hosts end by their lease.

    Args:
        store: The store.
        own: Process id of this process, which lives; None when it has no row.

    Raises:
        StoreError: The store could not be read.
    """
    owners = {owner for owner in store.claim_owners() if owner != own}
    if not owners:
        return []
    now = store.now_unix_ns()
    return [
        process.process_id for process in store.processes() if process.process_id in owners and identity.liveness(process, now) == "dead"
    ]


class Reconciler:
    """
    Closes what dead processes left open.

    Args:
        store: The store.
        spool: The spool of this host.
        own: Process id of this process, which lives; None when it has no row.
        meanwhile: Called after each commit of a round, which may have many; what it raises ends the round.
    """

    def __init__(self, store: Store, spool: Spool, *, own: str | None = None, meanwhile: Callable[[], None] = lambda: None) -> None:
        self._store = store
        self._spool = spool
        self._own = own
        self._meanwhile = meanwhile
        self._unreachable_until: float | None = None
        self._next_forgetting = monotonic()

    def run_once(self, deaths: Mapping[int, Death] | None = None, *, advanced: Callable[[int], None] = lambda _: None) -> Reconciled:
        """
        Do one round.

        Args:
            deaths: What a parent knows of the deaths of its children, by pid; then only those are looked at.
            advanced: Told of every batch, how many were closed in it.

        Returns:
            What was done.

        Raises:
            StoreError: The store could not be read or written; another round goes on where this one ended.
            OSError: A spool could not be read; nothing was closed, since it may hold what the dead observed.
        """
        try:
            ingested, dead = self._find(deaths)
        except StoreError:
            self.store_was_away()
            raise
        totals = {"attempt": 0, "outer": 0, "span": 0}
        for process, classification, death in dead:
            self._close(process, classification, death, totals, advanced)
        # A relay whose lease has lapsed elsewhere may yet be sending: its claims lapse by themselves.
        gone = [process.process_id for process, _, _ in dead if identity.is_here(process)]
        if gone:
            _commit(self._store, [ReleaseClaims(gone)])
            self._meanwhile()
        self._forget_nonces()
        return Reconciled(totals["attempt"], totals["outer"], totals["span"], ingested, len(dead))

    def store_was_away(self) -> None:
        """Learn that the store can't be reached at this moment: from now on each lease counts anew."""
        self._unreachable_until = monotonic()

    def _forget_nonces(self) -> None:
        if monotonic() < self._next_forgetting:
            return
        self._next_forgetting = monotonic() + NONCE_SECONDS / 24
        before = nonce_at(self._store.now_unix_ns() - int(NONCE_SECONDS * 1e9))
        while True:
            [forgotten] = self._store.commit([ForgetNonces(before)], durable=False, timeout_seconds=5.0)
            if isinstance(forgotten, StoreError):
                raise forgotten
            if not forgotten:  # else there may be more, though another reconciler was at the same ones
                return
            self._meanwhile()

    def _find(self, deaths: Mapping[int, Death] | None) -> tuple[int, list[tuple[ProcessRow, str, Death | None]]]:
        """Take the spool in and give the dead: those that were dead before it was read, so that all they wrote is in."""
        ingested, known = 0, frozenset[str]()
        while True:
            ingested += take_in(self._store, self._spool, meanwhile=self._meanwhile)
            dead = list(self._dead(self._store.processes(), self._store.now_unix_ns(), deaths))
            found = frozenset(process.process_id for process, _, _ in dead)
            if found <= known:
                left = self._spool.left
                return ingested, [each for each in dead if each[0].process_id not in left and _place(each[0]) not in left.values()]
            known = found

    def _dead(
        self, processes: Iterable[ProcessRow], now: int, deaths: Mapping[int, Death] | None
    ) -> Iterable[tuple[ProcessRow, str, Death | None]]:
        for process in processes:
            if process.process_id == self._own:
                continue
            if deaths is not None:
                death = deaths.get(process.pid) if identity.is_here(process) else None
                if death is not None and identity.liveness(process, now) == "dead":
                    yield process, OOM if death.oom else KILLED, death
                continue
            state = identity.liveness(process, now)
            if state == "dead" and self._is_left_to_parent(process, now):
                continue
            if state == "dead":
                yield process, KILLED if identity.is_here(process) else WORKER_LOST, None
            elif state == "lapsed" and (process.ended or self._lease_counts(process, now)):
                yield process, WORKER_LOST, None

    def _lease_counts(self, process: ProcessRow, now: int) -> bool:
        # While the store was away nobody could renew a lease, so each gets one whole lease anew.
        since = self._unreachable_until
        if since is not None and monotonic() - since < process.lease_seconds:
            return False
        return now - self._store.up_since_unix_ns() >= process.lease_seconds * 1e9

    @staticmethod
    def _is_left_to_parent(process: ProcessRow, now: int) -> bool:
        # It knows the signal, and whether it sent it itself. What it has not said within a lease it won't say.
        return now - process.heartbeat_unix_ns <= process.lease_seconds * 1e9 and identity.has_living_parent(process)

    def _close(
        self,
        process: ProcessRow,
        classification: str,
        death: Death | None,
        totals: dict[str, int],
        advanced: Callable[[int], None],
    ) -> None:
        seen = 0
        # Outer executors show up once their core is closed, so: until there is nothing more.
        while work := self._store.open_work([process.process_id], limit=BATCH):
            seen = max(seen, _seen_unix_ns(process, work, death))
            # In one order, so that two reconcilers never wait for each other crosswise.
            work.sort(key=lambda item: (item.execution_id, item.token))
            now = self._store.now_unix_ns()
            writes = [_write(item, process, classification, death, seen=seen, now=now) for item in work]
            done = refused = lost = 0
            for item, write, result in zip(work, writes, _commit(self._store, writes), strict=True):
                if isinstance(result, StoreError):
                    logger.error("otelexec.reconcile.refused: %s %s of process %d: %s", item.kind, item.execution_id, process.pid, result)
                    refused += 1
                elif item.kind == "span" or result is True:
                    totals[item.kind] += 1
                    done += 1
                if isinstance(write, CloseLost) and result is True:
                    lost += 1
                    state = write.frozen.outcome.state
                    metrics.reconciled(item.name, state, write.frozen.outcome.error_type)
                    if lost <= MAX_LINES:
                        text = "otelexec.reconcile.lost: execution %s attempt %d of process %d on %s is %s (%s)"
                        logger.warning(text, item.execution_id, item.number, process.pid, process.host, state, classification)
            if lost > MAX_LINES:
                text = "otelexec.reconcile.lost: and %d more attempts of process %d on %s; `otelexec list --state lost` has them all"
                logger.warning(text, lost - MAX_LINES, process.pid, process.host)
            advanced(done)
            self._meanwhile()  # not before they are counted: it ends the round when the process ends
            if refused == len(work):  # it would be found again for ever; the next round tries once more
                return


def _place(process: ProcessRow) -> tuple[int, int]:
    return process.pid, process.pid_start


def _commit(store: Store, writes: Sequence[Write], timeout_seconds: float = 5.0) -> list[object]:
    return store.commit(writes, durable=True, timeout_seconds=timeout_seconds)


def take_in(store: Store, spool: Spool, *, timeout_seconds: float = 5.0, meanwhile: Callable[[], None] = lambda: None) -> int:
    """
    Take in what waits in a spool, and give how many writes that was.

    Args:
        store: The store.
        spool: The spool.
        timeout_seconds: How long a commit waits for other writers.
        meanwhile: Called after each commit.

    Raises:
        StoreError: The store could not be written; what is left stays where it is.
        OSError: The spool could not be read.
    """

    def commit(writes: Sequence[Write]) -> None:
        for write, result in zip(writes, _commit(store, writes, timeout_seconds), strict=True):
            if isinstance(result, StoreError):
                # The segment is deleted after this, so the line is the last place left.
                log_homeless(logger, encode(write), result)
        meanwhile()

    return spool.ingest(commit, store.ingested)


def _write(item: OpenWork, process: ProcessRow, classification: str, death: Death | None, *, seen: int, now: int) -> Write:
    outcome = _outcome(item, process, classification, death, seen=seen, now=now)
    frozen = Frozen(outcome, _synthesize(item, process, outcome))
    if item.kind == "attempt":
        return CloseLost(item.execution_id, item.token, frozen)
    if item.kind == "outer":
        return CloseOuter(item.execution_id, item.token, frozen)
    if item.span is None:
        raise AssertionError("an open span has a row")
    return AddSpans(recorded=((item.span, frozen.request),), execution_id=item.execution_id or None)


def _outcome(item: OpenWork, process: ProcessRow, classification: str, death: Death | None, *, seen: int, now: int) -> Outcome:
    """Give how something ended that a dead process left: as its parent says, or lost."""
    ended = _ended_unix_ns(item, seen)
    if classification != OOM and item.deadline_unix_ns is not None and ended >= item.deadline_unix_ns:
        classification = DEADLINE_EXCEEDED
    ending = _ending_of(item, death) or Ending(LOST, classification, classification)
    return Outcome(
        state=ending.state,
        ended_unix_ns=ended,
        finalized_by="reconciler" if death is None else "parent",
        classification=ending.classification,
        error_type=ending.error_type,
        error_message=ending.error_message or _explain(process, death, ended),
        reconciled_unix_ns=now,
        retrying=ending.retrying,
        # What was interrupted without anybody having asked for it says so in its classification.
        sticky=ending.state == CANCELLED and ending.classification is None,
    )


def _seen_unix_ns(process: ProcessRow, work: Sequence[OpenWork], death: Death | None) -> int:
    """Give when a process died as its parent saw it, or its last sign of life: whichever of its work that was about, all was open then."""
    if death is not None:
        return death.seen_unix_ns
    # All on the clock of the process, as its start is; a row of an older version has the store's only.
    known = process.clock_unix_ns or process.heartbeat_unix_ns
    return max(known, *(max(item.last_seen_unix_ns, _started_unix_ns(item)) for item in work))


def _ended_unix_ns(item: OpenWork, seen: int) -> int:
    """Give when it ended, never before what it was around."""
    return max(seen, _started_unix_ns(item), item.last_seen_unix_ns if item.kind == "outer" else 0)


def _started_unix_ns(item: OpenWork) -> int:
    if item.kind == "span" and item.span is not None:
        return int(SpanMessage.FromString(item.span.start).start_time_unix_nano)
    return item.started_unix_ns


def _ending_of(item: OpenWork, death: Death | None) -> Ending | None:
    """Give how the parent says that an attempt ended; None where it says nothing."""
    return None if death is None else death.endings.get(item.token)


def _explain(process: ProcessRow, death: Death | None, ended: int) -> str:
    if death is not None:
        return explain(process.host, process.pid, death)
    at = datetime.fromtimestamp(ended / 1e9, UTC).isoformat(timespec="milliseconds")
    return f"worker process {process.pid} on {process.host} died without a word; last sign of life {at}"


def explain(host: str, pid: int, death: Death) -> str:
    """Say in one sentence how a process died, as its parent saw it."""
    who = f"worker process {pid} on {host}"
    if death.signal is not None:
        try:
            name = signal.Signals(death.signal).name
        except ValueError:
            name = f"signal {death.signal}"
        return f"{who} was killed by {name}" + (" (out of memory)" if death.oom else "")
    return f"{who} exited" + ("" if death.exit_code is None else f" with code {death.exit_code}")


def _synthesize(item: OpenWork, process: ProcessRow, outcome: Outcome) -> bytes:
    """End the span that the process could not end, under its own ids."""
    if item.span is None:
        return b""
    attributes = outcome_attributes(outcome.state, outcome.classification, outcome.error_type, outer=item.kind == "outer")
    attributes[semconv.RECONCILED_AT] = outcome.reconciled_unix_ns
    if item.kind == "span":
        del attributes[semconv.OUTCOME]  # which only an attempt's has
    if item.kind == "attempt":
        attributes[semconv.ATTEMPT] = item.number
        if item.progress is not None:
            attributes[semconv.PROGRESS] = item.progress
    code, message = status_of(outcome.state, outcome.error_message)
    span = otlp.complete_start(
        item.span.start, end_unix_ns=outcome.ended_unix_ns, attributes=attributes, status_code=code, status_message=message
    )
    return otlp.wrap(process.resource, {process.scope: [span]})
