"""
The join: the terminal record and the span that says the same, in one transaction.

First the store, retried with backoff for a bounded time; then a minimal record, if the store refuses the full one;
then the fsynced spool; then one CRITICAL log line with everything, kept in memory as well. The user's result and
exception are never touched by any of it.
"""

from __future__ import annotations

import logging
import random
import time
import traceback
from collections.abc import Generator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan

from otelexec import otlp, semconv
from otelexec.effects import Block, Commit, Effect, Sleep
from otelexec.errors import StoreError, StoreRejected
from otelexec.execution import describe, raised_by_signal_handler
from otelexec.store.base import (
    CANCELLED,
    FAILED,
    LOST,
    PAUSED,
    REJECTED,
    TIMED_OUT,
    CloseAttempt,
    Closed,
    CloseOuter,
    Frozen,
    OpenAttempt,
    Outcome,
    RecordObserved,
    Write,
)

if TYPE_CHECKING:
    from otelexec.execution import Ending, Execution
    from otelexec.runtime import Runtime

logger = logging.getLogger("otelexec.finalize")

ERROR_STATES = frozenset({FAILED, TIMED_OUT, LOST, REJECTED})
"""States whose span has the status ERROR."""

FIRST_BACKOFF_SECONDS = 0.01
LAST_BACKOFF_SECONDS = 0.5

MAX_STACKTRACE_CHARS = 32_768

_UNSET, _ERROR = 0, 2  # opentelemetry.proto.trace.v1.Status.StatusCode


@dataclass(frozen=True, slots=True)
class Kept:
    """
    The store could not take a write.

    Attributes:
        durable: Whether the spool has it on disk; else it is in the log and in memory.
    """

    durable: bool


def persist(runtime: Runtime, write: Write, *, durable: bool, patience_seconds: float) -> Generator[Effect, Any, object]:
    """
    Bring a write into the store, or else keep it where it will be found.

    Args:
        runtime: The runtime of this process.
        write: What to write.
        durable: Whether it must survive power loss.
        patience_seconds: How long to try the store.

    Returns:
        The store's result; StoreRejected when the store refused this write; Kept when it is in the spool.
    """
    deadline = time.monotonic() + patience_seconds
    backoff = FIRST_BACKOFF_SECONDS
    # Once something is in the spool all else goes there until it is taken in, so that the order stays.
    while not runtime.spooling:
        left = deadline - time.monotonic()
        answer = yield Commit(write, durable, max(left, 0.001))
        if not isinstance(answer, StoreError) or isinstance(answer, StoreRejected):
            return answer
        left = deadline - time.monotonic()
        if left <= 0:
            runtime.store_failed(answer)
            break
        if isinstance(write, OpenAttempt):
            write = replace(write, repeated=True)  # a store may fail after it has committed
        yield Sleep(min(left, backoff * random.uniform(0.5, 1.0)))  # noqa: S311 (jitter)
        backoff = min(2 * backoff, LAST_BACKOFF_SECONDS)
    kept: Kept = yield Block(partial(runtime.keep, write, durable=durable))
    return kept


def finalize(runtime: Runtime, execution: Execution, ending: Ending, ended_ns: int) -> Generator[Effect, Any, bool]:
    """
    Close an attempt and its span together. May be repeated: the token makes it idempotent.

    Args:
        runtime: The runtime of this process.
        execution: What ended.
        ending: How.
        ended_ns: When, in nanoseconds since 1970.

    Returns:
        Whether its record is durable.
    """
    execution.closed = True
    end_span(execution, ending, ended_ns)
    if not runtime.records:
        return False
    write = execution.closing or _closing(runtime, execution, ending, ended_ns)
    execution.closing = write
    patience = runtime.settings.finalize_timeout_seconds
    # The end of an outer executor is no promise: the core's success stands whatever becomes of it.
    durable = isinstance(write, CloseAttempt)
    answer = yield from persist(runtime, write, durable=durable, patience_seconds=patience)
    if isinstance(answer, StoreRejected) and isinstance(write, CloseAttempt):
        logger.error("otelexec.finalize.fallback: %s", answer)
        write = _minimal(runtime, execution, write, str(answer))
        answer = yield from persist(runtime, write, durable=True, patience_seconds=patience)
    if isinstance(answer, StoreRejected):
        runtime.cry(write, answer)
        return False
    if isinstance(answer, Kept):
        return answer.durable
    if isinstance(answer, Closed):
        execution.number = answer.number
        if not answer.won:
            yield from _lost(runtime, execution, write, answer)
    return True


def _lost(runtime: Runtime, execution: Execution, write: Any, closed: Closed) -> Generator[Effect, Any, None]:
    logger.warning(
        "otelexec.finalize.lost_race: execution %s attempt %d is %s already, recorded by %s; this attempt ended %s",
        execution.id,
        closed.number,
        closed.state,
        closed.finalized_by,
        write.frozen.outcome.state,
        extra={"otelexec_state": closed.state, "otelexec_finalized_by": closed.finalized_by},
    )
    if closed.state == LOST:
        observed = _observed(runtime, execution, write.frozen)
        yield from persist(runtime, observed, durable=True, patience_seconds=runtime.settings.finalize_timeout_seconds)


def end_span(execution: Execution, ending: Ending, ended_ns: int) -> None:
    """End the span, once; whatever the user's objects do, it ends."""
    span = execution.span
    if execution.span_ended:
        return
    try:
        if ending.exception is not None:
            span.add_event(semconv.EXCEPTION_EVENT, _exception_attributes(execution, ending.exception))
        if not execution.records:
            span.set_attributes(outcome_attributes(ending.state, ending.classification, ending.error_type))
            if ending.state in ERROR_STATES:
                span.set_status(trace.StatusCode.ERROR, ending.error_message)
    except Exception as error:  # the user's objects may raise anything
        if raised_by_signal_handler(error):
            raise
        logger.exception("otelexec.finalize.span")
    span.end(end_time=ended_ns)
    # Not before: a signal handler that raises in here makes the lifecycle repeat it.
    execution.span_ended = True


def _exception_attributes(execution: Execution, exception: BaseException) -> dict[str, str]:
    """Give what `record_exception` would, for any exception and in a bounded size: receivers refuse large messages."""
    error_type, message = describe(exception, execution.max_error_chars)
    try:
        stacktrace = "".join(traceback.format_exception(exception))
    except Exception as error:  # the exception's own attributes may raise anything
        stacktrace = f"<the traceback could not be made: {type(error).__name__}>"
    if len(stacktrace) > MAX_STACKTRACE_CHARS:
        half = MAX_STACKTRACE_CHARS // 2
        stacktrace = f"{stacktrace[:half]}\n\u2026\n{stacktrace[-half:]}"
    return {semconv.EXCEPTION_TYPE: error_type, semconv.EXCEPTION_MESSAGE: message, semconv.EXCEPTION_STACKTRACE: stacktrace}


def outcome_attributes(state: str, classification: str | None, error_type: str | None) -> dict[str, Any]:
    """Give the attributes that tell an outcome."""
    attributes: dict[str, Any] = {semconv.OUTCOME: state}
    if classification is not None:
        attributes[semconv.CLASSIFICATION] = classification
    if error_type is not None:
        attributes[semconv.ERROR_TYPE] = error_type
    return attributes


def status_of(state: str, error_message: str | None) -> tuple[int, str]:
    """Give the OTLP status of a state."""
    return (_ERROR, error_message or "") if state in ERROR_STATES else (_UNSET, "")


def _closing(runtime: Runtime, execution: Execution, ending: Ending, ended_ns: int) -> CloseAttempt | CloseOuter:
    children = runtime.collector.take_children(execution, runtime.process_id)
    row = execution.attempt_row
    if execution.had_core:
        return CloseOuter(
            execution_id=execution.id,
            outer_token=execution.token,
            frozen=freeze(execution, ending, ended_ns, outer=True),
            spans=children,
            retrying=ending.retrying,
        )
    depends = ending.depends_on_cancellation and not execution.cancel_requested
    if_cancelled = replace(ending, state=CANCELLED, classification=None) if depends else None
    return CloseAttempt(
        attempt=row,
        number=execution.number,
        frozen=freeze(execution, ending, ended_ns),
        if_cancelled=None if if_cancelled is None else freeze(execution, if_cancelled, ended_ns, sticky=True),
        nonce=f"{runtime.process_id}:{execution.token}",
        spans=children,
    )


def freeze(execution: Execution, ending: Ending, ended_ns: int, *, outer: bool = False, sticky: bool = False) -> Frozen:
    """
    Make the record's and the span's side of one outcome.

    Args:
        execution: What ended.
        ending: How.
        ended_ns: When; on both sides.
        outer: Whether it is the executor around a core: its span does not carry `otelexec.outcome`.
        sticky: Whether somebody asked for the cancellation; else it is what the handle knows.
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
    if not isinstance(span, ReadableSpan):
        return Frozen(outcome, b"")
    attributes = outcome_attributes(ending.state, ending.classification, ending.error_type)
    if outer:
        attributes[semconv.OUTER_OUTCOME] = attributes.pop(semconv.OUTCOME)
    elif execution.number is not None:
        attributes[semconv.ATTEMPT] = execution.number
        if execution.duplicate:
            attributes[semconv.DUPLICATE] = True
    status = status_of(ending.state, ending.error_message)
    return Frozen(outcome, _request(span, _encode(execution, span, ended_ns, status, attributes)))


def _encode(execution: Execution, span: ReadableSpan, ended_ns: int, status: tuple[int, str], attributes: dict[str, Any]) -> bytes:
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
    return otlp.encode_span(span, end_unix_ns=ended_ns, status=status, extra_attributes=attributes)


def _request(span: ReadableSpan, encoded: bytes) -> bytes:
    return otlp.wrap(otlp.encode_resource(span.resource), {otlp.encode_scope(span.instrumentation_scope): [encoded]})


def _minimal(runtime: Runtime, execution: Execution, write: CloseAttempt, reason: str) -> CloseAttempt:
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


def _observed(runtime: Runtime, execution: Execution, frozen: Frozen) -> RecordObserved:
    """Make what a lost attempt observed itself: its span under a new id, linked to the one that was written for it."""
    span, row = execution.span, execution.attempt_row
    if not isinstance(span, ReadableSpan):
        return RecordObserved(row, Frozen(frozen.outcome, b""), None)
    new_id = runtime.id_generator.generate_span_id()
    outcome = frozen.outcome
    attributes = outcome_attributes(outcome.state, outcome.classification, outcome.error_type)
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


def for_spool(runtime: Runtime, execution: Execution | None, write: Write) -> Write:
    """Complete a write for the spool: whoever takes it in has no execution to ask, and an open may have got through."""
    if isinstance(write, OpenAttempt):
        return replace(write, repeated=True)
    if isinstance(write, CloseAttempt):
        attempt = replace(write.attempt, repeated=True)
        outcome = replace(write.frozen.outcome, finalized_by="spool")
        observed = None if execution is None else _observed(runtime, execution, write.frozen)
        # What the process knew when it wrote this decides: a cancellation asked for later came too late.
        return replace(write, attempt=attempt, frozen=Frozen(outcome, write.frozen.request), if_cancelled=None, observed=observed)
    return write
