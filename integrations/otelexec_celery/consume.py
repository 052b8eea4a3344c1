"""
The running side: an attempt around each task, closed with its span where the body ends.

The tracer that Celery builds for a task does much after the body: callbacks, the result, signals. What wraps it gets
control only after the backend shows success. So the body itself is wrapped as well, inside the tracer; there the attempt
is closed, and what goes on afterwards finds its context still in place. A run that never reaches the body is closed by
the outer wrapper.
"""

from __future__ import annotations

import functools
import inspect
import logging
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from types import CellType
from typing import Any, Final

from celery import states
from celery.app import trace as celery_trace
from celery.exceptions import Ignore
from celery.utils.time import maybe_iso8601
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context import Context

from otelexec import runtime as _runtime
from otelexec import semconv
from otelexec.context import EXECUTION_KEY
from otelexec.drivers import advance, expect
from otelexec.endings import Ending, raised_by_signal_handler
from otelexec.errors import ExecutionCancelled
from otelexec.execution import Execution, Options
from otelexec.lifecycle import Steps, lifecycle
from otelexec.propagation import incoming
from otelexec.store.writes import FAILED, SUCCEEDED
from otelexec.w3c import decode_trace
from otelexec_celery import carrier, endings
from otelexec_celery.settings import CHOICES, SYSTEM

logger = logging.getLogger("otelexec.celery")

BODY: Final = "fun"
"""The name under which the closure that `build_tracer` makes holds the task's body."""

TASK_EXECUTION: ContextVar[Execution | None] = ContextVar("otelexec_celery_execution", default=None)
"""The execution of the task that is being run here."""

_run: ContextVar[Run | None] = ContextVar("otelexec_celery_run", default=None)


class Run:
    """
    One run of a task's tracer.

    Args:
        task: The task.
        task_id: Its id.
        request: The request that the tracer was given.
    """

    __slots__ = ("_closed", "_runtime", "_steps", "before", "context", "execution", "reached_body", "task")

    context: Context
    execution: Execution

    def __init__(self, task: Any, task_id: str, request: Mapping[str, Any]) -> None:
        self.task = task
        self.before = otel_context.get_current()
        self.reached_body = False
        self._closed = False
        self._runtime = _runtime.get()
        self._steps: Steps | None = None
        context, options = _prepare(task, task_id, request, self.before)
        otel_context.attach(context)
        try:
            steps = lifecycle(self._runtime, options)
            call = expect(advance(self._runtime, steps))
        finally:
            otel_context.attach(self.before)
        self._steps = steps
        self.context = call.context
        self.execution = call.subject

    def call(self, body: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call the task's body, and close the attempt with its end."""
        self.reached_body = True
        around = otel_context.get_current()
        # Not what the tracer left current: another instrumentation may have replaced it in `task_prerun`.
        otel_context.attach(self.context)
        try:
            value = body(*args, **kwargs)
            otel_context.attach(around)
        except BaseException as error:
            otel_context.attach(around)
            self.close(error)
            raise
        self.close(None)
        return value

    def close(self, error: BaseException | None, ending: Ending | None = None) -> None:
        """Close the attempt, once; an ending goes before what is made of the exception."""
        steps, self._steps = self._steps, None
        if steps is None:
            return
        if ending is not None:
            self.execution.ending = ending
        advance(self._runtime, steps, error)


def _prepare(task: Any, task_id: str, request: Mapping[str, Any], before: Context) -> tuple[Context, Options]:
    """Make the context that the message asks for, and the options of the attempt."""
    found = carrier.find(request)
    eager = bool(request.get("is_eager"))
    links: list[trace.Link] = []
    previous = decode_trace(carrier.text_of(found, carrier.PREVIOUS) or "", None)
    if previous is not None:
        links.append(trace.Link(previous))
    enqueued = carrier.time_of(found, carrier.ENQUEUED)
    context = before
    if found or not eager:
        # An eager run without headers is a call like any other, in whatever scope it is made.
        base = otel_context.set_value(EXECUTION_KEY, None, before) if eager else Context()
        context, _ = incoming(carrier.carrier_of(found), message_id=task_id, enqueued_unix_ns=enqueued, context=base)
    hard_limit = _hard_limit(task, request)
    attributes = attributes_of(task_id, request)
    latency = queue_latency(enqueued, request)
    if latency is not None:
        attributes[semconv.QUEUE_LATENCY] = latency
    return context, Options(
        task.name,
        kind=trace.SpanKind.CONSUMER,
        attributes=attributes,
        links=tuple(links),
        link_carried=CHOICES.use_span_links,
        classify=endings.classifier(hard_limit),
        timeout=hard_limit,
    )


def attributes_of(task_id: str | None, request: Mapping[str, Any]) -> dict[str, Any]:
    """Give the attributes of a CONSUMER span."""
    delivery = request.get("delivery_info") or {}
    known = {
        semconv.MESSAGING_SYSTEM: SYSTEM,
        semconv.MESSAGING_OPERATION_NAME: "process",
        semconv.MESSAGING_OPERATION_TYPE: "process",
        semconv.MESSAGING_DESTINATION_NAME: delivery.get("routing_key"),
        semconv.MESSAGING_MESSAGE_ID: task_id,
    }
    return {key: value for key, value in known.items() if isinstance(value, str) and value}


def queue_latency(enqueued_unix_ns: int | None, request: Mapping[str, Any]) -> float | None:
    """
    Give how long a message waited, in seconds, from when it was sent or from when it was due, whichever is later.

    Args:
        enqueued_unix_ns: When it was sent; None where it doesn't say.
        request: Its request.
    """
    if enqueued_unix_ns is None:
        return None
    since = enqueued_unix_ns / 1e9
    eta = request.get("eta")
    if eta:
        try:
            due: datetime = maybe_iso8601(eta)
            since = max(since, (due if due.tzinfo is not None else due.replace(tzinfo=UTC)).timestamp())
        except (TypeError, ValueError, AttributeError):
            pass
    return max(0.0, time.time() - since)


def _hard_limit(task: Any, request: Mapping[str, Any]) -> float | None:
    limits = request.get("timelimit") or (None, None)
    seconds = limits[0] or task.time_limit
    return float(seconds) if isinstance(seconds, int | float) and seconds > 0 else None


def wrap_build_tracer(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `build_tracer`, so that every tracer runs its task as an attempt."""

    @functools.wraps(original)
    def build_tracer(name: str, task: Any, *args: Any, **kwargs: Any) -> Any:
        return wrap_tracer(original(name, task, *args, **kwargs), task)

    return build_tracer


def can_wrap(build_tracer: Any) -> bool:
    """Tell whether the tracers of this Celery hold the task's body where it is looked for."""
    code = getattr(inspect.unwrap(build_tracer), "__code__", None)
    return code is not None and BODY in code.co_cellvars


def wrap_tracer(tracer: Callable[..., Any], task: Any) -> Callable[..., Any]:
    """
    Wrap a tracer, and the body of its task inside it.

    Args:
        tracer: What `build_tracer` gave.
        task: Its task.
    """
    cell = _body_cell(tracer)
    if cell is None or getattr(tracer, "otelexec_unwrap", None) is not None:
        return tracer
    body = cell.cell_contents

    def run_body(*args: Any, **kwargs: Any) -> Any:
        run = _run.get()
        if run is None or run.task is not task or run.reached_body:
            return body(*args, **kwargs)
        return run.call(body, args, kwargs)

    cell.cell_contents = run_body

    @functools.wraps(tracer)
    def trace_task(uuid: str, args: Any, kwargs: Any, request: Any = None) -> Any:
        if not CHOICES.active:
            return tracer(uuid, args, kwargs, request)
        return _trace(tracer, task, uuid, args, kwargs, request)

    def unwrap() -> Callable[..., Any]:
        cell.cell_contents = body
        return tracer

    trace_task.otelexec_unwrap = unwrap  # type: ignore[attr-defined]
    return trace_task


def _body_cell(tracer: Any) -> CellType | None:
    """Find the cell of a tracer's closure that holds the task's body; other libraries may have wrapped the tracer."""
    seen = 0
    while tracer is not None and seen < 16:  # noqa: PLR2004 (nobody wraps that often; it ends a circle)
        code, closure = getattr(tracer, "__code__", None), getattr(tracer, "__closure__", None)
        if code is not None and closure and BODY in code.co_freevars and "task" in code.co_freevars:
            cell: CellType = closure[code.co_freevars.index(BODY)]
            return cell
        tracer = getattr(tracer, "__wrapped__", None)
        seen += 1
    return None


def _trace(tracer: Callable[..., Any], task: Any, uuid: str, args: Any, kwargs: Any, request: Any) -> Any:
    before = otel_context.get_current()
    try:
        run = Run(task, uuid, request if isinstance(request, Mapping) else {})
    except ExecutionCancelled as error:
        return _revoked(task, uuid, args, kwargs, request, error)
    except Exception as error:
        if raised_by_signal_handler(error):
            raise
        logger.exception("otelexec.celery.open: %s[%s] runs without a record", task.name, uuid)
        return tracer(uuid, args, kwargs, request)
    run_token = _run.set(run)
    execution_token = TASK_EXECUTION.set(run.execution)
    otel_context.attach(run.context)
    try:
        result = tracer(uuid, args, kwargs, request)
    except BaseException as error:
        _left(run, error)
        raise
    else:
        _returned(run, result)
        return result
    finally:
        TASK_EXECUTION.reset(execution_token)
        _run.reset(run_token)
        # By value: others may have attached and detached in between, in any order.
        otel_context.attach(before)


def _left(run: Run, error: BaseException) -> None:
    """Close what an exception left the tracer with."""
    if run.reached_body:
        _result_not_stored(run)
    else:
        run.close(error)


def _returned(run: Run, result: Any) -> None:
    """Close the attempt of a tracer that returned without its body, and look what became of the body's result."""
    info = getattr(result, "info", None)
    state = getattr(info, "state", None)
    if run.reached_body:
        if state == states.FAILURE:
            _result_not_stored(run)
        return
    if info is None:
        # Celery found the result of an earlier delivery (`worker_deduplicate_successful_tasks`).
        run.close(None, Ending(SUCCEEDED, endings.DEDUPLICATED))
        return
    error = info.retval
    run.close(error if isinstance(error, BaseException) else RuntimeError(f"the task ended as {state} before its body"))


def _result_not_stored(run: Run) -> None:
    """Note beside a success that its result could not be kept."""
    ending = run.execution.ending
    if ending is not None and ending.state == SUCCEEDED and ending.classification is None:
        logger.warning("otelexec.celery.%s: %s %s", endings.RESULT_NOT_STORED, run.task.name, run.execution.id)


def _revoked(task: Any, uuid: str, args: Any, kwargs: Any, request: Any, error: ExecutionCancelled) -> Any:
    """Give what the tracer of a revoked task would: its execution was cancelled before it started, and is not run."""
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
