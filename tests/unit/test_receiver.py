"""The OTLP receiver for tests: what it takes in, and that it misbehaves exactly as told."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import requests
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult

from otelexec import otlp
from otelexec.receiver import Answer, OtlpReceiver

if TYPE_CHECKING:
    from collections.abc import Callable

PROTOBUF = {"Content-Type": "application/x-protobuf"}


def make_span(name: str = "invoice.run", **attributes: Any) -> ReadableSpan:
    span = TracerProvider().get_tracer("tests").start_span(name, attributes=attributes)
    span.end()
    assert isinstance(span, ReadableSpan)
    return span


def make_request(*spans: ReadableSpan) -> bytes:
    return b"".join(
        otlp.wrap(otlp.encode_resource(span.resource), {otlp.encode_scope(span.instrumentation_scope): [otlp.encode_span(span)]})
        for span in spans
    )


def post(receiver: OtlpReceiver, body: bytes, path: str = "/v1/traces", **headers: str) -> requests.Response:
    return requests.post(f"{receiver.endpoint}{path}", data=body, headers=PROTOBUF | headers, timeout=10)


def grpc_export(receiver: OtlpReceiver, body: bytes, timeout: float = 10) -> bytes:
    import grpc  # type: ignore[import-untyped] # ships no types

    with grpc.insecure_channel(receiver.endpoint.removeprefix("http://")) as channel:
        export = channel.unary_unary("/opentelemetry.proto.collector.trace.v1.TraceService/Export")
        return bytes(export(body, timeout=timeout))


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_it_takes_what_the_sdk_exporters_send(protocol: str, compressed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stock exporters, plain and compressed, deliver to it by the standard variables."""
    if compressed:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-tenant=a")
    with OtlpReceiver(protocol) as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint)
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(HttpExporter() if protocol == "http" else GrpcExporter()))
        with provider.get_tracer("tests").start_as_current_span("work") as span:
            span.set_attribute("a", 1)
        provider.shutdown()
        [read] = receiver.wait_for(1)
        assert (read.name, read.attributes) == ("work", {"a": 1})
        assert receiver.requests[0].headers["x-tenant"] == "a"


def test_it_tells_repeats_from_differing_copies() -> None:
    """Every arrival of a span id is kept with its bytes."""
    span = make_span()
    other = otlp.encode_span(span, extra_attributes={"changed": True})
    changed = otlp.wrap(otlp.encode_resource(span.resource), {otlp.encode_scope(span.instrumentation_scope): [other]})
    with OtlpReceiver() as receiver:
        for body in (make_request(span), make_request(span), changed):
            assert post(receiver, body).status_code == 200
        [copies] = receiver.deliveries.values()
        assert copies == [otlp.encode_span(span), otlp.encode_span(span), other]


@pytest.mark.parametrize(
    ("status", "send"),
    [
        (404, lambda receiver: post(receiver, b"", path="/v1/metrics")),
        (415, lambda receiver: post(receiver, b"{}", **{"Content-Type": "application/json"})),
        (415, lambda receiver: post(receiver, b"x", **{"Content-Encoding": "br"})),
        (400, lambda receiver: post(receiver, b"x", **{"Content-Encoding": "gzip"})),
        (400, lambda receiver: post(receiver, zlib.compress(make_request(make_span())), **{"Content-Encoding": "gzip"})),
        (400, lambda receiver: post(receiver, b"\x0a\xff")),
        (411, lambda receiver: requests.post(f"{receiver.endpoint}/v1/traces", data=iter([b"x"]), headers=PROTOBUF, timeout=10)),
    ],
)
def test_what_is_no_otlp_request_is_refused(status: int, send: Callable[[OtlpReceiver], requests.Response]) -> None:
    """Path, content type, encoding and body are checked, as a collector does, and the connection stays usable."""
    with OtlpReceiver() as receiver:
        assert send(receiver).status_code == status
        assert receiver.spans == []
        assert post(receiver, gzip.compress(make_request(make_span())), **{"Content-Encoding": "gzip"}).status_code == 200
        assert len(receiver.spans) == 1


def test_scripted_answers_come_first_and_once_each() -> None:
    """Status, Retry-After and message are sent as told; afterwards requests are taken in again."""
    with OtlpReceiver() as receiver:
        receiver.script(Answer(503, "try later", retry_after="7"), Answer(502, "bad gateway", text=True))
        first, second, third = (post(receiver, make_request(make_span())) for _ in range(3))
        assert (first.status_code, first.headers["Retry-After"], first.headers["Content-Type"]) == (503, "7", "application/x-protobuf")
        assert b"try later" in first.content
        assert (second.status_code, second.text, second.headers["Content-Type"]) == (502, "bad gateway", "text/plain")
        assert third.status_code == 200
        assert len(receiver.spans) == 1
        assert [request.answer.status for request in receiver.requests] == [503, 502, 200]


def test_a_partial_success_takes_in_only_the_rest() -> None:
    """Rejected spans are counted from the end of the request and don't count as received."""
    with OtlpReceiver() as receiver:
        receiver.script(Answer(rejected_spans=2, message="too old"))
        response = post(receiver, make_request(make_span("a"), make_span("b"), make_span("c")))
        partial = ExportTraceServiceResponse.FromString(response.content).partial_success
        assert (partial.rejected_spans, partial.error_message) == (2, "too old")
        assert [span.name for span in receiver.spans] == ["a"]


def test_a_callable_decides_by_what_a_request_holds() -> None:
    """The answer may depend on the spans; None means 200."""
    with OtlpReceiver(answer=lambda spans: Answer(500) if len(spans) > 1 else None) as receiver:
        assert post(receiver, make_request(make_span(), make_span())).status_code == 500
        assert post(receiver, make_request(make_span())).status_code == 200


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_poisoned_span_spoils_its_request(protocol: str) -> None:
    """Any request with the span gets 400, or its gRPC code, and none of it is taken in."""
    import grpc

    with OtlpReceiver(protocol, poison=lambda span: span.name == "bad") as receiver:
        body = make_request(make_span("good"), make_span("bad"))
        if protocol == "http":
            assert post(receiver, body).status_code == 400
        else:
            with pytest.raises(grpc.RpcError) as raised:
                grpc_export(receiver, body)
            assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert receiver.spans == []


@pytest.mark.parametrize(("answer", "taken"), [(Answer(lost=True), 1), (Answer(refused=True), 0)])
def test_a_connection_can_be_lost_before_and_after_the_spans_are_in(answer: Answer, taken: int) -> None:
    """Without an answer the client can't know which of the two it was."""
    with OtlpReceiver() as receiver:
        receiver.script(answer)
        with pytest.raises(requests.ConnectionError):
            post(receiver, make_request(make_span()))
        assert len(receiver.spans) == taken


@pytest.mark.parametrize(
    ("answer", "code"),
    [(Answer(lost=True), "UNAVAILABLE"), (Answer(401), "UNAUTHENTICATED"), (Answer(429), "RESOURCE_EXHAUSTED"), (Answer(418), "UNKNOWN")],
)
def test_grpc_answers_with_the_paired_code(answer: Answer, code: str) -> None:
    """HTTP statuses map to gRPC codes as in the OTLP specification."""
    import grpc

    with OtlpReceiver("grpc") as receiver:
        receiver.script(answer)
        with pytest.raises(grpc.RpcError) as raised:
            grpc_export(receiver, make_request(make_span()))
        assert raised.value.code().name == code


def test_grpc_sends_retry_info_and_partial_success() -> None:
    """The delay of a RESOURCE_EXHAUSTED travels in the status details, a partial success in the response."""
    import grpc
    from google.rpc.error_details_pb2 import RetryInfo  # type: ignore[import-untyped] # ships no types
    from google.rpc.status_pb2 import Status  # type: ignore[import-untyped]

    with OtlpReceiver("grpc") as receiver:
        receiver.script(Answer(429, "slow down", retry_after="3"), Answer(rejected_spans=1, message="no"))
        with pytest.raises(grpc.RpcError) as raised:
            grpc_export(receiver, make_request(make_span()))
        trailers: Any = raised.value.trailing_metadata()
        details = dict(trailers)["grpc-status-details-bin"]
        info = RetryInfo()
        assert Status.FromString(details).details[0].Unpack(info)
        assert info.retry_delay.seconds == 3
        answer = ExportTraceServiceResponse.FromString(grpc_export(receiver, make_request(make_span())))
        assert answer.partial_success.rejected_spans == 1


def test_a_delayed_answer_does_not_hold_up_the_end() -> None:
    """Leaving the block ends the wait of a slow answer at once, and every thread with it."""
    before = threading.active_count()
    asked = threading.Event()

    def slow(_: object) -> Answer:
        asked.set()
        return Answer(delay_seconds=600)

    with OtlpReceiver(answer=slow) as receiver:
        client = socket.create_connection(("127.0.0.1", int(receiver.endpoint.rpartition(":")[2])))
        body = make_request(make_span())
        head = f"POST /v1/traces HTTP/1.1\r\nContent-Type: application/x-protobuf\r\nContent-Length: {len(body)}\r\n\r\n"
        client.sendall(head.encode() + body)
        assert asked.wait(10)
    client.close()
    assert receiver.closing.is_set()
    assert threading.active_count() == before


def test_a_kept_open_connection_does_not_hold_up_the_end() -> None:
    """A client that keeps its connection for later sees it closed."""
    with requests.Session() as session:
        with OtlpReceiver() as receiver:
            body = make_request(make_span())
            assert session.post(f"{receiver.endpoint}/v1/traces", data=body, headers=PROTOBUF, timeout=10).status_code == 200
        with pytest.raises(requests.ConnectionError):
            session.post(f"{receiver.endpoint}/v1/traces", data=body, headers=PROTOBUF, timeout=10)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_it_comes_back_at_the_same_address(protocol: str) -> None:
    """An outage is a block left and entered again: same endpoint, spans kept."""
    receiver = OtlpReceiver(protocol)
    seen = set()
    for _ in range(2):
        with receiver:
            seen.add(receiver.endpoint)
            if protocol == "http":
                post(receiver, make_request(make_span()))
            else:
                grpc_export(receiver, make_request(make_span()))
    assert len(seen) == 1
    assert len(receiver.spans) == 2


def test_waiting_ends_when_enough_has_arrived_or_says_what_did() -> None:
    """By count or by a question; a timeout names what is there."""
    with OtlpReceiver() as receiver:
        sender = threading.Thread(target=lambda: [post(receiver, make_request(make_span(name))) for name in "abc"])
        sender.start()
        assert [span.name for span in receiver.wait_for(3)] == ["a", "b", "c"]
        sender.join()
        assert receiver.wait_for(lambda seen: any(span.name == "b" for span in seen.spans))
        with pytest.raises(TimeoutError, match=r"3 spans in 3 requests after 0\.01 s: \['a', 'b', 'c'\]"):
            receiver.wait_for(4, timeout=0.01)


def test_many_clients_at_once_lose_nothing() -> None:
    """Requests from 16 threads are all taken in."""
    with OtlpReceiver() as receiver:
        threads = [threading.Thread(target=lambda: [post(receiver, make_request(make_span())) for _ in range(10)]) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(receiver.wait_for(160)) == 160
        assert len(receiver.deliveries) == 160


def test_an_exporter_takes_a_refusal_for_a_failure() -> None:
    """The SDK's exporter reads the answer as an endpoint's."""
    with OtlpReceiver() as receiver:
        receiver.script(Answer(400))
        exporter: SpanExporter = HttpExporter(endpoint=f"{receiver.endpoint}/v1/traces")
        assert exporter.export([make_span()]) is SpanExportResult.FAILURE
        exporter.shutdown()


def test_it_runs_in_a_process_of_its_own_and_logs_each_span(tmp_path: Path) -> None:
    """`python -m otelexec.receiver` prints its endpoint, logs a line per span before it answers, and ends on SIGTERM."""
    log = tmp_path / "spans.jsonl"
    command = [sys.executable, "-m", "otelexec.receiver", "--log", str(log)]
    root = str(Path(__file__).parents[2])
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": root}) as process:
        assert process.stdout is not None
        endpoint = process.stdout.readline().strip()
        attributes: dict[str, Any] = {"otelexec.execution_id": "e-1", "otelexec.attempt": 2, "otelexec.outcome": "lost"}
        span = make_span(**attributes)
        before = time.time_ns()
        response = requests.post(f"{endpoint}/v1/traces", data=make_request(span), headers=PROTOBUF, timeout=10)
        assert response.status_code == 200
        [line] = map(json.loads, log.read_text().splitlines())
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    context = span.get_span_context()
    assert context is not None
    assert before <= line.pop("received_unix_ns") <= time.time_ns()
    assert line == {
        "trace_id": f"{context.trace_id:032x}",
        "span_id": f"{context.span_id:016x}",
        "parent_span_id": None,
        "name": "invoice.run",
        "kind": "internal",
        "status": "unset",
        "start_unix_ns": span.start_time,
        "end_unix_ns": span.end_time,
        "execution_id": "e-1",
        "attempt": 2,
        "outcome": "lost",
        "sha256": hashlib.sha256(otlp.encode_span(span)).hexdigest(),
    }
