"""
A run as every backend gives it, the states that it can be in, and the errors of asking for one.

    TriggerError (also OtelexecError)
    |-- EnqueueError                 a run was asked for; says whether the backend may have it, and whether to ask again
    |   `-- InvalidRequest           (also ValueError) over a limit of the backend: nothing was sent
    |-- RunNotFound                  the backend has no such run
    `-- BackendError                 anything else that the backend refused, or could not do
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

from otelexec.errors import OtelexecError

PENDING: Final = "pending"
RUNNING: Final = "running"
WAITING: Final = "waiting"
SUCCEEDED: Final = "succeeded"
FAILED: Final = "failed"
CANCELLED: Final = "cancelled"
EXPIRED: Final = "expired"
TIMED_OUT: Final = "timed_out"

ENDED: Final = frozenset({SUCCEEDED, FAILED, CANCELLED, EXPIRED, TIMED_OUT})
"""States that a run does not leave."""

REJECTED: Final = "rejected"


@dataclass(frozen=True, slots=True)
class Run:
    """
    One run, as its backend tells of it.

    Attributes:
        id: The backend's id.
        state: `pending`, `running`, `waiting`, `succeeded`, `failed`, `cancelled`, `expired` or `timed_out`; a status that
            is not known here stands as the backend spells it.
        task: The task's id.
        output: What it returned; None without one.
        error: Its error, with `name` and `message` where the backend has them; None without one.
        attempts: How many attempts there were.
        tags: Its tags.
        metadata: Its metadata; None without any.
        created_at: When it was asked for, as ISO 8601 text.
        started_at: When its first attempt started; None before.
        finished_at: When it ended; None before.
        duration_ms: How long it ran, in milliseconds.
        raw: Everything that the backend said.
    """

    id: str
    state: str
    task: str = ""
    output: Any = None
    error: dict[str, Any] | None = None
    attempts: int = 0
    tags: tuple[str, ...] = ()
    metadata: Any = None
    created_at: str | None = None
    started_at: str | None = None
    finished_at: str | None = None
    duration_ms: float = 0.0
    raw: dict[str, Any] | None = None

    @property
    def has_ended(self) -> bool:
        """Whether it will not change any more."""
        return self.state in ENDED


class TriggerError(OtelexecError):
    """A Trigger-style backend did not do what was asked."""

    def __init__(self, message: str | None = None, *, status: int | None = None, retryable: bool = False) -> None:
        super().__init__(message)
        self.status = status
        self.retryable = retryable


class EnqueueError(TriggerError):
    """
    A run could not be enqueued.

    Attributes:
        acceptance: `rejected`: the backend has no such run. `unknown`: it may have one, so that only a call with the
            same key (or in the same execution scope) is safe.
        retryable: Whether the same call may succeed later.
        status: The HTTP status; None without an answer.
    """

    def __init__(
        self,
        message: str | None = None,
        *,
        acceptance: Literal["rejected", "unknown"] = "rejected",
        retryable: bool = False,
        status: int | None = None,
    ) -> None:
        super().__init__(message, status=status, retryable=retryable)
        self.acceptance = acceptance


class InvalidRequest(EnqueueError, ValueError):
    """What was asked for is over a limit of the backend. Nothing was sent."""


class RunNotFound(TriggerError):
    """The backend has no run with this id."""


class BackendError(TriggerError):
    """The backend refused a request, or could not do it."""
