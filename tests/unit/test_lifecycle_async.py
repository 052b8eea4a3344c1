"""Coroutines and `async with` blocks under the lifecycle: only the commit leaves the loop."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import threading
import time
import types
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from typing import Any

import pytest
from opentelemetry import trace

import otelexec
from otelexec import runtime
from otelexec.store.sqlite import SqliteStore
from otelexec.store.writes import CloseAttempt
from tests.records import Records

VAR: contextvars.ContextVar[str] = contextvars.ContextVar("VAR", default="unset")


async def test_a_coroutine_is_recorded_before_its_await_returns(records: Records) -> None:
    @otelexec.execution("job")
    async def run(value: int) -> int:
        await asyncio.sleep(0)
        assert otelexec.current_execution().id is not None
        return value

    assert inspect.iscoroutinefunction(run)
    assert await run(3) == 3
    assert records.query("SELECT state FROM attempt") == [("succeeded",)]
    assert not otelexec.current_execution()


async def test_an_exception_of_a_coroutine_comes_out_as_the_same_object(records: Records) -> None:
    error = LookupError("x")

    @otelexec.execution
    async def run() -> None:
        await asyncio.sleep(0)
        raise error

    with pytest.raises(LookupError) as caught:
        await run()
    assert caught.value is error
    assert error.__context__ is None
    assert otelexec.was_finalized(error)
    assert records.attempt().state == "failed"


async def test_a_block_in_a_coroutine_is_an_execution(records: Records) -> None:
    async with otelexec.execution("batch") as run:
        await asyncio.sleep(0)
        assert otelexec.current_execution() is run
    assert not otelexec.current_execution()
    assert records.one().name == "batch"


async def test_the_loop_goes_on_while_a_commit_waits(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the commit happens on the loop's thread."""
    held = threading.Event()
    threads: set[int] = set()
    store = runtime.get().store
    assert store is not None
    commit = store.commit

    def slow(*args: Any, **kwargs: Any) -> list[object]:
        threads.add(threading.get_ident())
        held.wait(10)
        return commit(*args, **kwargs)

    monkeypatch.setattr(store, "commit", slow)

    @otelexec.execution
    async def run() -> None:
        pass

    task = asyncio.create_task(run())
    for _ in range(20):
        await asyncio.sleep(0.001)
    assert not task.done()
    held.set()
    await task
    assert threading.get_ident() not in threads


async def test_commits_go_on_though_the_loop_s_own_pool_is_full(records: Records) -> None:
    """`to_thread`'s pool may be full of the user's blocked work; the commit has a thread of its own."""
    stuck = threading.Event()
    loop = asyncio.get_running_loop()
    blocked = [loop.run_in_executor(None, stuck.wait) for _ in range(64)]
    try:
        async with asyncio.timeout(20):
            await otelexec.execution("x")(asyncio.sleep)(0)
    finally:
        stuck.set()
        await asyncio.gather(*blocked)
    assert records.one().state == "succeeded"


async def test_a_contextvar_set_in_the_body_is_seen_by_the_caller_as_without_us(records: Records) -> None:
    @otelexec.execution
    async def run() -> None:
        VAR.set("from the body")
        await asyncio.sleep(0)

    await run()
    assert VAR.get() == "from the body"


async def test_a_task_started_inside_is_a_child_and_may_outlive_it(records: Records) -> None:
    go = asyncio.Event()

    @otelexec.execution("late")
    async def late() -> None:
        await go.wait()

    async with otelexec.execution("parent"):
        task = asyncio.create_task(late())
    go.set()
    await task
    parent, child = records.named("parent"), records.named("late")
    assert child.parent_execution_id == parent.execution_id
    assert child.request_id == parent.request_id
    assert child.attempts[0].trace_id == parent.attempts[0].trace_id


async def test_concurrent_coroutines_share_commits_and_keep_to_themselves(records: Records) -> None:
    @otelexec.execution("job")
    async def run(number: int) -> tuple[int, str | None]:
        own = otelexec.current_execution().id
        for _ in range(3):
            await asyncio.sleep(0)
            assert otelexec.current_execution().id == own
        return number, own

    results = await asyncio.gather(*(run(number) for number in range(200)))
    assert [number for number, _ in results] == list(range(200))
    assert {own for _, own in results} == {record.execution_id for record in records.all()}


def runs(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any) -> Any:
        return asyncio.run(function(*args))

    return run


def passes_on(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any) -> Any:
        return function(*args)

    return call


def test_a_wrapper_that_runs_its_coroutine_itself_is_a_function(records: Records) -> None:
    @otelexec.execution("job")
    @runs
    async def run(value: int) -> int:
        await asyncio.sleep(0)
        return value

    assert run(3) == 3
    assert records.one().state == "succeeded"


async def test_a_wrapper_that_gives_its_coroutine_is_open_until_that_has_ended(records: Records) -> None:
    @otelexec.execution("job", timeout=20)
    @passes_on
    async def run(value: int) -> int:
        await asyncio.sleep(0)
        assert records.query("SELECT state FROM attempt") == [("running",)]
        assert otelexec.current_execution().name == "job"
        return value

    assert await run(3) == 3
    assert records.one().state == "succeeded"
    assert not otelexec.current_execution()


def unnamed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap as people do who don't know `functools.wraps`."""

    def call(*args: Any) -> Any:
        return function(*args)

    return call


async def test_a_coroutine_that_nothing_foretells_is_recorded_when_it_has_ended(records: Records) -> None:
    @otelexec.execution("job", timeout=0.02)
    @unnamed
    async def run() -> None:
        assert otelexec.current_execution().name == "job"
        await asyncio.Event().wait()

    with pytest.raises(TimeoutError):
        await run()
    assert records.attempt().state == "timed_out"


async def test_a_generator_that_is_awaited_is_a_coroutine(records: Records) -> None:
    @otelexec.execution("job")
    @types.coroutine
    def run() -> Generator[Any, Any, str]:
        yield from asyncio.sleep(0).__await__()
        return str(otelexec.current_execution().name)

    assert await run() == "job"
    assert records.one().state == "succeeded"


def test_a_generator_that_nothing_foretells_is_recorded_when_it_has_ended(records: Records) -> None:
    @otelexec.execution("job")
    @unnamed
    def run() -> Iterator[str | None]:
        yield otelexec.current_execution().name
        raise LookupError

    stream = run()
    assert next(stream) == "job"
    assert not otelexec.current_execution()
    assert records.query("SELECT state FROM attempt") == [("running",)]
    with pytest.raises(LookupError):
        next(stream)
    assert records.attempt().state == "failed"


async def test_an_async_generator_that_nothing_foretells_is_recorded_when_it_has_ended(records: Records) -> None:
    @otelexec.execution("job")
    @unnamed
    async def run() -> AsyncIterator[str | None]:
        yield otelexec.current_execution().name
        raise LookupError

    with pytest.raises(LookupError):
        assert [name async for name in run()] == ["job"]
    assert records.attempt().state == "failed"


def test_a_generator_that_nobody_takes_an_item_from_was_interrupted(records: Records) -> None:
    otelexec.execution("job")(lambda: (number for number in range(3)))()
    assert records.attempt().classification == "interrupted"


async def test_a_commit_that_was_refused_is_repeated_without_blocking_the_loop(records: Records) -> None:
    """A store that is locked for a moment: the coroutine waits, the loop does not, and nothing is lost."""
    import sqlite3

    async with otelexec.execution("first"):
        pass
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0.005)

    ticking = asyncio.create_task(tick())
    blocker = sqlite3.connect(records.path, isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    started = time.monotonic()
    task = asyncio.create_task(otelexec.execution("second")(asyncio.sleep)(0))
    await asyncio.sleep(0.2)
    before = ticks
    blocker.execute("ROLLBACK")
    blocker.close()
    await task
    ticking.cancel()
    assert before > 5
    assert time.monotonic() - started < 10
    assert records.named("second").state == "succeeded"


async def test_the_span_is_current_in_the_body_only(records: Records) -> None:
    @otelexec.execution("job")
    async def run() -> str:
        await asyncio.sleep(0)
        return f"{trace.get_current_span().get_span_context().span_id:016x}"

    seen = await run()
    assert records.attempt().span_id == seen
    assert not trace.get_current_span().get_span_context().is_valid


async def test_the_close_is_written_on_the_loop_s_behalf_once(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behaviours 15 and 16: however often and by whomever the end is reported, there is one write."""
    closes = 0
    store = runtime.get().store
    assert store is not None
    commit = store.commit

    def counted(writes: Any, **kwargs: Any) -> list[object]:
        nonlocal closes
        closes += sum(isinstance(write, CloseAttempt) for write in writes)
        return commit(writes, **kwargs)

    monkeypatch.setattr(store, "commit", counted)
    async with otelexec.execution("x"):
        pass
    assert closes == 1


async def test_a_finalizer_during_a_commit_may_run_an_execution_of_its_own(
    records: Records, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The garbage collector runs it in whatever thread it is: here in the one that commits for coroutines."""
    inner = otelexec.execution("inner")(lambda: None)

    @otelexec.execution("outer")
    async def outer() -> None: ...

    await outer()
    transact = SqliteStore._transact

    def interrupted(self: SqliteStore, *args: Any, **kwargs: Any) -> None:
        if threading.current_thread().name == "otelexec-committer":
            monkeypatch.setattr(SqliteStore, "_transact", transact)
            inner()
        transact(self, *args, **kwargs)

    monkeypatch.setattr(SqliteStore, "_transact", interrupted)
    await outer()
    runtime.get().flush()
    assert sorted((record.name, record.state) for record in records.all()) == [("inner", "succeeded"), *2 * [("outer", "succeeded")]]
    assert not caplog.records


def test_a_coroutine_or_generator_has_the_name_of_its_function() -> None:
    """A coroutine that nobody awaits is named in a warning, and a task's is in what asyncio shows of it."""

    class Engine:
        @otelexec.execution("run")
        async def run(self) -> None: ...

        @otelexec.execution("walk")
        def walk(self) -> Iterator[int]:
            yield 1

        @otelexec.execution("stream")
        async def stream(self) -> AsyncIterator[int]:
            yield 1

    coroutine = Engine().run()
    made: dict[str, Any] = {"run": coroutine, "walk": Engine().walk(), "stream": Engine().stream()}
    for name, given in made.items():
        assert (given.__name__, given.__qualname__) == (name, getattr(Engine, name).__qualname__)
    coroutine.close()
