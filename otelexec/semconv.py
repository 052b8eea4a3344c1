"""
Every attribute, baggage, event and environment name that otelexec writes.

Pinned to the OpenTelemetry semantic conventions 1.44.0 (messaging: Development; code and error: stable).
"""

from __future__ import annotations

from typing import Final

SCHEMA_URL: Final = "https://opentelemetry.io/schemas/1.44.0"
SCOPE_NAME: Final = "otelexec"

# One name for each fact, the same as a baggage member and as a span attribute.
PREFIX: Final = "otelexec."
EXECUTION_ID: Final = "otelexec.execution_id"
REQUEST_ID: Final = "otelexec.request_id"
SOURCE: Final = "otelexec.source"
PARENT_EXECUTION_ID: Final = "otelexec.parent_execution_id"

# Span attributes only.
ATTEMPT: Final = "otelexec.attempt"
OUTCOME: Final = "otelexec.outcome"
CLASSIFICATION: Final = "otelexec.classification"
DUPLICATE: Final = "otelexec.duplicate"
RECONCILED_AT: Final = "otelexec.reconciled_unix_ns"
PROGRESS: Final = "otelexec.progress"
OUTER_OUTCOME: Final = "otelexec.outer_outcome"
OBSERVED_OF: Final = "otelexec.observed_of"
QUEUE_LATENCY: Final = "otelexec.queue_latency_seconds"

# Metrics, and the attribute that names the execution on them.
METRIC_QUEUE_LATENCY: Final = "otelexec.queue.latency"
METRIC_PROCESS_DURATION: Final = "messaging.process.duration"
METRIC_RECONCILED: Final = "otelexec.reconciled.attempts"
EXECUTION_NAME: Final = "otelexec.execution.name"

ERROR_TYPE: Final = "error.type"
EXCEPTION_EVENT: Final = "exception"
EXCEPTION_TYPE: Final = "exception.type"
EXCEPTION_MESSAGE: Final = "exception.message"
EXCEPTION_STACKTRACE: Final = "exception.stacktrace"
CODE_FUNCTION_NAME: Final = "code.function.name"

MESSAGING_SYSTEM: Final = "messaging.system"
MESSAGING_OPERATION_NAME: Final = "messaging.operation.name"
MESSAGING_OPERATION_TYPE: Final = "messaging.operation.type"
MESSAGING_DESTINATION_NAME: Final = "messaging.destination.name"
MESSAGING_MESSAGE_ID: Final = "messaging.message.id"

SERVICE_NAME: Final = "service.name"
SERVICE_INSTANCE_ID: Final = "service.instance.id"
HOST_NAME: Final = "host.name"
PROCESS_PID: Final = "process.pid"

# Carriers.
PAYLOAD_KEY: Final = "_otelexec"
HEADER_TRACEPARENT: Final = "traceparent"
HEADER_TRACESTATE: Final = "tracestate"
HEADER_BAGGAGE: Final = "baggage"
HEADER_SIGNATURE: Final = "otelexec-signature"

# Fields that every LogRecord carries.
LOG_EXECUTION_ID: Final = "otelexec_execution_id"
LOG_REQUEST_ID: Final = "otelexec_request_id"
LOG_ATTEMPT: Final = "otelexec_attempt"
LOG_TRACE_ID: Final = "otelTraceID"
LOG_SPAN_ID: Final = "otelSpanID"
