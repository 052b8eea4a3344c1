"""Real servers for tests, each on free loopback ports, and what tests read back from them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NoReturn

import pytest
import requests

from tests.patience import PATIENCE

ROOT = Path(__file__).resolve().parent.parent
JAEGER_SCRIPT = ROOT / "examples" / "jaeger" / "run.py"
JAEGER_CONFIG = ROOT / "examples" / "jaeger" / "config.yaml"
JAEGER_PORTS = ("JAEGER_UI_PORT", "JAEGER_GRPC_PORT", "JAEGER_OTLP_HTTP_PORT", "JAEGER_OTLP_GRPC_PORT", "JAEGER_HEALTH_PORT")

START_SECONDS = 30.0  # 2 are usual; CI shares its cores with the tests
STOP_SECONDS = 10.0
START_TRIES = 3  # another process may take a free port before Jaeger does
REQUEST_SECONDS = 10.0
POLL_SECONDS = 0.05


def missing(what: str) -> NoReturn:
    """Skip the test on a laptop, fail it in CI, where everything must be there."""
    if os.environ.get("CI"):
        pytest.fail(f"{what} (CI must have it)")
    pytest.skip(what)


@dataclass(frozen=True)
class Jaeger:
    """A running Jaeger of the test's own."""

    base_url: str
    """Where its UI and API are, without a slash at the end."""
    otlp_http_url: str
    """A value for OTEL_EXPORTER_OTLP_ENDPOINT with the protocol http/protobuf."""
    otlp_grpc_url: str
    """The same with the protocol grpc."""
    pid: int


@dataclass(frozen=True)
class JaegerSpan:
    """A span as Jaeger gives it back: ids in lowercase hex, attributes as plain values, times in nanoseconds since 1970."""

    trace_id: str
    span_id: str
    parent_span_id: str
    """Empty for a root."""
    name: str
    kind: int
    """As in OTLP: 1 internal, 2 server, 3 client, 4 producer, 5 consumer."""
    started_unix_ns: int
    ended_unix_ns: int
    attributes: Mapping[str, Any]
    resource: Mapping[str, Any]
    scope: str
    status: str
    """`unset`, `ok` or `error`."""
    status_message: str
    links: Sequence[tuple[str, str]]
    """Trace id and span id of each."""
    events: Sequence[str]
    """The name of each."""
    warnings: Sequence[str]
    """What Jaeger found odd about the span: a parent that is not there, a doubled id, a clock that disagrees."""


@contextmanager
def running_jaeger(folder: Path) -> Iterator[Jaeger]:
    """
    Run a Jaeger with memory storage until the block ends.

    Args:
        folder: Where its log goes (`jaeger.log`).
    """
    found = subprocess.run([sys.executable, JAEGER_SCRIPT, "--print-binary"], capture_output=True, text=True, check=False)
    if found.returncode != 0:
        missing("Jaeger is not built: examples/jaeger/run.py --build-only")
    command = [found.stdout.strip(), "--config", str(JAEGER_CONFIG)]

    with ExitStack() as stack:
        log = stack.enter_context((folder / "jaeger.log").open("w"))
        for _ in range(START_TRIES):
            ports = dict(zip(JAEGER_PORTS, free_ports(len(JAEGER_PORTS)), strict=True))
            environment = os.environ | {name: str(port) for name, port in ports.items()}
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            stack.callback(stop, process)
            if is_ready(process, f"http://127.0.0.1:{ports['JAEGER_HEALTH_PORT']}/status"):
                break
        else:
            pytest.fail(f"Jaeger did not start:\n{(folder / 'jaeger.log').read_text()[-2000:]}")
        yield Jaeger(
            base_url=f"http://127.0.0.1:{ports['JAEGER_UI_PORT']}",
            otlp_http_url=f"http://127.0.0.1:{ports['JAEGER_OTLP_HTTP_PORT']}",
            otlp_grpc_url=f"http://127.0.0.1:{ports['JAEGER_OTLP_GRPC_PORT']}",
            pid=process.pid,
        )


def free_ports(count: int) -> list[int]:
    """Give that many different ports of 127.0.0.1 on which nothing listens now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def is_ready(process: subprocess.Popen[bytes], health_url: str) -> bool:
    """
    Wait until a server says that it is healthy.

    Returns:
        False as soon as its process has ended, or when `START_SECONDS` have passed.
    """
    deadline = time.monotonic() + PATIENCE * START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if requests.get(health_url, timeout=1).ok:
                return True
        except requests.RequestException:
            pass
        time.sleep(POLL_SECONDS)
    return False


def stop(process: subprocess.Popen[Any]) -> None:
    """End a process of our own: first politely, then for certain."""
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def read_trace(base_url: str, trace_id: str, *, raw: bool = False, at_least: int = 0, within_seconds: float = 10.0) -> list[JaegerSpan]:
    """
    Read one trace back through `/api/v3`.

    Args:
        base_url: Where Jaeger's API is.
        trace_id: In hex.
        raw: Whether to see what was stored: byte-equal repeats included, no warnings. Only before any other reading of the trace:
            memory storage hands out the very spans that it keeps, and the removal of repeats edits them.
        at_least: How many spans to wait for, since they may still be on their way.
        within_seconds: How long to wait for them.

    Returns:
        Its spans by start; whatever is there at the end of the wait, nothing for an unknown trace.
    """
    deadline = time.monotonic() + PATIENCE * within_seconds
    while True:
        spans = spans_of(f"{base_url}/api/v3/traces/{trace_id}", {"raw_traces": "true"} if raw else {})
        if len(spans) >= at_least or time.monotonic() >= deadline:
            return spans
        time.sleep(POLL_SECONDS)


def search(
    base_url: str, service: str, *, operation: str = "", traces: int = 100, since: timedelta = timedelta(hours=1)
) -> dict[str, list[JaegerSpan]]:
    """
    Find a service's traces through `/api/v3`.

    Jaeger v2.13 ignores attributes there, so select by attribute in what comes back.

    Args:
        base_url: Where Jaeger's API is.
        service: The resource's `service.name`.
        operation: The name that a span of the trace must have; empty for any.
        traces: The most traces to give.
        since: How long ago they may have started.

    Returns:
        The spans of each trace, by trace id.
    """
    now = datetime.now(UTC)
    query = {
        "query.service_name": service,
        "query.operation_name": operation,
        # Both ends and the number are required.
        "query.start_time_min": timestamp(now - since),
        "query.start_time_max": timestamp(now + timedelta(minutes=1)),
        "query.num_traces": str(traces),
    }
    found: dict[str, list[JaegerSpan]] = {}
    for span in spans_of(f"{base_url}/api/v3/traces", query):
        found.setdefault(span.trace_id, []).append(span)
    return found


def timestamp(moment: datetime) -> str:
    """Write a UTC time as Jaeger's Go parser wants it (RFC 3339)."""
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def spans_of(url: str, query: Mapping[str, str]) -> list[JaegerSpan]:
    """Read every span of an answer of `/api/v3`, by start."""
    answer = requests.get(url, params=query, timeout=REQUEST_SECONDS)
    if answer.status_code == requests.codes.not_found:
        return []
    answer.raise_for_status()
    return sorted(
        (
            decode_span(span, resource=attributes_of(group.get("resource", {})), scope=scoped.get("scope", {}).get("name", ""))
            for group in answer.json()["result"].get("resourceSpans", [])
            for scoped in group.get("scopeSpans", [])
            # The key is missing where deduplication left nothing.
            for span in scoped.get("spans", [])
        ),
        key=lambda span: span.started_unix_ns,
    )


def decode_span(span: Mapping[str, Any], *, resource: Mapping[str, Any], scope: str) -> JaegerSpan:
    """Turn a span of OTLP's JSON form into one that tests can compare."""
    attributes = attributes_of(span)
    warnings = attributes.pop("@jaeger@warnings", ())
    status = span.get("status", {})
    return JaegerSpan(
        trace_id=span["traceId"],
        span_id=span["spanId"],
        parent_span_id=span.get("parentSpanId", ""),
        name=span.get("name", ""),
        kind=span.get("kind", 0),
        started_unix_ns=int(span["startTimeUnixNano"]),
        ended_unix_ns=int(span["endTimeUnixNano"]),
        attributes=attributes,
        resource=resource,
        scope=scope,
        status=("unset", "ok", "error")[status.get("code", 0)],
        status_message=status.get("message", ""),
        links=[(link["traceId"], link["spanId"]) for link in span.get("links", [])],
        events=[event.get("name", "") for event in span.get("events", [])],
        warnings=[warnings] if isinstance(warnings, str) else list(warnings),
    )


def attributes_of(holder: Mapping[str, Any]) -> dict[str, Any]:
    """Give the attributes of a span, a resource or a scope as plain values."""
    return {each["key"]: plain(each.get("value", {})) for each in holder.get("attributes", [])}


def plain(value: Mapping[str, Any]) -> Any:
    """Turn an OTLP JSON value into a Python one; 64-bit integers come as text."""
    match next(iter(value.items()), ("", None)):
        case ("intValue", number):
            return int(number)
        case ("arrayValue", array):
            return [plain(each) for each in array.get("values", [])]
        case ("kvlistValue", mapping):
            return {each["key"]: plain(each.get("value", {})) for each in mapping.get("values", [])}
        case (_, other):
            return other
