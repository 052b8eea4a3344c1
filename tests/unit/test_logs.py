"""The fields that every log record carries."""

# ruff: noqa: SIM117 (scope and execution are two things)

from __future__ import annotations

import io
import logging
from collections.abc import MutableMapping
from typing import NoReturn

import pytest
import structlog
from opentelemetry import trace

import otelexec
from tests.records import Records

PLAIN = "%(otelexec_execution_id)s|%(otelexec_request_id)s|%(otelexec_attempt)s|%(otelTraceID)s|%(otelSpanID)s|%(message)s"


@pytest.fixture
def lines() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def log(lines: io.StringIO) -> logging.Logger:
    logger = logging.Logger("app", logging.INFO)  # noqa: LOG001 (outside the tree, so that no handler stays behind)
    handler = logging.StreamHandler(lines)
    handler.setFormatter(logging.Formatter(PLAIN))
    logger.addHandler(handler)
    return logger


def test_a_plain_format_string_shows_the_execution_inside_and_empty_strings_outside(
    records: Records, log: logging.Logger, lines: io.StringIO
) -> None:
    otelexec.configure()
    log.info("before")
    with otelexec.correlate(source="x", execution_id="e", request_id="r"), otelexec.execution("job") as run:
        log.info("inside")
    log.info("after")
    context = run._execution.span.get_span_context()
    assert lines.getvalue().splitlines() == [
        "|||||before",
        f"e|r|1|{context.trace_id:032x}|{context.span_id:016x}|inside",
        "|||||after",
    ]
    assert records.attempt().span_id == f"{context.span_id:016x}"


def test_the_attempt_s_number_and_the_innermost_span_are_shown(records: Records, log: logging.Logger, lines: io.StringIO) -> None:
    span: trace.Span = trace.INVALID_SPAN
    for _ in range(2):
        with otelexec.correlate(source="x", execution_id="e", request_id="r"), otelexec.execution("job"):
            with trace.get_tracer("app").start_as_current_span("query") as span:
                log.info("x")
    assert lines.getvalue().splitlines()[1].split("|")[:3] == ["e", "r", "2"]
    assert lines.getvalue().splitlines()[1].split("|")[4] == f"{span.get_span_context().span_id:016x}"


def test_outside_an_execution_the_current_span_is_shown(records: Records, log: logging.Logger, lines: io.StringIO) -> None:
    """As opentelemetry-instrumentation-logging does under these names: a request that only sends is found by its trace, too."""
    otelexec.configure()
    with trace.get_tracer("app").start_as_current_span("POST /hooks") as span:
        log.info("x")
    context = span.get_span_context()
    assert lines.getvalue() == f"|||{context.trace_id:032x}|{context.span_id:016x}|x\n"


def test_fields_that_somebody_else_has_set_stay(records: Records) -> None:
    before = logging.getLogRecordFactory()

    def theirs(*args: object, **kwargs: object) -> logging.LogRecord:
        record = before(*args, **kwargs)
        record.otelTraceID = "theirs"
        return record

    logging.setLogRecordFactory(theirs)
    with otelexec.execution("job") as run:
        record = logging.getLogger("x").makeRecord("x", logging.INFO, "f", 1, "m", (), None)
    assert record.__dict__["otelTraceID"] == "theirs"
    assert record.__dict__["otelexec_execution_id"] == run.id


def test_configuring_twice_wraps_the_factory_once() -> None:
    otelexec.configure()
    first = logging.getLogRecordFactory()
    otelexec.configure()
    assert logging.getLogRecordFactory() is first


def test_extra_may_not_be_hit_by_our_fields(records: Records, log: logging.Logger) -> None:
    """`extra` with one of the names would be a KeyError in `logging`; ours under other names is not."""
    with otelexec.execution("job"):
        log.info("x", extra={"execution_id": "mine"})


def test_a_structlog_processor_adds_the_same_fields(records: Records) -> None:
    events: list[dict[str, object]] = []

    def keep(_: object, __: str, event: MutableMapping[str, object]) -> NoReturn:
        events.append(dict(event))
        raise structlog.DropEvent

    log = structlog.wrap_logger(None, processors=[otelexec.structlog_processor, keep])
    log.info("outside")
    with otelexec.correlate(source="x", execution_id="e", request_id="r"), otelexec.execution("job"):
        log.info("inside", otelexec_attempt="mine")
    assert events[0] == {
        "event": "outside",
        "otelexec_execution_id": "",
        "otelexec_request_id": "",
        "otelexec_attempt": "",
        "otelTraceID": "",
        "otelSpanID": "",
    }
    assert (events[1]["otelexec_execution_id"], events[1]["otelexec_request_id"], events[1]["otelexec_attempt"]) == ("e", "r", "mine")
