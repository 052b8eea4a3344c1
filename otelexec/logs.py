"""The fields that every log record carries, for plain format strings and for structlog."""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from typing import Any

from opentelemetry import trace

from otelexec import semconv
from otelexec.handle import current_execution


def fields() -> dict[str, str]:
    """Give the ids of the current execution and of the current span: empty strings where there is none."""
    execution = current_execution()
    span = trace.get_current_span().get_span_context()
    return {
        semconv.LOG_EXECUTION_ID: execution.id or "",
        semconv.LOG_REQUEST_ID: execution.correlation.request_id if execution.correlation is not None else "",
        semconv.LOG_ATTEMPT: str(execution.attempt) if execution else "",
        semconv.LOG_TRACE_ID: f"{span.trace_id:032x}" if span.is_valid else "",
        semconv.LOG_SPAN_ID: f"{span.span_id:016x}" if span.is_valid else "",
    }


def install() -> None:
    """Make every LogRecord carry the fields. Further calls change nothing."""
    before = logging.getLogRecordFactory()
    if getattr(before, "_otelexec", False):
        return

    def factory(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = before(*args, **kwargs)
        for name, value in fields().items():
            # opentelemetry-instrumentation-logging writes the trace and span id too; whoever was first stays.
            record.__dict__.setdefault(name, value)
        return record

    factory._otelexec = True  # type: ignore[attr-defined] # noqa: SLF001 (our own mark, read above)
    logging.setLogRecordFactory(factory)


def structlog_processor(logger: Any, method_name: str, event_dict: MutableMapping[str, Any]) -> MutableMapping[str, Any]:  # noqa: ARG001 (structlog's signature)
    """
    Add the fields to a structlog event: put it into `structlog.configure(processors=[...])`.

    Args:
        logger: structlog's.
        method_name: structlog's.
        event_dict: The event; a field that it has already stays.
    """
    for name, value in fields().items():
        event_dict.setdefault(name, value)
    return event_dict
