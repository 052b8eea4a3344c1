"""How RQ's own exceptions and values end an attempt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from rq.job import Retry
from rq.timeouts import BaseTimeoutException, JobTimeoutException

from otelexec import runtime as _runtime
from otelexec.classification import INTERRUPTED, INTERRUPTIONS
from otelexec.endings import Classifier, Ending, describe, is_interrupted, raised_by_signal_handler
from otelexec.errors import ExecutionCancelled
from otelexec.store.rows import CANCELLED, FAILED, LOST, TIMED_OUT

RETRY: Final = "retry"
ABANDONED: Final = "abandoned"
TIMEOUT: Final = "timeout"

_RETRY_TYPE: Final = "rq.job.Retry"
_TIMEOUT_TYPE: Final = "rq.timeouts.JobTimeoutException"
_ABANDONED_TYPE: Final = "rq.exceptions.AbandonedJobError"


def classifier(job: Any, is_stopped: Callable[[], bool], *, may_retry: bool = True) -> Classifier:
    """
    Make the classifier of one attempt.

    Args:
        job: The job, which knows how many retries it has left.
        is_stopped: Tells whether `stop-job` was asked for.
        may_retry: Whether RQ runs it again at all: a synchronous queue never does.
    """

    def classify(error: BaseException) -> Ending | None:
        if is_stopped():
            error_type, message = _described(error)
            return Ending(CANCELLED, None, error_type, message, error)
        retrying = may_retry and _has_retries(job)
        classification = RETRY if retrying else None
        if isinstance(error, JobTimeoutException):
            error_type, message = _described(error)
            return Ending(TIMED_OUT, classification or TIMEOUT, error_type, message, error, retrying=retrying)
        unasked = isinstance(error, INTERRUPTIONS)
        interrupted = (unasked or isinstance(error, SystemExit)) and is_interrupted(error)
        if _is_shutdown(error) or (interrupted and retrying):
            error_type, message = _described(error)
            return Ending(CANCELLED, INTERRUPTED, error_type, message, error, retrying=retrying, depends_on_cancellation=True)
        # RQ takes an exit for a failure, with code 0 as well, and whatever else the job raises of its own.
        if interrupted or not (retrying or unasked or isinstance(error, SystemExit)):
            return None
        error_type, message = _described(error)
        # An execution that was cancelled before it started has no event: nothing was raised in it.
        exception = None if isinstance(error, ExecutionCancelled) else error
        return Ending(FAILED, classification, error_type, message, exception, retrying=retrying, depends_on_cancellation=unasked)

    return classify


def _has_retries(job: Any) -> bool:
    left = getattr(job, "retries_left", None)
    return isinstance(left, int) and left > 0


def returned(job: Any, value: Any, *, may_retry: bool = True) -> Ending | None:
    """
    Give the ending of a function that returned a `Retry`; None for any other value.

    Args:
        job: The job.
        value: What it returned.
        may_retry: Whether RQ runs it again at all.
    """
    if not isinstance(value, Retry):
        return None
    done = job.number_of_retries or 0
    more = may_retry and (not done or done < value.max)  # as `handle_job_retry` decides
    text = (
        f"asked to be run again: retry {done + 1} of {value.max}" if more else f"asked to be run again after {value.max} retries, the last"
    )
    return Ending(FAILED, RETRY, _RETRY_TYPE, text, retrying=more)


def overdue(timeout_seconds: float) -> Ending:
    """Give the ending of a horse that the worker killed, since its job did not heed its timeout."""
    return Ending(TIMED_OUT, TIMEOUT, _TIMEOUT_TYPE, f"killed, as it did not heed its timeout of {timeout_seconds:g} s")


def abandoned() -> Ending:
    """Give the ending of a job that no worker holds any more."""
    return Ending(LOST, ABANDONED, _ABANDONED_TYPE, "the worker that ran it is gone")


def passes(error: BaseException) -> bool:
    """Tell what must get out of our code: what a signal handler raised, and a timeout, which `TimerDeathPenalty` raises without one."""
    return isinstance(error, BaseTimeoutException) or raised_by_signal_handler(error)


def _described(error: BaseException) -> tuple[str, str]:
    return describe(error, _runtime.settings().max_error_chars)


def _is_shutdown(error: BaseException) -> bool:
    # Without an import: it left the public modules in some versions.
    return type(error).__name__ == "ShutDownImminentException" and type(error).__module__.startswith("rq.")
