"""
Where the relay sends spans: the OTEL_EXPORTER_OTLP_* variables, read once and checked.

OpenTelemetry specification, "OTLP Exporter Configuration". A variable for traces alone goes before the general one, and
an empty one counts as unset. Where specification and the Python SDK differ (the unit of the timeout), the SDK's reading
holds, since that is what the variables of a Python program are set for.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote, urlsplit, urlunsplit

from otelexec.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Mapping

TRACES_PATH: Final = "/v1/traces"
PROTOCOLS: Final = ("http/protobuf", "grpc")
COMPRESSIONS: Final = ("none", "gzip", "deflate")
# Well under the relay's claim, so that no other relay sends rows whose answer is still on its way.
MAX_TIMEOUT_SECONDS: Final = 30.0
# Targets that gRPC reads itself (gRPC, "Name Resolution"): those that `doctor` can look at, too.
RESOLVERS: Final = frozenset({"dns", "ipv4", "ipv6", "unix"})
_TOKEN: Final = frozenset("!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyz")
# Of gRPC's metadata keys; one that ends in -bin would have a value of bytes (gRPC over HTTP/2, "Requests").
_METADATA: Final = frozenset("0123456789abcdefghijklmnopqrstuvwxyz_-.")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """
    An OTLP endpoint and how to talk to it.

    Attributes:
        protocol: `http/protobuf` or `grpc`.
        url: Of the trace service over HTTP; over gRPC the target, `host:port` or a name with a scheme of gRPC's, such as `unix:/path`.
        shown: The same for people and logs, without credentials and query.
        secure: Whether TLS is used.
        headers: Sent with each request; their values are never shown.
        timeout_seconds: How long to wait for an answer, at most 30 s.
        compression: `none`, `gzip` or `deflate`.
        certificate: File of the certificate authority; None means the system's.
        client_certificate: File of the client's certificate.
        client_key: File of its key.
    """

    protocol: str
    url: str = field(repr=False)
    shown: str
    secure: bool
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    timeout_seconds: float = 10.0
    compression: str = "none"
    certificate: str | None = None
    client_certificate: str | None = None
    client_key: str | None = None


def read(override: str | None = None, environ: Mapping[str, str] | None = None) -> Endpoint:
    """
    Read the endpoint.

    Args:
        override: A base URL that goes before the environment's; `/v1/traces` may be part of it.
        environ: The environment; None means the process's.

    Raises:
        SettingsError: A variable can't be used; one line that names it, never with a header's value.
    """
    variables = _Variables(os.environ if environ is None else environ)
    protocol = variables.one_of("PROTOCOL", PROTOCOLS)
    url, name = _url(override, protocol, variables)
    if protocol == "grpc":
        target, secure = _grpc_target(url, name, variables)
        shown = target.rpartition("@")[2]
    else:
        parts, target, secure = urlsplit(url), url, url.startswith("https")
        shown = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    key, certificate = variables.file("CLIENT_KEY"), variables.file("CLIENT_CERTIFICATE")
    if key and not certificate:
        raise SettingsError("OTEL_EXPORTER_OTLP_CLIENT_KEY: needs OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE beside it")
    if protocol == "grpc" and certificate and not key:  # a file with both is for HTTP alone
        raise SettingsError("OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE: over gRPC it needs OTEL_EXPORTER_OTLP_CLIENT_KEY beside it")
    return Endpoint(
        protocol=protocol,
        url=target,
        shown=shown,
        secure=secure,
        headers=_headers(variables, protocol),
        timeout_seconds=_timeout(variables),
        compression=variables.one_of("COMPRESSION", COMPRESSIONS),
        certificate=variables.file("CERTIFICATE"),
        client_certificate=certificate,
        client_key=key,
    )


class _Variables:
    """The environment's OTLP variables: the one for traces first, then the general one."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ

    def get(self, name: str) -> tuple[str, str]:
        """Give a value, empty when unset, and the name of the variable that it came from."""
        general = f"OTEL_EXPORTER_OTLP_{name}"
        for variable in (f"OTEL_EXPORTER_OTLP_TRACES_{name}", general):
            if value := self._environ.get(variable, "").strip():
                return value, variable
        return "", general

    def one_of(self, name: str, allowed: tuple[str, ...]) -> str:
        """Give one of the allowed words; the first of them is the default."""
        value, variable = self.get(name)
        word = value.lower() or allowed[0]
        if word not in allowed:
            raise SettingsError(f"{variable}: must be one of {', '.join(allowed)}, not {value!r}")
        return word

    def file(self, name: str) -> str | None:
        """Give the path of a file that is there; None when unset."""
        value, variable = self.get(name)
        if value and not Path(value).is_file():
            raise SettingsError(f"{variable}: there is no file {value}")
        return value or None


def _url(override: str | None, protocol: str, variables: _Variables) -> tuple[str, str]:
    """Give the URL, complete for HTTP, and the name of the setting it came from."""
    value, name = variables.get("ENDPOINT")
    if override:
        value, name = override.strip(), "OTELEXEC_OTLP_ENDPOINT"
    if protocol == "grpc":
        return value or "http://localhost:4317", name
    value = value or "http://localhost:4318"
    try:
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise ValueError
    except ValueError:
        raise SettingsError(f"{name}: must be a URL like http://localhost:4318") from None
    if name == "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT" or (override and parts.path.rstrip("/").endswith(TRACES_PATH)):
        return value, name
    return urlunsplit(parts._replace(path=parts.path.rstrip("/") + TRACES_PATH)), name


def _grpc_target(url: str, name: str, variables: _Variables) -> tuple[str, bool]:
    """Give the target and whether to use TLS: `http` and `https` decide, and INSECURE where there is neither."""
    insecure = variables.one_of("INSECURE", ("false", "true")) == "true"
    resolver, _, named = url.partition(":")
    if resolver in RESOLVERS and named.strip("/"):
        return url, not insecure
    scheme, separator, rest = url.partition("://")
    target = (rest if separator else url).partition("/")[0]
    if not target or (separator and scheme not in ("http", "https")):
        raise SettingsError(f"{name}: must be a URL like http://localhost:4317, host:port, or another target of gRPC's, such as unix:/path")
    return target, scheme == "https" if separator else not insecure


def _headers(variables: _Variables, protocol: str) -> dict[str, str]:
    """Parse `name=value,...` with percent-encoding, in the form of W3C baggage without properties."""
    allowed = _METADATA if protocol == "grpc" else _TOKEN
    text, variable = variables.get("HEADERS")
    headers: dict[str, str] = {}
    for member in filter(None, (part.strip() for part in text.split(","))):
        name, separator, value = member.partition("=")
        name, value = unquote(name).strip().lower(), unquote(value).strip()
        # The message never quotes the member: it may be a token with its `=` forgotten.
        if not separator or not name or not set(name) <= allowed or (protocol == "grpc" and name.endswith("-bin")):
            raise SettingsError(f"{variable}: must be name=value pairs, separated by commas; one of them has no usable name")
        if not value.isascii() or not value.isprintable():
            raise SettingsError(f"{variable}: the value of {name} must be printable ASCII")
        headers[name] = value
    return headers


def _timeout(variables: _Variables) -> float:
    """Give seconds, as the Python SDK reads it; a value meant as milliseconds ends at the limit."""
    value, variable = variables.get("TIMEOUT")
    try:
        seconds = float(value or 10)
    except ValueError:
        seconds = math.nan
    if not (seconds > 0 and math.isfinite(seconds)):
        raise SettingsError(f"{variable}: must be a positive number of seconds, not {value!r}")
    return min(seconds, MAX_TIMEOUT_SECONDS)
