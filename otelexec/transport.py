"""
One OTLP request and what its answer means for the rows in it (OTLP specification, "Failures" of gRPC and of HTTP).

Where the specification says "must not retry", it means that the data is dropped. Nothing is dropped here: such rows are
parked, or kept if the endpoint's configuration is to blame.
"""

from __future__ import annotations

import contextlib
import enum
import gzip
import json
import netrc  # noqa: F401 (requests imports it with its first request, at which no fork would wait: `importing`)
import time
import zlib
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import requests
from opentelemetry import context as otel_context
from urllib3.exceptions import NewConnectionError

from otelexec.clock import monotonic
from otelexec.importing import importing
from otelexec.timely import TimelyAdapter, answered_by

if TYPE_CHECKING:
    from collections.abc import Iterator

    from otelexec.endpoint import Endpoint

PROTOBUF: Final = "application/x-protobuf"
EXPORT: Final = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
_CONNECT_SECONDS: Final = 5.0  # for each address of the host; a network that takes longer is down
_REASON_CHARS: Final = 500
_ANSWER_BYTES: Final = 65_536
_REFUSED: Final = frozenset({400, 413, 422})
_LATER: Final = frozenset({408, 429})
_OK: Final = range(200, 300)
_SERVER_ERROR: Final = 500
_NEVER_SENT: Final = ("failed to connect", "errors resolving", "dns resolution failed")  # of gRPC's own words
# Of gRPC's Go, C and JavaScript; of its Java; of Rust's tonic; of a proxy for HTTP in front of any.
_TOO_LARGE: Final = ("larger than max", "exceeds maximum size", "message length too large", "status: 413")
_SAY_TOO_LARGE: Final = frozenset({"RESOURCE_EXHAUSTED", "OUT_OF_RANGE", "UNKNOWN"})
_ENCODERS: Final = {"gzip": lambda body: gzip.compress(body, 6, mtime=0), "deflate": zlib.compress}


class Verdict(enum.Enum):
    """What an answer means."""

    ACCEPTED = "accepted"
    """Delivered; never to be sent again."""
    REFUSED = "refused"
    """Something in this request will never be accepted."""
    FAILED = "failed"
    """Worth another try, but perhaps it is the request's content that breaks the endpoint."""
    LATER = "later"
    """Worth another try, and the content has nothing to do with it."""
    DENIED = "denied"
    """The endpoint or the credentials are wrong; the rows are fine."""


@dataclass(frozen=True, slots=True)
class Reply:
    """
    The answer to one request.

    Attributes:
        verdict: What it means.
        reason: Status and message, for people; the message of `partial_success` when accepted.
        retry_after: Seconds that the endpoint asked for; None if it did not.
        rejected_spans: `partial_success.rejected_spans`.
    """

    verdict: Verdict
    reason: str = ""
    retry_after: float | None = None
    rejected_spans: int = 0


class HttpTransport:
    """
    OTLP over HTTP/protobuf.

    Attributes:
        timeout_seconds: How long a request may wait for its answer.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self.timeout_seconds = endpoint.timeout_seconds
        self._session = requests.Session()
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, TimelyAdapter())
        self._session.headers.update({"Content-Type": PROTOBUF, "User-Agent": _user_agent()} | dict(endpoint.headers))
        certificate, key = endpoint.client_certificate, endpoint.client_key
        # Once, not for every request: it reads all proxy variables. The certificate has to be among the arguments, or
        # REQUESTS_CA_BUNDLE would go before it.
        self._settings = self._session.merge_environment_settings(
            url=endpoint.url,
            proxies={},
            stream=True,
            verify=endpoint.certificate or True,
            cert=(certificate, key) if certificate and key else certificate,
        )
        if "authorization" in endpoint.headers:
            # Without an auth of its own, requests would put a matching .netrc entry over this header.
            self._session.auth = _keep_headers
        self._encode = _ENCODERS.get(endpoint.compression)
        if self._encode is not None:
            self._session.headers["Content-Encoding"] = endpoint.compression

    def send(self, body: bytes) -> Reply:
        """
        Send one request (OTLP specification, "OTLP/HTTP").

        Args:
            body: A request; an empty one is valid, and tells whether the endpoint is there.

        Returns:
            What became of it; the endpoint never makes this raise.
        """
        data = self._encode(body) if self._encode is not None else body
        timeout = self.timeout_seconds
        connect_timeout = min(timeout, _CONNECT_SECONDS)
        try:
            # Redirects are not followed: they would carry the headers elsewhere, and turn the POST into a GET.
            prepared = self._session.prepare_request(requests.Request("POST", self._endpoint.url, data=data))
            with (
                _untraced(),
                answered_by(monotonic() + timeout),
                self._session.send(prepared, timeout=(connect_timeout, timeout), allow_redirects=False, **self._settings) as response,
            ):
                status = response.status_code
                try:
                    text = response.raw.read(_ANSWER_BYTES, decode_content=True)
                except Exception:
                    # The status stands, whatever happened to the text; a 2xx must not be sent again.
                    text = b""
        except (requests.exceptions.SSLError, requests.exceptions.ProxyError) as error:
            return Reply(Verdict.LATER, _named(error))
        except requests.exceptions.ConnectTimeout:
            return Reply(Verdict.LATER, f"no connection within {connect_timeout:.3g} s")
        except requests.exceptions.Timeout:
            return Reply(Verdict.FAILED, f"no answer within {timeout:.3g} s")
        except requests.exceptions.RequestException as error:
            return _unanswered(error)
        except (OSError, ValueError) as error:  # a file of certificates that has gone since it was looked at
            return Reply(Verdict.DENIED, _shortened(type(error).__name__, str(error)))
        return _http_reply(status, response.headers.get("Content-Type", ""), text, response.headers.get("Retry-After"))

    def close(self) -> None:
        """Close the connection; it is opened again by the next request."""
        self._session.close()


class GrpcTransport:
    """
    OTLP over gRPC, with the bytes as they are: no message is built.

    Attributes:
        timeout_seconds: How long a request may wait for its answer.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self.timeout_seconds = endpoint.timeout_seconds
        self._channel: Any = None
        self._export: Any = None

    def send(self, body: bytes) -> Reply:
        """
        Send one request (OTLP specification, "OTLP/gRPC").

        Args:
            body: A request; an empty one is valid, and tells whether the endpoint is there.

        Returns:
            What became of it; the endpoint never makes this raise.
        """
        with importing:  # gRPC imports more of itself when it makes a channel
            import grpc  # type: ignore[import-untyped] # ships no types

            try:
                if self._channel is None:
                    self._channel = self._open(grpc)
                    self._export = self._channel.unary_unary(EXPORT)
            except (OSError, ValueError) as error:
                return Reply(Verdict.DENIED, str(error))
        try:
            with _untraced():
                text = self._export(body, timeout=self.timeout_seconds, metadata=tuple(self._endpoint.headers.items()) or None)
        except grpc.RpcError as error:
            return _grpc_reply(error)
        return _accepted(text)

    def _open(self, grpc: Any) -> Any:
        options = (("grpc.primary_user_agent", _user_agent()),)
        compression = {"gzip": grpc.Compression.Gzip, "deflate": grpc.Compression.Deflate}.get(self._endpoint.compression)
        if not self._endpoint.secure:
            return grpc.insecure_channel(self._endpoint.url, options, compression)
        files = (self._endpoint.certificate, self._endpoint.client_key, self._endpoint.client_certificate)
        credentials = grpc.ssl_channel_credentials(*(None if name is None else _pem(Path(name)) for name in files))
        return grpc.secure_channel(self._endpoint.url, credentials, options, compression)

    def close(self) -> None:
        """Close the connection; it is opened again by the next request."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None


def _user_agent() -> str:
    """Name exporter, version and language (OpenTelemetry Protocol Exporter, "User Agent")."""
    from otelexec import __version__  # not there yet when the command line imports this module

    return f"otelexec/{__version__} (Python)"


def _pem(path: Path) -> bytes:
    """Read a certificate or a key; gRPC ends the whole process where it is given an empty one."""
    content = path.read_bytes()
    if b"-----BEGIN " not in content:
        raise ValueError(f"{path} holds neither a certificate nor a key in PEM")
    return content


Transport: TypeAlias = HttpTransport | GrpcTransport


def connect(endpoint: Endpoint) -> Transport:
    """Give the transport for an endpoint; nothing is sent yet."""
    return GrpcTransport(endpoint) if endpoint.protocol == "grpc" else HttpTransport(endpoint)


def _http_reply(status: int, content_type: str, text: bytes, retry_after: str | None) -> Reply:
    media_type = content_type.partition(";")[0].strip().lower()
    if status in _OK:
        return _taken(status, media_type, text)
    message = _status_message(text) if media_type == PROTOBUF else text.decode("utf-8", "replace")
    reason = _shortened(f"HTTP {status}", message)
    asked = _seconds(retry_after)
    if status in _REFUSED:
        return Reply(Verdict.REFUSED, reason)
    if status in _LATER or (status >= _SERVER_ERROR and asked is not None):
        return Reply(Verdict.LATER, reason, asked)
    # Every other 4xx, and a redirect, speaks of the address or the credentials.
    return Reply(Verdict.FAILED if status >= _SERVER_ERROR else Verdict.DENIED, reason, asked)


def _taken(status: int, media_type: str, text: bytes) -> Reply:
    """Read the answer of an endpoint that says that it took everything."""
    if media_type == PROTOBUF:
        return _accepted(text)
    if media_type == "text/html" or text.lstrip().startswith(b"<"):
        # Somebody's sign-in page, or the UI's port instead of the collector's: nobody has these spans.
        return Reply(Verdict.DENIED, f"HTTP {status} with a page, which is no answer of OTLP: this is the address of something else")
    if media_type == "application/json":
        with contextlib.suppress(Exception):  # whatever it says, the status stands
            partial = json.loads(text).get("partialSuccess") or {}
            said = _shortened("", str(partial.get("errorMessage") or ""))
            return Reply(Verdict.ACCEPTED, said, rejected_spans=int(partial.get("rejectedSpans") or 0))
    return Reply(Verdict.ACCEPTED)


def _grpc_reply(error: Any) -> Reply:
    code = error.code().name
    reason = _shortened(code, error.details() or "")
    asked = _retry_info(error)
    too_large = code in _SAY_TOO_LARGE and asked is None and any(words in reason.lower() for words in _TOO_LARGE)
    if code == "INVALID_ARGUMENT" or too_large:
        return Reply(Verdict.REFUSED, reason)
    if code in ("UNAUTHENTICATED", "PERMISSION_DENIED", "UNIMPLEMENTED", "NOT_FOUND"):
        return Reply(Verdict.DENIED, reason)
    # The specification lets RESOURCE_EXHAUSTED be retried only with RetryInfo; without one it may be the request's size.
    # The codes it never retries (UNKNOWN, INTERNAL) are what HTTP calls 500, and are treated as such.
    never_sent = code == "UNAVAILABLE" and any(words in reason.lower() for words in _NEVER_SENT)
    return Reply(Verdict.LATER if asked is not None or never_sent else Verdict.FAILED, reason, asked)


def _accepted(text: bytes) -> Reply:
    if not text:
        return Reply(Verdict.ACCEPTED)
    with importing:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

    try:
        partial = ExportTraceServiceResponse.FromString(text).partial_success
    except Exception:
        return Reply(Verdict.ACCEPTED, "the endpoint's answer can't be read")
    return Reply(Verdict.ACCEPTED, _shortened("", partial.error_message), rejected_spans=partial.rejected_spans)


def _status_message(text: bytes) -> str:
    """Give the message of a google.rpc.Status, the body of an OTLP/HTTP error."""
    with importing:
        from google.rpc.status_pb2 import Status  # type: ignore[import-untyped] # ships no types

    try:
        return str(Status.FromString(text).message)
    except Exception:
        return text.decode("utf-8", "replace")


def _retry_info(error: Any) -> float | None:
    """Give the seconds of a RetryInfo in the status details; None without one."""
    with importing:
        from google.rpc.error_details_pb2 import RetryInfo  # type: ignore[import-untyped] # ships no types
        from google.rpc.status_pb2 import Status

    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            with contextlib.suppress(Exception):  # foreign bytes; without a readable delay there is none
                for detail in Status.FromString(value).details:
                    info = RetryInfo()
                    if detail.Unpack(info):
                        return float(info.retry_delay.seconds + info.retry_delay.nanos / 1e9)
    return None


def _seconds(retry_after: str | None) -> float | None:
    """Read a Retry-After header (RFC 9110, 10.2.3): seconds or a date; None when there is none that can be read."""
    if not retry_after:
        return None
    text = retry_after.strip()
    if text.isascii() and text.isdecimal():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _shortened(status: str, message: str) -> str:
    # It goes into log lines as it is: no escape sequence of the endpoint's may reach a terminal.
    printable = "".join(character if character.isprintable() else " " for character in message[:_ANSWER_BYTES])
    text = " ".join(printable.split())[:_REASON_CHARS]
    return f"{status}: {text}" if status and text else status or text


def _named(error: Exception) -> str:
    """Name an error by its cause: requests' own texts repeat the address, which may hold credentials."""
    cause: object = error.args[0] if error.args else error
    cause = getattr(cause, "reason", None) or cause
    text = str(cause).rpartition(": ")[2] if isinstance(cause, NewConnectionError) else str(cause)
    return _shortened(type(error).__name__, "" if "://" in text else text)


def _unanswered(error: requests.exceptions.RequestException) -> Reply:
    """Say what it means that there was no answer, or none that is HTTP."""
    cause = error.args[0] if error.args else None
    line = getattr((getattr(cause, "args", ()) or (None,))[-1], "line", "")  # of http.client.BadStatusLine
    if line[:2] == "\0\0" and line[3:4] == "\4":  # the SETTINGS frame that every HTTP/2 server begins with (RFC 9113, section 3.4)
        return Reply(Verdict.DENIED, "this port speaks gRPC: set OTEL_EXPORTER_OTLP_PROTOCOL=grpc, or name the one for HTTP, usually 4318")
    never_sent = isinstance(getattr(cause, "reason", None), NewConnectionError)
    return Reply(Verdict.LATER if never_sent else Verdict.FAILED, _named(error))


def _keep_headers(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request


@contextlib.contextmanager
def _untraced() -> Iterator[None]:
    """Keep instrumentations of requests and grpc from making spans of the relay's own calls: those would never end."""
    inner = otel_context.set_value(otel_context._SUPPRESS_INSTRUMENTATION_KEY, True)  # noqa: SLF001, FBT003 # the only name it has
    token = otel_context.attach(inner)
    try:
        yield
    finally:
        otel_context.detach(token)
