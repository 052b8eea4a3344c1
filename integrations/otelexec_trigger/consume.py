"""
The running side of the local engine: an attempt around each call of a task.

Opened exclusively in the store, so that of any number of workers one attempts a run; closed in the one commit that ends
the run as well, or leaves it to be retried.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final

from opentelemetry import context as otel_context
from opentelemetry.context import Context
from opentelemetry.trace import SpanKind

from otelexec import metrics, semconv
from otelexec import runtime as _runtime
from otelexec.classification import INTERRUPTED, INTERRUPTIONS
from otelexec.context import current_execution
from otelexec.correlation import with_ids
from otelexec.drivers import call_async, call_sync
from otelexec.endings import Classifier, Ending, describe, raised_by_signal_handler
from otelexec.errors import ExecutionBusy, ExecutionCancelled, OtelexecError
from otelexec.handle import handle_of
from otelexec.lifecycle import lifecycle
from otelexec.options import Options
from otelexec.propagation import incoming
from otelexec.running import RunningExecution
from otelexec.store.rows import CANCELLED, FAILED, LOST, PAUSED, SUCCEEDED, TIMED_OUT
from otelexec.store.run_queries import retry_wait_ns
from otelexec.store.runs import EXPIRED, DueRun, RunRecord, SetRunOutput
from otelexec_trigger import engine, wire
from otelexec_trigger.carried import unwrapped
from otelexec_trigger.executors import awaited, is_coroutine_function, run_to_end
from otelexec_trigger.settings import LEFTOVER_SECONDS, MAX_OUTPUT_BYTES, SYSTEM

logger = logging.getLogger("otelexec.trigger")

RETRY: Final = "retry"
"""Classification of a failure that is followed by another attempt."""


class _Expired(OtelexecError):
    """Nobody began the run before its time to live was over."""


def attempt(due: DueRun, function: Callable[[Any], Any]) -> bool:
    """
    Attempt a run.

    Args:
        due: The run.
        function: Its task.

    Returns:
        Whether there was an attempt; False when another worker was faster. How it ended is on the record.

    Raises:
        StoreUnavailable: The attempt could not be opened.
    """
    run = due.run
    try:
        _execute(run, function, _classifier(run), takes_lapsed=due.lapsed)
    except ExecutionBusy as error:
        logger.debug("otelexec.trigger.busy: %s", error)
        return False
    return True


def dismiss(run: RunRecord) -> None:
    """Close a run that waits and won't be run: it was cancelled, or it has expired. One that is being attempted stays."""

    def refuse(_: Any) -> None:
        raise _Expired(f"Nobody began {run.run_id} before its time to live was over.")

    def classify(error: BaseException) -> Ending | None:
        if not isinstance(error, _Expired):
            return None
        return Ending(CANCELLED, EXPIRED, error_message=str(error))

    try:
        _execute(run, refuse, classify, cancel_wins=False)
    except ExecutionBusy as error:
        logger.debug("otelexec.trigger.busy: %s", error)


def _execute(
    run: RunRecord, function: Callable[[Any], Any], classify: Classifier, *, takes_lapsed: bool = False, cancel_wins: bool = True
) -> None:
    runtime = _runtime.get()
    attributes = _attributes(run)
    options = Options(
        run.task,
        kind=SpanKind.CONSUMER,
        attributes=attributes,
        classify=classify,
        timeout=run.max_seconds,
        cancel_wins=cancel_wins,
        exclusive=True,
        takes_lapsed=takes_lapsed,
        # Another worker may have made an attempt since the run was read: whether to retry, and when, was decided without it.
        expected_attempts=run.attempts,
        max_output_bytes=MAX_OUTPUT_BYTES,
    )
    begun: list[RunningExecution] = []

    def call() -> Any:
        execution = current_execution()
        if isinstance(execution, RunningExecution):
            begun.append(execution)
            metrics.waited(attributes[semconv.QUEUE_LATENCY], run.task, attributes)
        return function(unwrapped(wire.decode(run.payload, run.payload_type)))

    def call_and_keep() -> Any:
        value = call()
        return _keep(run, run_to_end(awaited(value)) if inspect.isawaitable(value) else value)

    async def wait_and_keep() -> Any:
        return _keep(run, await awaited(call()))

    steps = lifecycle(runtime, options)
    before = otel_context.get_current()
    otel_context.attach(_context(run))
    started = time.perf_counter_ns()
    try:
        if is_coroutine_function(function):
            _run_coroutine(run, call_async(runtime, steps, wait_and_keep, run.max_seconds))
        else:
            call_sync(runtime, steps, call_and_keep)
    except BaseException as error:
        if not begun and isinstance(error, ExecutionCancelled):
            return
        if not begun:
            raise
        # All else is on the record: a cancelled coroutine and an exit are the end of the task, not of the process, whose own
        # signal handlers raise nothing.
        logger.log(
            _level(begun[0].ending), "otelexec.trigger.raised: %s of %s", run.run_id, run.task, exc_info=not isinstance(error, _Expired)
        )
    finally:
        # By value: the task may have attached and detached in any order.
        otel_context.attach(before)
        if begun and begun[0].ending is not None:
            metrics.took((time.perf_counter_ns() - started) / 1e9, run.task, attributes, begun[0].ending)


def _level(ending: Ending | None) -> int:
    if ending is None or ending.state not in (FAILED, TIMED_OUT):
        return logging.INFO
    return logging.WARNING if ending.retrying else logging.ERROR


def _run_coroutine(run: RunRecord, attempt: Coroutine[Any, Any, Any]) -> None:
    """Run an attempt in a loop of its own, and leave with the process what keeps that loop from being closed."""
    patience = leaving(f"{run.run_id} of {run.task} has ended")

    async def to_its_end() -> None:
        try:
            await attempt
        finally:
            patience.start()

    try:
        asyncio.run(to_its_end())
    finally:
        patience.cancel()
        if patience.ident is not None:
            patience.join()  # it may be on its way out already: then no other run is to be begun


def leaving(why: str) -> threading.Timer:
    """
    Give a timer that, once started, ends this process although something of a task's still runs in it.

    Python stops no thread, and no coroutine that swallows its cancellation; its loop, and the interpreter's end, wait for them for ever.

    Args:
        why: What has ended before, for the log.
    """

    def leave() -> None:
        logger.warning("otelexec.trigger.leftover: %s; what was left running is ended with its process", why)
        try:
            _runtime.shutdown()
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
        finally:
            os._exit(0)

    timer = threading.Timer(LEFTOVER_SECONDS, leave)
    timer.daemon = True
    return timer


def _context(run: RunRecord) -> Context:
    context, scope = incoming(engine.carrier_of(run), message_id=run.run_id, enqueued_unix_ns=run.created_unix_ns, context=Context())
    if scope.correlation.execution_id == run.execution_id:
        return context
    # Signing keys that were changed in between: the ids are the store's own, whatever becomes of the signature.
    correlation = scope.correlation.model_copy(update={"execution_id": run.execution_id, engine.RUN_ID: run.run_id})
    return with_ids(context, scope, correlation, run.run_id)


def _attributes(run: RunRecord) -> dict[str, Any]:
    return {
        semconv.MESSAGING_SYSTEM: SYSTEM,
        semconv.MESSAGING_OPERATION_NAME: "process",
        semconv.MESSAGING_OPERATION_TYPE: "process",
        semconv.MESSAGING_DESTINATION_NAME: run.task,
        semconv.MESSAGING_MESSAGE_ID: run.run_id,
        semconv.QUEUE_LATENCY: max(0.0, (run.read_unix_ns - _due_unix_ns(run)) / 1e9),
    }


def _due_unix_ns(run: RunRecord) -> int:
    """Give since when a run could have been attempted: one that has been attempted already, since its wait after that was over."""
    due = max(run.created_unix_ns, run.due_unix_ns)
    if run.attempt_ended_unix_ns is None:
        return due
    at_once = run.attempt_state == PAUSED or (run.attempt_state == LOST and run.attempts == 1)
    return max(due, run.attempt_ended_unix_ns + (0 if at_once else retry_wait_ns(run.attempts)))


def _keep(run: RunRecord, value: Any) -> Any:
    """Keep what a task returned: on its attempt, or beside it where a core has closed that already."""
    execution = current_execution()
    if value is None or not isinstance(execution, RunningExecution):
        return value
    handle_of(execution).set_output(value)
    if execution.cores.begun and execution.output is not None:
        engine.commit(SetRunOutput(run.execution_id, execution.output))
    return value


def _classifier(run: RunRecord) -> Classifier:
    more = run.attempts + 1 < run.max_attempts

    def classify(error: BaseException) -> Ending | None:
        error_type, message = describe(error, _runtime.settings().max_error_chars)
        # Where no cancellation was asked for, nobody ended the task: its own code raised it.
        interruption = isinstance(error, INTERRUPTIONS)
        if _is_cancelled(run):
            return Ending(CANCELLED, None, error_type, message, None if interruption else error)
        if isinstance(error, SystemExit | KeyboardInterrupt) and raised_by_signal_handler(error):
            state = CANCELLED if more else FAILED  # and not a run that is CANCELED, which nobody asked for
            return Ending(state, INTERRUPTED, error_type, message, error, retrying=more, depends_on_cancellation=True)
        if isinstance(error, SystemExit) and error.code in (None, 0):
            return Ending(SUCCEEDED, depends_on_cancellation=True)
        retrying = more and (interruption or isinstance(error, Exception))
        classification = RETRY if retrying else None
        return Ending(FAILED, classification, error_type, message, error, retrying=retrying, depends_on_cancellation=True)

    return classify


def _is_cancelled(run: RunRecord) -> bool:
    """Tell whether somebody asked for it, as far as is known here: a core in the task may know before the task around it does."""
    executions = list(_runtime.get().executions.values())
    return any(execution.cancel_requested for execution in executions if execution.id == run.execution_id)
