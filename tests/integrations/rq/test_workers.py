"""Every worker class: what it runs has one CONSUMER span and one attempt for each run, and the baggage it was sent with."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import baggage, context
from rq import Queue, Repeat
from rq.command import send_stop_job_command
from rq.job import Job

import otelexec
from otelexec import semconv
from tests.integrations.rq import jobs
from tests.integrations.rq.conftest import Fresh
from tests.integrations.rq.stage import Stage
from tests.integrations.rq.worker_app import INSTRUMENT
from tests.measuring import DURATION, LATENCY, RECONCILED, points
from tests.records import until
from tests.servers import free_ports

CLASSES = ("Worker", "SimpleWorker", "SpawnWorker", "RoundRobinWorker", "RandomWorker", "WorkerPool")


def send(stage: Stage) -> dict[str, Any]:
    """Enqueue in every way that asks for no more than a worker."""
    with otelexec.correlate(source="test"):
        token = context.attach(baggage.set_baggage("tenant", "blue"))
        try:
            sent: dict[str, Any] = {
                "enqueue": stage.queue.enqueue(jobs.look),
                "enqueue_many": stage.queue.enqueue_many([Queue.prepare_data(jobs.look)])[0],
                "repeat": stage.queue.enqueue(jobs.look, repeat=Repeat(times=1)),
            }
            sent["depends_on"] = stage.queue.enqueue(jobs.look, depends_on=sent["enqueue"])
            sent["enqueue_at"] = stage.queue.enqueue_at(datetime.now(UTC), jobs.look)
        finally:
            context.detach(token)
    return sent


def test_workers_in_threads_of_one_process_do_not_answer_for_each_others_horses(fresh: Fresh) -> None:
    stage = fresh()
    stage.worker("threads", "Threaded", threads=2)

    def stop(job: Job, _: int) -> None:
        send_stop_job_command(stage.connection, job.id)

    def kill(_: Job, horse: int) -> None:
        os.kill(horse, signal.SIGKILL)

    def ask(job: Job, _: int) -> None:
        seen = until(lambda: stage.look(job.id))
        assert seen is not None
        otelexec.request_cancel(seen.record.execution_id)

    for end, state in ((stop, "cancelled"), (kill, "lost"), (ask, "cancelled")):
        mark = stage.mark()
        job = stage.queue.enqueue(jobs.sleep, 60, mark)
        horse = stage.wait_for_run(mark)
        assert stage.result(stage.queue.enqueue(jobs.give, 1)) == 1  # by the other one, meanwhile
        end(job, horse)
        seen = stage.ended(job.id, state)
        assert (seen.record.state, seen.attempt.finalized_by) == (state, "parent")
    stage.check_agreement()


@pytest.mark.parametrize("cls", CLASSES)
def test_each_worker_class_records_what_it_runs(fresh: Fresh, cls: str) -> None:
    stage = fresh()
    # A pool's workers have no scheduler; RQ's own is one more worker.
    worker = stage.worker("under-test", cls, scheduler=cls != "WorkerPool", pool=2 if cls == "WorkerPool" else 1)
    if cls == "WorkerPool":
        stage.start("scheduler", scheduler=True)
    sent = send(stage)
    for way, job in sent.items():
        said = stage.result(job)
        assert said["baggage"]["tenant"] == "blue", way
        seen = stage.ended(job.id, "succeeded") if way != "repeat" else None
        assert seen is None or said["span_id"] == seen.consumer().span_id, way
    until(lambda: len(consumers(stage, sent["repeat"].id)) == 2)
    spans = [span for job in sent.values() for span in consumers(stage, job.id)]
    assert len({span.attributes[semconv.EXECUTION_ID] for span in spans}) == len(sent) + 1
    failing = stage.queue.enqueue(jobs.fail)
    assert stage.ended(failing.id, "failed").attempt.error_type == "ValueError"
    assert worker.stop() == 0
    for each in stage.workers:
        each.stop()
        each.check_log()
    stage.check_agreement()


def consumers(stage: Stage, job_id: str) -> list[Any]:
    return [span for span in stage.spans() if span.kind == "consumer" and span.attributes.get(semconv.MESSAGING_MESSAGE_ID) == job_id]


@pytest.mark.parametrize("cls", ["Worker", "SpawnWorker"])
def test_a_horse_has_what_the_parent_was_configured_with(fresh: Fresh, cls: str) -> None:
    """What is passed to `configure()` reaches a horse that starts afresh as well."""
    stage = fresh()
    worker = stage.worker("configured", cls, environment={"OTELEXEC_STORE": None}, configure={"store": f"sqlite:///{stage.path}"})
    job = stage.queue.enqueue(jobs.give)
    assert stage.ended(job.id, "succeeded").attempt.pid != worker.pid


def test_under_opentelemetry_instrument_a_horse_that_starts_afresh_is_instrumented_once(fresh: Fresh) -> None:
    """Its environment makes an instrumented process of every interpreter that starts in it."""
    from opentelemetry.instrumentation import auto_instrumentation

    stage = fresh()
    path = os.pathsep.join((str(Path(auto_instrumentation.__file__).parent), stage.environment["PYTHONPATH"]))
    exporters = {f"OTEL_{signal}_EXPORTER": "none" for signal in ("TRACES", "METRICS", "LOGS")}
    worker = stage.worker("zero-code", "SpawnWorker", environment={"PYTHONPATH": path, INSTRUMENT: None, **exporters})
    job = stage.queue.enqueue(jobs.give)
    assert stage.ended(job.id, "succeeded").attempt.pid != worker.pid
    assert worker.stop() == 0
    assert "already instrumented" not in worker.text()


def test_links_instead_of_parents(fresh: Fresh) -> None:
    stage = fresh()
    stage.worker("links", environment={"OTELEXEC_TEST_INSTRUMENT": '{"use_span_links": true}'})
    job = stage.queue.enqueue(jobs.look)
    said = stage.result(job)
    seen = stage.ended(job.id, "succeeded")
    [producer], consumer = seen.producers, seen.consumer()
    assert (consumer.parent_span_id, [link.span_id for link in consumer.links]) == (None, [producer.span_id])
    assert said["baggage"][semconv.REQUEST_ID] == seen.record.request_id


@contextmanager
def black_hole() -> Iterator[str]:
    """Take connections, read what comes, and never answer."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", free_ports(1)[0]))
        listener.listen()
        taken: list[socket.socket] = []
        ended = threading.Event()

        def take() -> None:
            listener.settimeout(0.1)
            while not ended.is_set():
                try:
                    taken.append(listener.accept()[0])
                except TimeoutError:
                    continue

        thread = threading.Thread(target=take)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            ended.set()
            thread.join()
            for connection in taken:
                connection.close()


def test_an_endpoint_that_never_answers_delays_neither_horses_nor_the_exit(fresh: Fresh) -> None:
    stage = fresh()
    with black_hole() as endpoint:
        worker = stage.worker(
            "swallowed",
            environment={
                "OTELEXEC_RELAY": "true",
                "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
                "OTEL_EXPORTER_OTLP_TIMEOUT": "3",
                "OTELEXEC_RELAY_INTERVAL_SECONDS": "0.1",
            },
        )
        stage.result(stage.queue.enqueue(jobs.give))  # what comes first is loaded by now
        started = time.monotonic()
        sent = [stage.queue.enqueue(jobs.give) for _ in range(5)]
        for job in sent:
            stage.ended(job.id, "succeeded")
        assert time.monotonic() - started < 10
        started = time.monotonic()
        assert worker.stop() == 0
        assert time.monotonic() - started < 15
    stage.check_agreement()


def test_a_worker_relays_for_its_horses(fresh: Fresh) -> None:
    from otelexec.receiver import OtlpReceiver

    stage = fresh()
    with OtlpReceiver() as receiver:
        stage.worker("relaying", environment={"OTELEXEC_RELAY": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint})
        job = stage.queue.enqueue(jobs.give)
        until(
            lambda: "consumer" in {span.kind for span in receiver.spans if span.attributes.get(semconv.MESSAGING_MESSAGE_ID) == job.id}, 20
        )


def test_without_a_store_the_spans_of_horses_leave_by_the_users_own_provider(fresh: Fresh) -> None:
    from otelexec.receiver import OtlpReceiver

    stage = fresh()
    with OtlpReceiver() as receiver:
        stage.worker("storeless", provider=True, environment={"OTELEXEC_STORE": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint})
        job = stage.queue.enqueue(jobs.give)
        until(lambda: job.id in {span.attributes.get(semconv.MESSAGING_MESSAGE_ID) for span in receiver.spans}, 20)


def test_what_a_job_adds_to_its_trace_leaves_by_the_users_own_provider(fresh: Fresh) -> None:
    from otelexec.receiver import OtlpReceiver

    stage = fresh()
    with OtlpReceiver() as receiver:
        stage.worker("provided", provider=True, environment={"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint})
        job = stage.queue.enqueue(jobs.trace_a_query)
        (query,) = until(lambda: [span for span in receiver.spans if span.name == "query"], 20)
        assert query.parent_span_id == stage.ended(job.id, "succeeded").attempt.span_id


def test_without_a_store_a_provider_that_never_gets_an_answer_holds_no_horse_up(fresh: Fresh) -> None:
    stage = fresh()
    with black_hole() as endpoint:
        worker = stage.worker("storeless", provider=True, environment={"OTELEXEC_STORE": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint})
        for _ in range(3):
            stage.result(stage.queue.enqueue(jobs.give), 8)
        assert worker.stop(seconds=8) == 0


def test_what_horses_measure_is_exported_once(fresh: Fresh) -> None:
    stage = fresh()
    worker = stage.worker("measured", measure=str(stage.folder))
    stage.ended(stage.queue.enqueue(jobs.die, stage.mark()).id)
    for job in [stage.queue.enqueue(function) for function in (jobs.give, jobs.give, jobs.fail)]:
        stage.ended(job.id)
    assert worker.stop() == 0
    (dead,) = points(stage.folder, RECONCILED)
    assert (dead["value"], dead["attributes"]["otelexec.outcome"], dead["attributes"]["error.type"]) == (1, "lost", "killed")
    works = Counter[str]()
    for point in points(stage.folder, DURATION):
        assert point["attributes"]["messaging.system"] == "rq"
        works[point["attributes"]["otelexec.outcome"]] += point["count"]
    assert works == {"succeeded": 2, "failed": 1}
    assert sum(point["count"] for point in points(stage.folder, LATENCY)) == 3


def test_the_workers_of_a_pool_are_instrumented_where_they_start_afresh(fresh: Fresh) -> None:
    """RQ 2 leaves it to `multiprocessing` how they start, which does not fork by default from Python 3.14 on."""
    stage = fresh()
    worker = stage.worker("afresh", "WorkerPool", pool=1, start_method="spawn", configure={"service_name": "pooled"})
    job = stage.queue.enqueue(jobs.give, 7)
    assert stage.result(job) == 7
    assert stage.ended(job.id, "succeeded").attempt.pid != worker.pid
    assert worker.stop() == 0
