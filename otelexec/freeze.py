"""
Freezing an outcome: the record's side and the span's side of one ending, which say the same.

Nothing here does I/O. What was encoded when the span started is used again, so that freezing costs a fraction of the
SDK's encoder.
"""

from __future__ import annotations

import logging
import traceback
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan

from otelexec import otlp, semconv
from otelexec.endings import describe, is_interrupted, raised_by_signal_handler
from otelexec.spans import end, is_sampled, lost_members
from otelexec.store.rows import CANCELLED, FAILED, LOST, PAUSED, REJECTED, SPOOL, TIMED_OUT, Frozen, Outcome
from otelexec.store.writes import CloseAttempt, OpenAttempt, RecordObserved, Write

if TYPE_CHECKING:
    from otelexec.endings import Ending
    from otelexec.running import RunningExecution
    from otelexec.runtime import Runtime

logger = logging.getLogger("otelexec.finalize")

ERROR_STATES = frozenset({FAILED, TIMED_OUT, LOST, REJECTED})
"""States whose span has the status ERROR."""

MAX_STACKTRACE_CHARS = 32_768

_UNSET, _ERROR = 0, 2  # opentelemetry.proto.trace.v1.Status.StatusCode


def end_span(execution: RunningExecution, ending: Ending, ended_ns: int) -> None:
    """End the span, once; whatever the user's objects do, it ends."""
    span = execution.span
    if execution.span_ended:
        return
    try:
        if ending.exception is not None:
            # By the clock that the end is by: the SDK's own would put it after the end, outside the span.
            span.add_event(semconv.EXCEPTION_EVENT, _exception_attributes(execution, ending.exception), ended_ns)
        if not execution.runtime.records:
            outer = execution.cores.begun
            span.set_attributes(outcome_attributes(ending.state, ending.classification, ending.error_type, outer=outer))
            if ending.state in ERROR_STATES:
                span.set_status(trace.StatusCode.ERROR, ending.error_message)
    except Exception as error:  # the user's objects may raise anything
        if raised_by_signal_handler(error):
            raise
        logger.exception("otelexec.finalize.span")
    if getattr(span, "end_time", None) is None:
        end(span, ended_ns)
    # Not before: a signal handler that raises in here makes the lifecycle repeat it.
    execution.span_ended = True


def _exception_attributes(execution: RunningExecution, exception: BaseException) -> dict[str, str]:
    """Give what `record_exception` would, for any exception and in a bounded size: receivers refuse large messages."""
    error_type, message = describe(exception, execution.runtime.settings.max_error_chars)
    try:
        stacktrace = "".join(traceback.format_exception(exception))
    except BaseException as error:  # the exception's own attributes may raise anything
        if is_interrupted(error):
            raise
        stacktrace = f"<the traceback could not be made: {type(error).__name__}>"
    if len(stacktrace) > MAX_STACKTRACE_CHARS:
        half = MAX_STACKTRACE_CHARS // 2
        stacktrace = f"{stacktrace[:half]}\n\u2026\n{stacktrace[-half:]}"
    return {semconv.EXCEPTION_TYPE: error_type, semconv.EXCEPTION_MESSAGE: message, semconv.EXCEPTION_STACKTRACE: stacktrace}


def outcome_attributes(state: str, classification: str | None, error_type: str | None, *, outer: bool = False) -> dict[str, Any]:
    """Give the attributes that tell an outcome; the executor around a core has one under a name of its own."""
    attributes: dict[str, Any] = {semconv.OUTER_OUTCOME if outer else semconv.OUTCOME: state}
    if classification is not None:
        attributes[semconv.CLASSIFICATION] = classification
    if error_type is not None:
        attributes[semconv.ERROR_TYPE] = error_type
    return attributes


def status_of(state: str, error_message: str | None) -> tuple[int, str]:
    """Give the OTLP status of a state."""
    return (_ERROR, error_message or "") if state in ERROR_STATES else (_UNSET, "")


def freeze(execution: RunningExecution, ending: Ending, ended_ns: int, *, outer: bool = False, sticky: bool = False) -> Frozen:
    """
    Make the record's and the span's side of one outcome.

    Args:
        execution: What ended.
        ending: How.
        ended_ns: When; on both sides.
        outer: Whether it is the executor around a core: its span does not carry `otelexec.outcome`.
        sticky: Whether somebody asked for the cancellation; else it is what is known here.
    """
    outcome = Outcome(
        state=ending.state,
        ended_unix_ns=ended_ns,
        finalized_by=execution.options.finalized_by,
        classification=ending.classification,
        error_type=ending.error_type,
        error_message=ending.error_message,
        progress=execution.progress_marker,
        output=execution.output,
        snapshot=execution.pause_snapshot if ending.state == PAUSED else None,
        retrying=ending.retrying,
        sticky=ending.state == CANCELLED and (sticky or execution.cancel_requested),
    )
    span = execution.span
    if not isinstance(span, ReadableSpan) or not is_sampled(span):
        return Frozen(outcome, b"")
    attributes = outcome_attributes(ending.state, ending.classification, ending.error_type, outer=outer)
    if not outer and execution.number is not None:
        attributes[semconv.ATTEMPT] = execution.number
        if execution.duplicate:
            attributes[semconv.DUPLICATE] = True
    status = status_of(ending.state, ending.error_message)
    return Frozen(outcome, _request(span, _encode(execution, span, ended_ns, status, attributes)))


def _encode(execution: RunningExecution, span: ReadableSpan, ended_ns: int, status: tuple[int, str], attributes: dict[str, Any]) -> bytes:
    """Encode the ended span; what was encoded when it started is used again unless the user's code changed it."""
    row, started_with = execution.attempt_row.span, execution.start_attributes
    if (
        row is not None
        and started_with == otlp.attributes_of(span)
        and started_with.keys().isdisjoint(attributes)
        and len(span.links) == execution.start_links
        and span.name == execution.name
        and not span.dropped_events
    ):
        return otlp.complete_start(
            row.start, end_unix_ns=ended_ns, attributes=attributes, status_code=status[0], status_message=status[1], events=span.events
        )
    extra = {**lost_members(span, execution.correlation.members()), **attributes}
    return otlp.encode_span(span, end_unix_ns=ended_ns, status=status, extra_attributes=extra)


def _request(span: ReadableSpan, encoded: bytes) -> bytes:
    return otlp.wrap(otlp.encode_resource(span.resource), {otlp.encode_scope(span.instrumentation_scope): [encoded]})


def minimal(runtime: Runtime, execution: RunningExecution, write: CloseAttempt, reason: str) -> CloseAttempt:
    """Make a record that leaves out all that the store may have choked on, and a span that says the same."""
    full, row = write.frozen.outcome, write.attempt
    outcome = Outcome(
        state=full.state,
        ended_unix_ns=full.ended_unix_ns,
        finalized_by="fallback",
        classification=full.classification,
        error_type=full.error_type,
        error_message=(full.error_message or f"record reduced: {reason}")[: runtime.settings.max_error_chars],
        output=full.output if len(full.output or "") <= runtime.settings.max_output_bytes else None,
        retrying=full.retrying,
        sticky=full.sticky,
    )
    request = b""
    span = execution.span
    if row.span is not None and isinstance(span, ReadableSpan):
        code, message = status_of(outcome.state, outcome.error_message)
        encoded = otlp.complete_start(
            row.span.start,
            end_unix_ns=outcome.ended_unix_ns,
            attributes=outcome_attributes(outcome.state, outcome.classification, outcome.error_type),
            status_code=code,
            status_message=message,
        )
        request = _request(span, encoded)
    return replace(write, frozen=Frozen(outcome, request), if_cancelled=None)


def observed(runtime: Runtime, execution: RunningExecution, frozen: Frozen) -> RecordObserved:
    """Make what a lost attempt observed itself: its span under a new id, linked to the one that was written for it."""
    span, row = execution.span, execution.attempt_row
    if not isinstance(span, ReadableSpan) or not is_sampled(span):
        return RecordObserved(row, Frozen(frozen.outcome, b""), None)
    new_id = runtime.id_generator.generate_span_id()
    outcome = frozen.outcome
    attributes: dict[str, Any] = dict(lost_members(span, execution.correlation.members()))
    attributes |= outcome_attributes(outcome.state, outcome.classification, outcome.error_type)
    attributes[semconv.OBSERVED_OF] = f"{span.get_span_context().span_id:016x}"
    encoded = otlp.encode_span(
        span,
        span_id=new_id,
        end_unix_ns=outcome.ended_unix_ns,
        status=status_of(outcome.state, outcome.error_message),
        extra_attributes=attributes,
        extra_links=(trace.Link(span.get_span_context()),),
    )
    return RecordObserved(row, Frozen(outcome, _request(span, encoded)), f"{new_id:016x}")


def for_spool(runtime: Runtime, execution: RunningExecution | None, write: Write) -> Write:
    """Complete a write for the spool: whoever takes it in has no execution to ask, and an open may have got through."""
    if isinstance(write, OpenAttempt):
        return replace(write, repeated=True)
    if isinstance(write, CloseAttempt):
        attempt = replace(write.attempt, repeated=True)
        seen = None if execution is None else observed(runtime, execution, write.frozen)
        cancelled = None if write.if_cancelled is None else _spooled(write.if_cancelled)
        return replace(write, attempt=attempt, frozen=_spooled(write.frozen), if_cancelled=cancelled, observed=seen)
    return write


def _spooled(frozen: Frozen) -> Frozen:
    return Frozen(replace(frozen.outcome, finalized_by=SPOOL), frozen.request)
