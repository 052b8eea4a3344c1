"""The HTTP and gRPC servers under `otelexec.receiver`: how a request is read and an answer written, and nothing else."""

from __future__ import annotations

import socket
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterator

    from otelexec.receiver import Answer, OtlpReceiver

PATH: Final = "/v1/traces"
PROTOBUF: Final = "application/x-protobuf"
SERVICE: Final = "opentelemetry.proto.collector.trace.v1.TraceService"
MAX_BODY_BYTES: Final = 64 * 1024 * 1024
GZIP: Final = 16 + zlib.MAX_WBITS
# OTLP specification, "OTLP/HTTP Response" and "OTLP/gRPC Response", and grpc's own table of HTTP statuses.
GRPC_CODES: Final = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "UNIMPLEMENTED",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    502: "UNAVAILABLE",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}


class _Server(ThreadingHTTPServer):
    """A server whose end also ends the connections that clients keep open."""

    daemon_threads = False  # so that server_close waits for the handlers: nothing of this receiver outlives its block
    request_queue_size = 128

    def __init__(self, receiver: OtlpReceiver, port: int, tls: ssl.SSLContext | None) -> None:
        self.receiver = receiver
        self._tls = tls
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        super().__init__(("127.0.0.1", port), _Handler)

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection; over TLS its handshake waits for the handler's thread."""
        accepted, address = super().get_request()
        if self._tls is not None:
            accepted = self._tls.wrap_socket(accepted, server_side=True, do_handshake_on_connect=False)
        with self._lock:
            self._open.add(accepted)
        return accepted, address

    def shutdown_request(self, request: Any) -> None:
        """Close a connection that its handler is done with."""
        with self._lock:
            self._open.discard(request)
        super().shutdown_request(request)

    def end_connections(self) -> None:
        """Make every handler that waits for a client's next request see the end of it."""
        with self._lock:
            for connection in self._open:
                # The client may have gone in this moment.
                try:
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Stay silent about clients that went away: tests kill them."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server  # pyright: ignore[reportIncompatibleVariableOverride] # only _Server makes these

    def do_POST(self) -> None:
        """Receive one request (OTLP specification, "OTLP/HTTP")."""
        length = int(self.headers.get("Content-Length") or -1)
        if not 0 <= length <= MAX_BODY_BYTES:
            self.close_connection = True  # what follows on this connection can't be told from the body
            self._send(411 if length < 0 else 413, b"", "text/plain")
            return
        body = self.rfile.read(length)
        if self.path != PATH:
            self._send(404, f"traces go to {PATH}\n".encode(), "text/plain")
        elif self.headers.get_content_type() != PROTOBUF:
            self._send(415, f"the body must be {PROTOBUF}\n".encode(), "text/plain")
        elif self.headers.get("Content-Encoding", "identity") not in ("gzip", "identity"):
            self._send(415, b"the body must be gzip or identity\n", "text/plain")
        else:
            self._take(body)

    def _take(self, body: bytes) -> None:
        if self.headers.get("Content-Encoding") == "gzip":
            try:
                body = zlib.decompress(body, GZIP)
            except zlib.error:
                self._send(400, b"the body is no gzip\n", "text/plain")
                return
        answer = self.server.receiver.take(body, {name.lower(): value for name, value in self.headers.items()})
        if answer.lost or answer.refused:
            self.close_connection = True
            return
        if answer.text:
            self._send(answer.status, answer.message.encode(), "text/plain", answer.retry_after)
        else:
            self._send(answer.status, _message(answer), PROTOBUF, answer.retry_after)

    def _send(self, status: int, body: bytes, content_type: str, retry_after: str | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        if retry_after is not None:
            self.send_header("Retry-After", retry_after)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 # the base class names it so
        """Print nothing."""


@contextmanager
def serve_http(receiver: OtlpReceiver, port: int, tls: ssl.SSLContext | None) -> Iterator[int]:
    """
    Serve OTLP/HTTP on loopback; gives the port.

    Args:
        receiver: Decides on each request.
        port: 0 takes a free one.
        tls: Serve HTTPS.
    """
    server = _Server(receiver, port, tls)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), name="otlp-receiver", daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        receiver.closing.set()
        server.shutdown()
        server.end_connections()
        server.server_close()
        thread.join()


@contextmanager
def serve_grpc(receiver: OtlpReceiver, port: int) -> Iterator[int]:
    """
    Serve OTLP/gRPC on loopback; gives the port.

    Args:
        receiver: Decides on each request.
        port: 0 takes a free one.
    """
    import grpc  # type: ignore[import-untyped] # ships no types

    def export(body: bytes, context: grpc.ServicerContext) -> bytes:
        answer = receiver.take(body, {key.lower(): str(value) for key, value in context.invocation_metadata()})
        if answer.lost or answer.refused:
            # What a client sees of a lost connection; gRPC gives no way to close it for one call.
            context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
        if not answer.accepts:
            if answer.retry_after is not None:
                context.set_trailing_metadata((("grpc-status-details-bin", _message(answer)),))
            context.abort(getattr(grpc.StatusCode, GRPC_CODES.get(answer.status, "UNKNOWN")), answer.message)
        return _message(answer)

    handler = grpc.unary_unary_rpc_method_handler(export)
    pool = ThreadPoolExecutor(8, thread_name_prefix="otlp-receiver")
    server = grpc.server(pool, options=(("grpc.max_receive_message_length", MAX_BODY_BYTES), ("grpc.so_reuseport", 0)))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Export": handler}),))
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    try:
        yield bound
    finally:
        receiver.closing.set()
        server.stop(None).wait()
        pool.shutdown()


def _message(answer: Answer) -> bytes:
    """Give the protobuf body of an answer: ExportTraceServiceResponse, or google.rpc.Status with RetryInfo."""
    if answer.accepts:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

        response = ExportTraceServiceResponse()
        if answer.rejected_spans or answer.message:
            response.partial_success.rejected_spans = answer.rejected_spans
            response.partial_success.error_message = answer.message
        return bytes(response.SerializeToString())
    from google.rpc.error_details_pb2 import RetryInfo  # type: ignore[import-untyped] # ships no types
    from google.rpc.status_pb2 import Status  # type: ignore[import-untyped] # it has no stubs

    status = Status(message=answer.message)
    if answer.retry_after is not None and answer.retry_after.isdecimal():
        info = RetryInfo()
        info.retry_delay.seconds = int(answer.retry_after)
        status.details.add().Pack(info)
    return bytes(status.SerializeToString())
