"""
The sending side: a PRODUCER span and a `queued` record around each enqueueing, and what the job carries.

A job is stamped when it is made, before anybody can save it. A job that is made first and enqueued later has its id from
the beginning, and its span and record when it is enqueued. What RQ enqueues again (a retry, a dependent, a scheduled job)
has its stamp already; only a job that repeats itself gets a new one for each further run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context import Context
from redis import exceptions as redis_errors

from otelexec.context import EXECUTION_KEY, SCOPE_KEY
from otelexec.correlation import Correlation, Scope, with_ambient
from otelexec.propagation import entries, incoming, outgoing
from otelexec.publishing import Message, publish
from otelexec.w3c import decode_trace
from otelexec_rq import carrier
from otelexec_rq.messages import name_of
from otelexec_rq.settings import CHOICES, GUARD, SYSTEM

OPERATION: Final = "enqueue"

_RESERVED: Final = "_otelexec_reserved"
"""Attribute of a job that was made but not enqueued yet: the context in which its id was assigned."""
_NAMELESS: Final = "_otelexec_nameless"
"""Attribute of a job that was made without an id, and has one because we asked for it."""
_REPEATED: Final = "_otelexec_repeated"
"""Attribute of a job whose next run was stamped: how many were left then."""

_ENDED: Final = ("finished", "failed", "stopped", "canceled")
"""States of a job that has ended. RQ's own retries and requeues, which are attempts at the same execution, do not come here with them."""

# redis-py says so where no connection was made: then the server has nothing.
_NOT_CONNECTED: Final = " connecting to "


class Sending:
    """The jobs that one call enqueues, each with its own block; `jobs` are made while the call runs."""

    def __init__(self) -> None:
        self._base = otel_context.get_current()
        self._open: list[tuple[publish, Message]] = []

    def add(self, job: Any, *, links: tuple[trace.Link, ...] = (), more: Mapping[str, str] | None = None) -> None:
        """
        Open a job's block, and stamp the job.

        Args:
            job: The job.
            links: Links of the PRODUCER span.
            more: What the job carries besides.
        """
        otel_context.attach(self._base)  # the jobs of one call are siblings
        block = publish(name_of(job), destination=job.origin or None, system=SYSTEM, operation=OPERATION, message_id=job.id, links=links)
        message = block.__enter__()
        self._open.append((block, message))
        carried = entries(otel_context.get_current(), message.correlation, message_id=job.id)
        carrier.stamp(job, {**carried, carrier.NAME: name_of(job), **(more or {})})

    def end(self, error: BaseException | None) -> None:
        """End every block: the jobs have left, or the call failed and none has."""
        unknown = isinstance(error, redis_errors.TimeoutError | redis_errors.ConnectionError) and _NOT_CONNECTED not in str(error)
        for block, message in reversed(self._open):
            if unknown:
                message.acceptance_unknown()
            block.__exit__(type(error) if error is not None else None, error, error.__traceback__ if error is not None else None)
        self._open.clear()
        otel_context.attach(self._base)


SENDING: ContextVar[Sending | None] = ContextVar("otelexec_rq_sending", default=None)
"""The call of this thread that enqueues jobs; a job that is run inside it has none."""


@contextmanager
def _sending() -> Iterator[Sending]:
    sending = Sending()
    token = SENDING.set(sending)
    try:
        yield sending
    except BaseException as error:
        sending.end(error)
        raise
    else:
        sending.end(None)
    finally:
        SENDING.reset(token)


def wrap_enqueue(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a method of `Queue` that makes jobs and enqueues them: `enqueue_call`, `enqueue_at`, `enqueue_many`."""

    @functools.wraps(original)
    def enqueue(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not CHOICES.active or SENDING.get() is not None:
            return original(self, *args, **kwargs)
        with _sending():
            return original(self, *args, **kwargs)

    return enqueue


def wrap_enqueue_job(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a method of `Queue` that enqueues a job that was made before: `enqueue_job`, `schedule_job`."""

    @functools.wraps(original)
    def enqueue_job(self: Any, job: Any, *args: Any, **kwargs: Any) -> Any:
        reserved = vars(job).pop(_RESERVED, None) if CHOICES.active else None
        if reserved is None:
            _forget_id(job, kwargs)
            call = functools.partial(original, self, job, *args, **kwargs)
            return _run_again(job, call) if CHOICES.active and SENDING.get() is None and _has_ended(job) else call()
        token = otel_context.attach(reserved)
        try:
            with _sending() as sending:
                job.origin = self.name
                GUARD.call(sending.add, job, links=_dependencies(job), more=_depends(job))
                _forget_id(job, kwargs)
                return original(self, job, *args, **kwargs)
        finally:
            otel_context.detach(token)

    return enqueue_job


def _forget_id(job: Any, options: Mapping[str, Any]) -> None:
    """Leave a job without an id where RQ is about to refuse it for that: a job that is to be unique must be given one."""
    if options.get("unique") and vars(job).get(_NAMELESS):
        job._id = None  # noqa: SLF001 (RQ has no public way to take an id back)


def wrap_create(original: Any) -> Any:
    """Wrap the class method `Job.create`, which makes every job."""

    @functools.wraps(original.__func__)
    def create(cls: Any, *args: Any, **kwargs: Any) -> Any:
        job = original.__func__(cls, *args, **kwargs)
        if CHOICES.active and carrier.takes_stamp(job):
            setattr(job, _NAMELESS, job._id is None)  # noqa: SLF001 (`job.id` would make one)
            sending = SENDING.get()
            if sending is None:
                GUARD.call(_reserve, job)
            else:
                GUARD.call(sending.add, job, links=_dependencies(job), more=_depends(job))
        return job

    return classmethod(create)


def _reserve(job: Any) -> None:
    """Assign the id of a job that is enqueued later, if ever."""
    base = otel_context.get_current()
    correlation = outgoing(base)
    context = _context_of(correlation, base)
    setattr(job, _RESERVED, context)
    carried = entries(context, correlation, message_id=job.id)
    carrier.stamp(job, {**carried, carrier.NAME: name_of(job), **_depends(job)})


def _context_of(correlation: Correlation, base: Context) -> Context:
    """Make the context in which the first message takes these ids."""
    context = with_ambient(base, correlation, correlation.parent_execution_id)
    return otel_context.set_value(SCOPE_KEY, Scope(correlation), otel_context.set_value(EXECUTION_KEY, None, context))


def _depends(job: Any) -> dict[str, str]:
    """Give what a job carries of the jobs that it depends on."""
    parents = _parents(job)
    return {carrier.DEPENDS: ",".join(parents)} if parents else {}


def _dependencies(job: Any) -> tuple[trace.Link, ...]:
    contexts = (decode_trace(text, None) for text in _parents(job))
    return tuple(trace.Link(context) for context in contexts if context is not None)


_PARENTS: Final = "_otelexec_parents"


def _parents(job: Any) -> list[str]:
    """Give the `traceparent` of each job that a job depends on, as far as those are known or can be asked for; asked once."""
    if not job._dependency_ids:  # noqa: SLF001 (there is no public name that does not ask the server)
        return []
    found: list[str] | None = vars(job).get(_PARENTS)
    if found is None:
        asked: list[str] | None = GUARD.call(_ask_for_parents, job)
        found = asked or []
        if found:  # else they may not be saved yet: asked again when the job is enqueued
            setattr(job, _PARENTS, found)
    return found


def _ask_for_parents(job: Any) -> list[str]:
    jobs = type(job).fetch_many(list(job._dependency_ids), connection=job.connection, serializer=job.serializer)  # noqa: SLF001 (as above)
    return [text for each in jobs if each is not None and (text := carrier.traceparent_of(each))]


def wrap_repeat(original: Any) -> Any:
    """Wrap the class method `Repeat.schedule`, which enqueues a job that repeats itself for its next run."""

    @functools.wraps(original.__func__)
    def schedule(cls: Any, job: Any, *args: Any, **kwargs: Any) -> Any:
        call = functools.partial(original.__func__, cls, job, *args, **kwargs)
        if not CHOICES.active:
            return call()
        # A transaction that found its keys changed is begun anew: what was stamped for it then is still right.
        if vars(job).get(_REPEATED) == job.repeats_left:
            with _sending():  # nothing more: else `schedule_job` would take it for a job that is enqueued anew
                return call()
        setattr(job, _REPEATED, job.repeats_left)
        return _run_again(job, call)

    return classmethod(schedule)


def _has_ended(job: Any) -> bool:
    """Tell whether a job has been run to an end: what enqueues it anew, as rq-scheduler does, asks for a further run of it."""
    return job.get_status(refresh=False) in _ENDED


def _run_again(job: Any, call: Callable[[], Any]) -> Any:
    """Have a job enqueued for a further run, which is an execution of its own."""
    next_run = GUARD.call(_next_run, job) if carrier.takes_stamp(job) else None
    if next_run is None:
        return call()
    context, first = next_run
    token = otel_context.attach(context)
    try:
        with _sending() as sending:
            remote = decode_trace(first or "", None)
            links = () if remote is None else (trace.Link(remote),)
            GUARD.call(sending.add, job, links=links, more={carrier.FIRST: first} if first else {})
            return call()
    finally:
        otel_context.detach(token)


def _next_run(job: Any) -> tuple[Context, str | None]:
    """Give the context of a job's next run, of the same request and in a trace of its own, and where its first run is."""
    found = carrier.find(job)
    context, scope = incoming(carrier.carrier_of(found), message_id=job.id, context=Context())
    context = trace.set_span_in_context(trace.INVALID_SPAN, context)
    correlation = scope.correlation.child(scope.correlation.parent_execution_id)
    return _context_of(correlation, context), carrier.text_of(found, carrier.FIRST) or carrier.traceparent_of(job)
