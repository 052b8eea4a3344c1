"""Many tasks on a prefork pool whose children are killed at random: nothing is unaccounted for, here and in a real Jaeger."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial

import pytest

from otelexec import semconv
from otelexec.decoded import DecodedSpan
from otelexec.receiver import OtlpReceiver
from otelexec.store.records import ExecutionRecord
from tests.acceptance.agreement import disagreements
from tests.integrations.celery.conftest import Fresh
from tests.integrations.celery.stage import Stage, Worker
from tests.records import until
from tests.servers import Jaeger, JaegerSpan, read_trace, running_jaeger
from tests.stores import beside

SHORT, LONG = 150, 2_000
SEED = 20261125


@contextmanager
def killing(worker: Worker, every_seconds: float) -> Iterator[list[int]]:
    """Kill a child of a worker every so often, at random, until the end of the block; gives the pids."""
    killed: list[int] = []
    stopped = threading.Event()
    chance = random.Random(SEED)

    def kill() -> None:
        while not stopped.wait(chance.uniform(0.3, 1.7) * every_seconds):
            children = worker.children()
            if children:
                with suppress(ProcessLookupError):
                    os.kill(pid := chance.choice(children), signal.SIGKILL)
                    killed.append(pid)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield killed
    finally:
        stopped.set()
        thread.join()


def run_all(stage: Stage, tasks: int, seconds: float) -> tuple[int, list[str]]:
    """Run tasks while their processes die; gives how many kills there were, and the tasks' ids."""
    worker = stage.worker("doomed", "prefork", 4)
    results = [stage.task("brief.again").delay(number % 5) for number in range(tasks)]
    with killing(worker, 0.35) as killed:
        # A kill delays what the child had by worker_lost_wait, and the message is then delivered again.
        until(lambda: ended_and_open(stage) == (tasks, 0), seconds)
    assert worker.stop() == 0
    worker.check_log()
    return len(killed), [result.id for result in results]


def ended_and_open(stage: Stage) -> tuple[int, int]:
    time.sleep(0.25)  # reading everything costs the worker its cores
    records = stage.records()
    ended = [record for record in records if record.state == "succeeded"]
    open_now = [record for record in records for attempt in record.attempts if attempt.ended_unix_ns is None]
    return len(ended), len(open_now)


def check_accounted_for(stage: Stage, task_ids: list[str], kills: int, spans: list[DecodedSpan]) -> list[ExecutionRecord]:
    """Check records against spans, and both against what was sent and killed."""
    records = stage.records()
    assert len(records) == len(task_ids)
    lost = [attempt for record in records for attempt in record.attempts if attempt.state == "lost"]
    assert 0 < len(lost) <= kills
    assert {attempt.classification for attempt in lost} == {"killed"}
    assert all("SIGKILL" in (attempt.error_message or "") for attempt in lost)
    own = [attempt for record in records for attempt in record.attempts if not attempt.duplicate]
    assert Counter(attempt.state for attempt in own)["succeeded"] == len(task_ids)
    consumers = [span for span in spans if span.kind == "consumer"]
    assert len({span.span_id for span in consumers}) == sum(len(record.attempts) for record in records)
    assert {span.attributes[semconv.MESSAGING_MESSAGE_ID] for span in consumers} == set(task_ids)
    found = disagreements(beside(stage.path), spans)
    assert found.failures == []
    return records


def test_every_task_is_accounted_for(fresh: Fresh) -> None:
    stage = fresh()
    kills, task_ids = run_all(stage, SHORT, 90)
    with OtlpReceiver() as receiver:
        drain(stage, receiver.endpoint)
        check_accounted_for(stage, task_ids, kills, receiver.spans)


@pytest.fixture(scope="module")
def jaeger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jaeger]:
    with running_jaeger(tmp_path_factory.mktemp("jaeger")) as running:
        yield running


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_two_thousand_tasks_read_back_from_a_real_jaeger(fresh: Fresh, jaeger: Jaeger) -> None:
    stage = fresh()
    kills, task_ids = run_all(stage, LONG, 1200)
    spans = stage.spans()
    drain(stage, jaeger.otlp_http_url)
    for record in check_accounted_for(stage, task_ids, kills, spans):
        traced = until(partial(whole, jaeger.base_url, record), 30)
        by_id = {span.span_id: span for span in traced}
        assert len(by_id) == len(traced)
        for attempt in record.attempts:
            span = by_id[attempt.span_id or ""]
            assert span.attributes[semconv.OUTCOME] == attempt.state
            # Jaeger gives a span without a duration one of a nanosecond.
            ended = max(attempt.ended_unix_ns or 0, attempt.started_unix_ns + 1)
            assert (span.started_unix_ns, span.ended_unix_ns) == (attempt.started_unix_ns, ended)
            assert span.status == ("error" if attempt.state == "lost" else "unset")
            assert not span.warnings or ended != attempt.ended_unix_ns


def whole(base_url: str, record: ExecutionRecord) -> list[JaegerSpan]:
    """Give a record's trace once every span of it is there."""
    spans = read_trace(base_url, record.producer_trace_id or "")
    wanted = {attempt.span_id for attempt in record.attempts} | {record.producer_span_id}
    return spans if wanted <= {span.span_id for span in spans} else []


def drain(stage: Stage, endpoint: str) -> None:
    done = stage.command("relay", "--drain", OTEL_EXPORTER_OTLP_ENDPOINT=endpoint)
    assert done.returncode == 0, done.stderr
