"""Eager mode, in one process: no broker, no messages, and an execution all the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery, chain
from celery.exceptions import Retry, SoftTimeLimitExceeded
from opentelemetry import context

import otelexec
from tests.integrations.celery.tasks import make_app
from tests.records import Records


@pytest.fixture
def app(instrumented: None) -> Iterator[Celery]:
    made = make_app({"broker_url": "memory://", "task_always_eager": True, "task_store_eager_result": False})
    yield made
    made.close()


def test_a_task_is_an_execution_and_the_context_is_as_before(app: Celery, records: Records) -> None:
    before = context.get_current()
    with otelexec.correlate(source="test") as correlation:
        told = app.tasks["who"].delay().get()
    assert context.get_current() == before
    record = records.one()
    assert (record.name, record.state, record.execution_id) == ("who", "succeeded", correlation.execution_id)
    assert (told["execution_id"], told["request_id"]) == (record.execution_id, correlation.request_id)
    assert told["span_id"] == record.attempts[0].span_id


def test_apply_without_the_setting(instrumented: None, records: Records) -> None:
    app = make_app({"broker_url": "memory://"})
    assert app.tasks["add"].apply((1, 2)).get() == 3
    assert (records.one().name, records.one().state) == ("add", "succeeded")
    app.close()


def test_an_exception_and_what_it_propagates(app: Celery, records: Records) -> None:
    with pytest.raises(ValueError, match="loud"):
        app.tasks["fail"].apply(("loud",), throw=True)
    assert app.tasks["fail"].apply(("quiet",)).state == "FAILURE"
    assert [(record.state, record.attempts[0].error_message) for record in records.all()] == [("failed", "loud"), ("failed", "quiet")]


def test_an_error_that_celery_knows_is_kept_as_far_as_the_setting_says(
    app: Celery, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTELEXEC_MAX_ERROR_CHARS", "64")

    register: Any = app.task

    def slow() -> None:
        raise SoftTimeLimitExceeded("x" * 100)

    assert register(name="slow")(slow).apply().state == "FAILURE"
    [attempt] = records.one().attempts
    assert (attempt.state, len(attempt.error_message or "")) == ("timed_out", 64)


def test_retries_are_attempts(app: Celery, records: Records) -> None:
    assert len(app.tasks["flaky"].delay(2).get()) == 3
    record = records.one()
    assert [attempt.state for attempt in record.attempts] == ["failed", "failed", "succeeded"]
    assert record.state == "succeeded"


def test_a_retry_that_propagates_is_nobodys(app: Celery, records: Records) -> None:
    """Celery gives the caller its `Retry`, and attempts nothing."""
    with pytest.raises(Retry):
        app.tasks["flaky"].apply((2,), throw=True)
    record = records.one()
    assert (record.state, record.attempts[0].classification, record.ended_unix_ns is not None) == ("failed", "retry", True)


def test_a_chain_and_a_core(app: Celery, records: Records) -> None:
    chained: Any = chain(app.tasks["add"].s(1, 2), app.tasks["add"].s(3))
    assert chained.apply_async().get() == 6
    assert app.tasks["core"].delay().get() == "paid"
    assert [record.state for record in records.all()] == ["succeeded"] * 3
    assert records.all()[2].name == "invoice.run"


def test_a_task_that_is_called_as_a_function_is_a_function(app: Celery, records: Records) -> None:
    assert app.tasks["add"](1, 2) == 3
    assert records.all() == []


def test_a_ctrl_c_interrupts_and_what_a_task_raises_by_itself_does_not(app: Celery, records: Records) -> None:
    with pytest.raises(KeyboardInterrupt):
        app.tasks["ctrl.c"].delay()
    with pytest.raises(GeneratorExit):
        app.tasks["interrupts"].delay("GeneratorExit")
    attempts = [record.attempts[0] for record in records.all()]
    assert [(attempt.state, attempt.classification) for attempt in attempts] == [("cancelled", "interrupted"), ("failed", None)]
