"""Every way in which code can end: what the record and the span say, and that what comes out is what was raised."""

# ruff: noqa: ASYNC110, PT012 (waits for other threads and processes; the signal comes inside the block)

from __future__ import annotations

import asyncio
import dataclasses
import functools
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from opentelemetry import context as otel_context

import otelexec
from otelexec import runtime
from otelexec.store.writes import CloseAttempt, OpenAttempt, Write
from tests.records import Records


@contextmanager
def handling(number: int, handler: Any) -> Iterator[None]:
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def on_signal(number: int, frame: Any) -> None:
    sys.exit(0)


def on_signal_with(code: int, number: int, frame: Any) -> None:
    sys.exit(code)


def on_signal_once(number: int, frame: Any) -> None:
    """Uninstall itself first, so that a second signal kills."""
    signal.signal(number, signal.SIG_DFL)
    sys.exit(3)


class Stopper:
    def method(self, number: int, frame: Any) -> None:
        sys.exit("stop")

    def __call__(self, number: int, frame: Any) -> None:
        self.deeper()

    def deeper(self) -> None:
        raise SystemExit(1)


@pytest.mark.parametrize(
    "handler",
    [
        on_signal,
        functools.partial(on_signal_with, 7),
        functools.partial(functools.partial(on_signal_with), 0),
        Stopper().method,
        Stopper(),
        on_signal_once,
        lambda *_: sys.exit(2),
    ],
    ids=["function", "partial", "nested partial", "method", "object", "uninstalled", "lambda"],
)
def test_an_exit_raised_by_a_signal_handler_is_an_interruption_whatever_its_code(records: Records, handler: Any) -> None:
    with handling(signal.SIGTERM, handler), pytest.raises(SystemExit), otelexec.execution("x"):
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(10)
    attempt = records.attempt()
    assert (attempt.state, attempt.classification, attempt.error_type) == ("cancelled", "interrupted", "SystemExit")
    assert records.one().state == "cancelled"


def test_an_exit_in_the_body_is_the_body_s_also_where_a_handler_is_installed(records: Records) -> None:
    with handling(signal.SIGTERM, on_signal), pytest.raises(SystemExit), otelexec.execution("x"):
        sys.exit(4)
    assert (records.attempt().state, records.attempt().error_message) == ("failed", "4")


def test_a_real_sigint_in_the_body_is_an_interruption_and_comes_out(records: Records) -> None:
    with handling(signal.SIGINT, signal.default_int_handler), pytest.raises(KeyboardInterrupt) as caught, otelexec.execution("x"):
        os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait(10)
    attempt = records.attempt()
    assert (attempt.state, attempt.classification, attempt.error_type) == ("cancelled", "interrupted", "KeyboardInterrupt")
    assert otelexec.was_finalized(caught.value)


class Interrupting:
    """
    Sends a real SIGINT to this process from inside a commit, before or after the transaction.

    It stands where the store's own `commit` stood, so everything above it is as it is in production.
    """

    def __init__(self, kind: type[Write], *, after: bool, times: int = 1) -> None:
        store = runtime.get().store
        assert store is not None
        self._commit = store.commit
        self._kind = kind
        self._after = after
        self.left = times

    def __call__(self, writes: Any, **options: Any) -> list[object]:
        hit = self.left > 0 and any(isinstance(write, self._kind) for write in writes)
        if hit and not self._after:
            self._send()
        results = self._commit(writes, **options)
        if hit and self._after:
            self._send()
        return results

    def _send(self) -> None:
        self.left -= 1
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("after", [False, True], ids=["before the transaction", "after the transaction"])
@pytest.mark.parametrize("times", [1, 3])
def test_a_sigint_during_the_close_is_held_until_it_is_committed(
    records: Records, monkeypatch: pytest.MonkeyPatch, after: bool, times: int
) -> None:
    """Behaviour 7: the work was done, so it is recorded as done; then Ctrl-C takes its way."""
    interrupting = Interrupting(CloseAttempt, after=after, times=times)
    monkeypatch.setattr(runtime.get().store, "commit", interrupting)
    with handling(signal.SIGINT, signal.default_int_handler), pytest.raises(KeyboardInterrupt):
        otelexec.execution("x")(lambda: 1)()
    assert interrupting.left < times
    attempt = records.attempt()
    assert (attempt.state, attempt.finalized_by) == ("succeeded", "executor")
    otelexec.execution("next")(lambda: 1)()
    assert records.named("next").state == "succeeded"


@pytest.mark.parametrize("after", [False, True], ids=["before the transaction", "after the transaction"])
def test_a_sigint_during_the_open_means_that_the_function_is_not_called(
    records: Records, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    called = False

    @otelexec.execution("x")
    def run() -> None:
        nonlocal called
        called = True

    monkeypatch.setattr(runtime.get().store, "commit", Interrupting(OpenAttempt, after=after))
    with handling(signal.SIGINT, signal.default_int_handler), pytest.raises(KeyboardInterrupt):
        run()
    assert not called
    attempt = records.attempt()
    assert (attempt.attempt, attempt.state, attempt.classification) == (1, "cancelled", "interrupted")


def test_a_sigint_during_the_close_of_a_failure_does_not_hide_what_is_recorded(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime.get().store, "commit", Interrupting(CloseAttempt, after=False))
    error = ValueError("x")

    def fail() -> None:
        raise error

    with handling(signal.SIGINT, signal.default_int_handler), pytest.raises(KeyboardInterrupt) as caught:
        otelexec.execution("x")(fail)()
    assert caught.value.__context__ is error
    assert (records.attempt().state, records.attempt().error_message) == ("failed", "x")


@pytest.mark.parametrize("moment", ["its text", "its traceback"])
def test_a_sigint_while_an_exception_is_described_is_not_taken_for_the_exceptions_own(records: Records, moment: str) -> None:
    left = [signal.SIGINT]

    def interrupt(now: str) -> None:
        if now == moment and left:
            signal.raise_signal(left.pop())

    class Slow(Exception):
        def __str__(self) -> str:
            interrupt("its text")
            return "x"

        def __getattribute__(self, name: str) -> Any:
            if name == "__notes__":
                interrupt("its traceback")
            return super().__getattribute__(name)

    def fail() -> None:
        raise Slow

    with handling(signal.SIGINT, signal.default_int_handler), pytest.raises(KeyboardInterrupt):
        otelexec.execution("x")(fail)()
    assert (records.attempt().state, records.attempt().error_message) == ("failed", "x")


# The interpreter itself swallows what is raised in a weak reference's callback, and says so.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_interruptions_at_any_instant_leave_no_attempt_open_and_no_lock_taken(records: Records) -> None:
    """A timer's signal hits whatever instruction is being executed, of the library too; each execution ends closed."""

    class Alarm(Exception):
        pass

    def ring(*_: Any) -> None:
        raise Alarm

    run = otelexec.execution("x")(lambda: None)
    run()
    rounds, rung = 400, 0
    with handling(signal.SIGALRM, ring):
        for number in range(rounds):
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.00005 + (number % 80) * 0.00001)
                run()
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Alarm:
                rung += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
    assert rung > rounds // 20
    assert otel_context.get_current() == {}
    run()
    runtime.get().flush()
    states = [attempt.state for record in records.all() for attempt in record.attempts]
    assert states[-1] == "succeeded"
    assert "running" not in states


async def test_a_cancelled_coroutine_is_an_interruption(records: Records) -> None:
    task = asyncio.create_task(otelexec.execution("x")(asyncio.sleep)(60))
    while not records.query_or_none("SELECT 1 FROM attempt"):
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.01)
    task.cancel("why")
    with pytest.raises(asyncio.CancelledError) as caught:
        await task
    assert caught.value.args == ("why",)
    attempt = records.attempt()
    assert (attempt.state, attempt.classification) == ("cancelled", "interrupted")
    assert records.span(attempt.span_id).status == "unset"


async def test_cancelling_twice_and_three_times_during_the_commit_does_not_lose_it(
    records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = runtime.get().store
    assert store is not None
    go, begun, commit = threading.Event(), threading.Event(), store.commit

    def slow(writes: Any, **options: Any) -> list[object]:
        if any(isinstance(write, CloseAttempt) for write in writes):
            begun.set()
            assert go.wait(10)
        return commit(writes, **options)

    monkeypatch.setattr(store, "commit", slow)
    task = asyncio.create_task(otelexec.execution("x")(asyncio.sleep)(0, "result"))
    while not begun.is_set():
        await asyncio.sleep(0.001)
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0.005)
        assert not task.done()
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()
    assert records.attempt().state == "succeeded"


async def test_cancelled_while_it_is_being_opened_the_function_is_not_called(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    called = False

    @otelexec.execution("x")
    async def run() -> None:
        nonlocal called
        called = True

    store = runtime.get().store
    assert store is not None
    go, begun, commit = threading.Event(), threading.Event(), store.commit

    def slow(writes: Any, **options: Any) -> list[object]:
        if any(isinstance(write, OpenAttempt) for write in writes):
            begun.set()
            assert go.wait(10)
        return commit(writes, **options)

    monkeypatch.setattr(store, "commit", slow)
    task = asyncio.create_task(run())
    while not begun.is_set():
        await asyncio.sleep(0.001)
    task.cancel()
    await asyncio.sleep(0.01)
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not called
    assert (records.attempt().state, records.attempt().classification) == ("cancelled", "interrupted")


class BrokenText(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


class Unsettable(Exception):
    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(name)


class Slotted(Exception):
    __slots__ = ("code",)


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    code: int


class HidesItself(Exception):
    def __getattribute__(self, name: str) -> Any:
        if name == "__dict__" or not name.startswith("__"):
            raise RuntimeError(name)
        return super().__getattribute__(name)


class Nameless(type):
    def __getattribute__(cls, name: str) -> Any:
        if name in ("__qualname__", "__module__"):
            raise RuntimeError(name)
        return super().__getattribute__(name)


class OfNoName(Exception, metaclass=Nameless):
    pass


class Text(str):
    __slots__ = ()

    def __len__(self) -> int:
        raise RuntimeError("no length")


class OfOwnText(Exception):
    def __str__(self) -> str:
        return Text("own")


class Nowhere:
    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no comparison")

    __hash__ = object.__hash__


class OfNoModule(Exception):
    __module__: Any = Nowhere()


class Exits(Exception):
    def __getattribute__(self, name: str) -> Any:
        if name == "__notes__":
            raise SystemExit
        return super().__getattribute__(name)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (BrokenText(), "<its text could not be made: RuntimeError>"),
        (Unsettable("x"), "x"),
        (Slotted("x"), "x"),
        (Frozen(3), "3"),
        (HidesItself("x"), "x"),
        (OfNoName("x"), "x"),
        (OfOwnText(), "own"),
        (OfNoModule("x"), "x"),
        (Exits("x"), "x"),
        (ValueError("lone \ud800"), "lone \\ud800"),
        (ValueError("nul \x00"), "nul \x00"),
        (ValueError(), ""),
        (ExceptionGroup("many", [ValueError("a"), ExceptionGroup("more", [KeyError("b")])]), "many (2 sub-exceptions)"),
    ],
    ids=[
        *("str", "setattr", "slots", "frozen", "getattribute", "metaclass", "own text", "module", "exits"),
        *("surrogate", "nul", "empty", "group"),
    ],
)
def test_an_awkward_exception_is_recorded_and_comes_out_as_it_is(records: Records, error: Exception, message: str) -> None:
    """Behaviour 19."""

    def fail() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        otelexec.execution("x")(fail)()
    assert caught.value is error
    assert otelexec.was_finalized(error)
    attempt = records.attempt()
    assert (attempt.state, attempt.error_message, attempt.finalized_by) == ("failed", message, "executor")
    (event,) = records.span(attempt.span_id).events
    assert event.attributes["exception.message"] == message
    assert event.attributes["exception.type"] == attempt.error_type
    assert event.unix_ns == attempt.ended_unix_ns


def test_a_message_of_a_megabyte_is_cut_in_the_record_and_bounded_in_the_span(records: Records) -> None:
    with pytest.raises(ValueError, match="xxx") as caught, otelexec.execution("x"):
        raise ValueError("x" * 1_000_000)
    assert len(str(caught.value)) == 1_000_000
    attempt = records.attempt()
    assert attempt.error_message is not None
    assert len(attempt.error_message) == 4096
    span = records.span(attempt.span_id)
    assert len(span.encoded) < 100_000
    assert "raise ValueError" in span.events[0].attributes["exception.stacktrace"]


async def test_a_group_of_a_task_group_comes_out_of_an_async_block(records: Records) -> None:
    async def fail() -> None:
        raise ValueError("x")

    with pytest.raises(ExceptionGroup) as caught:
        async with otelexec.execution("x"), asyncio.TaskGroup() as group:
            group.create_task(fail())
    assert isinstance(caught.value.exceptions[0], ValueError)
    assert records.attempt().error_type == "ExceptionGroup"


@pytest.mark.parametrize("make", [lambda: BaseException("x"), lambda: GeneratorExit("x")], ids=["base", "generator exit"])
def test_other_base_exceptions_raised_by_a_body_are_recorded_too(records: Records, make: Callable[[], BaseException]) -> None:
    error = make()

    def fail() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        otelexec.execution("x")(fail)()
    assert caught.value is error
    expected = "cancelled" if isinstance(error, GeneratorExit) else "failed"
    assert records.attempt().state == expected


def test_the_traceback_that_comes_out_ends_where_the_body_raised(records: Records) -> None:
    @otelexec.execution("x")
    def run() -> None:
        exec(compile("1 / 0", "<body>", "exec"))

    with pytest.raises(ZeroDivisionError) as caught:
        run()
    assert [frame.filename for frame in traceback.extract_tb(caught.value.__traceback__)][-1] == "<body>"
