"""What a job asks for: the context to run it in, and the attempt's options. The same in every process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import UTC
from typing import Any

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context import Context

from otelexec import runtime as _runtime
from otelexec import semconv
from otelexec.context import EXECUTION_KEY
from otelexec.options import Options
from otelexec.propagation import incoming
from otelexec.supervision import named
from otelexec.w3c import decode_trace
from otelexec_rq import carrier, endings
from otelexec_rq.settings import CHOICES, SYSTEM


def open_context(job: Any, token: str | None, around: Context | None = None) -> Context:
    """
    Make the context that a job runs in.

    Args:
        job: The job, whose id is the execution's if it carries none.
        token: RQ's execution id; None where a job runs without one.
        around: The context of the caller, which only a job of a synchronous queue stays in; None for a clean one.
    """
    found = carrier.find(job)
    if around is not None and not found:
        return around  # a call like any other, in whatever scope it is made
    base = Context() if around is None else otel_context.set_value(EXECUTION_KEY, None, around)
    context, scope = incoming(carrier.carrier_of(found), message_id=job.id, context=base)
    return context if scope.trusted or not token else named(context, scope, token)


def options_of(
    job: Any,
    token: str | None,
    *,
    is_stopped: Callable[[], bool] = lambda: False,
    finalized_by: str = "executor",
) -> Options:
    """
    Give the options of an attempt.

    Args:
        job: The job.
        token: RQ's execution id, the attempt's fencing token; None mints one.
        is_stopped: Tells whether `stop-job` was asked for.
        finalized_by: Which path is named on the record.
    """
    found = carrier.find(job)
    attributes: dict[str, Any] = {
        semconv.MESSAGING_SYSTEM: SYSTEM,
        semconv.MESSAGING_OPERATION_NAME: "process",
        semconv.MESSAGING_OPERATION_TYPE: "process",
        semconv.MESSAGING_MESSAGE_ID: job.id,
    }
    if job.origin:
        attributes[semconv.MESSAGING_DESTINATION_NAME] = job.origin
    latency = queue_latency(job)
    if latency is not None:
        attributes[semconv.QUEUE_LATENCY] = latency
    timeout = job.timeout
    return Options(
        name_of(job, unpickle=finalized_by != "parent"),
        kind=trace.SpanKind.CONSUMER,
        attributes=attributes,
        links=links_of(found),
        link_carried=CHOICES.use_span_links,
        classify=endings.classifier(job, is_stopped, may_retry=token is not None),
        timeout=float(timeout) if isinstance(timeout, int | float) and timeout > 0 else None,
        token=token,
        finalized_by=finalized_by,
    )


def name_of(job: Any, *, unpickle: bool = True) -> str:
    """
    Give the name of a job's execution: that of its function, or what is known of a job that can't be read.

    Args:
        job: The job.
        unpickle: Whether its data may be read for it: it imports what is in it, and may do anything, so a worker's parent never does.
    """
    found = carrier.text_of(carrier.find(job), carrier.NAME)
    if found is not None:
        return found
    if not unpickle:
        return str(job.description or "unread job").partition("(")[0]  # without the arguments of the call
    try:
        instance, name = job.instance, str(job.func_name)
    except Exception:  # its data is pickled, and may hold anything
        return str(job.description or "unreadable job")
    if instance is None:
        return name
    owner: Any = instance if isinstance(instance, type) else type(instance)  # RQ names a method without its class
    return f"{owner.__module__}.{owner.__qualname__}.{name}"


def links_of(found: Mapping[str, Any]) -> tuple[trace.Link, ...]:
    """Give the links to the attempt before, to a repeating job's first run, and to the jobs that this one depends on."""
    depends = carrier.text_of(found, carrier.DEPENDS) or ""
    texts = (carrier.text_of(found, carrier.PREVIOUS) or "", carrier.text_of(found, carrier.FIRST) or "", *depends.split(","))
    contexts = (decode_trace(text, None) for text in texts if text)
    return tuple(trace.Link(context) for context in contexts if context is not None)


def last_attempt(execution_id: str, *, before: int | None = None) -> trace.SpanContext | None:
    """
    Give the span of an execution's last attempt that is on the record; that of the job, not of a core in it.

    Args:
        execution_id: Which.
        before: The number of an attempt that it came before; None for any.

    Raises:
        StoreError: The store could not be read.
    """
    store = _runtime.get().store
    record = None if store is None else store.execution(execution_id)
    for attempt in reversed(() if record is None else record.attempts):
        if before is None or attempt.attempt < before:
            return decode_trace(f"00-{attempt.trace_id}-{attempt.outer_span_id or attempt.span_id}-01", None)
    return None


def queue_latency(job: Any) -> float | None:
    """Give how long a job waited in seconds, from when RQ put it into its queue; None where RQ does not say."""
    enqueued = job.enqueued_at
    if enqueued is None:
        return None
    since = enqueued if enqueued.tzinfo is not None else enqueued.replace(tzinfo=UTC)
    return max(0.0, time.time() - float(since.timestamp()))
