"""What a store gives back to readers: executions, their attempts, what is open, and figures for `doctor`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

from otelexec.store.rows import Cancellation, SpanRow


class Wanted(TypedDict, total=False):
    """
    Which executions are meant: those that have all of what is given. None, or nothing: any.

    Attributes:
        state: Their state.
        name: Their name.
        request_id: Their request.
        source: Where they come from.
        fields: Fields of their correlation; the message's id is one.
        since_unix_ns: They were queued, began or ended at this time or later.
    """

    state: str | None
    name: str | None
    request_id: str | None
    source: str | None
    fields: Mapping[str, str] | None
    since_unix_ns: int | None


@dataclass(frozen=True, slots=True)
class AttemptRecord:
    """One attempt as `list` and `show` give it; the names are those of the JSON."""

    attempt: int
    state: str
    duplicate: bool
    trace_id: str | None
    span_id: str | None
    started_unix_ns: int
    ended_unix_ns: int | None
    deadline_unix_ns: int | None
    error_type: str | None
    error_message: str | None
    finalized_by: str | None
    classification: str | None
    reconciled_unix_ns: int | None
    progress: str | None
    output: str | None
    observed: str | None
    outer_span_id: str | None
    outer_outcome: str | None
    outer_started_unix_ns: int | None
    outer_ended_unix_ns: int | None
    outer_error_type: str | None
    outer_error_message: str | None
    host: str | None
    pid: int | None
    service_name: str | None


@dataclass(frozen=True, slots=True)
class ExecutionRecord:
    """
    One execution with its attempts.

    Attributes:
        seq: Rises with creation; the key for paging.
    """

    seq: int
    execution_id: str
    name: str
    state: str
    request_id: str
    source: str
    correlation: str
    parent_execution_id: str | None
    queued_unix_ns: int | None
    started_unix_ns: int | None
    ended_unix_ns: int | None
    error_type: str | None
    error_message: str | None
    producer_trace_id: str | None
    producer_span_id: str | None
    snapshot: str | None
    cancellation: Cancellation | None
    attempts: tuple[AttemptRecord, ...]


@dataclass(frozen=True, slots=True)
class OpenWork:
    """
    What a process has open: a running attempt, the outer executor of a closed one, or a span.

    Attributes:
        kind: `attempt`, `outer` or `span`.
        process_id: Whose it is.
        execution_id: The execution; empty for a span that belongs to none.
        token: The attempt's fencing token; empty for the others.
        number: The attempt's number; 0 for a span.
        span: The span to end; None when unsampled.
        started_unix_ns: When it started.
        deadline_unix_ns: The attempt's deadline; None without one.
        last_seen_unix_ns: Last progress marker or ended child; 0 without one.
        progress: JSON text of the last marker.
        name: Name of the attempt's execution; empty for the others.
    """

    kind: str
    process_id: str
    execution_id: str
    token: str
    number: int
    span: SpanRow | None
    started_unix_ns: int
    deadline_unix_ns: int | None
    last_seen_unix_ns: int
    progress: str | None
    name: str


@dataclass(frozen=True, slots=True)
class ParkedRow:
    """Spans that the endpoint refused for good, with its reason."""

    id: int
    count: int
    reason: str
    parked_unix_ns: int


@dataclass(frozen=True, slots=True)
class Statistics:
    """
    What `doctor` says of a store.

    Attributes:
        executions: Number of executions by state.
        outbox_rows: Rows waiting for the relay.
        outbox_spans: Spans in them.
        outbox_oldest_unix_ns: When the oldest of them was written; None when there is none.
        claimed_rows: How many of them a relay has in hand.
        parked: Rows that go out only on request: the oldest of them.
        parked_rows: How many there are.
        parked_spans: Spans in them.
        processes: How many processes have not said goodbye.
        queued_oldest_unix_ns: Since when the oldest execution that nobody has begun is queued; None without one.
        unseen_cancellations: Executions that go on although somebody asked for their termination.
        size_bytes: Size on disk.
        table_bytes: The same by table, indexes included; empty where the store can't tell.
    """

    executions: Mapping[str, int]
    outbox_rows: int
    outbox_spans: int
    outbox_oldest_unix_ns: int | None
    claimed_rows: int
    parked: Sequence[ParkedRow]
    parked_rows: int
    parked_spans: int
    processes: int
    queued_oldest_unix_ns: int | None
    unseen_cancellations: Sequence[str]
    size_bytes: int
    table_bytes: Mapping[str, int]
