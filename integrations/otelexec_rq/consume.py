"""
The running side: an attempt around each run of a job.

It is opened before RQ's clock for the job starts and closed after that has stopped, but before RQ persists anything and
before any callback: `handle_execution_ended` is the first thing that RQ does then. In between the function's own end is
noted where it happens. A job of a synchronous queue has neither clock nor worker, and is opened and closed around the
function itself.
"""

from __future__ import annotations

import functools
import logging
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

from opentelemetry import context as otel_context
from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan
from rq.exceptions import InvalidJobOperation
from rq.job import Job

from otelexec import metrics, semconv
from otelexec import runtime as _runtime
from otelexec.classification import classify
from otelexec.drivers import advance, expect
from otelexec.errors import ExecutionCancelled
from otelexec.lifecycle import Steps, lifecycle
from otelexec.running import RunningExecution
from otelexec.spans import row_of
from otelexec.w3c import encode_traceparent
from otelexec_rq import carrier, endings
from otelexec_rq.messages import last_attempt, open_context, options_of
from otelexec_rq.publish import SENDING
from otelexec_rq.settings import CHOICES, GUARD

logger = logging.getLogger("otelexec.rq")

CONTEXT = "_otelexec_context"
"""Attribute of a job that has been run here: the context of its last run, for its callbacks."""
CANCELLED_HERE = "_otelexec_cancelled"
"""Attribute of a job that RQ is told of a cancellation that is recorded already."""

DONE = "_otelexec_done"
"""Attribute of a worker: a byte of memory that it shares with the horses it forks, which each sets once it has closed what it ran."""

RUNNING: dict[str, Run] = {}
"""The runs in this process, by job id: what a command from another thread is about."""

_run: ContextVar[Run | None] = ContextVar("otelexec_rq_run", default=None)


class Run:
    """
    One run of a job.

    Args:
        job: The job.
        token: RQ's execution id; None where it runs without one.
        around: The context to stay in, of a job that is called where it was enqueued; None for a clean one.

    Attributes:
        stopped: Whether `stop-job` was asked for.
    """

    __slots__ = (
        *("_attributes", "_error", "_found", "_may_retry", "_runtime", "_steps", "_value"),
        *("before", "context", "execution", "job", "performed", "performing", "stopped"),
    )

    context: Context
    execution: RunningExecution

    def __init__(self, job: Any, token: str | None, around: Context | None = None) -> None:
        self.job = job
        self.before = otel_context.get_current()
        self.performed = self.performing = False
        self.stopped = False
        self._value: Any = None
        self._error: BaseException | None = None
        self._found = carrier.find(job)
        self._may_retry = token is not None
        self._runtime = _runtime.get()
        self._steps: Steps | None = None
        options = options_of(job, token, is_stopped=lambda: self.stopped)
        otel_context.attach(open_context(job, token, around))
        try:
            steps = lifecycle(self._runtime, options)
            call = expect(advance(self._runtime, steps))
        finally:
            otel_context.attach(self.before)
        self._steps = steps
        self.context = call.context
        self.execution = call.subject
        if (self.execution.number or 1) > 1 and not self.execution.duplicate:
            GUARD.call(self._link_to_previous)
        self._attributes = options.attributes or {}
        setattr(job, CONTEXT, self.context)
        latency = self._attributes.get(semconv.QUEUE_LATENCY)
        if latency is not None:
            metrics.waited(latency, self.execution.name, self._attributes)

    def _link_to_previous(self) -> None:
        """Link to the attempt before, which the job does not carry if its horse was killed or somebody requeued it."""
        execution, span = self.execution, self.execution.span
        previous = last_attempt(execution.id, before=execution.number or 1)
        if previous is None or not isinstance(span, ReadableSpan) or previous.span_id in {link.context.span_id for link in span.links}:
            return
        span.add_link(previous)
        execution.attempt_row = replace(execution.attempt_row, span=row_of(span, execution.correlation.members()))
        execution.start_links = len(span.links)
        # Whoever closes it in place of this process writes the span from this row.
        self._runtime.journal.write(replace(execution.attempt_row, takes_over=True))

    def perform(self, original: Callable[[Any], Any]) -> Any:
        """Call the function, and note how it ended."""
        self.performing = True
        try:
            value = original(self.job)
        except BaseException as error:
            self._error, self.performed = error, True
            raise
        self._value, self.performed = value, True
        return value

    def close(self, error: BaseException | None = None) -> None:
        """
        Close the attempt, once.

        Args:
            error: What ended the run of a job whose function never ended; None when nothing was raised.
        """
        steps, self._steps = self._steps, None
        if steps is None:
            return
        if self.performed:
            error = self._error
            self.execution.ending = endings.returned(self.job, self._value, may_retry=self._may_retry) if error is None else None
        if self.execution.ending is None:
            self.execution.ending = classify(self.execution, error)
        self._stamp_for_retry(retrying=self.execution.ending.retrying)
        seconds = (time.perf_counter_ns() - self.execution.clock_started_ns) / 1e9
        metrics.took(seconds, self.execution.name, self._attributes, self.execution.ending)
        advance(self._runtime, steps, error)

    def keep_stamp(self, job: Any) -> None:
        """Put what this run's job carries back where a job has lost it."""
        if self._found and not carrier.find(job):
            carrier.stamp(job, self._found)

    def _stamp_for_retry(self, *, retrying: bool) -> None:
        """Have a retry, which RQ saves with the meta that it finds here, come from this attempt, whatever the job made of its meta."""
        if not self._found:
            return
        span = self.execution.span.get_span_context()
        carried = dict(self._found)
        if retrying and span.is_valid:
            carried[carrier.PREVIOUS] = encode_traceparent(span)
        if carrier.find(self.job) != carried:
            carrier.stamp(self.job, carried)


def execution_id_of(worker: Any, execution: Any = None) -> str | None:
    """
    Give RQ's execution id of what a worker runs.

    Args:
        worker: The worker.
        execution: RQ's execution, where it was handed over; None in versions that keep it at the worker.
    """
    found = getattr(worker, "execution", None) if execution is None else execution
    return None if found is None else str(found.id)


def wrap_perform_job(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `perform_job` of a worker, which runs a job and persists what became of it."""

    @functools.wraps(original)
    def perform_job(self: Any, job: Any, queue: Any, *args: Any, **kwargs: Any) -> Any:
        if not CHOICES.active:
            return original(self, job, queue, *args, **kwargs)
        execution = args[0] if args else kwargs.get("execution")
        if not self.is_horse:
            return _perform(functools.partial(original, self, job, queue, *args, **kwargs), self, job, execution)
        GUARD.call(_begin)
        try:
            return _perform(functools.partial(original, self, job, queue, *args, **kwargs), self, job, execution)
        finally:
            if DONE in vars(self):
                vars(self)[DONE][0] = 1
            GUARD.call(_leave)

    return perform_job


def _begin() -> None:
    """Say in a horse that its parent reports its death."""
    _runtime.get().be_supervised()


def _leave() -> None:
    """Write what is only in memory, and export what was measured: a horse leaves without Python's exit handlers."""
    patience = _runtime.settings().exit_timeout_seconds
    _runtime.shutdown(leaves=True)
    metrics.flush(patience)


def _perform(original: Callable[[], Any], worker: Any, job: Any, execution: Any) -> Any:
    try:
        run = Run(job, execution_id_of(worker, execution))
    except ExecutionCancelled:
        return _cancel(worker, job, execution)
    except Exception as error:
        if endings.passes(error):
            raise
        logger.exception("otelexec.rq.open: job %s runs without a record", job.id)
        return original()
    RUNNING[job.id] = run
    overridden = type(job).perform
    if overridden is not Job.perform:
        job.perform = functools.partial(run.perform, overridden)
    token = _run.set(run)
    otel_context.attach(run.context)
    try:
        result = original()
    except BaseException as error:
        run.close(error)
        raise
    finally:
        run.close(RuntimeError("the job ended before its function"))
        vars(job).pop("perform", None)
        _run.reset(token)
        RUNNING.pop(job.id, None)
        # By value: others may have attached and detached in between, in any order.
        otel_context.attach(run.before)
    return result


def wrap_save_meta(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Wrap `Job.save_meta`: where a job replaces its meta, whoever finds it abandoned must still find what it carries."""

    @functools.wraps(original)
    def save_meta(self: Any) -> Any:
        run = RUNNING.get(self.id)
        if run is not None and CHOICES.active:
            GUARD.call(run.keep_stamp, self)
        return original(self)

    return save_meta


def wrap_execution_ended(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `handle_execution_ended`: the attempt is closed now that RQ's clock has stopped, before anything is persisted."""

    @functools.wraps(original)
    def handle_execution_ended(self: Any, job: Any, *args: Any, **kwargs: Any) -> Any:
        run = _run.get()
        if run is not None and run.job is job:
            try:
                run.close(sys.exc_info()[1])
            except Exception as error:
                if endings.passes(error):
                    raise
                logger.exception("otelexec.rq.failed: closing job %s", job.id)
        return original(self, job, *args, **kwargs)

    return handle_execution_ended


def wrap_perform(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Wrap `Job.perform`, the only place that an exception of the function leaves unchanged."""

    @functools.wraps(original)
    def perform(self: Any) -> Any:
        if not CHOICES.active:
            return original(self)
        run = _run.get()
        if run is None or run.job is not self:
            return _perform_alone(original, self)
        # A subclass may call it in a `perform` of its own, whose outcome is the one that counts, and more than once.
        return original(self) if run.performing else run.perform(original)

    return perform


def wrap_run_job(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `Queue.run_job` of a synchronous queue: where a class of jobs has a `perform` of its own, that is the run."""

    @functools.wraps(original)
    def run_job(self: Any, job: Any, *args: Any, **kwargs: Any) -> Any:
        overridden = type(job).perform
        if not CHOICES.active or overridden is Job.perform:
            return original(self, job, *args, **kwargs)
        job.perform = functools.partial(_perform_alone, overridden, job)
        try:
            return original(self, job, *args, **kwargs)
        finally:
            vars(job).pop("perform", None)

    return run_job


def _perform_alone(original: Callable[[Any], Any], job: Any) -> Any:
    """Run a job that no worker runs: that of a synchronous queue."""
    around = otel_context.get_current()
    try:
        run = Run(job, None, around)
    except ExecutionCancelled:
        raise
    except Exception as error:
        if endings.passes(error):
            raise
        logger.exception("otelexec.rq.open: job %s runs without a record", job.id)
        return original(job)
    # What it enqueues is its own, not a part of the call that runs it.
    sending, token = SENDING.set(None), _run.set(run)
    otel_context.attach(run.context)
    try:
        return run.perform(original)
    finally:
        otel_context.attach(around)
        _run.reset(token)
        SENDING.reset(sending)
        run.close()


def _cancel(worker: Any, job: Any, execution: Any) -> bool:
    """Tell RQ of a job that was cancelled before it started, and is not run; its record is closed."""
    logger.info("otelexec.rq.cancelled: job %s was cancelled before it started", job.id)
    with suppress(Exception):  # it asks for the function's name at last, and the job's data may not be readable
        worker.prepare_job_execution(job, len(worker.queues) == 1)
    with worker.connection.pipeline() as pipeline:
        if execution is None:
            worker.cleanup_execution(job, pipeline=pipeline)
        else:
            worker.cleanup_execution(job, pipeline=pipeline, execution=execution)
        pipeline.execute()
    setattr(job, CANCELLED_HERE, True)
    with suppress(InvalidJobOperation):  # RQ knows already
        job.cancel()
    return True
