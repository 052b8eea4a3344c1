"""Whole workers that die, brokers that deliver again, and an endpoint that swallows everything."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import psutil
import pytest

from otelexec.receiver import OtlpReceiver
from otelexec.store.records import ExecutionRecord
from tests.integrations.celery.conftest import Fresh
from tests.integrations.celery.stage import Stage, keys
from tests.integrations.stage import each_open
from tests.memory import memory_limit
from tests.records import until

RESULT_SECONDS = 30.0
# What a worker that may close the attempts of others looks for them with.
RECONCILING = {"OTELEXEC_RECONCILE": "true", "OTELEXEC_RECONCILE_INTERVAL_SECONDS": "0.3"}


def test_a_killed_main_process_leaves_no_attempt_open(fresh: Fresh) -> None:
    """Scenario 3: the children die with it, the next worker closes what they had, and runs the message again."""
    stage = fresh(broker_transport_options={"visibility_timeout": 2})
    worker = stage.worker("first", "prefork", 2, environment=RECONCILING)
    late, early = stage.mark(), stage.mark()
    again = stage.task("sleep.late").delay(4, late)
    gone = stage.task("sleep").delay(60, early)
    pids = [stage.wait_for_run(mark) for mark in (late, early)]
    held = keys(stage.settings["broker_url"])
    until(lambda: held.hlen("unacked") == 1, 10)  # the early one is acknowledged soon after its start
    held.close()
    begun = time.monotonic()
    worker.kill()
    until(lambda: not any(psutil.pid_exists(pid) for pid in pids), 10)
    assert len(list(each_open(stage))) == 2
    until(lambda: time.monotonic() - begun > 2.5)  # the broker's own clock decides when the message is visible again
    second = stage.worker("second", "prefork", 2, environment=RECONCILING)

    seen = stage.ended(gone.id, "lost")
    assert (seen.record.state, seen.attempt.classification) == ("lost", "killed")
    assert again.get(timeout=RESULT_SECONDS) == "slept"
    seen = stage.ended(again.id, "lost", "succeeded")
    assert (seen.record.state, seen.attempts[1].duplicate) == ("succeeded", False)
    assert second.stop() == 0
    second.check_log()
    stage.check_agreement()


def test_a_visibility_timeout_shorter_than_the_task_makes_two_attempts(fresh: Fresh) -> None:
    """Scenario 5: both run at the same time under one task id, and neither touches the other's attempt."""
    stage = fresh(broker_transport_options={"visibility_timeout": 3}, worker_prefetch_multiplier=1)
    workers = [stage.worker(name, "prefork", 1) for name in ("first", "second")]
    mark = stage.mark()
    result = stage.task("meet").delay(mark)
    stage.wait_for_run(mark)
    with stage.app.connection_for_write() as connection:

        def delivered_again() -> bool:
            # What a worker does as well, but only every hundred seconds.
            connection.default_channel.qos.restore_visible(interval=1)
            return stage.runs(mark) >= 2

        until(delivered_again, 20)
    seen = stage.ended(result.id, "succeeded", "succeeded")
    assert seen.record.state == "succeeded"
    assert len({attempt.pid for attempt in seen.attempts}) == 2
    one, other = seen.attempts
    assert other.started_unix_ns < (one.ended_unix_ns or 0), "they did not overlap"
    assert [worker.stop() for worker in workers] == [0, 0]
    stage.check_agreement()


def test_a_dying_child_is_told_by_a_worker_that_reconciles_as_well(fresh: Fresh) -> None:
    """The main process, its reconciler and the dead child's broker all have a say, and there is one outcome for each attempt."""
    stage = fresh()
    worker = stage.worker("worker", "prefork", 2, environment=RECONCILING)
    results = [stage.task("die.again").delay(stage.mark(), 2) for _ in range(3)]
    for result in results:
        assert result.get(timeout=60) == "alive"
        seen = stage.ended(result.id, "lost", "lost", "succeeded", seconds=60)
        assert [attempt.classification for attempt in seen.attempts] == ["killed", "killed", None]
        assert all("SIGKILL" in (attempt.error_message or "") for attempt in seen.attempts[:2])
    assert worker.stop() == 0
    worker.check_log()
    stage.check_agreement()


@pytest.mark.memory
def test_a_child_that_the_kernel_kills_for_its_memory_is_lost_and_says_so(fresh: Fresh) -> None:
    stage = fresh()
    worker = stage.worker("hungry", "prefork", 1)
    with memory_limit() as procs:
        result = stage.task("hog.again").delay(stage.mark(), str(procs))
        assert result.get(timeout=RESULT_SECONDS) == "alive"
    seen = stage.ended(result.id, "lost", "succeeded")
    assert "SIGKILL" in (seen.attempts[0].error_message or "")
    assert worker.stop() == 0
    worker.check_log()
    stage.check_agreement()


@pytest.fixture
def black_hole() -> Iterator[str]:
    """Give an endpoint that takes connections and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(64)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def test_an_endpoint_that_never_answers_delays_neither_tasks_nor_exits(fresh: Fresh, black_hole: str) -> None:
    """Scenario 12."""
    stage = fresh()
    environment = {"OTELEXEC_RELAY": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": black_hole}
    worker = stage.worker("hole", "prefork", 2, environment=environment)
    stage.task("add").delay(0, 0).get(timeout=RESULT_SECONDS)
    started = time.monotonic()
    results = [stage.task("add").delay(number, 1) for number in range(30)]
    assert [result.get(timeout=RESULT_SECONDS) for result in results] == list(range(1, 31))
    assert time.monotonic() - started < 10
    started = time.monotonic()
    assert worker.stop() == 0
    assert time.monotonic() - started < 15
    worker.check_log()
    assert {record.state for record in stage.records()} == {"succeeded"}
    stage.check_agreement()


def test_what_a_recycled_worker_committed_is_delivered_by_itself(fresh: Fresh) -> None:
    """With the relay on, as users have it: every span arrives, once, byte for byte."""
    stage = fresh()
    with OtlpReceiver() as receiver:
        environment = {"OTELEXEC_RELAY": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint}
        worker = stage.worker("relaying", "prefork", 2, arguments=("--max-tasks-per-child", "3"), environment=environment)
        results = [stage.task("add").delay(number, 1) for number in range(20)]
        for result in results:
            result.get(timeout=RESULT_SECONDS)
        wanted = {record.attempts[0].span_id for record in until(lambda: whole(stage, 20))}
        receiver.wait_for(lambda received: wanted <= {span.span_id for span in received.spans}, 20)
        assert worker.stop() == 0
        assert {len(arrivals) for arrivals in receiver.deliveries.values()} == {1}


def whole(stage: Stage, number: int) -> list[ExecutionRecord]:
    records = [record for record in stage.records() if record.state == "succeeded"]
    return records if len(records) == number else []
