"""Cancellation: a durable wish, seen by whoever runs it; it sticks, and it never overwrites what was done."""

# ruff: noqa: ASYNC110, PT012 (waits for other processes; blocks are ended by what is tested)

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

import otelexec
from otelexec import runtime
from otelexec.decorators import ExecutionDecorator
from otelexec.errors import CorrelationError
from otelexec.options import Options
from otelexec.store.rows import Cancellation
from otelexec.store.writes import RequestCancel
from tests.records import Records, until

FAR = "import sys, otelexec; print(otelexec.request_cancel(sys.argv[1], terminate=eval(sys.argv[2])))"


def cancel_elsewhere(execution_id: str, terminate: bool | None = None) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", FAR, execution_id, str(terminate)], stdout=subprocess.PIPE)


def test_cancelled_before_it_starts_the_function_is_not_called(records: Records) -> None:
    """Behaviours 3 and 52: `cancelled`, not `failed`, with times; and it stays so for every later delivery."""
    called: list[int] = []
    assert otelexec.request_cancel("e") is None
    for _ in range(2):
        with otelexec.correlate(source="x", execution_id="e"), pytest.raises(otelexec.ExecutionCancelled) as caught:
            otelexec.execution("job")(called.append)(1)
        assert caught.value.execution_id == "e"
        assert otelexec.was_finalized(caught.value)
    assert called == []
    record = records.one()
    assert (record.state, [attempt.state for attempt in record.attempts]) == ("cancelled", ["cancelled", "cancelled"])
    assert record.ended_unix_ns == record.attempts[0].ended_unix_ns
    assert record.attempts[0].classification is None
    assert records.query("SELECT sticky FROM execution") == [(1,)]


async def test_a_coroutine_that_is_cancelled_before_it_starts_is_not_called_either(records: Records) -> None:
    otelexec.request_cancel("e")
    with otelexec.correlate(source="x", execution_id="e"):
        with pytest.raises(otelexec.ExecutionCancelled):
            await otelexec.execution("job")(asyncio.sleep)(0)
        with pytest.raises(otelexec.ExecutionCancelled), otelexec.extract({"executionId": "e"}), otelexec.execution("job"):
            pytest.fail("called")
    assert records.one().state == "cancelled"


def test_a_running_attempt_sees_a_wish_of_its_own_process_at_once(records: Records) -> None:
    with otelexec.execution("job") as run:
        assert not run.cancel_requested
        assert otelexec.request_cancel(run.id) == "running"
        assert run.cancel_requested
    assert records.one().state == "succeeded"


def test_a_running_attempt_sees_a_wish_of_another_process_within_a_second(records: Records) -> None:
    """Also one that starts while the background thread has long had nothing to do."""
    with otelexec.execution("early"):
        pass
    time.sleep(0.7)
    with otelexec.execution("job") as run:
        other = cancel_elsewhere(run.id)
        assert other.stdout is not None
        assert other.stdout.readline() == b"running\n"
        asked = time.monotonic()
        until(lambda: run.cancel_requested)
        waited = time.monotonic() - asked
        other.wait(20)
        other.stdout.close()
    assert waited < 1.0


def test_a_wish_for_one_attempt_tells_it_and_its_core_and_nobody_after_it(records: Records) -> None:
    def attempt(token: str) -> ExecutionDecorator:
        return ExecutionDecorator(Options("job", token=token))

    with otelexec.correlate(source="x", execution_id="e"), contextlib.suppress(ValueError), attempt("first") as run:
        runtime.get().journal.write(RequestCancel("first", Cancellation(7, terminate=False)))
        with otelexec.execution("core", core=True) as core:
            until(lambda: run.cancel_requested and core.cancel_requested)
            raise ValueError
    runtime.get().journal.write(RequestCancel("other", Cancellation(7, terminate=False)))
    with otelexec.correlate(source="x", execution_id="e"), attempt("second") as run:
        with otelexec.correlate(source="x"), attempt("other") as told_after_it:
            until(lambda: told_after_it.cancel_requested)
        assert not run.cancel_requested
    [record] = [record for record in records.all() if record.execution_id == "e"]
    assert [attempt.state for attempt in record.attempts] == ["failed", "succeeded"]


async def test_terminate_cancels_a_coroutine_once(records: Records) -> None:
    """The wish is looked up again and again, but cleanup is not cancelled a second time."""
    cleaned = []

    @otelexec.execution("job")
    async def run() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(1.2)
            cleaned.append(True)

    task = asyncio.create_task(run())
    while not records.query_or_none("SELECT 1 FROM attempt"):
        await asyncio.sleep(0.005)
    await asyncio.sleep(0.02)
    otelexec.request_cancel(records.one().execution_id, terminate=True)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cleaned == [True]
    attempt = records.attempt()
    assert (attempt.state, attempt.classification) == ("cancelled", None)
    assert records.query("SELECT state, sticky FROM execution") == [("cancelled", 1)]


async def test_terminate_from_another_process_cancels_a_coroutine(records: Records) -> None:
    others = []
    with pytest.raises(asyncio.CancelledError):
        async with otelexec.execution("job") as run:
            others.append(cancel_elsewhere(run.id, terminate=True))
            await asyncio.sleep(60)
    (other,) = others
    task = asyncio.current_task()
    assert task is not None
    task.uncancel()
    assert other.stdout is not None
    other.stdout.close()
    other.wait(20)
    assert (records.attempt().state, records.attempt().classification) == ("cancelled", None)


async def test_a_termination_that_comes_between_items_stops_the_next_step(records: Records) -> None:
    @otelexec.execution("stream")
    async def stream():  # type: ignore[no-untyped-def] # noqa: ANN202
        yield otelexec.current_execution().id
        await asyncio.sleep(60)
        yield None

    made = stream()
    otelexec.request_cancel(str(await made.__anext__()), terminate=True)
    with pytest.raises(asyncio.CancelledError):
        await made.__anext__()
    task = asyncio.current_task()
    assert task is not None
    task.uncancel()
    assert records.one().state == "cancelled"


async def test_without_terminate_a_coroutine_is_only_told(records: Records) -> None:
    async with otelexec.execution("job") as run:
        otelexec.request_cancel(run.id, terminate=False)
        await asyncio.sleep(0.05)
        assert run.cancel_requested
    assert records.one().state == "succeeded"


def test_a_body_that_returns_after_a_request_has_succeeded_unless_cancel_wins(records: Records) -> None:
    for name, wins in (("told", False), ("stopped", True)):
        with otelexec.execution(name, cancel_wins=wins) as run:
            otelexec.request_cancel(run.id)
    assert (records.named("told").state, records.named("stopped").state) == ("succeeded", "cancelled")


def test_a_wish_that_only_the_store_knows_decides_in_the_closing_transaction(records: Records) -> None:
    """The outcome is decided, and the span frozen with it, where the wish is read."""
    with pytest.raises(KeyboardInterrupt), otelexec.execution("job") as run:
        store = runtime.get().store
        assert store is not None
        from otelexec.store.rows import Cancellation
        from otelexec.store.writes import RequestCancel

        store.commit([RequestCancel(run.id, Cancellation(time.time_ns(), None))], durable=True, timeout_seconds=5)
        assert not run.cancel_requested
        raise KeyboardInterrupt
    assert (records.attempt().state, records.attempt().classification) == ("cancelled", None)
    assert records.query("SELECT sticky FROM execution") == [(1,)]


def test_a_cancelled_execution_stays_cancelled(records: Records) -> None:
    """Behaviour 25: a failure of a later delivery does not overwrite it."""
    otelexec.request_cancel("e")
    with otelexec.correlate(source="x", execution_id="e"), pytest.raises(otelexec.ExecutionCancelled):
        otelexec.execution("job")(print)()
    ended = records.one().ended_unix_ns
    with otelexec.correlate(source="x", execution_id="e"), pytest.raises(otelexec.ExecutionCancelled):
        otelexec.execution("job")(print)()
    assert (records.one().state, records.one().ended_unix_ns) == ("cancelled", ended)


def test_a_late_wish_never_overwrites_success(records: Records) -> None:
    """Behaviours 26 and 51: it is told what stands, and nothing changes."""
    with otelexec.correlate(source="x", execution_id="e"):
        otelexec.execution("job")(lambda: None)()
    assert otelexec.request_cancel("e", terminate=True) == "succeeded"
    assert (records.one().state, records.attempt().state) == ("succeeded", "succeeded")


def test_an_interruption_that_nobody_asked_for_is_left_by_the_next_attempt(records: Records) -> None:
    for error in (KeyboardInterrupt, None):
        with otelexec.correlate(source="x", execution_id="e"):
            try:
                with otelexec.execution("job"):
                    if error is not None:
                        raise error
            except KeyboardInterrupt:
                pass
    assert (records.one().state, [attempt.state for attempt in records.one().attempts]) == ("succeeded", ["cancelled", "succeeded"])


def test_without_a_store_a_wish_goes_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTELEXEC_STORE", "none")
    assert otelexec.request_cancel("e") is None


@pytest.mark.parametrize("given", [None, 5, ""])
def test_what_is_no_id_is_refused(records: Records, given: Any) -> None:
    """A search that found nothing gives None, and a wish for that would be nobody's."""
    with pytest.raises(CorrelationError, match="takes an execution id"):
        otelexec.request_cancel(given)


def test_an_id_that_had_to_be_hashed_is_known_by_the_text_it_was_made_of(records: Records) -> None:
    with otelexec.correlate(source="legacy", execution_id="Auftrag Nº 7"), otelexec.execution("job") as run:
        otelexec.request_cancel("Auftrag Nº 7")
        assert run.cancel_requested


def test_a_thread_is_told(records: Records) -> None:
    seen = threading.Event()
    started: list[str] = []

    @otelexec.execution("job")
    def run() -> None:
        current = otelexec.current_execution()
        assert current.id is not None
        started.append(current.id)
        until(lambda: current.cancel_requested)
        seen.set()

    thread = threading.Thread(target=run)
    thread.start()
    otelexec.request_cancel(until(lambda: started)[0])
    thread.join(10)
    assert seen.is_set()


@pytest.mark.parametrize("asked_before", [True, False])
def test_a_redelivery_after_success_runs_whenever_the_cancellation_was_asked_for(records: Records, *, asked_before: bool) -> None:
    called: list[str] = []

    @otelexec.execution("job")
    def job() -> None:
        called.append("called")
        if asked_before and len(called) == 1:
            otelexec.request_cancel("e")

    with otelexec.correlate(source="x", execution_id="e"):
        job()
    if not asked_before:
        assert otelexec.request_cancel("e") == "succeeded"
    with otelexec.correlate(source="x", execution_id="e"):
        job()
    assert called == ["called", "called"]
    record = records.one()
    assert record.state == "succeeded"
    assert [(attempt.state, attempt.duplicate) for attempt in record.attempts] == [("succeeded", False), ("succeeded", True)]
