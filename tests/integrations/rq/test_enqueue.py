"""Every way of enqueueing: one PRODUCER span, one `queued` record, and a job that carries both wherever it is run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from opentelemetry import baggage, context, trace
from redis import Redis
from redis import exceptions as redis_errors
from rq import Callback, Queue, Repeat, Retry
from rq.group import Group
from rq.job import Job, JobStatus

import otelexec
from otelexec import semconv
from otelexec.decoded import DecodedSpan
from tests.integrations.rq import jobs
from tests.integrations.rq.conftest import Fresh
from tests.integrations.rq.stage import Stage
from tests.records import Records, until


def enqueue_many(stage: Stage) -> Job:
    return stage.queue.enqueue_many([Queue.prepare_data(jobs.look)])[0]


def enqueue_in_group(stage: Stage) -> Job:
    made: list[Job] = Group.create(connection=stage.connection).enqueue_many(stage.queue, [Queue.prepare_data(jobs.look)])
    return made[0]


def enqueue_rate_limited(stage: Stage) -> Job:
    rate_limit: Any = pytest.importorskip("rq.rate_limit").RateLimit
    options: dict[str, Any] = {"rate_limit": rate_limit(key=f"limit-{stage.name}", concurrency=1)}
    job: Job = stage.queue.enqueue(jobs.look, **options)
    return job


WAYS: dict[str, Callable[[Stage], Job]] = {
    "enqueue": lambda stage: stage.queue.enqueue(jobs.look),
    "enqueue_call": lambda stage: stage.queue.enqueue_call(jobs.look),
    "by name": lambda stage: stage.queue.enqueue("tests.integrations.rq.jobs.look"),
    "a coroutine": lambda stage: stage.queue.enqueue(jobs.look_async),
    "enqueue_many": enqueue_many,
    "group": enqueue_in_group,
    "enqueue_at": lambda stage: stage.queue.enqueue_at(datetime.now(UTC), jobs.look),
    "enqueue_in": lambda stage: stage.queue.enqueue_in(timedelta(seconds=0), jobs.look),
    "create_job": lambda stage: stage.queue.enqueue_job(stage.queue.create_job(jobs.look)),
    "Job.create": lambda stage: stage.queue.enqueue_job(Job.create(jobs.look, connection=stage.connection)),
    "rate limit": enqueue_rate_limited,
    "depends_on": lambda stage: stage.queue.enqueue(jobs.look, depends_on=stage.queue.enqueue(jobs.give)),
}


@pytest.mark.parametrize("way", WAYS)
def test_each_way_of_enqueueing_carries_ids_and_trace(common: Stage, way: str) -> None:
    token = context.attach(baggage.set_baggage("tenant", "blue"))
    try:
        with otelexec.correlate(source="webhook", webhook_id="wh_1", path="/hooks", provider="crm") as correlation:
            job = WAYS[way](common)
    finally:
        context.detach(token)
    said = common.result(job)
    seen = common.ended(job.id, "succeeded")
    [producer], consumer = seen.producers, seen.consumer()
    assert seen.record.request_id == correlation.request_id
    assert seen.record.source == "webhook"
    assert seen.record.execution_id == said["execution_id"]
    if way != "depends_on":  # where it is the second job of the scope
        assert seen.record.execution_id == correlation.execution_id
    assert said["baggage"]["tenant"] == "blue"
    assert said["baggage"][semconv.REQUEST_ID] == correlation.request_id
    assert (consumer.parent_span_id, consumer.trace_id) == (producer.span_id, producer.trace_id)
    assert (said["span_id"], said["trace_id"]) == (consumer.span_id, consumer.trace_id)
    for span in (producer, consumer):
        assert span.attributes[semconv.MESSAGING_SYSTEM] == "rq"
        assert span.attributes[semconv.MESSAGING_MESSAGE_ID] == job.id
        assert span.attributes[semconv.MESSAGING_DESTINATION_NAME] == common.name
    assert consumer.name == seen.record.name == f"tests.integrations.rq.jobs.{'look_async' if way == 'a coroutine' else 'look'}"
    latency = consumer.attributes[semconv.QUEUE_LATENCY]
    assert isinstance(latency, float)
    assert 0 <= latency < 30


def test_a_method_is_named_with_its_class(common: Stage) -> None:
    press = jobs.Press()
    made = [common.queue.enqueue(function) for function in (press.run, jobs.Press.make, jobs.Press.count, press)]
    names = [common.ended(job.id, "succeeded").record.name for job in made]
    assert names == [f"tests.integrations.rq.jobs.Press.{name}" for name in ("run", "make", "count", "__call__")]


def test_the_meta_key_holds_plain_strings_beside_the_users_own(common: Stage) -> None:
    own = {"user": 1}
    job = common.queue.enqueue(jobs.give, meta=own)
    assert own == {"user": 1}
    fetched = Job.fetch(job.id, connection=common.connection)
    assert fetched.meta["user"] == 1
    assert set(fetched.meta) == {"user", "otelexec"}
    carried = fetched.meta["otelexec"]
    assert {type(value) for value in carried.values()} == {str}
    seen = common.ended(job.id, "succeeded")
    [producer] = seen.producers
    assert carried["traceparent"].split("-")[1:3] == [producer.trace_id, producer.span_id]
    assert f"{semconv.EXECUTION_ID}={seen.record.execution_id}" in carried["baggage"]


def test_a_copied_meta_brings_nothing_of_another_job_along(common: Stage) -> None:
    first = common.queue.enqueue(jobs.give)
    second = common.queue.enqueue(jobs.give, meta=first.meta)
    assert common.ended(first.id).record.execution_id != common.ended(second.id).record.execution_id


def test_the_first_job_of_a_scope_has_its_id_and_every_other_its_own(common: Stage) -> None:
    with otelexec.correlate(source="test") as correlation:
        made = common.queue.create_job(jobs.give)
        others = [common.queue.enqueue(jobs.give) for _ in range(2)]
        common.queue.enqueue_job(made)
    records = [common.ended(job.id, "succeeded").record for job in (made, *others)]
    assert records[0].execution_id == correlation.execution_id
    assert len({record.execution_id for record in records}) == 3
    assert {record.request_id for record in records} == {correlation.request_id}


def test_the_jobs_of_one_call_are_siblings(common: Stage) -> None:
    with otelexec.execution("sender") as sender:
        sent = common.queue.enqueue_many([Queue.prepare_data(jobs.give) for _ in range(3)])
        mine = f"{trace.get_current_span().get_span_context().span_id:016x}"
    seen = [common.ended(job.id, "succeeded") for job in sent]
    assert {each.producers[0].parent_span_id for each in seen} == {mine}
    assert {each.record.parent_execution_id for each in seen} == {sender.id}
    assert len({each.record.execution_id for each in seen}) == 3


def test_a_job_that_a_job_enqueues_is_its_child(common: Stage) -> None:
    with otelexec.correlate(source="test") as correlation:
        parent = common.queue.enqueue(jobs.enqueue_more, common.url, common.name)
    child_id = common.result(parent)
    outer, inner = common.ended(parent.id, "succeeded"), common.ended(child_id, "succeeded")
    assert inner.record.parent_execution_id == outer.record.execution_id
    assert inner.record.request_id == correlation.request_id
    assert inner.producers[0].parent_span_id == outer.consumer().span_id


def test_a_job_links_to_those_that_it_depends_on(common: Stage) -> None:
    first, second = common.queue.enqueue(jobs.give), common.queue.enqueue(jobs.give)
    last = common.queue.enqueue(jobs.give, depends_on=[first, second.id])
    parents = {common.ended(job.id, "succeeded").producers[0].span_id for job in (first, second)}
    seen = common.ended(last.id, "succeeded")
    assert {link.span_id for link in seen.producers[0].links} == parents
    assert {link.span_id for link in seen.consumer().links} == parents


def test_each_further_run_of_a_repeat_is_an_execution_with_a_trace_of_its_own(common: Stage) -> None:
    with otelexec.correlate(source="test") as correlation:
        job = common.queue.enqueue(jobs.give, repeat=Repeat(times=2, interval=[0, 1]))
    runs = until(lambda: three_runs(common, job.id), 30)
    first, *others = sorted(runs, key=lambda span: span.start_unix_ns)
    ids = [str(span.attributes[semconv.EXECUTION_ID]) for span in (first, *others)]
    assert ids[0] == correlation.execution_id
    assert len(set(ids)) == 3
    assert len({span.trace_id for span in runs}) == 3
    for execution_id, span in zip(ids[1:], others, strict=True):
        record = common.record(execution_id)
        assert record is not None
        assert (record.state, record.request_id, record.source) == ("succeeded", correlation.request_id, "test")
        assert {link.trace_id for link in span.links} == {first.trace_id}


def test_a_repeat_whose_transaction_is_begun_anew_has_one_record_more(fresh: Fresh) -> None:
    """RQ begins it anew where another job came to depend on this one meanwhile."""
    stage = fresh()
    job = stage.queue.enqueue(jobs.give, repeat=Repeat(times=1, interval=3600))
    for _ in range(2):
        job.repeats_left = 1
        job.set_status(JobStatus.FINISHED)
        Repeat.schedule(job, stage.queue)
    assert [record.state for record in stage.records()] == ["queued", "queued"]


def three_runs(stage: Stage, job_id: str) -> list[DecodedSpan]:
    found = [span for span in stage.spans() if span.kind == "consumer" and span.attributes.get(semconv.MESSAGING_MESSAGE_ID) == job_id]
    return found if len(found) == 3 else []


@pytest.mark.parametrize("function", [jobs.give, jobs.fail])
def test_so_is_a_job_that_has_ended_and_is_enqueued_anew(common: Stage, function: Callable[..., Any]) -> None:
    """As rq-scheduler does with one that is periodic: how a run ended is not hidden by the runs before and after it."""
    state, status = ("succeeded", "finished") if function is jobs.give else ("failed", "failed")
    with otelexec.correlate(source="test") as correlation:
        sent = common.queue.enqueue(function)
    for enqueue in (common.queue.enqueue_job, lambda job: common.queue.schedule_job(job, datetime.now(UTC))):
        until(lambda: sent.get_status() == status, 25)
        enqueue(Job.fetch(sent.id, connection=common.connection))
    runs = until(lambda: three_runs(common, sent.id), 30)
    records = [common.record(str(span.attributes[semconv.EXECUTION_ID])) for span in runs]
    assert [record.state for record in records if record is not None] == [state] * 3
    assert len({record.execution_id for record in records if record is not None}) == len({span.trace_id for span in runs}) == 3
    assert {record.request_id for record in records if record is not None} == {correlation.request_id}
    first, *others = sorted(runs, key=lambda span: span.start_unix_ns)
    assert {link.trace_id for span in others for link in span.links} == {first.trace_id}
    until(lambda: sent.get_status() == status, 25)


def test_a_cron_entry_is_asked_for_by_its_schedule_in_a_clean_context(common: Stage) -> None:
    cron = pytest.importorskip("rq.cron")
    entry = cron.CronJob(common.name, func=jobs.look, interval=60)
    with otelexec.execution("around"):
        job = entry.enqueue(common.connection)
    seen = common.ended(job.id, "succeeded")
    assert seen.record.source == "schedule"
    assert seen.record.parent_execution_id is None
    assert '"schedule_id": "tests.integrations.rq.jobs.look"' in seen.record.correlation
    assert seen.producers[0].parent_span_id is None
    entry.set_enqueue_time(datetime.now(UTC)) if hasattr(entry, "set_enqueue_time") else entry.set_run_time(datetime.now(UTC))
    again = common.ended(entry.enqueue(common.connection).id, "succeeded")
    assert "scheduled_for" in again.record.correlation


def test_the_json_serializer_carries_the_same(fresh: Fresh) -> None:
    stage = fresh()
    worker = stage.worker("json", json=True)
    with otelexec.correlate(source="test") as correlation:
        job = stage.json_queue(stage.name).enqueue(jobs.give, "x")
    seen = stage.ended(job.id, "succeeded")
    assert seen.record.execution_id == correlation.execution_id
    assert worker.stop() == 0


def test_a_refused_job_is_rejected_and_leaves_no_context_behind(instrumented: None, records: Records) -> None:
    queue = Queue("nowhere", connection=Redis(port=1, socket_connect_timeout=1))
    with pytest.raises(redis_errors.ConnectionError):
        queue.enqueue(jobs.give)
    assert not trace.get_current_span().get_span_context().is_valid
    record = records.one()
    assert (record.state, record.error_type) == ("rejected", "redis.exceptions.ConnectionError")
    [span] = [span for span in records.spans() if span.kind == "producer"]
    assert span.status == "error"


def test_a_job_that_is_to_be_unique_must_still_be_given_an_id(fresh: Fresh) -> None:
    stage = fresh()
    if jobs.VERSION < (3, 0):
        pytest.skip("there a job can't be unique on every way")
    unique: Any = {"unique": True}
    for enqueue in (
        lambda: stage.queue.enqueue(jobs.give, **unique),
        lambda: stage.queue.enqueue_at(datetime.now(UTC), jobs.give, **unique),
        lambda: stage.queue.enqueue_job(stage.queue.create_job(jobs.give), **unique),
    ):
        with pytest.raises(ValueError, match="job_id"):
            enqueue()
    assert {record.state for record in stage.records()} <= {"rejected"}
    stage.queue.enqueue(jobs.give, job_id="only", **unique)
    with pytest.raises(Exception, match="only"):
        stage.queue.enqueue(jobs.give, job_id="only", **unique)
    assert min(record.state for record in stage.records()) == "queued"


def test_a_synchronous_queue_runs_the_job_as_an_execution_of_its_own(fresh: Fresh) -> None:
    stage = fresh()
    queue = Queue(stage.name, connection=stage.connection, is_async=False)
    with otelexec.execution("sender") as sender:
        job = queue.enqueue(jobs.look)
        assert otelexec.current_execution() is sender
        failing = queue.enqueue(jobs.fail)
        nested = queue.enqueue(jobs.enqueue_more, stage.url, stage.name)
    said: Any = job.return_value()
    seen = stage.ended(job.id, "succeeded")
    assert (said["execution_id"], said["span_id"]) == (seen.record.execution_id, seen.consumer().span_id)
    assert seen.record.parent_execution_id == sender.id
    assert stage.ended(failing.id, "failed").attempt.error_type == "ValueError"
    inner = stage.look(str(nested.return_value()))
    assert inner is not None
    assert inner.record.parent_execution_id == stage.ended(nested.id, "succeeded").record.execution_id


def test_a_job_of_somebody_who_is_not_instrumented_has_its_own_id_as_the_executions(common: Stage) -> None:
    script = (
        "import sys; from redis import Redis; from rq import Queue; "
        "print(Queue(sys.argv[2], connection=Redis.from_url(sys.argv[1])).enqueue('tests.integrations.rq.jobs.give', 1).id)"
    )
    done = subprocess.run([sys.executable, "-c", script, common.url, common.name], capture_output=True, text=True, timeout=60, check=True)
    job_id = done.stdout.strip()
    seen = common.ended(job_id, "succeeded")
    assert seen.record.execution_id == seen.record.request_id == job_id


def test_data_that_ends_whoever_reads_it_takes_no_worker_along(common: Stage) -> None:
    """The parent reads nothing of a job that nobody stamped."""
    script = (
        "import sys; from redis import Redis; from rq import Queue; from tests.integrations.rq import jobs; "
        "queue = Queue(sys.argv[2], connection=Redis.from_url(sys.argv[1])); "
        "print(queue.enqueue(jobs.give, jobs.Poison()).id, queue.enqueue(jobs.give, 1).id)"
    )
    done = subprocess.run([sys.executable, "-c", script, common.url, common.name], capture_output=True, text=True, timeout=60, check=True)
    poisoned, well = done.stdout.split()
    common.ended(poisoned, "lost")
    common.ended(well, "succeeded")


def test_meta_that_is_no_dict_stays_as_it_is(common: Stage) -> None:
    meta: Any = ["of", "the", "user"]
    job = common.queue.enqueue(jobs.give, 1, meta=meta)
    seen = common.ended(job.id, "succeeded")
    assert seen.record.execution_id == job.id
    assert Job.fetch(job.id, connection=common.connection).meta == meta


def test_a_repeat_that_cannot_be_stamped_leaves_no_record_of_a_run_that_never_comes(common: Stage) -> None:
    meta: Any = ["of", "the", "user"]
    job = common.queue.enqueue(jobs.give, 1, meta=meta, repeat=Repeat(times=1))
    assert common.ended(job.id, "succeeded", "succeeded").record.execution_id == job.id
    assert len([span for span in common.spans() if span.attributes.get(semconv.MESSAGING_MESSAGE_ID) == job.id]) == 2


def test_what_a_callback_of_a_synchronous_queue_enqueues_is_the_jobs(fresh: Fresh) -> None:
    if jobs.VERSION < (3, 0):
        pytest.skip("there a synchronous queue may call its callbacks by itself")
    stage = fresh()
    queue = Queue(stage.name, connection=stage.connection, is_async=False)
    job = queue.enqueue(jobs.give, on_success=Callback(jobs.on_success_enqueues))
    first = stage.ended(job.id, "succeeded").record
    [other] = [record for record in stage.records() if record.execution_id != first.execution_id]
    assert (other.parent_execution_id, other.request_id) == (first.execution_id, first.request_id)


def test_a_synchronous_queue_never_runs_a_job_again(fresh: Fresh) -> None:
    stage = fresh()
    queue = Queue(stage.name, connection=stage.connection, is_async=False)
    job = queue.enqueue(jobs.fail, retry=Retry(max=2))
    assert stage.ended(job.id, "failed").record.state == "failed"
