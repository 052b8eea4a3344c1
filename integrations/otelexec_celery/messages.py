"""What a task message asks for: the context to run it in, and the attempt's options. The same in every process."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import UTC
from typing import Any

from celery.utils.time import maybe_iso8601
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context import Context

from otelexec import semconv
from otelexec.context import EXECUTION_KEY
from otelexec.options import Options
from otelexec.propagation import incoming
from otelexec.supervision import named, run_token
from otelexec.w3c import decode_trace
from otelexec_celery import carrier, endings
from otelexec_celery.settings import CHOICES, SYSTEM


def open_context(task_id: str | None, request: Mapping[str, Any], before: Context) -> Context:
    """
    Make the context that a message's work runs in.

    Args:
        task_id: Its task id, which is the execution's id if the message carries none; None when it has none.
        request: Its headers, or the request made of them.
        before: The context of the caller, which only an eager run stays in.
    """
    found = carrier.find(request)
    eager = bool(request.get("is_eager"))
    if eager and not found:
        return before  # a call like any other, in whatever scope it is made
    context, scope = incoming(
        carrier.carrier_of(found),
        message_id=task_id,
        enqueued_unix_ns=carrier.time_of(found, carrier.ENQUEUED),
        context=otel_context.set_value(EXECUTION_KEY, None, before) if eager else Context(),
    )
    token = request.get(carrier.DELIVERY)
    return context if scope.trusted or not token else named(context, scope, token)


def options_of(
    name: str,
    task_id: str | None,
    request: Mapping[str, Any],
    *,
    hard_limit: float | None = None,
    soft_limit: float | None = None,
    links: tuple[trace.Link, ...] = (),
    accepted: bool = False,
    requeues: bool = False,
    pid: int | None = None,
    finalized_by: str = "executor",
) -> Options:
    """
    Give the options of an attempt.

    Args:
        name: The task's name.
        task_id: Its id; None when the message has none.
        request: Its headers, or the request made of them.
        hard_limit: Its hard limit in seconds; None without one.
        soft_limit: Its soft limit in seconds; None without one.
        links: Span links besides the one to the attempt that asked for this one.
        accepted: Whether the main process may have opened the attempt.
        requeues: Whether a message that the task wants back in its queue gets there.
        pid: The process that runs it; None while none does.
        finalized_by: Which path is named on the record.
    """
    found = carrier.find(request)
    previous = decode_trace(carrier.text_of(found, carrier.PREVIOUS) or "", None)
    if previous is not None:
        links = (trace.Link(previous), *links)
    delivery = request.get("delivery_info")
    attributes = {
        semconv.MESSAGING_SYSTEM: SYSTEM,
        semconv.MESSAGING_OPERATION_NAME: "process",
        semconv.MESSAGING_OPERATION_TYPE: "process",
    }
    destination = delivery.get("routing_key") if isinstance(delivery, Mapping) else None
    if isinstance(destination, str) and destination:
        attributes[semconv.MESSAGING_DESTINATION_NAME] = destination
    if task_id:
        attributes[semconv.MESSAGING_MESSAGE_ID] = task_id
    latency = queue_latency(found, request)
    delivered: str | None = request.get(carrier.DELIVERY)
    return Options(
        name,
        kind=trace.SpanKind.CONSUMER,
        attributes=attributes if latency is None else {**attributes, semconv.QUEUE_LATENCY: latency},
        links=links,
        link_carried=CHOICES.use_span_links,
        classify=endings.classifier(hard_limit, soft_limit, requeues=requeues),
        timeout=hard_limit,
        token=delivered if delivered is None or pid is None else run_token(delivered, pid),
        accepted=accepted,
        finalized_by=finalized_by,
    )


def queue_latency(found: Mapping[str, Any], request: Mapping[str, Any]) -> float | None:
    """
    Give how long a message waited, in seconds, from when it was sent or from when it was due, whichever is later.

    Args:
        found: Our headers.
        request: The request.

    Returns:
        None where the message does not say when it was sent.
    """
    enqueued = carrier.time_of(found, carrier.ENQUEUED)
    if enqueued is None:
        return None
    since = enqueued / 1e9
    eta = request.get("eta")
    if eta:
        try:
            due: Any = maybe_iso8601(eta)
            since = max(since, (due if due.tzinfo is not None else due.replace(tzinfo=UTC)).timestamp())
        except (TypeError, ValueError, AttributeError, OverflowError):
            pass
    return max(0.0, time.time() - since)


def hard_limit_of(task: Any, request: Mapping[str, Any]) -> float | None:
    """Give a task's hard limit in seconds; None without one."""
    return _limit_of(0, task.time_limit, request)


def soft_limit_of(task: Any, request: Mapping[str, Any]) -> float | None:
    """Give a task's soft limit in seconds; None without one."""
    return _limit_of(1, task.soft_time_limit, request)


def _limit_of(index: int, tasks_own: Any, request: Mapping[str, Any]) -> float | None:
    asked = request.get("timelimit") or (None, None)
    workers = request.get(carrier.LIMITS) or (None, None)
    seconds = asked[index] or workers[index] or tasks_own
    return float(seconds) if isinstance(seconds, int | float) and seconds > 0 else None
