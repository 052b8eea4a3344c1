"""
What one would write by hand around RQ with the SDK and SQLite: the least that the promise of the adapter could cost.

A PRODUCER span and two ids as baggage go with each job, whose function runs in a CONSUMER span. With records there is a
row for it besides: committed when it is enqueued, and made fully durable when it begins and when it ends. Nothing in here
bears a crash, a retry, a job that is stopped, or a second worker.
"""

from __future__ import annotations

import os
import sqlite3
import time
import uuid
from typing import Any

from opentelemetry import baggage, propagate, trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import SpanKind
from rq import get_current_job

from tests.benchmarks.rq_jobs import nothing

RECORDS = "OTELEXEC_BENCHMARK_RECORDS"
"""The variable that names the SQLite file of the records; without it there are spans only."""

_tracer = trace.get_tracer("by-hand")
_connections: dict[int, sqlite3.Connection] = {}


def _record(statement: str, *values: Any, synchronous: str = "FULL") -> None:
    path = os.environ.get(RECORDS)
    if path is None:
        return
    connection = _connections.get(os.getpid())
    if connection is None:
        _connections.clear()
        connection = _connections[os.getpid()] = sqlite3.connect(path, isolation_level=None)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute(
            "CREATE TABLE IF NOT EXISTS run (id TEXT PRIMARY KEY, name TEXT, state TEXT, request TEXT, queued INTEGER, started INTEGER, "
            "ended INTEGER)"
        )
    connection.execute(f"PRAGMA synchronous = {synchronous}")
    connection.execute(statement, values)


def enqueue(queue: Any) -> None:
    """Enqueue a no-op job."""
    execution_id, request_id, job_id = str(uuid.uuid4()), str(uuid.uuid4()), str(uuid.uuid4())
    context = baggage.set_baggage("execution_id", execution_id)
    context = baggage.set_baggage("source", "direct", baggage.set_baggage("request_id", request_id, context))
    attributes = {
        "execution_id": execution_id,
        "request_id": request_id,
        "source": "direct",
        "messaging.system": "rq",
        "messaging.operation.name": "enqueue",
        "messaging.operation.type": "send",
        "messaging.destination.name": queue.name,
        "messaging.message.id": job_id,
    }
    with _tracer.start_as_current_span(f"enqueue {queue.name}", context, SpanKind.PRODUCER, attributes) as span:
        carrier: dict[str, str] = {}
        propagate.inject(carrier, trace.set_span_in_context(span, context))
        _record(
            "INSERT INTO run (id, name, state, request, queued) VALUES (?, ?, 'queued', ?, ?)",
            *(execution_id, "nothing", request_id, time.time_ns()),
            synchronous="NORMAL",
        )
        queue.enqueue(job, job_id=job_id, meta={"carrier": carrier}, result_ttl=0)


def job() -> None:
    """Do nothing, in a CONSUMER span."""
    current: Any = get_current_job()
    context = propagate.extract(current.meta["carrier"])
    execution_id = str(baggage.get_baggage("execution_id", context))
    attributes = {"execution_id": execution_id, "messaging.system": "rq", "messaging.message.id": current.id}
    with _tracer.start_as_current_span("process", context, SpanKind.CONSUMER, attributes):
        _record("UPDATE run SET state = 'running', started = ? WHERE id = ?", time.time_ns(), execution_id)
        nothing()
    _record("UPDATE run SET state = 'succeeded', ended = ? WHERE id = ?", time.time_ns(), execution_id)


def leaving() -> None:
    """Send the spans of a horse, which leaves without Python's exit handlers."""
    provider = trace.get_tracer_provider()
    if isinstance(provider, TracerProvider):
        provider.force_flush()
