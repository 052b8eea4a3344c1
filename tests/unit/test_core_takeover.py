"""Cores: the executor that is the job takes over the attempt of the execution around it, and its success is final."""

# ruff: noqa: PT012, SIM117 (blocks are ended by what is tested)

from __future__ import annotations

import asyncio
import threading

import pytest

import otelexec
from otelexec import lifecycle
from tests.records import Records


@otelexec.execution("invoice.run", core=True)
def core(error: BaseException | None = None) -> otelexec.Execution:
    if error is not None:
        raise error
    current = otelexec.current_execution()
    assert isinstance(current, otelexec.Execution)
    return current


def test_a_core_alone_is_an_execution_like_any_other(records: Records) -> None:
    core()
    assert (records.one().name, records.attempt().state, records.attempt().outer_span_id) == ("invoice.run", "succeeded", None)


def test_a_core_takes_over_the_attempt_around_it(records: Records) -> None:
    with otelexec.correlate(source="x", execution_id="e"), otelexec.execution("task") as outer:
        run = core()
        assert (run.id, run.attempt) == ("e", 1)
        assert records.one().state == "succeeded"
    record, attempt = records.one(), records.attempt()
    assert (record.name, record.execution_id) == ("invoice.run", "e")
    assert attempt.span_id == f"{run._execution.span.get_span_context().span_id:016x}"
    assert attempt.outer_span_id == f"{outer._execution.span.get_span_context().span_id:016x}"
    assert attempt.outer_outcome == "succeeded"
    assert records.span(attempt.span_id).parent_span_id == attempt.outer_span_id
    assert record.ended_unix_ns == attempt.ended_unix_ns
    assert attempt.outer_ended_unix_ns is not None
    assert attempt.ended_unix_ns is not None
    assert attempt.outer_ended_unix_ns >= attempt.ended_unix_ns


@pytest.mark.parametrize("error", [MemoryError("begin"), KeyboardInterrupt()], ids=lambda error: type(error).__name__)
def test_a_core_that_does_not_begin_leaves_the_attempt_to_the_executor_around_it(
    records: Records, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*_: object) -> None:
        raise error

    with otelexec.execution("task"):
        with monkeypatch.context() as patch:
            patch.setattr(lifecycle, "_start_span", fail)
            with pytest.raises(type(error)):
                core()
        assert records.attempt().state == "running"
    assert (records.one().name, records.attempt().state, records.attempt().outer_span_id) == ("task", "succeeded", None)
    with otelexec.execution("task 2"):
        with monkeypatch.context() as patch:
            patch.setattr(lifecycle, "_start_span", fail)
            with pytest.raises(type(error)):
                core()
        core()  # it takes over, as the first one did not
    assert records.named("invoice.run").attempts[0].outer_outcome == "succeeded"


def test_the_outer_span_s_ids_stand_there_before_anything_ends(records: Records) -> None:
    with otelexec.execution("task") as outer, otelexec.execution("core", core=True):
        attempt = records.attempt()
        assert (attempt.state, attempt.outer_span_id) == ("running", f"{outer._execution.span.get_span_context().span_id:016x}")
        assert attempt.outer_started_unix_ns == outer._execution.started_unix_ns


@pytest.mark.parametrize("error", [ValueError("outer"), KeyboardInterrupt(), SystemExit(3)], ids=lambda error: type(error).__name__)
def test_work_that_was_done_stays_done_whatever_the_outer_code_does(records: Records, error: BaseException) -> None:
    """Behaviour 17: the wrapper does not finalize what the core has finalized."""
    with pytest.raises(type(error)), otelexec.execution("task"):
        core()
        raise error
    record, attempt = records.one(), records.attempt()
    assert (record.state, attempt.state, attempt.error_type) == ("succeeded", "succeeded", None)
    assert attempt.outer_outcome == ("cancelled" if isinstance(error, KeyboardInterrupt) else "failed")
    assert attempt.outer_error_type == type(error).__name__


def test_an_outer_that_swallows_a_failed_core_changes_nothing(records: Records) -> None:
    with otelexec.execution("task"):
        with pytest.raises(ValueError, match="core") as caught:
            core(ValueError("core"))
        assert otelexec.was_finalized(caught.value)
    attempt = records.attempt()
    assert (records.one().state, attempt.state, attempt.outer_outcome) == ("failed", "failed", "succeeded")


def test_an_outer_retry_after_a_failed_core_makes_it_retrying(records: Records) -> None:
    payload: dict[str, object] = {}
    with pytest.raises(ValueError, match="core"), otelexec.correlate(source="x", execution_id="e"), otelexec.execution("task"):
        try:
            core(ValueError("core"))
        except ValueError:
            payload = otelexec.inject({}, retry=True)
            raise
    assert records.one().state == "retrying"
    with otelexec.extract(payload), otelexec.execution("task"):
        core()
    record = records.one()
    assert (record.state, [attempt.state for attempt in record.attempts]) == ("succeeded", ["failed", "succeeded"])
    assert [attempt.outer_outcome for attempt in record.attempts] == ["failed", "succeeded"]


def test_an_outer_retry_after_a_core_that_succeeded_changes_nothing(records: Records) -> None:
    with pytest.raises(ValueError, match="outer"), otelexec.correlate(source="x"), otelexec.execution("task"):
        core()
        otelexec.inject({}, retry=True)
        raise ValueError("outer")
    assert records.one().state == "succeeded"


def test_an_in_body_retry_is_the_next_attempt_and_shares_the_outer(records: Records) -> None:
    with otelexec.correlate(source="x", execution_id="e"), otelexec.execution("task"):
        for error in (ValueError("1"), ValueError("2"), None):
            try:
                core(error)
            except ValueError:
                continue
    record = records.one()
    assert [(attempt.attempt, attempt.state) for attempt in record.attempts] == [(1, "failed"), (2, "failed"), (3, "succeeded")]
    assert len({attempt.outer_span_id for attempt in record.attempts}) == 1
    assert {attempt.outer_outcome for attempt in record.attempts} == {"succeeded"}
    parents = {records.span(attempt.span_id).parent_span_id for attempt in record.attempts}
    assert parents == {record.attempts[0].outer_span_id}
    assert record.state == "succeeded"


def test_a_core_after_one_that_succeeded_is_a_child(records: Records) -> None:
    with otelexec.execution("task") as outer:
        first, second = core(), core()
    assert first.id == outer.id
    assert second.id != outer.id
    (child,) = [record for record in records.all() if record.execution_id == second.id]
    assert (child.parent_execution_id, child.state) == (outer.id, "succeeded")


def test_a_core_inside_a_core_is_a_child(records: Records) -> None:
    with otelexec.execution("task"), otelexec.execution("outer core", core=True) as run:
        inner = core()
    assert inner.id != run.id
    assert records.named("invoice.run").parent_execution_id == run.id


async def test_of_concurrent_cores_one_takes_over_and_the_others_are_children(records: Records) -> None:
    go = asyncio.Event()

    @otelexec.execution("core", core=True)
    async def run(number: int) -> str | None:
        if number == 4:
            go.set()
        await go.wait()
        return otelexec.current_execution().id

    async with otelexec.execution("task") as outer:
        ids = await asyncio.gather(*(run(number) for number in range(5)))
    assert ids.count(outer.id) == 1
    assert len(set(ids)) == 5
    assert {record.parent_execution_id for record in records.all() if record.execution_id != outer.id} == {outer.id}


def test_of_cores_in_threads_one_takes_over(records: Records) -> None:
    import contextvars

    barrier = threading.Barrier(8)
    ids: list[str | None] = []

    @otelexec.execution("core", core=True)
    def run() -> None:
        ids.append(otelexec.current_execution().id)
        barrier.wait(10)

    with otelexec.execution("task") as outer:
        threads = [threading.Thread(target=contextvars.copy_context().run, args=(run,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
    assert ids.count(outer.id) == 1
    assert len(records.all()) == 8


def test_the_request_of_a_scope_inside_goes_onto_the_core(records: Records) -> None:
    with otelexec.execution("task") as outer, otelexec.extract({"executionId": "theirs", "requestId": "r"}):
        run = core()
    assert run.id == outer.id
    assert (records.one().execution_id, records.one().request_id) == (outer.id, "r")


def test_a_core_finds_the_snapshot_and_the_wish_of_the_attempt_around_it(records: Records) -> None:
    with otelexec.correlate(source="x", execution_id="e"), otelexec.execution("task"), otelexec.execution("core", core=True) as first:
        first.pause("approval", snapshot=[1])
    assert records.one().state == "paused"
    with otelexec.correlate(source="x", execution_id="e"), otelexec.execution("task") as outer:
        assert outer.snapshot == [1]
        run = core()
        assert run.snapshot == [1]
    assert records.one().state == "succeeded"


def test_a_core_that_is_to_be_cancelled_is_not_called(records: Records) -> None:
    with pytest.raises(otelexec.ExecutionCancelled), otelexec.execution("task") as outer:
        otelexec.request_cancel(outer.id)
        core()
    assert (records.one().state, records.attempt().outer_outcome) == ("cancelled", "cancelled")


async def test_terminate_stops_the_core_and_its_outer_cleans_up_undisturbed(records: Records) -> None:
    cleaned = []
    with pytest.raises(asyncio.CancelledError):
        async with otelexec.execution("task") as outer:
            try:
                async with otelexec.execution("core", core=True):
                    otelexec.request_cancel(outer.id, terminate=True)
                    await asyncio.sleep(60)
            finally:
                await asyncio.sleep(0.6)
                cleaned.append(True)
    task = asyncio.current_task()
    assert task is not None
    while task.cancelling():
        task.uncancel()
    assert cleaned == [True]
    assert (records.one().state, records.attempt().outer_outcome) == ("cancelled", "cancelled")


def test_a_core_s_children_and_the_outer_s_are_where_they_belong(records: Records) -> None:
    from opentelemetry import trace

    tracer = trace.get_tracer("app")
    with otelexec.execution("task"), tracer.start_as_current_span("prepare"), otelexec.execution("core", core=True):
        with tracer.start_as_current_span("query"):
            pass
    attempt = records.attempt()
    assert records.span_named("prepare").parent_span_id == attempt.outer_span_id
    assert records.span(attempt.span_id).parent_span_id == records.span_named("prepare").span_id
    assert records.span_named("query").parent_span_id == attempt.span_id
