"""How jobs end: one attempt each, with the outcome that the function had, recorded before RQ shows it."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
from otelexec_rq.settings import GUARD
from redis import WatchError
from rq import Callback, Queue, Repeat, Retry
from rq.command import send_stop_job_command
from rq.exceptions import InvalidJobOperation
from rq.job import Job, JobStatus
from rq.timeouts import JobTimeoutException

import otelexec
from otelexec import semconv
from otelexec.decoded import DecodedSpan
from tests.integrations.rq import jobs
from tests.integrations.rq.conftest import Fresh
from tests.integrations.rq.stage import Stage
from tests.integrations.stage import Seen
from tests.records import until

LOST_SECONDS = 30.0


def test_success_is_recorded_before_the_result_is_there(common: Stage) -> None:
    job = common.queue.enqueue(jobs.look)
    said = common.result(job)
    record = common.record(said["execution_id"])
    assert record is not None
    assert record.state == "succeeded"  # without waiting
    assert common.ended(job.id, "succeeded").attempt.finalized_by == "executor"


def test_an_exception_is_the_functions_own(common: Stage) -> None:
    job = common.queue.enqueue(jobs.fail, "told you")
    seen = common.ended(job.id, "failed")
    assert (seen.attempt.error_type, seen.attempt.error_message, seen.attempt.classification) == ("ValueError", "told you", None)
    [event] = [event for event in seen.consumer().events if event.name == "exception"]
    assert "in fail" in str(event.attributes[semconv.EXCEPTION_STACKTRACE])
    until(lambda: job.get_status() == "failed")


def test_an_exit_is_a_failed_attempt(common: Stage) -> None:
    job = common.queue.enqueue(jobs.leave, 3)
    assert common.ended(job.id, "failed").attempt.error_type == "SystemExit"


def test_so_is_one_with_code_0_which_rq_fails_and_runs_again(common: Stage) -> None:
    job = common.queue.enqueue(jobs.leave, 0, retry=Retry(max=1))
    until(lambda: job.get_status() == "failed", 25)
    seen = common.ended(job.id, "failed", "failed")
    assert [attempt.classification for attempt in seen.attempts] == ["retry", None]
    assert seen.record.state == "failed"


@pytest.mark.parametrize("kind", jobs.INTERRUPTIONS)
@pytest.mark.parametrize("retry", [None, Retry(max=1)])
def test_an_interruption_of_its_own_that_nobody_asked_for_is_a_failed_attempt(common: Stage, kind: str, retry: Retry | None) -> None:
    """RQ knows no cancellation by exception: the job has failed, and is run again if it has a retry left."""
    job = common.queue.enqueue(jobs.interrupt, kind, common.mark(), retry=retry)
    until(lambda: job.get_status() == ("finished" if retry else "failed"), 25)
    seen = common.ended(job.id, *(("failed", "succeeded") if retry else ("failed",)))
    first = seen.attempts[0]
    assert (first.classification, first.error_message) == ("retry" if retry else None, "own")
    assert seen.record.state == ("succeeded" if retry else "failed")


DECIDED = pytest.mark.parametrize(
    ("kind", "function", "state", "status"), [("Lenient", jobs.fail, "succeeded", "finished"), ("Strict", jobs.give, "failed", "failed")]
)


@DECIDED
def test_where_a_class_of_jobs_decides_how_they_end_its_word_counts(
    fresh: Fresh, kind: str, function: Callable[..., Any], state: str, status: str
) -> None:
    stage = fresh()
    stage.worker("own", job_class=f"{jobs.__name__}.{kind}")
    job = Queue(stage.name, connection=stage.connection, job_class=getattr(jobs, kind)).enqueue(function)
    until(lambda: job.get_status() == status, 25)
    seen = stage.ended(job.id, state)
    assert [attempt.state for attempt in seen.attempts] == [state]
    assert seen.attempt.error_message == ("teardown" if state == "failed" else None)
    stage.check_agreement()


@DECIDED
def test_so_it_does_in_a_synchronous_queue(fresh: Fresh, kind: str, function: Callable[..., Any], state: str, status: str) -> None:
    stage = fresh()
    job = Queue(stage.name, connection=stage.connection, job_class=getattr(jobs, kind), is_async=False).enqueue(function)
    assert job.get_status() == status
    assert [attempt.state for attempt in stage.ended(job.id, state).attempts] == [state]
    assert "perform" not in vars(job)


def test_an_error_that_rq_takes_otherwise_is_kept_as_far_as_the_setting_says(fresh: Fresh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTELEXEC_MAX_ERROR_CHARS", "64")
    stage = fresh()
    job = Queue(stage.name, connection=stage.connection, is_async=False).enqueue(jobs.leave, "x" * 100)
    assert len(stage.ended(job.id, "failed").attempt.error_message or "") == 64


def test_a_timeout_that_no_signal_raised_gets_out_of_our_code() -> None:
    """`TimerDeathPenalty` raises it between any two instructions of the job's thread."""

    def strikes() -> None:
        raise JobTimeoutException("Task exceeded maximum timeout value")

    with pytest.raises(JobTimeoutException):
        GUARD.call(strikes)


def test_a_function_that_does_not_exist_is_a_failed_attempt(common: Stage) -> None:
    job = common.queue.enqueue("tests.integrations.rq.jobs.nowhere")
    seen = common.ended(job.id, "failed")
    assert seen.record.name == "tests.integrations.rq.jobs.nowhere"


def test_data_that_cannot_be_read_is_a_failed_attempt_of_its_own_execution(common: Stage) -> None:
    job = common.queue.create_job(jobs.give, args=(1,))
    job._data = b"no pickle"
    common.queue.enqueue_job(job)
    seen = common.ended(job.id, "failed")
    assert seen.record.name == "tests.integrations.rq.jobs.give"


@pytest.mark.parametrize("interval", [0, 1])
def test_a_retry_is_the_next_attempt_linked_to_the_one_before(common: Stage, interval: int) -> None:
    job = common.queue.enqueue(jobs.fail_at_first, common.mark(), 2, retry=Retry(max=3, interval=interval))
    seen = common.ended(job.id, "failed", "failed", "succeeded")
    assert [attempt.classification for attempt in seen.attempts] == ["retry", "retry", None]
    assert seen.record.state == "succeeded"
    for number in (2, 3):
        assert {link.span_id for link in seen.consumer(number).links} == {seen.attempts[number - 2].span_id}
    assert len(seen.producers) == 1
    assert len({attempt.trace_id for attempt in seen.attempts}) == 1


@pytest.mark.parametrize("function", [jobs.fail, jobs.leave])
def test_the_last_failure_of_a_job_with_retries_earned_none(common: Stage, function: Callable[..., None]) -> None:
    job = common.queue.enqueue(function, 3, retry=Retry(max=1))
    seen = common.ended(job.id, "failed", "failed")
    assert [attempt.classification for attempt in seen.attempts] == ["retry", None]


def test_a_returned_retry_is_a_failed_attempt(common: Stage) -> None:
    job = common.queue.enqueue(jobs.ask_again, common.mark(), 2)
    seen = common.ended(job.id, "failed", "failed", "succeeded")
    assert [attempt.classification for attempt in seen.attempts] == ["retry", "retry", None]
    assert seen.attempts[0].error_type == "rq.job.Retry"


def test_retries_that_are_returned_without_end_are_used_up(common: Stage) -> None:
    job = common.queue.enqueue(jobs.ask_for_ever)
    seen = common.ended(job.id, "failed", "failed")
    assert seen.record.state == "failed"
    until(lambda: job.get_status() == "failed")


def test_a_job_that_forgets_its_meta_keeps_its_execution(common: Stage) -> None:
    job = common.queue.enqueue(jobs.forget_meta, common.mark(), retry=Retry(max=1))
    assert common.ended(job.id, "failed", "succeeded").record.state == "succeeded"


def test_a_timeout_is_timed_out(common: Stage) -> None:
    job = common.queue.enqueue(jobs.sleep, 30, job_timeout=1)
    seen = common.ended(job.id, "timed_out")
    assert seen.attempt.error_type == "rq.timeouts.JobTimeoutException"
    assert seen.attempt.classification == "timeout"
    assert seen.attempt.deadline_unix_ns == seen.attempt.started_unix_ns + 10**9


def test_a_timeout_with_a_retry_left_is_followed_by_the_next_attempt(common: Stage) -> None:
    job = common.queue.enqueue(jobs.sleep, 30, job_timeout=1, retry=Retry(max=1))
    seen = common.ended(job.id, "timed_out", "timed_out")
    assert [attempt.classification for attempt in seen.attempts] == ["retry", "timeout"]


@pytest.mark.parametrize("how", ["", "core fails", "then fails"])
def test_a_core_takes_the_job_over(common: Stage, how: str) -> None:
    job = common.queue.enqueue(jobs.core, how)
    seen = common.ended(job.id, "failed" if how == "core fails" else "succeeded")
    assert seen.record.name == "invoice.run"
    outer = {"": "succeeded", "core fails": "failed", "then fails": "failed"}[how]
    until(lambda: outcome_of(common, seen.record.execution_id) == outer)


def test_a_timeout_in_a_core_is_timed_out_as_well(common: Stage) -> None:
    job = common.queue.enqueue(jobs.core, "core is late", job_timeout=1)
    seen = common.ended(job.id, "timed_out")
    assert (seen.record.name, seen.attempt.classification) == ("invoice.run", "timeout")
    until(lambda: outcome_of(common, seen.record.execution_id) == "timed_out")


def outcome_of(stage: Stage, execution_id: str) -> str | None:
    record = stage.record(execution_id)
    return None if record is None else record.attempts[0].outer_outcome


def test_a_result_that_is_not_kept_is_recorded(common: Stage) -> None:
    job = common.queue.enqueue(jobs.give, result_ttl=0)
    common.ended(job.id, "succeeded")
    until(lambda: not Job.exists(job.id, connection=common.connection))


# Callbacks


def callback_span(stage: Stage, name: str, seen: Seen) -> DecodedSpan:
    """Wait for the span of a callback, below the job's own."""
    own = seen.consumer().span_id
    [span] = until(lambda: [span for span in stage.spans() if span.parent_span_id == own and span.name.startswith(f"{name} ")])
    return span


def test_a_success_callback_that_raises_leaves_the_job_succeeded(common: Stage) -> None:
    job = common.queue.enqueue(jobs.give, on_success=Callback(jobs.on_success_raises))
    seen = common.ended(job.id, "succeeded")
    span = callback_span(common, "on_success", seen)
    assert (span.status, span.attributes[semconv.ERROR_TYPE]) == ("error", "KeyError")
    until(lambda: job.get_status() == "failed")  # as RQ has it
    assert common.ended(job.id, "succeeded").record.state == "succeeded"


@pytest.mark.parametrize("raises", [False, True])
def test_a_failure_callback_is_a_span_under_the_job(common: Stage, raises: bool) -> None:
    callback = jobs.on_failure_raises if raises else jobs.on_failure
    job = common.queue.enqueue(jobs.fail, on_failure=Callback(callback))
    seen = common.ended(job.id, "failed")
    assert seen.attempt.error_type == "ValueError"
    span = callback_span(common, "on_failure", seen)
    assert span.status == ("error" if raises else "unset")
    assert raises or f"failure {job.id}" in common.callbacks


@pytest.mark.parametrize("raises", [False, True])
def test_a_stopped_callback_is_a_span_under_the_job(common: Stage, raises: bool) -> None:
    callback = jobs.on_stopped_raises if raises else jobs.on_stopped
    mark = common.mark()
    job = common.queue.enqueue(jobs.sleep, 60, mark, on_stopped=Callback(callback))
    common.wait_for_run(mark)
    send_stop_job_command(common.connection, job.id)
    seen = common.ended(job.id, "cancelled")
    span = callback_span(common, "on_stopped", seen)
    assert span.status == ("error" if raises else "unset")


# Stopped, cancelled, killed


def test_stop_job_is_a_final_cancellation(common: Stage) -> None:
    mark = common.mark()
    job = common.queue.enqueue(jobs.sleep, 60, mark, retry=Retry(max=1))
    common.wait_for_run(mark)
    send_stop_job_command(common.connection, job.id)
    seen = common.ended(job.id, "cancelled", seconds=LOST_SECONDS)
    assert (seen.record.state, seen.attempt.classification, seen.attempt.finalized_by) == ("cancelled", None, "parent")
    until(lambda: job.get_status() == "stopped")


def test_a_stopped_job_that_is_requeued_runs_again(common: Stage) -> None:
    mark = common.mark()
    job = common.queue.enqueue(jobs.sleep_at_first, 60, mark)
    common.wait_for_run(mark)
    send_stop_job_command(common.connection, job.id)
    common.ended(job.id, "cancelled", seconds=LOST_SECONDS)
    until(lambda: job.get_status() == "stopped")
    job.requeue()
    assert common.ended(job.id, "cancelled", "succeeded").record.state == "succeeded"


def test_of_many_cancelled_jobs_none_takes_the_worker_along(fresh: Fresh) -> None:
    """A horse that only refuses its job leads no process group of its own yet, or has left it: nothing of the worker's is hit."""
    stage = fresh()
    sent = [stage.queue.enqueue(jobs.give) for _ in range(40)]
    for job in sent:
        otelexec.request_cancel(str(execution_of(stage, job)))
    worker = stage.worker("cancelling")
    for job in sent:
        stage.ended(job.id, "cancelled", seconds=LOST_SECONDS)
        until(lambda job=job: job.get_status() == "canceled")  # type: ignore[misc]
    assert worker.process.poll() is None
    stage.check_agreement()


def execution_of(stage: Stage, job: Job) -> str:
    seen = stage.look(job.id)
    assert seen is not None
    return seen.record.execution_id


def test_a_job_cancelled_before_it_started_is_closed_at_once(common: Stage) -> None:
    job = common.queue.enqueue_at(common_later(), jobs.give)
    job.cancel()
    seen = common.ended(job.id, "cancelled")
    assert seen.record.state == "cancelled"
    assert seen.consumer().attributes[semconv.MESSAGING_MESSAGE_ID] == job.id


def test_a_job_that_is_not_there_is_cancelled_as_without_us(common: Stage, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(InvalidJobOperation):
        Job.create(jobs.give, connection=common.connection, origin=common.name).cancel()
    assert not [record for record in caplog.records if record.name.startswith("otelexec")]


def test_a_cancellation_in_a_pipeline_of_the_callers_counts_when_that_is_executed(fresh: Fresh) -> None:
    stage = fresh()
    job = stage.queue.enqueue(jobs.give)

    def said() -> list[str]:
        return [record.state for record in stage.records()] + [attempt.state for record in stage.records() for attempt in record.attempts]

    pipeline: Any
    with stage.connection.pipeline() as pipeline:
        job.cancel(pipeline=pipeline)
        pipeline.reset()
        assert said() == ["queued"]
        pipeline.set("another", "thing")
        pipeline.execute()
        assert said() == ["queued"]
        pipeline.watch("another")
        pipeline.multi()
        job.cancel(pipeline=pipeline)
        stage.connection.set("another", "hand")
        with pytest.raises(WatchError):
            pipeline.execute()
        assert said() == ["queued"]
        job.cancel(pipeline=pipeline)
        assert said() == ["queued"]
        pipeline.execute()
        assert said() == ["cancelled", "cancelled"]
    assert job.get_status() == "canceled"


def test_a_job_is_closed_whatever_it_waited_for_when_it_was_cancelled(common: Stage) -> None:
    begun = {JobStatus.STARTED, JobStatus.FINISHED, JobStatus.FAILED, JobStatus.STOPPED, JobStatus.CANCELED}
    for status in set(JobStatus) - begun:
        job = common.queue.enqueue_at(common_later(), jobs.give)
        job.set_status(status)
        job.cancel()
        assert common.ended(job.id, "cancelled").record.state == "cancelled", status


def test_of_a_repeat_the_next_run_is_what_is_cancelled(common: Stage) -> None:
    """Also by whoever enqueued the job and has it as it was then."""
    if jobs.VERSION < (3, 0):
        pytest.skip("there RQ has such a job as finished")
    job = common.queue.enqueue(jobs.give, repeat=Repeat(times=1, interval=3600))
    until(lambda: job.get_status() == "scheduled")
    job.cancel()
    spans = [span for span in common.spans() if span.attributes.get(semconv.MESSAGING_MESSAGE_ID) == job.id]
    records = [common.record(name) for name in dict.fromkeys(str(span.attributes[semconv.EXECUTION_ID]) for span in spans)]
    assert [(record.state, len(record.attempts)) for record in records if record] == [("succeeded", 1), ("cancelled", 1)]


def common_later() -> Any:
    from datetime import UTC, datetime, timedelta

    return datetime.now(UTC) + timedelta(hours=1)


def test_a_job_cancelled_while_it_runs_is_told_and_its_end_is_its_own(common: Stage) -> None:
    mark = common.mark()
    job = common.queue.enqueue(jobs.heed, mark)
    common.wait_for_run(mark)
    job.cancel()
    seen = common.ended(job.id, "failed")
    assert (seen.attempt.error_message, seen.record.state) == ("told", "failed")


@pytest.mark.parametrize("requeued", [False, True])
def test_a_job_cancelled_while_it_runs_runs_again_as_without_us(common: Stage, requeued: bool) -> None:
    mark = common.mark()
    job = common.queue.enqueue(jobs.heed_at_first, mark, retry=None if requeued else Retry(max=1))
    common.wait_for_run(mark)
    job.cancel()
    if requeued:
        common.ended(job.id, "failed")
        until(lambda: job.get_status() == "failed")
        job.requeue()
    seen = common.ended(job.id, "failed", "succeeded")
    assert (seen.attempts[0].error_message, seen.record.state) == ("told", "succeeded")
    until(lambda: job.get_status() == "finished")


def test_a_killed_horse_leaves_one_lost_attempt(common: Stage) -> None:
    mark = common.mark()
    job = common.queue.enqueue(jobs.die, mark)
    seen = common.ended(job.id, "lost", seconds=LOST_SECONDS)
    attempt = seen.attempt
    assert (attempt.classification, attempt.finalized_by, common.runs(mark)) == ("killed", "parent", 1)
    assert "SIGKILL" in (attempt.error_message or "")
    assert "before the kill" in (attempt.progress or "")
    assert attempt.pid == common.wait_for_run(mark)
    until(lambda: job.get_status() == "failed")


def test_a_killed_horse_with_retries_is_followed_by_the_next_attempts(common: Stage) -> None:
    """Scenario 13: the parent enqueues again from its own copy, whatever the job wrote into its meta meanwhile."""
    job = common.queue.enqueue(jobs.die_with_meta, common.mark(), 2, retry=Retry(max=2))
    seen = common.ended(job.id, "lost", "lost", "succeeded", seconds=LOST_SECONDS)
    assert seen.record.state == "succeeded"
    assert len({attempt.trace_id for attempt in seen.attempts}) == 1
    for number in (2, 3):
        assert {link.span_id for link in seen.consumer(number).links} == {seen.attempts[number - 2].span_id}


def test_a_requeued_job_links_to_its_last_attempt(common: Stage) -> None:
    job = common.queue.enqueue(jobs.fail_at_first, common.mark(), 2, retry=Retry(max=1))
    common.ended(job.id, "failed", "failed")
    until(lambda: job.get_status() == "failed")
    Job.fetch(job.id, connection=common.connection).requeue()
    seen = common.ended(job.id, "failed", "failed", "succeeded")
    assert seen.attempts[1].span_id in {link.span_id for link in seen.consumer(3).links}


def test_a_timeout_that_hits_our_own_code_is_one_outcome_that_span_and_record_share(fresh: Fresh) -> None:
    """Scenario 15: the alarm falls at any moment around the end of the function."""
    stage = fresh()
    worker = stage.worker("alarmed", "SimpleWorker")
    sent = [stage.queue.enqueue(jobs.sleep, 0.992 + 0.002 * number, job_timeout=1) for number in range(6)]
    outcomes = [stage.ended(job.id).attempt.state for job in sent]  # compares record and span
    assert set(outcomes) <= {"succeeded", "timed_out"}
    assert worker.stop() == 0
    worker.check_log()
    stage.check_agreement()


def test_a_stopped_job_of_a_worker_without_horses_is_told(fresh: Fresh) -> None:
    stage = fresh()
    if jobs.VERSION < (2, 7):
        pytest.skip("there a SimpleWorker kills itself when it is told to stop a job")
    worker = stage.worker("simple", "SimpleWorker")
    mark = stage.mark()
    job = stage.queue.enqueue(jobs.heed, mark)
    stage.wait_for_run(mark)
    send_stop_job_command(stage.connection, job.id)
    seen = stage.ended(job.id, "cancelled")
    assert seen.record.state == "cancelled"
    assert worker.stop() == 0


def test_a_cold_shutdown_interrupts(fresh: Fresh) -> None:
    stage = fresh()
    worker = stage.worker("cold")
    mark = stage.mark()
    job = stage.queue.enqueue(jobs.sleep, 60, mark)
    stage.wait_for_run(mark)
    worker.process.send_signal(signal.SIGINT)
    until(lambda: "warm" in worker.text().lower(), 10)
    time.sleep(1.1)  # RQ takes a second signal within a second for the first one, sent to the group
    worker.process.send_signal(signal.SIGINT)
    worker.process.wait(20)
    seen = stage.ended(job.id, "cancelled")
    assert (seen.attempt.classification, seen.record.state) == ("interrupted", "cancelled")


def test_a_second_signal_that_rq_ignores_is_no_cold_shutdown(fresh: Fresh) -> None:
    stage = fresh()
    worker = stage.worker("twice", "Killing", monitor=1)
    mark = stage.mark()
    job = stage.queue.enqueue(jobs.sleep, 60, mark)
    stage.wait_for_run(mark)
    worker.process.send_signal(signal.SIGINT)
    until(lambda: "warm" in worker.text().lower(), 10)
    worker.process.send_signal(signal.SIGINT)
    seen = stage.ended(job.id, "lost", seconds=LOST_SECONDS)
    assert seen.attempt.classification == "killed"
    assert worker.process.wait(20) == 0
