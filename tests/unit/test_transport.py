"""The relay's transports: TLS with the standard variables, and what each answer means."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Self

import grpc  # type: ignore[import-untyped] # ships no types
import pytest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanContext

import otelexec
from otelexec import endpoint, otlp
from otelexec.cli.doctor import _endpoint as check_endpoint
from otelexec.errors import SettingsError
from otelexec.receiver import Answer, OtlpReceiver
from otelexec.settings import Settings
from otelexec.transport import Reply, Verdict, connect
from tests.patience import PATIENCE
from tests.servers import missing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SPAN = otlp.encode_span(ReadableSpan("run", context=SpanContext(1, 2, is_remote=False), start_time=1, end_time=2))
BODY = otlp.wrap(otlp.encode_resource(Resource({"service.name": "tests"})), {b"\x0a\x00": [SPAN]})


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Make a self-signed certificate for loopback and its key, which serve as authority, server and client alike."""
    openssl = shutil.which("openssl")
    if openssl is None:
        missing("the openssl command is not there")
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    name = ("-subj", "/CN=otelexec tests", "-addext", "subjectAltName=IP:127.0.0.1")
    files = ("-keyout", str(key), "-out", str(certificate))
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *name, *files]
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key


@pytest.fixture
def secured(certificate: tuple[Path, Path]) -> Iterator[OtlpReceiver]:
    """Receive over TLS, from clients that show a certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    context.load_verify_locations(certificate[0])
    context.verify_mode = ssl.CERT_REQUIRED
    with OtlpReceiver(tls=context) as receiver:
        yield receiver


def test_tls_uses_the_certificates_of_the_variables(
    certificate: tuple[Path, Path], secured: OtlpReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Authority, client certificate and key are used, also where REQUESTS_CA_BUNDLE names others."""
    environ = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": secured.endpoint,
        "OTEL_EXPORTER_OTLP_CERTIFICATE": str(certificate[0]),
        "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE": str(certificate[0]),
        "OTEL_EXPORTER_OTLP_CLIENT_KEY": str(certificate[1]),
    }
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate[1]))
    transport = connect(endpoint.read(None, environ))
    assert transport.send(BODY).verdict is Verdict.ACCEPTED
    transport.close()
    assert len(secured.spans) == 1


@pytest.mark.parametrize("known", [False, True])
def test_a_certificate_that_does_not_match_keeps_the_rows_unblamed(
    known: bool, certificate: tuple[Path, Path], secured: OtlpReceiver
) -> None:
    """A server that is not trusted, or does not trust us, gets nothing; that is no fault of the rows."""
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": secured.endpoint} | ({"OTEL_EXPORTER_OTLP_CERTIFICATE": str(certificate[0])} if known else {})
    transport = connect(endpoint.read(None, environ))
    reply = transport.send(BODY)
    transport.close()
    assert reply.verdict in (Verdict.LATER, Verdict.FAILED) if known else reply.verdict is Verdict.LATER
    assert "SSL" in reply.reason or known
    assert secured.spans == []


@pytest.mark.parametrize(
    ("answer", "over_http", "over_grpc"),
    [
        (Answer(), Verdict.ACCEPTED, Verdict.ACCEPTED),
        (Answer(400), Verdict.REFUSED, Verdict.REFUSED),
        (Answer(401), Verdict.DENIED, Verdict.DENIED),
        (Answer(403), Verdict.DENIED, Verdict.DENIED),
        (Answer(404), Verdict.DENIED, Verdict.DENIED),
        (Answer(413), Verdict.REFUSED, Verdict.FAILED),
        (Answer(418), Verdict.DENIED, Verdict.FAILED),
        (Answer(429), Verdict.LATER, Verdict.FAILED),
        (Answer(429, retry_after="1"), Verdict.LATER, Verdict.LATER),
        (Answer(500), Verdict.FAILED, Verdict.FAILED),
        (Answer(503), Verdict.FAILED, Verdict.FAILED),
        (Answer(503, retry_after="1"), Verdict.LATER, Verdict.LATER),
        (Answer(504), Verdict.FAILED, Verdict.FAILED),
        (Answer(refused=True), Verdict.FAILED, Verdict.FAILED),
    ],
)
def test_each_answer_has_one_meaning(answer: Answer, over_http: Verdict, over_grpc: Verdict) -> None:
    """The table of the OTLP specification, with nothing ever dropped."""
    for protocol, verdict in (("http", over_http), ("grpc", over_grpc)):
        with OtlpReceiver(protocol) as receiver:
            receiver.script(answer)
            name = "grpc" if protocol == "grpc" else "http/protobuf"
            environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint, "OTEL_EXPORTER_OTLP_PROTOCOL": name}
            transport = connect(endpoint.read(None, environ))
            assert transport.send(BODY).verdict is verdict
            transport.close()


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
def test_nobody_listening_is_no_fault_of_the_rows(protocol: str) -> None:
    """The request never left, so nothing can be said against it."""
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_EXPORTER_OTLP_PROTOCOL": protocol}
    transport = connect(endpoint.read(None, environ))
    assert transport.send(BODY).verdict is Verdict.LATER
    transport.close()


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_the_endpoint_learns_which_version_sends(protocol: str) -> None:
    with OtlpReceiver(protocol) as receiver:
        sent(receiver.endpoint, OTEL_EXPORTER_OTLP_PROTOCOL="grpc" if protocol == "grpc" else "http/protobuf")
    assert receiver.requests[0].headers["user-agent"].startswith(f"otelexec/{otelexec.__version__} (Python)")


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_an_empty_request_tells_whether_the_endpoint_is_there(protocol: str) -> None:
    """OTLP has servers accept a request without data, which makes it a probe that leaves no trace."""
    with OtlpReceiver(protocol) as receiver:
        name = "grpc" if protocol == "grpc" else "http/protobuf"
        environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint, "OTEL_EXPORTER_OTLP_PROTOCOL": name}
        transport = connect(endpoint.read(None, environ))
        assert transport.send(b"").verdict is Verdict.ACCEPTED
        transport.close()
        assert receiver.spans == []


def test_an_answer_that_is_no_otlp_is_still_an_acceptance(monkeypatch: pytest.MonkeyPatch) -> None:
    """A 2xx must never be sent again, whatever its body says."""
    monkeypatch.setattr("otelexec.receiver_servers._message", lambda _: b"\xff\xff not protobuf")
    with OtlpReceiver() as receiver:
        transport = connect(endpoint.read(None, {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint}))
        reply: Any = transport.send(BODY)
        transport.close()
    assert (reply.verdict, reply.reason) == (Verdict.ACCEPTED, "the endpoint's answer can't be read")


class Scripted:
    """
    A server on loopback that answers every connection with the same pieces, one after the other.

    Args:
        pieces: The answer.
        pause_seconds: How long after each piece the next one goes.
    """

    def __init__(self, *pieces: bytes, pause_seconds: float = 0.0) -> None:
        self._pieces = pieces
        self._pause = pause_seconds
        self._stopped = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(PATIENCE * 5)
        self._listener.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                with connection, contextlib.suppress(OSError):
                    connection.recv(65_536)
                    for piece in self._pieces:
                        connection.sendall(piece)
                        self._stopped.wait(self._pause)


def answer(content_type: str, body: bytes) -> bytes:
    return f"HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def sent(url: str, **environ: str) -> Reply:
    transport = connect(endpoint.read(None, {"OTEL_EXPORTER_OTLP_ENDPOINT": url, **environ}))
    try:
        return transport.send(BODY)
    finally:
        transport.close()


@pytest.mark.parametrize(
    ("content_type", "body"),
    [("text/html; charset=utf-8", b"Sign in"), ("TEXT/HTML", b""), ("application/x-protobuf", b""), ("text/plain", b" <!doctype html>")],
)
def test_a_page_is_no_delivery(content_type: str, body: bytes) -> None:
    """The port of a UI, or somebody's sign-in page, says 200 to everything."""
    with Scripted(answer(content_type, body)) as server:
        reply = sent(server.url)
    assert reply.verdict is (Verdict.ACCEPTED if "protobuf" in content_type else Verdict.DENIED)
    assert ("something else" in reply.reason) is (reply.verdict is Verdict.DENIED)


@pytest.mark.parametrize(
    ("body", "rejected", "said"),
    [
        (b'{"partialSuccess": {"rejectedSpans": "2", "errorMessage": "too old"}}', 2, "too old"),
        (b'{"partialSuccess": {}}', 0, ""),
        (b'{"partialSuccess": {"errorMessage": "\\u001b]0;\\u0007too\\r\\nold\\u202e"}}', 0, "]0; too old"),
        (b"{}", 0, ""),
        (b"[1]", 0, ""),
        (b"no json", 0, ""),
    ],
)
def test_a_partial_success_in_json_is_read(body: bytes, rejected: int, said: str) -> None:
    with Scripted(answer("Application/JSON", body)) as server:
        reply = sent(server.url)
    assert (reply.verdict, reply.rejected_spans, reply.reason) == (Verdict.ACCEPTED, rejected, said)


@pytest.mark.parametrize("part", ["head", "body"])
def test_an_answer_that_trickles_in_ends_with_the_timeout(part: str) -> None:
    """Each byte would start the timeout anew: the relay's claim, and a process's exit, would wait for as long as the endpoint likes."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-protobuf\r\nContent-Length: 600\r\n"
    slow = [b"X-Slow: 1\r\n"] * 600 if part == "head" else [b"\r\n", *([b"\0"] * 600)]
    with Scripted(head, *slow, pause_seconds=0.1) as server:
        started = time.monotonic()
        reply = sent(server.url, OTEL_EXPORTER_OTLP_TIMEOUT="0.5")
        assert time.monotonic() - started < PATIENCE * 5
    # The status stands, whatever happened to the text.
    assert reply.verdict is (Verdict.FAILED if part == "head" else Verdict.ACCEPTED)


def test_certificates_that_are_gone_when_they_are_needed_blame_no_row(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    for protocol in ("http/protobuf", "grpc"):
        authority = tmp_path / "authority.pem"
        authority.write_bytes(certificate[0].read_bytes())
        environ = {
            "OTEL_EXPORTER_OTLP_PROTOCOL": protocol,
            "OTEL_EXPORTER_OTLP_ENDPOINT": "https://127.0.0.1:1",
            "OTEL_EXPORTER_OTLP_CERTIFICATE": str(authority),
        }
        transport = connect(endpoint.read(None, environ))
        authority.unlink()
        reply = transport.send(BODY)
        transport.close()
        assert reply.verdict is Verdict.DENIED
        assert str(authority) in reply.reason


@pytest.mark.parametrize(("key", "said"), [(None, "CLIENT_KEY"), ("", "holds neither"), ("nonsense", "holds neither")])
def test_over_grpc_a_certificate_without_its_key_ends_no_process(
    key: str | None, said: str, certificate: tuple[Path, Path], tmp_path: Path
) -> None:
    """GRPC aborts the process that gives it one without the other, or an empty one."""
    environ = {
        "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
        "OTEL_EXPORTER_OTLP_ENDPOINT": "https://127.0.0.1:1",
        "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE": str(certificate[0]),
    }
    if key is not None:
        (tmp_path / "key.pem").write_text(key)
        environ["OTEL_EXPORTER_OTLP_CLIENT_KEY"] = str(tmp_path / "key.pem")
    script = (
        "from otelexec import endpoint, errors, transport\n"
        "try:\n    print(transport.connect(endpoint.read()).send(b''))\n"
        "except errors.SettingsError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | environ, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, said in done.stdout) == (0, True), done


@contextlib.contextmanager
def grpc_server(address: str, export: Callable[..., bytes] = lambda *_: b"", **options: int) -> Iterator[int]:
    """Serve the trace service, and accept everything within gRPC's own limits unless told otherwise."""
    server = grpc.server(ThreadPoolExecutor(1), options=[(f"grpc.{name}", value) for name, value in options.items()])
    port = server.add_insecure_port(address)
    handlers = {"Export": grpc.unary_unary_rpc_method_handler(export)}
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("opentelemetry.proto.collector.trace.v1.TraceService", handlers),)
    )
    server.start()
    try:
        yield port
    finally:
        server.stop(None)


def test_a_request_that_is_too_large_for_grpc_is_refused_and_may_be_divided() -> None:
    with grpc_server("127.0.0.1:0", max_receive_message_length=16) as port:
        reply = sent(f"http://127.0.0.1:{port}", OTEL_EXPORTER_OTLP_PROTOCOL="grpc")
    assert reply.verdict is Verdict.REFUSED
    assert "larger than max" in reply.reason


@pytest.mark.parametrize(
    ("code", "details", "verdict"),
    [
        ("RESOURCE_EXHAUSTED", "grpc: received message larger than max (6030458 vs. 4194304)", Verdict.REFUSED),
        ("RESOURCE_EXHAUSTED", "gRPC message exceeds maximum size 4194304: 6030458", Verdict.REFUSED),
        ("OUT_OF_RANGE", "Error, decoded message length too large: found 6030458 bytes, the limit is: 4194304 bytes", Verdict.REFUSED),
        ("UNKNOWN", "Received http2 header with status: 413", Verdict.REFUSED),
        ("RESOURCE_EXHAUSTED", "too many requests", Verdict.FAILED),
        ("UNKNOWN", "Received http2 header with status: 415", Verdict.FAILED),
    ],
)
def test_each_server_says_too_large_in_its_own_words(code: str, details: str, verdict: Verdict) -> None:
    """Else the row counts as one that breaks the endpoint, and is never divided."""

    def refuse(_: bytes, context: grpc.ServicerContext) -> bytes:
        context.abort(getattr(grpc.StatusCode, code), details)
        raise AssertionError

    with grpc_server("127.0.0.1:0", refuse) as port:
        assert sent(f"http://127.0.0.1:{port}", OTEL_EXPORTER_OTLP_PROTOCOL="grpc").verdict is verdict


def test_a_port_that_speaks_grpc_blames_no_row_and_says_what_to_set() -> None:
    """4317 for 4318, with the protocol left at HTTP, is the most common mistake with these variables."""
    with grpc_server("127.0.0.1:0") as port:
        reply = sent(f"http://127.0.0.1:{port}")
    assert reply.verdict is Verdict.DENIED
    assert "OTEL_EXPORTER_OTLP_PROTOCOL=grpc" in reply.reason


@pytest.mark.parametrize("target", ["unix:{folder}/s", "unix://{folder}/s", "dns:///127.0.0.1:{port}", "ipv4:127.0.0.1:{port}"])
def test_grpc_s_own_targets_are_reached_and_looked_at(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The specification: any form that the gRPC client takes."""
    with grpc_server(f"unix:{tmp_path}/s" if target.startswith("unix") else "127.0.0.1:0") as port:
        environ = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": target.format(folder=tmp_path, port=port),
            "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
            "OTEL_EXPORTER_OTLP_INSECURE": "true",
        }
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        assert sent(environ.pop("OTEL_EXPORTER_OTLP_ENDPOINT"), **environ).verdict is Verdict.ACCEPTED
        assert check_endpoint(Settings(store="none")).problem == ""
    assert "nothing listens" in check_endpoint(Settings(store="none")).problem


@pytest.mark.parametrize("header", ["x-tenant-bin=AA==", "a!b=c"])
def test_headers_that_grpc_can_not_send_are_refused(header: str) -> None:
    environ = {"OTEL_EXPORTER_OTLP_HEADERS": header}
    with pytest.raises(SettingsError, match="usable name"):
        endpoint.read(None, environ | {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"})
    assert endpoint.read(None, environ).headers
