"""What the sending side records: a message that leaves, a request that is turned away, a wish to cancel."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import Link, SpanKind

from otelexec import runtime as _runtime
from otelexec import semconv
from otelexec.blocks import Block
from otelexec.classification import classify
from otelexec.context import EXECUTION_KEY, SCOPE_KEY, current_execution
from otelexec.correlation import Correlation, Scope, near_scope, running, with_ambient
from otelexec.effects import run
from otelexec.endings import describe
from otelexec.errors import CorrelationError
from otelexec.finalize import finalize, persist
from otelexec.ids import normalize_id
from otelexec.lifecycle import Call, Steps, begin, execution_row
from otelexec.options import Options
from otelexec.propagation import outgoing
from otelexec.running import RunningExecution
from otelexec.spans import end, request_of, row_of
from otelexec.store.rows import CANCELLED, REJECTED, Cancellation, Outcome, SpanRow
from otelexec.store.writes import AddSpans, NameMessage, RecordQueued, RefuseQueued, RequestCancel
from otelexec.w3c import clean

if TYPE_CHECKING:
    from otelexec.runtime import Runtime
    from otelexec.store.writes import Write


class Message:
    """
    A message on its way to a queue.

    Attributes:
        correlation: The ids that it carries: what `inject*` writes inside the block.
        message_id: What the backend calls it; None as long as that is not known.
    """

    __slots__ = ("_span", "correlation", "message_id", "unknown")

    def __init__(self, correlation: Correlation, span: trace.Span, message_id: str | None = None) -> None:
        self.correlation = correlation
        self.message_id = message_id
        self.unknown = False
        self._span = span

    @property
    def id(self) -> str:
        """The execution id that it carries."""
        return self.correlation.execution_id

    def set_message_id(self, message_id: str) -> None:
        """Name the message as the backend knows it, once it does."""
        self.message_id = message_id
        self._span.set_attribute(semconv.MESSAGING_MESSAGE_ID, message_id)

    def acceptance_unknown(self) -> None:
        """Say that nobody knows whether the backend has the message: an exception then leaves it `queued`."""
        self.unknown = True


class publish(Block[Message]):  # noqa: N801 (read as a verb: `with publish(...)`)
    """
    Record that work leaves for a queue: a PRODUCER span, and a `queued` record that is committed before it leaves.

    The block gets a `Message`. Inside, `inject*` carries the message's own execution id and the PRODUCER span. An `Exception` means that
    the backend refused: the record is closed as `rejected`, and the exception goes on. It stays `queued` after `acceptance_unknown()`,
    and where an interruption such as KeyboardInterrupt ends the block.

    Args:
        name: Name of the execution that the message asks for.
        destination: The queue's name; None when it has none.
        system: The queue's system, such as `celery`; None when it has no name.
        operation: What is done, as the backend calls it (messaging semantic conventions 1.44.0).
        message_id: The message's own id; None when it is not known yet.
        attributes: Further span attributes.
        links: Further span links.
        retry: Whether the message asks for another attempt at the running execution.
    """

    def __init__(
        self,
        name: str,
        *,
        destination: str | None = None,
        system: str | None = None,
        operation: str = "send",
        message_id: str | None = None,
        attributes: Mapping[str, Any] | None = None,
        links: tuple[Link, ...] = (),
        retry: bool = False,
    ) -> None:
        super().__init__()
        self._name = clean(str(name))
        self._span_name = operation if destination is None else f"{operation} {destination}"
        self._links = links
        self._retry = retry
        self._message_id = message_id
        known = {
            semconv.MESSAGING_SYSTEM: system,
            semconv.MESSAGING_OPERATION_NAME: operation,
            semconv.MESSAGING_OPERATION_TYPE: "send",
            semconv.MESSAGING_DESTINATION_NAME: destination,
            semconv.MESSAGING_MESSAGE_ID: message_id,
        }
        self._attributes = {key: value for key, value in known.items() if value is not None} | dict(attributes or {})

    def _lifecycle(self, runtime: Runtime) -> Steps:
        base = otel_context.get_current()
        correlation = outgoing(base, retry=self._retry)
        started = time.time_ns()
        clock = time.perf_counter_ns()
        attributes = {**correlation.members(), **self._attributes}
        scope = near_scope(base)
        links = self._links if scope is None else (*self._links, *scope.links)
        span = runtime.start_span(self._span_name, base, SpanKind.PRODUCER, attributes, links, started)
        patience = runtime.settings.open_timeout_seconds
        row = row_of(span, correlation.members()) if runtime.records else None
        if runtime.records:
            execution = execution_row(self._name, correlation, self._message_id)
            queued = RecordQueued(execution, row, runtime.process_id, started, runtime.open_ancestors(base))
            yield from persist(runtime.journal, queued, durable=False, patience_seconds=patience)
            runtime.heartbeat.ensure()
        message = Message(correlation, span, self._message_id)
        dropped = None
        try:
            raised = yield Call(message, _message_context(base, correlation, span, self._message_id))
        except GeneratorExit as error:  # nobody is there any more who would perform an effect
            raised = dropped = error
        ended = started + time.perf_counter_ns() - clock
        error_type, error_message = (None, None)
        if raised is not None:
            error_type, error_message = describe(raised, runtime.settings.max_error_chars)
            span.set_attribute(semconv.ERROR_TYPE, error_type)
            span.set_status(trace.StatusCode.ERROR, error_message)
        end(span, ended)
        refused = isinstance(raised, Exception) and not message.unknown
        if refused and self._retry and (retried := running(base)) is not None:
            retried.mark_retry_refused()
        if runtime.records:
            spans = _spans_of(runtime, correlation, span, row)
            if refused:
                outcome = Outcome(REJECTED, ended, "publisher", error_type=error_type, error_message=error_message)
                refusal = RefuseQueued(correlation.execution_id, outcome, spans)
                yield from persist(runtime.journal, refusal, durable=True, patience_seconds=patience)
            else:
                for write in self._after(message, spans):
                    if runtime.journal.spooling and dropped is None:
                        yield from persist(runtime.journal, write, durable=False, patience_seconds=patience)
                    else:
                        # The message has left; a commit of its own for its end would cost as much as the record did.
                        runtime.journal.defer(write)
        if dropped is not None:
            raise dropped

    def _after(self, message: Message, spans: AddSpans) -> Iterator[Write]:
        """Give what is written once the message has left."""
        if message.message_id is not None and message.message_id != self._message_id:
            yield NameMessage(message.id, message.message_id)
        if spans:
            yield spans


def _spans_of(runtime: Runtime, correlation: Correlation, span: trace.Span, row: SpanRow | None) -> AddSpans:
    """Give what writes the end of the PRODUCER span."""
    recorded: tuple[tuple[SpanRow, bytes], ...] = ()
    if row is not None and isinstance(span, ReadableSpan):
        recorded = ((row, request_of((span,), runtime.resource, correlation.members())),)
    return AddSpans(recorded=recorded, execution_id=correlation.execution_id, process_id=runtime.process_id)


def _message_context(
    base: otel_context.Context, correlation: Correlation, span: trace.Span, message_id: str | None
) -> otel_context.Context:
    """Make the context of the block: a scope of the message's own, so that the first `inject*` in it takes its id."""
    context = with_ambient(base, correlation, correlation.parent_execution_id)
    context = trace.set_span_in_context(span, context)
    context = otel_context.set_value(SCOPE_KEY, Scope(correlation, message_id=message_id), context)
    return otel_context.set_value(EXECUTION_KEY, None, context)


def reject(reason: str, *, name: str = "rejected") -> str:
    """
    Record that work was turned away before it ran: a terminal, correlated record with a span.

    Inside an open execution it makes that execution's attempt end as `rejected` once its code returns.

    Args:
        reason: Why; short and the same each time, since it is `error.type`.
        name: Name of the record; outside an execution only.

    Returns:
        The execution id of the record.
    """
    current = current_execution()
    if isinstance(current, RunningExecution) and current.is_open:
        current.rejection = reason
        return current.id
    runtime = _runtime.get()
    execution, _ = begin(runtime, Options(name, finalized_by="reject"))
    execution.rejection = reason
    ended_ns = execution.started_unix_ns + time.perf_counter_ns() - execution.clock_started_ns
    run(runtime, finalize(runtime, execution, classify(execution, None), ended_ns))
    return execution.id


def request_cancel(execution_id: str, *, terminate: bool | None = None) -> str | None:
    """
    Ask for an execution to be cancelled, in whatever process it runs or will run.

    The wish is durable when this returns, in the spool where the store is away. An attempt that has not started is not called; a
    running one sees `.cancel_requested`; one that has succeeded stays so, and the request changes nothing. Without a store it does nothing.

    Args:
        execution_id: Which.
        terminate: True: also stop what can be stopped (coroutines, and what a backend can stop); False: only tell
            it; None: the backend's habit, which is to tell it here.

    Returns:
        The execution's state; None when nobody has heard of it yet, when the wish is in the spool, and without a store.

    Raises:
        CorrelationError: This is no execution id.
    """
    given: object = execution_id  # from code without types it may be the None of a search that found nothing
    if not isinstance(given, str) or not given:
        raise CorrelationError(f"request_cancel() takes an execution id, not {execution_id!r}")
    execution_id, _ = normalize_id(execution_id)
    runtime = _runtime.get()
    if not runtime.records:
        return None
    wish = Cancellation(time.time_ns(), terminate)
    state = runtime.journal.write(RequestCancel(execution_id, wish), durable=True)
    for execution in list(runtime.executions.values()):
        if execution.id == execution_id:
            execution.cancelled_by(wish)
    return state if isinstance(state, str) else None


def settle_queued(execution_id: str) -> None:
    """
    Close the record of an execution whose message its backend took back, if nobody has begun it: as `cancelled`, for good.

    Args:
        execution_id: Which.
    """
    runtime = _runtime.get()
    if runtime.records:
        runtime.journal.write(RefuseQueued(execution_id, Outcome(CANCELLED, time.time_ns(), "publisher", sticky=True)), durable=True)
