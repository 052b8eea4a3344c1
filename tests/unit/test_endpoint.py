"""The OTEL_EXPORTER_OTLP_* variables: which one counts, what they may say, and what a wrong one is answered with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from otelexec import endpoint
from otelexec.errors import SettingsError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("override", "environ", "url"),
    [
        (None, {}, "http://localhost:4318/v1/traces"),
        (None, {"ENDPOINT": "http://c:4318"}, "http://c:4318/v1/traces"),
        (None, {"ENDPOINT": "http://c:4318/"}, "http://c:4318/v1/traces"),
        (None, {"ENDPOINT": "https://c/otlp/"}, "https://c/otlp/v1/traces"),
        (None, {"ENDPOINT": "https://c/otlp?k=v"}, "https://c/otlp/v1/traces?k=v"),
        (None, {"TRACES_ENDPOINT": "http://c:4318/own"}, "http://c:4318/own"),
        (None, {"TRACES_ENDPOINT": "http://c:4318"}, "http://c:4318"),
        (None, {"TRACES_ENDPOINT": "http://a/x", "ENDPOINT": "http://b"}, "http://a/x"),
        (None, {"TRACES_ENDPOINT": "  ", "ENDPOINT": "http://b"}, "http://b/v1/traces"),
        ("http://d:1", {"TRACES_ENDPOINT": "http://a/x"}, "http://d:1/v1/traces"),
        ("http://d:1/v1/traces", {}, "http://d:1/v1/traces"),
        (None, {"ENDPOINT": "http://[::1]:4318"}, "http://[::1]:4318/v1/traces"),
    ],
)
def test_the_http_url_follows_the_exporter_specification(override: str | None, environ: dict[str, str], url: str) -> None:
    """The general endpoint gets `/v1/traces`, the one for traces is taken as it is, an empty one is unset."""
    variables = {f"OTEL_EXPORTER_OTLP_{name}": value for name, value in environ.items()}
    assert endpoint.read(override, variables).url == url


@pytest.mark.parametrize(
    ("environ", "target", "secure"),
    [
        ({}, "localhost:4317", False),
        ({"ENDPOINT": "http://c:4317"}, "c:4317", False),
        ({"ENDPOINT": "https://c:4317/ignored"}, "c:4317", True),
        ({"ENDPOINT": "c:4317"}, "c:4317", True),
        ({"ENDPOINT": "c:4317", "INSECURE": "true"}, "c:4317", False),
        ({"ENDPOINT": "https://c:4317", "INSECURE": "true"}, "c:4317", True),
        ({"ENDPOINT": "unix:/run/otlp.sock", "INSECURE": "true"}, "unix:/run/otlp.sock", False),
        ({"ENDPOINT": "unix:///run/otlp.sock"}, "unix:///run/otlp.sock", True),
        ({"ENDPOINT": "dns:///c:4317", "INSECURE": "true"}, "dns:///c:4317", False),
    ],
)
def test_the_grpc_target_and_its_security_come_from_the_scheme(environ: dict[str, str], target: str, secure: bool) -> None:
    """`http` is plain, `https` is TLS; INSECURE counts only where there is neither, also for targets that gRPC reads itself."""
    variables = {f"OTEL_EXPORTER_OTLP_{name}": value for name, value in environ.items()}
    read = endpoint.read(None, {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc", **variables})
    assert (read.protocol, read.url, read.secure) == ("grpc", target, secure)


def test_the_variable_for_traces_goes_before_the_general_one(tmp_path: Path) -> None:
    """That holds for every one of them."""
    wanted = {name: tmp_path / f"{name}.pem" for name in ("CERTIFICATE", "CLIENT_KEY", "CLIENT_CERTIFICATE")}
    for path in wanted.values():
        path.touch()
    environ = {
        "PROTOCOL": "http/protobuf",
        "HEADERS": "a=1,b=two%20words",
        "TIMEOUT": "2.5",
        "COMPRESSION": "gzip",
        **{name: str(path) for name, path in wanted.items()},
    }
    general = dict.fromkeys(environ, "nonsense")
    read = endpoint.read(
        None,
        {f"OTEL_EXPORTER_OTLP_{name}": value for name, value in general.items()}
        | {f"OTEL_EXPORTER_OTLP_TRACES_{name}": value for name, value in environ.items()},
    )
    assert read.headers == {"a": "1", "b": "two words"}
    assert (read.timeout_seconds, read.compression) == (2.5, "gzip")
    assert [read.certificate, read.client_key, read.client_certificate] == [str(path) for path in wanted.values()]


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("PROTOCOL", "http/json", "OTEL_EXPORTER_OTLP_PROTOCOL: must be one of http/protobuf, grpc, not 'http/json'"),
        ("TRACES_PROTOCOL", "udp", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL: must be one of"),
        ("ENDPOINT", "localhost:4318", "OTEL_EXPORTER_OTLP_ENDPOINT: must be a URL like http://localhost:4318"),
        ("ENDPOINT", "unix:/run/otlp.sock", "OTEL_EXPORTER_OTLP_ENDPOINT: must be a URL like http://localhost:4318"),
        ("ENDPOINT", "ftp://c", "OTEL_EXPORTER_OTLP_ENDPOINT: must be a URL"),
        ("ENDPOINT", "http://[::1", "OTEL_EXPORTER_OTLP_ENDPOINT: must be a URL"),
        ("TRACES_ENDPOINT", "http://c:99999", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT: must be a URL"),
        ("COMPRESSION", "brotli", "OTEL_EXPORTER_OTLP_COMPRESSION: must be one of none, gzip, deflate, not 'brotli'"),
        ("TIMEOUT", "soon", "OTEL_EXPORTER_OTLP_TIMEOUT: must be a positive number of seconds, not 'soon'"),
        ("TIMEOUT", "0", "OTEL_EXPORTER_OTLP_TIMEOUT: must be a positive number"),
        ("TIMEOUT", "nan", "OTEL_EXPORTER_OTLP_TIMEOUT: must be a positive number"),
        ("CERTIFICATE", "/nowhere/ca.pem", "OTEL_EXPORTER_OTLP_CERTIFICATE: there is no file /nowhere/ca.pem"),
    ],
)
def test_a_wrong_variable_is_one_clear_line(name: str, value: str, says: str) -> None:
    """The error names the variable that was set, and what it may be."""
    with pytest.raises(SettingsError) as raised:
        endpoint.read(None, {f"OTEL_EXPORTER_OTLP_{name}": value})
    assert str(raised.value).startswith(says)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("headers", ["s3cret", "=s3cret", "a b=s3cret", "authorization=a%0as3cret", "x=s3cret%0d%0ay:1", "x=s3cret\u2603"])
def test_a_wrong_header_is_named_without_its_value(headers: str) -> None:
    """A token must not end up in a log because a comma was forgotten."""
    with pytest.raises(SettingsError) as raised:
        endpoint.read(None, {"OTEL_EXPORTER_OTLP_HEADERS": f"ok=1,{headers},z=2"})
    assert str(raised.value).startswith("OTEL_EXPORTER_OTLP_HEADERS: ")
    assert "s3cret" not in str(raised.value)


def test_credentials_are_never_shown() -> None:
    """Neither the text for logs nor the repr holds user, password, query or headers."""
    read = endpoint.read("https://user:s3cret@c:4318/base?token=s3cret", {"OTEL_EXPORTER_OTLP_HEADERS": "authorization=s3cret"})
    assert read.shown == "https://c:4318/base/v1/traces"
    assert "s3cret" not in repr(read)


def test_a_timeout_meant_as_milliseconds_ends_at_the_limit() -> None:
    """Seconds are what the Python SDK reads; a claim must outlast any timeout."""
    assert endpoint.read(None, {"OTEL_EXPORTER_OTLP_TIMEOUT": "10000"}).timeout_seconds == 30


def test_a_key_without_its_certificate_is_refused(tmp_path: Path) -> None:
    """Half of a client certificate can't authenticate anybody."""
    key = tmp_path / "key.pem"
    key.touch()
    with pytest.raises(SettingsError, match="needs OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE beside it"):
        endpoint.read(None, {"OTEL_EXPORTER_OTLP_CLIENT_KEY": str(key)})
