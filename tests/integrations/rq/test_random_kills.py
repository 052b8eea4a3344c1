"""Many jobs whose horses are killed at random: nothing is unaccounted for, here and in a real Jaeger."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial

import pytest
from rq import Queue, Retry

from otelexec import semconv
from otelexec.decoded import DecodedSpan
from otelexec.receiver import OtlpReceiver
from otelexec.store.records import ExecutionRecord
from tests.acceptance.agreement import disagreements
from tests.integrations.rq import jobs
from tests.integrations.rq.conftest import Fresh
from tests.integrations.rq.stage import Stage, Worker
from tests.records import until
from tests.servers import Jaeger, JaegerSpan, read_trace, running_jaeger
from tests.stores import beside

SHORT, LONG = 60, 1_000
WORKERS = 3
RETRIES = 10
SEED = 20261126


@contextmanager
def killing(workers: list[Worker], every_seconds: float) -> Iterator[list[int]]:
    """Kill a horse every so often, at random, until the end of the block; gives the pids."""
    killed: list[int] = []
    stopped = threading.Event()
    chance = random.Random(SEED)

    def kill() -> None:
        while not stopped.wait(chance.uniform(0.3, 1.7) * every_seconds):
            horses = chance.choice(workers).horses()
            if horses:
                with suppress(ProcessLookupError):
                    os.kill(pid := chance.choice(horses), signal.SIGKILL)
                    killed.append(pid)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield killed
    finally:
        stopped.set()
        thread.join()


def run_all(stage: Stage, number: int, seconds: float) -> tuple[int, set[str]]:
    """Run jobs while their horses die; gives how many kills there were, and the jobs' ids."""
    workers = [stage.start(f"doomed-{each}") for each in range(WORKERS)]
    workers[-1].wait_until_ready(WORKERS)
    data = [Queue.prepare_data(jobs.brief, (each % 5,), retry=Retry(max=RETRIES)) for each in range(number)]
    ids = {job.id for job in stage.queue.enqueue_many(data)}
    with killing(workers, 0.2) as killed:
        until(lambda: ended_and_open(stage) == (number, 0), seconds)
    for worker in workers:
        assert worker.stop() == 0
        worker.check_log()
    return len(killed), ids


def ended_and_open(stage: Stage) -> tuple[int, int]:
    time.sleep(0.25)  # reading everything costs the workers their cores
    records = stage.records()
    ended = [record for record in records if record.state == "succeeded"]
    open_now = [record for record in records for attempt in record.attempts if attempt.ended_unix_ns is None]
    return len(ended), len(open_now)


def check_accounted_for(stage: Stage, job_ids: set[str], kills: int, spans: list[DecodedSpan]) -> list[ExecutionRecord]:
    """Check records against spans, and both against what was enqueued and killed."""
    records = stage.records()
    assert len(records) == len(job_ids)
    lost = [attempt for record in records for attempt in record.attempts if attempt.state == "lost"]
    assert 0 < len(lost) <= kills
    assert all("SIGKILL" in (attempt.error_message or "") for attempt in lost)
    consumers = [span for span in spans if span.kind == "consumer"]
    assert len({span.span_id for span in consumers}) == sum(len(record.attempts) for record in records)
    assert {span.attributes[semconv.MESSAGING_MESSAGE_ID] for span in consumers} == job_ids
    assert disagreements(beside(stage.path), spans).failures == []
    return records


def drain(stage: Stage, endpoint: str) -> None:
    done = stage.command("relay", "--drain", OTEL_EXPORTER_OTLP_ENDPOINT=endpoint)
    assert done.returncode == 0, done.stderr


def test_every_job_is_accounted_for(fresh: Fresh) -> None:
    stage = fresh()
    kills, job_ids = run_all(stage, SHORT, 90)
    with OtlpReceiver() as receiver:
        drain(stage, receiver.endpoint)
        check_accounted_for(stage, job_ids, kills, receiver.spans)


@pytest.fixture(scope="module")
def jaeger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jaeger]:
    with running_jaeger(tmp_path_factory.mktemp("jaeger")) as running:
        yield running


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_thousand_jobs_read_back_from_a_real_jaeger(fresh: Fresh, jaeger: Jaeger) -> None:
    stage = fresh()
    kills, job_ids = run_all(stage, LONG, 500)
    spans = stage.spans()
    drain(stage, jaeger.otlp_http_url)
    for record in check_accounted_for(stage, job_ids, kills, spans):
        traced = until(partial(whole, jaeger.base_url, record), 30)
        by_id = {span.span_id: span for span in traced}
        assert len(by_id) == len(traced)
        for attempt in record.attempts:
            span = by_id[attempt.span_id or ""]
            assert span.attributes[semconv.OUTCOME] == attempt.state
            assert span.status == ("error" if attempt.state == "lost" else "unset")


def whole(base_url: str, record: ExecutionRecord) -> list[JaegerSpan]:
    """Give a record's trace once every span of it is there."""
    spans = read_trace(base_url, record.producer_trace_id or "")
    wanted = {attempt.span_id for attempt in record.attempts} | {record.producer_span_id}
    return spans if wanted <= {span.span_id for span in spans} else []
