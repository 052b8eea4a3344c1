"""Generators and async generators: current only while their body runs, and closed however they are left."""

# ruff: noqa: ASYNC110 (waits for other threads and processes; the signal comes inside the block)

from __future__ import annotations

import asyncio
import contextvars
import gc
import sys
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator
from contextlib import aclosing, contextmanager, suppress
from typing import Any

import pytest
from opentelemetry import trace

import otelexec
from otelexec import runtime
from otelexec.store.writes import CloseAttempt
from tests.records import Records, until

VAR: contextvars.ContextVar[str] = contextvars.ContextVar("VAR", default="unset")


@otelexec.execution("numbers")
def numbers(count: int) -> Generator[int, str | None, str]:
    heard = []
    for number in range(count):
        assert otelexec.current_execution().name == "numbers"
        try:
            said = yield number
        except KeyError as error:
            said = f"thrown {error}"
        if said is not None:
            heard.append(said)
    return ",".join(heard)


def test_a_generator_is_one_execution_from_its_first_item_to_its_end(records: Records) -> None:
    stream = numbers(3)
    assert records.all() == []
    assert list(stream) == [0, 1, 2]
    assert (records.one().name, records.attempt().state) == ("numbers", "succeeded")


def test_what_is_sent_thrown_and_returned_passes_through(records: Records) -> None:
    stream = numbers(4)
    assert next(stream) == 0
    assert stream.send("a") == 1
    assert stream.throw(KeyError("k")) == 2
    assert stream.send("b") == 3
    with pytest.raises(StopIteration) as stop:
        next(stream)
    assert stop.value.value == "a,thrown 'k',b"
    assert records.attempt().state == "succeeded"


def test_it_works_under_yield_from(records: Records) -> None:
    def outer() -> Iterator[Any]:
        result = yield from numbers(2)
        yield ["end", result]

    assert list(outer()) == [0, 1, ["end", ""]]
    assert records.attempt().state == "succeeded"


def test_an_exception_thrown_in_and_not_caught_is_failed_and_comes_out(records: Records) -> None:
    error = ValueError("thrown")
    stream = numbers(3)
    next(stream)
    with pytest.raises(ValueError, match="thrown") as caught:
        stream.throw(error)
    assert caught.value is error
    assert (records.attempt().state, records.attempt().error_message) == ("failed", "thrown")


def test_between_items_the_execution_is_not_the_consumer_s(records: Records) -> None:
    with otelexec.execution("consumer") as consumer:
        stream = numbers(3)
        for _ in stream:
            assert otelexec.current_execution() is consumer
            assert trace.get_current_span() is consumer._execution.span
            with otelexec.execution("between"):
                pass
    assert {record.parent_execution_id for record in records.all() if record.name == "between"} == {consumer.id}
    assert records.named("numbers").parent_execution_id == consumer.id


def test_a_span_that_is_open_over_an_item_is_current_again_in_the_body_only(records: Records) -> None:
    tracer = trace.get_tracer("app")

    @otelexec.execution("stream")
    def stream() -> Iterator[int]:
        with tracer.start_as_current_span("inside") as span:
            yield 1
            assert trace.get_current_span() is span
            yield 2
        assert otelexec.current_execution().name == "stream"

    for _ in stream():
        assert not trace.get_current_span().get_span_context().is_valid
    assert records.span_named("inside").parent_span_id == records.attempt().span_id


def test_interleaved_generators_keep_to_themselves(records: Records) -> None:
    @otelexec.execution("ids")
    def ids() -> Iterator[str | None]:
        for _ in range(3):
            yield otelexec.current_execution().id

    first, second = ids(), ids()
    seen = list(zip(first, second, strict=True))
    assert len(set(seen)) == 1
    assert len(set(seen[0])) == 2
    assert not otelexec.current_execution()


def test_closed_early_it_is_an_interruption_and_its_cleanup_runs_inside(records: Records) -> None:
    cleaned = []

    @otelexec.execution("stream")
    def stream() -> Generator[int]:
        try:
            yield 1
            yield 2
        finally:
            cleaned.append(otelexec.current_execution().name)

    made = stream()
    next(made)
    made.close()
    assert cleaned == ["stream"]
    attempt = records.attempt()
    assert (attempt.state, attempt.classification, attempt.error_type) == ("cancelled", "interrupted", "GeneratorExit")
    assert not otelexec.current_execution()


def test_dropped_it_is_closed_at_once(records: Records) -> None:
    stream = numbers(3)
    next(stream)
    del stream
    assert records.attempt().classification == "interrupted"


def test_a_cleanup_that_raises_comes_out_of_close_and_the_record_stands(records: Records) -> None:
    error = OSError("disk")

    @otelexec.execution("stream")
    def stream() -> Generator[int]:
        try:
            yield 1
        finally:
            raise error

    made = stream()
    next(made)
    with pytest.raises(OSError, match="disk") as caught:
        made.close()
    assert caught.value is error
    assert (records.attempt().state, records.attempt().error_message) == ("failed", "disk")


def test_a_cleanup_that_raises_for_the_garbage_collector_is_failed_and_waits_for_no_lock(
    records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    @otelexec.execution("stream")
    def stream() -> Generator[int]:
        try:
            yield 1
        finally:
            raise OSError("disk")

    made = stream()
    next(made)
    with monkeypatch.context() as patch:
        patch.setattr(runtime.get().journal.group, "commit", None)  # what waits goes this way
        patch.setattr(sys, "unraisablehook", lambda _: None)
        del made
    assert (records.attempt().state, records.attempt().error_message) == ("failed", "disk")


def test_one_that_goes_on_when_it_is_closed_has_failed(records: Records) -> None:
    @otelexec.execution("stream")
    def stream() -> Generator[int]:
        try:
            yield 1
        except GeneratorExit:
            yield 2

    made = stream()
    next(made)
    with pytest.raises(RuntimeError, match="generator ignored GeneratorExit"):
        made.close()
    assert (records.attempt().state, records.attempt().error_type) == ("failed", "RuntimeError")


def test_one_that_returns_when_it_is_closed_gives_its_value_and_was_interrupted(records: Records) -> None:
    @otelexec.execution("stream")
    def stream() -> Generator[int, None, str]:
        with suppress(GeneratorExit):
            yield 1
        return "value"

    made = stream()
    next(made)
    with pytest.raises(StopIteration) as stop:
        made.throw(GeneratorExit())
    assert stop.value.value == "value"
    assert records.attempt().classification == "interrupted"


def test_one_that_was_never_started_leaves_no_record(records: Records) -> None:
    numbers(3).close()
    del_me = numbers(2)
    del del_me
    assert records.all() == []


def test_collected_as_garbage_during_a_commit_of_the_same_thread_it_waits_for_no_lock(
    records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The collector runs in the thread that holds the lead; the finalization is left for the next commit."""
    store = runtime.get().store
    assert store is not None
    commit = store.commit
    collected = threading.Event()

    class Knot:
        def __init__(self) -> None:
            self.me = self
            self.stream = numbers(3)
            next(self.stream)

    gc.disable()
    try:
        Knot()

        def collecting(writes: Any, **options: Any) -> list[object]:
            if any(isinstance(write, CloseAttempt) for write in writes) and not collected.is_set():
                collected.set()
                gc.collect()
            return commit(writes, **options)

        monkeypatch.setattr(store, "commit", collecting)
        with otelexec.execution("other"):
            pass
    finally:
        gc.enable()
    assert collected.is_set()
    assert records.named("other").state == "succeeded"
    until(lambda: records.named("numbers").state == "cancelled")


def test_collected_as_garbage_inside_the_store_s_transaction_it_deadlocks_nothing(records: Records) -> None:
    """Inside SQLite's own statements the store's lock is held by this very thread."""
    store = runtime.get().store
    assert store is not None

    class Knot:
        def __init__(self) -> None:
            self.me = self
            self.stream = numbers(3)
            next(self.stream)

    gc.disable()
    try:
        Knot()
        announce = store.announce

        def collecting() -> Any:
            gc.collect()
            return announce()

        store.announce = collecting
        store.close()  # the next commit opens a connection and announces the process, in the middle of its transaction
        done = threading.Thread(target=otelexec.execution("other")(gc.isenabled))
        done.start()
        done.join(20)
        assert not done.is_alive()
    finally:
        gc.enable()
    assert records.named("other").state == "succeeded"
    until(lambda: records.named("numbers").state == "cancelled")


def test_a_method_that_is_a_generator_and_wrong_arguments(records: Records) -> None:
    class Source:
        @otelexec.execution("source.items")
        def items(self, count: int) -> Iterator[int]:
            yield from range(count)

    assert list(Source().items(2)) == [0, 1]
    with pytest.raises(TypeError):
        list(Source().items())  # type: ignore[call-arg]


def test_a_context_manager_function_stays_one(records: Records) -> None:
    @otelexec.execution("managed")
    @contextmanager
    def managed() -> Iterator[int]:
        yield 1

    with managed() as value:
        assert value == 1
    assert records.one().state == "succeeded"


def test_a_block_inside_a_generator_that_is_dropped_is_closed(records: Records) -> None:
    def stream() -> Iterator[int]:
        with otelexec.execution("block"):
            yield 1

    made = stream()
    next(made)
    del made
    assert (records.attempt().state, records.attempt().classification) == ("cancelled", "interrupted")


def test_progress_of_a_generator_gets_through_while_another_thread_commits(records: Records) -> None:
    @otelexec.execution("stream")
    def stream() -> Iterator[int]:
        for number in range(3):
            otelexec.current_execution().progress(f"item {number}")
            yield number

    assert list(stream()) == [0, 1, 2]
    assert "item 2" in str(records.attempt().progress)


@otelexec.execution("letters")
async def letters(count: int) -> AsyncGenerator[str, str | None]:
    for number in range(count):
        assert otelexec.current_execution().name == "letters"
        await asyncio.sleep(0)
        try:
            said = yield "abc"[number]
        except KeyError as error:
            said = f"thrown {error}"
        if said is not None:
            otelexec.current_execution().set_output(said)


async def test_an_async_generator_is_one_execution_and_passes_everything_through(records: Records) -> None:
    stream = letters(3)
    assert await stream.__anext__() == "a"
    assert not otelexec.current_execution()
    assert await stream.asend("sent") == "b"
    assert await stream.athrow(KeyError("k")) == "c"
    with pytest.raises(StopAsyncIteration):
        await stream.__anext__()
    assert (records.attempt().state, records.attempt().output) == ("succeeded", "\"thrown 'k'\"")


async def test_an_async_generator_s_exception_comes_out_as_it_is(records: Records) -> None:
    error = ValueError("x")

    @otelexec.execution("stream")
    async def stream() -> AsyncIterator[int]:
        yield 1
        raise error

    with pytest.raises(ValueError, match="x") as caught:
        async for _ in stream():
            pass
    assert caught.value is error
    assert records.attempt().state == "failed"


async def test_an_async_generator_that_is_closed_early_is_an_interruption(records: Records) -> None:
    cleaned = []

    @otelexec.execution("stream")
    async def stream() -> AsyncGenerator[int, None]:
        try:
            yield 1
            yield 2
        finally:
            await asyncio.sleep(0)
            cleaned.append(otelexec.current_execution().name)

    async with aclosing(stream()) as made:
        async for _ in made:
            break
    assert cleaned == ["stream"]
    until(lambda: records.attempt().state != "running")  # a close that may not wait is left to whoever commits at the moment
    assert (records.attempt().state, records.attempt().classification) == ("cancelled", "interrupted")
    assert not otelexec.current_execution()


async def test_an_async_generator_s_cleanup_that_raises_comes_out_of_aclose_and_has_failed(records: Records) -> None:
    error = OSError("disk")

    @otelexec.execution("stream")
    async def stream() -> AsyncGenerator[int]:
        try:
            yield 1
        finally:
            await asyncio.sleep(0)
            raise error

    made = stream()
    await made.__anext__()
    with pytest.raises(OSError, match="disk") as caught:
        await made.aclose()
    assert caught.value is error
    until(lambda: (records.attempt().state, records.attempt().error_message) == ("failed", "disk"))


async def test_an_async_generator_that_goes_on_when_it_is_closed_has_failed(records: Records) -> None:
    @otelexec.execution("stream")
    async def stream() -> AsyncGenerator[int]:
        try:
            yield 1
        except GeneratorExit:
            yield 2

    made = stream()
    await made.__anext__()
    with pytest.raises(RuntimeError, match="async generator ignored GeneratorExit"):
        await made.aclose()
    until(lambda: (records.attempt().state, records.attempt().error_type) == ("failed", "RuntimeError"))


async def test_an_async_generator_that_returns_when_it_is_closed_ends_as_without_us(records: Records) -> None:
    @otelexec.execution("stream")
    async def stream() -> AsyncGenerator[int]:
        try:
            yield 1
        except GeneratorExit:
            return

    made = stream()
    await made.__anext__()
    with pytest.raises(StopAsyncIteration):
        await made.athrow(GeneratorExit())
    until(lambda: records.attempt().classification == "interrupted")  # as above


async def test_an_async_generator_that_is_dropped_is_closed_by_its_loop(records: Records) -> None:
    stream = letters(3)
    await stream.__anext__()
    del stream
    async with asyncio.timeout(10):
        while records.attempt().state == "running":
            await asyncio.sleep(0.005)
    assert records.attempt().classification == "interrupted"


def test_an_async_generator_whose_loop_is_gone_is_closed_when_it_is_dropped(records: Records) -> None:
    loop = asyncio.new_event_loop()
    stream = letters(3)
    assert loop.run_until_complete(stream.__anext__()) == "a"
    loop.close()
    del stream
    gc.collect()
    assert (records.attempt().state, records.attempt().classification) == ("cancelled", "interrupted")


@pytest.mark.parametrize("pauses", [0, 1, 3])
def test_an_async_generator_that_its_loop_closes_at_its_end_ends_as_without_us(
    records: Records, caplog: pytest.LogCaptureFixture, pauses: int
) -> None:
    cleaned = []

    @otelexec.execution("stream")
    async def stream() -> AsyncIterator[int]:
        try:
            yield 1
        finally:
            for _ in range(pauses):
                await asyncio.sleep(0)
            cleaned.append(otelexec.current_execution().name)

    async def first(items: AsyncIterator[int]) -> int:
        return await anext(items)

    left = stream()
    assert asyncio.run(first(left)) == 1
    assert cleaned == ["stream"]
    assert not caplog.records
    assert (records.attempt().state, records.attempt().classification) == ("cancelled", "interrupted")


def test_a_coroutine_that_is_closed_is_an_interruption(records: Records) -> None:
    """`.close()` in the middle of its body: an `await` there would be a RuntimeError, so the commit is made in place."""
    waiting = asyncio.Event()

    async def main() -> None:
        coroutine = otelexec.execution("x")(waiting.wait)()
        task = asyncio.ensure_future(coroutine)
        while not records.query_or_none("SELECT 1 FROM attempt"):
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.02)
        kept.append((coroutine, task))

    kept: list[Any] = []
    loop = asyncio.new_event_loop()
    loop.run_until_complete(main())
    ((coroutine, task),) = kept
    coroutine.close()
    assert (records.attempt().state, records.attempt().classification) == ("cancelled", "interrupted")
    task._log_destroy_pending = False
    loop.close()


@pytest.mark.parametrize("limit", [None, 60.0])
def test_a_coroutine_that_is_abandoned_is_collected_and_was_interrupted(records: Records, limit: float | None) -> None:
    cleaned = []

    @otelexec.execution("x", timeout=limit)
    async def waiting(begun: asyncio.Event) -> None:
        begun.set()
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            cleaned.append(True)

    async def main() -> None:
        begun = asyncio.Event()
        task = asyncio.ensure_future(waiting(begun))
        await begun.wait()
        task._log_destroy_pending = False  # type: ignore[attr-defined]

    loop = asyncio.new_event_loop()
    loop.run_until_complete(main())
    loop.close()
    del loop
    gc.collect()
    assert cleaned == [True]
    assert (records.attempt().state, records.attempt().classification) == ("cancelled", "interrupted")
    assert not runtime.get().executions


@pytest.mark.parametrize("kind", ["OpenAttempt", "CloseAttempt"])
def test_a_coroutine_that_is_closed_while_it_commits_loses_nothing(records: Records, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    store = runtime.get().store
    assert store is not None
    commit = store.commit
    begun, go = threading.Event(), threading.Event()

    def slow(writes: Any, **options: Any) -> list[object]:
        if any(type(write).__name__ == kind for write in writes) and not begun.is_set():
            begun.set()
            assert go.wait(10)
        return commit(writes, **options)

    monkeypatch.setattr(store, "commit", slow)
    kept: list[Any] = []

    async def main() -> None:
        coroutine = otelexec.execution("x")(asyncio.sleep)(0)
        kept.append((coroutine, asyncio.ensure_future(coroutine)))
        while not begun.is_set():
            await asyncio.sleep(0.005)

    loop = asyncio.new_event_loop()
    loop.run_until_complete(main())
    ((coroutine, task),) = kept
    coroutine.close()
    go.set()
    task._log_destroy_pending = False
    loop.close()
    expected = "succeeded" if kind == "CloseAttempt" else "cancelled"
    until(lambda: [record.state for record in records.all()] == [expected])


async def test_an_async_block_in_a_dropped_generator_takes_its_timeout_with_it(records: Records) -> None:
    """A timer that stays behind would cancel a task that has long gone on to other work."""

    async def stream() -> AsyncGenerator[int, None]:
        async with otelexec.execution("block", timeout=0.05):
            yield 1

    made = stream()
    await made.__anext__()
    await made.aclose()
    await asyncio.sleep(0.1)
    assert (records.attempt().state, records.attempt().classification) == ("cancelled", "interrupted")


async def test_items_may_be_taken_from_different_tasks(records: Records) -> None:
    stream = letters(3)
    taken = [await asyncio.create_task(stream.__anext__()) for _ in range(3)]
    assert taken == ["a", "b", "c"]
    with pytest.raises(StopAsyncIteration):
        await stream.__anext__()
    assert records.attempt().state == "succeeded"
    assert not otelexec.current_execution()


def test_a_contextvar_set_in_a_generator_is_seen_outside_as_without_us(records: Records) -> None:
    @otelexec.execution("stream")
    def stream() -> Iterator[int]:
        VAR.set("inside")
        yield 1

    def check() -> None:
        list(stream())
        assert VAR.get() == "inside"

    contextvars.copy_context().run(check)
