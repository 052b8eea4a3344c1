"""A span as an execution ends with, for the benchmarks that need stored ones."""

from __future__ import annotations

from typing import cast

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.util.types import AttributeValue

ATTRIBUTES: dict[str, AttributeValue] = {
    "otelexec.execution_id": "01931b7e-5d0e-7c11-9a45-5d2a1f0c7b3e",
    "otelexec.request_id": "01931b7e-5d0e-7c11-9a45-0f6d8c2b1a90",
    "otelexec.source": "webhook",
    "otelexec.outcome": "succeeded",
    "otelexec.attempt": 1,
}


def ended_span() -> ReadableSpan:
    """Give one."""
    resource = Resource.create({"service.name": "billing", "host.name": "worker-1", "service.instance.id": "0193"})
    span = TracerProvider(resource=resource, shutdown_on_exit=False).get_tracer("otelexec").start_span("invoice.run", attributes=ATTRIBUTES)
    span.end()
    return cast("ReadableSpan", span)
