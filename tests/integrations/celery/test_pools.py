"""Every pool: tasks that run at the same time see only what is theirs, and each leaves its record and its span."""

from __future__ import annotations

import os
import signal

import pytest
from opentelemetry import baggage, context

import otelexec
from tests.integrations.celery.conftest import Fresh
from tests.records import until

RESULT_SECONDS = 30.0
POOLS = (("solo", 1, 12), ("threads", 8, 60), ("gevent", 50, 120), ("eventlet", 50, 120), ("prefork", 2, 30))


@pytest.mark.parametrize(("pool", "concurrency", "tasks"), POOLS, ids=[pool for pool, *_ in POOLS])
def test_no_crossover_and_nothing_lost(fresh: Fresh, pool: str, concurrency: int, tasks: int) -> None:
    stage = fresh()
    worker = stage.worker(pool, pool, concurrency)
    sent = {}
    for number in range(tasks):
        token = context.attach(baggage.set_baggage("tenant", f"tenant {number}"))
        try:
            with otelexec.correlate(source="webhook", webhook_id=str(number), path="/", provider="shop") as correlation:
                result = stage.task("interleaved").delay(number)
        finally:
            context.detach(token)
        sent[number] = (correlation, result)
    failing = [stage.task("fail").delay(), stage.task("flaky").delay(1)]
    untraceable = [] if pool == "solo" else [stage.send_untraceable("add"), stage.send_untraceable("add.late")]
    for number, (correlation, result) in sent.items():
        told = result.get(timeout=RESULT_SECONDS)
        assert told["number"] == number
        assert told["before"] == told["after"]
        assert told["before"]["execution_id"] == correlation.execution_id
        assert told["before"]["request_id"] == correlation.request_id
        assert told["before"]["baggage"]["tenant"] == f"tenant {number}"
    assert failing[1].get(timeout=RESULT_SECONDS)
    stage.ended(failing[0].id, "failed")
    stage.ended(failing[1].id, "failed", "succeeded")
    for result in untraceable:
        assert stage.ended(result.id, "failed").attempt.error_type == "TypeError"

    # A warm shutdown: what runs may end, and is recorded.
    mark = stage.mark()
    last = stage.task("sleep").delay(0.5, mark)
    stage.wait_for_run(mark)
    assert worker.stop() == 0
    seen = stage.ended(last.id, "succeeded")
    assert seen.record.state == "succeeded"
    records = stage.records()
    assert len(records) == tasks + 3 + len(untraceable)
    assert {record.state for record in records} == {"succeeded", "failed"}
    stage.check_agreement()
    worker.check_log()


def test_a_message_that_ends_a_solo_worker_has_failed(fresh: Fresh) -> None:
    """Celery lets what fails before the task out of its loop."""
    stage = fresh()
    worker = stage.worker("solo", "solo", 1)
    result = stage.send_untraceable("add")
    assert worker.process.wait(RESULT_SECONDS) == 1
    seen = stage.ended(result.id, "failed")
    assert (seen.record.state, seen.attempt.error_type) == ("failed", "TypeError")
    stage.check_agreement()


def test_links_instead_of_parents(fresh: Fresh) -> None:
    stage = fresh()
    stage.worker("links", "solo", 1, environment={"OTELEXEC_TEST_INSTRUMENT": '{"use_span_links": true}'})
    token = context.attach(baggage.set_baggage("tenant", "blue"))
    try:
        with otelexec.correlate(source="test") as correlation:
            result = stage.task("flaky").delay(1)
    finally:
        context.detach(token)
    told = result.get(timeout=RESULT_SECONDS)
    seen = stage.ended(result.id, "failed", "succeeded")
    first, second = seen.producers
    for number, producer in ((1, first), (2, second)):
        consumer = seen.consumer(number)
        assert consumer.parent_span_id is None
        assert consumer.trace_id != producer.trace_id
        assert (producer.trace_id, producer.span_id) in {(link.trace_id, link.span_id) for link in consumer.links}
        assert told[number - 1]["baggage"]["tenant"] == "blue"
        assert told[number - 1]["request_id"] == correlation.request_id
    before = (seen.attempts[0].trace_id, seen.attempts[0].span_id)
    assert before in {(link.trace_id, link.span_id) for link in seen.consumer(2).links}


@pytest.mark.parametrize("tasks", [30, pytest.param(100, marks=pytest.mark.long)])
def test_children_that_are_recycled_after_each_task_leave_everything(fresh: Fresh, tasks: int) -> None:
    """Scenario 1."""
    stage = fresh()
    worker = stage.worker("recycled", "prefork", 2, arguments=("--max-tasks-per-child", "1"))
    results = [stage.task("add").delay(number, 1) for number in range(tasks)]
    assert [result.get(timeout=60) for result in results] == list(range(1, tasks + 1))
    assert worker.stop() == 0
    records = stage.records()
    assert len(records) == tasks
    assert {(record.state, len(record.attempts)) for record in records} == {("succeeded", 1)}
    assert len({record.attempts[0].pid for record in records}) == tasks
    consumers = [span for span in stage.spans() if span.kind == "consumer"]
    assert len(consumers) == tasks
    stage.check_agreement()
    worker.check_log()


def test_a_cold_shutdown_leaves_nothing_open(fresh: Fresh) -> None:
    stage = fresh()
    worker = stage.worker("cold", "prefork", 2)
    late, early = stage.mark(), stage.mark()
    results = [stage.task("sleep.late").delay(60, late), stage.task("sleep").delay(60, early)]
    for mark in (late, early):
        stage.wait_for_run(mark)
    # A request that Celery does not count as active yet is not cancelled by it, with or without otelexec.
    active = stage.app.control.inspect([worker.name], timeout=1.0, limit=1).active
    until(lambda: len((active() or {}).get(worker.name, ())) == 2, 20)
    worker.stop(signal.SIGQUIT)
    worker.check_log()
    stage.reconcile()
    for result in results:
        seen = stage.look(result.id)
        assert seen is not None
        assert seen.states in (["lost"], ["cancelled"], ["failed"])
    stage.check_agreement()


def test_a_child_that_dies_ahead_of_a_cold_shutdown_leaves_nothing_to_come_again(fresh: Fresh) -> None:
    """Celery cancels its task as it does after a lost connection, but a message that was acknowledged early does not come again."""
    stage = fresh()
    worker = stage.worker("cold", "prefork", 2)
    mark = stage.mark()
    result = stage.task("sleep").delay(60, mark)
    pid = stage.wait_for_run(mark)
    active = stage.app.control.inspect([worker.name], timeout=1.0, limit=1).active
    until(lambda: (active() or {}).get(worker.name), 20)
    worker.process.send_signal(signal.SIGSTOP)  # so that the death and the shutdown meet
    os.kill(pid, signal.SIGKILL)
    worker.process.send_signal(signal.SIGQUIT)
    worker.process.send_signal(signal.SIGCONT)
    worker.stop(signal.SIGCONT)
    worker.check_log()
    stage.reconcile()
    seen = stage.look(result.id)
    assert seen is not None
    assert seen.states in (["cancelled"], ["lost"])
    assert seen.record.state == seen.attempt.state
    stage.check_agreement()
