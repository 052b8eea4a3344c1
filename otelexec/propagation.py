"""
The context of one message over carriers of text: headers and the environment.

`inject_*` and `extract_*` are for users; `outgoing`, `entries` and `incoming` are the same in steps, for adapters that
open a PRODUCER span or a queued record in between. Going out, old members are stripped and new ones written within
the limits of W3C. Coming in, nothing raises, whatever the object is, and who is not believed names no execution.
"""

from __future__ import annotations

import hmac
import json
import logging
import os
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.baggage import _BAGGAGE_KEY  # private: see correlation.with_ambient
from opentelemetry.context.context import Context
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanContext

from otelexec import runtime, semconv
from otelexec.carrier import ENVIRONMENT, HEADERS, NOTHING, Carrier, read_env, read_headers, strip
from otelexec.context import SCOPE_KEY, current_scope, detach
from otelexec.correlation import Correlation, Scope, ambient, enclosing, foreign, running
from otelexec.endings import raised_by_signal_handler
from otelexec.ids import MAX_ORIGINAL_CHARS, as_text
from otelexec.w3c import decode_baggage, decode_trace, encode_baggage, encode_traceparent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, MutableMapping
    from contextvars import Token

_logger = logging.getLogger(__name__)

Found = TypeVar("Found")

_SIGNATURE_VERSION: Final = "v1="


# --- Signatures --------------------------------------------------------------------------------------------------


def sign(members: Mapping[str, str], bound: tuple[object, ...]) -> str | None:
    """
    Sign our members with the first key (HMAC-SHA256).

    Args:
        members: The `otelexec.*` members as they are written.
        bound: What they are bound to, such as the message's id; JSON values.

    Returns:
        None when no key is set.
    """
    keys = runtime.settings().signing_keys
    return _SIGNATURE_VERSION + _digest(keys[0], members, bound) if keys else None


def _digest(key: bytes, members: Mapping[str, str], bound: tuple[object, ...]) -> str:
    text = json.dumps([sorted(members.items()), *bound], separators=(",", ":"))
    return hmac.digest(key, text.encode("ascii"), "sha256").hex()


def _is_authentic(signature: str | None, members: Mapping[str, str], bounds: Callable[[], Iterable[tuple[object, ...]]]) -> bool:
    """Tell whether one of the keys made the signature, over these members and one of the things it may be bound to."""
    if signature is None:
        return False
    given = signature.removeprefix(_SIGNATURE_VERSION).encode("utf-8", "replace")
    keys = runtime.settings().signing_keys
    return any(hmac.compare_digest(given, _digest(key, members, bound).encode()) for bound in bounds() for key in keys)


# --- Out ---------------------------------------------------------------------------------------------------------


def outgoing(context: Context, *, retry: bool = False) -> Correlation:
    """
    Decide the ids of one message.

    Inside an execution: a new id, and the execution as the parent. In a scope: its own id for the first message,
    then new ones. Elsewhere: minted.

    Args:
        context: Where the message is sent from.
        retry: Whether the message asks for another attempt at the execution it is sent from, and so keeps its id.
    """
    execution = running(context)
    scope = current_scope(context)
    if execution is not None:
        if retry:
            execution.mark_retry_sent()
            return execution.correlation
        base = scope.correlation if scope is not None and scope.holds_in(execution) else execution.correlation
        return base.child(execution.id)
    if scope is None:
        return Correlation.direct()
    taken = scope.take()
    # Sent from around the execution, by whoever caught its failure: the same work again, whether it ran here or not.
    return scope.correlation if retry else taken


def entries(context: Context, correlation: Correlation, *, message_id: str | None = None) -> dict[str, str]:
    """
    Write what one message carries: `traceparent`, `tracestate`, `baggage` and `otelexec-signature`, as far as they are.

    Args:
        context: Whose current span and baggage to carry; `otelexec.*` members in it are replaced by the correlation's.
        correlation: The message's own.
        message_id: What the signature is bound to; None when the message has no id, or none yet.
    """
    carried, signature = write(context, correlation, lambda: ("message", message_id))
    if signature is not None:
        carried[semconv.HEADER_SIGNATURE] = signature
    return carried


def write(context: Context, correlation: Correlation, bound: Callable[[], tuple[object, ...] | None]) -> tuple[dict[str, str], str | None]:
    """
    Do what `entries` does, with the signature apart.

    Args:
        context: As there.
        correlation: As there.
        bound: Gives what the signature covers besides the members, or None where that can't be signed; only asked
            when keys are set.

    Returns:
        What to carry, and the signature; None where there is none.
    """
    carried: dict[str, str] = {}
    span_context = trace.get_current_span(context).get_span_context()
    if span_context.is_valid:
        carried[semconv.HEADER_TRACEPARENT] = encode_traceparent(span_context)
        if span_context.trace_state:
            carried[semconv.HEADER_TRACESTATE] = span_context.trace_state.to_header()
    ours = correlation.members()
    carried[semconv.HEADER_BAGGAGE], dropped = encode_baggage(ours, foreign(context))
    if dropped:
        _logger.warning("otelexec.baggage.dropped: over the W3C limits: %s", ", ".join(repr(name[:64]) for name in dropped[:32]))
    if runtime.settings().signing_key is None or (covered := bound()) is None:
        return carried, None
    return carried, sign({name: value for name, value in ours.items() if name not in dropped}, covered)


def send(*, retry: bool = False, message_id: str | None = None) -> tuple[Correlation, dict[str, str]]:
    """
    Do everything that sending one message from the current context takes, but for handing it over.

    Args:
        retry: As for `outgoing`.
        message_id: As for `entries`.
    """
    context = otel_context.get_current()
    correlation = outgoing(context, retry=retry)
    announce(context)
    return correlation, entries(context, correlation, message_id=message_id)


def announce(context: Context) -> None:
    """Have the spans written whose ids are about to leave the process. A failure is logged; the message goes out."""
    try:
        runtime.before_send(context)
    except Exception as error:
        if raised_by_signal_handler(error):  # a time limit of the job's around it, which strikes once
            raise
        _logger.exception("otelexec.before_send: open spans could not be written")


def inject_headers(carrier: MutableMapping[str, str], *, retry: bool = False, message_id: str | None = None) -> Correlation:
    """
    Write the current trace, baggage and the ids of one message into headers.

    Args:
        carrier: Changed in place. What it held under our header names, in any case, is removed first.
        retry: Keep the running execution's id, for a message that asks for another attempt at it.
        message_id: The message's own id, which the signature is bound to; None when it has none yet.

    Returns:
        The correlation that the message carries.

    Raises:
        CarrierError: The carrier is no mutable mapping.
    """
    return _inject(carrier, HEADERS, retry=retry, message_id=message_id)


def inject_env(environ: MutableMapping[str, str], *, retry: bool = False, message_id: str | None = None) -> Correlation:
    """
    Write the same as `inject_headers` into an environment: TRACEPARENT, TRACESTATE, BAGGAGE, OTELEXEC_SIGNATURE.

    Args:
        environ: Changed in place, for example a copy of `os.environ` for a child process.
        retry: As for `inject_headers`.
        message_id: As for `inject_headers`.

    Returns:
        The correlation that the environment carries.

    Raises:
        CarrierError: The environment is no mutable mapping.
    """
    return _inject(environ, ENVIRONMENT, retry=retry, message_id=message_id)


def _inject(carrier: MutableMapping[str, str], names: Mapping[str, str], *, retry: bool, message_id: str | None) -> Correlation:
    strip(carrier, names)
    correlation, carried = send(retry=retry, message_id=message_id)
    for written, name in names.items():
        if name in carried:
            carrier[written] = carried[name]
    return correlation


# --- In ----------------------------------------------------------------------------------------------------------


def incoming(
    carrier: Carrier,
    *,
    trusted: bool = True,
    message_id: object = None,
    enqueued_unix_ns: int | None = None,
    legacy: Mapping[str, str] | None = None,
    bounds: Callable[[], Iterable[tuple[object, ...]]] | None = None,
    context: Context | None = None,
) -> tuple[Context, Scope]:
    """
    Make the context that a message's work runs in. Never raises.

    A trusted trace becomes the current span, its baggage replaces what was there. Of an untrusted one the trace is
    linked, its members but for ours are kept, and the ids are new. Inside an open execution only request id and
    fields change: the span stays, and a trace from elsewhere is linked.

    Args:
        carrier: What was found in the message.
        trusted: Whether its sender is believed. With signing keys set, the signature must be right too.
        message_id: The message's own id, which is the execution's when the message carries none; None when it has none.
        enqueued_unix_ns: When it was sent, in nanoseconds since 1970; None when it doesn't say.
        legacy: Ids and fields that a message from before otelexec has, as `otelexec.*` members; None for none.
        bounds: Gives what a valid signature may be bound to; None means the message id, or nothing.
        context: Where to start; None means the current context.

    Returns:
        The context to attach, and the scope that is in it.
    """
    base = otel_context.get_current() if context is None else context
    try:
        own_id, legacy = _id_text(message_id), legacy or {}
        ours, others = decode_baggage(carrier.baggage) if carrier.baggage else ({}, {})
        if trusted and runtime.settings().signing_key is not None:
            # Bound to the message's id, or made before the message had one. What is bound to an id serves no other message.
            trusted = _is_authentic(carrier.signature, ours, bounds or (lambda: (("message", own_id), ("message", None))))
            if not trusted and (carrier is not NOTHING or legacy or own_id):
                _warn_of(carrier)
        execution = running(base)
        members = _members(ours, legacy, own_id) if trusted else _unbelieved(legacy)
        correlation = _correlation_around(base) if trusted and not members else Correlation.from_members(members)
        traced, links = _follow(carrier, base, trusted=trusted, inside=execution is not None)
        scope = Scope(correlation, links=links, trusted=trusted, message_id=own_id, enqueued_unix_ns=enqueued_unix_ns, execution=execution)
        kept = others if execution is None and carrier is not NOTHING else {**foreign(base), **others}
        values = dict(traced)
        values[_BAGGAGE_KEY] = ambient(correlation, correlation.parent_execution_id if execution is None else execution.id, kept)
        values[SCOPE_KEY] = scope
        return Context(values), scope
    except Exception:
        # Reached with settings that can't be read, or a broken context: then nothing in the carrier is believed.
        _logger.exception("otelexec.carrier.unreadable: the work runs under new ids")
        scope = Scope(Correlation.direct(), trusted=False)
        return Context({**base, _BAGGAGE_KEY: {}, SCOPE_KEY: scope}), scope


def _warn_of(carrier: Carrier) -> None:
    reason = "is not signed" if carrier.signature is None else "has a signature that none of the keys made"
    _logger.warning("otelexec.carrier.untrusted: a message %s: its ids are not used, its trace is linked", reason)


def _correlation_around(base: Context) -> Correlation:
    """Give the correlation of a believed message without ids: one more call from where it is taken in."""
    outer, execution = enclosing(base), running(base)
    if outer is None:
        return Correlation.direct()
    return outer.child(outer.parent_execution_id if execution is None else execution.id)


def _follow(carrier: Carrier, base: Context, *, trusted: bool, inside: bool) -> tuple[Context, tuple[trace.Link, ...]]:
    """
    Go on with the trace of a message, or give the link to it where the message isn't believed or is read inside an execution.

    A span of this process stays the parent where it was begun with the same carrier, or where the carrier isn't believed.
    """
    remote = decode_trace(carrier.traceparent, carrier.tracestate) if carrier.traceparent else None
    if remote is None:
        return base, ()
    if inside:
        return base, (trace.Link(remote),)
    current = trace.get_current_span(base)
    if isinstance(current, ReadableSpan) and _has_come_by(current, remote):
        return base, ()
    if trusted:
        return trace.set_span_in_context(trace.NonRecordingSpan(remote), base), ()
    here = current.get_span_context()
    is_own = here.is_valid and not here.is_remote
    return base if is_own else trace.set_span_in_context(trace.INVALID_SPAN, base), (trace.Link(remote),)


def _has_come_by(span: ReadableSpan, remote: SpanContext) -> bool:
    """Tell whether a span was begun with this very carrier, as a web framework's instrumentation does before any code here runs."""
    parent = span.parent
    return parent is not None and parent.is_remote and (parent.trace_id, parent.span_id) == (remote.trace_id, remote.span_id)


def _members(ours: dict[str, str], legacy: Mapping[str, str], message_id: str | None) -> dict[str, str]:
    """Choose the ids of a believed message: its own, those of before otelexec, the message's, in this order."""
    members = ours if semconv.EXECUTION_ID in ours else {**legacy, **ours}
    if message_id is not None:
        members.setdefault(semconv.EXECUTION_ID, message_id)
    # Fixed, not minted: two deliveries of one message must have the same request.
    if members.get(semconv.EXECUTION_ID):
        members.setdefault(semconv.REQUEST_ID, members[semconv.EXECUTION_ID])
    return members


def _unbelieved(legacy: Mapping[str, str]) -> dict[str, str]:
    names = {semconv.EXECUTION_ID: "legacy_execution_id", semconv.REQUEST_ID: "legacy_request_id"}
    return {semconv.PREFIX + kept: legacy[name][:MAX_ORIGINAL_CHARS] for name, kept in names.items() if name in legacy}


def _id_text(value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value or None
    try:
        return as_text(value) or None
    except ValueError:
        return None


class Opening(Generic[Found]):
    """
    What `extract*` give: a context manager that attaches a message's context on entry and detaches it on exit.

    A class, as a generator would cost as much as reading the baggage does.
    """

    __slots__ = ("_open", "_token")

    _token: Token[Context]

    def __init__(self, open_: Callable[[], tuple[Context, Found]]) -> None:
        self._open = open_

    def __enter__(self) -> Found:
        context, found = self._open()
        self._token = otel_context.attach(context)
        return found

    def __exit__(self, *_: object) -> None:
        detach(self._token)


def extract_headers(headers: object, *, trusted: bool = True, message_id: str | None = None) -> Opening[Scope]:
    """
    Run a `with` block, which may hold asynchronous code, as the work that headers ask for. Never raises by itself.

    Args:
        headers: Any object: a mapping, a list or tuple of pairs, something with `.items()`; text or bytes, names in any case.
        trusted: False for callers from outside: their ids are not used, and their trace is linked.
        message_id: The message's own id, used as the execution's when the headers carry none; None when it has none.

    Returns:
        A context manager that gives the scope, with `.correlation` and `.trusted`.
    """
    return Opening(lambda: incoming(read_headers(headers), trusted=trusted, message_id=message_id))


def extract_env(environ: object = None, *, trusted: bool = True, message_id: str | None = None) -> Opening[Scope]:
    """
    Run a `with` block as the work that an environment asks for: TRACEPARENT, TRACESTATE, BAGGAGE, OTELEXEC_SIGNATURE.

    Args:
        environ: Any object; None: the environment of this process.
        trusted: As for `extract_headers`.
        message_id: As for `extract_headers`.

    Returns:
        A context manager that gives the scope, with `.correlation` and `.trusted`.
    """
    return Opening(lambda: incoming(read_env(os.environ if environ is None else environ), trusted=trusted, message_id=message_id))
