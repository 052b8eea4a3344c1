"""
Behaviours that the first system with this problem learnt the hard way, each under its number.

Those that belong to one part stand with it: 1, 2, 9, 10, 17, 54 in test_lifecycle_sync, 3, 25, 26, 51, 52 in test_cancel,
4 in test_timeouts, 5, 30 to 33 in test_pause_resume, 7 and 19 in test_endings, 15 and 16 in test_lifecycle_async,
21 in test_million, 24, 34 to 38, 42 to 45 in test_scope_and_nesting, 47 and 48 in test_publishing.
"""

# ruff: noqa: PT012 (blocks are ended by what is tested)

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path
from typing import Any

import pytest

import otelexec
from otelexec import runtime
from otelexec.errors import StoreUnavailable
from otelexec.store import sql
from otelexec.store.rows import Cancellation, Frozen, Outcome
from otelexec.store.writes import CloseAttempt, CloseLost, OpenAttempt, RequestCancel
from tests.records import Records


class Failing:
    """
    Stands where the store's `commit` stood and refuses what it is told to.

    Args:
        kinds: Writes that fail.
        times: How often.
    """

    def __init__(self, *kinds: type, times: int = 10**9) -> None:
        store = runtime.get().store
        assert store is not None
        self._commit = store.commit
        self._kinds = kinds
        self.left = times

    def __call__(self, writes: Any, **options: Any) -> list[object]:
        if self.left > 0 and any(isinstance(write, self._kinds) for write in writes):
            self.left -= 1
            raise StoreUnavailable("no disk")
        return self._commit(writes, **options)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTELEXEC_FINALIZE_TIMEOUT_SECONDS", "0.2")
    monkeypatch.setenv("OTELEXEC_OPEN_TIMEOUT_SECONDS", "0.1")


def test_6_every_path_says_which_one_it_was(records: Records) -> None:
    """Behaviour 6."""
    otelexec.execution("job")(lambda: None)()
    otelexec.reject("no")
    assert [record.attempts[0].finalized_by for record in records.all()] == ["executor", "reject"]


@pytest.mark.parametrize("state", ["succeeded", "failed", "cancelled", "paused", "rejected"])
def test_8_span_and_row_say_the_same(records: Records, state: str) -> None:
    """Behaviour 8; the fixture compares ids, times, status and attributes of every one of them as well."""
    raised = {"failed": ValueError("x"), "cancelled": KeyboardInterrupt()}.get(state)

    def body() -> None:
        current = otelexec.current_execution()
        if state == "paused":
            current.pause("later")
        if state == "rejected":
            otelexec.reject("no")
        if raised is not None:
            raise raised

    run = otelexec.execution("job")(body)
    if raised is None:
        run()
    else:
        with pytest.raises(type(raised)):
            run()
    assert (records.attempt().state, records.span_named("job").attributes["otelexec.outcome"]) == (state, state)


def test_11_a_record_that_the_store_refuses_is_reduced_and_keeps_output_and_reason(
    records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behaviour 11."""
    apply, left = sql.apply, [1, 2]  # once with whatever else is in the transaction, once alone

    def refuse(tx: Any, write: Any) -> object:
        if isinstance(write, CloseAttempt) and left:
            left.pop()
            raise OverflowError("too large")
        return apply(tx, write)

    monkeypatch.setattr(sql, "apply", refuse)
    with otelexec.execution("job") as run:
        run.set_output({"rows": 3})
    attempt = records.attempt()
    assert (attempt.state, attempt.finalized_by, attempt.output) == ("succeeded", "fallback", '{"rows":3}')
    assert attempt.error_message is not None
    assert "too large" in attempt.error_message


@pytest.mark.parametrize("fails", [False, True])
def test_12_and_13_when_nothing_can_be_recorded_result_and_exception_stay_and_nobody_claims_it(
    records: Records, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, fails: bool
) -> None:
    """Behaviours 12 and 13: neither store nor spool; the record is in one CRITICAL line, and in memory until they are back."""
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where a folder should be")
    monkeypatch.setenv("OTELEXEC_SPOOL", str(blocked))
    failing = Failing(OpenAttempt, CloseAttempt)
    monkeypatch.setattr(runtime.get().store, "commit", failing)
    value, error = object(), ValueError("mine")

    @otelexec.execution("job")
    def run() -> object:
        if fails:
            raise error
        return value

    if fails:
        with pytest.raises(ValueError, match="mine") as caught:
            run()
        assert caught.value is error
        assert not otelexec.was_finalized(error)
    else:
        assert run() is value
    critical = [json.loads(record.getMessage()) for record in caplog.records if record.levelno == logging.CRITICAL]
    assert len(critical) == 1
    assert critical[0]["record"]["frozen"]["outcome"]["state"] == ("failed" if fails else "succeeded")
    failing.left = 0
    runtime.get().journal.recover()
    assert records.attempt().state == ("failed" if fails else "succeeded")


def test_14_and_18_an_end_that_did_not_get_through_is_tried_again(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behaviours 14 and 18: within its time the store is asked again; nobody else has to."""
    monkeypatch.setattr(runtime.get().store, "commit", Failing(CloseAttempt, times=2))
    otelexec.execution("job")(lambda: None)()
    assert (records.attempt().state, records.attempt().finalized_by) == ("succeeded", "executor")


def test_20_the_mark_on_an_exception_goes_with_the_exception() -> None:
    """Behaviour 20: nothing expires or has to be swept, because nothing is kept apart from the exception."""
    with pytest.raises(ValueError, match="x") as caught, otelexec.execution("job"):
        raise ValueError("x")
    assert otelexec.was_finalized(caught.value)
    assert runtime.get().executions == {}


def test_22_and_23_a_start_that_never_got_through_is_made_up_for_by_the_end(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behaviours 22 and 23: the close carries the whole row; before it, nothing claims to be recorded."""
    failing = Failing(OpenAttempt)
    monkeypatch.setattr(runtime.get().store, "commit", failing)
    with pytest.raises(ValueError, match="x"), otelexec.execution("job"):
        assert runtime.get().journal.spooling
        failing.left = 0
        raise ValueError("x")
    runtime.get().journal.recover()
    assert (records.one().name, records.attempt().attempt, records.attempt().state) == ("job", 1, "failed")


def test_27_a_lost_race_is_told_what_stands(records: Records, caplog: pytest.LogCaptureFixture) -> None:
    """Behaviour 27: somebody called it lost; what it observed itself is recorded beside that, under a span of its own."""
    store = runtime.get().store
    assert store is not None
    with otelexec.execution("job") as run:
        outcome = Outcome("lost", run._execution.started_unix_ns + 1, "reconciler", error_type="killed")
        store.commit([CloseLost(run.id, run._execution.token, Frozen(outcome, b""))], durable=True, timeout_seconds=5)
    (told,) = [record for record in caplog.records if "lost_race" in record.getMessage()]
    assert told.__dict__["otelexec_state"] == "lost"
    assert (records.attempt().state, records.attempt().finalized_by) == ("lost", "reconciler")
    observed = json.loads(str(records.attempt().observed))
    assert observed["state"] == "succeeded"
    span = records.span(observed["span_id"])
    assert span.attributes["otelexec.observed_of"] == records.attempt().span_id
    # The fake reconciler above wrote no span for what it closed, so there is nothing to agree with.
    store.commit([CloseLost(run.id, run._execution.token, Frozen(outcome, b""))], durable=True, timeout_seconds=5)
    records.check_agreement = lambda: None  # type: ignore[method-assign]


def test_28_and_29_a_wish_to_cancel_outlives_an_end_that_was_not_stored(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behaviours 28 and 29: the wish is its own row, and nothing that happens to the attempt takes it away."""
    store = runtime.get().store
    assert store is not None
    failing = Failing(CloseAttempt)
    monkeypatch.setattr(store, "commit", failing)
    with otelexec.correlate(source="x", execution_id="e"), otelexec.execution("job") as run:
        runtime.get().journal.group.commit(RequestCancel(run.id, Cancellation(1, None)), durable=True, timeout_seconds=5)
    assert store.cancellations(["e"])["e"].requested_unix_ns == 1
    failing.left = 0
    runtime.get().journal.recover()
    assert records.one().state == "succeeded"


def test_39_a_legacy_payload_runs_under_its_own_ids_each_time(records: Records) -> None:
    """Behaviour 39."""
    payload = {"executionId": "old", "correlation": {"source": "schedule", "scheduleId": "s"}, "data": 1}
    for _ in range(2):
        with otelexec.extract(payload), otelexec.execution("job"):
            pass
    record = records.one()
    assert (record.execution_id, record.request_id, record.source) == ("old", "old", "schedule")
    assert json.loads(record.correlation) == {"schedule_id": "s"}
    assert len(record.attempts) == 2


def test_40_unknown_fields_come_out_as_they_went_in(records: Records) -> None:
    """Behaviour 40."""
    with otelexec.correlate(source="newer", attributes={"campaign": "ä b,c;d=e", "x-y": "1"}):
        payload = json.loads(json.dumps(otelexec.inject({})))
    with otelexec.extract(payload), otelexec.execution("job"):
        pass
    assert json.loads(records.one().correlation) == {"campaign": "ä b,c;d=e", "x-y": "1"}


@pytest.mark.parametrize(
    "baggage", ["", "=", ",,,", "otelexec.execution_id=%zz", "otelexec.execution_id=" + "x" * 10_000, "\ud800", b"\xff", 7]
)
def test_41_malformed_baggage_never_breaks_a_job(records: Records, baggage: object) -> None:
    """Behaviour 41."""
    with otelexec.extract({"_otelexec": {"baggage": baggage, "traceparent": baggage}}), otelexec.execution("job") as run:
        assert 1 <= len(run.id) <= 128
    assert records.one().state == "succeeded"


def test_59_an_endpoint_that_is_down_never_affects_the_run(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behaviour 59: the span waits in the outbox."""
    monkeypatch.setenv("OTELEXEC_RELAY", "true")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    assert otelexec.execution("job")(lambda: 3)() == 3
    otelexec.shutdown()
    assert [span.name for span in records.spans()] == ["job"]


def test_60_outer_code_can_tell_an_error_that_is_recorded_from_one_that_is_not(records: Records) -> None:
    """Behaviour 60: a backend need not alert for what stands on the record already."""
    recorded = ValueError("user's")
    with pytest.raises(ValueError, match="user's"), otelexec.execution("job"):
        raise recorded
    assert (otelexec.was_finalized(recorded), otelexec.was_finalized(OSError("ours"))) == (True, False)


def test_15_and_16_two_threads_that_end_one_attempt_write_it_once(records: Records) -> None:
    """Behaviours 15 and 16, by the store: the same close twice is one row and one span."""
    made: list[CloseAttempt] = []
    store = runtime.get().store
    assert store is not None
    commit = store.commit

    def watching(writes: Any, **options: Any) -> list[object]:
        made.extend(write for write in writes if isinstance(write, CloseAttempt))
        return commit(writes, **options)

    store.commit = watching  # type: ignore[method-assign]
    otelexec.execution("job")(lambda: None)()
    (close,) = made
    threads = [threading.Thread(target=runtime.get().journal.write, args=(close,), kwargs={"durable": True}) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(records.spans()) == 1
    assert len(records.one().attempts) == 1
