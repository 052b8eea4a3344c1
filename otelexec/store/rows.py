"""
What writes and records are made of: the states, and the rows of processes, executions, spans and outcomes.

The rows that every execution makes are not frozen, though nobody changes them: a frozen dataclass is filled field by
field through `object.__setattr__`, which takes three times as long.
"""

from __future__ import annotations

from dataclasses import dataclass

# Attempt states (README, Words).
RUNNING = "running"
SUCCEEDED = "succeeded"
FAILED = "failed"
TIMED_OUT = "timed_out"
CANCELLED = "cancelled"
PAUSED = "paused"
REJECTED = "rejected"
LOST = "lost"
# States that only an execution has.
QUEUED = "queued"
RETRYING = "retrying"

ENDED_STATES = frozenset({SUCCEEDED, FAILED, TIMED_OUT, CANCELLED, REJECTED, LOST})
"""Execution states with an end time; `paused` and `retrying` go on."""

SPOOL = "spool"
"""The path that closed an attempt whose close waited in the spool."""


@dataclass(frozen=True, slots=True)
class ProcessRow:
    """
    One process that writes to the store.

    Attributes:
        process_id: Minted once per process, and anew in a forked child.
        host: Host name, for people.
        boot_id: Kernel boot id; empty where the system has none.
        pid_namespace: Pid namespace; with the boot id it tells whether `pid` means anything here.
        pid: Process id.
        pid_start: Start time of the pid in clock ticks since boot, so that a reused pid is not taken for it.
        lease_seconds: How long after its last heartbeat it may count as alive where it can't be looked at.
        resource: Encoded OTLP resource, for the spans that others must end.
        scope: Encoded OTLP instrumentation scope, likewise.
        heartbeat_unix_ns: Last sign of life on the store's clock; 0 when it is being written.
        ended: Whether it said goodbye.
        clock_unix_ns: What its own clock said at that sign of life: its machine may go by another time than the store.
        parent_pid: Process id of the parent that reports its death; 0 when none does.
        parent_start: Start time of that pid in clock ticks since boot.
    """

    process_id: str
    host: str
    boot_id: str
    pid_namespace: str
    pid: int
    pid_start: int
    lease_seconds: float
    resource: bytes
    scope: bytes
    heartbeat_unix_ns: int = 0
    ended: bool = False
    clock_unix_ns: int = 0
    parent_pid: int = 0
    parent_start: int = 0


@dataclass(slots=True)
class ExecutionRow:
    """What an execution is, whoever runs it: written by the first attempt or by the publish before it."""

    execution_id: str
    name: str
    request_id: str
    source: str
    correlation: str
    parent_execution_id: str | None

    @property
    def values(self) -> tuple[str, str, str, str, str, str | None]:
        """All of it in the order above, which is that of the columns."""
        return self.execution_id, self.name, self.request_id, self.source, self.correlation, self.parent_execution_id


@dataclass(slots=True)
class SpanRow:
    """
    A span by its ids, with the fields known at its start.

    Attributes:
        trace_id: Lowercase hex.
        span_id: Lowercase hex.
        start: Encoded fields of an OTLP Span that are known at start (`otlp.encode_start`).
    """

    trace_id: str
    span_id: str
    start: bytes


@dataclass(frozen=True, slots=True)
class Cancellation:
    """
    Somebody's wish to cancel an execution.

    Attributes:
        requested_unix_ns: When.
        terminate: True: stop it if it can be stopped; False: tell it only; None: the backend's habit.
    """

    requested_unix_ns: int
    terminate: bool | None

    @classmethod
    def from_columns(cls, requested_unix_ns: int, terminate: int | None) -> Cancellation:
        """Give it as it stands in the store, where a truth is a number."""
        return cls(requested_unix_ns, None if terminate is None else bool(terminate))


@dataclass(slots=True)
class Outcome:
    """
    How an attempt ended.

    Attributes:
        state: One of the terminal attempt states.
        ended_unix_ns: When; the span carries the same number.
        finalized_by: Which path closed it: executor, reject, publisher, spool, fallback, reconciler, parent.
        classification: What kind of `state` it is, where that says more; None otherwise.
        error_type: Fully qualified class of the exception, or the reason of a rejection.
        error_message: Its text.
        progress: JSON text of the last progress marker.
        output: JSON text of what `set_output` was given.
        snapshot: JSON text of a paused attempt.
        retrying: Whether another attempt is already on its way.
        sticky: Whether a `cancelled` was asked for and so is final.
        reconciled_unix_ns: When somebody else closed it; None when its own process did.
    """

    state: str
    ended_unix_ns: int
    finalized_by: str = "executor"
    classification: str | None = None
    error_type: str | None = None
    error_message: str | None = None
    progress: str | None = None
    output: str | None = None
    snapshot: str | None = None
    retrying: bool = False
    sticky: bool = False
    reconciled_unix_ns: int | None = None


@dataclass(slots=True)
class Frozen:
    """An outcome with the span that says the same."""

    outcome: Outcome
    request: bytes
