"""Runs in a real Jaeger: from the caller through the run to the executor without a gap, also where a process was killed."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest
from otelexec_trigger import LocalBackend, TriggerDevBackend

import otelexec
from otelexec import semconv
from tests.integrations.trigger.conftest import Fresh
from tests.integrations.trigger.stage import Stage
from tests.records import until
from tests.servers import Jaeger, JaegerSpan, read_trace, running_jaeger

SHORT, LONG = 40, 500
SEED = 20261126


@pytest.fixture(scope="module")
def jaeger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jaeger]:
    with running_jaeger(tmp_path_factory.mktemp("jaeger")) as running:
        yield running


def drain(stage: Stage, jaeger: Jaeger) -> None:
    done = stage.command("relay", "--drain", OTEL_EXPORTER_OTLP_ENDPOINT=jaeger.otlp_http_url)
    assert done.returncode == 0, done.stderr


def test_the_trace_of_a_run_is_whole(fresh: Fresh, jaeger: Jaeger) -> None:
    stage = fresh()
    _, url = stage.serve()
    stage.worker(1)
    with TriggerDevBackend(url) as backend, otelexec.execution("the caller"):
        died = backend.trigger("die", stage.mark())
        cored = backend.trigger("cored", 21)
        until(lambda: backend.get(died).has_ended and backend.get(cored).has_ended, 40)
    record = stage.ended(died, "lost", "succeeded").record
    until(lambda: (seen := stage.look(cored)) is not None and seen.attempts[0].outer_outcome is not None, 10)
    core = stage.ended(cored).record
    otelexec.shutdown()
    drain(stage, jaeger)
    wanted = {attempt.span_id for each in (record, core) for attempt in each.attempts} | {core.attempts[0].outer_span_id}
    trace_id = record.attempts[0].trace_id or ""
    found: dict[str, JaegerSpan] = {}

    def whole() -> bool:
        found.update({span.span_id: span for span in read_trace(jaeger.base_url, trace_id)})
        return wanted <= found.keys()

    until(whole, 30)
    assert {each.trace_id for each in (*record.attempts, *core.attempts)} == {trace_id}

    def names(span_id: str | None) -> list[str]:
        """Give the names from a span up to the root; a gap would end them early."""
        span = found.get(span_id or "")
        return [] if span is None else [span.name, *names(span.parent_span_id)]

    for attempt in record.attempts:
        assert names(attempt.span_id) == ["die", "trigger die", "the caller"]
    assert names(core.attempts[0].span_id) == ["the.core", "cored", "trigger cored", "the caller"]
    lost = found[record.attempts[0].span_id or ""]
    assert (lost.status, lost.attributes[semconv.OUTCOME]) == ("error", "lost")


def killed_at_random(stage: Stage, number: int, seconds: float) -> None:
    """Have runs attempted while the processes that do so are killed."""
    backend = LocalBackend()
    payload = {"seconds": 0.02, "mark": stage.mark()}
    runs = [backend.trigger("sleep", payload, max_attempts=100) for _ in range(number)]
    workers = [stage.worker(2) for _ in range(2)]
    stopped = threading.Event()
    chance = random.Random(SEED)

    def kill() -> None:
        while not stopped.wait(chance.uniform(0.2, 0.6)):
            children = chance.choice(workers).children()
            if children:
                with suppress(ProcessLookupError):
                    os.kill(chance.choice(children), signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        until(lambda: all(backend.get(run).has_ended for run in runs), seconds)
    finally:
        stopped.set()
        thread.join()
    assert {backend.get(run).state for run in runs} == {"succeeded"}
    for worker in workers:
        assert worker.stop() == 0
        worker.check_log()
    otelexec.shutdown()
    stage.reconcile()
    spans = stage.spans()
    records = stage.records()
    assert len(records) == number
    consumers = [span for span in spans if span.kind == "consumer"]
    assert len({span.span_id for span in consumers}) == len(consumers) == sum(len(record.attempts) for record in records)
    stage.check_agreement()


def test_runs_whose_processes_are_killed_have_one_span_for_each_attempt(fresh: Fresh) -> None:
    killed_at_random(fresh(), SHORT, 90)


@pytest.mark.longest
@pytest.mark.timeout(600)
def test_many_runs_whose_processes_are_killed_have_one_span_for_each_attempt(fresh: Fresh) -> None:
    killed_at_random(fresh(), LONG, 500)
