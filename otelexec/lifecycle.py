"""
The lifecycle of an attempt, written once as a generator of effects.

Correlate, start the span, open the attempt, call, classify, freeze the span, commit both: in this order and in this
place only. What needs I/O or the user's code is yielded to a driver (`drivers.py`), so that functions, coroutines and
generators share every line here.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan

from otelexec import context, otlp, semconv
from otelexec.classification import classify
from otelexec.context import EXECUTION_KEY
from otelexec.correlation import Correlation, Scope, with_ambient
from otelexec.effects import Effect, perform_without_waiting, run
from otelexec.endings import mark_finalized
from otelexec.errors import ExecutionBusy, ExecutionCancelled, StoreError
from otelexec.finalize import finalize, persist
from otelexec.ids import random_word
from otelexec.options import Options
from otelexec.running import RunningExecution
from otelexec.spans import row_of
from otelexec.store.rows import ExecutionRow
from otelexec.store.writes import Busy, OpenAttempt, Opened

if TYPE_CHECKING:
    from opentelemetry.trace import Span

    from otelexec.runtime import Runtime

MAX_HELD = 8
"""Exceptions of signal handlers that are held back for one commit: more of them mean to get out at any price."""


@dataclass(frozen=True, slots=True)
class Call:
    """
    Call the user's code. The driver sends back what it raised, or None.

    Attributes:
        subject: What runs: the execution, or the message that is published.
        context: The context to run it in.
    """

    subject: Any
    context: Context


Steps = Generator[Effect | Call, Any, None]


def lifecycle(runtime: Runtime, options: Options) -> Steps:  # noqa: C901 # the order of the steps is to be read in one place
    """
    Run one attempt.

    Args:
        runtime: The runtime of this process.
        options: The options of the executor.

    Yields:
        Effects, and a `Call` at most once.

    Raises:
        ExecutionCancelled: Somebody cancelled the execution before it started; its record is closed.
        ExecutionBusy: An exclusive attempt was not opened, since another one runs; nothing is recorded.
        StoreUnavailable: An exclusive attempt could not be opened; nothing is recorded.
        BaseException: What a signal handler raised outside the user's code, after the commit.
    """
    execution, run_context = begin(runtime, options)
    try:
        raised = held = yield from _open(runtime, execution)
    except GeneratorExit as error:  # dropped: the close carries the whole row, so it does not need the open
        raised = held = error
    # From here to the close whatever a signal handler raises is held, at every instruction at which one may run.
    try:
        if raised is None and execution.cancel_requested:
            message = f"Execution {execution.id} was cancelled before it started."
            raised = held = ExecutionCancelled(message, execution_id=execution.id)
        if raised is None:
            raised = yield Call(execution, run_context)
    except BaseException as error:  # a signal handler's, also between the driver's own instructions, or GeneratorExit
        raised = held = error
    ended_ns: int | None = None
    left = MAX_HELD
    while left:
        left -= 1
        try:
            ended_ns = ended_ns or execution.started_unix_ns + time.perf_counter_ns() - execution.clock_started_ns
            if execution.pid != os.getpid():
                execution.warn_inherited("close")
                return
            if isinstance(held, GeneratorExit):
                run(runtime, _close(runtime, execution, raised, ended_ns), how=perform_without_waiting)
            else:
                yield from _close(runtime, execution, raised, ended_ns)
            break
        except GeneratorExit as error:  # dropped: nobody is there any more who would perform an effect
            held = error
        except BaseException as error:  # an effect gives its errors back, so this is a signal handler's
            held = held or error
    if held is not None:
        raise held


def _close(runtime: Runtime, execution: RunningExecution, raised: BaseException | None, ended_ns: int) -> Generator[Effect, Any, None]:
    if execution.ending is None:
        execution.ending = classify(execution, raised)
    durable = yield from finalize(runtime, execution, execution.ending, ended_ns)
    if durable and raised is not None:
        mark_finalized(raised, execution.id)
    runtime.left(execution)


def _open(runtime: Runtime, execution: RunningExecution) -> Generator[Effect, Any, BaseException | None]:
    """Open the attempt; gives what a signal handler raised meanwhile."""
    held: BaseException | None = None
    refusal: Exception | None = None
    for _ in range(MAX_HELD):
        try:
            if runtime.records:
                write = execution.attempt_row if held is None else replace(execution.attempt_row, repeated=True)
                patience = runtime.settings.open_timeout_seconds
                answer = yield from persist(runtime.journal, write, durable=False, patience_seconds=patience)
                refusal = _refusal(execution, answer)
                if refusal is not None:
                    break
                if isinstance(answer, Opened):
                    execution.opened(answer)
            runtime.entered(execution)
            break
        except GeneratorExit:
            raise
        except BaseException as error:
            held = held or error
    # Nothing is called on the way out with an attempt that is open: at a call, too, a signal handler may run.
    if refusal is None:
        return held
    if execution.outer is not None:
        execution.outer.cores.release(execution.claim)
    raise held or refusal


def _refusal(execution: RunningExecution, answer: object) -> Exception | None:
    if isinstance(answer, Busy):
        return ExecutionBusy(f"Execution {execution.id} was not attempted: {answer.reason}", execution_id=execution.id)
    return answer if isinstance(answer, StoreError) and execution.options.exclusive else None


def begin(runtime: Runtime, options: Options) -> tuple[RunningExecution, Context]:
    """Assign the ids and start the span, before anything can fail."""
    base = otel_context.get_current()
    around = context.current_execution(base)
    parent = around if isinstance(around, RunningExecution) else None
    if not options.core or parent is None:
        return _begin(runtime, options, base, parent)
    claim = object()
    try:
        return _begin(runtime, options, base, parent, claim)
    except BaseException:  # a signal handler's, or there is no room left on the stack: the attempt stays the parent's to close
        parent.cores.release(claim)
        raise


def _begin(
    runtime: Runtime, options: Options, base: Context, parent: RunningExecution | None, claim: object = None
) -> tuple[RunningExecution, Context]:
    scope = context.current_scope(base)
    if scope is not None and not scope.holds_in(parent):
        scope = None
    role = None if claim is None or parent is None else _enter(parent, claim)
    outer = parent if role is not None else None
    takes_over = role == "takes_over"
    correlation = correlate_call(parent, scope, keeps_id=outer is not None)
    token = outer.token if takes_over and outer is not None else options.token or f"{random_word():016x}{random_word():016x}"
    execution = RunningExecution(runtime, options, correlation, token, outer)
    execution.claim = claim
    execution.span = _start_span(execution, runtime, scope, base)
    if runtime.records:
        if outer is not None:
            execution.message_id = outer.message_id
        elif scope is not None and scope.correlation is correlation:  # not of those that the message's own execution goes on to run
            execution.message_id = scope.message_id
        _describe(execution, runtime, base, takes_over=takes_over)
    run_context = with_ambient(base, correlation, execution.id)
    run_context = trace.set_span_in_context(execution.span, run_context)
    return execution, otel_context.set_value(EXECUTION_KEY, execution, run_context)


def _enter(parent: RunningExecution, claim: object) -> Literal["takes_over", "next"] | None:
    """Decide what a core called in an execution is: nothing but a child when that has ended, and inside another core."""
    return parent.cores.enter(claim) if parent.is_open and parent.outer is None else None


def _describe(execution: RunningExecution, runtime: Runtime, base: Context, *, takes_over: bool) -> None:
    """Make the attempt's row: all that others need to close it and to end its span."""
    outer, span = execution.outer, execution.span
    if isinstance(span, ReadableSpan):
        execution.start_attributes = otlp.attributes_of(span)
        execution.start_links = len(span.links)
    execution.attempt_row = OpenAttempt(
        token=execution.token,
        execution=execution_row(execution.name, execution.correlation, execution.message_id),
        process_id=runtime.process_id,
        started_unix_ns=execution.started_unix_ns,
        deadline_unix_ns=execution.deadline_unix_ns,
        span=row_of(span, execution.correlation.members()),
        outer_token=None if outer is None else outer.token,
        outer=None if outer is None else outer.attempt_row.span,
        outer_started_unix_ns=None if outer is None else outer.started_unix_ns,
        takes_over=takes_over or execution.options.accepted,
        opened=runtime.collector.open_ancestors(base),
        exclusive=execution.options.exclusive,
        takes_lapsed=execution.options.takes_lapsed,
        expected_attempts=execution.options.expected_attempts,
        number=execution.options.number,
    )


def correlate_call(parent: RunningExecution | None, scope: Scope | None, *, keeps_id: bool) -> Correlation:
    """
    Decide which execution a call is (README, Scope).

    Args:
        parent: The execution current in the caller's context, also one that has ended or was inherited over a fork.
        scope: The scope that holds there; None without one.
        keeps_id: Whether the call is a core and so belongs to the parent's execution.
    """
    if parent is None or (scope is not None and not parent.is_open):
        return Correlation.direct() if scope is None else scope.take()
    base = parent.correlation if scope is None else scope.correlation
    if not keeps_id:
        return base.child(parent.id)
    if base is parent.correlation:
        return base
    own = parent.correlation
    return base.model_copy(update={"execution_id": own.execution_id, "parent_execution_id": own.parent_execution_id})


def execution_row(name: str, correlation: Correlation, message_id: str | None = None) -> ExecutionRow:
    """
    Give the execution's side of a record.

    Args:
        name: Its name.
        correlation: Who asked for it.
        message_id: What the backend calls the message that asks for it; None when that isn't known, or there is none.
    """
    fields = dict(correlation.fields)
    if message_id is not None:
        fields[semconv.MESSAGING_MESSAGE_ID] = message_id
    return ExecutionRow(
        execution_id=correlation.execution_id,
        name=name,
        request_id=correlation.request_id,
        source=correlation.source,
        correlation=json.dumps(fields) if fields else "{}",
        parent_execution_id=correlation.parent_execution_id,
    )


def _start_span(execution: RunningExecution, runtime: Runtime, scope: Scope | None, base: Context) -> Span:
    options = execution.options
    links = options.links if scope is None else (*options.links, *scope.links)
    link_carried = runtime.settings.link_carried if options.link_carried is None else options.link_carried
    if link_carried:
        carried = trace.get_current_span(base).get_span_context()
        if carried.is_valid and carried.is_remote:
            links = (*links, trace.Link(carried))
            base = trace.set_span_in_context(trace.INVALID_SPAN, base)
    attributes = execution.correlation.members()
    if options.attributes:
        attributes = {**attributes, **options.attributes}
    return runtime.start_span(options.name, base, options.kind, attributes, links, execution.started_unix_ns)
