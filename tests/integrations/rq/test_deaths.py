"""Workers that die whole, jobs that nobody holds any more, and wishes that reach a job over the store alone."""

from __future__ import annotations

import os
import signal
import time

import pytest
from rq import Retry, Worker
from rq.intermediate_queue import IntermediateQueue
from rq.job import Job
from rq.registry import StartedJobRegistry

import otelexec
from otelexec import semconv
from otelexec.decoded import DecodedSpan
from tests.integrations.rq import jobs
from tests.integrations.rq.conftest import Fresh
from tests.integrations.rq.stage import Stage
from tests.integrations.stage import each_open
from tests.memory import memory_limit
from tests.records import Records, until

LOST_SECONDS = 30.0
KEY = {"OTELEXEC_SIGNING_KEY": "a key of this test's"}


def abandon(stage: Stage) -> None:
    """Do what any worker does every few minutes, as if the heartbeats of all that run had ended."""
    StartedJobRegistry(stage.name, connection=stage.connection).cleanup(timestamp=time.time() + 10**6)


def reconciled(stage: Stage) -> bool:
    """Reconcile until nothing is open: what was killed just now need not be dead yet."""
    stage.reconcile()
    return not list(each_open(stage))


def test_a_worker_killed_with_its_horse_leaves_no_attempt_open(fresh: Fresh) -> None:
    """Scenario 15: the attempt is closed by whoever reconciles, the job by the registry's cleanup; one outcome."""
    stage = fresh()
    worker = stage.worker("doomed")
    mark = stage.mark()
    job = stage.queue.enqueue(jobs.sleep, 60, mark)
    horse = stage.wait_for_run(mark)
    worker.kill()
    abandon(stage)
    until(lambda: reconciled(stage))
    seen = stage.ended(job.id, "lost")
    assert (seen.record.state, seen.attempt.pid) == ("lost", horse)
    until(lambda: job.get_status() == "failed")
    stage.check_agreement()


def test_a_job_that_was_abandoned_before_its_attempt_was_opened_is_lost(fresh: Fresh) -> None:
    stage = fresh()
    worker = stage.worker("doomed", environment={"OTELEXEC_TEST_INSTRUMENT": None})
    mark = stage.mark()
    job = stage.queue.enqueue(jobs.sleep, 60, mark)
    stage.wait_for_run(mark)
    worker.kill()
    abandon(stage)
    seen = stage.ended(job.id, "lost")
    assert (seen.attempt.classification, seen.attempt.error_type) == ("abandoned", "rq.exceptions.AbandonedJobError")
    stage.check_agreement()


@pytest.mark.parametrize("retries", [0, 1])
def test_a_job_that_a_worker_took_and_did_not_live_to_begin_is_lost(fresh: Fresh, retries: int) -> None:
    """RQ finds it in the queue's intermediate one after a minute."""
    stage = fresh()
    queue, connection = stage.queue, stage.connection
    job = queue.enqueue(jobs.give, retry=Retry(max=retries) if retries else None)
    connection.lmove(queue.key, queue.intermediate_queue_key)
    intermediate = IntermediateQueue(queue.key, connection)
    intermediate.set_first_seen(job.id)
    connection.set(intermediate.get_first_seen_key(job.id), time.time() - 120)
    intermediate.cleanup(Worker([queue], connection=connection), queue)
    seen = stage.ended(job.id, "lost")
    assert seen.attempt.classification == "abandoned"
    assert job.get_status() == ("queued" if retries else "failed")
    if retries:
        stage.worker("next")
        assert stage.ended(job.id, "lost", "succeeded").states == ["lost", "succeeded"]
    stage.check_agreement()


def test_an_abandoned_job_that_replaced_its_meta_is_one_execution(fresh: Fresh) -> None:
    stage = fresh()
    worker = stage.worker("doomed")
    mark = stage.mark()
    job = stage.queue.enqueue(jobs.replace_meta, mark)
    stage.wait_for_run(mark)
    assert Job.fetch(job.id, connection=stage.connection).meta["mine"] == 1
    worker.kill()
    until(lambda: reconciled(stage))
    abandon(stage)
    assert stage.ended(job.id, "lost").record.state == "lost"
    assert len(stage.records()) == 1
    stage.check_agreement()


def test_an_abandoned_job_that_still_runs_is_left_to_its_own_process(fresh: Fresh) -> None:
    stage = fresh()
    stage.worker("alive")
    mark = stage.mark()
    job = stage.queue.enqueue(jobs.sleep, 2, mark)
    stage.wait_for_run(mark)
    abandon(stage)
    assert stage.ended(job.id, "succeeded").record.state == "succeeded"


def test_a_horse_killed_before_it_opens_its_attempt_is_lost_all_the_same(fresh: Fresh) -> None:
    stage = fresh()
    stage.worker("early", early=True)
    job = stage.queue.enqueue(jobs.give)
    seen = stage.ended(job.id, "lost", seconds=LOST_SECONDS)
    assert "SIGKILL" in (seen.attempt.error_message or "")
    stage.check_agreement()


@pytest.mark.parametrize("cls", ["Worker", "SpawnWorker"])
def test_a_horse_that_leaves_with_code_0_in_the_middle_of_its_job_is_lost(fresh: Fresh, cls: str) -> None:
    """Its worker says so: nobody else reconciles here."""
    stage = fresh()
    worker = stage.worker("left", cls)
    jobs_left = [stage.queue.enqueue(each) for each in (jobs.give, jobs.vanish, jobs.give)]
    first, left, last = (stage.ended(job.id, seconds=LOST_SECONDS) for job in jobs_left)
    assert [seen.states for seen in (first, left, last)] == [["succeeded"], ["lost"], ["succeeded"]]
    assert "exited with code 0" in (left.attempt.error_message or "")
    assert worker.stop() == 0
    worker.check_log()
    stage.check_agreement()


@pytest.mark.memory
def test_a_horse_that_the_kernel_kills_for_its_memory_is_lost_and_says_so(fresh: Fresh) -> None:
    stage = fresh()
    stage.worker("hungry")
    with memory_limit() as procs:
        job = stage.queue.enqueue(jobs.hog, stage.mark(), str(procs), retry=Retry(max=1))
        seen = stage.ended(job.id, "lost", "succeeded", seconds=LOST_SECONDS)
    assert "SIGKILL" in (seen.attempts[0].error_message or "")
    stage.check_agreement()


def test_a_parent_killed_alone_leaves_the_horse_to_finish(fresh: Fresh) -> None:
    stage = fresh()
    worker = stage.worker("headless")
    mark = stage.mark()
    job = stage.queue.enqueue(jobs.sleep, 1, mark)
    horse = stage.wait_for_run(mark)
    os.kill(worker.pid, signal.SIGKILL)
    worker.process.wait()
    seen = stage.ended(job.id, "succeeded")
    assert seen.attempt.pid == horse


def execution_of(stage: Stage, job: Job) -> str:
    """Give the id of a job's execution, as it was enqueued."""
    return next(str(span.attributes[semconv.EXECUTION_ID]) for span in producers(stage, job))


def producers(stage: Stage, job: Job) -> list[DecodedSpan]:
    def found() -> list[DecodedSpan]:
        return [span for span in stage.spans() if span.kind == "producer" and span.attributes[semconv.MESSAGING_MESSAGE_ID] == job.id]

    return until(found)


@pytest.mark.parametrize("retry", [None, Retry(max=1)])
def test_a_cancelled_job_in_the_queue_is_not_run(common: Stage, retry: Retry | None) -> None:
    mark = common.mark()
    blocked = common.queue.enqueue(jobs.sleep, 1)
    job = common.queue.enqueue(jobs.die, mark, depends_on=blocked, retry=retry)
    otelexec.request_cancel(execution_of(common, job))
    seen = common.ended(job.id, "cancelled")
    assert (seen.record.state, common.runs(mark)) == ("cancelled", 0)
    until(lambda: job.get_status() == "canceled")


@pytest.mark.parametrize("terminate", [None, True])
def test_a_running_job_is_stopped_over_the_store_alone(common: Stage, terminate: bool | None) -> None:
    mark = common.mark()
    job = common.queue.enqueue(jobs.sleep, 60, mark)
    horse = common.wait_for_run(mark)
    asked = time.monotonic()
    otelexec.request_cancel(execution_of(common, job), terminate=terminate)
    seen = common.ended(job.id, "cancelled", seconds=20)
    assert time.monotonic() - asked < 20
    assert (seen.record.state, seen.attempt.classification, seen.attempt.pid) == ("cancelled", None, horse)
    until(lambda: job.get_status() == "stopped")


def test_a_running_job_that_is_only_to_be_told_is_not_stopped(common: Stage) -> None:
    mark = common.mark()
    job = common.queue.enqueue(jobs.heed, mark)
    common.wait_for_run(mark)
    otelexec.request_cancel(execution_of(common, job), terminate=False)
    assert common.ended(job.id, "failed").attempt.error_message == "told"


def test_a_spawned_horse_is_stopped_as_well(fresh: Fresh) -> None:
    stage = fresh()
    stage.worker("spawn", "SpawnWorker")
    mark = stage.mark()
    job = stage.queue.enqueue(jobs.sleep, 60, mark)
    stage.wait_for_run(mark)
    otelexec.request_cancel(execution_of(stage, job))
    assert stage.ended(job.id, "cancelled", seconds=20).record.state == "cancelled"


def test_signed_jobs_are_believed_and_others_are_not(fresh: Fresh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(*next(iter(KEY.items())))
    stage = fresh()
    worker = stage.worker("signed", environment=KEY)
    with otelexec.correlate(source="test") as correlation:
        job = stage.queue.enqueue(jobs.look)
    assert stage.result(job)["execution_id"] == correlation.execution_id
    forged = stage.queue.create_job(jobs.look)
    forged.meta = {"otelexec": {"baggage": "otelexec.execution_id=forged", "traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}}
    forged.save()
    stage.queue.push_job_id(forged.id)
    seen = stage.ended(forged.id, "succeeded")
    assert "forged" not in {seen.record.execution_id, seen.record.request_id}
    assert seen.attempt.trace_id != "a" * 32
    assert worker.stop() == 0
    assert "untrusted" in worker.text()


def test_without_a_store_jobs_run_and_are_traced(fresh: Fresh, records: Records) -> None:
    stage = fresh()
    worker = stage.worker("storeless", environment={"OTELEXEC_STORE": "none"})
    job = stage.queue.enqueue(jobs.look)
    assert stage.result(job)["attempt"] == 1
    assert worker.stop() == 0
    worker.check_log()
