"""
The running side: an attempt around each task, closed with its span where the body ends.

The tracer that Celery builds for a task does much after the body: callbacks, the result, signals. What wraps it gets
control only after the backend shows success. So the body itself is wrapped as well, inside the tracer; there the attempt
is closed, and what goes on afterwards finds its context still in place. A run that never reaches the body is closed by
the outer wrapper.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import replace
from types import CellType, FunctionType, TracebackType
from typing import Any, Final, Self

from celery import states
from celery.app import trace as celery_trace
from celery.exceptions import Ignore, InvalidTaskError, Reject, Retry
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context import Context

from otelexec import metrics, semconv
from otelexec import runtime as _runtime
from otelexec.classification import classify
from otelexec.context import EXECUTION_KEY
from otelexec.drivers import advance, expect
from otelexec.endings import Ending, describe, raised_by_signal_handler
from otelexec.errors import ExecutionCancelled, StoreError
from otelexec.lifecycle import Steps, lifecycle
from otelexec.propagation import entries
from otelexec.running import RunningExecution
from otelexec.store.rows import REJECTED, SUCCEEDED
from otelexec.store.writes import AmendAttempt, Contribute, ReadContributions
from otelexec.w3c import decode_trace, encode_traceparent
from otelexec_celery import carrier, chords, endings
from otelexec_celery.messages import hard_limit_of, open_context, options_of, soft_limit_of
from otelexec_celery.settings import CHOICES

logger = logging.getLogger("otelexec.celery")

BODY: Final = "fun"
"""The name under which the closure that `build_tracer` makes holds the task's body."""

MAX_WRAPPERS: Final = 64
"""Functions looked at in search of the body: nobody wraps that deep."""

TASK_EXECUTION: ContextVar[RunningExecution | None] = ContextVar("otelexec_celery_execution", default=None)
"""The execution of the task that is being run here."""

_early: dict[str, Run | ExecutionCancelled] = {}
"""Runs that were opened before their message was acknowledged, by delivery."""

_run: ContextVar[Run | None] = ContextVar("otelexec_celery_run", default=None)


class Run:
    """
    One run of a task's tracer.

    Args:
        task: The task.
        task_id: Its id.
        request: The request that the tracer was given.
    """

    __slots__ = ("_attributes", "_chord", "_runtime", "_steps", "before", "context", "execution", "reached_body", "task")

    context: Context
    execution: RunningExecution

    def __init__(self, task: Any, task_id: str, request: Mapping[str, Any]) -> None:
        self.task = task
        self.before = otel_context.get_current()
        self.reached_body = False
        self._runtime = _runtime.get()
        self._steps: Steps | None = None
        if request.get("is_eager") and not request.get("retries") and otel_context.get_value(EXECUTION_KEY) is not None:
            request = {**request, carrier.NESTED: None}  # a copy of its caller's, whose message is another one
        self._chord = None if request.get("is_eager") else chords.body_id(request.get("chord"))
        options = options_of(
            task.name,
            task_id,
            request,
            hard_limit=hard_limit_of(task, request),
            soft_limit=soft_limit_of(task, request),
            links=_links(carrier.find(request), self._runtime),
            accepted=carrier.DELIVERY in request and not task.acks_late,
            requeues=carrier.DELIVERY in request and bool(task.acks_late),
            pid=os.getpid(),
        )
        otel_context.attach(open_context(task_id, request, self.before))
        try:
            steps = lifecycle(self._runtime, options)
            call = expect(advance(self._runtime, steps))
        finally:
            otel_context.attach(self.before)
        self._steps = steps
        self.context = call.context
        self.execution = call.subject
        self._attributes = options.attributes or {}
        latency = self._attributes.get(semconv.QUEUE_LATENCY)
        if latency is not None:
            metrics.waited(latency, task.name, self._attributes)

    def begin(self) -> Context:
        """Make it current for the task's body, and give the context that the tracer has around it."""
        self.reached_body = True
        around = otel_context.get_current()
        # Not what the tracer left current: another instrumentation may have replaced it in `task_prerun`.
        otel_context.attach(self.context)
        return around

    def fail(self, error: BaseException, around: Context, *, propagates: bool) -> None:
        """
        Close the attempt of a body that raised.

        Args:
            error: What it raised.
            around: What `begin` gave.
            propagates: Whether the tracer lets exceptions out to the caller of an eager run, who gets a `Retry` then, and no retry.
        """
        otel_context.attach(around)
        ending = None
        if isinstance(error, Retry) and error.is_eager and propagates:
            ending = replace(classify(self.execution, error), retrying=False)
        elif isinstance(error, Retry) and error.is_eager and error.sig is not None:
            self._carry_on(error.sig)
        self.close(error, ending)

    def succeed(self, around: Context) -> None:
        """Close the attempt of a body that returned."""
        try:
            otel_context.attach(around)
            self.close(None)
        except BaseException as error:  # a limit that struck on the way: Celery takes it for the task's
            otel_context.attach(around)
            self.close(error)
            raise

    def _carry_on(self, signature: Any) -> None:
        """Have the signature of an eager retry, which is not sent, name its execution and this attempt all the same."""
        span = self.execution.span.get_span_context()
        options = signature.options
        headers = dict(options.get("headers") or {})
        carried = entries(self.context, self.execution.correlation, message_id=options.get("task_id"))
        if span.is_valid:
            carried[carrier.PREVIOUS] = encode_traceparent(span)
        carrier.write(headers, carried)
        options["headers"] = headers

    @property
    def is_open(self) -> bool:
        """Whether its attempt is still to be closed."""
        return self._steps is not None and inspect.getgeneratorstate(self._steps) != inspect.GEN_CLOSED

    def _contribute(self, key: str) -> None:
        """Note the span of a chord's header, before anybody can see that the last of them is done."""
        span = self.execution.span.get_span_context()
        if span.is_valid and span.trace_flags.sampled and self._runtime.records:
            self._runtime.journal.write(Contribute(key, self.execution.id, f"{span.trace_id:032x}", f"{span.span_id:016x}"))

    def close(self, error: BaseException | None, ending: Ending | None = None) -> None:
        """Close the attempt, once; an ending goes before what is made of the exception."""
        steps = self._steps
        if steps is None or not self.is_open:
            return
        if ending is not None:
            self.execution.ending = ending
        if error is None and self._chord is not None:
            self._contribute(self._chord)
        if self.execution.ending is None:
            self.execution.ending = classify(self.execution, error)
        seconds = (time.perf_counter_ns() - self.execution.clock_started_ns) / 1e9
        advance(self._runtime, steps, error)
        metrics.took(seconds, self.task.name, self._attributes, self.execution.ending)


def open_early(task: Any, task_id: str, request: Mapping[str, Any]) -> Run | None:
    """
    Open the attempt of a task that this very thread is about to run, before its message is acknowledged.

    Args:
        task: The task.
        task_id: Its id.
        request: Its request, with the delivery's token.

    Returns:
        None where somebody cancelled it; then it won't be run.
    """
    token = request[carrier.DELIVERY]
    try:
        run = _early[token] = Run(task, task_id, request)
    except ExecutionCancelled as error:
        _early[token] = error
        return None
    return run


def call_trace(trace: Callable[..., Any], name: str, task_id: str, request: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """
    Call what a pool without processes calls for a message, and close the run that was opened early if our tracer never came to it.

    Args:
        trace: `fast_trace_task` or its like.
        name: The task's name.
        task_id: Its id.
        request: Its request.
        *args: For `trace`.
        **kwargs: For `trace`.
    """
    try:
        done = trace(name, task_id, request, *args, **kwargs)
    except BaseException as error:
        give_up(request, error)
        raise
    if (run := _unclaimed(request)) is not None:  # Celery is not instrumented any more since it was opened
        failed, value, _ = done
        run.close(endings.error_of(value) if failed else None)
    return done


def give_up(request: Mapping[str, Any], error: BaseException) -> None:
    """Close the run that was opened early for a request which its tracer will not come to."""
    if (run := _unclaimed(request)) is not None:
        run.close(error)


def _unclaimed(request: Mapping[str, Any]) -> Run | None:
    early = _early.pop(request.get(carrier.DELIVERY, ""), None)
    return early if isinstance(early, Run) else None


def _links(found: Mapping[str, Any], runtime: _runtime.Runtime) -> tuple[trace.Link, ...]:
    """Give the links of a chord's body to its headers."""
    key = carrier.text_of(found, carrier.JOINS)
    if key is None or not runtime.records or runtime.journal.spooling:
        return ()
    try:  # not by `write`, which would keep a question in the spool
        spans = runtime.journal.group.commit(ReadContributions(key), durable=False, timeout_seconds=runtime.settings.open_timeout_seconds)
    except StoreError as error:
        logger.warning("otelexec.celery.links: the body of a chord has no links to its headers: %s", error)
        return ()
    if not isinstance(spans, list):
        return ()
    contexts = [decode_trace(f"00-{trace_id}-{span_id}-01", None) for trace_id, span_id in spans]
    return tuple(trace.Link(context) for context in contexts if context is not None)


def wrap_build_tracer(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `build_tracer`, so that every tracer runs its task as an attempt."""

    @functools.wraps(original)
    def build_tracer(name: str, task: Any, *args: Any, **kwargs: Any) -> Any:
        return wrap_tracer(original(name, task, *args, **kwargs), task, propagates=bool(kwargs.get("propagate")))

    return build_tracer


def can_wrap(build_tracer: Any) -> bool:
    """Tell whether the tracers of this Celery hold the task's body where it is looked for."""
    return any(BODY in function.__code__.co_cellvars for function in _inside(build_tracer))


def wrap_tracer(tracer: Callable[..., Any], task: Any, *, propagates: bool = False) -> Callable[..., Any]:
    """
    Wrap a tracer, and the body of its task inside it.

    Args:
        tracer: What `build_tracer` gave.
        task: Its task.
        propagates: Whether it lets the body's exceptions out.
    """
    cell = _body_cell(tracer)
    if cell is None or getattr(tracer, "otelexec_unwrap", None) is not None:
        return tracer
    body = cell.cell_contents

    def run_body(*args: Any, **kwargs: Any) -> Any:
        run = _run.get()
        if run is None or run.task is not task or run.reached_body:
            return body(*args, **kwargs)
        around = run.begin()
        try:
            value = body(*args, **kwargs)
        except BaseException as error:
            run.fail(error, around, propagates=propagates)
            raise
        run.succeed(around)
        return value

    # Python names the function in the TypeError for arguments that are none: the user's text is to be the user's.
    for name in ("__module__", "__name__", "__qualname__"):
        setattr(run_body, name, str(getattr(body, name, type(task).__name__)))
    cell.cell_contents = run_body

    @functools.wraps(tracer)
    def trace_task(uuid: str, args: Any, kwargs: Any, request: Any = None) -> Any:
        run = _opened(task, uuid, request) if CHOICES.active else None
        if run is None:
            return tracer(uuid, args, kwargs, request)
        if isinstance(run, ExecutionCancelled):
            return _revoked(task, (uuid, args, kwargs, request), run)
        with _Tracing(run) as tracing:
            tracing.make_current()
            tracing.result = tracer(uuid, args, kwargs, request)
        return tracing.result

    def unwrap() -> Callable[..., Any]:
        cell.cell_contents = body
        return tracer

    trace_task.otelexec_unwrap = unwrap  # type: ignore[attr-defined] # a function's own
    return trace_task


def _body_cell(tracer: Any) -> CellType | None:
    """Find the cell of a tracer's closure that holds the task's body."""
    for function in _inside(tracer):
        names = function.__code__.co_freevars
        if BODY in names and "task" in names and function.__closure__ is not None:
            return function.__closure__[names.index(BODY)]
    return None


def _inside(function: Any) -> Iterator[FunctionType]:
    """Give a function and those that it wraps, in whatever way: other libraries wrap tracers as well."""
    found, seen = [function], set[int]()
    while found and len(seen) < MAX_WRAPPERS:
        candidate = found.pop(0)
        if not isinstance(candidate, FunctionType) or id(candidate) in seen:
            continue
        seen.add(id(candidate))
        yield candidate
        found.append(getattr(candidate, "__wrapped__", None))
        for cell in candidate.__closure__ or ():
            with contextlib.suppress(ValueError):  # not filled yet
                found.append(cell.cell_contents)


def _opened(task: Any, uuid: str, request: Any) -> Run | ExecutionCancelled | None:
    """Give the run of a tracer that is called, or why there is none; None if it is to go on without a record."""
    found = request if isinstance(request, Mapping) else {}
    try:
        return _early.pop(found.get(carrier.DELIVERY, ""), None) or Run(task, uuid, found)
    except ExecutionCancelled as error:
        return error
    except Exception as error:
        if raised_by_signal_handler(error):
            raise
        logger.exception("otelexec.celery.open: %s[%s] runs without a record", task.name, uuid)
        return None


class _Tracing:
    """What is current while a tracer runs, and what is made of its end."""

    __slots__ = ("_before", "_outer_execution", "_outer_run", "_run_here", "result")

    result: Any

    def __init__(self, run: Run) -> None:
        self._run_here = run
        self._before = otel_context.get_current()
        self._outer_run, self._outer_execution = _run.get(), TASK_EXECUTION.get()

    def __enter__(self) -> Self:
        return self

    def make_current(self) -> None:
        """Make the run current; not in `__enter__`, as a signal handler may raise in the middle of it."""
        _run.set(self._run_here)
        TASK_EXECUTION.set(self._run_here.execution)
        otel_context.attach(self._run_here.context)

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        try:
            if error is None:
                _returned(self._run_here, self.result)
            else:
                _left(self._run_here, error)
        finally:
            # By value: others may have attached and detached in between, in any order.
            TASK_EXECUTION.set(self._outer_execution)
            _run.set(self._outer_run)
            otel_context.attach(self._before)


def _left(run: Run, error: BaseException) -> None:
    """Close what an exception left the tracer with."""
    if run.is_open:
        run.close(error)
    elif not isinstance(error, Reject | MemoryError):  # these the task's own handlers raised, once the result was stored
        _went_wrong_after(run, error)


def _returned(run: Run, result: Any) -> None:
    """Close the attempt of a tracer that returned without its body, and look what became of the body's result."""
    info, retval = getattr(result, "info", None), getattr(result, "retval", None)
    state = getattr(info, "state", None)
    if run.reached_body:
        if info is not None and state == states.FAILURE:
            run.close(info.retval)  # if a limit struck before that was done
            _went_wrong_after(run, info.retval)
    elif info is not None:
        error = info.retval
        run.close(error if isinstance(error, BaseException) else RuntimeError(f"the task ended as {state} before its body"))
    elif isinstance(retval, celery_trace.ExceptionInfo):
        # Celery acknowledges it, and has no result: the tracer failed before it had made a request.
        error = endings.error_of(retval)
        invalid = isinstance(error, InvalidTaskError)
        run.close(error, Ending(REJECTED, endings.MALFORMED, endings.MALFORMED, str(error)) if invalid else None)
    else:
        # Celery found the result of an earlier delivery (`worker_deduplicate_successful_tasks`).
        run.close(None, Ending(SUCCEEDED, endings.DEDUPLICATED))


def _went_wrong_after(run: Run, error: BaseException) -> None:
    """Note beside a success that its result could not be kept, or what was to follow not be sent."""
    ending = run.execution.ending
    if ending is not None and ending.state == SUCCEEDED and ending.classification is None:
        what = endings.after_success(error)
        runtime = _runtime.get()
        if runtime.records:
            runtime.journal.write(AmendAttempt(run.execution.id, run.execution.token, what))
        error_type, text = describe(error, runtime.settings.max_error_chars)
        logger.warning("otelexec.celery.%s: %s %s succeeded, then came %s: %s", what, run.task.name, run.execution.id, error_type, text)


def _revoked(task: Any, call: tuple[str, Any, Any, Any], error: ExecutionCancelled) -> Any:
    """Give what the tracer of a revoked task would: its execution was cancelled before it started, and is not run."""
    uuid, args, kwargs, request = call
    context = celery_trace.Context(request or {}, args=args, kwargs=kwargs, called_directly=False)
    try:
        store = not celery_trace.get_actual_ignore_result(task, context) if hasattr(celery_trace, "get_actual_ignore_result") else True
        task.backend.mark_as_revoked(uuid, str(error), request=context, store_result=store)
    except Exception:
        logger.exception("otelexec.celery.revoke: the result backend did not take that %s[%s] was cancelled", task.name, uuid)
    ignored = Ignore(str(error))
    try:
        raise ignored
    except Ignore:
        einfo = celery_trace.ExceptionInfo(internal=True)
    logger.info("otelexec.celery.cancelled: %s[%s] was cancelled before it started", task.name, uuid)
    return celery_trace.trace_ok_t(einfo, celery_trace.TraceInfo(states.IGNORED, ignored), 0.0, None)
