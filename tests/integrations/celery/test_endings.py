"""Every way in which a task can end on a prefork pool over Valkey: its record, its spans, and what Celery says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from typing import Any

import celery
import pytest
from celery.exceptions import TaskRevokedError, TimeLimitExceeded, WorkerLostError

import otelexec
from otelexec import semconv
from otelexec.store.records import ExecutionRecord
from tests.integrations.celery.conftest import Fresh
from tests.integrations.celery.stage import Stage, keys
from tests.integrations.celery.tasks import INTERRUPTIONS
from tests.integrations.stage import Seen
from tests.records import until

RESULT_SECONDS = 20.0
LOST_SECONDS = 40.0


def send(stage: Stage, name: str, *arguments: Any, **options: Any) -> Any:
    return stage.task(name).apply_async(arguments, options.pop("kwargs", None), **options)


# What the body did


def test_success(common: Stage) -> None:
    result = send(common, "add", 1, 2)
    assert result.get(timeout=RESULT_SECONDS) == 3
    seen = common.ended(result.id, "succeeded")
    assert (seen.record.name, seen.record.state) == ("add", "succeeded")
    (producer,), consumer = seen.producers, seen.consumer()
    assert (seen.record.producer_trace_id, seen.record.producer_span_id) == (producer.trace_id, producer.span_id)
    assert (consumer.trace_id, consumer.parent_span_id) == (producer.trace_id, producer.span_id)
    assert (producer.resource["service.name"], consumer.resource["service.name"]) == ("publisher", "worker")
    for span, operation in ((producer, "send"), (consumer, "process")):
        assert span.attributes[semconv.MESSAGING_MESSAGE_ID] == result.id
        assert span.attributes[semconv.MESSAGING_DESTINATION_NAME] == "common"
        assert span.attributes[semconv.MESSAGING_OPERATION_TYPE] == operation
        assert span.attributes[semconv.MESSAGING_SYSTEM]
    assert seen.attempt.pid != common.workers[0].pid


def test_the_record_is_there_before_the_result_is(common: Stage) -> None:
    results = [send(common, "who") for _ in range(20)]
    for result in results:
        told = result.get(timeout=RESULT_SECONDS, interval=0.001)
        record = common.record(told["execution_id"])
        assert record is not None
        assert record.state == "succeeded"


def test_the_body_is_in_the_execution_and_its_span(common: Stage) -> None:
    result = send(common, "who")
    told = result.get(timeout=RESULT_SECONDS)
    seen = common.ended(result.id, "succeeded")
    assert told["execution_id"] == seen.record.execution_id
    assert told["attempt"] == 1
    assert (told["trace_id"], told["span_id"]) == (seen.attempt.trace_id, seen.attempt.span_id)
    assert (told["request_id"], told["source"]) == (seen.record.request_id, seen.record.source)


def test_an_exception(common: Stage) -> None:
    result = send(common, "fail", "out of paper")
    with pytest.raises(ValueError, match="out of paper"):
        result.get(timeout=RESULT_SECONDS)
    seen = common.ended(result.id, "failed")
    assert (seen.record.state, seen.attempt.error_type, seen.attempt.error_message) == ("failed", "ValueError", "out of paper")
    assert seen.attempt.classification is None
    (event,) = seen.consumer().events
    assert event.name == "exception"
    assert event.attributes["exception.message"] == "out of paper"


@pytest.mark.parametrize("name", INTERRUPTIONS)
def test_what_speaks_of_a_cancellation_that_nobody_asked_for_has_failed(common: Stage, name: str) -> None:
    seen = common.ended(send(common, "interrupts", name).id, "failed")
    assert (seen.record.state, seen.attempt.classification) == ("failed", None)
    assert (seen.attempt.error_type or "").endswith(name)


def test_retries_are_attempts_that_link_to_the_one_before(common: Stage) -> None:
    result = send(common, "flaky", 3)
    told = result.get(timeout=RESULT_SECONDS)
    seen = common.ended(result.id, "failed", "failed", "failed", "succeeded")
    assert seen.record.state == "succeeded"
    assert [attempt.classification for attempt in seen.attempts] == ["retry"] * 3 + [None]
    assert {each["execution_id"] for each in told} == {seen.record.execution_id}
    assert [each["attempt"] for each in told] == [1, 2, 3, 4]
    for before, after in zip(seen.attempts, range(2, 5), strict=False):
        assert (before.trace_id, before.span_id) in {(link.trace_id, link.span_id) for link in seen.consumer(after).links}
    assert len(seen.producers) == 4
    assert {attempt.trace_id for attempt in seen.attempts} == {seen.producers[0].trace_id}


def test_between_two_attempts_it_is_retrying(common: Stage) -> None:
    result = send(common, "flaky.later")
    until(lambda: (seen := common.look(result.id)) is not None and seen.record.state == "retrying", 15)
    seen = common.ended(result.id, "failed", "succeeded")
    assert seen.record.state == "succeeded"


def test_retries_that_run_out(common: Stage) -> None:
    result = send(common, "flaky.auto", kwargs={"always": True})
    with pytest.raises(ConnectionError):
        result.get(timeout=RESULT_SECONDS)
    seen = common.ended(result.id, "failed", "failed")
    assert [attempt.classification for attempt in seen.attempts] == ["retry", None]
    assert (seen.record.state, seen.attempts[1].error_type) == ("failed", "ConnectionError")


def test_ignore(common: Stage) -> None:
    seen = common.ended(send(common, "ignore").id, "succeeded")
    assert seen.attempt.classification == "ignored"


def test_reject(common: Stage) -> None:
    seen = common.ended(send(common, "reject", common.mark()).id, "rejected")
    assert seen.record.state == "rejected"


def test_reject_with_requeue(common: Stage) -> None:
    result = send(common, "reject", common.mark(), kwargs={"requeue": True})
    seen = common.ended(result.id, "rejected", "succeeded")
    assert seen.record.state == "succeeded"
    assert result.get(timeout=RESULT_SECONDS) == "taken the second time"


def test_a_message_that_is_acknowledged_already_goes_back_to_no_queue(common: Stage) -> None:
    mark = common.mark()
    seen = common.ended(send(common, "reject.early", mark).id, "rejected")
    assert (seen.record.state, seen.attempt.classification) == ("rejected", "requeued")
    assert common.runs(mark) == 1


@pytest.mark.parametrize("routed", [True, False])
def test_a_retry_that_can_not_be_sent_is_no_retry(common: Stage, routed: bool) -> None:
    """Celery rejects the task then; nobody will ever attempt it again."""
    before = len(common.records())
    result = send(common, "flaky.unsendable", kwargs={"routed": routed})
    seen = common.ended(result.id, "rejected")
    assert (seen.record.state, seen.record.ended_unix_ns is not None) == ("rejected", True)
    assert sorted(span.status for span in seen.producers) == ["error", "unset"]
    assert len(common.records()) == before + 1


def test_a_result_that_can_not_be_stored(common: Stage) -> None:
    result = send(common, "unstorable")
    until(result.ready, RESULT_SECONDS)
    assert result.state == "FAILURE"
    # Noted once the backend has failed, so a moment after the result is there.
    until(lambda: common.ended(result.id, "succeeded").attempt.classification == "result_not_stored", RESULT_SECONDS)


UNSENDABLE = {"task": "add", "args": [1], "kwargs": {}, "options": {"serializer": "none such"}}
FOLLOWED: Mapping[str, Mapping[str, Any]] = {
    "a callback": {"link": [UNSENDABLE]},
    "callbacks": {"link": [UNSENDABLE, UNSENDABLE]},
    "no signature": {"link": [{"no": "task"}]},
    "a chain": {"chain": [UNSENDABLE]},
}


@pytest.mark.parametrize("what", FOLLOWED)
def test_what_follows_can_not_be_sent(common: Stage, what: str) -> None:
    result = send(common, "add", 1, 2, **FOLLOWED[what])
    until(result.ready, RESULT_SECONDS)
    assert result.state == "FAILURE"
    seen = common.ended(result.id, "succeeded")
    until(lambda: (record := common.record(seen.record.execution_id)) and record.attempts[0].classification == "callbacks_not_sent")


def test_what_a_handler_raises_takes_no_stored_result_away(fresh: Fresh) -> None:
    if celery.__version__ < "5.7":
        pytest.skip("Celery before 5.7 replaces the result by what a handler raises")
    stage = fresh()
    worker = stage.worker("handlers", "prefork", 1)
    result = send(stage, "done.then.rejects")
    assert send(stage, "add", 1, 2).get(timeout=RESULT_SECONDS) == 3  # so the child is done with the first
    assert result.state == "SUCCESS"
    assert stage.ended(result.id, "succeeded").attempt.classification is None
    assert worker.stop() == 0


NAMES = {"add": "add", "who.request": "who_with_request"}


@pytest.mark.parametrize("task", NAMES)
def test_arguments_that_are_none_are_said_to_be_the_tasks(common: Stage, task: str) -> None:
    result = common.send_raw(task, [5, {}, {}])
    whose = rf"tests\.integrations\.celery\.tasks\.{NAMES[task]}\(\) argument|Value"  # Python 3.15 names nobody
    with pytest.raises(TypeError, match=rf"^({whose}) after \* must be an iterable"):
        result.get(timeout=RESULT_SECONDS)


@pytest.mark.parametrize("handled", [True, False])
def test_a_retry_names_the_exception_although_celery_holds_a_stand_in(common: Stage, handled: bool) -> None:
    seen = common.ended(send(common, "flaky.unpicklable", kwargs={"handled": handled}).id, "failed", "failed")
    assert [attempt.classification for attempt in seen.attempts] == ["retry", None]
    assert {attempt.error_type for attempt in seen.attempts} == {"tests.integrations.celery.tasks.Unpicklable"}
    assert "try again" in (seen.attempts[0].error_message or "")


# Limits


def test_the_soft_limit(common: Stage) -> None:
    seen = common.ended(send(common, "sleep", 20, soft_time_limit=1).id, "timed_out")
    assert (seen.record.state, seen.attempt.error_type) == ("timed_out", "billiard.exceptions.SoftTimeLimitExceeded")


def test_the_limits_of_the_workers_command_line(fresh: Fresh) -> None:
    """Only the main process knows them: no message and no setting says anything."""
    stage = fresh()
    worker = stage.worker("limits", arguments=("--soft-time-limit=1", "--time-limit=2"))
    hard, late, soft = send(stage, "stuck", stage.mark()), send(stage, "stuck.late", stage.mark()), send(stage, "sleep", 60)
    for result in (hard, late):
        seen = stage.ended(result.id, "timed_out", seconds=LOST_SECONDS)
        assert (seen.record.state, seen.attempt.classification) == ("timed_out", "hard_limit")
        assert seen.attempt.deadline_unix_ns == seen.attempt.started_unix_ns + 2_000_000_000
    assert stage.ended(soft.id, "timed_out").attempt.classification == "soft_limit"
    assert worker.stop() == 0


# Who never got to run


def test_revoked_before_the_start(common: Stage) -> None:
    mark = common.mark()
    result = send(common, "sleep", 0, mark, countdown=1)
    result.revoke()
    seen = common.ended(result.id, "cancelled")
    assert seen.record.state == "cancelled"
    assert seen.consumer().attributes[semconv.MESSAGING_MESSAGE_ID] == result.id
    assert common.runs(mark) == 0
    with pytest.raises(TaskRevokedError):
        result.get(timeout=RESULT_SECONDS)


def test_revoked_by_a_stamp(common: Stage) -> None:
    mark = common.mark()
    signature = common.task("sleep").si(0, mark)
    signature.stamp(tenant="gone")
    result = signature.apply_async(countdown=1.5)
    common.app.control.revoke_by_stamped_headers({"tenant": ["gone"]})
    seen = common.ended(result.id, "cancelled")
    assert seen.record.state == "cancelled"
    assert common.runs(mark) == 0


def test_expired(common: Stage) -> None:
    mark = common.mark()
    seen = common.ended(send(common, "sleep", 0, mark, expires=0.01, countdown=0.5).id, "cancelled")
    assert (seen.record.state, seen.attempt.classification) == ("cancelled", "expired")
    assert common.runs(mark) == 0


def test_an_unknown_task(common: Stage) -> None:
    result = common.app.send_task("nobody.knows.me", (1,))
    seen = common.ended(result.id, "rejected")
    assert (seen.record.name, seen.record.state) == ("nobody.knows.me", "rejected")
    assert seen.consumer().attributes[semconv.MESSAGING_MESSAGE_ID] == result.id


def test_an_eta_that_is_no_time(common: Stage) -> None:
    """Such as the last day there is, on a worker to the east of the sender."""
    if celery.__version__ < "5.7":
        pytest.skip("Celery before 5.7 rejects the message and runs its task all the same")
    result = common.app.send_task("add", (1, 2), eta=datetime.min.replace(tzinfo=timezone(timedelta(hours=14))))
    seen = common.ended(result.id, "rejected")
    assert (seen.record.state, seen.attempt.classification) == ("rejected", "malformed")
    assert "ETA" in (seen.attempt.error_message or "")


def appeared(stage: Stage, before: set[str]) -> ExecutionRecord | None:
    new = [record for record in stage.records() if record.execution_id not in before]
    return new[0] if len(new) == 1 and new[0].ended_unix_ns is not None else None


MALFORMED = [
    "no task header",
    "keyword arguments that are none",
    "keyword arguments that are a list",
    "keyword arguments that are null",
    "a body that can not be decoded",
]


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_message(common: Stage, kind: str) -> None:
    before = {record.execution_id for record in common.records()}
    with common.app.connection_for_write() as connection, connection.Producer() as producer:
        headers: Mapping[str, Any] = {"task": "add", "id": f"malformed-{kind.replace(' ', '-')}", "lang": "py"}
        body: Any = [[1, 2], {}, {}]
        options: dict[str, Any] = {"serializer": "json"}
        if kind == "no task header":
            headers = {}
        elif kind == "keyword arguments that are none":  # in the protocol of old, whose messages are checked for it
            headers, body = {}, {"task": "add", "id": "malformed-1", "args": [], "kwargs": "none"}
        elif kind.startswith("keyword"):  # only the tracer finds it
            body = [[1, 2], None if kind.endswith("null") else [3], {}]
        else:
            body, options = b"{broken", {"content_type": "application/json", "content_encoding": "utf-8"}
        producer.publish(body, routing_key="common", headers=headers, **options)
    record = until(lambda: appeared(common, before), 15)
    assert record is not None
    assert record.state == "rejected"
    assert [(attempt.state, attempt.classification) for attempt in record.attempts] == [("rejected", "malformed")]
    assert [span.span_id for span in common.spans() if span.attributes.get(semconv.EXECUTION_ID) == record.execution_id] == [
        record.attempts[0].span_id
    ]


@pytest.mark.parametrize("task", ["unknown.to.children", "unknown.to.children.late"])
def test_a_child_that_fails_before_the_task_and_lives_has_failed(common: Stage, task: str) -> None:
    with otelexec.correlate(source="test") as correlation:
        result = send(common, task)
    with pytest.raises(KeyError):
        result.get(timeout=RESULT_SECONDS)
    record = common.record(correlation.execution_id)
    assert record is not None
    assert (record.state, [attempt.error_type for attempt in record.attempts]) == ("failed", ["KeyError"])
    common.ended(result.id, "failed")


def test_what_the_main_process_tells_its_children_is_not_taken_from_a_message(common: Stage) -> None:
    """Else a header could have a task run without a record."""
    task_id = "00000000-0000-4000-8000-00000000002b"
    with common.app.connection_for_write() as connection, connection.Producer() as producer:
        headers = {"task": "add", "id": task_id, "lang": "py", "otelexec-limits": 5, "otelexec-delivery": "theirs"}
        producer.publish([[20, 22], {}, {}], routing_key="common", headers=headers, serializer="json", correlation_id=task_id)
    assert common.app.AsyncResult(task_id).get(timeout=RESULT_SECONDS) == 42
    assert [attempt.state for attempt in common.ended(task_id).record.attempts] == ["succeeded"]


def test_a_message_from_before_the_upgrade_runs_under_its_own_id(common: Stage) -> None:
    task_id = "00000000-0000-4000-8000-00000000002a"
    with common.app.connection_for_write() as connection, connection.Producer() as producer:
        headers = {"task": "add", "id": task_id, "lang": "py", "root_id": task_id, "parent_id": None, "group": None}
        producer.publish([[20, 22], {}, {}], routing_key="common", headers=headers, serializer="json", correlation_id=task_id)
    seen = common.ended(task_id, "succeeded")
    assert (seen.record.execution_id, list(seen.producers)) == (task_id, [])


# The job itself


def test_a_core_takes_the_attempt_over(common: Stage) -> None:
    result = send(common, "core")
    assert result.get(timeout=RESULT_SECONDS) == "paid"
    seen = common.ended(result.id, "succeeded")
    attempt, consumer = seen.attempt, seen.consumer()
    assert seen.record.name == "invoice.run"
    assert (attempt.outer_span_id, attempt.outer_outcome) == (consumer.span_id, "succeeded")
    (inner,) = [span for span in common.spans() if span.span_id == attempt.span_id]
    assert (inner.name, inner.kind, inner.parent_span_id) == ("invoice.run", "internal", consumer.span_id)
    assert (consumer.attributes[semconv.OUTER_OUTCOME], semconv.OUTCOME in consumer.attributes) == ("succeeded", False)


def test_a_core_that_succeeded_stays_so_when_the_task_raises(common: Stage) -> None:
    result = send(common, "core", "then raises")
    with pytest.raises(KeyError):
        result.get(timeout=RESULT_SECONDS)
    seen = common.ended(result.id, "succeeded")
    assert (seen.record.state, seen.attempt.outer_outcome, seen.attempt.outer_error_type) == ("succeeded", "failed", "KeyError")


def test_a_core_that_failed_stays_so_when_the_task_swallows_it(common: Stage) -> None:
    result = send(common, "core", "core fails")
    assert result.get(timeout=RESULT_SECONDS) == "swallowed"
    seen = common.ended(result.id, "failed")
    assert (seen.record.state, seen.attempt.outer_outcome) == ("failed", "succeeded")


def test_children_and_messages_inside(common: Stage) -> None:
    with otelexec.correlate(source="webhook", webhook_id="wh_1", path="/hooks", provider="shop"):
        result = send(common, "nested")
    told = result.get(timeout=RESULT_SECONDS)
    seen = common.ended(result.id, "succeeded")
    child = common.record(told["child"])
    published = [common.ended(task_id, "succeeded") for task_id in told["published"]]
    assert child is not None
    assert child.name == "stock.reserve"
    for record in (child, *(each.record for each in published)):
        assert record.parent_execution_id == seen.record.execution_id
        assert (record.request_id, record.source) == (seen.record.request_id, "webhook")
        assert json.loads(record.correlation)["provider"] == "shop"
    assert len({seen.record.execution_id, child.execution_id, *(each.record.execution_id for each in published)}) == 4
    assert {each.producers[0].trace_id for each in published} == {seen.attempt.trace_id}
    assert {each.producers[0].parent_span_id for each in published} == {seen.attempt.span_id}


def test_a_task_that_is_applied_with_its_callers_headers_is_a_child(common: Stage) -> None:
    result = send(common, "applies")
    told = result.get(timeout=RESULT_SECONDS)
    seen = common.ended(result.id, "succeeded")
    child = common.record(told["execution_id"])
    assert child is not None
    assert (child.name, child.parent_execution_id, child.state) == ("who", seen.record.execution_id, "succeeded")


# Deaths, which take their time: all are sent at once, and each test waits for its own

DEATHS: Mapping[str, tuple[str, tuple[Any, ...], Mapping[str, Any]]] = {
    "killed": ("die", ("MARK", 2), {}),
    "killed, late": ("die.late", ("MARK", 2), {}),
    "killed, late, again": ("die.again", ("MARK", 1), {}),
    "killed before the open": ("killed.early", (), {}),
    "core is killed": ("core", ("core is killed",), {}),
    "then is killed": ("core", ("then is killed",), {}),
    "exit 0": ("leave", (0,), {}),
    "exit 3": ("leave", (3,), {}),
    "hard limit": ("stuck", ("MARK",), {"time_limit": 1}),
    "hard limit, late": ("stuck.late", ("MARK",), {"time_limit": 1}),
    "both limits": ("stuck", ("MARK",), {"soft_time_limit": 1, "time_limit": 2}),
}


@pytest.fixture
def deaths(common: Stage) -> Mapping[str, tuple[Any, str]]:
    """Give the result and the mark of each."""
    if "deaths" not in common.cache:
        sent: dict[str, tuple[Any, str]] = {}
        for how, (name, arguments, options) in DEATHS.items():
            mark = common.mark()
            sent[how] = (send(common, name, *(mark if each == "MARK" else each for each in arguments), **options), mark)
        common.cache["deaths"] = sent
    found: Mapping[str, tuple[Any, str]] = common.cache["deaths"]
    return found


@pytest.mark.parametrize("how", ["killed", "killed, late"])
def test_a_killed_child_leaves_one_lost_attempt(common: Stage, deaths: Mapping[str, tuple[Any, str]], how: str) -> None:
    result, mark = deaths[how]
    with pytest.raises(WorkerLostError):
        result.get(timeout=LOST_SECONDS)
    seen = common.ended(result.id, seconds=LOST_SECONDS)
    # billiard runs a task once more whose child died before it was heard that it had begun, and it is killed again.
    assert len(seen.attempts) == common.runs(mark) <= 2
    attempt = seen.attempts[0]
    assert (seen.record.state, set(seen.states), attempt.classification) == ("lost", {"lost"}, "killed")
    assert "SIGKILL" in (attempt.error_message or "")
    assert json.loads(attempt.progress or "{}")["message"] == "before the kill"
    assert attempt.pid == common.wait_for_run(mark)


def test_a_killed_child_with_reject_on_worker_lost_is_lost_once_and_runs_again(
    common: Stage, deaths: Mapping[str, tuple[Any, str]]
) -> None:
    result, _ = deaths["killed, late, again"]
    assert result.get(timeout=LOST_SECONDS) == "alive"
    seen = common.ended(result.id, "lost", "succeeded", seconds=LOST_SECONDS)
    first, second = seen.attempts
    assert (seen.record.state, first.classification, second.duplicate) == ("succeeded", "killed", False)
    assert "SIGKILL" in (first.error_message or "")
    assert first.pid != second.pid


def test_a_child_killed_before_the_open_is_lost_all_the_same(common: Stage, deaths: Mapping[str, tuple[Any, str]]) -> None:
    seen = common.ended(deaths["killed before the open"][0].id, "lost", seconds=LOST_SECONDS)
    assert seen.record.state == "lost"
    assert "SIGKILL" in (seen.attempt.error_message or "")


def test_a_core_that_is_killed(common: Stage, deaths: Mapping[str, tuple[Any, str]]) -> None:
    result, _ = deaths["core is killed"]
    with pytest.raises(WorkerLostError):
        result.get(timeout=LOST_SECONDS)
    seen = common.ended(result.id, seconds=LOST_SECONDS)
    assert (seen.record.name, seen.record.state) == ("invoice.run", "lost")
    # billiard runs a task once more whose child died before it was heard that it had begun, and it is killed again.
    assert set(seen.states) == {"lost"}
    until(lambda: outer_of(common, seen) == "lost", LOST_SECONDS)


def test_a_core_that_succeeded_stays_so_when_the_child_is_killed(common: Stage, deaths: Mapping[str, tuple[Any, str]]) -> None:
    result, _ = deaths["then is killed"]
    with pytest.raises(WorkerLostError):
        result.get(timeout=LOST_SECONDS)
    seen = common.look(result.id)
    assert seen is not None
    first, *more = seen.attempts
    assert (seen.record.state, first.state) == ("succeeded", "succeeded")
    # billiard runs a task once more whose child died before it was heard that it had begun; that changes nothing.
    assert all(attempt.duplicate for attempt in more)
    until(lambda: outer_of(common, seen) == "lost", LOST_SECONDS)


def outer_of(stage: Stage, seen: Seen) -> str | None:
    record = stage.record(seen.record.execution_id)
    return None if record is None else record.attempts[0].outer_outcome


@pytest.mark.parametrize("how", ["exit 0", "exit 3"])
def test_an_exit_is_one_failed_attempt(common: Stage, deaths: Mapping[str, tuple[Any, str]], how: str) -> None:
    seen = common.ended(deaths[how][0].id, seconds=LOST_SECONDS)
    assert seen.states == ["failed"]
    assert seen.attempt.error_type == "SystemExit"


@pytest.mark.parametrize("how", ["hard limit", "hard limit, late", "both limits"])
def test_the_hard_limit_is_one_outcome(common: Stage, deaths: Mapping[str, tuple[Any, str]], how: str) -> None:
    result, mark = deaths[how]
    with pytest.raises(TimeLimitExceeded):
        result.get(timeout=LOST_SECONDS)
    seen = common.ended(result.id, "timed_out", seconds=LOST_SECONDS)
    assert (seen.record.state, common.runs(mark)) == ("timed_out", 1)
    assert (seen.attempt.error_type or "").endswith("TimeLimitExceeded")


@pytest.mark.parametrize("name", ["sleep", "sleep.late"])
def test_terminated(common: Stage, name: str) -> None:
    mark = common.mark()
    result = send(common, name, 60, mark)
    common.wait_for_run(mark)
    result.revoke(terminate=True)
    seen = common.ended(result.id, "cancelled", seconds=LOST_SECONDS)
    assert (seen.record.state, common.runs(mark)) == ("cancelled", 1)
    with pytest.raises(TaskRevokedError):
        result.get(timeout=RESULT_SECONDS)


@pytest.mark.parametrize("limit", [None, 40])
def test_terminated_with_the_signal_of_the_soft_limit(common: Stage, limit: float | None) -> None:
    mark = common.mark()
    result = send(common, "sleep", 60, mark, soft_time_limit=limit)
    common.wait_for_run(mark)
    result.revoke(terminate=True, signal="SIGUSR1")
    seen = common.ended(result.id, "cancelled")
    assert (seen.record.state, seen.attempt.classification) == ("cancelled", None)


# Acknowledgement


def test_with_acks_late_the_record_is_closed_before_the_message_is_acknowledged(common: Stage) -> None:
    with otelexec.correlate(source="test") as correlation:
        send(common, "add.late", 1, 2)
    broker = keys(common.settings["broker_url"])

    # The transport takes a message from the queue before it notes it as unacknowledged, so that for a moment it is in neither.
    until(lambda: (record := common.record(correlation.execution_id)) is not None and record.started_unix_ns is not None, 10)

    def acknowledged() -> bool:
        held = [json.loads(value)[0]["headers"]["task"] for value in broker.hvals("unacked")]
        return "add.late" not in held and broker.llen("common") == 0

    until(acknowledged, 10)
    record = common.record(correlation.execution_id)
    broker.close()
    assert record is not None
    assert record.state == "succeeded"
