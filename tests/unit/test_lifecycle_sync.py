"""Functions, methods and `with` blocks under the lifecycle: what is recorded, and that nothing else is changed."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import inspect
import json
import logging
import pickle
import signal
import subprocess
import sys
import threading
import time
import traceback
import typing
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from opentelemetry import trace

import otelexec
from otelexec import runtime
from otelexec.endings import describe
from otelexec.errors import ExecutionError, SettingsError
from otelexec.handle import NoExecution
from otelexec.store.sqlite import SqliteStore
from tests.records import Records
from tests.servers import ROOT


def test_a_return_is_one_succeeded_record_and_one_span_before_the_call_returns(records: Records) -> None:
    """Behaviour 1: the row stands, complete, when the caller has the value."""

    @otelexec.execution("invoice.run")
    def run(number: int) -> list[int]:
        return [number]

    assert run(7) == [7]
    (row,) = records.query("SELECT state, ended_unix_ns IS NOT NULL FROM attempt")
    assert row == ("succeeded", 1)
    record, attempt = records.one(), records.attempt()
    assert (record.name, record.state, record.source) == ("invoice.run", "succeeded", "direct")
    assert (attempt.attempt, attempt.error_type, attempt.error_message, attempt.classification) == (1, None, None, None)
    assert attempt.finalized_by == "executor"
    span = records.span(attempt.span_id)
    assert (span.name, span.kind, span.parent_span_id, span.events) == ("invoice.run", "internal", None, ())
    assert span.attributes["otelexec.attempt"] == 1
    assert record.ended_unix_ns == attempt.ended_unix_ns == span.end_unix_ns
    assert record.started_unix_ns == attempt.started_unix_ns == span.start_unix_ns


def test_the_value_that_comes_out_is_the_very_object(records: Records) -> None:
    value = object()
    assert otelexec.execution("x")(lambda: value)() is value


def test_an_exception_is_failed_and_comes_out_as_the_same_object_with_its_traceback(records: Records) -> None:
    """Behaviour 2."""
    error = ValueError("no such invoice")

    def fail() -> None:
        raise error

    @otelexec.execution
    def run() -> None:
        fail()

    with pytest.raises(ValueError, match="no such invoice") as caught:
        run()
    assert caught.value is error
    assert [frame.name for frame in traceback.extract_tb(error.__traceback__)][-2:] == ["run", "fail"]
    assert (error.__cause__, error.__context__) == (None, None)
    attempt = records.attempt()
    assert (attempt.state, attempt.error_type, attempt.error_message) == ("failed", "ValueError", "no such invoice")
    span = records.span(attempt.span_id)
    assert (span.status, span.status_message) == ("error", "no such invoice")
    (event,) = span.events
    assert event.name == "exception"
    assert event.attributes["exception.type"] == "ValueError"
    assert event.attributes["exception.message"] == "no such invoice"
    assert "raise error" in event.attributes["exception.stacktrace"]


def test_cause_and_context_of_an_exception_stay(records: Records) -> None:
    @otelexec.execution
    def run() -> None:
        try:
            raise KeyError("inner")
        except KeyError as error:
            raise RuntimeError("outer") from error

    with pytest.raises(RuntimeError) as caught:
        run()
    assert isinstance(caught.value.__cause__, KeyError)
    assert caught.value.__suppress_context__


def test_a_caught_exception_around_the_call_is_not_its_context(records: Records) -> None:
    """What we do on the way must not leave traces in `__context__`."""
    error = ValueError("x")

    def body() -> None:
        raise error

    with pytest.raises(ValueError, match="x"), otelexec.execution("block"):
        body()
    assert error.__context__ is None


@pytest.mark.parametrize("code", [0, None])
def test_a_body_that_exits_with_0_has_succeeded(records: Records, code: int | None) -> None:
    with pytest.raises(SystemExit) as caught, otelexec.execution("x"):
        raise SystemExit(code)
    assert caught.value.code == code
    attempt = records.attempt()
    assert (attempt.state, attempt.error_type) == ("succeeded", None)


@pytest.mark.parametrize("code", [1, -1, "text", True, False])
def test_a_body_that_exits_with_anything_else_has_failed(records: Records, code: object) -> None:
    with pytest.raises(SystemExit), otelexec.execution("x"):
        raise SystemExit(code)
    attempt = records.attempt()
    expected = "succeeded" if code == 0 else "failed"  # sys.exit(False) ends a process with 0
    assert (attempt.state, attempt.classification) == (expected, None)
    if expected == "failed":
        assert (attempt.error_type, attempt.error_message) == ("SystemExit", str(code))


def test_a_body_s_own_timeout_error_is_failed(records: Records) -> None:
    with pytest.raises(TimeoutError, match="upstream"), otelexec.execution("x", timeout=30):
        raise TimeoutError("upstream")
    assert (records.attempt().state, records.attempt().error_type) == ("failed", "TimeoutError")


def test_a_bare_decorator_names_the_execution_after_the_function(records: Records) -> None:
    @otelexec.execution
    def work() -> None:
        """Do it."""

    work()
    assert records.one().name == f"{__name__}.{work.__qualname__}"
    assert work.__name__ == "work"
    assert work.__doc__ == "Do it."


def test_a_signature_stays_as_it_was(records: Records) -> None:
    def work(a: int, /, b: str = "x", *args: int, c: bool, **kwargs: float) -> bytes:
        return b""

    decorated = otelexec.execution("x")(work)
    assert inspect.signature(decorated) == inspect.signature(work)
    assert decorated.__annotations__ == work.__annotations__  # what FastAPI, pydantic and typer ask for
    assert typing.get_type_hints(decorated) == typing.get_type_hints(work) != {}


class Engine:
    def __init__(self, factor: int) -> None:
        self.factor = factor

    @otelexec.execution("engine.method")
    def method(self, value: int) -> int:
        return self.factor * value

    @otelexec.execution("engine.class")
    @classmethod
    def of(cls, factor: int) -> Engine:
        return cls(factor)

    @classmethod
    @otelexec.execution("engine.class.inside")
    def inside(cls) -> str:
        return cls.__name__

    @otelexec.execution("engine.static")
    @staticmethod
    def static(value: int) -> int:
        return value

    @otelexec.execution
    @classmethod
    def bare(cls) -> str:
        return cls.__name__

    @otelexec.execution
    def __call__(self) -> int:
        return self.factor


class Turbo(Engine):
    pass


def test_methods_of_every_kind_are_called_with_what_they_expect(records: Records) -> None:
    assert Turbo.of(3).method(2) == 6
    assert isinstance(Turbo.of(1), Turbo)
    assert Turbo.inside() == "Turbo"
    assert (Engine.static(4), Engine(1).static(5)) == (4, 5)
    assert Turbo.bare() == "Turbo"
    assert Engine(9)() == 9
    names = ["engine.class", "engine.method", "engine.class", "engine.class.inside", "engine.static", "engine.static"]
    unnamed = [f"{__name__}.Engine.bare", f"{__name__}.Engine.__call__"]
    assert [record.name for record in records.all()] == [*names, *unnamed]


def test_a_partial_and_a_callable_object_can_be_executors(records: Records) -> None:
    class Job:
        def __call__(self, value: int) -> int:
            return value + 1

    def add(a: int, b: int) -> int:
        return a + b

    assert otelexec.execution(functools.partial(add, 1))(2) == 3
    assert otelexec.execution(Job())(2) == 3
    names = [record.name for record in records.all()]
    assert names[0].endswith("add")
    assert names[1].endswith("Job")


@otelexec.execution("pickled")
def by_name(value: int) -> int:
    return value + 1


@dataclasses.dataclass
class Press:
    """Has executors of every kind that can be got from a class or an object."""

    value: int = 1

    @otelexec.execution("press.run")
    def run(self) -> int:
        return self.value

    @otelexec.execution("press.make")
    @classmethod
    def make(cls) -> type:
        return cls

    @otelexec.execution("press.count")
    @staticmethod
    def count() -> int:
        return 3


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_decorated_function_or_method_can_be_pickled_as_it_could_before(records: Records, protocol: int) -> None:
    def again(executor: Any) -> Any:
        return pickle.loads(pickle.dumps(executor, protocol))

    assert again(by_name) is by_name
    assert again(Press(5).run)() == 5
    assert again(Press.run)(Press(6)) == 6
    assert again(Press.make)() is Press
    assert again(Press().count)() == 3
    assert [record.name for record in records.all()].count("press.run") == 2, "what comes out is still decorated"


def test_what_could_not_be_pickled_before_says_so(records: Records) -> None:
    def local() -> None: ...

    for executor in (otelexec.execution(local), otelexec.execution("partial")(functools.partial(by_name, 1))):
        with pytest.raises((pickle.PicklingError, AttributeError), match=r"can't pickle|Can't (pickle|get) local"):
            pickle.dumps(executor)


def test_a_decorated_function_is_copied_as_a_function_is(records: Records) -> None:
    assert copy.copy(by_name) is by_name
    assert copy.deepcopy({"call": by_name})["call"] is by_name
    assert copy.deepcopy(Press.count)() == 3
    press = Press(5)
    run = copy.deepcopy(press.run)
    press.value = 6
    assert (run(), copy.copy(press.run)()) == (5, 6)
    assert sorted(record.name for record in records.all()) == ["press.count", "press.run", "press.run"]


def test_a_decorated_method_is_taken_apart_and_put_together_as_a_method_is(records: Records) -> None:
    """As signals do it (Django's, blinker's) that hold their receivers weakly."""
    press = Press(5)
    assert weakref.WeakMethod(press.run)()() == 5  # type: ignore[misc]
    assert press.run.__func__(Press(6)) == 6  # type: ignore[attr-defined]
    assert weakref.WeakMethod(Press.make)()() is Press  # type: ignore[misc]
    assert Press.make.__func__(Press) is Press  # type: ignore[attr-defined]
    assert weakref.WeakMethod(Engine.inside)()() == "Engine"  # type: ignore[misc]
    assert Press.count is Press.count
    with pytest.raises(AttributeError):
        _ = Press.run.__func__  # type: ignore[attr-defined]
    names = ["press.run", "press.run", "press.make", "press.make", "engine.class.inside"]
    assert [record.name for record in records.all()] == names


def test_methods_that_are_chosen_or_filled_in_when_they_are_got_can_be_executors(records: Records) -> None:
    class Mill:
        @otelexec.execution
        @functools.singledispatchmethod
        def grind(self, what: object) -> str:
            return "anything"

        @grind.register
        def _(self, what: int) -> str:
            return "a number"

        def add(self, a: int, b: int) -> int:
            return a + b

        more = otelexec.execution(functools.partialmethod(add, 1))

    assert (Mill().grind("x"), Mill().grind(1), Mill().more(2)) == ("anything", "a number", 3)
    assert [record.name.rpartition(".")[2] for record in records.all()] == ["grind", "grind", "add"]


def test_two_calls_without_a_scope_are_two_executions(records: Records) -> None:
    run = otelexec.execution("x")(lambda: None)
    run()
    run()
    first, second = records.all()
    assert first.execution_id != second.execution_id
    assert first.request_id != second.request_id
    assert first.attempts[0].trace_id != second.attempts[0].trace_id


def test_a_block_gives_its_execution_and_serves_once_at_a_time(records: Records) -> None:
    block = otelexec.execution("batch")
    with block as run:
        assert run is otelexec.current_execution()
        assert run.name == "batch"
        with pytest.raises(ExecutionError, match="open already"):
            block.__enter__()
    assert not otelexec.current_execution()
    with block:
        pass
    assert [record.state for record in records.all()] == ["succeeded", "succeeded"]


@pytest.mark.parametrize("options", [{"attributes": 5}, {"kind": "consumer"}, {"links": 5}, {"classify": "ValueError"}])
def test_an_option_of_the_wrong_kind_is_refused_where_it_is_given(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(SettingsError, match=f"^{name} of an execution can't be"):
        otelexec.execution("job", **options)
    with pytest.raises(SettingsError, match=f"^{name} of an execution can't be"):
        otelexec.wrap_executor("json:dumps", **options)


def test_a_name_is_text() -> None:
    wrong: Any = 5
    with pytest.raises(SettingsError, match=r"^An execution's name is text, not 5"):
        otelexec.execution(wrong)


def test_a_block_without_a_name_is_refused_before_anything_is_recorded(records: Records) -> None:
    with pytest.raises(SettingsError, match="no name"):
        otelexec.execution().__enter__()
    assert records.all() == []


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), "3"])
def test_a_timeout_that_is_none_is_refused(timeout: float) -> None:
    with pytest.raises(SettingsError, match="timeout"):
        otelexec.execution("x", timeout=timeout)
    with pytest.raises(SettingsError, match="timeout"):
        otelexec.wrap_executor("a.module:that_never_is", timeout=timeout)


_LONE = "lone \ud800"  # as in a file name that is no UTF-8
_WRITTEN = "lone \N{REPLACEMENT CHARACTER}"


def test_names_and_reasons_that_utf_8_can_not_hold_are_recorded_all_the_same(records: Records) -> None:
    class Odd(Exception): ...

    Odd.__qualname__ = _LONE
    with otelexec.execution(_LONE):
        pass
    with otelexec.execution("paused") as run:
        run.pause(_LONE)
    with otelexec.execution("refused"):
        otelexec.reject(_LONE)
    otelexec.reject(_LONE, name="outside")
    with otelexec.publish("sent " + _LONE):
        pass
    with pytest.raises(Odd), otelexec.execution("odd"):
        raise Odd
    assert {record.name: record.state for record in records.all()} == {
        _WRITTEN: "succeeded",
        "paused": "paused",
        "refused": "rejected",
        "outside": "rejected",
        "sent " + _WRITTEN: "queued",
        "odd": "failed",
    }
    assert records.named("paused").attempts[0].classification == _WRITTEN
    assert records.named("refused").attempts[0].error_type == _WRITTEN
    assert _WRITTEN in str(records.named("odd").attempts[0].error_type)
    assert records.span_named(_WRITTEN).attributes["otelexec.outcome"] == "succeeded"


def test_a_function_has_a_deadline_to_look_at_and_is_not_stopped(records: Records) -> None:
    with otelexec.execution("x", timeout=0.01) as run:
        assert run.deadline is not None
        assert abs(run.deadline - time.time()) < 5
        time.sleep(0.03)
    attempt = records.attempt()
    assert attempt.state == "succeeded"
    assert attempt.deadline_unix_ns == attempt.started_unix_ns + 10_000_000


def test_inside_is_current_and_outside_is_a_handle_that_does_nothing(records: Records) -> None:
    outside = otelexec.current_execution()
    assert not outside
    assert (outside.id, outside.attempt, outside.snapshot, outside.deadline, outside.cancel_requested) == (None, None, None, None, False)
    outside.progress("x", done=1, total=2)
    outside.set_output(1)
    outside.pause("x", snapshot={})
    with otelexec.execution("x") as run:
        assert otelexec.current_execution() is run
        assert run
        assert trace.get_current_span().get_span_context().span_id == run._execution.span.get_span_context().span_id
        assert f"{run.id}" in repr(run)
    assert not otelexec.current_execution()
    assert not trace.get_current_span().get_span_context().is_valid
    assert records.one().state == "succeeded"


def test_a_handle_shows_what_code_may_ask_and_tell_and_nothing_else() -> None:
    shown = {name for name in dir(otelexec.Execution) if not name.startswith("_")}
    assert shown == {name for name in dir(NoExecution) if not name.startswith("_")}
    assert shown == {
        *("id", "name", "correlation", "attempt", "deadline", "cancel_requested", "snapshot"),
        *("progress", "set_output", "pause"),
    }


def test_a_handle_goes_with_whoever_holds_it(records: Records) -> None:
    """A cycle between it and what is behind it would leave every execution to the garbage collector."""
    gc.disable()
    try:
        with otelexec.execution("x") as run:
            gone = weakref.ref(run)
            del run
            assert gone() is None
            assert otelexec.current_execution().name == "x"
    finally:
        gc.enable()


def test_the_record_has_the_output_that_was_set_last(records: Records) -> None:
    with otelexec.execution("x") as run:
        run.set_output(1)
        run.set_output({"rows": [1, 2], "at": time.struct_time})
    output = records.attempt().output
    assert output is not None
    assert output.startswith('{"rows":[1,2],"at":')


def test_an_output_that_is_too_large_is_left_out_with_a_warning(
    records: Records, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTELEXEC_MAX_OUTPUT_BYTES", "100")
    with otelexec.execution("x") as run:
        run.set_output("ok")
        run.set_output("x" * 200)
    assert records.attempt().output == '"ok"'
    assert "otelexec.output.dropped" in caplog.text


class Loop:
    def __repr__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize("value", [object(), {1, 2}, float("nan"), "\ud800", {(1, 2): 3}, Loop()])
def test_no_output_whatever_it_is_alters_the_result(records: Records, value: object) -> None:
    @otelexec.execution("x")
    def run() -> str:
        otelexec.current_execution().set_output(value)
        return "done"

    assert run() == "done"
    assert records.attempt().state == "succeeded"


def test_the_last_progress_marker_stands_on_the_closed_record(records: Records) -> None:
    """Behaviours 9, 10 and 54: the marker that came last is on the row, however many came just before the end."""
    with otelexec.execution("x") as run:
        run.progress("block 1", done=1, total=3)
        (marker,) = records.query("SELECT progress FROM attempt")
        assert '"block 1"' in str(marker[0])
        run.progress("block 2", done=2, total=3)
        run.progress("block 3", done=3, total=3)
    progress = records.attempt().progress
    assert progress is not None
    assert progress.startswith('{"message":"block 3","done":3,"total":3,"at_unix_ns":')


def test_a_marker_that_comes_after_the_end_changes_nothing(records: Records) -> None:
    with otelexec.execution("x") as run:
        run.progress("in time")
    run.progress("too late")
    run.set_output("too late")
    run.pause("too late")
    attempt = records.attempt()
    assert attempt.progress is not None
    assert "in time" in attempt.progress
    assert (attempt.output, attempt.state) == (None, "succeeded")


def test_a_marker_is_of_a_bounded_size_and_always_json(records: Records) -> None:
    with otelexec.execution("x") as run:
        run.progress("8 MB" * 2_000_000, done=float("nan"), total=float("inf"))
    marker = json.loads(records.attempt().progress or "")
    assert (len(marker["message"]), marker.keys()) == (4_096, {"message", "at_unix_ns"})


def test_a_throttled_marker_gets_into_the_store_while_the_work_goes_on(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTELEXEC_PROGRESS_SECONDS", "0.05")
    with otelexec.execution("x") as run:
        run.progress("first")
        run.progress("second")
        deadline = time.monotonic() + 10
        while "second" not in str(records.query("SELECT progress FROM attempt")[0][0]):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_classifier_knows_endings_of_its_own_and_may_fail(records: Records, caplog: pytest.LogCaptureFixture) -> None:
    def classify(error: BaseException) -> otelexec.Ending | None:
        if isinstance(error, KeyError):
            return otelexec.Ending("timed_out", "soft_limit", "SoftLimit", "30 s")
        if isinstance(error, IndexError):
            raise OSError("the classifier's own")
        if isinstance(error, TypeError):
            return otelexec.Ending("success")
        if isinstance(error, ArithmeticError):
            return True  # type: ignore[return-value] # what a careless one gives
        return None

    for error in (KeyError("a"), IndexError("b"), OSError("c"), TypeError("d"), ArithmeticError("e")):
        with pytest.raises(type(error)) as caught, otelexec.execution(type(error).__name__, classify=classify):
            raise error
        assert caught.value is error
    attempts = {record.name: record.attempts[0] for record in records.all()}
    assert (attempts["KeyError"].state, attempts["KeyError"].classification) == ("timed_out", "soft_limit")
    assert {attempts[name].state for name in ("IndexError", "OSError", "TypeError", "ArithmeticError")} == {"failed"}
    assert "otelexec.execution.classify" in caplog.text


def test_was_finalized_tells_outer_code_that_the_record_is_durable(records: Records) -> None:
    """Behaviour 17."""
    with pytest.raises(ValueError, match="x") as caught, otelexec.execution("x"):
        raise ValueError("x")
    assert otelexec.was_finalized(caught.value)
    assert not otelexec.was_finalized(ValueError("never ran"))


def test_attributes_kind_and_links_are_those_that_were_asked_for(records: Records) -> None:
    context = trace.SpanContext(0x1234, 0x56, is_remote=True, trace_flags=trace.TraceFlags(1))
    options: dict[str, Any] = {"kind": trace.SpanKind.CONSUMER, "attributes": {"tenant": "a"}, "links": (trace.Link(context),)}
    with otelexec.execution("x", **options):
        trace.get_current_span().set_attribute("rows", 3)
        trace.get_current_span().add_event("halfway")
    span = records.span_named("x")
    assert (span.kind, span.attributes["tenant"], span.attributes["rows"]) == ("consumer", "a", 3)
    assert [event.name for event in span.events] == ["halfway"]
    assert [(link.trace_id, link.span_id) for link in span.links] == [(f"{0x1234:032x}", f"{0x56:016x}")]


def test_a_body_that_changes_the_whole_context_does_not_reach_its_caller(records: Records) -> None:
    from opentelemetry import context as otel_context

    @otelexec.execution
    def run() -> None:
        otel_context.attach(otel_context.Context({"leak": 1}))

    run()
    assert otel_context.get_value("leak") is None
    assert not otelexec.current_execution()


def test_a_signal_s_handler_during_the_body_may_run_an_execution_of_its_own(records: Records) -> None:
    inner = otelexec.execution("inner")(lambda: None)
    before = signal.signal(signal.SIGUSR1, lambda *_: inner())
    try:
        with otelexec.execution("outer"):
            signal.raise_signal(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert records.named("inner").parent_execution_id == records.named("outer").execution_id


@pytest.mark.parametrize("moment", ["open", "close"])
def test_a_signal_s_handler_during_a_commit_may_run_an_execution_of_its_own(
    records: Records, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, moment: str
) -> None:
    inner = otelexec.execution("inner")(lambda: None)
    otelexec.execution("first")(lambda: None)()
    transact = SqliteStore._transact

    def interrupted(self: SqliteStore, *args: Any, **kwargs: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            monkeypatch.setattr(SqliteStore, "_transact", transact)
            signal.raise_signal(signal.SIGUSR1)
        transact(self, *args, **kwargs)

    @otelexec.execution("outer")
    def run() -> None:
        if moment == "close":
            monkeypatch.setattr(SqliteStore, "_transact", interrupted)

    before = signal.signal(signal.SIGUSR1, lambda *_: inner())
    try:
        if moment == "open":
            monkeypatch.setattr(SqliteStore, "_transact", interrupted)
        run()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert {record.name: record.state for record in records.all()} == dict.fromkeys(("first", "outer", "inner"), "succeeded")
    # Neither did it wait in vain for the commit that it had interrupted, nor is the store said to be away.
    assert not caplog.records


def test_recursion_to_the_limit_is_recorded_as_what_it_is(records: Records) -> None:
    @otelexec.execution("deep")
    def run() -> None:
        def down() -> None:
            down()

        down()

    with pytest.raises(RecursionError):
        run()
    assert records.attempt().error_type == "RecursionError"


@pytest.mark.parametrize(
    ("make", "name"), [(lambda: ValueError("x"), "ValueError"), (lambda: ExecutionError("x"), "otelexec.errors.ExecutionError")]
)
def test_an_error_type_is_the_fully_qualified_class(make: Callable[[], Exception], name: str) -> None:
    assert describe(make(), 100) == (name, "x")


def test_the_first_execution_configures_from_the_environment(records: Records, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="otelexec")
    assert runtime._current is None
    with otelexec.execution("x"):
        pass
    assert "otelexec.configured" in caplog.text
    assert str(records.path) in caplog.text
    assert records.one().state == "succeeded"


def test_what_a_finalizer_calls_at_the_interpreter_s_end_is_run(records: Records) -> None:
    """Nothing can be imported any more, and so no store opened."""
    code = """
import otelexec

@otelexec.execution("job")
def job(said):
    print(said)

class Finalized:
    def __del__(self):
        job("finalizer")

kept = Finalized()
job("before")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "before\nfinalizer\n"
    assert done.stderr == "otelexec.exit.unrecorded: job has no record: the interpreter is shutting down\n"
    assert records.one().state == "succeeded"


@pytest.mark.parametrize("given", [None, 7, (each for each in "ab")])
def test_what_can_not_be_called_is_refused(given: Any) -> None:
    """`create_task(execution("job")(job()))` ran the coroutine, and recorded nothing."""
    with pytest.raises(SettingsError, match=f"not of a {type(given).__name__}: give it the function"):
        otelexec.execution("job")(given)


def test_a_property_is_refused_since_reading_it_would_call_nothing(records: Records) -> None:
    for wrong in (property(lambda _: 1), functools.cached_property(lambda _: 1)):
        decorate: Any = otelexec.execution("read")
        with pytest.raises(SettingsError, match="@property above"):
            decorate(wrong)

    class Engine:
        @property
        @otelexec.execution("read")
        def value(self) -> int:
            return 7

    assert Engine().value == 7
    assert records.named("read").state == "succeeded"
