"""Record -> JSON: the one mapping behind `find_execution()` and every `--json`; the names are promised to other programs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from otelexec import semconv
from otelexec.store.rows import ENDED_STATES

if TYPE_CHECKING:
    from otelexec.decoded import DecodedSpan
    from otelexec.store.records import AttemptRecord, ExecutionRecord


def execution_json(record: ExecutionRecord) -> dict[str, Any]:
    """
    Give an execution as `list --json` prints it.

    Times are nanoseconds since 1970, ids lowercase hex; what is not known, or not yet, is None.
    """
    trace_id, span_id = ids(record)
    cancellation = record.cancellation
    fields = _parsed(record.correlation) or {}
    message_id = fields.pop(semconv.MESSAGING_MESSAGE_ID, None) if isinstance(fields, dict) else None
    return {
        "execution_id": record.execution_id,
        "name": record.name,
        "state": record.state,
        "request_id": record.request_id,
        "source": record.source,
        "correlation": fields,
        "message_id": message_id,
        "parent_execution_id": record.parent_execution_id,
        "trace_id": trace_id,
        "span_id": span_id,
        "queued_unix_ns": record.queued_unix_ns,
        "started_unix_ns": started_unix_ns(record),
        "ended_unix_ns": ended_unix_ns(record),
        "error_type": error(record)[0],
        "error_message": error(record)[1],
        "cancel_requested": cancellation is not None,
        "cancel_requested_unix_ns": None if cancellation is None else cancellation.requested_unix_ns,
        "cancel_terminate": None if cancellation is None else cancellation.terminate,
        "attempts": [attempt_json(attempt) for attempt in record.attempts],
    }


def attempt_json(attempt: AttemptRecord) -> dict[str, Any]:
    """Give an attempt as it stands in `attempts`; the `outer_*` fields are None where no outer executor was."""
    return {
        "attempt": attempt.attempt,
        "state": attempt.state,
        "duplicate": attempt.duplicate,
        "trace_id": attempt.trace_id,
        "span_id": attempt.span_id,
        "started_unix_ns": attempt.started_unix_ns,
        "ended_unix_ns": attempt.ended_unix_ns,
        "deadline_unix_ns": attempt.deadline_unix_ns,
        "error_type": attempt.error_type,
        "error_message": attempt.error_message,
        "finalized_by": attempt.finalized_by,
        "classification": attempt.classification,
        "reconciled_unix_ns": attempt.reconciled_unix_ns,
        "progress": _parsed(attempt.progress),
        "output": _parsed(attempt.output),
        "observed": _parsed(attempt.observed),
        "outer_span_id": attempt.outer_span_id,
        "outer_outcome": attempt.outer_outcome,
        "outer_started_unix_ns": attempt.outer_started_unix_ns,
        "outer_ended_unix_ns": attempt.outer_ended_unix_ns,
        "outer_error_type": attempt.outer_error_type,
        "outer_error_message": attempt.outer_error_message,
        "worker": {"host": attempt.host, "pid": attempt.pid, "service_name": attempt.service_name},
    }


def span_json(span: DecodedSpan) -> dict[str, Any]:
    """Give a span that the store still holds as `show --json` prints it."""
    return {
        "trace_id": span.trace_id,
        "span_id": span.span_id,
        "parent_span_id": span.parent_span_id,
        "name": span.name,
        "kind": span.kind,
        "started_unix_ns": span.start_unix_ns,
        "ended_unix_ns": span.end_unix_ns,
        "status": span.status,
        "status_message": span.status_message,
        "attributes": span.attributes,
        "links": [{"trace_id": link.trace_id, "span_id": link.span_id} for link in span.links],
        "events": [{"name": event.name, "unix_ns": event.unix_ns, "attributes": event.attributes} for event in span.events],
    }


def newest(record: ExecutionRecord) -> AttemptRecord | None:
    """Give the newest attempt that is no duplicate; None while only a message of it exists."""
    return next((attempt for attempt in reversed(record.attempts) if not attempt.duplicate), None)


def ids(record: ExecutionRecord) -> tuple[str | None, str | None]:
    """Give the trace and span id of the newest attempt that is no duplicate, else those of the publish."""
    attempt = newest(record)
    return (record.producer_trace_id, record.producer_span_id) if attempt is None else (attempt.trace_id, attempt.span_id)


def started_unix_ns(record: ExecutionRecord) -> int | None:
    """Give the start of the first attempt; None before it."""
    return record.attempts[0].started_unix_ns if record.attempts else record.started_unix_ns


def ended_unix_ns(record: ExecutionRecord) -> int | None:
    """Give the end; None until the state is terminal."""
    return record.ended_unix_ns if record.state in ENDED_STATES else None


def error(record: ExecutionRecord) -> tuple[str | None, str | None]:
    """Give class and text of what the execution failed of at last; None for each where nothing did."""
    attempt = newest(record)
    if record.error_type is not None or attempt is None:
        return record.error_type, record.error_message
    return attempt.error_type, attempt.error_message


def traces(record: ExecutionRecord) -> list[str]:
    """Give the trace ids of the execution, the newest attempt's first, each once."""
    found = [ids(record)[0], *(attempt.trace_id for attempt in reversed(record.attempts)), record.producer_trace_id]
    return list(dict.fromkeys(trace_id for trace_id in found if trace_id is not None))


def _parsed(text: str | None) -> Any:
    """Parse a JSON column; what is none, or is nested deeper than can be read from here, is given as its text."""
    if text is None:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
