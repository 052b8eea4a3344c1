"""
Scripts that a Trigger.dev task starts by `@trigger.dev/python`: an execution around the whole of one.

The platform says in the environment what it runs (`TRACEPARENT`, and run id and attempt among the resource attributes); who
asked for it stands in the payload, in the first argument.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import sys
from collections.abc import Callable
from typing import Any, Final

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context import Context

from otelexec import runtime as _runtime
from otelexec import semconv
from otelexec.carrier import read_env
from otelexec.correlation import with_ids
from otelexec.drivers import call_async, call_sync
from otelexec.lifecycle import lifecycle
from otelexec.options import Options
from otelexec.w3c import decode_trace
from otelexec_trigger.carried import received, unwrapped
from otelexec_trigger.engine import RUN_ID
from otelexec_trigger.executors import awaited, is_coroutine_function, name_of, run_to_end
from otelexec_trigger.trigger_dev import SYSTEM

# The platform does not percent-encode the values, so a value ends where the next known name begins.
_ATTRIBUTE: Final = r"(?:\A|,)\s*{}=(.*?)(?=,\s*[A-Za-z_][\w.$-]*=|\Z)"


def run(executor: Callable[[Any], Any], *, name: str | None = None) -> Any:
    """
    Run an executor as the execution that the platform has started this script for.

    The payload is the JSON in `sys.argv[1]`; None without an argument. The result goes to standard output as one line of
    JSON, the last one. What the executor raises goes on: Python then writes the traceback to standard error and exits with
    1, or with the code of a SystemExit. A result that JSON does not have is such an exception too. As a decorator, it runs
    the function where that is defined.

    Args:
        executor: Any callable of one argument, the payload without the reserved key. What it returns is awaited if it can be.
        name: Name of the execution; None: the executor's qualified name.

    Returns:
        What the executor returned, awaited.
    """
    runtime = _runtime.get()
    argument = sys.argv[1] if len(sys.argv) > 1 else None
    told = os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    attempt = _attribute(told, "ctx.attempt.number") or ""
    context, links = _context(_decoded(argument), _attribute(told, "ctx.run.id"))
    options = Options(
        name or name_of(executor),
        kind=trace.SpanKind.CONSUMER,
        attributes=_attributes(told),
        links=links,
        number=int(attempt) if attempt.isdecimal() and len(attempt) < 6 else None,  # noqa: PLR2004 (a number that is one)
    )

    def call() -> Any:
        return executor(None if argument is None else unwrapped(json.loads(argument)))

    # Made into JSON within the attempt: its record is not to say that all went well when the script then ends with 1.

    def call_and_render() -> tuple[Any, str]:
        value = call()
        value = run_to_end(awaited(value)) if inspect.isawaitable(value) else value
        return value, _line(value)

    async def wait_and_render() -> tuple[Any, str]:
        value = await awaited(call())
        return value, _line(value)

    steps = lifecycle(runtime, options)
    before = otel_context.get_current()
    otel_context.attach(context)
    try:
        if is_coroutine_function(executor):
            value, line = run_to_end(call_async(runtime, steps, wait_and_render, None))
        else:
            value, line = call_sync(runtime, steps, call_and_render)
    finally:
        otel_context.attach(before)
    sys.stdout.write(line)
    sys.stdout.flush()
    return value


def _line(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), default=str, allow_nan=False) + "\n"


def _context(payload: Any, run_id: str | None) -> tuple[Context, tuple[trace.Link, ...]]:
    """Give the context of the execution: ids and baggage of the payload, the platform's span as parent, the sender's as a link."""
    environment = read_env(os.environ)
    context, scope = received(payload, environment, message_id=run_id)
    links: tuple[trace.Link, ...] = ()
    parent = decode_trace(environment.traceparent, environment.tracestate) if environment.traceparent else None
    sender = trace.get_current_span(context).get_span_context()
    if parent is not None:
        if sender.is_valid and sender.span_id != parent.span_id:
            links = (trace.Link(sender),)
        context = trace.set_span_in_context(trace.NonRecordingSpan(parent), context)
    if run_id is None:
        return context, links
    known = {RUN_ID: run_id}
    if not scope.trusted:
        # The payload's ids are not believed, but the run id is the platform's: its next attempt is to be the same execution's.
        known |= {"execution_id": run_id, "request_id": run_id}
    return with_ids(context, scope, scope.correlation.model_copy(update=known), run_id), links


def _attributes(told: str) -> dict[str, Any]:
    known = {
        semconv.MESSAGING_SYSTEM: SYSTEM,
        semconv.MESSAGING_OPERATION_NAME: "process",
        semconv.MESSAGING_OPERATION_TYPE: "process",
        semconv.MESSAGING_DESTINATION_NAME: _attribute(told, "ctx.task.id"),
        semconv.MESSAGING_MESSAGE_ID: _attribute(told, "ctx.run.id"),
    }
    return {name: value for name, value in known.items() if value}


def _attribute(told: str, name: str) -> str | None:
    found = re.search(_ATTRIBUTE.format(re.escape(name)), told)
    return found[1].strip() or None if found is not None else None


def _decoded(argument: str | None) -> Any:
    try:
        return None if argument is None else json.loads(argument)
    except (ValueError, RecursionError):
        return None
