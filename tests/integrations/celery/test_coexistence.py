"""Beside others: Sentry, the contrib instrumentation, the user's own headers, stamps and baggage."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from celery.canvas import StampingVisitor
from opentelemetry import baggage, context

import otelexec
from otelexec import semconv
from tests.integrations.celery.conftest import Fresh
from tests.integrations.celery.stage import Stage
from tests.integrations.celery.tasks import BESIDE, INSTRUMENT
from tests.integrations.stage import Seen
from tests.servers import missing

RESULT_SECONDS = 30.0
CONTRIB = "opentelemetry-instrumentation-celery"


@pytest.fixture
def tenant() -> Any:
    token = context.attach(baggage.set_baggage("tenant", "blue"))
    yield "blue"
    context.detach(token)


def check_three_retries(stage: Stage, result: Any, request_id: str) -> Seen:
    told = result.get(timeout=RESULT_SECONDS)
    seen = stage.ended(result.id, "failed", "failed", "failed", "succeeded")
    assert [each["baggage"]["tenant"] for each in told] == ["blue"] * 4
    assert {each["request_id"] for each in told} == {request_id}
    assert {each["execution_id"] for each in told} == {seen.record.execution_id}
    assert {attempt.trace_id for attempt in seen.attempts} == {span.trace_id for span in seen.producers} == {seen.record.producer_trace_id}
    return seen


def test_retries_beside_sentry_keep_their_baggage_and_have_no_stale_parent(fresh: Fresh, tenant: str) -> None:
    """Scenario 6: Sentry nests its own headers, which would hide ours from a retry."""
    stage = fresh()
    worker = stage.worker("sentry", "prefork", 2, environment={BESIDE: "sentry"})
    with otelexec.correlate(source="test") as correlation:
        result = stage.task("flaky").apply_async(
            (3,), headers={"sentry-trace": "1-2", "headers": {"sentry-trace": "1-2", "baggage": "sentry-release=1"}}
        )
    seen = check_three_retries(stage, result, correlation.request_id)
    # No stale parent: each attempt is below the message that brought it.
    assert [seen.consumer(number).parent_span_id for number in range(1, 5)] == [span.span_id for span in seen.producers]
    failing = stage.task("fail").delay()
    failing.get(timeout=RESULT_SECONDS, propagate=False)  # its child is done, and can be told to end
    stage.ended(failing.id, "failed")
    assert worker.stop() == 0
    worker.check_log()
    stage.check_agreement()


def test_beside_the_contrib_instrumentation_it_warns_and_makes_no_span_twice(fresh: Fresh, tenant: str) -> None:
    stage = fresh()
    worker = stage.worker("contrib", "prefork", 2, environment={BESIDE: "contrib"})
    with otelexec.correlate(source="test") as correlation:
        result = stage.task("flaky").delay(3)
    check_three_retries(stage, result, correlation.request_id)
    assert worker.stop() == 0
    assert [line for line in worker.text().splitlines() if CONTRIB in line and "WARNING" in line], worker.text()[:3000]
    stage.check_agreement()


def test_the_users_headers_and_stamps_arrive_on_every_attempt(common: Stage) -> None:
    class Stamps(StampingVisitor):  # type: ignore[misc]
        def on_signature(self, sig: Any, **headers: Any) -> dict[str, Any]:
            return {"order": "7"}

    result = common.task("who.request").apply_async(headers={"x-own": "kept"})
    told = result.get(timeout=RESULT_SECONDS)
    assert told["headers"]["x-own"] == "kept"
    signature = common.task("who.request").s()
    signature.stamp(Stamps())
    told = signature.apply_async().get(timeout=RESULT_SECONDS)
    assert told["stamps"] in ({"order": "7"}, {"order": ["7"]})


def test_the_users_headers_survive_a_retry(common: Stage) -> None:
    result = common.task("flaky.headers").apply_async(headers={"x-own": "kept"})
    assert result.get(timeout=RESULT_SECONDS) == ["kept", "kept", "kept"]
    common.ended(result.id, "failed", "failed", "succeeded")


def test_baggage_that_an_attempt_changes_and_clears_is_what_the_next_one_finds(common: Stage, tenant: str) -> None:
    """Scenario 7."""
    result = common.task("changes.baggage").delay()
    first, second, third = result.get(timeout=RESULT_SECONDS)
    assert (first["tenant"], second["tenant"]) == ("blue", "changed")
    assert "tenant" not in third
    common.ended(result.id, "failed", "failed", "succeeded")


def test_the_command_line_alone_instruments_a_worker(fresh: Fresh) -> None:
    stage = fresh()
    command = shutil.which("opentelemetry-instrument", path=str(Path(sys.executable).parent))
    if command is None:
        missing("opentelemetry-instrument is not installed")
    worker = stage.worker(
        "zero",
        "prefork",
        2,
        environment={
            INSTRUMENT: None,
            "OTEL_PYTHON_DISABLED_INSTRUMENTATIONS": "celery",  # the contrib one, which is installed here
            "OTEL_TRACES_EXPORTER": "none",
            "OTEL_METRICS_EXPORTER": "none",
            "OTEL_LOGS_EXPORTER": "none",
        },
        command=(command, sys.executable, "-m", "celery"),
    )
    with otelexec.correlate(source="test") as correlation:
        result = stage.task("flaky").delay(1)
    assert len(result.get(timeout=RESULT_SECONDS)) == 2
    seen = stage.ended(result.id, "failed", "succeeded")
    assert seen.record.execution_id == correlation.execution_id
    assert seen.consumer().attributes[semconv.MESSAGING_MESSAGE_ID] == result.id
    assert worker.stop() == 0
    worker.check_log()
    stage.check_agreement()


def test_an_uninstrumented_worker_and_publisher_do_not_disturb_each_other(fresh: Fresh) -> None:
    stage = fresh()
    stage.worker("bare", "solo", 1, environment={INSTRUMENT: None})
    told = stage.task("who.request").apply_async(headers={"x-own": "kept"}).get(timeout=RESULT_SECONDS)
    assert told["headers"]["x-own"] == "kept"
    assert told["execution_id"] is None
