"""A wrong setting is one line that names it, when `configure()` reads it and not later in a thread."""

from __future__ import annotations

from typing import Any

import pytest

import otelexec
from otelexec import settings
from otelexec.errors import SettingsError


@pytest.mark.parametrize("endpoint", ["gopher://collector", "collector", "http://", "https:///", "://x"])
def test_an_endpoint_that_is_no_url_is_refused_at_configure(endpoint: str) -> None:
    with pytest.raises(SettingsError, match=r"^otlp_endpoint: must be a URL"):
        otelexec.configure(otlp_endpoint=endpoint)


@pytest.mark.parametrize("endpoint", ["http://localhost:4318", "https://collector/base", "collector:4317", " http://localhost:4318 "])
def test_an_endpoint_that_http_or_grpc_takes_is_taken(endpoint: str) -> None:
    assert settings.load(otlp_endpoint=endpoint).otlp_endpoint == endpoint.strip()


def test_an_endpoint_that_is_empty_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTELEXEC_OTLP_ENDPOINT", " ")
    assert settings.load().otlp_endpoint is None


@pytest.mark.parametrize("keys", [",", " , ", " "])
def test_signing_keys_that_are_separators_only_are_refused(monkeypatch: pytest.MonkeyPatch, keys: str) -> None:
    """They would leave every carrier unsigned and every forged one trusted."""
    monkeypatch.setenv("OTELEXEC_SIGNING_KEY", keys)
    with pytest.raises(SettingsError, match=r"^OTELEXEC_SIGNING_KEY: holds no key"):
        settings.load()


def test_signing_keys_are_split_and_an_empty_variable_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings.load(signing_key="new, old").signing_keys == (b"new", b"old")
    monkeypatch.setenv("OTELEXEC_SIGNING_KEY", "")
    assert settings.load().signing_keys == ()


def test_a_provider_that_is_none_is_refused_at_configure() -> None:
    wrong: Any = "a provider"
    with pytest.raises(SettingsError, match=r"^tracer_provider: must be a TracerProvider of OpenTelemetry, not str"):
        otelexec.configure(tracer_provider=wrong)
