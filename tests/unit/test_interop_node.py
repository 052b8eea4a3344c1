"""OpenTelemetry JS reads what we write, and we read what it writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import baggage, trace
from opentelemetry import context as otel_context
from opentelemetry.context.context import Context

from otelexec import runtime, settings, w3c
from otelexec.correlation import Correlation, correlate
from otelexec.propagation import entries, extract_headers
from tests.node import node_with

Node = Callable[[bytes], bytes]

SCRIPT = Path(__file__).parent / "interop" / "w3c.js"
PACKAGES = {"@opentelemetry/api": "1.9.0", "@opentelemetry/core": "2.0.0"}
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
SPAN = {"traceId": TRACEPARENT[3:35], "spanId": TRACEPARENT[36:52], "traceFlags": 1, "traceState": "vendor=1"}

TEXTS = [
    "plain",
    "a b",
    "a+b",
    "100%",
    "%20",
    "k=v",
    "a,b;c=d",
    '"quoted" \\ back',
    "/hooks/stripe?x=1&y=2#z",
    "2026-01-02T03:04:05+00:00",
    "Grüße",
    "雪☃",
    "💥",
    " blanks around ",
    "line\r\nend\tand\0zero",
    "[]{}<>()!*'~^`|@:$",
]


@pytest.fixture(scope="module")
def node() -> Node:
    """Give what runs the script."""
    runner = node_with(PACKAGES)

    def run(asked: bytes) -> bytes:
        done = runner.run(str(SCRIPT), given=asked)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout

    return run


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch) -> None:
    values = settings.load()
    monkeypatch.setattr(runtime, "settings", lambda: values)


def ask(node: Node, *, inject: list[Any] | None = None, extract: list[Any] | None = None) -> dict[str, Any]:
    asked = json.dumps({"inject": inject or [], "extract": extract or []})
    answer: dict[str, Any] = json.loads(node(asked.encode()))
    return answer


def test_javascript_reads_the_trace_and_every_member_that_we_write(node: Node) -> None:
    """Any text as an attribute, and any token or other text as its name."""
    span_context = w3c.decode_trace(TRACEPARENT, "vendor=1")
    assert span_context is not None
    context = trace.set_span_in_context(trace.NonRecordingSpan(span_context), Context())
    context = baggage.set_baggage("tenant", "ä + ö", context=context)
    attributes = {f"n{number}": text for number, text in enumerate(TEXTS)} | {text.strip(): "name" for text in TEXTS}
    correlation = Correlation.from_members(
        {"otelexec.source": "webhook", "otelexec.path": "/a b", **{f"otelexec.{name}": value for name, value in attributes.items()}}
    )
    [read] = ask(node, extract=[entries(context, correlation)])["extracted"]
    assert read["span"] == SPAN
    assert read["baggage"] == {**correlation.members(), "tenant": "ä + ö"}


def test_we_read_the_trace_and_every_member_that_javascript_writes(node: Node) -> None:
    """Ours become the correlation, others the baggage, with the text that was set there."""
    ours = {"otelexec.execution_id": "e", "otelexec.request_id": "r 1", "otelexec.source": "my web"}
    others = {f"k{number}": text for number, text in enumerate(TEXTS)}
    [headers] = ask(node, inject=[{"span": SPAN, "baggage": {**ours, **others}}])["injected"]
    with extract_headers(headers) as scope:
        assert scope.correlation.members() == ours
        assert {name: value for name, value in baggage.get_all().items() if name in others} == others
        span_context = trace.get_current_span().get_span_context()
        assert w3c.encode_traceparent(span_context) == TRACEPARENT
        assert span_context.trace_state.to_header() == "vendor=1"


def test_a_header_at_the_limits_is_read_whole_by_javascript(node: Node) -> None:
    """180 members, and 8,192 bytes: nothing that we wrote is left out."""
    many = {f"m{number}": "x" for number in range(300)}
    large = {f"m{number}": "x" * 4_000 for number in range(3)} | {f"s{number}": "é" * 20 for number in range(30)}
    correlation = Correlation(source="x")
    headers = [{"baggage": w3c.encode_baggage(correlation.members(), others)[0]} for others in (many, large)]
    for header, read in zip(headers, ask(node, extract=headers)["extracted"], strict=True):
        ours, others = w3c.decode_baggage(header["baggage"])
        assert read["baggage"] == {**ours, **others}
        assert read["baggage"]["otelexec.execution_id"] == correlation.execution_id


def test_members_of_a_javascript_caller_pass_through_us_unchanged(node: Node) -> None:
    """Sent there, received and sent on here, read there again."""
    others = {f"k{number}": text for number, text in enumerate(TEXTS)}
    [headers] = ask(node, inject=[{"span": SPAN, "baggage": others}])["injected"]
    with extract_headers(headers), correlate(source="relay") as correlation:
        again = entries(otel_context.get_current(), correlation)
    assert again["baggage"].endswith(headers["baggage"])
    [read] = ask(node, extract=[again])["extracted"]
    assert read["baggage"] == {**correlation.members(), **others}
    assert read["span"] == SPAN
