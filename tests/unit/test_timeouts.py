"""Timeouts: enforced on coroutines, a deadline to look at elsewhere; a body's own TimeoutError is a failure."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest

import otelexec
from tests.records import Records


async def test_a_coroutine_is_stopped_and_timeout_error_comes_out(records: Records) -> None:
    """Behaviour 4: the limit stands on the record, and the state says what it was."""
    stopped = []

    @otelexec.execution("slow", timeout=0.05)
    async def run() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            stopped.append(True)
            raise

    with pytest.raises(TimeoutError) as caught:
        await run()
    assert stopped == [True]
    assert otelexec.was_finalized(caught.value)
    assert str(caught.value).endswith("was stopped after its timeout of 0.05 s")
    attempt = records.attempt()
    assert (attempt.state, attempt.error_type) == ("timed_out", "TimeoutError")
    assert attempt.error_message == "stopped after its timeout of 0.05 s"
    assert records.span(attempt.span_id).status == "error"
    assert attempt.deadline_unix_ns == attempt.started_unix_ns + 50_000_000


async def test_an_async_block_is_stopped_too(records: Records) -> None:
    with pytest.raises(TimeoutError):
        async with otelexec.execution("slow", timeout=0.05):
            await asyncio.sleep(60)
    assert records.attempt().state == "timed_out"
    await asyncio.sleep(0)
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_an_async_generator_s_body_is_stopped_and_its_consumer_s_time_does_not_stop_it(records: Records) -> None:
    @otelexec.execution("stream", timeout=0.2)
    async def stream(seconds: float) -> AsyncIterator[int]:
        yield 1
        await asyncio.sleep(seconds)
        yield 2

    with pytest.raises(TimeoutError):
        async for _ in stream(60):
            pass
    assert records.attempt().state == "timed_out"


async def test_a_coroutine_s_own_timeout_error_is_failed(records: Records) -> None:
    error = TimeoutError("upstream")

    @otelexec.execution(timeout=30)
    async def run() -> None:
        raise error

    with pytest.raises(TimeoutError) as caught:
        await run()
    assert caught.value is error
    assert records.attempt().state == "failed"


async def test_a_timeout_within_the_body_is_the_body_s_own(records: Records) -> None:
    with pytest.raises(TimeoutError):
        async with otelexec.execution("x", timeout=30), asyncio.timeout(0.02):
            await asyncio.sleep(60)
    assert records.attempt().state == "failed"


async def test_a_caller_s_timeout_is_an_interruption(records: Records) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await otelexec.execution("x")(asyncio.sleep)(60)
    assert (records.attempt().state, records.attempt().classification) == ("cancelled", "interrupted")


async def test_a_body_that_ends_in_spite_of_its_timeout_has_succeeded(records: Records) -> None:
    @otelexec.execution("x", timeout=0.02)
    async def run() -> str:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            return "partial"
        return "whole"

    assert await run() == "partial"
    assert records.attempt().state == "succeeded"


async def test_nested_timeouts_end_the_one_whose_time_is_over(records: Records) -> None:
    @otelexec.execution("inner", timeout=30)
    async def inner(seconds: float) -> None:
        await asyncio.sleep(seconds)

    with pytest.raises(TimeoutError):
        await otelexec.execution("outer", timeout=0.05)(inner)(60)
    assert records.named("outer").state == "timed_out"
    assert records.named("inner").attempts[0].classification == "interrupted"


@pytest.mark.parametrize(
    "seconds", [float("inf"), 1e300, 10**400, 1e10, threading.TIMEOUT_MAX], ids=["inf", "1e300", "10**400", "1e10", "largest"]
)
async def test_a_timeout_beyond_any_clock_is_none(records: Records, seconds: float) -> None:
    @otelexec.execution("patient", timeout=seconds)
    async def run() -> str:
        return "done"

    assert await run() == "done"
    assert otelexec.execution("sync", timeout=seconds)(lambda: "done")() == "done"
    assert {record.state for record in records.all()} == {"succeeded"}
    assert len(records.all()) == 2
    assert all((attempt.deadline_unix_ns or 0) > 2**62 for record in records.all() for attempt in record.attempts)
