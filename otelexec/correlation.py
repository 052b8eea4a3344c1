"""
Who asked for this work: execution id, request id, source, and the source's own fields.

A `Correlation` is an immutable value; `correlate()` opens a `Scope` that holds one and hands out its execution id
once; `with_ambient()` puts the part of it that every outgoing call may carry into the OpenTelemetry baggage. How it
travels with a message is in `propagation.py` and `envelope.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from opentelemetry import context as otel_context
from opentelemetry.baggage import _BAGGAGE_KEY  # private: see with_ambient, and guarded by a test
from opentelemetry.context.context import Context
from pydantic import ValidationError

from otelexec import runtime, semconv
from otelexec.context import SCOPE_KEY, current_execution, current_scope, detach
from otelexec.errors import CorrelationError
from otelexec.sources import (
    DIRECT,
    MODELS,
    OWNERS,
    RESERVED,
    UNION,
    AnyCorrelation,
    Correlation,
    ScheduleCorrelation,
    WebhookCorrelation,
    WorkflowCorrelation,
)
from otelexec.w3c import clean

if TYPE_CHECKING:
    from opentelemetry.trace import Link

    from otelexec.context import CurrentExecution

__all__ = [
    "DIRECT",
    "AnyCorrelation",
    "Correlation",
    "ScheduleCorrelation",
    "Scope",
    "WebhookCorrelation",
    "WorkflowCorrelation",
    "ambient",
    "correlate",
    "enclosing",
    "foreign",
    "running",
    "with_ambient",
    "with_ids",
]


class Scope:
    """
    What `correlate()` and `extract()` open: a correlation whose execution id is there to be used once.

    A forked child gets derived ids only: its siblings and its parent hold the same scope, and one id must not
    become several executions. To run a message in a forked child under the message's id, extract it there.

    Attributes:
        correlation: The scope's own.
        links: What the spans of executions and messages should be linked to, such as an untrusted caller.
        trusted: Whether the carrier was believed; True for `correlate()`.
        message_id: The message's own id, as the backend knows it; None when there is none.
        enqueued_unix_ns: When the message was made, in nanoseconds since 1970; None when it doesn't say.
        execution: The execution that the scope was opened in; None when there was none.
    """

    __slots__ = ("_pid", "_unused", "correlation", "enqueued_unix_ns", "execution", "links", "message_id", "trusted")

    def __init__(
        self,
        correlation: Correlation,
        *,
        links: tuple[Link, ...] = (),
        trusted: bool = True,
        message_id: str | None = None,
        enqueued_unix_ns: int | None = None,
        execution: CurrentExecution | None = None,
    ) -> None:
        self.correlation = correlation
        self.links = links
        self.trusted = trusted
        self.message_id = message_id
        self.enqueued_unix_ns = enqueued_unix_ns
        self.execution = execution
        self._unused = [correlation]
        self._pid = os.getpid()

    def holds_in(self, execution: CurrentExecution | None) -> bool:
        """Tell whether no execution has begun in it: whether it was opened in the one that is current, or there is none."""
        return execution is None or self.execution is execution

    def take(self) -> Correlation:
        """
        Give the correlation for one more execution or message: the scope's own once, after that derived ones.

        Running and sending use up the same id. Any number of threads may ask: exactly one gets the scope's own.
        """
        if self._unused and self._pid == os.getpid():
            try:
                return self._unused.pop()  # atomic, and unlike a lock it can't be inherited in the locked state by a fork
            except IndexError:  # another thread was faster
                pass
        return self.correlation.child(self.correlation.parent_execution_id)


def enclosing(context: Context | None = None) -> Correlation | None:
    """
    Give the correlation that holds at this point: that of the innermost scope or execution, whichever is inside.

    Args:
        context: Where to look; None means the current context.

    Returns:
        None outside any scope and execution.
    """
    scope, execution = near_scope(context), running(context)
    if scope is not None:
        return scope.correlation
    return None if execution is None else execution.correlation


def near_scope(context: Context | None = None) -> Scope | None:
    """
    Give the innermost scope, as long as no execution has begun in it.

    Args:
        context: Where to look; None means the current context.
    """
    scope = current_scope(context)
    return scope if scope is not None and scope.holds_in(running(context)) else None


def running(context: Context | None = None) -> CurrentExecution | None:
    """
    Give the execution that work at this point belongs to.

    Args:
        context: Where to look; None means the current context.

    Returns:
        None outside any execution.
    """
    execution = current_execution(context)
    return execution if execution is not None and execution.id is not None else None


def with_ambient(context: Context, correlation: Correlation, parent_execution_id: str | None = None) -> Context:
    """
    Put into the baggage of a context what every call made in it may carry: never the execution id.

    One pass over the members and one new context: `baggage.set_baggage` copies both for each key.

    Args:
        context: Where to start. Members that are not ours are kept, older `otelexec.*` ones are replaced.
        correlation: Whose request id and source to set, and those of its fields that the setting `ambient` names.
        parent_execution_id: What a callee's executions have as their parent; None for no such member.
    """
    values = dict(context)
    values[_BAGGAGE_KEY] = ambient(correlation, parent_execution_id, foreign(context))
    return Context(values)


def with_ids(context: Context, scope: Scope, correlation: Correlation, message_id: str | None) -> Context:
    """
    Give a message's context with other ids than the message carries.

    Args:
        context: What `propagation.incoming` made of the message.
        scope: The scope in it.
        correlation: The ids that count.
        message_id: The message's own id; None when it has none.
    """
    own = Scope(correlation, links=scope.links, trusted=scope.trusted, message_id=message_id, enqueued_unix_ns=scope.enqueued_unix_ns)
    return otel_context.set_value(SCOPE_KEY, own, with_ambient(context, correlation))


def ambient(correlation: Correlation, parent_execution_id: str | None, others: Mapping[str, object]) -> dict[str, object]:
    """
    Give the baggage members that `with_ambient` sets.

    Args:
        correlation: As there.
        parent_execution_id: As there.
        others: The members that are not ours.
    """
    # Ours first: the SDK's propagator cuts at the end when the header gets too long.
    members: dict[str, object] = {semconv.REQUEST_ID: correlation.request_id, semconv.SOURCE: correlation.source}
    if parent_execution_id is not None:
        members[semconv.PARENT_EXECUTION_ID] = parent_execution_id
    allowed = runtime.settings().ambient
    if allowed:
        members.update((semconv.PREFIX + name, value) for name, value in correlation.fields.items() if name in allowed)
    if others:
        members.update(others)
    return members


def foreign(context: Context) -> dict[str, object]:
    """Give the baggage members of a context that are not ours."""
    present = context.get(_BAGGAGE_KEY)
    if not present or not isinstance(present, dict):
        return {}
    return {name: value for name, value in present.items() if not str(name).startswith(semconv.PREFIX)}


@contextmanager
def correlate(
    *,
    source: str,
    execution_id: str | None = None,
    request_id: str | None = None,
    attributes: Mapping[str, Any] | None = None,
    trigger_type: str | None = None,
    **fields: Any,
) -> Iterator[Correlation]:
    """
    Say who asks for the work that is run or sent inside the `with` block, which may hold asynchronous code.

    The first execution run or message sent in the block has the execution id, each further one a new id and the
    same request id. Inside an execution each is a child of it.

    Args:
        source: `workflow`, `schedule`, `webhook`, or any other name of 1 to 128 characters.
        execution_id: The id of the first execution; None mints one. The id of an earlier execution makes a new
            attempt at it.
        request_id: None takes that of the enclosing scope or execution, else mints one.
        attributes: More fields under free names; their values become text. A value of None is left out.
        trigger_type: How the source was triggered; None when it doesn't matter.
        **fields: The source's own: workflow_id; schedule_id, scheduled_for; webhook_id, path, provider.

    Yields:
        The correlation of the first execution.

    Raises:
        CorrelationError: A field is not one of the source's, a name is reserved, an id is empty, or a value is neither text nor a
            number, date or UUID.
    """
    outer = enclosing()
    scope = near_scope()
    execution = running()
    parent = execution.id if execution is not None else outer.parent_execution_id if outer is not None else None
    correlation = _validated(
        source,
        {
            "execution_id": execution_id,
            "request_id": request_id if request_id is not None or outer is None else outer.request_id,
            "parent_execution_id": parent,
            "trigger_type": trigger_type,
        },
        fields,
        {} if attributes is None else attributes,
    )
    context = with_ambient(otel_context.get_current(), correlation, parent)
    inner = Scope(correlation, links=() if scope is None else scope.links, execution=execution)
    token = otel_context.attach(otel_context.set_value(SCOPE_KEY, inner, context))
    try:
        yield correlation
    finally:
        detach(token)


def _validated(source: object, known: dict[str, Any], fields: Mapping[str, Any], attributes: Mapping[str, Any]) -> Correlation:
    """Build what `correlate()` was asked for, or say in one line why that can't be."""
    if not isinstance(source, str):
        raise CorrelationError(f"source must be text, not {type(source).__name__}")
    own = MODELS.get(source, Correlation).OWN
    for name in fields:
        if name not in own:
            owner = f", which is a field of source={OWNERS[name]!r}" if name in OWNERS else ""
            raise CorrelationError(f"source={source!r} has no field {name!r}{owner}: use attributes={{{name!r}: ...}}")
    if not isinstance(attributes, Mapping):
        raise CorrelationError(f"attributes must be a mapping of names to text, not {type(attributes).__name__}")
    for name in attributes:
        if not isinstance(name, str):
            raise CorrelationError(f"attribute names must be text, not {type(name).__name__}")
        if name in RESERVED:
            raise CorrelationError(f"attribute name {name!r} is reserved: choose another one")
        if name in own:
            raise CorrelationError(f"attribute name {name!r} is a field of source={source!r}: give it as {name}=...")
    try:
        values = {clean(name): value for name, value in attributes.items()}
        return UNION.validate_python({**values, **fields, **known, "source": source})
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        # The first part of the place is the union's tag; an error of the whole model names its field itself.
        where = "".join(f"{part} " for part in first["loc"][1:])
        raise CorrelationError(where + str(first["msg"]).removeprefix("Value error, ")) from None
