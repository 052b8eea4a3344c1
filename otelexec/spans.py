"""
The tracer provider of our own, the processor that captures ended spans, and the id generator.

Execution, outer and PRODUCER spans come from this provider alone, so that no exporter ever sees them apart from their
record. Child spans of our provider are collected under their execution and committed with it.
"""

from __future__ import annotations

import concurrent.futures.thread  # noqa: F401 (it can't be imported any more once the main thread has ended)
import contextlib
import logging
import os
import socket
import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.sdk.environment_variables import OTEL_EXPERIMENTAL_RESOURCE_DETECTORS
from opentelemetry.sdk.resources import (
    TELEMETRY_SDK_LANGUAGE,
    TELEMETRY_SDK_NAME,
    TELEMETRY_SDK_VERSION,
    OTELResourceDetector,
    Resource,
)
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, Tracer, TracerProvider
from opentelemetry.sdk.trace import Span as SdkSpan
from opentelemetry.sdk.trace.id_generator import IdGenerator, RandomIdGenerator

from otelexec import otlp, semconv
from otelexec.context import EXECUTION_KEY
from otelexec.endings import raised_by_signal_handler
from otelexec.ids import mint_nonce, random_word
from otelexec.running import RunningExecution
from otelexec.store.rows import SpanRow
from otelexec.store.writes import NO_SPANS, AddSpans

if TYPE_CHECKING:
    from opentelemetry.context import Context

logger = logging.getLogger("otelexec.spans")

MAX_OPEN_SPANS = 100_000
"""Open spans that are remembered; beyond it the oldest are taken for leaked and forgotten."""


class SecureIdGenerator(IdGenerator):
    """
    Ids from the operating system.

    The SDK's own generator draws from the `random` module, so that a task that calls `random.seed()` repeats the ids of
    the one before.
    """

    def generate_span_id(self) -> int:
        """Give 64 random bits, never 0."""
        return random_word() or 1

    def generate_trace_id(self) -> int:
        """Give 128 random bits, never 0."""
        return random_word() << 64 | random_word() or 1

    def is_trace_id_random(self) -> bool:
        """Say that the random flag may be set (W3C Trace Context level 2, section 3.3.2)."""
        return True


class _TheirTraceIds(SecureIdGenerator):
    """Trace ids of the user's own generator, whose form a backend may need (AWS X-Ray); nothing needs a form of span ids."""

    def __init__(self, theirs: IdGenerator) -> None:
        self._theirs = theirs

    def generate_trace_id(self) -> int:
        return self._theirs.generate_trace_id()

    def is_trace_id_random(self) -> bool:
        return getattr(self._theirs, "is_trace_id_random", bool)()  # the SDK asks since 1.42


def trace_id_hex(span: trace.Span) -> str:
    """Give a span's trace id in lowercase hex."""
    return f"{span.get_span_context().trace_id:032x}"


def span_id_hex(span: trace.Span) -> str:
    """Give a span's id in lowercase hex."""
    return f"{span.get_span_context().span_id:016x}"


def is_sampled(span: trace.Span | ReadableSpan) -> bool:
    """Tell whether a span may leave the process: a sampler can have one recorded for processors alone (`Decision.RECORD_ONLY`)."""
    context = span.get_span_context()
    return context is not None and context.trace_flags.sampled


def row_of(span: trace.Span, members: Mapping[str, str] | None = None) -> SpanRow | None:
    """
    Give the row of a live span as far as it is known at its start; None when it is not sampled.

    Args:
        span: The span.
        members: The correlation that a span of our own was started with; None for others.
    """
    if not isinstance(span, ReadableSpan) or not is_sampled(span):
        return None
    return SpanRow(trace_id_hex(span), span_id_hex(span), otlp.encode_start(span, lost_members(span, members)))


def lost_members(span: ReadableSpan, members: Mapping[str, str] | None) -> dict[str, str]:
    """Give what a span does not hold of its correlation: it drops its oldest attributes, and cuts them, where the SDK limits them."""
    if not members:
        return {}
    found = otlp.attributes_of(span)
    return {name: value for name, value in members.items() if found.get(name) != value}


def end(span: trace.Span, ended_unix_ns: int) -> None:
    """End a span of ours. The SDK passes on what a processor raises; one of the user's must not take the place of their result."""
    try:
        span.end(ended_unix_ns)
    except Exception as error:
        if raised_by_signal_handler(error):
            raise
        logger.exception("otelexec.spans.on_end")


def keep_attributes(span: trace.Span, attributes: Mapping[str, Any]) -> None:
    """Set the attributes that a span was started with once more, if a sampler of the user's has left some out."""
    if not isinstance(span, ReadableSpan) or not attributes.keys() <= otlp.attributes_of(span).keys():
        span.set_attributes(attributes)


def request_of(spans: Iterable[ReadableSpan], resource: Resource, members: Mapping[str, str] | None = None) -> bytes:
    """
    Encode ended spans as one request.

    Args:
        spans: The spans.
        resource: That of the process. A span's own is its tracer's, which a forked child has from its parent.
        members: As for `row_of`.
    """
    scopes: dict[bytes, list[bytes]] = {}
    for span in spans:
        scopes.setdefault(otlp.encode_scope(span.instrumentation_scope), []).append(
            otlp.encode_span(span, extra_attributes=lost_members(span, members))
        )
    return otlp.wrap(otlp.encode_resource(resource), scopes)


class _OpenSpan:
    __slots__ = ("execution", "recorded", "row", "span")

    def __init__(self, span: SdkSpan, execution: RunningExecution | None) -> None:
        self.span = span
        self.execution = execution
        self.row: SpanRow | None = None
        self.recorded = False


_Ended = tuple[ReadableSpan, _OpenSpan | None]


def _drain(spans: deque[_Ended], most: int | None = None) -> list[_Ended]:
    """Take from a deque that other threads append to."""
    taken: list[_Ended] = []
    with contextlib.suppress(IndexError):
        while most is None or len(taken) < most:
            taken.append(spans.popleft())
    return taken


class Collector:
    """
    What this process has of spans that are not yet in the store.

    Args:
        resource: That of this process; its spans go out with it, whoever made their tracer.
        max_collected: Ended children that one execution may keep in memory.
        overflowing: Called when there is something that should be written soon; must not block.
        forked: Whether this process is the child of one that had open spans: those are the parent's to end.
    """

    def __init__(self, resource: Resource, max_collected: int, overflowing: Callable[[], None], *, forked: bool = False) -> None:
        self.resource = resource
        self.max_collected = max_collected
        self._forked = forked
        self._overflowing = overflowing
        self._open: dict[int, _OpenSpan] = {}
        self._loose: deque[_Ended] = deque()

    def started(self, span: SdkSpan, parent_context: Context | None) -> None:
        """Remember a span that is not one of our own kinds."""
        if span.instrumentation_scope is not None and span.instrumentation_scope.name == semconv.SCOPE_NAME:
            return
        found = otel_context.get_value(EXECUTION_KEY, parent_context)
        execution = found if isinstance(found, RunningExecution) and found.is_open else None
        self._open[span.get_span_context().span_id] = _OpenSpan(span, execution)
        if len(self._open) > MAX_OPEN_SPANS:
            with contextlib.suppress(RuntimeError, StopIteration):  # another thread changed it: it is at this, too
                self._open.pop(next(iter(self._open)), None)

    def ended(self, span: ReadableSpan) -> None:
        """Keep an ended span for the next commit of its execution, or of the process."""
        if span.instrumentation_scope is not None and span.instrumentation_scope.name == semconv.SCOPE_NAME:
            return
        context = span.get_span_context()
        known = self._open.pop(context.span_id, None) if context is not None else None
        if (known is None and self._forked) or not is_sampled(span):
            return
        execution = known.execution if known is not None else None
        if execution is not None and execution.is_open:
            execution.children.append((span, known))
            if len(execution.children) >= self.max_collected:
                self._overflowing()
            if not execution.closed:
                return
            # It was closed meanwhile, perhaps after its children were taken: what is still there has no execution.
            self._loose.extend(_drain(execution.children))
        else:
            self._loose.append((span, known))
        if len(self._loose) == 1:
            self._overflowing()

    def open_ancestors(self, context: Context | None) -> tuple[SpanRow, ...]:
        """Give the still open spans of ours from a context's current span up to its execution, not written so far."""
        return self._chain(trace.get_current_span(context).get_span_context().span_id)

    def _chain(self, span_id: int) -> tuple[SpanRow, ...]:
        rows: list[SpanRow] = []
        known = self._open.get(span_id)
        while known is not None and not known.recorded:
            row = known.row = row_of(known.span)
            known.recorded = True
            if row is not None:
                rows.append(row)
            parent = known.span.parent
            known = None if parent is None else self._open.get(parent.span_id)
        return tuple(rows)

    def take_children(self, execution: RunningExecution, process_id: str) -> AddSpans:
        """Take the ended children of an execution, with their ancestors that are still open."""
        taken = _drain(execution.children)
        return self._pack(taken, process_id, execution.id) if taken else NO_SPANS

    def take_loose(self, process_id: str) -> AddSpans:
        """Take the ended spans that belong to no open execution."""
        taken = _drain(self._loose, self.max_collected)
        return self._pack(taken, process_id, None) if taken else NO_SPANS

    @property
    def has_loose(self) -> bool:
        """Tell whether spans wait that belong to no open execution."""
        return bool(self._loose)

    def _pack(self, taken: list[_Ended], process_id: str, execution_id: str | None) -> AddSpans:
        plain = [span for span, known in taken if known is None or not known.recorded]
        recorded = tuple(
            (known.row, request_of((span,), self.resource))
            for span, known in taken
            if known is not None and known.recorded and known.row is not None
        )
        opened: list[SpanRow] = []
        for span, _ in taken:
            if span.parent is not None:
                opened += self._chain(span.parent.span_id)
        return AddSpans(
            request=request_of(plain, self.resource) if plain else b"",
            count=len(plain),
            recorded=recorded,
            opened=tuple(opened),
            process_id=process_id,
            execution_id=execution_id,
            last_end_unix_ns=max(span.end_time or 0 for span, _ in taken),
            nonce=mint_nonce() if plain or opened else "",
        )


class CaptureProcessor(SpanProcessor):
    """
    Hands spans to the collector of the runtime that is current, and starts to the user's own processors.

    It does no I/O and raises nothing of its own: an exception in `on_end` would replace the user's (the SDK does not catch it).

    Args:
        collector: Gives the current collector; None when there is none.
        theirs: Gives the user's processors, whose `on_start` still sees our spans.
    """

    def __init__(self, collector: Callable[[], Collector | None], theirs: Callable[[], Any] | None = None) -> None:
        self._collector = collector
        self._theirs = theirs

    def on_start(self, span: SdkSpan, parent_context: Context | None = None) -> None:
        """Remember the span, and let the user's processors set their attributes."""
        try:
            collector = self._collector()
            if collector is not None:
                collector.started(span, parent_context)
            if self._theirs is not None:
                theirs = self._theirs()
                if theirs is not None:
                    theirs.on_start(span, parent_context=parent_context)
        except Exception as error:  # a processor of the user's may raise anything, and start_span() would pass it on
            if raised_by_signal_handler(error):
                raise
            logger.exception("otelexec.spans.on_start")

    def on_end(self, span: ReadableSpan) -> None:
        """Capture the span."""
        try:
            collector = self._collector()
            if collector is not None:
                collector.ended(span)
        except Exception as error:
            if raised_by_signal_handler(error):
                raise
            logger.exception("otelexec.spans.on_end")


class CollectingProvider(TracerProvider):
    """A provider whose spans are the collector's."""

    def _handle_fork(self) -> None:
        # The SDK's hook asks the resource detectors anew, in threads, before anything else of a child runs. Spans of this
        # provider take the resource of the process that collects them.
        self._tracers_lock = threading.Lock()

    def inherited_by(self, resource: Resource, tracer: trace.Tracer) -> None:
        """
        Go on in a forked child: a new provider and tracer would cost a worker that forks for each job a millisecond a job.

        Args:
            resource: The child's.
            tracer: The one for execution spans.
        """
        self._resource = resource
        if isinstance(tracer, Tracer):
            tracer.resource = resource


def make_resource(service_name: str | None, theirs: trace.TracerProvider | None) -> Resource:
    """
    Make the resource of this process.

    Args:
        service_name: `service.name`; None leaves it to OTEL_SERVICE_NAME and the SDK's default.
        theirs: The user's provider, whose resource goes before ours; None without one.
    """
    own: dict[str, str | int] = {
        semconv.HOST_NAME: socket.gethostname(),
        semconv.PROCESS_PID: os.getpid(),
        semconv.SERVICE_INSTANCE_ID: str(uuid.uuid4()),
    }
    given = Resource({semconv.SERVICE_NAME: service_name} if service_name is not None else {})
    if isinstance(theirs, TracerProvider):
        return Resource(own).merge(theirs.resource).merge(given)
    # What is detected has OTEL_RESOURCE_ATTRIBUTES in it, whose host name is the user's word and goes before ours.
    return _with_detected(Resource(own)).merge(given)


def make_provider(
    resource: Resource, collector: Callable[[], Collector | None], theirs: trace.TracerProvider | None, *, collects: bool = True
) -> TracerProvider:
    """
    Make the provider of execution spans.

    Args:
        resource: That of this process.
        collector: Gives the current collector.
        theirs: The user's provider, whose sampler, limits, trace ids and `on_start` processors are taken over; None without one.
        collects: Whether the collector takes the spans; else they leave with the provider's resource.
    """
    sampler, limits, ids = None, None, SecureIdGenerator()
    processor = CaptureProcessor(collector)
    if isinstance(theirs, TracerProvider):
        sampler, limits = theirs.sampler, getattr(theirs, "_span_limits", None)
        if type(theirs.id_generator) is not RandomIdGenerator:
            ids = _TheirTraceIds(theirs.id_generator)
        processor = CaptureProcessor(collector, lambda: getattr(theirs, "_active_span_processor", None))
    kind = CollectingProvider if collects else TracerProvider
    provider = kind(resource=resource, sampler=sampler, id_generator=ids, span_limits=limits, shutdown_on_exit=False)
    provider.add_span_processor(processor)
    return provider


_known: tuple[int, Resource] | None = None
"""The process that asked the detectors last, and what they found."""


def _with_detected(own: Resource) -> Resource:
    global _known  # noqa: PLW0603 (one machine, one environment)
    if _known is None or _known[0] == os.getpid() or os.environ.get(OTEL_EXPERIMENTAL_RESOURCE_DETECTORS):
        _known = os.getpid(), _detected()
        return own.merge(_known[1])
    # In a forked child the SDK's own detectors find what they found before the fork, all but the instance, which is ours;
    # asking them takes threads.
    return _known[1].merge(own).merge(OTELResourceDetector().detect())


def _detected() -> Resource:
    """Give what the SDK finds out by itself, or as much of it as can be had once the main thread has ended."""
    try:
        return Resource.create({})
    except RuntimeError:
        # It asks its detectors in a thread pool, and none can be used after the main thread's end, which is when the
        # first execution of a thread that outlives it may get here.
        sdk = {TELEMETRY_SDK_LANGUAGE: "python", TELEMETRY_SDK_NAME: "opentelemetry", TELEMETRY_SDK_VERSION: version("opentelemetry-sdk")}
        return Resource({**sdk, semconv.SERVICE_NAME: "unknown_service"}).merge(OTELResourceDetector().detect())


_global_lock = threading.Lock()


def foreign_provider() -> trace.TracerProvider | None:
    """Give the global provider that somebody else has set; None when it is unset or ours."""
    provider = trace.get_tracer_provider()
    if isinstance(provider, trace.ProxyTracerProvider | trace.NoOpTracerProvider) or getattr(provider, "_otelexec", False):
        return None
    return provider


def offer_as_global(provider: TracerProvider) -> None:
    """Make a provider of ours the global one where none is set, so that spans inside an execution are its children."""
    with _global_lock:
        if isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
            provider._otelexec = True  # type: ignore[attr-defined] # noqa: SLF001 (our own mark, read above)
            trace.set_tracer_provider(provider)
