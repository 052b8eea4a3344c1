"""What depends on the broker, over a real RabbitMQ: it delivers again at once, rejects by itself, and keeps the broker's promises."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import psutil
import pytest

import otelexec
from otelexec import semconv
from tests.integrations.celery.conftest import Fresh, NewStage
from tests.integrations.celery.stage import Broker, Stage
from tests.integrations.stage import each_open
from tests.records import until

RESULT_SECONDS = 30.0
RECONCILING = {"OTELEXEC_RECONCILE": "true", "OTELEXEC_RECONCILE_INTERVAL_SECONDS": "0.3"}


@pytest.fixture(scope="module")
def rabbit_stage(new_stage: NewStage, rabbitmq: Broker) -> Iterator[Stage]:
    """Give a stage with one prefork worker for the tests that leave it alive; at the end all must agree."""
    stage = new_stage(rabbitmq)
    worker = stage.worker("rabbit", "prefork", 3)
    with ExitStack() as stack:
        stack.callback(stage.close)
        yield stage
        assert worker.stop() == 0
        worker.check_log()
        stage.reconcile()
        stage.check_agreement()
        assert not list(each_open(stage))


@pytest.fixture
def rabbit(rabbit_stage: Stage, on: Any) -> Stage:
    entered: Stage = on(rabbit_stage)
    return entered


def test_success_retries_and_a_chain(rabbit: Stage) -> None:
    with otelexec.correlate(source="test") as correlation:
        result = rabbit.task("flaky").delay(2)
    assert len(result.get(timeout=RESULT_SECONDS)) == 3
    seen = rabbit.ended(result.id, "failed", "failed", "succeeded")
    assert (seen.record.execution_id, seen.record.state) == (correlation.execution_id, "succeeded")
    assert seen.consumer().attributes[semconv.MESSAGING_SYSTEM] == seen.producers[0].attributes[semconv.MESSAGING_SYSTEM] == "celery"
    chained = (rabbit.task("add").s(1, 2) | rabbit.task("add").s(3)).apply_async()
    assert chained.get(timeout=RESULT_SECONDS) == 6
    first, second = rabbit.ended(chained.parent.id, "succeeded"), rabbit.ended(chained.id, "succeeded")
    assert first.attempt.trace_id == second.attempt.trace_id


def test_reject_with_requeue_is_delivered_again(rabbit: Stage) -> None:
    mark = rabbit.mark()
    result = rabbit.task("reject").apply_async((mark,), {"requeue": True})
    seen = rabbit.ended(result.id, "rejected", "succeeded")
    assert (seen.record.state, rabbit.runs(mark)) == ("succeeded", 2)


def test_reject_without_requeue_is_the_end(rabbit: Stage) -> None:
    mark = rabbit.mark()
    seen = rabbit.ended(rabbit.task("reject").delay(mark).id, "rejected")
    assert (seen.record.state, rabbit.runs(mark)) == ("rejected", 1)


def test_a_killed_child_is_lost_once_and_its_message_delivered_again(rabbit: Stage) -> None:
    """Scenario 2."""
    mark = rabbit.mark()
    result = rabbit.task("die.again").delay(mark, 1)
    assert result.get(timeout=RESULT_SECONDS) == "alive"
    seen = rabbit.ended(result.id, "lost", "succeeded")
    assert (seen.record.state, seen.attempts[0].classification) == ("succeeded", "killed")
    assert "SIGKILL" in (seen.attempts[0].error_message or "")


def test_a_malformed_message_is_rejected_and_does_not_come_back(rabbit: Stage) -> None:
    before = {record.execution_id for record in rabbit.records()}
    with rabbit.app.connection_for_write() as connection, connection.Producer() as producer:
        queue = rabbit.settings["task_default_queue"]
        producer.publish([[1, 2], {}, {}], routing_key=queue, exchange="", headers={}, serializer="json")
    ended = until(lambda: [r for r in rabbit.records() if r.execution_id not in before and r.ended_unix_ns], 15)
    assert [(record.state, [attempt.state for attempt in record.attempts]) for record in ended] == [("rejected", ["rejected"])]


def test_revoked_expired_and_unknown(rabbit: Stage) -> None:
    """Scenario 10."""
    mark = rabbit.mark()
    revoked = rabbit.task("sleep").apply_async((0, mark), countdown=1.5)
    revoked.revoke()
    expired = rabbit.task("sleep").apply_async((0, mark), countdown=0.5, expires=0.01)
    unknown = rabbit.app.send_task("nobody.knows.me")
    ends = [rabbit.ended(result.id) for result in (revoked, expired, unknown)]
    assert [seen.record.state for seen in ends] == ["cancelled", "cancelled", "rejected"]
    assert ends[1].attempt.classification == "expired"
    assert rabbit.runs(mark) == 0


def test_a_chord_is_unlocked_and_linked(rabbit: Stage) -> None:
    import celery

    chord: Any = celery.chord
    result = chord((rabbit.task("part").s(number) for number in range(10)), rabbit.task("total").s()).apply_async()
    assert result.get(timeout=RESULT_SECONDS) == 45
    body = rabbit.ended(result.id, "succeeded")
    parts = [rabbit.ended(each.id, "succeeded") for each in result.parent.results]
    links = {(link.trace_id, link.span_id) for link in body.consumer().links}
    assert {(part.attempt.trace_id, part.attempt.span_id) for part in parts} <= links


def test_a_killed_main_process_leaves_nothing_open_and_its_message_is_delivered_at_once(fresh: Fresh, rabbitmq: Broker) -> None:
    """Scenario 3."""
    stage = fresh(rabbitmq)
    worker = stage.worker("first", "prefork", 2, environment=RECONCILING)
    late, early = stage.mark(), stage.mark()
    again, gone = stage.task("sleep.late").delay(3, late), stage.task("sleep").delay(60, early)
    pids = [stage.wait_for_run(mark) for mark in (late, early)]
    worker.kill()
    until(lambda: not any(psutil.pid_exists(pid) for pid in pids), 10)
    second = stage.worker("second", "prefork", 2, environment=RECONCILING)
    assert again.get(timeout=RESULT_SECONDS) == "slept"
    assert stage.ended(gone.id, "lost").attempt.classification == "killed"
    seen = stage.ended(again.id, "lost", "succeeded")
    assert seen.record.state == "succeeded"
    assert second.stop() == 0
    second.check_log()
    stage.check_agreement()


def test_a_message_that_the_broker_lost_stays_queued(fresh: Fresh, rabbitmq: Broker) -> None:
    stage = fresh(rabbitmq)
    mark = stage.mark()
    with otelexec.correlate(source="test") as correlation:
        stage.task("sleep").delay(0, mark)
    with stage.app.connection_for_write() as connection:
        connection.default_channel.queue_purge(stage.settings["task_default_queue"])
    worker = stage.worker("late", "solo", 1)
    stage.task("add").delay(1, 2).get(timeout=RESULT_SECONDS)
    assert worker.stop() == 0
    stage.reconcile()
    record = stage.record(correlation.execution_id)
    assert record is not None
    assert (record.state, record.attempts, stage.runs(mark)) == ("queued", (), 0)
    assert time.time_ns() > (record.queued_unix_ns or 0) > 0
