"""How code ended, from what it returned or raised, what it told its handle, and who asked for what."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from otelexec.endings import RETURNED, Ending, describe, raised_by_signal_handler
from otelexec.errors import ExecutionCancelled
from otelexec.store.rows import CANCELLED, FAILED, PAUSED, REJECTED, SUCCEEDED, TIMED_OUT

if TYPE_CHECKING:
    from otelexec.running import RunningExecution

logger = logging.getLogger("otelexec.execution")

INTERRUPTED = "interrupted"

INTERRUPTIONS = (asyncio.CancelledError, KeyboardInterrupt, GeneratorExit, ExecutionCancelled)
"""What says that somebody wanted the code to end, not that it failed."""


def classify(execution: RunningExecution, exception: BaseException | None) -> Ending:
    """
    Classify how the code of an execution ended.

    Args:
        execution: The execution.
        exception: What its code raised; None when it returned.
    """
    ending = _returned(execution) if exception is None else _raised(execution, exception)
    if execution.options.cancel_wins and exception is not None and ending.state in (FAILED, TIMED_OUT):
        asked = execution.cancel_requested
        ending = replace(ending, state=CANCELLED) if asked else replace(ending, depends_on_cancellation=True)
    if execution.retries_sent and ending.state not in (SUCCEEDED, PAUSED):
        ending = replace(ending, retrying=True)
    return ending


def _returned(execution: RunningExecution) -> Ending:
    if execution.pause_reason is not None:
        if execution.snapshot_error is not None:
            return Ending(FAILED, "snapshot_not_stored", "snapshot_not_stored", execution.snapshot_error)
        return Ending(PAUSED, execution.pause_reason)
    if execution.rejection is not None:
        return Ending(REJECTED, None, execution.rejection, execution.rejection)
    if execution.options.cancel_wins:
        return Ending(CANCELLED) if execution.cancel_requested else Ending(SUCCEEDED, depends_on_cancellation=True)
    return RETURNED


def _raised(execution: RunningExecution, exception: BaseException) -> Ending:
    # What our own limit stopped is nobody else's to judge: a TimeoutError of the code's own looks the same.
    known = None if execution.timed_out else _known(execution, exception)
    if known is not None and known.depends_on_cancellation and execution.cancel_requested:
        return replace(known, state=CANCELLED, classification=None)
    if known is not None:
        return known
    error_type, message = describe(exception, execution.runtime.settings.max_error_chars)
    if execution.timed_out:
        limit = execution.options.timeout
        return Ending(TIMED_OUT, None, "TimeoutError", f"stopped after its timeout of {limit:g} s", exception)
    exits = isinstance(exception, SystemExit)
    stopped = exits and raised_by_signal_handler(exception)
    if stopped or isinstance(exception, INTERRUPTIONS):
        asked = execution.cancel_requested
        return Ending(CANCELLED, None if asked else INTERRUPTED, error_type, message, depends_on_cancellation=not asked)
    if exits and getattr(exception, "code", None) in (None, 0):
        return Ending(SUCCEEDED)
    return Ending(FAILED, None, error_type, message, exception)


def _known(execution: RunningExecution, exception: BaseException) -> Ending | None:
    """Ask the executor's own classifier, or a core's outer one; it may fail like any other code."""
    outer = execution.outer.options.classify if execution.outer is not None else None
    classifier = execution.options.classify or outer
    if classifier is None:
        return None
    try:
        ending = classifier(exception)
    except Exception as error:
        if raised_by_signal_handler(error):
            raise
        logger.exception("otelexec.execution.classify: %s", execution.name)
        return None
    if ending is None or isinstance(ending, Ending):
        return ending
    logger.error("otelexec.execution.classify: %s: a classifier gives an Ending or None, not %r", execution.name, ending)
    return None
