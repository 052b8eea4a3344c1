"""
What one would write by hand around a queue with the SDK and SQLite: the least that the promise of an adapter could cost.

A PRODUCER span and two ids as baggage go with each message, whose work is done in a CONSUMER span. With records there is a
row for it besides: committed when it is sent, and made fully durable when it begins and when it ends. Nothing in here
bears a crash, a retry, work that is stopped, or a second worker.
"""

from __future__ import annotations

import os
import sqlite3
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from opentelemetry import baggage, propagate, trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind

from tests.benchmarks.threads import NoExport

RECORDS = "OTELEXEC_BENCHMARK_RECORDS"
"""The variable that names the SQLite file of the records; without it there are spans only."""

SIDES = ("spans", "records")

_tracer = trace.get_tracer("by-hand")
_connections: dict[int, sqlite3.Connection] = {}


def set_up() -> None:
    """Set a provider, as somebody who exports has it."""
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(NoExport()))
    trace.set_tracer_provider(provider)


def _record(statement: str, *values: Any, synchronous: str = "FULL") -> None:
    path = os.environ.get(RECORDS)
    if path is None:
        return
    connection = _connections.get(os.getpid())
    if connection is None:
        _connections.clear()
        connection = _connections[os.getpid()] = sqlite3.connect(path, isolation_level=None, timeout=60)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute(
            "CREATE TABLE IF NOT EXISTS run (id TEXT PRIMARY KEY, name TEXT, state TEXT, request TEXT, queued INTEGER, started INTEGER, "
            "ended INTEGER)"
        )
    connection.execute(f"PRAGMA synchronous = {synchronous}")
    connection.execute(statement, values)


@contextmanager
def sent(system: str, operation: str, queue: str, message_id: str) -> Iterator[dict[str, str]]:
    """Record a message that is sent in the block; gives what it carries."""
    execution_id, request_id = str(uuid.uuid4()), str(uuid.uuid4())
    context = baggage.set_baggage("execution_id", execution_id)
    context = baggage.set_baggage("source", "direct", baggage.set_baggage("request_id", request_id, context))
    attributes = {
        "execution_id": execution_id,
        "request_id": request_id,
        "source": "direct",
        "messaging.system": system,
        "messaging.operation.name": operation,
        "messaging.operation.type": "send",
        "messaging.destination.name": queue,
        "messaging.message.id": message_id,
    }
    with _tracer.start_as_current_span(f"{operation} {queue}", context, SpanKind.PRODUCER, attributes) as span:
        carrier: dict[str, str] = {}
        propagate.inject(carrier, trace.set_span_in_context(span, context))
        _record(
            "INSERT INTO run (id, name, state, request, queued) VALUES (?, ?, 'queued', ?, ?)",
            *(execution_id, "nothing", request_id, time.time_ns()),
            synchronous="NORMAL",
        )
        yield carrier


@contextmanager
def processed(system: str, carrier: Mapping[str, str], message_id: str) -> Iterator[None]:
    """Record the work that is done in the block."""
    context = propagate.extract(carrier)
    execution_id = str(baggage.get_baggage("execution_id", context))
    attributes = {"execution_id": execution_id, "messaging.system": system, "messaging.message.id": message_id}
    with _tracer.start_as_current_span("process", context, SpanKind.CONSUMER, attributes):
        _record("UPDATE run SET state = 'running', started = ? WHERE id = ?", time.time_ns(), execution_id)
        yield
    _record("UPDATE run SET state = 'succeeded', ended = ? WHERE id = ?", time.time_ns(), execution_id)


def leaving() -> None:
    """Send the spans of a process that leaves without Python's exit handlers."""
    provider = trace.get_tracer_provider()
    if isinstance(provider, TracerProvider):
        provider.force_flush()
