"""
The queue in the store: runs that are asked for, found by workers, and told about.

A run is an execution that somebody asked to be run by whoever knows its task. What its execution's record says is the
truth about it: a run that is `queued` or `retrying` may be attempted, an attempt at it is opened exclusively
(`OpenAttempt.exclusive`), and what closes that attempt ends the run or leaves it to be retried. So a run and its record
can't disagree, and a run needs no lease beside the one of the process that works on it.

What is written here counts on the store's clock, which all who ask and work share: it is told how long, and not until when.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from otelexec.store.rows import ExecutionRow

EXPIRED: Final = "expired"
"""Classification of a run that nobody began in time: it is cancelled, and has freed its key."""


# --- What is written ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RunRow:
    """
    What was asked for.

    Attributes:
        run_id: The run's id, unique for ever.
        task: Which task.
        payload: The payload as text; None without one.
        payload_type: Its media type.
        options: Everything else that was said, as JSON text; for whoever asks later.
        tags: JSON text of a list.
        metadata: JSON text; None without any.
        lane: Runs that share one are limited together; None for no limit.
        lane_limit: How many runs of the lane may be attempted at a time.
        max_attempts: How many attempts there may be.
        max_seconds: How long an attempt may take; None for no limit.
        delay_ns: How long after now the first attempt may begin.
        not_before_unix_ns: The date of that instead, if it is not over; None: `delay_ns` counts.
        priority_ns: By how much it goes before others that may begin as early.
        ttl_ns: How long after that the first attempt must have begun; None: it waits for ever.
        batch_id: The batch that it belongs to; None without one.
        batch_index: Its place in the batch; None without one.
    """

    run_id: str
    task: str
    payload: str | None
    payload_type: str
    options: str
    tags: str
    metadata: str | None
    lane: str | None
    lane_limit: int
    max_attempts: int
    max_seconds: float | None
    delay_ns: int = 0
    not_before_unix_ns: int | None = None
    priority_ns: int = 0
    ttl_ns: int | None = None
    batch_id: str | None = None
    batch_index: int | None = None


@dataclass(frozen=True, slots=True)
class RunKey:
    """
    A key under which a run is asked for once.

    Attributes:
        name: The key, with whatever it is unique within.
        ttl_ns: How long it holds.
        exact: Whether it names one request, whose answer is given again: then it holds however the run ended.
    """

    name: str
    ttl_ns: int
    exact: bool = False


@dataclass(frozen=True, slots=True)
class EnqueueRun:
    """
    Ask for a run, or find the one that the same key asked for before. Gives `Enqueued`.

    Attributes:
        run: What to run.
        executions: Whose run it becomes, each with what the run carries to its worker (JSON text): the first that has no
            run and no attempt yet. The last one's id is new.
        keys: The keys that it is asked for under, the exact ones first.
    """

    run: RunRow
    executions: tuple[tuple[ExecutionRow, str], ...]
    keys: tuple[RunKey, ...] = ()


@dataclass(frozen=True, slots=True)
class Enqueued:
    """
    The run that an `EnqueueRun` made or found.

    Attributes:
        run_id: The run.
        execution_id: Its execution.
        cached: Whether an earlier call with the same key had asked for it.
        created: Whether this write made it.
    """

    run_id: str
    execution_id: str
    cached: bool
    created: bool


@dataclass(frozen=True, slots=True)
class AddTags:
    """Add tags to a run, at most `limit` in all. Gives whether they fit; None when there is no such run."""

    run_id: str
    tags: tuple[str, ...]
    limit: int


@dataclass(frozen=True, slots=True)
class SetRunMetadata:
    """Replace a run's metadata (JSON text) if it still is what `expected` says. Gives whether it was; None without such a run."""

    run_id: str
    metadata: str | None
    expected: str | None


@dataclass(frozen=True, slots=True)
class RescheduleRun:
    """
    Give a run that still waits for its time another one. Gives whether it waited; None when there is no such run.

    Attributes:
        run_id: Which.
        delay_ns: As in `RunRow`.
        not_before_unix_ns: As in `RunRow`.
    """

    run_id: str
    delay_ns: int = 0
    not_before_unix_ns: int | None = None


@dataclass(frozen=True, slots=True)
class SetRunOutput:
    """Keep what a run returned apart from its attempt, which its core had closed with an output of its own. Gives None."""

    execution_id: str
    output: str


@dataclass(frozen=True, slots=True)
class ForgetRuns:
    """Take runs that have ended out of the queue, so that nobody looks at them again. Gives None."""

    execution_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ResetKey:
    """Free a key. Gives whether it was held."""

    name: str


@dataclass(frozen=True, slots=True)
class CreateBatch:
    """
    Announce a batch of runs, or find the one that the same key announced. Gives (batch id, whether it was found).

    Attributes:
        batch_id: Its id.
        run_count: How many runs it will have.
        carrier: What every run of it carries to its worker besides its own, as JSON text.
        keys: As in `EnqueueRun`.
    """

    batch_id: str
    run_count: int
    carrier: str
    keys: tuple[RunKey, ...] = ()


@dataclass(frozen=True, slots=True)
class PutPacket:
    """Keep a payload that was uploaded apart from its run; a later one under the same name replaces it. Gives None."""

    name: str
    content: str
    media_type: str


@dataclass(frozen=True, slots=True)
class HoldKey:
    """Take a key for an owner, or find who holds it. Gives the owner that does."""

    name: str
    owner: str
    ttl_ns: int


RunWrite = EnqueueRun | AddTags | SetRunMetadata | RescheduleRun | SetRunOutput | ForgetRuns | ResetKey | CreateBatch | PutPacket | HoldKey


# --- What is read ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RunRecord:
    """
    A run with what its execution's record says of it.

    Attributes:
        attempt_state: State of the attempt that is told of it; None before the first.
        goes_on: Whether code around a core still runs, which had taken the attempt over and has ended.
        read_unix_ns: When it was read.
    """

    seq: int
    run_id: str
    execution_id: str
    task: str
    payload: str | None
    payload_type: str
    carrier: str
    options: str
    tags: str
    metadata: str | None
    lane: str | None
    max_attempts: int
    max_seconds: float | None
    created_unix_ns: int
    updated_unix_ns: int
    due_unix_ns: int
    expires_unix_ns: int | None
    batch_id: str | None
    batch_index: int | None
    output: str | None
    state: str
    attempts: int
    started_unix_ns: int | None
    ended_unix_ns: int | None
    attempt_output: str | None
    attempt_ended_unix_ns: int | None
    attempt_state: str | None
    classification: str | None
    error_type: str | None
    error_message: str | None
    goes_on: bool
    read_unix_ns: int

    @property
    def result(self) -> str | None:
        """JSON text of what it returned; None without any. A core that took the attempt over had an output of its own."""
        return self.output if self.output is not None else self.attempt_output


@dataclass(frozen=True, slots=True)
class BatchRecord:
    """A batch and the ids of those of its runs that are there, in their order."""

    batch_id: str
    run_count: int
    carrier: str
    created_unix_ns: int
    runs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DueRun:
    """A run that may be attempted: `lapsed` says that the process which is at it has not been heard of for a whole lease."""

    run: RunRecord
    lapsed: bool
