"""Reading a record in Python."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider

import otelexec
from otelexec import runtime
from otelexec.errors import CorrelationError, StoreUnavailable
from tests.records import Records


def test_a_record_is_found_while_it_runs_and_when_it_has_ended(records: Records) -> None:
    with otelexec.correlate(source="webhook", webhook_id="w"), otelexec.execution("job") as run:
        during = otelexec.find_execution(run.id)
        run.set_output([7])
    after = otelexec.find_execution(run.id)
    assert during is not None
    assert after is not None
    assert (during["state"], after["state"]) == ("running", "succeeded")
    assert (after["name"], after["correlation"], after["attempts"][0]["output"]) == ("job", {"webhook_id": "w"}, [7])
    assert otelexec.find_execution("nobody") is None


def test_an_output_that_is_nested_too_deeply_to_be_read_is_given_as_its_text(records: Records) -> None:
    """A Python that can nest deeper, or a task that stood higher on its stack, may have written it."""
    text = "[" * 1_000_000 + "]" * 1_000_000  # from Python 3.14 on the size of the stack is the limit
    with otelexec.execution("job") as run:
        run.set_output([7])
    with closing(sqlite3.connect(records.path, isolation_level=None)) as other:
        other.execute("UPDATE attempt SET output = ?", (text,))
    found = otelexec.find_execution(run.id)
    assert found is not None
    assert found["attempts"][0]["output"] == text


def test_an_id_that_is_none_is_refused(records: Records) -> None:
    for wrong in (None, "", 7):
        given: Any = wrong
        with pytest.raises(CorrelationError, match="takes an execution id"):
            otelexec.find_execution(given)


def test_without_a_store_there_are_no_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTELEXEC_STORE", "none")
    otelexec.configure(tracer_provider=TracerProvider(shutdown_on_exit=False))  # else the SDK's exporter looks for an endpoint
    with otelexec.execution("job") as run:
        assert otelexec.find_execution(run.id) is None


def test_a_store_that_can_not_be_read_is_said(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    def execution(_: str) -> None:
        raise StoreUnavailable("gone")

    monkeypatch.setattr(runtime.get().store, "execution", execution)
    with pytest.raises(StoreUnavailable, match="gone"):
        otelexec.find_execution("e")
