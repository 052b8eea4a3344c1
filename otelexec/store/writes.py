"""
What is written to a store: plain data, with one result for each.

A write can be committed together with others, kept in the spool, put into a log line, and repeated. Here are those of an
execution and of the process that it runs in; `upkeep.py` has those about the store, `runs.py` those about the queue in it.
Those that every execution makes are not frozen, for the reason that `rows.py` has.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TypeAlias

from otelexec.store.rows import Cancellation, ExecutionRow, Frozen, Outcome, ProcessRow, SpanRow
from otelexec.store.runs import RunWrite
from otelexec.store.upkeep import ClaimOutbox, DiscardParked, ForgetNonces, Prune, ReleaseClaims, RetryParked, SettleOutbox


@dataclass(slots=True)
class OpenAttempt:
    """
    Open an attempt, or let a core take an open one over. Gives `Opened`.

    Attributes:
        token: The attempt's fencing token.
        execution: Its execution.
        process_id: The process that runs it.
        started_unix_ns: When.
        deadline_unix_ns: Until when it should be done; None means without a limit.
        span: Its span; None when the trace is not sampled.
        outer_token: Names the outer executor around a core, the same for every core in it; None without one.
        outer: The outer executor's span; None without one, or when unsampled.
        outer_started_unix_ns: When the outer executor started.
        takes_over: Whether a row under this token may exist and then becomes this one's: the outer executor's a core's,
            and the one that a parent process opened before it handed the work over, the child's.
        repeated: Whether an earlier try may have got through; then the store looks before it writes.
        opened: Spans still open between it and the execution around it: their ids leave with this one.
        exclusive: Whether it is opened only if no other attempt of the execution runs, and the execution's run, where it has
            one, waits for an attempt; else the answer is `Busy`.
        takes_lapsed: Whether a running attempt of a process whose lease has lapsed is no hindrance.
        expected_attempts: With `exclusive`, how many attempts the execution has had when somebody chose to attempt it; when there
            were more since, the answer is `Busy`. None: any number.
        number: The attempt's least number; None: the next one.
    """

    token: str
    execution: ExecutionRow
    process_id: str
    started_unix_ns: int
    deadline_unix_ns: int | None = None
    span: SpanRow | None = None
    outer_token: str | None = None
    outer: SpanRow | None = None
    outer_started_unix_ns: int | None = None
    takes_over: bool = False
    repeated: bool = False
    opened: tuple[SpanRow, ...] = ()
    exclusive: bool = False
    takes_lapsed: bool = False
    expected_attempts: int | None = None
    number: int | None = None


@dataclass(frozen=True, slots=True)
class Busy:
    """The answer to an exclusive open that was not made: `reason` says what stands in its way."""

    reason: str


@dataclass(slots=True)
class Opened:
    """
    What the store says of an attempt that it opened.

    Attributes:
        number: The attempt's number, from 1; None while only the spool knows it.
        duplicate: Whether the execution had already succeeded.
        cancellation: The wish to cancel it, if there is one.
        snapshot: JSON text that the paused attempt before it left; None without one.
    """

    number: int | None
    duplicate: bool = False
    cancellation: Cancellation | None = None
    snapshot: str | None = None


@dataclass(frozen=True, slots=True)
class AddSpans:
    """
    Put ended spans into the outbox. Gives None.

    Attributes:
        request: Encoded OTLP request with spans whose ids the store never saw; may be empty.
        count: How many spans that is.
        recorded: Ended spans that stand in the store as open: (row, encoded request). Each is written only if
            nobody closed it in the meantime.
        opened: Spans still open whose ids have left the process.
        process_id: Who has them open.
        execution_id: Whose spans they are; None when no execution's.
        last_end_unix_ns: When the last of them ended: a sign of life of its attempt.
        nonce: Names this very write (`mint_nonce`), so that a repeated commit neither writes the spans of `request` again nor opens
            what has ended since; empty where it has neither.
    """

    request: bytes = b""
    count: int = 0
    recorded: tuple[tuple[SpanRow, bytes], ...] = ()
    opened: tuple[SpanRow, ...] = ()
    process_id: str = ""
    execution_id: str | None = None
    last_end_unix_ns: int = 0
    nonce: str = ""

    def __bool__(self) -> bool:
        """Tell whether there is anything to write."""
        return bool(self.count or self.recorded or self.opened)


NO_SPANS = AddSpans()


@dataclass(slots=True)
class CloseAttempt:
    """
    Close an attempt once, with its span, in one transaction. Gives `Closed`.

    The write carries the whole row: if the store lost the open, it inserts the attempt closed.

    Attributes:
        attempt: The open row.
        number: What `Opened` said; None when it never got an answer.
        frozen: Outcome and span as they are if nobody asked to cancel, or if it makes no difference.
        if_cancelled: The same if a cancellation stands in the store, where that changes the outcome; else None. To a close from the
            spool one counts that was asked for before the attempt ended.
        nonce: Names this very close, so that a repeated commit is not taken for another's.
        spans: Child spans that go with it, whoever wins.
        observed: What to record if the attempt has been called lost; None when the caller sees to it.
    """

    attempt: OpenAttempt
    number: int | None
    frozen: Frozen
    nonce: str
    if_cancelled: Frozen | None = None
    spans: AddSpans = NO_SPANS
    observed: RecordObserved | None = None


@dataclass(slots=True)
class Closed:
    """
    Who closed the attempt, and as what.

    Attributes:
        won: Whether this write did.
        state: The state that stands.
        finalized_by: The path that wrote it.
        number: The attempt's number.
        duplicate: Whether it is a duplicate.
        span_id: Id of the span that was written for it, lowercase hex; None when unsampled.
    """

    won: bool
    state: str
    finalized_by: str
    number: int
    duplicate: bool
    span_id: str | None


@dataclass(frozen=True, slots=True)
class RecordObserved:
    """
    Record beside an inferred `lost` what the attempt itself observed. Gives None.

    Attributes:
        attempt: The attempt.
        frozen: What it observed, and its span under a new span id.
        span_id: That id, lowercase hex; None when unsampled.
    """

    attempt: OpenAttempt
    frozen: Frozen
    span_id: str | None


@dataclass(frozen=True, slots=True)
class CloseLost:
    """
    Close a running attempt of a dead process with the span it could not end. Gives whether this write did it.

    Attributes:
        execution_id: The execution.
        token: The attempt's fencing token.
        frozen: The outcome (`lost`) and the synthesised span.
    """

    execution_id: str
    token: str
    frozen: Frozen


@dataclass(frozen=True, slots=True)
class AmendAttempt:
    """
    Note what was found out about a closed attempt after its close. Gives whether that was noted.

    Only a classification where there is none: the outcome is write-once.

    Attributes:
        execution_id: The execution.
        token: The attempt's fencing token.
        classification: What was found out.
    """

    execution_id: str
    token: str
    classification: str


@dataclass(frozen=True, slots=True)
class Contribute:
    """
    Note the span of work that other work waits for, so that the latter can link to it. Gives None.

    Attributes:
        key: Names what waits for it.
        execution_id: The execution that contributes; its last contribution counts.
        trace_id: Of its span, lowercase hex.
        span_id: Likewise.
    """

    key: str
    execution_id: str
    trace_id: str
    span_id: str


@dataclass(frozen=True, slots=True)
class ReadContributions:
    """Give the (trace id, span id) of everything that contributed under a key, in the order in which it first did."""

    key: str


@dataclass(frozen=True, slots=True)
class CloseOuter:
    """
    Record how the outer executor around one or more cores ended. Gives whether this write did it.

    Attributes:
        execution_id: The execution.
        outer_token: Names the outer executor.
        frozen: Outcome and span; the states are those of attempts.
        spans: Child spans that go with it.
        retrying: Whether the outer code asked for another attempt.
    """

    execution_id: str
    outer_token: str
    frozen: Frozen
    spans: AddSpans = NO_SPANS
    retrying: bool = False


@dataclass(frozen=True, slots=True)
class RecordQueued:
    """
    Record that a message for this execution is about to leave. Gives None.

    Attributes:
        execution: The execution; one that is further along stays as it is.
        span: The PRODUCER span; None when unsampled.
        process_id: The process that sends it.
        queued_unix_ns: When.
        opened: Spans still open between it and the execution around it.
        repeated: Whether an earlier try may have got through, and the span may have ended since; then the store looks before it writes.
    """

    execution: ExecutionRow
    span: SpanRow | None
    process_id: str
    queued_unix_ns: int
    opened: tuple[SpanRow, ...] = ()
    repeated: bool = False


@dataclass(frozen=True, slots=True)
class RefuseQueued:
    """
    Close a queued execution whose message was refused or taken back. Gives None.

    Attributes:
        execution_id: The execution.
        outcome: `rejected`, or `cancelled` where it was taken back; the PRODUCER span travels in `spans`.
        spans: The PRODUCER span.
    """

    execution_id: str
    outcome: Outcome
    spans: AddSpans = NO_SPANS


@dataclass(frozen=True, slots=True)
class NameMessage:
    """
    Note what the backend calls an execution's message, where it said so only when it had it. Gives None.

    Attributes:
        execution_id: The execution.
        message_id: That name.
    """

    execution_id: str
    message_id: str


@dataclass(frozen=True, slots=True)
class RecordProgress:
    """Write the progress marker (JSON text) of a running attempt, and when on its own clock it was set. Gives None."""

    execution_id: str
    token: str
    progress: str
    at_unix_ns: int = field(default_factory=time.time_ns)


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Insert or refresh a process row, on the store's clock and on its own; `ended` says goodbye. Gives None."""

    process: ProcessRow
    ended: bool = False
    clock_unix_ns: int = field(default_factory=time.time_ns)


@dataclass(frozen=True, slots=True)
class RequestCancel:
    """
    Record the wish to cancel an execution. Gives the execution's state, None when it is not known yet.

    Attributes:
        execution_id: Which; or the token of a running attempt, which alone is told then: the next one runs.
        cancellation: The wish.
    """

    execution_id: str
    cancellation: Cancellation


@dataclass(frozen=True, slots=True)
class Ingested:
    """
    Note how far a spool segment has been taken in, in the transaction that took it in. Gives None.

    Attributes:
        segment: Name of the segment, unique for ever.
        offset: Everything before this byte is in the store.
    """

    segment: str
    offset: int


Write: TypeAlias = (
    OpenAttempt
    | CloseAttempt
    | RecordObserved
    | CloseLost
    | AmendAttempt
    | Contribute
    | ReadContributions
    | CloseOuter
    | RecordQueued
    | RefuseQueued
    | NameMessage
    | AddSpans
    | RecordProgress
    | Heartbeat
    | RequestCancel
    | Ingested
    | ClaimOutbox
    | SettleOutbox
    | ReleaseClaims
    | RetryParked
    | DiscardParked
    | ForgetNonces
    | Prune
    | RunWrite
)
