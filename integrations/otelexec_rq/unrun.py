"""Jobs that no worker runs, or none any more: what was cancelled in the queue, and what RQ finds abandoned."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, Final

from redis.exceptions import RedisError
from rq.exceptions import NoSuchJobError
from rq.job import JobStatus

from otelexec import runtime as _runtime
from otelexec.endings import Ending
from otelexec.store.rows import CANCELLED, Cancellation
from otelexec.store.writes import RequestCancel
from otelexec_rq import consume, endings
from otelexec_rq.settings import CHOICES, GUARD
from otelexec_rq.worker import delivery_of

_QUEUED: Final = ("queued", "deferred", "scheduled", "rate_limited", "ready_to_enqueue", "created")
"""States of a job that no worker has."""


def wrap_cancel(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `Job.cancel`: a job that no worker has is closed, and one that runs is told."""

    @functools.wraps(original)
    def cancel(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not CHOICES.active or vars(self).get(consume.CANCELLED_HERE):
            return original(self, *args, **kwargs)
        stored = GUARD.guarded(_stored)(self)
        status = None if stored is None else _status_of(stored)
        running = GUARD.guarded(self.execution_registry.get_execution_ids)() if status == "started" else None
        result = original(self, *args, **kwargs)

        def record() -> None:
            if status in _QUEUED:
                GUARD.guarded(_on_cancelled)(stored)
            for execution_id in running or ():
                GUARD.guarded(_tell)(execution_id)

        pipeline = args[0] if args else kwargs.get("pipeline")
        if pipeline is None:
            record()
        else:
            _Executed(pipeline, record)
        return result

    return cancel


class _Executed:
    """
    Waits for a pipeline of the caller's: what was cancelled in it is cancelled when it is executed, and not if it is discarded.

    Args:
        pipeline: The pipeline.
        then: What to do then.
    """

    def __init__(self, pipeline: Any, then: Callable[[], None]) -> None:
        self._pipeline = pipeline
        self._then = then
        self._execute, self._reset = pipeline.execute, pipeline.reset
        pipeline.execute, pipeline.reset = self.execute, self.reset

    def execute(self, *args: Any, **kwargs: Any) -> Any:
        """Execute it."""
        self._leave()
        result = self._execute(*args, **kwargs)
        self._then()
        return result

    def reset(self, *args: Any, **kwargs: Any) -> Any:
        """Discard it."""
        self._leave()
        return self._reset(*args, **kwargs)

    def _leave(self) -> None:
        for name in ("execute", "reset"):
            vars(self._pipeline).pop(name, None)


def _stored(job: Any) -> Any:
    """Give a job as the server has it: since somebody got hold of it, a repeat may have been stamped for its next run."""
    try:
        return type(job).fetch(job.id, connection=job.connection, serializer=job.serializer)
    except (NoSuchJobError, RedisError):  # RQ's own cancellation says so next
        return None


def _status_of(job: Any) -> str | None:
    status = job.get_status(refresh=False)
    return None if status is None else str(status.value if isinstance(status, JobStatus) else status)


def _on_cancelled(job: Any) -> None:
    delivery_of(job, None).close(Ending(CANCELLED), asked=True)


def _tell(execution_id: str) -> None:
    """Tell one run of a job of its cancellation; a wish for the job would keep RQ from retrying it, which RQ does all the same."""
    runtime = _runtime.get()
    if runtime.records:
        runtime.journal.write(RequestCancel(execution_id, Cancellation(time.time_ns(), terminate=False)))


def wrap_cleanup(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `StartedJobRegistry.cleanup`, which finds the jobs of workers that are gone."""

    @functools.wraps(original)
    def cleanup(self: Any, timestamp: float | None = None, *args: Any, **kwargs: Any) -> Any:
        found = GUARD.guarded(_expired)(self, timestamp) or []
        result = original(self, timestamp, *args, **kwargs)
        for job, execution_id in found:
            GUARD.guarded(_on_abandoned)(job, execution_id)
        return result

    return cleanup


def wrap_intermediate_cleanup(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `IntermediateQueue.cleanup`, which fails the jobs that a worker took and did not live to begin."""

    @functools.wraps(original)
    def cleanup(self: Any, worker: Any, *args: Any, **kwargs: Any) -> Any:
        return original(self, _Failing(worker), *args, **kwargs)

    return cleanup


class _Failing:
    """
    A worker whose failed jobs nobody has begun.

    Args:
        worker: The worker.
    """

    def __init__(self, worker: Any) -> None:
        self._worker = worker

    def __getattr__(self, name: str) -> Any:
        return getattr(self._worker, name)

    def handle_job_failure(self, job: Any, *args: Any, **kwargs: Any) -> Any:
        """Fail a job."""
        result = self._worker.handle_job_failure(job, *args, **kwargs)
        GUARD.guarded(_on_abandoned)(job, None)
        return result


def _expired(registry: Any, timestamp: float | None) -> list[tuple[Any, str]]:
    """Give the jobs that a registry holds as started although their time is over, with RQ's execution id of that run."""
    score = time.time() if timestamp is None else timestamp
    entries = registry.connection.zrangebyscore(registry.key, 0, score)
    pairs = [entry.decode().rpartition(":") for entry in entries]
    if not pairs:
        return []
    jobs = registry.job_class.fetch_many([job_id for job_id, _, _ in pairs], connection=registry.connection, serializer=registry.serializer)
    return [
        (job, execution_id)
        for job, (_, _, execution_id) in zip(jobs, pairs, strict=True)
        if job is not None and job.get_status(refresh=False) == JobStatus.STARTED
    ]


def _on_abandoned(job: Any, execution_id: str | None) -> None:
    """
    Close the attempt of a job that no worker holds any more, if its horse died before it could open one.

    An open attempt is its own process's as long as that lives, and the reconciler's after that.

    Args:
        job: The job.
        execution_id: RQ's execution id; None where its worker died before RQ gave it one.
    """
    runtime = _runtime.get()
    delivery = delivery_of(job, execution_id)
    record = None if runtime.store is None else runtime.store.execution(delivery.execution(runtime).id)
    if record is not None and any(attempt.ended_unix_ns is None for attempt in record.attempts):
        return
    delivery.settle(endings.abandoned(), time.time_ns())
