"""How Celery's own exceptions end an attempt."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from typing import Any, Final

from billiard.einfo import ExceptionWithTraceback
from celery.exceptions import Ignore, Reject, Retry, SoftTimeLimitExceeded
from celery.utils.serialization import UnpickleableExceptionWrapper
from kombu.utils.encoding import safe_repr

from otelexec import runtime as _runtime
from otelexec.classification import INTERRUPTED, INTERRUPTIONS
from otelexec.endings import Classifier, Ending, describe, is_interrupted, raised_by_signal_handler
from otelexec.errors import ExecutionCancelled
from otelexec.store.rows import CANCELLED, FAILED, REJECTED, SUCCEEDED, TIMED_OUT

RETRY: Final = "retry"
IGNORED: Final = "ignored"
REQUEUED: Final = "requeued"
SOFT_LIMIT: Final = "soft_limit"
HARD_LIMIT: Final = "hard_limit"
EXPIRED: Final = "expired"
UNKNOWN_TASK: Final = "unknown_task"
MALFORMED: Final = "malformed"
DEDUPLICATED: Final = "deduplicated"
RESULT_NOT_STORED: Final = "result_not_stored"
CALLBACKS_NOT_SENT: Final = "callbacks_not_sent"
HANDLER_FAILED: Final = "handler_failed"

HARD_LIMIT_ERROR: Final = "billiard.exceptions.TimeLimitExceeded"

_EARLY_SECONDS: Final = 0.5
"""The limit's clock starts with the acceptance, a little before the body's; a signal this early is still the limit's."""

_SENDING: Final = {"_dispatch_callbacks_and_chain", "_retry_publish", "apply_async", "maybe_signature"}
"""What a tracer calls for callbacks and the next task of a chain, in the versions that are supported."""

_HANDLERS: Final = {"on_success", "after_return"}
"""What a tracer calls of a task's own."""


def classifier(hard_limit_seconds: float | None, soft_limit_seconds: float | None = None, *, requeues: bool = False) -> Classifier:
    """
    Make the classifier of one attempt.

    Args:
        hard_limit_seconds: The task's hard limit, counted from now; None without one.
        soft_limit_seconds: Its soft limit, as well.
        requeues: Whether a message that the task wants back in its queue gets there: one that is acknowledged already doesn't.
    """
    if hard_limit_seconds is None and soft_limit_seconds is None and requeues:
        return classify
    earliest = time.monotonic() - _EARLY_SECONDS

    def is_due(seconds: float | None) -> bool:
        return seconds is not None and time.monotonic() >= earliest + seconds

    def with_limits(error: BaseException) -> Ending | None:
        if isinstance(error, SystemExit) and is_due(hard_limit_seconds) and raised_by_signal_handler(error):
            return hard_limit(hard_limit_seconds)
        ending = classify(error)
        if isinstance(error, Reject) and ending is not None:
            return replace(ending, retrying=ending.retrying and requeues)
        if isinstance(error, SoftTimeLimitExceeded) and ending is not None and is_due(soft_limit_seconds):
            return replace(ending, depends_on_cancellation=False)
        return ending

    return with_limits


def hard_limit(seconds: float | None) -> Ending:
    """Give the ending of a task that was stopped at its hard limit."""
    return Ending(TIMED_OUT, HARD_LIMIT, HARD_LIMIT_ERROR, f"stopped at its hard time limit of {seconds:g} s" if seconds else None)


def classify(error: BaseException) -> Ending | None:
    """Give the ending of an exception that Celery knows; None leaves it to the default."""
    if isinstance(error, Retry):
        cause = _cause_of(error)
        error_type, message = _described(cause)
        if isinstance(cause, UnpickleableExceptionWrapper):
            error_type = f"{cause.exc_module}.{cause.exc_cls_name}"
        return Ending(FAILED, RETRY, error_type, message, cause if cause is not error else None, retrying=True)
    if isinstance(error, Reject):
        error_type, message = _described(error)
        requeue = bool(error.requeue)
        return Ending(REJECTED, REQUEUED if requeue else None, error_type, message, retrying=requeue)
    if isinstance(error, Ignore):
        return Ending(SUCCEEDED, IGNORED)
    if isinstance(error, SoftTimeLimitExceeded):
        error_type, message = _described(error)
        # `revoke(terminate=True, signal="SIGUSR1")` raises it as well, whatever the limit is.
        return Ending(TIMED_OUT, SOFT_LIMIT, error_type, message, error, depends_on_cancellation=True)
    if isinstance(error, (*INTERRUPTIONS, SystemExit)) and not is_interrupted(error):
        return _unasked(error)
    return None if isinstance(error, Exception) else _of_greenlets(error)


def _unasked(error: BaseException) -> Ending:
    """
    Give the ending of an exit, or of what speaks of a cancellation.

    Celery has no cancellation of its own, so where nobody asked for one the task failed. An exit costs it a child, with code 0 as well.
    """
    error_type, message = _described(error)
    # An execution that was cancelled before it started has no event: nothing was raised in it.
    exception = None if isinstance(error, ExecutionCancelled) else error
    return Ending(FAILED, None, error_type, message, exception, depends_on_cancellation=not isinstance(error, SystemExit))


def after_success(error: BaseException) -> str:
    """
    Tell what went wrong once the body had returned: to send what follows, to store the result, or a handler of the task's own.

    All may raise the same, so it is the function that Celery's tracer had called that tells.
    """
    caller, traceback = "", error.__traceback__
    while traceback is not None:
        name = traceback.tb_frame.f_code.co_name
        if caller == "trace_task" and name in _SENDING:
            return CALLBACKS_NOT_SENT
        if caller == "trace_task" and name in _HANDLERS:
            return HANDLER_FAILED
        caller, traceback = name, traceback.tb_next
    return RESULT_NOT_STORED


def error_of(exc_info: Any) -> Any:
    """Give the exception of an `ExceptionInfo`, without what billiard wraps it in on its way between processes."""
    error = exc_info.exception
    return error.exc if isinstance(error, ExceptionWithTraceback) else error


def _described(error: BaseException) -> tuple[str, str]:
    return describe(error, _runtime.settings().max_error_chars)


def _cause_of(retry: Retry) -> BaseException:
    """Give what a retry was asked for: of an exception that can't be pickled it holds only a stand-in."""
    handled: BaseException | None = retry.__context__
    if handled is not None and safe_repr(handled) == retry.excs:  # type: ignore[no-untyped-call] # kombu is untyped
        return handled
    held: object = retry.exc
    return held if isinstance(held, BaseException) else retry


def _of_greenlets(error: BaseException) -> Ending | None:
    """Give the ending of what gevent and eventlet stop their greenlets with."""
    error_type, message = _described(error)
    if _is(error, "greenlet", "GreenletExit"):
        return Ending(CANCELLED, INTERRUPTED, error_type, message, depends_on_cancellation=True)
    if _is(error, "gevent", "Timeout") or _is(error, "eventlet", "Timeout"):
        return Ending(TIMED_OUT, HARD_LIMIT, error_type, message)
    return None


def _is(error: BaseException, module: str, name: str) -> bool:
    # Without an import: nobody who does not use them has them.
    cls = getattr(sys.modules.get(module), name, None)
    return isinstance(cls, type) and isinstance(error, cls)
