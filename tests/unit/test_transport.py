"""The relay's transports: TLS with the standard variables, and what each answer means."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanContext

from otelexec import endpoint, otlp
from otelexec.receiver import Answer, OtlpReceiver
from otelexec.transport import Verdict, connect
from tests.servers import missing

if TYPE_CHECKING:
    from collections.abc import Iterator
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
