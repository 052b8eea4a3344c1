"""The callbacks of a job, each a span under the job's own, with an error of its own: the record says what the function did."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context import Context

from otelexec import __version__, semconv
from otelexec import runtime as _runtime
from otelexec.context import current_scope
from otelexec.endings import describe
from otelexec_rq.consume import CONTEXT
from otelexec_rq.endings import passes
from otelexec_rq.messages import last_attempt, open_context
from otelexec_rq.publish import SENDING
from otelexec_rq.settings import CHOICES

logger = logging.getLogger("otelexec.rq")

KINDS = ("success", "failure", "stopped")

SCOPE = "otelexec_rq"
"""Instrumentation scope of these spans: not the core's, which ends its own with a record."""


def wrapper(kind: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """
    Make the wrapper of `execute_<kind>_callback`, a function in RQ 3 and a method of the job before.

    Args:
        kind: One of `KINDS`.
    """

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def execute(job: Any, *args: Any, **kwargs: Any) -> Any:
            name = getattr(job, f"_{kind}_callback_name", None)
            if not CHOICES.active or not name:
                return original(job, *args, **kwargs)
            span, context = _begin(kind, str(name), job)
            token = otel_context.attach(context)
            sending = SENDING.set(None)  # what a callback enqueues is its own, also inside the call of a synchronous queue
            try:
                return original(job, *args, **kwargs)
            except BaseException as error:
                _note(span, error)
                raise
            finally:
                SENDING.reset(sending)
                otel_context.detach(token)
                span.end()

        return execute

    return make


def _begin(kind: str, name: str, job: Any) -> tuple[trace.Span, Context]:
    """Start the span of a callback; gives the context to call it in as well."""
    try:
        context = _context(job)
        tracer = _runtime.get().provider.get_tracer(SCOPE, __version__, schema_url=semconv.SCHEMA_URL)
        span = tracer.start_span(f"on_{kind} {name}", context, attributes={semconv.CODE_FUNCTION_NAME: name})
        return span, trace.set_span_in_context(span, context)
    except Exception as error:
        if passes(error):
            raise
        logger.exception("otelexec.rq.failed: span of on_%s of job %s", kind, job.id)
        return trace.INVALID_SPAN, otel_context.get_current()


def _note(span: trace.Span, error: BaseException) -> None:
    try:
        error_type, message = describe(error, _runtime.settings().max_error_chars)
        span.set_attribute(semconv.ERROR_TYPE, error_type)
        span.set_status(trace.StatusCode.ERROR, message)
        span.record_exception(error)
    except Exception:  # its own __str__ may raise, and what the callback raised must come out
        logger.debug("otelexec.rq.failed: exception of a callback", exc_info=True)


def _context(job: Any) -> Context:
    """Give the context of the job's last run: of this process's, or else that on the record."""
    own: Context | None = vars(job).get(CONTEXT)
    return open_last(job) if own is None else own


def open_last(job: Any) -> Context:
    """Give a context below the span of a job's last attempt that is on the record, for what is done in its name elsewhere."""
    context = open_context(job, None)
    scope = current_scope(context)
    # Taken: the first job that a callback enqueues is not this one once more.
    span = None if scope is None else last_attempt(scope.take().execution_id)
    return context if span is None else trace.set_span_in_context(trace.NonRecordingSpan(span), context)
