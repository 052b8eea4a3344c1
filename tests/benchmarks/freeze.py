"""
Freezing one span: our bytes against the SDK's `encode_spans` and its serialisation.

Run it with `python tests/benchmarks/freeze.py [--short]`. Rounds of both alternate in one process, so that a noisy
machine slows both; what counts is the median of the rounds' ratios.
"""

from __future__ import annotations

import sys
import time
from statistics import median
from typing import TYPE_CHECKING, Any, cast

from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode

from otelexec import otlp

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

TARGET = 0.35
IDENTITY = {
    "otelexec.execution_id": "01931b7e-5d0e-7c11-9a45-5d2a1f0c7b3e",
    "otelexec.request_id": "01931b7e-5d0e-7c11-9a45-0f6d8c2b1a90",
    "otelexec.source": "webhook",
    "otelexec.outcome": "succeeded",
    "otelexec.finalized_by": "executor",
    "code.function.name": "billing.invoices.run_invoice",
}


def _span(attributes: dict[str, Any], *, failed: bool) -> ReadableSpan:
    resource = Resource.create({"service.name": "billing", "host.name": "worker-1", "service.instance.id": "0193"})
    tracer = TracerProvider(resource=resource).get_tracer("otelexec", "0.1.0")
    links = [Link(SpanContext(1 << 100, 1 << 50, is_remote=True), {"otelexec.link": "carried"})] if failed else []
    span = tracer.start_span("invoice.run", kind=SpanKind.CONSUMER, attributes=attributes, links=links)
    if failed:
        span.add_event(
            "exception",
            {
                "exception.type": "ValueError",
                "exception.message": "the invoice has no lines",
                "exception.stacktrace": 'Traceback (most recent call last):\n  File "billing.py", line 7, in run\n' * 12,
            },
        )
        span.set_status(Status(StatusCode.ERROR, "the invoice has no lines"))
    span.end()
    return cast("ReadableSpan", span)


def _ours(span: ReadableSpan) -> bytes:
    groups = {otlp.encode_scope(span.instrumentation_scope): [otlp.encode_span(span)]}
    return otlp.wrap(otlp.encode_resource(span.resource), groups)


def _theirs(span: ReadableSpan) -> bytes:
    return bytes(encode_spans([span]).SerializeToString())


def _seconds(work: Callable[[ReadableSpan], bytes], spans: Sequence[ReadableSpan], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        for span in spans:
            work(span)
    return time.perf_counter() - start


def run(*, short: bool = False) -> list[tuple[str, float]]:
    """
    Measure, and give (label, time of ours divided by the SDK's) pairs.

    Args:
        short: A tenth of the rounds, for a first look.
    """
    cases = {
        "freeze a span: 8 string attributes": _span(
            {**IDENTITY, "otelexec.webhook_id": "wh_1", "otelexec.path": "/hooks/stripe"}, failed=False
        ),
        "freeze a span: 10 attributes, 1 link, 1 event": _span(
            {**IDENTITY, "otelexec.attempt": 2, "otelexec.duplicate": False, "otelexec.deadline_unix_ns": 2**60, "wait_seconds": 0.25},
            failed=True,
        ),
    }
    measured = []
    for label, span in cases.items():
        spans, ratios = [span] * 50, []
        for _ in range(5 if short else 50):
            theirs = _seconds(_theirs, spans, 4)
            ratios.append(_seconds(_ours, spans, 4) / theirs)
        measured.append((label, median(ratios)))
    return measured


if __name__ == "__main__":
    for label, ratio in run(short="--short" in sys.argv):
        print(f"{label:<50} {ratio:6.3f}x  target <= {TARGET}x")
